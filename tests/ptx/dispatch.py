"""The backend's own host dispatch with its launches interpreted: graph nodes in, PTX run, results out.

The emulator in tests/cuda_emulator compiles the host's half of the kernels' sources and runs one graph node; this is
the device it then hands its launches to. So grids, blocks and arguments are those that the real code computes. Owns the
way from a launch to a kernel of the PTX (by name), and from host pointers to named buffers. It refuses a launch of a
kernel that the PTX does not hold.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.cuda_emulator import Emulator
from tests.ptx.machine import BUFFER_SPACING, Program, launch
from tests.ptx.memory import Buffer
from tests.ptx.parse import Module, PtxError


class LaunchRecord(ctypes.Structure):
    """struct LaunchRecord of emulator.h."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("n_dynamic_shared", ctypes.c_size_t),
        ("n_arguments", ctypes.c_size_t),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
    )


class Allocation(ctypes.Structure):
    """struct Allocation of harness.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("n", ctypes.c_size_t),
        ("given", ctypes.c_bool),
        ("writable", ctypes.c_bool),
    )


OnLaunch = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(LaunchRecord))


def own_name(mangled: str) -> str:
    """A mangled name without the anonymous namespace that g++ and nvcc name differently."""
    match = re.match(r"_ZN(\d+)_GLOBAL__N_", mangled)
    return mangled[match.end(1) + int(match[1]) :] if match else mangled


class Interpreter(Emulator):
    """An emulator whose kernels are those of the PTX given.

    `launches` lists what ran: (kernel, grid, block), newest last.
    """

    def __init__(self, library: Path, ptx: Iterable[str]) -> None:
        super().__init__(library)
        self._kernels = {own_name(name): (module, name) for module in map(Module, ptx) for name in module.names}
        self._programs: dict[str, Program] = {}
        self._names = self._symbols(library)
        self._buffers: dict[tuple[int, int], Buffer] = {}
        self._failure: Exception | None = None
        self._on_launch = OnLaunch(self._launched)  # kept: C++ holds only the address
        self._library.emulator_allocations.restype = ctypes.c_size_t
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def compute(self, node: int, *, order: str = "forward", seed: int = 0) -> None:
        """Compute one graph node. Raises what the interpreter found, or the harness's RuntimeError."""
        self._buffers.clear()
        self._failure = None
        self._library.emulator_on_other_device(self._on_launch)
        try:
            super().compute(node, order=order, seed=seed)
        except RuntimeError:
            if self._failure is None:
                raise
        finally:
            self._library.emulator_on_other_device(None)
        if self._failure is not None:
            raise self._failure

    def _symbols(self, library: Path) -> dict[int, str]:
        """The library's functions, local ones too, by address."""
        table = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
        found = {name: int(at, 16) for at, name in re.findall(r"^([0-9a-f]+) [tTwW] (\S+)$", table, re.MULTILINE)}
        here = ctypes.cast(self._library.emulator_compute, ctypes.c_void_p).value or 0
        return {here + at - found["emulator_compute"]: name for name, at in found.items()}

    def _launched(self, pointer: Any) -> bool:
        try:
            self._launch(pointer.contents)
        except Exception as error:  # raised again where the C++ in between has returned
            self._failure = error
            return False
        return True

    def _launch(self, record: LaunchRecord) -> None:
        name = own_name(self._names[record.kernel])
        if name not in self._kernels:
            raise PtxError(f"a launch of {name}, which the PTX does not hold")
        module, mangled = self._kernels[name]
        if name not in self._programs:
            self._programs[name] = Program(module.kernel(mangled))
        grid, block = tuple(record.grid), tuple(record.block)
        self.launches.append((mangled, grid, block))
        buffers = self._allocated()
        arguments = [
            self._translate(ctypes.string_at(record.arguments[i], record.sizes[i]), buffers)
            for i in range(record.n_arguments)
        ]
        every = [buffer for _, _, buffer in buffers]
        launch(self._programs[name], grid, block, arguments, shared_bytes=record.n_dynamic_shared, buffers=every)
        for address, size, buffer in buffers:
            if buffer.writable:
                ctypes.memmove(address, buffer.array.tobytes(), size)

    def _allocated(self) -> list[tuple[int, int, Buffer]]:
        """Device memory as buffers. One that lives through several launches keeps what is known of it."""
        n = self._library.emulator_allocations(None, ctypes.c_size_t(0))
        table = (Allocation * n)()
        self._library.emulator_allocations(table, ctypes.c_size_t(n))
        found = []
        for i, entry in enumerate(table):
            key = (entry.data, entry.n)
            content = np.frombuffer(ctypes.string_at(entry.data, entry.n), np.uint8)
            buffer = self._buffers.get(key)
            if buffer is None:
                name = f"{'input' if not entry.writable else 'in/out' if entry.given else 'output'} {i}"
                buffer = self._buffers[key] = Buffer(name, content, writable=entry.writable, initialised=entry.given)
            buffer.array = content
            found.append((entry.data, entry.n, buffer))
        return found

    @staticmethod
    def _translate(argument: bytes, buffers: list[tuple[int, int, Buffer]]) -> bytes:
        """Pointers in an argument (a value or a struct) to where `launch` puts the buffers."""
        words = bytearray(argument)
        for at in range(0, len(words) - 7, 8):
            value = int.from_bytes(words[at : at + 8], "little")
            for i, (address, size, _) in enumerate(buffers, start=1):
                if address <= value < address + size:
                    words[at : at + 8] = ((i << BUFFER_SPACING) + value - address).to_bytes(8, "little")
        return bytes(words)
