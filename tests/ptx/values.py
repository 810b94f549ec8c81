"""Arithmetic: an opcode that only computes -> the types of its operands and a function over numpy arrays.

Owns the meaning of every such opcode; `meaning` is its only door, and returns None for an opcode it does not hold. It
refuses (UnsupportedError) a modifier it does not know. Arrays hold one element a lane. f32 results are computed in
float64 where that makes the single rounding that PTX asks for (fma, approximations); .ftz flushes subnormal operands
and results to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.parse import PtxError, UnsupportedError, type_width

Array = np.ndarray[Any, np.dtype[Any]]
Function = Callable[..., Array]

TINY = np.finfo(np.float32).tiny


def dtype_of(kind: str) -> np.dtype[Any]:
    if kind == "pred":
        return np.dtype(bool)
    if kind in ("bf16", "f16x2", "bf16x2"):
        return np.dtype(f"u{type_width(kind)}")  # bits
    return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(type_width(kind)))


@dataclass(frozen=True)
class Meaning:
    result: str
    operands: tuple[str, ...]
    function: Function


def flush(x: Array) -> Array:
    """Subnormal f32 to zero of the same sign."""
    return x * (np.abs(x) >= TINY)


def flushing(function: Function) -> Function:
    return lambda *values: flush(function(*(flush(value) for value in values)))


def in_double(function: Function) -> Function:
    """f32 in, one rounding of the float64 result out."""
    return lambda *values: function(*(np.float64(value) for value in values)).astype(np.float32)


def shift_left(a: Array, b: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(b >= bits, 0, a << np.minimum(b, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: Array, b: Array) -> Array:
    bits = a.dtype.itemsize * 8
    fill = a >> (bits - 1) if a.dtype.kind == "i" else 0
    return np.where(b >= bits, fill, a >> np.minimum(b, bits - 1).astype(a.dtype)).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the product."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> 32).astype(a.dtype)
    product = (np.asarray(a).astype(object) * np.asarray(b).astype(object)) >> 64
    return product.astype(a.dtype)


def wide_product(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return np.asarray(a.astype(wide) * b.astype(wide))


def divide(a: Array, b: Array) -> Array:
    """Towards zero."""
    if np.any(b == 0):
        raise PtxError("integer division by zero")
    if a.dtype.kind == "u":
        return a // b
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    quotient = (np.abs(a).view(unsigned) // np.abs(b).view(unsigned)).view(a.dtype)  # |-2^31| is itself, read unsigned
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def look_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """lop3: bit i of the result is the entry of the table that bits i of a, b, c number."""
    result = np.zeros_like(a)
    for entry in range(8):
        if int(np.ravel(table)[0]) >> entry & 1:
            terms = [x if entry >> (2 - i) & 1 else ~x for i, x in enumerate((a, b, c))]
            result = result | (terms[0] & terms[1] & terms[2])
    return result


def funnel_left(low: Array, high: Array, by: Array) -> Array:
    both = high.astype(np.uint64) << 32 | low.astype(np.uint64)
    return ((both << by.astype(np.uint64)) >> 32).astype(np.uint32)


def funnel_right(low: Array, high: Array, by: Array) -> Array:
    both = high.astype(np.uint64) << 32 | low.astype(np.uint64)
    return (both >> by.astype(np.uint64)).astype(np.uint32)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: byte i of the result is the byte of b:a that nibble i names; its bit 3 replicates the sign."""
    both = b.astype(np.uint64) << 32 | a.astype(np.uint64)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & 15
        byte = ((both >> ((nibble & 7).astype(np.uint64) * 8)) & 255).astype(np.uint32)
        byte = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint32)
        result = result | byte << np.uint32(8 * i)
    return result


def count_bits(a: Array) -> Array:
    return sum(((a >> np.uint8(i).astype(a.dtype)) & 1 for i in range(8 * a.dtype.itemsize)), a & 0).astype(np.uint32)


def bit_length(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return sum(((a >> np.uint8(i).astype(a.dtype)) != 0 for i in range(bits)), np.zeros(a.shape, np.uint32)).astype(
        np.uint32
    )


def reverse_bits(a: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    result = a & 0
    for i in range(bits):
        result = result | ((a >> a.dtype.type(i)) & 1) << a.dtype.type(bits - 1 - i)
    return result


def ones(a: Array) -> Array:
    return ~(a & 0)


def extract_field(a: Array, position: Array, length: Array) -> Array:
    """bfe of unsigned fields."""
    shifted = shift_right(a, position & 255)
    return shifted & ~shift_left(ones(shifted), length & 255)


def insert_field(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the low bits of a into b."""
    field = shift_left(~shift_left(ones(b), length & 255), position & 255)
    return (b & ~field) | (shift_left(a, position & 255) & field)


def gross_reciprocal(a: Array) -> Array:
    """rcp.approx.ftz.f64: the upper half of the reciprocal's bits, to begin Newton's iteration with."""
    return (np.atleast_1d(1 / a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": lambda a, b: (a != b) & ~unordered(a, b) if np.asarray(a).dtype.kind == "f" else a != b,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: (a == b) | unordered(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: (a < b) | unordered(a, b),
    "leu": lambda a, b: (a <= b) | unordered(a, b),
    "gtu": lambda a, b: (a > b) | unordered(a, b),
    "geu": lambda a, b: (a >= b) | unordered(a, b),
    "num": lambda a, b: ~unordered(a, b),
    "nan": unordered,
}

INTEGER: dict[str, tuple[int, Function]] = {  # opcode -> operands of the named type, function
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul.lo": (2, np.multiply),
    "mul.hi": (2, high_product),
    "mad.lo": (3, lambda a, b, c: a * b + c),
    "mad.hi": (3, lambda a, b, c: high_product(a, b) + c),
    "div": (2, divide),
    "rem": (2, remainder),
    "min": (2, np.minimum),
    "max": (2, np.maximum),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "and": (2, np.bitwise_and),
    "or": (2, np.bitwise_or),
    "xor": (2, np.bitwise_xor),
    "not": (1, np.invert),
    "brev": (1, reverse_bits),
    "cnot": (1, lambda a: (a == 0).astype(a.dtype)),
}

SINGLE: dict[str, tuple[int, Function]] = {  # f32
    "add": (2, np.add),
    "add.rn": (2, np.add),
    "sub": (2, np.subtract),
    "sub.rn": (2, np.subtract),
    "mul": (2, np.multiply),
    "mul.rn": (2, np.multiply),
    "fma.rn": (3, in_double(lambda a, b, c: a * b + c)),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "min.NaN": (2, np.minimum),
    "max.NaN": (2, np.maximum),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "ex2.approx": (1, in_double(np.exp2)),
    "lg2.approx": (1, in_double(np.log2)),
    "rcp.approx": (1, in_double(np.reciprocal)),
    "rcp.rn": (1, in_double(np.reciprocal)),
    "sqrt.approx": (1, in_double(np.sqrt)),
    "sqrt.rn": (1, in_double(np.sqrt)),
    "rsqrt.approx": (1, in_double(lambda a: 1 / np.sqrt(a))),
    "div.approx": (2, in_double(np.divide)),
    "div.full": (2, in_double(np.divide)),
    "div.rn": (2, in_double(np.divide)),
}

DOUBLE: dict[str, tuple[int, Function]] = {  # f64
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "fma": (3, lambda a, b, c: np.asarray(np.longdouble(a) * b + c, np.float64)),
    "min": (2, np.fmin),
    "max": (2, np.fmax),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "rcp.approx.ftz": (1, gross_reciprocal),
}

ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def widen_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: Array) -> Array:
    bits = np.atleast_1d(x).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def conversion(parts: list[str]) -> Function:
    """cvt with its types last: result, operand."""
    modifiers, to, source = parts[:-2], parts[-2], parts[-1]
    known = {"rn", "rz", "ftz", "sat", *ROUNDINGS}
    if not set(modifiers) <= known:
        raise UnsupportedError(f"cvt.{'.'.join(parts)}")
    target = dtype_of(to)
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)

    if to[0] != "f" and to != "bf16" and source[0] == "f":  # float to integer: saturates, NaN is 0
        if not rounding:
            raise UnsupportedError(f"cvt.{'.'.join(parts)}")
        low, high = np.iinfo(target).min, np.iinfo(target).max

        def to_integer(x: Array) -> Array:
            whole = rounding(np.nan_to_num(flush(x) if "ftz" in modifiers else x, nan=0.0).astype(np.float64))
            result = np.clip(whole, float(low), float(high))
            safe = np.where(result >= float(high), 0, result).astype(target)
            return np.where(result >= float(high), target.type(high), safe)

        return to_integer
    if "rz" in modifiers or ("sat" in modifiers and to[0] != "f"):
        raise UnsupportedError(f"cvt.{'.'.join(parts)}")

    def convert(x: Array) -> Array:
        value = widen_bf16(x) if source == "bf16" else x
        if "ftz" in modifiers and value.dtype == np.float32:
            value = flush(value)
        if rounding:
            value = rounding(value)
        if to == "bf16":
            return round_bf16(value)
        result = value.astype(target)
        if "ftz" in modifiers and target == np.float32:
            result = flush(result)
        return np.clip(np.nan_to_num(result, nan=0.0), 0, 1) if "sat" in modifiers else result

    return convert


def comparison(parts: list[str]) -> Meaning:
    """setp.<comparison>[.<combination with a third predicate>][.ftz].<type>"""
    name, *middle, kind = parts
    if name in ("lo", "ls", "hi", "hs"):
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[name]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    joins = [combine[part] for part in middle if part in combine]
    if name not in COMPARISONS or any(part not in combine and part != "ftz" for part in middle) or kind == "f16":
        raise UnsupportedError(f"setp.{'.'.join(parts)}")
    compare = COMPARISONS[name]
    test = (lambda a, b: compare(flush(a), flush(b))) if "ftz" in middle else compare
    if joins:
        return Meaning("pred", (kind, kind, "pred"), lambda a, b, c: joins[0](test(a, b), c))
    return Meaning("pred", (kind, kind), test)


def meaning(opcode: str) -> Meaning | None:
    """What a computing opcode does; None when the opcode does not only compute."""
    base, *parts = opcode.split(".")
    if base == "setp":
        return comparison(parts)
    if base == "cvt":
        return Meaning(parts[-2], (parts[-1],), conversion(parts))
    if base == "cvta":
        return None
    kind = parts[-1] if parts else ""
    stem = ".".join([base, *parts[:-1]])
    if stem == "selp":
        return Meaning(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
    if kind == "pred" and stem in ("and", "or", "xor", "not", "mov"):
        functions: dict[str, tuple[int, Function]] = {
            "and": (2, np.logical_and),
            "or": (2, np.logical_or),
            "xor": (2, np.logical_xor),
            "not": (1, np.logical_not),
            "mov": (1, np.array),
        }
        n, function = functions[stem]
        return Meaning("pred", ("pred",) * n, function)
    if stem in ("shl", "shr"):
        return Meaning(kind, (kind, "u32"), shift_left if stem == "shl" else shift_right)
    if stem in ("mul.wide", "mad.wide"):
        wide = f"{kind[0]}{16 * type_width(kind)}"
        if stem == "mul.wide":
            return Meaning(wide, (kind, kind), wide_product)
        return Meaning(wide, (kind, kind, wide), lambda a, b, c: wide_product(a, b) + c)
    if stem in ("popc", "clz"):
        bits = 8 * type_width(kind)
        function = count_bits if stem == "popc" else lambda a: (np.uint32(bits) - bit_length(a)).astype(np.uint32)
        return Meaning("u32", (kind,), function)
    if stem in ("bfind", "bfind.shiftamt") and kind[0] == "u":
        bits = 8 * type_width(kind)
        last = (
            (lambda a: bit_length(a) - np.uint32(1)) if stem == "bfind" else (lambda a: np.uint32(bits) - bit_length(a))
        )
        return Meaning("u32", (kind,), last)
    if stem == "lop3" and kind == "b32":
        return Meaning("b32", ("b32", "b32", "b32", "u32"), look_up)
    if stem in ("shf.l.wrap", "shf.r.wrap", "shf.l.clamp", "shf.r.clamp") and kind == "b32":
        funnel = funnel_left if stem[4] == "l" else funnel_right
        if stem.endswith("wrap"):
            return Meaning("b32", ("b32", "b32", "u32"), lambda a, b, c: funnel(a, b, c & 31))
        return Meaning("b32", ("b32", "b32", "u32"), lambda a, b, c: funnel(a, b, np.minimum(c, 32)))
    if stem == "prmt" and kind == "b32":
        return Meaning("b32", ("b32", "b32", "b32"), permute)
    if stem == "bfe" and kind[0] == "u":
        return Meaning(kind, (kind, "u32", "u32"), extract_field)
    if stem == "bfi" and kind[0] == "b":
        return Meaning(kind, (kind, kind, "u32", "u32"), insert_field)
    if kind == "f32":
        flushes = ".ftz" in stem
        if (found := SINGLE.get(stem.replace(".ftz", ""))) is not None:
            return Meaning(kind, (kind,) * found[0], flushing(found[1]) if flushes else found[1])
    elif kind == "f64":
        found = DOUBLE.get(stem.replace(".rn", ""))
        if found:
            return Meaning(kind, (kind,) * found[0], found[1])
    elif kind[:1] in ("b", "u", "s") and kind != "bf16" and (found := INTEGER.get(stem)) is not None:
        return Meaning(kind, (kind,) * found[0], found[1])
    return None
