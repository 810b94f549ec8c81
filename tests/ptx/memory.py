"""Checked memory: bounds, alignment, initialisation, and races between threads.

A `Memory` is a row of bytes seen in cells (the narrowest access of the kernel). Each cell is closed, open or
initialised; shared variables lie between closed red zones. Accesses by lanes are logged; `Races.settle` looks for two
threads that touched one cell, one of them writing, with no barrier between them.

Two levels of order are known: the block's barriers (bar.sync) and, inside a warp, bar.warp.sync. Blocks of one launch
are never ordered: in global memory a cell that one block writes belongs to that block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.parse import PtxError

Array = np.ndarray[Any, np.dtype[Any]]
CLOSED, OPEN, INITIALISED = 0, 1, 2
NOBODY, MANY = -1, -2
READ, WRITE, ATOMIC = 0, 1, 2  # what an access does; atomic ones do not race with each other
RED_ZONE = 256  # bytes


class OutOfBoundsError(PtxError):
    """An access outside every variable or buffer, or a write to an input."""


class MisalignedError(PtxError):
    """An address that is not a multiple of the access's size."""


class UninitialisedError(PtxError):
    """A read of memory that nobody wrote."""


class RaceError(PtxError):
    """Two threads touched one address without a barrier between them, and one of them wrote."""


@dataclass
class Threads:
    """Who is asking: for each lane its block, its number in the block, and how many barriers it has passed."""

    block: Array  # in the grid
    number: Array  # in the block
    block_clock: Array  # bar.sync passed
    warp_clock: Array  # bar.warp.sync passed since then

    def of(self, lanes: Array | None) -> Threads:
        if lanes is None:
            return self
        return Threads(self.block[lanes], self.number[lanes], self.block_clock[lanes], self.warp_clock[lanes])

    def name(self, i: int) -> str:
        return f"thread {self.number[i]} of block {self.block[i]}"


@dataclass
class _Entry:
    cells: Array
    threads: Threads
    clocks: tuple[Array, Array]  # copies: the clocks go on
    kind: int
    line: int


class Races:
    """The log of one memory, and what is left of it once it was settled: which block owns a cell."""

    def __init__(self, n_cells: int, *, between_blocks: bool) -> None:
        self._log: list[_Entry] = []
        self.n_logged = 0
        self._n_cells = n_cells
        self._owner = np.full(n_cells if between_blocks else 0, NOBODY, np.int64)  # block
        self._written, self._plain = (np.zeros(n_cells if between_blocks else 0, bool) for _ in range(2))

    def note(self, cells: Array, threads: Threads, kind: int, line: int) -> None:
        clocks = (threads.block_clock.copy(), threads.warp_clock.copy())
        self._log.append(_Entry(cells, threads, clocks, kind, line))
        self.n_logged += cells.size

    def settle(self) -> None:
        """Raise RaceError if anything logged since the last call raced.

        To be called where all blocks are at one barrier or have ended: nothing before it races with anything after.
        """
        if not self._log:
            return
        width = [entry.cells.size // len(entry.threads.number) for entry in self._log]

        def gather(parts: list[Array]) -> Array:
            return np.concatenate([np.repeat(part, n) if n > 1 else part for part, n in zip(parts, width, strict=True)])

        cells = np.concatenate([entry.cells.ravel() for entry in self._log])
        kind = np.repeat([entry.kind for entry in self._log], [entry.cells.size for entry in self._log])
        number = gather([entry.threads.number for entry in self._log]).astype(np.int64)
        block = gather([entry.threads.block for entry in self._log]).astype(np.int64)
        block_clock = gather([entry.clocks[0] for entry in self._log])
        warp_clock = gather([entry.clocks[1] for entry in self._log])

        if self._owner.size:
            self._between_blocks(cells, block, kind)
        # Cells of different blocks differ, or were just told apart, so the clocks alone make an epoch.
        self._look(cells, block_clock, number // 32, kind)  # between warps
        self._look(cells, block_clock * (int(warp_clock.max()) + 1) + warp_clock, number, kind)  # inside a warp
        self._log.clear()
        self.n_logged = 0

    def written_cells(self, cells: Array) -> bool:
        """Whether any of these (a mask over all) was written by a launch so far."""
        return bool((self._written & cells).any())

    def _between_blocks(self, cells: Array, block: Array, kind: Array) -> None:
        fresh = self._owner[cells] == NOBODY
        self._owner[cells[fresh]] = block[fresh]
        self._owner[cells[(self._owner[cells] != block)]] = MANY
        self._written[cells[kind != READ]] = True
        self._plain[cells[kind != ATOMIC]] = True
        raced = (self._written & self._plain)[cells] & (self._owner[cells] == MANY)
        if raced.any():
            self._raise(int(cells[raced][0]))

    def _look(self, cells: Array, epoch: Array, owner: Array, kind: Array) -> None:
        """Raise where one cell has, in one epoch, two owners, a write, and an access that is not atomic."""
        if (epoch == epoch[0]).all():
            keys, n_keys = cells, self._n_cells
        else:
            written = np.zeros(self._n_cells, bool)
            written[cells[kind != READ]] = True
            among = written[cells]  # only these can race, and they are few
            cells, epoch, owner, kind = cells[among], epoch[among], owner[among], kind[among]
            distinct, keys = np.unique(np.stack([cells, epoch]), axis=1, return_inverse=True)
            keys, n_keys = keys.ravel(), distinct.shape[1]
        first = np.empty(n_keys, np.int64)
        first[keys] = owner
        shared, written, plain = (np.zeros(n_keys, bool) for _ in range(3))
        shared[keys[first[keys] != owner]] = True
        written[keys[kind != READ]] = True
        plain[keys[kind != ATOMIC]] = True
        raced = (shared & written & plain)[keys]
        if raced.any():
            self._raise(int(cells[raced][0]))

    def _raise(self, cell: int) -> None:
        """Name some of the accesses to the cell, writes first."""
        found = []
        for entry in sorted(self._log, key=lambda entry: entry.kind == READ):
            for i in np.nonzero(entry.cells.reshape(len(entry.threads.number), -1) == cell)[0][:2]:
                name = f"{('read', 'write', 'atomic')[entry.kind]} at line {entry.line} by {entry.threads.name(int(i))}"
                found.append(f"{name} after {entry.clocks[0][i]} barriers")
        raise RaceError(f"cell {cell}: " + "; ".join(dict.fromkeys(found[:6])))


class Memory:
    """Bytes in cells. Offsets are checked; an offset is where an access of `width` bytes begins."""

    def __init__(
        self, n_bytes: int, grain: int, name: str, *, races: bool, between_blocks: bool = False, writable: bool = True
    ) -> None:
        self.name = name
        self.n_bytes = n_bytes
        self.grain = grain
        self.data = np.zeros(-(-n_bytes // 16) * 16 + 16, np.uint8)
        self.state = np.full(self.data.size // grain, CLOSED, np.uint8)
        self.races = Races(len(self.state), between_blocks=between_blocks) if races else None
        self.writable = writable
        self.all_initialised = False  # nothing to look up
        self.constant_reads: Array | None = None  # cells read through the read-only path

    def open(self, offset: int, size: int, state: int = OPEN) -> None:
        self.state[offset // self.grain : (offset + size) // self.grain] = state

    def cells(self, offsets: Array, size: int, width: int, writes: bool) -> Array:
        """The cells of accesses of `size` bytes in elements of `width`, bounds and alignment checked. A matrix when
        an access spans several."""
        bad = (offsets < 0) | (offsets + size > self.n_bytes)
        if bad.any():
            raise OutOfBoundsError(f"{size} bytes at offset {offsets[bad][0]} of {self.name}, which has {self.n_bytes}")
        if (offsets & (size - 1)).any():
            raise MisalignedError(f"{size} bytes at offset {offsets[offsets % size != 0][0]} of {self.name}")
        first = offsets // self.grain
        spans = size // self.grain
        cells = first if spans == 1 else first[:, None] + np.arange(spans)
        if writes and not self.writable:
            raise OutOfBoundsError(f"{self.name} is an input, and offset {offsets[0]} of it is written")
        if not self.all_initialised:
            state = self.state[cells]
            if not state.all():
                at = offsets[(state == CLOSED) if spans == 1 else (state == CLOSED).any(1)][0]
                raise OutOfBoundsError(
                    f"{size} bytes at offset {at} of {self.name}, between its variables or behind them"
                )
            if not writes and (state != INITIALISED).any():
                at = offsets[(state != INITIALISED) if spans == 1 else (state != INITIALISED).any(1)][0]
                raise UninitialisedError(
                    f"{size} bytes at offset {at} of {self.name} are read before anybody wrote them"
                )
        return cells

    def settle(self) -> None:
        if self.races:
            self.races.settle()


@dataclass(eq=False)
class Buffer:
    """Global memory with a name. `array` is its content; an output is given by shape and starts uninitialised.

    `writable` allows stores. `shift` moves the first byte off the 256-byte boundary where allocations begin.
    """

    name: str
    array: Array
    writable: bool = False
    initialised: bool = True
    shift: int = 0
    address: int = field(default=0, init=False)  # set by the launch
    memory: Memory = field(init=False, repr=False)

    @classmethod
    def output(cls, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Buffer:
        return cls(name, np.zeros(shape, dtype), writable=True, initialised=False)

    def place(self, address: int, grain: int) -> None:
        """Take a place in the address space of one launch; the content is copied in."""
        content = np.ascontiguousarray(self.array)
        size = self.shift + content.nbytes
        was = getattr(self, "memory", None)
        writable = self.writable
        memory = Memory(size, grain, f"buffer {self.name!r}", races=writable, between_blocks=True, writable=writable)
        memory.data[self.shift : size] = content.reshape(-1).view(np.uint8)
        memory.all_initialised = self.initialised and self.shift == 0
        memory.open(self.shift, content.nbytes, INITIALISED if self.initialised else OPEN)
        if was is not None and not self.initialised:  # a second launch goes on where the first ended
            memory.state = np.repeat(was.state, was.grain).reshape(-1, grain).min(axis=1)
        if self.writable:
            memory.constant_reads = np.zeros(len(memory.state), bool)
        self.address, self.memory = address + self.shift, memory

    def take_back(self) -> None:
        """The content after a launch, into `array`."""
        if self.writable:
            content = self.memory.data[self.shift : self.shift + self.array.nbytes]
            self.array = content.copy().view(self.array.dtype).reshape(self.array.shape)

    def written(self) -> bool:
        """Whether every byte of an output was written."""
        return not bool((self.memory.state == OPEN).any())
