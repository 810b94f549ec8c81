"""GGUF files for tests, byte by byte, so that any field can be wrong.

    good = File(keys=[key("general.name", STRING, "x")], tensors=[Tensor("a", (4, 2))])
    good.bytes()                                       # a valid file
    replace(good, n_keys=2**63).bytes()                # announces more keys than it has
    File(tensors=[Tensor("a", (4,), type=77)]).bytes() # a type nobody has

Valid files come from the `gguf` package wherever it can write them (`write_sample`); this module is for the others. It
knows GGUF's layout, which is little-endian: magic, version, number of tensors, number of keys, keys, tensor headers,
padding to the alignment, data.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes, *, length: int | None = None) -> bytes:
    """A GGUF string. length: what to announce instead of the truth."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length % 2**64) + raw


def payload(kind: int, value: Any) -> bytes:
    """A single value of one of the types above."""
    return text(value) if kind == STRING else struct.pack("<" + _PACK[kind], value)


def key(name: str | bytes, kind: int, value: Any) -> bytes:
    """A key with a single value."""
    return text(name) + struct.pack("<I", kind) + payload(kind, value)


def array_key(name: str, kind: int, values: Sequence[Any], *, length: int | None = None) -> bytes:
    """A key with an array. length: what to announce instead of the truth."""
    n = len(values) if length is None else length % 2**64
    return text(name) + struct.pack("<IIQ", ARRAY, kind, n) + b"".join(payload(kind, v) for v in values)


@dataclass(frozen=True)
class Tensor:
    """A tensor header. offset: where its data is said to lie in the data region; None puts it after the one before.
    size: bytes of data it brings; by default four an element, as F32 takes."""

    name: str | bytes
    ne: Sequence[int]
    type: int = 0
    offset: int | None = None
    size: int | None = None
    n_dims: int | None = None


@dataclass(frozen=True)
class File:
    keys: Sequence[bytes] = ()
    tensors: Sequence[Tensor] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    tail: bytes = field(default=b"", repr=False)

    def bytes(self) -> bytes:
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys % 2**64
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors % 2**64
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys) + b"".join(self.keys)
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            n_dims = len(tensor.ne) if tensor.n_dims is None else tensor.n_dims
            head += text(tensor.name) + struct.pack("<I", n_dims)
            head += b"".join(struct.pack("<Q", n % 2**64) for n in tensor.ne)
            head += struct.pack("<IQ", tensor.type % 2**32, offset % 2**64)
            data += bytes(4 * int(np.prod(tensor.ne)) if tensor.size is None else tensor.size)
            data += bytes(-len(data) % self.alignment)
        return head + bytes(-len(head) % self.alignment) + data + self.tail


def write_sample(path: Path) -> dict[str, Any]:
    """A valid file of about 12 KB by the gguf package, with every type of key. Returns the keys' values."""
    rng = np.random.RandomState(1)
    writer = gguf.GGUFWriter(path, "sample")
    singles: dict[str, tuple[Any, Any]] = {
        "t.u8": (writer.add_uint8, 255),
        "t.i8": (writer.add_int8, -128),
        "t.u16": (writer.add_uint16, 65535),
        "t.i16": (writer.add_int16, -32768),
        "t.u32": (writer.add_uint32, 2**32 - 1),
        "t.i32": (writer.add_int32, -(2**31)),
        "t.u64": (writer.add_uint64, 2**63 - 1),
        "t.i64": (writer.add_int64, -(2**63)),
        "t.f32": (writer.add_float32, float(np.float32(0.1))),
        "t.f64": (writer.add_float64, 0.1),
        "t.true": (writer.add_bool, True),
        "t.false": (writer.add_bool, False),
        "t.string": (writer.add_string, "Hello! 毕老师 größer \0 end"),
    }
    values: dict[str, Any] = {"general.architecture": "sample"}
    for name, (add, value) in singles.items():
        add(name, value)
        values[name] = value
    arrays: dict[str, Any] = {
        "a.i32": [0, -1, 2**31 - 1],
        "a.f32": [0.5, -2.0, 1e30],
        "a.bool": [True, False, True, True],
        "a.string": ["", "a", "größer", "\0", "x" * 300],
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(100)],
    }
    for name, array in arrays.items():
        writer.add_array(name, array)
        values[name] = array
    writer.add_tensor("f32", rng.randn(3, 5).astype(np.float32))
    writer.add_tensor("f16", rng.randn(2, 3, 4).astype(np.float16))
    writer.add_tensor("i32", np.arange(7, dtype=np.int32))
    for quant in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16):
        writer.add_tensor(quant.name, gguf.quants.quantize(rng.randn(4, 64).astype(np.float32), quant), raw_dtype=quant)
    writer.add_tensor("last", rng.randn(2, 2, 2, 32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values
