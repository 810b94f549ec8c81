"""Products of weights with any number of columns (float-gemm.cpp, kquant-gemm.cpp) against float64: weights as gguf
unpacks them, columns rounded as the type asks for; the same bits for any number of threads and beside any columns."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pydflash._lib import check, ffi, lib
from tests.ggml_ops import Ggml

N_ROWS, K = 43, 512  # no multiple of 16 rows
COLUMNS = (*range(1, 10), 16, 17, 24, 33)


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


def ours(ggml: Ggml, name: str) -> bool:
    """Whether the processor has what our kernels need, or upstream's compute the product."""
    needed = {"AVX512_VNNI"} if name.endswith("_K") else {"AVX2", "FMA", "F16C"}
    return needed <= ggml.features()


def quantised(x: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16):
        return gguf.quants.quantize(x, kind)
    out = np.empty((x.shape[0], lib.pf_row_size(kind, x.shape[1])), np.uint8)
    source, target = ffi.from_buffer("float[]", x), ffi.from_buffer(out, require_writable=True)
    check(lib.pf_quantize(kind, source, x.shape[1], x.shape[0], target, out.nbytes))
    return out


def columns_of(x: np.ndarray, name: str) -> np.ndarray:
    """The columns as a product of that type sees them."""
    if not name.endswith("_K"):
        kind = gguf.GGMLQuantizationType[name]
        return gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).astype(np.float64)
    blocks = x.reshape(-1, 256)  # Q8_K: the number of largest magnitude becomes -127
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(1)][:, None]
    inverse = np.float32(-127) / largest
    codes = np.minimum(np.rint(inverse * blocks), 127)
    return (codes.astype(np.float64) / inverse).reshape(x.shape)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_K", "Q5_K", "Q6_K"])
def test_products_are_those_of_float64(ggml: Ggml, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    random = np.random.RandomState(0)
    weights = quantised(random.standard_normal((N_ROWS, K)).astype(np.float32), kind)
    exact = gguf.quants.dequantize(weights, kind).astype(np.float64)
    for n in COLUMNS:
        x = (random.standard_normal((n, K)) * np.exp(random.standard_normal((n, 1)))).astype(np.float32)
        found = []
        for n_threads in (1, 2):
            with ggml.graph() as graph:
                product = graph.op("ggml_mul_mat", graph.packed(kind, weights, N_ROWS, K), graph.tensor(x))
                graph.compute(product, n_threads=n_threads)
                found.append(graph.read(product, n, N_ROWS))
        expected = columns_of(x, name) @ exact.T
        # Of the length of the sum's terms: what f32 loses over them.
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(exact, axis=1)
        assert (np.abs(found[0] - expected) <= 2e-6 * size).all()
        assert (found[0] == found[1]).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize(("n_rows", "k"), [(1, 256), (8, 32), (15, 272), (17, 2048), (300, 512), (1000, 96)])
def test_a_column_has_its_bits_alone_and_in_any_company(ggml: Ggml, name: str, n_rows: int, k: int) -> None:
    """Products small enough to be shared out beforehand, and larger ones; columns that do not follow each other. Where
    the processor lacks what our kernels need, upstream's come as close, but not to the bit."""
    kind = gguf.GGMLQuantizationType[name]
    k = -(-k // 256) * 256 if name.endswith("_K") else k
    random = np.random.RandomState(2)
    weights = quantised(random.standard_normal((n_rows, k)).astype(np.float32), kind)
    exact = gguf.quants.dequantize(weights, kind).astype(np.float64)
    x = random.standard_normal((70, 2 * k)).astype(np.float32)
    with ggml.graph() as graph:
        packed, columns = graph.packed(kind, weights, n_rows, k), graph.tensor(x)
        counts = (*range(1, 17), 33, 64, 70)
        first = [graph.view(columns, (n, k), (x.strides[0],), 4 * k) for n in counts]
        alone = [graph.view(columns, (1, k), (x.strides[0],), i * x.strides[0] + 4 * k) for i in range(len(x))]
        products = [graph.op("ggml_mul_mat", packed, view) for view in (*first, *alone)]
        graph.compute(*products, n_threads=2)
        plain = np.concatenate([graph.read(product, 1, n_rows) for product in products[len(counts) :]])
        together = [graph.read(product, n, n_rows) for n, product in zip(counts, products, strict=False)]
    expected = columns_of(x[:, k:], name) @ exact.T
    size = np.linalg.norm(x[:, k:], axis=1)[:, None] * np.linalg.norm(exact, axis=1)
    for n, found in zip((*counts, len(x)), (*together, plain), strict=True):
        assert (found == plain[:n]).all() or not ours(ggml, name)
        assert (np.abs(found - expected[:n]) <= 2e-6 * size[:n]).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("code", [0x00, 0xFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_codes_and_scales_are_summed_exactly(ggml: Ggml, name: str, code: int, sign: int) -> None:
    """Blocks of all ones in every byte, or all zeros but for the scales: sums at the end of what 16 bits hold."""
    kind = gguf.GGMLQuantizationType[name]
    blocks = np.full((N_ROWS, K // 256, lib.pf_row_size(kind, 256)), code, np.uint8)
    number = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    if name == "Q6_K":
        blocks[:, :, 192:208] = 0x7F + (np.arange(N_ROWS) % 2)[:, None, None]  # scales of 127 and -128
        blocks[:, :, 208:] = number
    else:
        blocks[:, :, :4] = np.tile(number, 2)
        blocks[:, :, 4:16] = 0xFF
    weights = blocks.reshape(N_ROWS, -1)
    exact = gguf.quants.dequantize(weights, kind).astype(np.float64)
    x = sign * np.full((9, K), 3.0, np.float32)
    x[1::2] *= np.where(np.arange(K) % 32 < 16, 1, -1)
    for n in (1, 2, 3, 4, 9):
        with ggml.graph() as graph:
            product = graph.op("ggml_mul_mat", graph.packed(kind, weights, N_ROWS, K), graph.tensor(x[:n]))
            graph.compute(product)
            found = graph.read(product, n, N_ROWS)
        size = np.abs(x[:n]) @ np.abs(exact).T
        assert (np.abs(found - columns_of(x[:n], name) @ exact.T) <= 1e-6 * size + 1e-9).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_K", "Q5_K", "Q6_K"])
def test_a_column_that_is_no_number_stays_alone(ggml: Ggml, name: str) -> None:
    if name.endswith("_K") and not ours(ggml, name):
        pytest.skip("upstream's products of K-quants take a NaN for nothing")
    kind = gguf.GGMLQuantizationType[name]
    random = np.random.RandomState(1)
    weights = quantised(random.standard_normal((20, K)).astype(np.float32), kind)
    x = random.standard_normal((9, K)).astype(np.float32)
    x[4, 300] = np.nan
    with ggml.graph() as graph:
        product = graph.op("ggml_mul_mat", graph.packed(kind, weights, 20, K), graph.tensor(x))
        graph.compute(product)
        found = graph.read(product, 9, 20)
    assert np.isnan(found[4]).all()
    assert np.isfinite(np.delete(found, 4, axis=0)).all()
