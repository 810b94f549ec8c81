"""The interpreter of PTX on kernels written by hand: the meaning of instructions, threads that part and meet, faults.

Expected values come from Python's integers and from numpy in float64, or stand in the test as PTX's manual gives them.
"""

from __future__ import annotations

import math
import operator
import re

import numpy as np
import pytest

from tests.ptx import (
    Buffer,
    DivergenceError,
    MisalignedError,
    Module,
    OutOfBoundsError,
    PtxError,
    RaceError,
    UninitialisedError,
    UnsupportedError,
    launch,
)

F32 = np.float32
HEAD = ".version 9.0\n.target sm_86\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<20>; .reg .b64 %rd<20>; .reg .f32 %f<9>; .reg .f64 %fd<9>;
"""
# %rd1 = out, %rd2 = in, %r0 = the thread, %rd3 = 4 * the thread, %rd4 = &out[thread], %rd5 = &in[thread]
PROLOGUE = """
    ld.param.u64 %rd1, [k_param_0]; ld.param.u64 %rd2, [k_param_1];
    cvta.to.global.u64 %rd1, %rd1; cvta.to.global.u64 %rd2, %rd2;
    mov.u32 %r0, %tid.x; mul.wide.u32 %rd3, %r0, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
"""


def module(body: str, *, top: str = "", limits: str = "") -> Module:
    parameters = ".param .u64 k_param_0, .param .u64 k_param_1"
    return Module(f"{HEAD}{top}\n.visible .entry k({parameters})\n{limits}\n{{{REGISTERS}{PROLOGUE}{body}\nret;\n}}\n")


def run(
    body: str,
    data: np.ndarray | None = None,
    *,
    threads: int = 64,
    blocks: int = 1,
    out: int | None = None,
    top: str = "",
    shared: int = 0,
    dtype: type = np.uint32,
) -> np.ndarray:
    """out [threads] of a kernel whose body writes it."""
    result = Buffer.output("out", (threads if out is None else out,), dtype)
    source = Buffer("in", np.arange(threads, dtype=np.uint32) if data is None else data)
    launch(module(body, top=top).kernel("k"), (blocks, 1, 1), (threads, 1, 1), [result, source], shared_bytes=shared)
    return result.array


# -- what instructions mean ---------------------------------------------------------------------------------------

EDGES = [0, 1, 2, 3, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xDEADBEEF, 100, 7, 0xFFFFFFF9]


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "min.s32": lambda a, b: min(signed(a), signed(b)),
    "min.u32": min,
    "max.s32": lambda a, b: max(signed(a), signed(b)),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a) >> min(b, 31),
    "div.s32": lambda a, b: towards_zero(signed(a), signed(b)) if b else None,
    "div.u32": lambda a, b: a // b if b else None,
    "rem.s32": lambda a, b: signed(a) - towards_zero(signed(a), signed(b)) * signed(b) if b else None,
    "rem.u32": lambda a, b: a % b if b else None,
}


@pytest.mark.parametrize("opcode", BINARY)
def test_integers(opcode: str) -> None:
    pairs = [(a, b) for a in EDGES for b in EDGES if BINARY[opcode](a, b) is not None]
    data = np.array(pairs, np.uint32)
    body = f"""
    add.s64 %rd6, %rd5, %rd3; ld.global.v2.u32 {{%r1, %r2}}, [%rd6];
    {opcode} %r3, %r1, %r2; st.global.u32 [%rd4], %r3;"""
    expected = [BINARY[opcode](a, b) & 0xFFFFFFFF for a, b in pairs]
    assert run(body, data, threads=len(pairs)).tolist() == expected


ONE = {
    "popc.b32 %r2, %r1": lambda a: a.bit_count(),
    "clz.b32 %r2, %r1": lambda a: 32 - a.bit_length(),
    "brev.b32 %r2, %r1": lambda a: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %r2, %r1": lambda a: a.bit_length() - 1,
    "not.b32 %r2, %r1": lambda a: ~a,
    "neg.s32 %r2, %r1": lambda a: -a,
    "abs.s32 %r2, %r1": lambda a: abs(signed(a)),
    "mad.lo.s32 %r2, %r1, %r1, -3": lambda a: a * a - 3,
    "bfe.u32 %r2, %r1, 4, 9": lambda a: a >> 4 & 511,
    "bfi.b32 %r2, %r1, -1, 8, 5": lambda a: 0xFFFFFFFF & ~(31 << 8) | (a & 31) << 8,
    "shf.l.wrap.b32 %r2, %r1, 12345, 37": lambda a: (12345 << 32 | a) << 5 >> 32,
    "shf.r.wrap.b32 %r2, %r1, 12345, 5": lambda a: (12345 << 32 | a) >> 5,
    "prmt.b32 %r2, %r1, 0, 0x0123": lambda a: int.from_bytes(a.to_bytes(4, "little"), "big"),
    "lop3.b32 %r2, %r1, 0xFF00FF00, 0x0F0F0F0F, 0xE8": lambda a: (
        a & 0xFF00FF00 | a & 0x0F0F0F0F | 0xFF00FF00 & 0x0F0F0F0F
    ),
    "cvt.s64.s32 %rd9, %r1; shr.u64 %rd9, %rd9, 16; cvt.u32.u64 %r2, %rd9": lambda a: signed(a) >> 16,
    "mul.wide.s32 %rd9, %r1, -7; shr.s64 %rd9, %rd9, 20; cvt.u32.u64 %r2, %rd9": lambda a: signed(a) * -7 >> 20,
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1}": lambda a: (a & 0xFFFF) << 16 | a >> 16,
    "setp.lt.s32 %p1, %r1, 5; selp.b32 %r2, 1, 0, %p1": lambda a: signed(a) < 5,
    "setp.lt.u32 %p1, %r1, 5; @%p1 bra $1; neg.s32 %r1, 4; $1: mov.u32 %r2, %r1": lambda a: a if a < 5 else -4,
    "mul.wide.u32 %rd9, %r1, %r1; mul.hi.u64 %rd9, %rd9, %rd9; cvt.u32.u64 %r2, %rd9": lambda a: a**4 >> 64,
    "{ .reg .b32 %r1; mov.u32 %r1, 5; } mov.u32 %r2, %r1": lambda a: a,
}


@pytest.mark.parametrize("code", ONE)
def test_integers_of_one_operand(code: str) -> None:
    result = run(
        f"ld.global.u32 %r1, [%rd5]; {code}; st.global.u32 [%rd4], %r2;", np.array(EDGES, np.uint32), threads=15
    )
    assert result.tolist() == [ONE[code](a) & 0xFFFFFFFF for a in EDGES]


FLOATS = np.array([0, -0.0, 1, -2.5, 3.5, 1e-42, 1e38, 3e9, -3e9, np.inf, -np.inf, np.nan, 0.1, 7, 1e-20], F32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.f32 %f2, %f1, 0f3DCCCCCD", lambda x: x + F32(0.1)),
        ("fma.rn.f32 %f2, %f1, %f1, 0fBF800000", lambda x: (x.astype(float) * x - 1).astype(F32)),
        ("mul.ftz.f32 %f2, %f1, 0f3F800000", lambda x: np.where(np.abs(x) == F32(1e-42), F32(0), x)),
        ("ex2.approx.ftz.f32 %f2, %f1", lambda x: np.exp2(x.astype(float)).astype(F32)),
        ("rcp.rn.f32 %f2, %f1", lambda x: (1 / x.astype(float)).astype(F32)),
        ("div.full.ftz.f32 %f2, %f1, 0f40400000", lambda x: np.where(x == F32(1e-42), 0, x / F32(3))),
        ("max.f32 %f2, %f1, 0f00000000", lambda x: np.where(x > 0, x, F32(0))),
        ("abs.f32 %f2, %f1", np.abs),
        ("cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f2, %rs1", lambda x: x.astype(np.float16).astype(F32)),
        ("cvt.rni.f32.f32 %f2, %f1", np.rint),
        ("cvt.sat.f32.f32 %f2, %f1", lambda x: np.where(np.isnan(x), 0, np.clip(x, 0, 1))),
        (
            "cvt.f64.f32 %fd1, %f1; add.f64 %fd1, %fd1, %fd1; cvt.rn.f32.f64 %f2, %fd1",
            lambda x: (2 * x.astype(float)).astype(F32),
        ),
    ],
)
def test_floats(code: str, expected: object) -> None:
    result = run(
        f"ld.global.f32 %f1, [%rd5]; {code}; st.global.f32 [%rd4], %f2;", FLOATS, threads=len(FLOATS), dtype=F32
    )
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(result, expected(FLOATS))  # type: ignore[operator]


def test_float_to_integer_saturates() -> None:
    result = run(
        "ld.global.f32 %f1, [%rd5]; cvt.rzi.s32.f32 %r1, %f1; st.global.u32 [%rd4], %r1;", FLOATS, threads=len(FLOATS)
    )
    top = 2**31 - 1
    assert result.astype(np.int32).tolist() == [0, 0, 1, -2, 3, 0, top, top, -top - 1, top, -top - 1, 0, 0, 7, 0]


ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "ge": operator.ge, "num": lambda a, b: True}
UNORDERED = {"equ": operator.eq, "neu": operator.ne, "ltu": operator.lt, "geu": operator.ge, "nan": lambda a, b: False}


@pytest.mark.parametrize("name", [*ORDERED, *UNORDERED])
def test_comparisons_with_nan(name: str) -> None:
    """The ordered ones are false where an operand is NaN, the others true."""
    body = f"""
    ld.global.f32 %f1, [%rd5]; setp.{name}.f32 %p1, %f1, 0f3F800000;
    selp.b32 %r1, 1, 0, %p1; st.global.u32 [%rd4], %r1;"""
    compare = (ORDERED | UNORDERED)[name]
    expected = [name in UNORDERED if math.isnan(x) else compare(x, 1.0) for x in FLOATS.tolist()]
    assert run(body, FLOATS, threads=len(FLOATS)).tolist() == expected


# -- how threads part and meet ------------------------------------------------------------------------------------


def test_loops_of_different_lengths() -> None:
    """Thread t adds 0 + 1 + ... + t - 1, threads 50 and up leave first."""
    body = """
    setp.ge.u32 %p1, %r0, 50; @%p1 exit;
    mov.u32 %r1, 0; mov.u32 %r2, 0;
$loop:
    setp.ge.u32 %p2, %r1, %r0; @%p2 bra $after;
    add.s32 %r2, %r2, %r1; add.s32 %r1, %r1, 1;
    bra.uni $loop;
$after:
    st.global.u32 [%rd4], %r2;"""
    assert run(body).tolist() == [t * (t - 1) // 2 for t in range(50)] + [0] * 14


def test_sum_through_shared_memory() -> None:
    """A tree of barriers; the loop and the guard part the threads, the barrier joins them. Several blocks at once."""
    body = """
    .shared .align 4 .b8 sums[256];
    ld.global.u32 %r1, [%rd5]; mov.u32 %r2, sums; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1;
    mov.u32 %r5, 32;
$loop:
    bar.sync 0;
    setp.ge.u32 %p1, %r0, %r5; @%p1 bra $next;
    shl.b32 %r6, %r5, 2; add.s32 %r7, %r4, %r6; ld.shared.u32 %r8, [%r7]; ld.shared.u32 %r9, [%r4];
    add.s32 %r9, %r9, %r8; st.shared.u32 [%r4], %r9;
$next:
    shr.u32 %r5, %r5, 1; setp.ne.s32 %p2, %r5, 0; @%p2 bra $loop;
    setp.ne.s32 %p3, %r0, 0; @%p3 bra $end;
    mov.u32 %r10, %ctaid.x; mul.wide.u32 %rd6, %r10, 4; add.s64 %rd7, %rd1, %rd6; st.global.u32 [%rd7], %r9;
$end:"""
    assert run(body, blocks=5, out=5).tolist() == [64 * 63 // 2] * 5
    without = body.replace("bar.sync 0;", "")
    with pytest.raises((RaceError, UninitialisedError)):
        run(without, blocks=5, out=5)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %r1, %r0, 5, 31, -1", lambda t: t ^ 5),
        ("shfl.sync.idx.b32 %r1, %r0, 3, 31, -1", lambda t: t // 32 * 32 + 3),
        ("shfl.sync.idx.b32 %r1, %r0, 3, 0x181F, -1", lambda t: t // 8 * 8 + 3),  # width 8
        ("shfl.sync.up.b32 %r1, %r0, 4, 0, -1", lambda t: t - 4 if t % 32 >= 4 else t),
        ("shfl.sync.down.b32 %r1|%p1, %r0, 4, 31, -1; @!%p1 mov.u32 %r1, 99", lambda t: t + 4 if t % 32 < 28 else 99),
        (
            "setp.lt.u32 %p1, %r0, 40; vote.sync.ballot.b32 %r1, %p1, -1; popc.b32 %r1, %r1",
            lambda t: 32 if t < 32 else 8,
        ),
        ("setp.eq.u32 %p1, %r0, 40; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2", lambda t: t >= 32),
        ("setp.lt.u32 %p1, %r0, 40; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2", lambda t: t < 32),
        ("redux.sync.max.u32 %r1, %r0, -1", lambda t: t // 32 * 32 + 31),
        ("redux.sync.add.s32 %r1, %r0, -1", lambda t: 496 if t < 32 else 496 + 1024),
    ],
)
def test_warps(code: str, expected: object) -> None:
    result = run(f"{code}; st.global.u32 [%rd4], %r1;")
    assert result.tolist() == [expected(t) for t in range(64)]  # type: ignore[operator]


def test_parted_threads_meet_at_a_shuffle() -> None:
    """Both sides of a branch come to one shuffle that names all; what stands between does not matter."""
    body = """
    and.b32 %r1, %r0, 1; setp.eq.s32 %p1, %r1, 0; mov.u32 %r2, %r0; @%p1 bra $meet; add.s32 %r2, %r2, 100;
$meet:
    shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; st.global.u32 [%rd4], %r3;"""
    assert run(body).tolist() == [t ^ 1 if t % 2 else (t ^ 1) + 100 for t in range(64)]


def test_blocks_and_axes() -> None:
    """Every thread of a 3-d grid of 3-d blocks writes its own number."""
    body = """
    mov.u32 %r1, %ctaid.z; mov.u32 %r2, %nctaid.y; mov.u32 %r3, %ctaid.y; mad.lo.s32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x; mad.lo.s32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.z; mov.u32 %r3, %tid.z; mad.lo.s32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.y; mov.u32 %r3, %tid.y; mad.lo.s32 %r1, %r1, %r2, %r3;
    mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; mad.lo.s32 %r1, %r1, %r2, %r3;
    mul.wide.u32 %rd6, %r1, 4; add.s64 %rd7, %rd1, %rd6; st.global.u32 [%rd7], %r1;"""
    for at_once in (24, 100, 4096):
        out = Buffer.output("out", (3 * 2 * 2 * 24,), np.uint32)
        launch(module(body).kernel("k"), (3, 2, 2), (4, 3, 2), [out, 0], lanes_at_once=at_once)
        assert out.array.tolist() == list(range(288))
        assert out.written()


def test_atomic_counters() -> None:
    """A counter of each block in shared memory hands out places; one in global memory is shared by the blocks."""
    body = """
    .shared .align 4 .b8 counter[4]; mov.u32 %r1, counter; setp.eq.s32 %p1, %r0, 0; @%p1 st.shared.u32 [%r1], 3;
    {} setp.gt.u32 %p2, %r0, 40; @%p2 bra $end;
    atom.shared.add.u32 %r2, [%r1], 2; mov.u32 %r3, %ctaid.x; mul.wide.u32 %rd6, %r3, 256; add.s64 %rd7, %rd4, %rd6;
    st.global.u32 [%rd7], %r2; atom.global.add.u32 %r4, [%rd2], %r0;
$end:"""
    out, total = (Buffer(name, np.zeros(n, np.uint32), writable=True) for name, n in (("out", 192), ("total", 1)))
    launch(module(body.format("bar.sync 0;")).kernel("k"), (3, 1, 1), (64, 1, 1), [out, total], lanes_at_once=128)
    assert out.array.reshape(3, 64).tolist() == [[2 * t + 3 if t <= 40 else 0 for t in range(64)]] * 3
    assert total.array.tolist() == [3 * 820]
    with pytest.raises(RaceError, match="atomic at line"):
        launch(module(body.format("")).kernel("k"), (3, 1, 1), (64, 1, 1), [out, total])
    both = module("atom.global.add.u32 %r1, [%rd2], 1; st.global.u32 [%rd2], 1;").kernel("k")
    with pytest.raises(RaceError, match="buffer 'total'"):
        launch(both, (1, 1, 1), (64, 1, 1), [0, total])


def test_division_in_double() -> None:
    """Divisions in f64 are Newton's iteration from a gross reciprocal."""
    body = """
    ld.global.f32 %f1, [%rd5]; cvt.ftz.f64.f32 %fd1, %f1; rcp.approx.ftz.f64 %fd2, %fd1; neg.f64 %fd3, %fd1;
    fma.rn.f64 %fd4, %fd3, %fd2, 0d3FF0000000000000; fma.rn.f64 %fd4, %fd4, %fd4, %fd4;
    fma.rn.f64 %fd5, %fd4, %fd2, %fd2;
    add.s64 %rd6, %rd4, %rd3; st.global.f64 [%rd6], %fd5;"""
    x = np.linspace(0.1, 900, 64, dtype=F32)
    np.testing.assert_allclose(run(body, x, out=64, dtype=np.float64), 1 / x.astype(float), rtol=3e-16)


def test_local_memory_belongs_to_a_thread() -> None:
    body = """
    .local .align 8 .b8 depot[16]; .reg .b64 %SP; .reg .b64 %SPL;
    mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL; add.u64 %rd6, %SP, 8; cvta.to.local.u64 %rd7, %rd6;
    st.local.u32 [%rd7+4], %r0; ld.u32 %r1, [%rd6+4]; st.global.u32 [%rd4], %r1;"""
    assert run(body).tolist() == list(range(64))


# -- faults -------------------------------------------------------------------------------------------------------

# Threads of a block pass their numbers through shared memory: thread t reads what t ^ 32 wrote.
EXCHANGE = """
    .shared .align 4 .b8 box[256];
    mov.u32 %r1, box; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0;
    bar.sync 0;
    xor.b32 %r4, %r0, {partner}; shl.b32 %r4, %r4, 2; add.s32 %r5, %r1, %r4; ld.shared.u32 %r6, [%r5];
    st.global.u32 [%rd4], %r6;"""


def test_exchange_is_sound() -> None:
    assert run(EXCHANGE.format(partner=32)).tolist() == [t ^ 32 for t in range(64)]


@pytest.mark.parametrize("partner", [1, 32])
def test_a_missing_barrier_is_a_race(partner: int) -> None:
    with pytest.raises(RaceError, match=r"shared memory: cell \d+: write at line .* read at line"):
        run(EXCHANGE.format(partner=partner).replace("bar.sync 0;", ""))


def test_a_barrier_of_the_warp_orders_a_warp_and_no_more() -> None:
    body = EXCHANGE.replace("bar.sync 0;", "bar.warp.sync -1;")
    assert run(body.format(partner=1)).tolist() == [t ^ 1 for t in range(64)]
    with pytest.raises(RaceError):
        run(body.format(partner=32))


def test_two_writers_race() -> None:
    body = ".shared .align 4 .b8 box[8]; mov.u32 %r1, box; st.shared.u32 [%r1], %r0;"
    with pytest.raises(RaceError, match=r"write at line .* write at line"):
        run(body)


def test_reading_before_a_later_write_races() -> None:
    """All read, then one writes, with the barrier on the wrong side."""
    body = """
    .shared .align 4 .b8 box[8]; mov.u32 %r1, box; setp.eq.s32 %p1, %r0, 0; @%p1 st.shared.u32 [%r1], %r0;
    bar.sync 0; ld.shared.u32 %r2, [%r1]; {barrier} @%p1 st.shared.u32 [%r1], 5; st.global.u32 [%rd4], %r2;"""
    assert run(body.format(barrier="bar.sync 0;")).tolist() == [0] * 64
    with pytest.raises(RaceError):
        run(body.format(barrier=""))


def test_blocks_race_for_global_memory() -> None:
    with pytest.raises(RaceError, match="buffer 'out'"):
        run("st.global.u32 [%rd4], 1;", blocks=2)


def test_threads_race_for_global_memory() -> None:
    body = """
    add.s64 %rd6, %rd4, -4; st.global.u32 [%rd4], %r0; {}
    setp.eq.s32 %p1, %r0, 0; @%p1 exit; ld.global.u32 %r1, [%rd6];"""
    run(body.format("bar.sync 0;"))
    with pytest.raises(RaceError, match="buffer 'out'"):
        run(body.format(""))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("st.global.u32 [%rd4+4], %r0", "4 bytes at offset 256 of buffer 'out', which has 256"),
        ("st.global.u32 [%rd4+-4], %r0", "just before buffer 'out'"),
        ("ld.global.u32 %r1, [%rd5+4]", "buffer 'in'"),
        ("ld.global.u32 %r1, [%rd5+0x100000]", "buffer 'in'"),
        ("ld.global.u32 %r1, [%rd3]", "global address 0x0"),
        ("st.global.u32 [%rd5], %r0", "'in' is an input"),
        (".shared .align 4 .b8 a[252]; .shared .align 4 .b8 b[64]; mov.u32 %r1, a; mad.lo.s32 %r1, %r0, 4, %r1;"
         "st.shared.u32 [%r1], %r0", "between its variables"),
        (".shared .align 4 .b8 a[256]; mov.u32 %r1, -1024; st.shared.u32 [%r1], %r0", "of shared memory"),
        (".local .align 4 .b8 a[8]; .reg .b64 %l; mov.u64 %l, a; st.local.u32 [%l+8], %r0", "of local memory"),
    ],
)  # fmt: skip
def test_out_of_bounds(code: str, message: str) -> None:
    with pytest.raises(OutOfBoundsError, match=re.escape(message)):
        run(f"{code};")


def test_dynamic_shared_memory_ends() -> None:
    top = ".extern .shared .align 16 .b8 dynamic[];"
    body = "mov.u32 %r1, dynamic; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0;"
    run(body, top=top, shared=256)
    with pytest.raises(OutOfBoundsError):
        run(body, top=top, shared=252)
    with pytest.raises(PtxError, match="declares no shared memory"):
        run("", shared=4)


@pytest.mark.parametrize(
    "code",
    [
        ".shared .align 4 .b8 box[256]; mov.u32 %r1, box; ld.shared.u32 %r2, [%r1]",
        "ld.global.u32 %r1, [%rd4]",
        ".local .align 4 .b8 a[8]; .reg .b64 %l; mov.u64 %l, a; ld.local.u32 %r1, [%l]",
    ],
)
def test_uninitialised_memory(code: str) -> None:
    with pytest.raises(UninitialisedError):
        run(f"{code};")


def test_misaligned() -> None:
    with pytest.raises(MisalignedError):
        run("ld.global.v2.u32 {%r1, %r2}, [%rd5];", np.arange(65, dtype=np.uint32))
    source = Buffer("in", np.arange(64, dtype=np.uint32), shift=4)
    body = "mul.wide.u32 %rd6, %r0, 16; add.s64 %rd7, %rd2, %rd6; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd7];"
    with pytest.raises(MisalignedError):
        launch(module(body).kernel("k"), (1, 1, 1), (16, 1, 1), [0, source])


def test_barriers_in_parted_code() -> None:
    body = "setp.lt.u32 %p1, %r0, 7; @%p1 bra $other; bar.sync 0; bra.uni $end; $other: bar.sync 0; $end:"
    with pytest.raises(DivergenceError, match="7 threads at the barrier"):
        run(body)


def test_ended_threads_are_not_waited_for() -> None:
    run("setp.lt.u32 %p1, %r0, 7; @%p1 exit; bar.sync 0;")


def test_shuffle_that_not_all_reach() -> None:
    body = "setp.lt.u32 %p1, %r0, 7; @%p1 bra $wait; shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1; $wait: bar.sync 0;"
    with pytest.raises(DivergenceError, match=r"57 threads at the collective|25 threads at the collective"):
        run(body)


def test_shuffle_mask_must_name_its_callers() -> None:
    with pytest.raises(DivergenceError, match="leaves out thread 16"):
        run("shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFFFF;")


def test_shuffle_from_an_ended_lane() -> None:
    with pytest.raises(DivergenceError, match="does not take part"):
        run("setp.eq.s32 %p1, %r0, 3; @%p1 exit; shfl.sync.idx.b32 %r1, %r0, 3, 31, -1;")


def test_constant_path_sees_no_writes() -> None:
    body = "{} ld.global.nc.u32 %r1, [%rd4]; add.s32 %r1, %r1, 1; st.global.u32 [%rd4], %r1;"
    inout = Buffer("inout", np.zeros(64, np.uint32), writable=True)
    with pytest.raises(PtxError, match="read-only path"):
        launch(module(body.format("")).kernel("k"), (1, 1, 1), (64, 1, 1), [inout, 0])
    inout = Buffer("inout", np.zeros(64, np.uint32), writable=True)
    launch(module(body.format("").replace(".nc", "")).kernel("k"), (1, 1, 1), (64, 1, 1), [inout, 0])
    assert inout.array.tolist() == [1] * 64


def test_unwritten_registers_are_poison() -> None:
    assert np.isnan(run("st.global.f32 [%rd4], %f7;", dtype=F32)).all()


def test_division_by_zero() -> None:
    with pytest.raises(PtxError, match="division by zero"):
        run("mov.u32 %r1, 0; div.u32 %r2, %r0, %r1;")


# -- launches -----------------------------------------------------------------------------------------------------


def test_parameters_lie_as_in_c() -> None:
    """int8, double, a struct of 12 bytes aligned to 4, int16; the struct read in full and through a register."""
    text = f"""{HEAD}.entry k(.param .u64 o, .param .u8 a, .param .f64 b, .param .align 4 .b8 c[12], .param .u16 e)
{{
    .reg .b64 %rd<9>; .reg .b32 %r<9>; .reg .f64 %fd<3>; .reg .b16 %rs<3>;
    ld.param.u64 %rd1, [o]; ld.param.s8 %r1, [a]; st.global.u32 [%rd1], %r1;
    ld.param.f64 %fd1, [b]; cvt.rzi.s32.f64 %r2, %fd1; st.global.u32 [%rd1+4], %r2;
    ld.param.v2.u32 {{%r3, %r4}}, [c]; st.global.v2.u32 [%rd1+8], {{%r3, %r4}};
    mov.b64 %rd2, c; ld.param.u32 %r5, [%rd2+8]; st.global.u32 [%rd1+16], %r5;
    ld.param.u16 %rs1, [e]; cvt.u32.u16 %r6, %rs1; st.global.u32 [%rd1+20], %r6;
    ret;
}}
"""
    kernel = Module(text).kernel("k")
    assert [p.offset for p in kernel.parameters] == [0, 8, 16, 24, 36]
    out = Buffer.output("out", (6,), np.int32)
    launch(kernel, (1, 1, 1), (1, 1, 1), [out, -5, 6.5, np.arange(3, dtype=np.int32).tobytes(), 65535])
    assert out.array.tolist() == [-5, 6, 0, 1, 2, 65535]
    for wrong in ([out, -5, 6.5, b"123", 1], [out, -5, 6.5], [out, 0.5, 6.5, bytes(12), 1]):
        with pytest.raises(PtxError):
            launch(kernel, (1, 1, 1), (1, 1, 1), wrong)


def test_too_many_threads() -> None:
    kernel = module("", limits=".maxntid 8, 4, 1\n.minnctapersm 2").kernel("k")
    launch(kernel, (1, 1, 1), (32, 1, 1), [0, 0])
    with pytest.raises(PtxError, match="at most 32"):
        launch(kernel, (1, 1, 1), (33, 1, 1), [0, 0])


@pytest.mark.parametrize(
    "code",
    [
        "mystery.f32 %f1, %f2;",
        "add.rz.f32 %f1, %f1, %f2;",
        "sin.approx.f32 %f1, %f1;",
        "add.s32 %r1, %r2;",
        "mov.u32 %r1, %clock;",
        "mov.u32 %r1, %unknown9;",
        "mov.u64 %rd1, somewhere;",
        "bar.sync 1;",
        "bar.sync 0, 32;",
        "call.uni (%r1), f, (%r2);",
        "atom.global.cas.b32 %r1, [%rd1], 1, 2;",
        "atom.global.add.f32 %f1, [%rd1], %f2;",
        "ld.global.b128 %rd1, [%rd2];",
        "shfl.bfly.b32 %r1, %r0, 1, 31;",
        "mov.u32 %rd1, %r1;",
        "add.f32 %r1, %p1, %r2;",
        ".align 8;",
        '.pragma "enable_smem_spilling";',
        "@%p1 bar.sync 0;",
        "setp.lt.and.sqrt.f32 %p1, %f1, %f2, %p2;",
        "cvt.rz.f32.f64 %f1, %fd1;",
    ],
)
def test_what_is_not_known_is_refused(code: str) -> None:
    with pytest.raises(UnsupportedError, match=r"line \d+ of the PTX"):
        run(code)


def test_unknown_directives_of_a_module_are_refused() -> None:
    for text in (".branchtargets a;", ".alias f, g;"):
        with pytest.raises(UnsupportedError):
            Module(f"{HEAD}{text}\n.entry k()\n{{\nret;\n}}\n")
    with pytest.raises(UnsupportedError):
        module("", limits=".explicitcluster").kernel("k")
    assert Module(HEAD).names == []
    with pytest.raises(PtxError, match="names 0 kernels"):
        module("").find("other")
