"""Metadata of a GGUF file, read through the core, which checks every count, type and offset first."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pydflash._lib import c_path, check, ffi, lib
from pydflash.errors import ModelFormatError

# gguf's value types; numbers as `struct` spells them
_STRING, _ARRAY = 8, 9
_INTEGERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 7: "?", 10: "Q", 11: "q"}
_FLOATS = {6: "f", 12: "d"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's header. ne: ggml's order, the first runs fastest. offset: bytes from the start of the file."""

    name: str
    type: str
    ne: tuple[int, int, int, int]
    offset: int
    n_bytes: int


class Gguf:
    """An open GGUF file; a context manager. A getter returns None for an absent key; a wrong type is an error."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        out = ffi.new("pf_gguf **")
        check(lib.pf_gguf_open(c_path(path), out), path=path)
        self.path = os.fspath(path)
        self._handle: Any = ffi.gc(out[0], lib.pf_gguf_free)

    def close(self) -> None:
        """Unmaps the file; closing twice is fine."""
        handle, self._handle = self._handle, None
        if handle is not None:
            ffi.release(handle)

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return bool(lib.pf_gguf_type(self._handle, key.encode()) >= 0)

    def get_int(self, key: str) -> int | None:
        """An integer or bool of any width."""
        if key not in self:
            return None
        out = ffi.new("int64_t *")
        check(lib.pf_gguf_get_int(self._handle, key.encode(), out), path=self.path)
        return int(out[0])

    def get_str(self, key: str) -> str | None:
        """A string."""
        if key not in self:
            return None
        try:
            return self._string(key).decode()
        except UnicodeDecodeError as error:
            raise self._malformed(key, f"is not UTF-8 ({error})") from None

    def get_ints(self, key: str) -> list[int] | None:
        """An array of integers or bools of any width."""
        if key not in self:
            return None
        if lib.pf_gguf_array_type(self._handle, key.encode()) not in _INTEGERS:
            raise self._malformed(key, "is not an array of integers")
        return self._numbers(key)[0]

    def get_strings(self, key: str) -> list[str] | None:
        """An array of strings. 248k of them take about 50 ms."""
        if key not in self:
            return None
        try:
            return [raw.decode() for raw in self._strings(key)[0]]
        except UnicodeDecodeError as error:
            raise self._malformed(key, f"holds a string that is not UTF-8 ({error})") from None

    def __iter__(self) -> Iterator[str]:
        """All keys, in the file's order."""
        for i in range(lib.pf_gguf_n_keys(self._handle)):
            yield ffi.string(lib.pf_gguf_key(self._handle, i)).decode("utf-8", "replace")

    def data_start(self) -> int | None:
        """Where in the file the first tensor's data begins; None when there is no tensor."""
        return min((tensor.offset for tensor in self.tensors()), default=None)

    def types(self, key: str) -> tuple[int, int | None]:
        """gguf's value type of a key, and of its elements if it is an array."""
        kind = int(lib.pf_gguf_type(self._handle, key.encode()))
        return kind, int(lib.pf_gguf_array_type(self._handle, key.encode())) if kind == _ARRAY else None

    def get(self, key: str) -> Any:
        """The value of a key of any type."""
        kind, element = self.types(key)
        if kind == _ARRAY:
            return self.get_strings(key) if element == _STRING else self._numbers(key)[0]
        if kind == _STRING:
            return self.get_str(key)
        if kind in _FLOATS:
            out = ffi.new("double *")
            check(lib.pf_gguf_get_float(self._handle, key.encode(), out), path=self.path)
            return float(out[0])
        return self.get_int(key)

    def peek(self, key: str, most: int) -> tuple[Any, int | None]:
        """What a key holds, for people to look at: its value, or the first `most` elements of an array and their
        number (None: no array). Bytes that are not UTF-8 come as \\xff."""
        kind, element = self.types(key)
        if kind == _STRING:
            return self._string(key).decode("utf-8", "backslashreplace"), None
        if kind != _ARRAY:
            return self.get(key), None
        if element != _STRING:
            return self._numbers(key, most)
        found, n = self._strings(key, most)
        return [raw.decode("utf-8", "backslashreplace") for raw in found], n

    def tensors(self) -> Iterator[TensorInfo]:
        """All tensors, in the file's order."""
        out = ffi.new("pf_tensor_info *")
        for i in range(lib.pf_gguf_n_tensors(self._handle)):
            check(lib.pf_gguf_tensor(self._handle, i, out), path=self.path)
            name, kind = (
                ffi.string(text).decode("utf-8", "replace") for text in (out.name, lib.pf_type_name(out.type))
            )
            yield TensorInfo(name, kind, tuple(out.ne), int(out.offset), int(out.size))

    def _string(self, key: str) -> bytes:
        out, size = ffi.new("const char **"), ffi.new("uint64_t *")
        check(lib.pf_gguf_get_string(self._handle, key.encode(), out, size), path=self.path)
        return bytes(ffi.buffer(out[0], size[0]))

    def _strings(self, key: str, most: int | None = None) -> tuple[list[bytes], int]:
        """The first strings of an array, and the number of all."""
        blob, offsets, n = ffi.new("const char **"), ffi.new("const uint64_t **"), ffi.new("uint64_t *")
        check(lib.pf_gguf_get_strings(self._handle, key.encode(), blob, offsets, n), path=self.path)
        edges = ffi.unpack(offsets[0], (n[0] if most is None else min(n[0], most)) + 1)
        raw = bytes(ffi.buffer(blob[0], edges[-1])) if edges[-1] else b""
        return [raw[start:end] for start, end in pairwise(edges)], int(n[0])

    def _numbers(self, key: str, most: int | None = None) -> tuple[list[Any], int]:
        """The first numbers of an array, and the number of all."""
        code = (_INTEGERS | _FLOATS)[lib.pf_gguf_array_type(self._handle, key.encode())]
        data, n = ffi.new("const void **"), ffi.new("uint64_t *")
        check(lib.pf_gguf_get_array(self._handle, key.encode(), data, n), path=self.path)
        layout = struct.Struct(f"<{n[0] if most is None else min(n[0], most)}{code}")
        raw = bytes(ffi.buffer(ffi.cast("const char *", data[0]), layout.size)) if layout.size else b""
        return list(layout.unpack(raw)), int(n[0])

    def _malformed(self, key: str, what: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {key} {what}", path=self.path)
