"""The weights of a Hugging Face folder, memory-mapped: one model.safetensors, or shards with an index.

Every header length, offset, shape and name is checked before use. (The `safetensors` package has no numpy type for
BF16, so the bytes are read here.)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash.errors import ModelFileError, ModelFormatError

if TYPE_CHECKING:
    import numpy as np

_ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
_MAX_HEADER = 100 << 20  # bytes; the format's own limit


@dataclass(frozen=True)
class Weight:
    """One tensor. raw: its bytes, uint8 [n_bytes], mapped read-only."""

    dtype: str  # as safetensors spells it: "F32", "F16", "BF16", ...
    shape: tuple[int, ...]  # Hugging Face order: the last index runs fastest
    raw: np.ndarray[Any, Any]


def read_weights(folder: Path) -> dict[str, Weight]:
    """All tensors of a folder by name.

    Raises ModelFileError for a file that is missing or unreadable, ModelFormatError for a malformed one.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _read_file(folder / "model.safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFormatError(f"{index}: weight_map is not an object of file names", path=index)
    weights: dict[str, Weight] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ModelFormatError(f"{index}: weight_map names {name!r}, which is not beside it", path=index)
        weights |= _read_file(folder / name)
    missing = weight_map.keys() - weights.keys()
    if missing:
        raise ModelFormatError(f"{index}: weight_map lists {min(missing)}, which no shard has", path=index)
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", path=path) from None
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not JSON: {error}", path=path) from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} does not hold a JSON object", path=path)
    return value


def _read_file(path: Path) -> dict[str, Weight]:
    import numpy as np

    try:
        size = path.stat().st_size
        if size < 8:
            raise ModelFormatError(f"{path}: {size} bytes are too few for a safetensors file", path=path)
        data: np.ndarray[Any, Any] = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}", path=path) from None
    n_header = int.from_bytes(data[:8].tobytes(), "little")
    if n_header > min(size - 8, _MAX_HEADER):
        raise ModelFormatError(f"{path}: a header of {n_header} bytes does not fit a file of {size}", path=path)
    try:
        header = json.loads(data[8 : 8 + n_header].tobytes())
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: the header is not JSON: {error}", path=path) from None
    if not isinstance(header, dict):
        raise ModelFormatError(f"{path}: the header is not a JSON object", path=path)
    body = data[8 + n_header :]
    return {name: _weight(path, name, entry, body) for name, entry in header.items() if name != "__metadata__"}


def _weight(path: Path, name: str, entry: Any, body: np.ndarray[Any, Any]) -> Weight:
    def is_counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError):
        raise ModelFormatError(f"{path}: tensor {name} lacks dtype, shape or data_offsets", path=path) from None
    if not is_counts(shape) or not is_counts(offsets) or len(offsets) != 2:
        raise ModelFormatError(f"{path}: tensor {name} has shape {shape} and data_offsets {offsets}", path=path)
    if dtype not in _ITEM_SIZE:
        raise ModelFormatError(f"{path}: tensor {name} has the unknown dtype {dtype!r}", path=path)
    start, end = offsets
    if not start <= end <= body.size or end - start != math.prod(shape) * _ITEM_SIZE[dtype]:
        raise ModelFormatError(
            f"{path}: tensor {name} ({dtype} {shape}) cannot lie at bytes {start} to {end} of {body.size}", path=path
        )
    return Weight(dtype, tuple(shape), body[start:end])
