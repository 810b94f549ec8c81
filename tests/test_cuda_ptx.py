"""The PTX that nvcc makes of our CUDA kernels, interpreted behind the backend's real host dispatch, against float64.

Also what ptxas says of every kernel on every architecture: no spills, and enough blocks on a multiprocessor. One
compilation serves all of it. Problems and references are those of test_tree_ops.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import cuda_emulator
from tests.ggml_ops import library_folder
from tests.ptx import Module, OutOfBoundsError, PtxError, RaceError, UninitialisedError
from tests.ptx.dispatch import Interpreter
from tests.scripts import load_script
from tests.test_cuda_kernels import EmulatedGgml, random_tree
from tests.test_step_ops import block_mask, run_block_mask, run_top_k, run_tree_mask, top_k, tree_mask
from tests.test_tree_ops import (
    ancestors,
    assert_close,
    binary,
    chain,
    comb,
    convolve,
    delta_net_op,
    last_columns,
    make,
    make_conv,
    replay,
    run_conv,
    run_conv_persist,
    run_persist,
    run_tree,
)

GGML_BASE = library_folder() / "libpydflash-ggml-base.so"


kernel_table = load_script("scripts/kernel_table.py")
cuda_toolchain = load_script("scripts/cuda_toolchain.py")


@pytest.fixture(scope="module")
def nvcc() -> Path:
    try:
        path: Path = cuda_toolchain.find().nvcc
    except cuda_toolchain.ToolchainError as error:
        pytest.skip(f"needs CUDA's compiler (the extra `cuda`): {error}")
    return path


@pytest.fixture(scope="module")
def compiled(nvcc: Path, fork: Path, tmp_path_factory: pytest.TempPathFactory) -> kernel_table.Compiled:
    """All our units for all architectures."""
    return kernel_table.compile_units(nvcc, fork, tmp_path_factory.mktemp("ptx"))


@pytest.fixture(scope="module")
def library(nvcc: Path, fork: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's half of our units."""
    return cuda_emulator.compile_library(tmp_path_factory.mktemp("host"), fork, ggml_base=GGML_BASE)


def interpreted(library: Path, compiled: kernel_table.Compiled, change: Callable[[str], str] = str) -> EmulatedGgml:
    """ggml on interpreted kernels; `change` may put a fault into the PTX."""
    ggml = EmulatedGgml(library)
    ggml.emulator = Interpreter(library, map(change, compiled.ptx.values()))
    return ggml


@pytest.fixture(scope="module")
def cuda(library: Path, compiled: kernel_table.Compiled) -> EmulatedGgml:
    return interpreted(library, compiled)


def launched(cuda: EmulatedGgml) -> str:
    """The kernel that ran last, as it is written in the source."""
    assert isinstance(cuda.emulator, Interpreter)
    (name,) = kernel_table.plain_names([cuda.emulator.launches[-1][0]]).values()
    return str(name)


# -- what the kernels compute -------------------------------------------------------------------------------------


def check_tree(cuda: EmulatedGgml, **shape: object) -> None:
    p = make(**shape)  # type: ignore[arg-type]
    for actual, expected in zip(run_tree(cuda, p), replay(p)[:2], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [5, 23, 64])
def test_tree(cuda: EmulatedGgml, d: int, n: int) -> None:
    """Every instance of the kernel, on a part-filled last block of columns."""
    check_tree(cuda, parent=binary(n), d=d, dv=48, hk=1, hv=2, seed=n)
    n_max = min(m for m in (8, 32, 64) if n <= m)
    assert launched(cuda) == f"delta_net_tree<{d}, {n_max}>"


@pytest.mark.parametrize("seed", range(4))
def test_random_trees(cuda: EmulatedGgml, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parent = random_tree(int(rng.integers(1, 65)), rng)
    check_tree(cuda, parent=parent, d=32, dv=16, hk=2, hv=3, decay=float(rng.choice([0.01, 1.0, 10.0])), seed=seed)


@pytest.mark.parametrize("n", [65, 130])
def test_chains_longer_than_a_tree(cuda: EmulatedGgml, n: int) -> None:
    check_tree(cuda, parent=chain(n), d=32, dv=48, hk=1, hv=1, decay=0.05)


@pytest.mark.parametrize("gap", [0, 1])
def test_slices_of_one_matrix(cuda: EmulatedGgml, gap: int) -> None:
    """q and k between other columns: rows that begin at multiples of 16 bytes, and rows that don't."""
    p = make(binary(30), d=32, dv=16, hk=2, hv=3)
    n, hk, d = p.k.shape
    around = np.full((n, 4), np.nan, np.float32)
    whole = np.concatenate([p.q.reshape(n, -1), around, p.k.reshape(n, -1), around[:, :gap]], axis=1)
    with cuda.graph() as graph:
        matrix = graph.tensor(whole)
        strides = (whole.shape[1] * 4, d * 4)
        operands = {
            name: graph.view(matrix, p.k.shape, strides, at) for name, at in (("q", 0), ("k", (hk * d + 4) * 4))
        }
        result, _ = delta_net_op(graph, p, operands)
        parts = [graph.op(f"ggml_gated_delta_net_tree_{name}", result) for name in ("out", "delta")]
        graph.compute(*parts)
        for part, expected in zip(parts, replay(p)[:2], strict=True):
            assert_close(graph.read(part, *p.v.shape), expected)


@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_persist(cuda: EmulatedGgml, d: int) -> None:
    p = make(comb(30), d=d, dv=48, hk=1, hv=2)
    path = ancestors(p.parent, 28)
    assert_close(run_persist(cuda, p, [*path, -1, 99, -1]), replay(p)[2][28])
    assert launched(cuda) == f"delta_net_persist<{d}>"


def test_empty_path_keeps_the_state(cuda: EmulatedGgml) -> None:
    p = make(chain(5), d=16)
    assert run_persist(cuda, p, [-1, -1]).tobytes() == p.state.tobytes()


@pytest.mark.parametrize("n_taps", [2, 4, 16])
@pytest.mark.parametrize(("channels", "n"), [(130, 23), (16, 1)])
def test_convolution(cuda: EmulatedGgml, n_taps: int, channels: int, n: int) -> None:
    operands = make_conv(comb(n), channels, n_taps, n)
    assert_close(run_conv(cuda, *operands, comb(n)), convolve(*operands, comb(n)))
    assert launched(cuda) == f"conv_tree<{4 if n_taps == 4 else 0}>"


@pytest.mark.parametrize("n_taps", [2, 4, 16])
@pytest.mark.parametrize("path", [[0], [-1, 99, 5, -5, 6], [*range(20)], [-1]])
def test_the_last_columns_stay(cuda: EmulatedGgml, n_taps: int, path: list[int]) -> None:
    state, x, _ = make_conv(chain(20), 130, n_taps, n_taps)
    assert np.array_equal(run_conv_persist(cuda, state, x, path), last_columns(state, x, path))
    assert launched(cuda) == "conv_persist"


@pytest.mark.parametrize(("n", "n_kv", "n_nodes"), [(0, 256, 23), (250, 256, 9), (300, 2560, 64), (33, 77, 5)])
def test_tree_mask(cuda: EmulatedGgml, n: int, n_kv: int, n_nodes: int) -> None:
    """Rows written 8 entries at a time, and one by one where 8 does not divide them; a tree that the end cuts off."""
    parent = random_tree(n_nodes, np.random.default_rng(n))
    assert np.array_equal(run_tree_mask(cuda, parent, n, n_kv), tree_mask(parent, n, n_kv))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n", "n_kv", "n_ring", "window"), [(0, 32, 16, 0), (21, 32, 10, 8), (100, 128, 64, 0), (9, 29, 12, 4)]
)
def test_block_mask(cuda: EmulatedGgml, n: int, n_kv: int, n_ring: int, window: int, causal: bool) -> None:
    arguments = (n, n_kv, 16, n_ring, window, causal)
    assert np.array_equal(run_block_mask(cuda, *arguments), block_mask(*arguments))


@pytest.mark.parametrize(("n_vocab", "k"), [(5, 5), (300, 16), (9000, 64), (4097, 1)])
def test_top_k(cuda: EmulatedGgml, n_vocab: int, k: int) -> None:
    """Rows with ties, with masked tokens, and one that is wrong; more than one slice of a row."""
    rng = np.random.default_rng(n_vocab)
    logits = rng.normal(0, 4, (4, n_vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, rng.random(n_vocab) < 0.7] = -np.inf
    logits[3, n_vocab // 2] = np.nan
    ids, logp = run_top_k(cuda, logits, k)
    for i, row in enumerate(logits):
        expected_ids, expected = top_k(row, k)
        assert np.array_equal(ids[i], expected_ids)
        masked = np.isneginf(expected)
        assert np.array_equal(np.isneginf(logp[i]), masked)
        np.testing.assert_allclose(logp[i][~masked], expected[~masked], rtol=4e-7, atol=4e-7)


# -- tests of the tests: faults put into the PTX ------------------------------------------------------------------

FAULTY = r"14delta_net_treeILi32ELi32E"  # delta_net_tree<32, 32>: two tiles of keys


def body_of(text: str, kernel: str) -> tuple[int, int]:
    """Where the body of the kernel begins and ends; two times the text's end if it is not there."""
    entry = re.search(rf"\.entry \w*{kernel}", text)
    if not entry:
        return len(text), len(text)
    start = text.index("\n{", entry.start())
    return start, text.index("\n}", start)


def faulty(pattern: str, replacement: str, nth: int | None = None, kernel: str = FAULTY) -> Callable[[str], str]:
    """A change of every match within the kernel, or of the nth."""

    def change(text: str) -> str:
        start, end = body_of(text, kernel)
        body = text[start:end]
        found = list(re.finditer(pattern, body))
        for match in reversed(found if nth is None or not found else [found[nth]]):
            body = body[: match.start()] + match.expand(replacement) + body[match.end() :]
        return text[:start] + body + text[end:]

    return change


def run_faulty(library: Path, compiled: kernel_table.Compiled, change: Callable[[str], str]) -> None:
    check_tree(interpreted(library, compiled, change), parent=comb(20), d=32, dv=48, hk=1, hv=1)


def count_barriers(compiled: kernel_table.Compiled, kernel: str) -> int:
    return sum(text.count("bar.sync", *body_of(text, kernel)) for text in compiled.ptx.values())


def test_every_barrier_is_needed(library: Path, compiled: kernel_table.Compiled) -> None:
    """Without any one of the kernel's barriers, threads race."""
    n_barriers = count_barriers(compiled, FAULTY)
    assert n_barriers > 4
    for nth in range(n_barriers):
        with pytest.raises((RaceError, UninitialisedError)):
            run_faulty(library, compiled, faulty(r"bar\.sync \s*0;", "", nth))


def test_every_barrier_of_top_k_is_needed(library: Path, compiled: kernel_table.Compiled) -> None:
    kernel = "14top_k_of_slice"
    logits = np.random.default_rng(0).normal(0, 4, (1, 5000)).astype(np.float32)
    n_barriers = count_barriers(compiled, kernel)
    assert n_barriers > 3
    for nth in range(n_barriers):
        ggml = interpreted(library, compiled, faulty(r"bar\.sync \s*0;", "", nth, kernel))
        with pytest.raises((RaceError, UninitialisedError)):
            run_top_k(ggml, logits, 8)


def test_a_store_off_by_one(library: Path, compiled: kernel_table.Compiled) -> None:
    with pytest.raises((OutOfBoundsError, RaceError)):
        run_faulty(library, compiled, faulty(r"(st\.global\.f32\s+\[%rd\d+)\]", r"\1+4]"))


def test_skipped_stores_to_shared_memory(library: Path, compiled: kernel_table.Compiled) -> None:
    with pytest.raises(UninitialisedError):
        run_faulty(library, compiled, faulty(r"st\.shared\.f32[^;]*;", ""))


def test_a_skipped_store_to_the_result(library: Path, compiled: kernel_table.Compiled) -> None:
    """What the kernel leaves out is NaN."""
    with pytest.raises(AssertionError):
        run_faulty(library, compiled, faulty(r"st\.global\.f32[^;]*;", "", 0))


def test_a_wrong_sign(library: Path, compiled: kernel_table.Compiled) -> None:
    with pytest.raises(AssertionError):
        run_faulty(library, compiled, faulty(r"sub\.ftz\.f32", "add.ftz.f32", 0))


def test_a_wrong_shuffle(library: Path, compiled: kernel_table.Compiled) -> None:
    with pytest.raises((AssertionError, PtxError)):
        run_faulty(library, compiled, faulty(r"shfl\.sync\.idx", "shfl.sync.bfly"))


# -- what ptxas says ----------------------------------------------------------------------------------------------


def test_all_kernels_on_all_architectures(compiled: kernel_table.Compiled) -> None:
    names = {name for text in compiled.ptx.values() for name in Module(text).names}
    plain = kernel_table.plain_names(names)
    assert len(set(plain.values())) == len(names)
    by_architecture: dict[str, set[str]] = {}
    for found in compiled.resources:
        by_architecture.setdefault(found.architecture, set()).add(found.kernel)
    assert by_architecture == dict.fromkeys(kernel_table.ARCHITECTURES, names)
    assert {moved.kernel for moved in kernel_table.MOVED} <= set(plain.values())


def test_nothing_spills(compiled: kernel_table.Compiled) -> None:
    assert not [found for found in compiled.resources if found.spilled or found.stack]


def test_shared_memory_of_every_block_fits(compiled: kernel_table.Compiled) -> None:
    assert max(found.shared for found in compiled.resources) <= 64 << 10


def test_two_blocks_share_a_multiprocessor(compiled: kernel_table.Compiled) -> None:
    for found in compiled.resources:
        if found.architecture == "86":
            threads = compiled.threads[found.kernel]
            assert kernel_table.resident_blocks(found, threads) >= 2, found


def test_resources_are_read_in_full() -> None:
    said = """ptxas info    : 77 bytes gmem
ptxas info    : Compiling entry function '_ZN50_GLOBAL__N__8bd89009_12_tree_conv_cu_e6ae8843_36119conv_treeILi4EEEvv' for 'sm_120a'
ptxas info    : Function properties for _ZN
    16 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 16 bytes cumulative stack size, 30976 bytes smem
ptxas info    : Compiling entry function '_Z3fooILb1ELin3EEvPf' for 'sm_75'
ptxas info    : Function properties for _Z3
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 360 bytes cmem[0]
"""  # noqa: E501
    first, second = kernel_table.read_resources(said)
    assert (first.architecture, first.registers, first.shared, first.spilled, first.stack) == (
        "120a",
        80,
        30976,
        36,
        16,
    )
    assert (second.architecture, second.registers, second.shared, second.spilled) == ("75", 8, 0, 0)
    plain = kernel_table.plain_names([first.kernel, second.kernel])
    assert list(plain.values()) == ["conv_tree<4>", "foo<true, -3>"]
    with pytest.raises(ValueError, match="not understood"):
        kernel_table.read_resources(said.replace("Used 8", "Uses 8"))


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "blocks"),
    [("86", 128, 45312, 256, 2), ("86", 128, 52000, 256, 1), ("86", 129, 0, 256, 1), ("86", 32, 0, 1024, 1),
     ("75", 64, 0, 256, 4), ("90", 16, 0, 32, 32)],
)  # fmt: skip
def test_resident_blocks(architecture: str, registers: int, shared: int, threads: int, blocks: int) -> None:
    found = kernel_table.Resources(architecture, "k", registers, shared, 0, 0)
    assert kernel_table.resident_blocks(found, threads) == blocks
