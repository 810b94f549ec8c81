"""Conversions between float32 and ggml's number formats, through the C interface.

What they should give comes from the gguf package's numpy versions, which know nothing of ggml's code.
"""

from __future__ import annotations

import warnings
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pydflash._lib import check, ffi, lib
from pydflash.errors import ArgumentError, UnsupportedModelError

Array = npt.NDArray[Any]
QT = gguf.GGMLQuantizationType
# What pf_quantize writes, with the relative error (root mean square) that normally distributed weights may come back
# with: a tenth above what they do. The ternary and binary formats are not for such weights and have their own test.
WRITTEN = {
    "f32": 0.0, "f16": 2.3e-4, "bf16": 1.8e-3,
    "q8_0": 0.006, "q5_0": 0.047, "q5_1": 0.042, "q4_0": 0.095, "q4_1": 0.088,
    "q6_K": 0.02, "q5_K": 0.04, "q4_K": 0.08, "q3_K": 0.17, "q2_K": 0.33, "iq4_nl": 0.085, "iq4_xs": 0.085,
    "mxfp4": 0.13, "nvfp4": 0.105,
}  # fmt: skip
FEW_LEVELS = ("q1_0", "q2_0", "tq1_0", "tq2_0")
REFUSED = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")


def number_of(name: str) -> int:
    number: int = lib.pf_type_from_name(name.encode())
    assert number >= 0
    return number


def quantize(kind: int, x: Array, *, size: int | None = None) -> Array:
    x = np.ascontiguousarray(x, np.float32)
    dst = np.zeros(max(lib.pf_row_size(kind, x.shape[1]) * x.shape[0], 1), np.uint8)
    src = ffi.cast("float *", ffi.from_buffer(x))
    out = ffi.cast("void *", ffi.from_buffer(dst))
    check(lib.pf_quantize(kind, src, x.shape[1], x.shape[0], out, dst.size if size is None else size))
    return dst


def dequantize(kind: int, raw: Array, n: int, *, size: int | None = None) -> Array:
    dst = np.zeros(max(n, 1), np.float32)
    src = ffi.cast("void *", ffi.from_buffer(np.ascontiguousarray(raw)))
    out = ffi.cast("float *", ffi.from_buffer(dst))
    check(lib.pf_dequantize(kind, src, raw.size if size is None else size, n, out))
    return dst


def test_type_names_and_row_sizes_are_the_gguf_packages() -> None:
    for kind in QT:
        name = kind.name.lower().encode()
        assert lib.pf_type_from_name(name) == kind
        assert ffi.string(lib.pf_type_name(kind)).lower() == name
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind == QT.Q8_1:  # the gguf package still has the f32 scale that ggml dropped
            n_bytes = 36
        for n_blocks in (0, 1, 2, 1000, 2**40):
            assert lib.pf_row_size(kind, n_blocks * block) == n_blocks * n_bytes
        if block > 1:
            assert lib.pf_row_size(kind, block - 1) == -1
        assert lib.pf_row_size(kind, -block) == -1
    assert lib.pf_row_size(QT.F32, 2**61) == -1
    for number in (-1, 4, 5, 31, 36, 43, 1000, 2**31 - 1, -(2**31)):
        assert lib.pf_type_name(number) == ffi.NULL
        assert lib.pf_row_size(number, 32) == -1
    for unknown in (b"", b"f17", b"DEPRECATED", ffi.NULL):
        assert lib.pf_type_from_name(unknown) == -1


@pytest.mark.parametrize("name", WRITTEN)
def test_quantised_weights_come_back(name: str) -> None:
    kind = number_of(name)
    x = np.random.RandomState(7).randn(8, 512).astype(np.float32) * np.float32(0.05)
    raw = quantize(kind, x)
    got = dequantize(kind, raw, x.size).reshape(x.shape)
    error = np.sqrt(np.mean((got - x) ** 2) / np.mean(x**2))
    assert error <= WRITTEN[name]
    if kind == QT.F32:
        assert raw.tobytes() == x.tobytes()
    else:
        want = gguf.quants.dequantize(raw.reshape(8, -1), QT(kind)).reshape(x.shape)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FEW_LEVELS)
def test_weights_of_few_levels_come_back(name: str) -> None:
    levels = [-0.25, 0.25] if name == "q1_0" else [-0.25, 0.0, 0.25]
    x = np.random.RandomState(7).choice(levels, (8, 512)).astype(np.float32)
    kind = number_of(name)
    np.testing.assert_array_equal(dequantize(kind, quantize(kind, x), x.size).reshape(x.shape), x)


@pytest.mark.parametrize("kind", [QT.F16, QT.BF16, QT.Q8_0, QT.Q4_0, QT.Q4_1, QT.Q5_0, QT.Q5_1], ids=lambda k: k.name)
def test_quantised_bytes_equal_the_gguf_packages(kind: QT) -> None:
    x = np.random.RandomState(8).randn(16, 256).astype(np.float32)
    x[3] = 0
    assert quantize(kind, x).tobytes() == gguf.quants.quantize(x, kind).tobytes()


@pytest.mark.parametrize("kind", [k for k in QT if k.name in dir(gguf.quants)], ids=lambda kind: kind.name)
def test_any_bytes_can_be_dequantised(kind: QT) -> None:
    """Whatever a file holds as weights becomes numbers, the gguf package's, NaN and infinity included."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.RandomState(9).randint(0, 256, (512, n_bytes)).astype(np.uint8)
    got = dequantize(kind, raw.reshape(-1), 512 * block).reshape(512, block)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about the NaN
        want = gguf.quants.dequantize(raw, kind)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("name", [*WRITTEN, *FEW_LEVELS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4028235e38])
def test_weights_that_cannot_be_written(name: str, bad: float) -> None:
    kind = number_of(name)
    x = np.zeros((4, 256), np.float32)
    x[2, 77] = bad
    if kind == QT.F32 and np.isfinite(bad):
        quantize(kind, x)
        return
    with pytest.raises(ArgumentError, match="in row 2, column 77 can't be written as"):
        quantize(kind, x)


@pytest.mark.parametrize("name", [*WRITTEN, *FEW_LEVELS])
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-31, 65504.0])
def test_the_smallest_and_the_largest_weights(name: str, scale: float) -> None:
    kind = number_of(name)
    x = np.float32(scale) * np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    got = dequantize(kind, quantize(kind, x), x.size)
    assert np.isfinite(got).all()
    if scale < 1:
        assert np.abs(got).max() <= 2 * scale
    elif name == "nvfp4":  # its scales end at 448 * 6
        assert np.abs(got).max() == 2688
    else:
        assert np.abs(got).max() <= 1.25 * scale


def test_conversions_refuse_what_cannot_be() -> None:
    x = np.ones((2, 256), np.float32)
    for name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=f"{name} wants an importance matrix"):
            quantize(number_of(name), x)
    for kind in (QT.Q8_1, QT.Q8_K, QT.I8, QT.I32, QT.F64):
        with pytest.raises(UnsupportedModelError, match="can't be written as"):
            quantize(kind, x)
        with pytest.raises(UnsupportedModelError, match="no conversion to f32"):
            dequantize(kind, np.zeros(lib.pf_row_size(kind, 256), np.uint8), 256)
    for number in (-1, 4, 43, 1 << 30):
        with pytest.raises(ArgumentError, match="no type number"):
            quantize(number, x, size=1)
        with pytest.raises(ArgumentError, match="no type number"):
            dequantize(number, np.zeros(8, np.uint8), 8)
    with pytest.raises(ArgumentError, match="48 values are no whole number of q8_0 blocks of 32"):
        quantize(QT.Q8_0, np.ones((2, 48), np.float32))
    with pytest.raises(ArgumentError, match="48 values are no whole number of q8_0 blocks"):
        dequantize(QT.Q8_0, np.zeros(51, np.uint8), 48)
    for size in (0, 543, 545, 2**64 - 1):
        with pytest.raises(ArgumentError, match=f"dst_size is {size} and must be 544"):
            quantize(QT.Q8_0, x, size=size)
    for size in (0, 33, 35, 2**64 - 1):
        with pytest.raises(ArgumentError, match=f"src_size is {size} and must be 34"):
            dequantize(QT.Q8_0, np.zeros(34, np.uint8), 32, size=size)
    pointer = ffi.cast("float *", ffi.from_buffer(x))
    for n_per_row, n_rows in ((0, 1), (1, 0), (-32, 1), (32, -1)):
        with pytest.raises(ArgumentError, match="at least 1"):
            check(lib.pf_quantize(QT.Q8_0, pointer, n_per_row, n_rows, pointer, 34))
    for n_per_row, n_rows in ((2**62, 1), (2**62, 4), (2**40, 2**40), (2**60, 7)):
        with pytest.raises(ArgumentError, match=r"more (bytes )?than 64 bits can count"):
            check(lib.pf_quantize(QT.F32, pointer, n_per_row, n_rows, pointer, 34))
    with pytest.raises(ArgumentError, match="must not be NULL"):
        check(lib.pf_quantize(QT.F32, ffi.NULL, 1, 1, pointer, 4))
    with pytest.raises(ArgumentError, match="must not be NULL"):
        check(lib.pf_dequantize(QT.F32, pointer, 4, 1, ffi.NULL))
    with pytest.raises(ArgumentError, match="at least 1"):
        check(lib.pf_dequantize(QT.F32, pointer, 0, 0, pointer))
