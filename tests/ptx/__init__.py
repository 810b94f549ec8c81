"""An interpreter of the PTX that nvcc emits: every thread of a block is a lane of numpy arrays.

It proves what a compiled kernel computes and that it computes it legally: accesses within bounds and to initialised
memory, no two threads racing for an address between two barriers, barriers and shuffles met by all their threads. It
proves nothing about speed, about the order in which a device shows one block's writes to another, or about the last
bits of approximate instructions (these are computed in float64 and rounded).

`parse` reads the text, `values` holds arithmetic, `memory` the checked address spaces, `compiler` makes closures of
instructions, `machine` schedules them.
"""

from tests.ptx.compiler import DivergenceError
from tests.ptx.machine import Program, launch
from tests.ptx.memory import Buffer, MisalignedError, OutOfBoundsError, RaceError, UninitialisedError
from tests.ptx.parse import Kernel, Module, PtxError, UnsupportedError

__all__ = [
    "Buffer",
    "DivergenceError",
    "Kernel",
    "MisalignedError",
    "Module",
    "OutOfBoundsError",
    "Program",
    "PtxError",
    "RaceError",
    "UninitialisedError",
    "UnsupportedError",
    "launch",
]
