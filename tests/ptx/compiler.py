"""Instructions as closures: each runs one instruction for all lanes, or for those that are named.

Owns operands (registers, literals, special registers, addresses), loads and stores, and the operations of a warp. It
refuses (UnsupportedError) opcodes that neither it nor `values` holds, and registers of the wrong size or kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import values
from tests.ptx.memory import ATOMIC, INITIALISED, READ, RED_ZONE, WRITE, Array, OutOfBoundsError
from tests.ptx.parse import (
    Address,
    Instruction,
    Kernel,
    Literal,
    Negated,
    Operand,
    Pair,
    PtxError,
    Register,
    Special,
    Symbol,
    UnsupportedError,
    Vector,
    type_width,
)
from tests.ptx.values import dtype_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Lanes = Array | None  # indices of the lanes that run; None for all
Step = Callable[["Machine", Lanes], None]
Get = Callable[["Machine", Lanes], Array]
Put = Callable[["Machine", Lanes, Array], None]

BOOL = np.dtype(bool)
SHARED_WINDOW = 1 << 60  # where shared memory lies among generic addresses
LOCAL_WINDOW = 1 << 61
CACHE_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::no_allocate", "L2::128B", "L2::256B"}


class DivergenceError(PtxError):
    """Threads wait for each other at barriers or shuffles that not all of them reach."""


def pick(array: Array, lanes: Lanes) -> Array:
    return array if lanes is None else array[lanes]


class Compiler:
    """Instructions of one kernel as closures over register numbers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.numbers = {name: i for i, name in enumerate(kernel.registers)}
        self.grains = {space: self._grain(space) for space in ("shared", "global", "local")}
        self.shared, self.shared_end = self._lay_out(kernel.shared)
        self.local, self.local_end = self._lay_out(kernel.local)
        self.parameters = {p.name: (p.offset, p.size) for p in kernel.parameters}

    def _grain(self, space: str) -> int:
        """Bytes of the narrowest access to a space; generic accesses count for all."""
        widths = [4]
        for instruction in self.kernel.instructions:
            base, *parts = instruction.parts
            if base in ("ld", "st") and (space in parts or not {"shared", "global", "local", "param"} & set(parts)):
                try:
                    widths.append(type_width(parts[-1]))
                except UnsupportedError as error:
                    raise UnsupportedError(f"{error} ({self.kernel.where(instruction.line)})") from None
        return min(widths)

    @staticmethod
    def _lay_out(variables: list[Any]) -> tuple[dict[str, tuple[int, int]], int]:
        """name -> (offset, size), red zones between; what is sized by the launch comes last, at the end returned."""
        places, end = {}, RED_ZONE
        for variable in sorted(variables, key=lambda variable: variable.size == 0):
            align = max(variable.align, 16)
            offset = -(-end // align) * align
            places[variable.name] = (offset, variable.size)
            end = offset + variable.size + RED_ZONE if variable.size else offset
        return places, end

    def register_dtype(self, name: str) -> np.dtype[Any]:
        kind = self.kernel.registers[name]
        return BOOL if kind == "pred" else np.dtype(f"u{type_width(kind)}")

    def source(self, operand: Operand, kind: str) -> Get:
        dtype = dtype_of(kind)
        if isinstance(operand, Register):
            number, held = self.numbers[operand.name], self.register_dtype(operand.name)
            if (held == BOOL) != (dtype == BOOL) or held.itemsize < dtype.itemsize:
                raise UnsupportedError(f"register {operand.name} read as .{kind}")
            if held.itemsize > dtype.itemsize:
                low = np.dtype(f"u{dtype.itemsize}")
                return lambda m, lanes: pick(m.registers[number], lanes).astype(low).view(dtype)
            if dtype in (held, BOOL):
                return lambda m, lanes: pick(m.registers[number], lanes)
            return lambda m, lanes: pick(m.registers[number], lanes).view(dtype)
        if isinstance(operand, Literal):
            constant = self.literal(operand, dtype)
            return lambda m, lanes: constant
        if isinstance(operand, Special):
            name = operand.name
            return lambda m, lanes: pick(m.special[name], lanes).astype(dtype)
        if isinstance(operand, Negated):
            number = self.numbers[operand.register.name]
            return lambda m, lanes: ~pick(m.registers[number], lanes)
        if isinstance(operand, Symbol):
            for places in (self.shared, self.local, self.parameters):
                if operand.name in places:
                    address = np.array(places[operand.name][0], dtype)
                    return lambda m, lanes: address
        raise UnsupportedError(f"operand {operand} read as .{kind}")

    @staticmethod
    def literal(operand: Literal, dtype: np.dtype[Any]) -> Array:
        if operand.kind:
            bits = np.array(operand.value, f"u{type_width(operand.kind)}")
            return bits.view(dtype) if bits.dtype.itemsize == dtype.itemsize else bits.view(operand.kind).astype(dtype)
        if dtype == BOOL:
            return np.array(operand.value != 0)
        if dtype.kind == "f":
            raise UnsupportedError(f"integer {operand.value} as {dtype}")
        return np.array(operand.value & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)

    def target(self, operand: Operand, *, widens: bool = False) -> Put:
        """Stores an array of any type of the register's width; loads and conversions also a narrower one, extended
        by its own sign."""
        if operand == Symbol("_"):
            return lambda m, lanes, value: None
        if not isinstance(operand, Register):
            raise UnsupportedError(f"result {operand}")
        number, held = self.numbers[operand.name], self.register_dtype(operand.name)
        signed = np.dtype(f"i{held.itemsize}")

        def put(m: Machine, lanes: Lanes, value: Array) -> None:
            value = np.asarray(value)
            if value.dtype != held:
                narrower = value.dtype.itemsize < held.itemsize
                if BOOL in (held, value.dtype) or value.dtype.itemsize > held.itemsize or (narrower and not widens):
                    raise UnsupportedError(f"{value.dtype} into register {operand.name}")
                if narrower:
                    if value.dtype.kind == "f":
                        value = value.view(f"u{value.dtype.itemsize}")
                    value = value.astype(signed if value.dtype.kind == "i" else held)
                value = value.view(held)
            if lanes is not None:
                m.registers[number][lanes] = value
            elif value.ndim == 0:
                m.registers[number] = np.full(m.n_lanes, value)
            else:
                m.registers[number] = value

        return put

    # -- instructions ---------------------------------------------------------------------------------------------

    def step(self, instruction: Instruction) -> Step:
        run = self.body(instruction)
        if not instruction.guard:
            return run
        number, wanted = self.numbers[instruction.guard], instruction.guard_is

        def guarded(m: Machine, lanes: Lanes) -> None:
            holds = pick(m.registers[number], lanes) == wanted
            if holds.all():
                run(m, lanes)
            elif holds.any():
                run(m, np.nonzero(holds)[0] if lanes is None else lanes[holds])

        return guarded

    def body(self, instruction: Instruction) -> Step:
        base, *parts = instruction.parts
        operands = instruction.operands
        if base in ("ld", "ldu", "st"):
            return self.access(instruction)
        if base == "mov":
            return self.move(parts[-1], operands)
        if base == "cvta":
            return self.convert_address(parts, operands)
        if base in ("shfl", "vote", "redux", "activemask"):
            return self.collective(instruction)
        if base == "atom":
            return self.atomic_add(instruction)
        if base in ("membar", "fence"):
            return lambda m, lanes: None  # orders memory between blocks, which are never taken to be ordered here
        meaning = values.meaning(instruction.opcode)
        if meaning is None or len(meaning.operands) != len(operands) - 1:
            raise UnsupportedError(f"instruction {instruction.opcode} with {len(operands)} operands")
        return self.compute(meaning, operands, widens=base == "cvt")

    def compute(self, meaning: values.Meaning, operands: Sequence[Operand], *, widens: bool) -> Step:
        function = meaning.function
        if isinstance(operands[0], Pair):
            raise UnsupportedError("a second predicate")
        put = self.target(operands[0], widens=widens)
        gets = [self.source(operand, kind) for operand, kind in zip(operands[1:], meaning.operands, strict=True)]
        if len(gets) == 1:
            (a,) = gets
            return lambda m, lanes: put(m, lanes, function(a(m, lanes)))
        if len(gets) == 2:
            a, b = gets
            return lambda m, lanes: put(m, lanes, function(a(m, lanes), b(m, lanes)))
        return lambda m, lanes: put(m, lanes, function(*(get(m, lanes) for get in gets)))

    def move(self, kind: str, operands: Sequence[Operand]) -> Step:
        to, source = operands
        if isinstance(to, Vector) or isinstance(source, Vector):  # pack or unpack, low part first
            n = len(to.items if isinstance(to, Vector) else source.items)  # type: ignore[union-attr]
            part = f"u{8 * type_width(kind) // n}"
            whole, piece = dtype_of(f"u{8 * type_width(kind)}"), dtype_of(part)
            shifts = [8 * piece.itemsize * i for i in range(n)]
            if isinstance(to, Vector):
                puts, get = [self.target(item) for item in to.items], self.source(source, kind)

                def unpack(m: Machine, lanes: Lanes) -> None:
                    value = get(m, lanes).view(whole)
                    for put, shift in zip(puts, shifts, strict=True):
                        put(m, lanes, (value >> whole.type(shift)).astype(piece))

                return unpack
            assert isinstance(source, Vector)
            put, gets = self.target(to), [self.source(item, part) for item in source.items]

            def pack(m: Machine, lanes: Lanes) -> None:
                pieces = (get(m, lanes).astype(whole) << whole.type(s) for get, s in zip(gets, shifts, strict=True))
                put(m, lanes, np.asarray(sum(pieces, whole.type(0)), whole))

            return pack
        put, get = self.target(to), self.source(source, kind)
        return lambda m, lanes: put(m, lanes, get(m, lanes).copy())

    def convert_address(self, parts: list[str], operands: Sequence[Operand]) -> Step:
        """Between generic addresses and those of a space. Global ones are the same in both."""
        windows = {"global": 0, "param": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}
        down = parts[0] == "to"
        space, kind = parts[1 if down else 0], parts[-1]
        if space not in windows or kind != "u64":
            raise UnsupportedError(f"cvta.{'.'.join(parts)}")
        window = np.uint64(windows[space])
        put, get = self.target(operands[0]), self.source(operands[1], kind)
        return lambda m, lanes: put(m, lanes, get(m, lanes) - window if down else get(m, lanes) + window)

    def access(self, instruction: Instruction) -> Step:
        """ld and st: one value or a vector, from or to any space."""
        base, *parts = instruction.parts
        spaces = [part for part in parts if part in ("global", "shared", "local", "param")]
        vector = next((int(part[1]) for part in parts if part in ("v2", "v4")), 1)
        kind = parts[-1]
        rest = set(parts[:-1]) - set(spaces) - {"v2", "v4", "nc", "volatile", "weak", "relaxed", "gpu", "cta"}
        if base == "ldu" or rest - CACHE_HINTS or len(spaces) > 1:
            raise UnsupportedError(f"instruction {instruction.opcode}")
        space = spaces[0] if spaces else "generic"
        loads = base == "ld"
        value, place = instruction.operands if loads else instruction.operands[::-1]
        if not isinstance(place, Address):
            raise UnsupportedError(f"address {place}")
        items = value.items if isinstance(value, Vector) else (value,)
        if len(items) != vector:
            raise UnsupportedError(f"{instruction.opcode} of {len(items)} values")
        if space == "param" and isinstance(place.base, Symbol):
            return self.parameter(place, items, kind)
        width = type_width(kind)
        bits = np.dtype(f"u{width}")
        size = width * vector
        address = self.address(place)
        constant, line = "nc" in parts, instruction.line

        if loads:
            puts, dtype = [self.target(item, widens=True) for item in items], dtype_of(kind)

            def load(m: Machine, lanes: Lanes) -> None:
                whole = np.empty((m.n_lanes if lanes is None else len(lanes), vector), bits)
                for memory, offsets, among, some in m.resolve(address(m, lanes), lanes, space, size):
                    cells = memory.cells(offsets, size, width, False)
                    if memory.races:
                        memory.races.note(cells, m.threads.of(some), READ, line)
                        if constant and memory.constant_reads is not None:
                            memory.constant_reads[cells] = True
                    data = memory.data.view(bits)
                    for i in range(vector):
                        whole[among, i] = data[offsets // width + i]
                for i, put in enumerate(puts):
                    put(m, lanes, whole[:, i].copy().view(dtype))

            return load

        gets = [self.source(item, f"b{8 * width}" if isinstance(item, Register) else kind) for item in items]

        def store(m: Machine, lanes: Lanes) -> None:
            parts_ = [get(m, lanes).view(bits) for get in gets]
            for memory, offsets, among, some in m.resolve(address(m, lanes), lanes, space, size):
                cells = memory.cells(offsets, size, width, True)
                if memory.races:
                    memory.races.note(cells, m.threads.of(some), WRITE, line)
                memory.state[cells] = INITIALISED
                data = memory.data.view(bits)
                for i, part in enumerate(parts_):
                    data[offsets // width + i] = part[among] if part.ndim else part

        return store

    def atomic_add(self, instruction: Instruction) -> Step:
        """atom.add: lanes that meet at an address add one after another, in the order of their numbers."""
        _, *parts = instruction.parts
        *rest, kind = parts
        spaces = [part for part in rest if part in ("global", "shared")]
        if {*rest} - {"relaxed", "gpu", "cta", *spaces} != {"add"} or len(spaces) != 1 or kind not in ("u32", "s32"):
            raise UnsupportedError(f"instruction {instruction.opcode}")
        result, place, value = instruction.operands
        if not isinstance(place, Address):
            raise UnsupportedError(f"address {place}")
        put, address, get, line = self.target(result), self.address(place), self.source(value, "u32"), instruction.line

        def add(m: Machine, lanes: Lanes) -> None:
            before = np.empty(m.n_lanes if lanes is None else len(lanes), np.uint32)
            for memory, offsets, among, some in m.resolve(address(m, lanes), lanes, spaces[0], 4):
                cells = memory.cells(offsets, 4, 4, True)
                memory.cells(offsets, 4, 4, False)
                if memory.races:
                    memory.races.note(cells, m.threads.of(some), ATOMIC, line)
                data, at = memory.data.view(np.uint32), offsets // 4
                added = np.broadcast_to(get(m, some), at.shape)
                order = np.argsort(at, kind="stable")
                sums = np.cumsum(added[order], dtype=np.uint32) - added[order]  # of all lanes before, at any address
                starts = np.concatenate([[True], at[order][1:] != at[order][:-1]])
                base = sums[starts][np.cumsum(starts) - 1]
                old = np.empty_like(sums)
                old[order] = data[at[order]] + (sums - base)
                before[among] = old
                np.add.at(data, at, added)
            put(m, lanes, before)

        return add

    def parameter(self, place: Address, items: Sequence[Operand], kind: str) -> Step:
        """ld.param by name: one value for all lanes."""
        assert isinstance(place.base, Symbol)
        start, size = self.parameters.get(place.base.name, (0, 0))
        width = type_width(kind)
        if place.offset < 0 or place.offset + width * len(items) > size:
            raise OutOfBoundsError(
                f"{width * len(items)} bytes at offset {place.offset} of parameter {place.base.name}"
            )
        puts, dtype = [self.target(item, widens=True) for item in items], dtype_of(kind)
        start += place.offset

        def load(m: Machine, lanes: Lanes) -> None:
            for i, put in enumerate(puts):
                put(m, lanes, np.frombuffer(m.arguments, dtype, 1, start + i * width)[0])

        return load

    def address(self, place: Address) -> Get:
        offset = place.offset
        if isinstance(place.base, Register) and self.register_dtype(place.base.name).itemsize == 4:
            get = self.source(place.base, "u32")
        else:
            get = self.source(place.base, "u64")
        return lambda m, lanes: get(m, lanes).astype(np.int64) + offset

    def collective(self, instruction: Instruction) -> Step:
        """shfl, vote, redux: the scheduler has seen to it that the lanes named by the mask are all here."""
        base, *parts = instruction.parts
        operands = list(instruction.operands)
        if base == "activemask":
            raise UnsupportedError("activemask: which lanes it names is the compiler's choice")
        if base == "shfl" and parts[0] == "sync" and parts[1] in ("bfly", "up", "down", "idx") and parts[2] == "b32":
            return self.shuffle(parts[1], operands, instruction.line)
        put = self.target(operands[0])
        if base == "vote" and parts[0] == "sync":
            mode, get = parts[1], self.source(operands[1], "pred")

            def vote(m: Machine, lanes: Lanes) -> None:
                table = m.by_warp(get(m, lanes), lanes, False)  # [warps, 32]
                present = m.by_warp(np.ones(1, bool), lanes, False)
                if mode == "ballot":
                    result = (table * (np.uint32(1) << np.arange(32, dtype=np.uint32))).sum(1).astype(np.uint32)
                else:
                    result = {"any": table.any(1), "all": (table | ~present).all(1)}[mode]
                put(m, lanes, result[pick(m.warp, lanes)])

            if mode in ("ballot", "any", "all"):
                return vote
        if base == "redux" and parts[0] == "sync":
            kind = parts[2]
            get, dtype = self.source(operands[1], kind), dtype_of(kind)
            info = np.iinfo(dtype)
            reductions: dict[str, tuple[Any, int]] = {
                "add": (np.add, 0),
                "min": (np.minimum, info.max),
                "max": (np.maximum, info.min),
                "and": (np.bitwise_and, -1 if info.min else info.max),
                "or": (np.bitwise_or, 0),
                "xor": (np.bitwise_xor, 0),
            }
            function, neutral = reductions[parts[1]]

            def reduce(m: Machine, lanes: Lanes) -> None:
                table = m.by_warp(get(m, lanes), lanes, dtype.type(neutral))
                put(m, lanes, function.reduce(table, axis=1).astype(dtype)[pick(m.warp, lanes)])

            return reduce
        raise UnsupportedError(f"instruction {instruction.opcode}")

    def shuffle(self, mode: str, operands: list[Operand], line: int) -> Step:
        to = operands[0]
        put = self.target(to.first if isinstance(to, Pair) else to)
        put_valid = self.target(to.second) if isinstance(to, Pair) else None
        value, by, clamp = (self.source(operand, "u32") for operand in operands[1:4])

        def shuffle(m: Machine, lanes: Lanes) -> None:
            lane = pick(m.lane, lanes)
            b, c = by(m, lanes).astype(np.int64) & 31, clamp(m, lanes).astype(np.int64)
            bound, segment = c & 31, (c >> 8) & 31
            low, high = lane & segment, (lane & segment) | (bound & ~segment)
            if mode == "up":
                source, valid = lane - b, lane - b >= high
            elif mode == "down":
                source, valid = lane + b, lane + b <= high
            elif mode == "bfly":
                source, valid = lane ^ b, (lane ^ b) <= high
            else:
                source, valid = low | (b & ~segment), (low | (b & ~segment)) <= high
            source = np.where(valid, source, lane)
            own = np.broadcast_to(value(m, lanes), lane.shape)
            table = m.by_warp(own, lanes, np.uint32(0))
            present = m.by_warp(np.ones(1, bool), lanes, False)
            warp = pick(m.warp, lanes)
            absent = ~present[warp, source]
            if absent.any():
                at = int(np.argmax(absent))
                who = m.threads.of(lanes).name(at)
                raise DivergenceError(
                    f"line {line}: {who} reads lane {source[at]} of its warp, which does not take part"
                )
            put(m, lanes, table[warp, source])
            if put_valid:
                put_valid(m, lanes, valid)

        return shuffle
