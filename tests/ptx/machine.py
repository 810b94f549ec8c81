"""Launches, and the scheduler that runs lanes through a kernel.

Owns the order in which lanes run: always those with the smallest program counter, so that lanes that parted meet again.
A barrier holds a lane until all lanes of its block that have not ended stand at the same barrier; a shuffle or vote
until every lane that its mask names does. Lanes that wait for each other in vain are reported (DivergenceError).

It refuses (UnsupportedError) barriers other than number 0 over all threads, and indirect branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.compiler import BOOL, LOCAL_WINDOW, SHARED_WINDOW, Compiler, DivergenceError, Get, Lanes, Step, pick
from tests.ptx.memory import OPEN, RED_ZONE, Array, Buffer, Memory, OutOfBoundsError, Threads
from tests.ptx.parse import Instruction, Kernel, Literal, PtxError, Symbol, UnsupportedError
from tests.ptx.values import dtype_of

Argument = int | float | bytes | Buffer | np.generic

BUFFER_SPACING = 36  # buffer i begins at i << 36: no overrun of one reaches another
POISON = 0xFFC0DEAD  # what registers hold before they are written; as f32 a NaN
ENDED = np.iinfo(np.int32).max


# -- the program --------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Instructions that lanes run through together. A barrier or a collective is a block of its own."""

    steps: list[tuple[Step, int]]  # with the line
    kind: str = "plain"  # plain, branch, exit, barrier, warp (a barrier of the warp), collective
    target: int = 0  # of a branch, as a block
    guard: int = -1
    guard_is: bool = True
    line: int = 0
    mask: Get | None = None
    whole_warp: bool = False  # the mask is the constant of all lanes


class Program:
    """A kernel, compiled once for any number of launches."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.compiler = Compiler(kernel)
        self.blocks: list[Block] = []
        self._build()

    def _build(self) -> None:
        kernel, compiler = self.kernel, self.compiler
        leaders = set(kernel.labels.values())
        starts: dict[int, int] = {}  # instruction -> block
        fixups: list[tuple[Block, str]] = []
        open_block: Block | None = None

        def begin(at: int, kind: str = "plain", line: int = 0) -> Block:
            starts[at] = len(self.blocks)
            self.blocks.append(Block([], kind, line=line))
            return self.blocks[-1]

        for at, instruction in enumerate(kernel.instructions):
            try:
                base = instruction.parts[0]
                if at in leaders:
                    open_block = None
                if base in ("bra", "ret", "exit"):
                    block = open_block or begin(at)
                    block.kind, block.line = ("branch" if base == "bra" else "exit"), instruction.line
                    if instruction.guard:
                        block.guard, block.guard_is = compiler.numbers[instruction.guard], instruction.guard_is
                    if base == "bra":
                        (to,) = instruction.operands
                        if not isinstance(to, Symbol):
                            raise UnsupportedError("an indirect branch")
                        fixups.append((block, to.name))
                    open_block = None
                elif base in ("bar", "barrier") or base in ("shfl", "vote", "redux", "activemask"):
                    self._synchronous(begin(at, line=instruction.line), instruction)
                    open_block = None
                else:
                    open_block = open_block or begin(at)
                    open_block.steps.append((compiler.step(instruction), instruction.line))
            except UnsupportedError as error:
                raise UnsupportedError(f"{error} ({kernel.where(instruction.line)})") from None
        begin(len(kernel.instructions), "exit")
        for block, label in fixups:
            block.target = starts[kernel.labels[label]]

    def _synchronous(self, block: Block, instruction: Instruction) -> None:
        if instruction.guard:
            raise UnsupportedError("a barrier or collective with a guard")
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in ("bar.sync", "barrier.sync", "barrier.cta.sync", "barrier.sync.aligned"):
            if operands != (Literal(0),):
                raise UnsupportedError("a barrier other than number 0 of all threads")
            block.kind = "barrier"
            return
        if opcode == "bar.warp.sync":
            block.kind, mask = "warp", operands[0]
        else:
            block.kind, mask = "collective", operands[-1]
            block.steps.append((self.compiler.step(instruction), instruction.line))
        block.mask = self.compiler.source(mask, "b32")
        block.whole_warp = isinstance(mask, Literal) and mask.value & 0xFFFFFFFF == 0xFFFFFFFF


# -- the machine --------------------------------------------------------------------------------------------------


class Machine:
    """Some blocks of one launch, all their threads as lanes."""

    def __init__(
        self,
        program: Program,
        arguments: bytes,
        buffers: dict[int, Buffer],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        blocks: range,
        shared_bytes: int,
    ) -> None:
        self.program, self.arguments, self.buffers = program, arguments, buffers
        self.n_instructions = 0
        compiler = program.compiler
        n_threads = block[0] * block[1] * block[2]
        self.n_lanes = len(blocks) * n_threads
        number = np.tile(np.arange(n_threads), len(blocks))
        self.local_block = np.repeat(np.arange(len(blocks)), n_threads)
        in_grid = self.local_block + blocks.start
        self.lane = number % 32
        self.warps_per_block = -(-n_threads // 32)
        self.warp = self.local_block * self.warps_per_block + number // 32
        clocks = (np.zeros(self.n_lanes, np.int64), np.zeros(self.n_lanes, np.int64))
        self.threads = Threads(in_grid, number, *clocks)
        self.special = {"%laneid": self.lane}
        for name, extent, index in (("tid", block, number), ("ctaid", grid, in_grid)):
            self.special[f"%{name}.x"] = index % extent[0]
            self.special[f"%{name}.y"] = index // extent[0] % extent[1]
            self.special[f"%{name}.z"] = index // (extent[0] * extent[1])
            for axis, size in zip("xyz", extent, strict=True):
                self.special[f"%n{name}.{axis}"] = np.full(self.n_lanes, size)
        poison = {1: POISON & 0xFF, 2: POISON & 0xFFFF, 4: POISON, 8: POISON << 32 | POISON}
        self.registers = [
            np.full(self.n_lanes, poison[dtype.itemsize] if dtype != BOOL else False, dtype)
            for dtype in (compiler.register_dtype(name) for name in program.kernel.registers)
        ]
        self.shared, self.shared_stride = self._place(
            "shared memory", compiler.shared, compiler.shared_end, shared_bytes, len(blocks), races=True
        )
        self.local, self.local_stride = self._place(
            "local memory", compiler.local, compiler.local_end, 0, self.n_lanes, races=False
        )
        self.parameters = Memory(len(arguments), 1, "the parameters", races=False, writable=False)
        self.parameters.data[: len(arguments)] = np.frombuffer(arguments, np.uint8)
        self.parameters.all_initialised = True
        self._lane_numbers = np.arange(self.n_lanes)

    def _place(
        self, name: str, places: dict[str, tuple[int, int]], end: int, extra: int, copies: int, *, races: bool
    ) -> tuple[Memory, int]:
        """`copies` of a space: its variables, and behind them what the launch sized."""
        stride = -(-(end + extra + RED_ZONE) // 256) * 256 if places else 256
        memory = Memory(stride * copies, self.program.compiler.grains[name.split()[0]], name, races=races)
        one = memory.state[: stride // memory.grain].copy()
        for offset, size in places.values():
            one[offset // memory.grain : (offset + (size or extra)) // memory.grain] = OPEN
        memory.state[: len(one) * copies] = np.tile(one, copies)
        return memory, stride

    def by_warp(self, value: Array, lanes: Lanes, neutral: Any) -> Array:
        """Values of lanes as [warps, 32], `neutral` where no lane is."""
        table = np.full((self.warp[-1] + 1, 32), neutral, np.asarray(value).dtype)
        table[pick(self.warp, lanes), pick(self.lane, lanes)] = value
        return table

    def resolve(self, address: Array, lanes: Lanes, space: str, size: int) -> list[tuple[Memory, Array, Any, Lanes]]:
        """Addresses as (memory, offsets, which of the addresses, their lanes), one entry per memory touched."""
        everyone: Any = slice(None)
        n = self.n_lanes if lanes is None else len(lanes)
        if address.ndim == 0:
            address = np.full(n, address)
        if space == "generic":
            if ((address >> 60) == 0).all():
                space = "global"
            elif ((address >> 60) == 1).all():
                address, space = address - SHARED_WINDOW, "shared"
            elif ((address >> 60) == 2).all():
                address, space = address - LOCAL_WINDOW, "local"
            else:
                raise UnsupportedError("one instruction reaches several spaces through generic addresses")
        if space == "shared" or space == "local":
            memory, stride = (self.shared, self.shared_stride) if space == "shared" else (self.local, self.local_stride)
            bad = (address < 0) | (address + size > stride)
            if bad.any():
                raise OutOfBoundsError(f"{size} bytes at address {address[bad][0]} of {memory.name}")
            which = pick(self.local_block if space == "shared" else self._lane_numbers, lanes)
            return [(memory, address + which * stride, everyone, lanes)]
        if space == "param":
            return [(self.parameters, address, everyone, lanes)]
        number = address >> BUFFER_SPACING
        within = address & ((1 << BUFFER_SPACING) - 1)
        found: list[tuple[Memory, Array, Any, Lanes]] = []
        groups = [int(number[0])] if (number == number[0]).all() else [int(i) for i in np.unique(number)]
        for i in groups:
            if i not in self.buffers:
                nearest = self.buffers.get(i + 1)
                hint = f" (just before buffer {nearest.name!r})" if nearest else ""
                raise OutOfBoundsError(f"{size} bytes at global address {int(address[number == i][0]):#x}{hint}")
            if len(groups) == 1:
                found.append((self.buffers[i].memory, within, everyone, lanes))
            else:
                among = np.nonzero(number == i)[0]
                found.append((self.buffers[i].memory, within[among], among, among if lanes is None else lanes[among]))
        return found

    # -- the scheduler --------------------------------------------------------------------------------------------

    def run(self) -> None:
        blocks = self.program.blocks
        self.at = np.zeros(self.n_lanes, np.int32)
        self.parked = np.zeros(self.n_lanes, bool)
        together = 0  # the block at which all lanes stand, or -1
        while True:
            if together >= 0:
                number, lanes = together, None
            else:
                waiting = np.where(self.parked, ENDED, self.at)
                number = int(waiting.min())
                if number == ENDED:
                    if (self.at != ENDED).any():
                        self._report_deadlock()
                    break
                chosen = self.at == number
                lanes = None if chosen.all() else np.nonzero(chosen & ~self.parked)[0]
            block = blocks[number]
            if block.kind in ("barrier", "warp", "collective"):
                together = self._meet(block, number, lanes)
                continue
            self._steps(block, lanes)
            if block.kind == "plain":
                goes, taken = None, number + 1
            else:
                taken = block.target if block.kind == "branch" else ENDED
                goes = None if block.guard < 0 else pick(self.registers[block.guard], lanes) == block.guard_is
                if goes is not None and (goes.all() or not goes.any()):
                    taken, goes = (taken if goes.all() else number + 1), None
            if lanes is None and goes is None:
                if taken == ENDED:
                    break
                together = taken
            else:
                if lanes is None:
                    self.at[:] = number
                    lanes = self._lane_numbers
                self.at[lanes] = taken if goes is None else np.where(goes, taken, number + 1)
                together = -1
        self._settle()

    def _settle(self) -> None:
        for memory in (self.shared, *(buffer.memory for buffer in self.buffers.values())):
            try:
                memory.settle()
            except PtxError as error:
                raise type(error)(f"{memory.name}: {error} ({self.program.kernel.name})") from None

    def _go_on(self, number: int) -> int:
        """All lanes pass what stood at `number` together."""
        self.parked[:] = False
        return number + 1

    def _steps(self, block: Block, lanes: Lanes) -> None:
        self.n_instructions += len(block.steps)
        line = block.line
        try:
            for step, line in block.steps:  # noqa: B007
                step(self, lanes)
        except PtxError as error:
            raise type(error)(f"{error} ({self.program.kernel.where(line)})") from None

    def _meet(self, block: Block, number: int, lanes: Lanes) -> int:
        """Lanes arrive where they must wait for others. Returns where all stand afterwards, or -1."""
        if lanes is None:
            if block.kind == "barrier":
                self.threads.block_clock += 1
                self.threads.warp_clock[:] = 0
                self._settle()
                return self._go_on(number)
            if block.whole_warp:
                self.threads.warp_clock += block.kind == "warp"
                self._steps(block, None)
                return self._go_on(number)
            self.at[:] = number
        else:
            self.parked[lanes] = True
        here = (self.at == number) & (self.at != ENDED)
        if block.kind == "barrier":
            missing = np.bincount(self.local_block, (~here & (self.at != ENDED)), self.local_block[-1] + 1) > 0
            released = here & ~missing[self.local_block]
        else:
            assert block.mask is not None
            indices = np.nonzero(here)[0]
            mask = np.broadcast_to(block.mask(self, indices), indices.shape).astype(np.uint32)
            bit = np.uint32(1) << self.lane[indices].astype(np.uint32)
            if ((mask & bit) == 0).any():
                who = self.threads.of(indices).name(int(np.argmax((mask & bit) == 0)))
                where = self.program.kernel.where(block.line)
                raise DivergenceError(f"the mask of a warp operation leaves out {who}, which executes it ({where})")
            present = np.bincount(self.warp[indices], bit, self.warp[-1] + 1).astype(np.uint32)
            alive_bits = (np.uint32(1) << self.lane.astype(np.uint32)) * (self.at != ENDED)
            alive = np.bincount(self.warp, alive_bits, self.warp[-1] + 1).astype(np.uint32)
            lacking = mask & alive[self.warp[indices]] & ~present[self.warp[indices]]
            complete = np.bincount(self.warp[indices], lacking != 0, self.warp[-1] + 1) == 0
            # A warp goes on when every lane that any mask names is here.
            released = np.zeros(self.n_lanes, bool)
            released[indices] = complete[self.warp[indices]]
        if not released.any():
            return -1
        everyone = bool(released.all())
        if block.kind == "barrier":
            self.threads.block_clock[released] += 1
            self.threads.warp_clock[released] = 0
            if (released | (self.at == ENDED)).all():
                self._settle()
        elif block.kind == "warp":
            self.threads.warp_clock[released] += 1
        else:
            self._steps(block, None if everyone else np.nonzero(released)[0])
        self.parked[released] = False
        self.at[released] = number + 1
        return number + 1 if everyone else -1

    def _report_deadlock(self) -> None:
        stuck = np.nonzero(self.at != ENDED)[0]
        kinds = []
        for number in np.unique(self.at[stuck]):
            block = self.program.blocks[int(number)]
            there = stuck[self.at[stuck] == number]
            who = ", ".join(self.threads.name(int(i)) for i in there[:3]) + (", ..." if len(there) > 3 else "")
            kinds.append(f"{len(there)} threads at the {block.kind} at line {block.line} ({who})")
        raise DivergenceError(f"{self.program.kernel.name}: threads wait for each other: " + "; ".join(kinds))


def _pack(kernel: Kernel, arguments: Sequence[Argument]) -> bytes:
    """Arguments in the layout of the kernel's parameters."""
    if len(arguments) != len(kernel.parameters):
        raise PtxError(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
    packed = bytearray(kernel.n_parameter_bytes)
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        if isinstance(argument, Buffer):
            value = np.uint64(argument.address).tobytes()
        elif isinstance(argument, bytes):
            value = argument
        else:
            dtype = dtype_of(parameter.kind)
            if dtype.kind != "f" and int(argument) != argument:
                raise PtxError(f"{argument} for {parameter.name}, which is .{parameter.kind}")
            value = np.array(int(argument) & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").tobytes()
            if dtype.kind == "f":
                value = np.array(argument, dtype).tobytes()
        if len(value) != parameter.size:
            raise PtxError(f"{len(value)} bytes for {parameter.name}, which has {parameter.size}")
        packed[parameter.offset : parameter.offset + parameter.size] = value
    return bytes(packed)


def launch(
    kernel: Kernel | Program,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[Argument],
    *,
    shared_bytes: int = 0,
    buffers: Sequence[Buffer] = (),
    lanes_at_once: int = 4096,
) -> int:
    """Run a kernel over its grid; the arrays of writable buffers are replaced by what it left.

    `buffers` are further ones that arguments given as bytes point into. Blocks run in groups of about `lanes_at_once`
    threads. Returns the instructions executed, each counted once for all the lanes that ran it together.
    """
    program = kernel if isinstance(kernel, Program) else Program(kernel)
    n_threads, n_blocks = block[0] * block[1] * block[2], grid[0] * grid[1] * grid[2]
    limit = min(program.kernel.max_threads or 1024, 1024)
    if not 0 < n_threads <= limit or n_blocks < 1:
        raise PtxError(f"{program.kernel.name} with {n_threads} threads a block (at most {limit}), {n_blocks} blocks")
    if shared_bytes and not any(variable.size == 0 for variable in program.kernel.shared):
        raise PtxError(
            f"{program.kernel.name} declares no shared memory for the {shared_bytes} bytes it is launched with"
        )
    everything = list(dict.fromkeys([*(a for a in arguments if isinstance(a, Buffer)), *buffers]))
    placed: dict[int, Buffer] = {}
    for i, buffer in enumerate(everything, start=1):
        buffer.place(i << BUFFER_SPACING, program.compiler.grains["global"])
        placed[i] = buffer
    packed = _pack(program.kernel, arguments)
    at_once = max(1, lanes_at_once // n_threads)
    n_instructions = 0
    with np.errstate(all="ignore"):
        for start in range(0, n_blocks, at_once):
            blocks = range(start, min(start + at_once, n_blocks))
            machine = Machine(program, packed, placed, grid, block, blocks, shared_bytes)
            machine.run()
            n_instructions += machine.n_instructions
    for buffer in everything:
        constant, races = buffer.memory.constant_reads, buffer.memory.races
        if constant is not None and races is not None and races.written_cells(constant):
            raise PtxError(f"{program.kernel.name} writes what it reads through the read-only path: {buffer.name!r}")
        buffer.take_back()
    return n_instructions
