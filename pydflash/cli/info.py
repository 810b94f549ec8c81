"""A GGUF file's header: its keys, and with --tensors every tensor's type, shape and place.

    pydflash info model.gguf
    pydflash info model.gguf --tensors --json

Long texts and arrays are cut, with their length. What a file says cannot drive the terminal: control characters are
spelt out. --json has texts whole and the first elements of arrays.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydflash.cli import terminal
from pydflash.errors import ModelFormatError

if TYPE_CHECKING:
    from pydflash._gguf import Gguf, TensorInfo

HELP = "what a GGUF file's header says"

N_ELEMENTS = 8  # of an array
N_CHARACTERS = 96  # of a text
_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("file", metavar="GGUF")
    parser.add_argument("--tensors", action="store_true", help="list the tensors: type, shape, offset, bytes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints the header."""
    from pydflash._gguf import Gguf

    with Gguf(options.file) as file:
        keys = {key: read_key(file, key) for key in file}
        tensors = list(file.tensors())
    if options.json:
        text = json.dumps(as_dict(options.file, keys, tensors, listed=options.tensors), indent=1)
        print(text.replace("\x7f", "\\u007f"))  # the one control character that JSON leaves as it is
        return 0
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    print(terminal.one_line(f"{options.file}: {len(keys)} keys, {len(tensors)} tensors of {n_bytes / 1e6:,.1f} MB"))
    terminal.table(["key", "type", "value"], [[key, entry["type"], shown(entry)] for key, entry in keys.items()])
    print()
    if options.tensors:
        terminal.table(
            ["tensor", "type", "shape", "offset", "bytes"],
            [[t.name, t.type, f"[{', '.join(map(str, shape(t)))}]", f"{t.offset}", f"{t.n_bytes}"] for t in tensors],
            right=(3, 4),
        )
    else:
        by_type = Counter(tensor.type for tensor in tensors)
        sizes = {kind: sum(t.n_bytes for t in tensors if t.type == kind) for kind in by_type}
        terminal.table(
            ["type", "tensors", "MB"],
            [[kind, f"{n}", f"{sizes[kind] / 1e6:,.1f}"] for kind, n in by_type.most_common()],
            right=(1, 2),
        )
    return 0


def read_key(file: Gguf, key: str) -> dict[str, Any]:
    """type and value of a key; n, the number of elements, where it is an array."""
    kind, element = file.types(key)
    name = _TYPES[kind] if element is None else f"[{_TYPES[element]}]"
    try:
        value, n = file.peek(key, N_ELEMENTS)
    except ModelFormatError as error:  # a u64 that no signed integer holds
        value, n = str(error), None
    if name == "bool":
        value = bool(value)
    return {"type": name, "value": value} | ({} if n is None else {"n": n})


def shown(entry: dict[str, Any]) -> str:
    """A value in one line."""
    value = entry["value"]
    if "n" not in entry:
        return cut(value) if isinstance(value, str) else json.dumps(value)
    elements = [json.dumps(cut(x, N_CHARACTERS // 4) if isinstance(x, str) else x, ensure_ascii=False) for x in value]
    if entry["n"] > len(elements):
        elements.append("...")
    return f"{entry['n']:,}: {', '.join(elements)}"


def cut(text: str, most: int = N_CHARACTERS) -> str:
    """The beginning of a text, and its length if there is more."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def shape(tensor: TensorInfo) -> list[int]:
    """ggml's shape without the ones behind."""
    ne = list(tensor.ne)
    while len(ne) > 1 and ne[-1] == 1:
        ne.pop()
    return ne


def as_dict(path: str, keys: dict[str, Any], tensors: list[TensorInfo], *, listed: bool) -> dict[str, Any]:
    """What --json prints."""

    def plain(value: Any) -> Any:  # JSON has no infinities
        if isinstance(value, list):
            return [plain(x) for x in value]
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    out: dict[str, Any] = {
        "file": path,
        "keys": {key: entry | {"value": plain(entry["value"])} for key, entry in keys.items()},
        "n_tensors": len(tensors),
        "n_bytes": sum(tensor.n_bytes for tensor in tensors),
    }
    if listed:
        out["tensors"] = [
            {"name": t.name, "type": t.type, "shape": shape(t), "offset": t.offset, "n_bytes": t.n_bytes}
            for t in tensors
        ]
    return out
