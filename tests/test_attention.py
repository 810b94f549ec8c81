"""Attention on the CPU, of few queries and of many, over caches of every pair of types, against float64 from the
definition.

K and V are what the cache holds, unpacked; nothing else may be rounded, the queries neither. That also shows that such
passes go the way on which K and V are unpacked once for many queries: the other rounds the queries as K is.
"""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.ggml_ops import Ggml, packed_cache

D, N_HEAD, N_HEAD_KV = 64, 4, 2
TYPES = [Type.F32, Type.F16, Type.Q8_0, Type.Q4_0]


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, is_open: np.ndarray) -> np.ndarray:
    """q [head, N, D], k and v [head_kv, n_kv, D], is_open [N, n_kv] -> [N, head, D], in float64."""
    k, v = (x.astype(float).repeat(N_HEAD // N_HEAD_KV, 0) for x in (k, v))
    scores = np.where(is_open, q.astype(float) @ k.swapaxes(1, 2) / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: np.ndarray = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(0, 1)
    return out


@pytest.mark.parametrize("v_type", TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("k_type", TYPES, ids=lambda t: t.name)
# As many queries as dot products take, and more: one, rows in fours and some; two tiles of them and some. Of the cache
# four tiles and some.
@pytest.mark.parametrize(("n", "n_kv"), [(1, 301), (3, 299), (7, 300), (130, 300)])
def test_nothing_is_rounded_but_the_cache(ggml: Ggml, k_type: Type, v_type: Type, n: int, n_kv: int) -> None:
    rng = np.random.default_rng(k_type * 100 + v_type)
    q = rng.standard_normal((N_HEAD, n, D), np.float32)
    is_open = rng.random((n, n_kv)) < 0.5
    is_open[:, 0] = True
    mask = np.where(is_open, 0, -np.inf).astype(np.float16)
    with ggml.graph() as graph:
        values = rng.standard_normal((2, n_kv, N_HEAD_KV, D), np.float32)
        (k, k_held), (v, v_held) = packed_cache(graph, values[0], k_type), packed_cache(graph, values[1], v_type)
        out = graph.op("ggml_flash_attn_ext", graph.tensor(q), k, v, graph.tensor(mask), D**-0.5, 0.0, 0.0)
        graph.compute(out, n_threads=2)
        found = graph.read(out, n, N_HEAD, D)
    expected = attention(q, k_held, v_held, is_open)
    assert np.abs(found - expected).max() < 3e-6 * np.abs(expected).max()
