"""The random models that are compared with transformers and the dflash package, shared by the script that runs those
(scripts/make_oracles.py) and the tests that read its vectors. It knows nothing of either runtime.

Changing a case, or a weight in tests/tiny_models.py, makes its vectors stale: the tests notice by the fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.tiny_models import F32, TinyDraft, TinyTarget

FOLDER = Path(__file__).parent
TARGET_FILE = FOLDER / "target.npz"
DRAFT_FILE = FOLDER / "draft.npz"
LLAMACPP_FILE = FOLDER / "llamacpp.json"
LLAMACPP_LOGPROBS_FILE = FOLDER / "llamacpp.npz"

REMAKE = "run: python scripts/make_oracles.py --all"


@dataclass(frozen=True)
class TargetCase:
    model: TinyTarget
    n_tokens: int


TARGET_CASES = {
    # Hv/Hk = 2, GQA 2, half of each head rotated, 3 GDN + 1 attention; crosses two runs of 64.
    "plain": TargetCase(TinyTarget(), 150),
    # Hv/Hk = 3 with Hk = 2, tied output, head 16 of which 8 rotate, GDN heads of 32, a width that is no power of two.
    "tied-hv3": TargetCase(
        TinyTarget(tied=True, k_heads=2, v_heads=6, state=32, n_embd=80, head_dim=16, n_rot=8, n_vocab=320, seed=1), 135
    ),
    # Two periods of layers, quarter rotation at theta 1e7 as in the released models, GDN heads of 64, GQA 3.
    "deep": TargetCase(
        TinyTarget(n_layer=8, n_head=6, n_head_kv=2, head_dim=64, n_rot=16, state=64, n_ff=160, rope_theta=1e7, seed=2),
        100,
    ),
    # Layer kinds listed one by one, attention first and next to attention, whole heads rotated, Hk = Hv = 3, conv of 3.
    "listed-layers": TargetCase(
        TinyTarget(
            n_layer=6,
            recurrent=(False, True, True, False, False, True),
            k_heads=3,
            v_heads=3,
            conv=3,
            head_dim=16,
            n_rot=16,
            n_head=5,
            n_head_kv=1,
            n_vocab=512,
            seed=3,
        ),
        97,
    ),
    # The same mathematics behind .scale tensors and with an MTP block to be skipped; every second layer is attention.
    "scales-mtp": TargetCase(
        TinyTarget(interval=2, scales=True, mtp=True, k_heads=2, v_heads=6, state=16, n_head=4, n_head_kv=4, seed=4), 70
    ),
}


@dataclass(frozen=True)
class DraftCase:
    target: TinyTarget
    draft: TinyDraft
    n_tokens: tuple[int, ...]  # prompt lengths; the last token of each prompt is the pending one


_DEEP = TARGET_CASES["deep"].model
_SLIDE, _FULL = "sliding_attention", "full_attention"

DRAFT_CASES = {
    "full": DraftCase(TinyTarget(), TinyDraft.of(TinyTarget()), (1, 2, 9, 100)),
    # As the drafter of 3.6-27B: sliding layers are causal in the block, the full one is not.
    "sliding-mixed": DraftCase(
        _DEEP,
        TinyDraft.of(
            _DEEP,
            n_layer=3,
            layer_types=(_SLIDE, _SLIDE, _FULL),
            sliding_window=20,
            block_size=16,
            target_ids=(1, 3, 5),
            head_dim=16,
            n_head=6,
            n_head_kv=3,
            rope_theta=1e7,
            seed=1,
        ),
        (5, 21, 90),
    ),
    "sliding-not-causal": DraftCase(
        TinyTarget(), TinyDraft.of(TinyTarget(), layer_types=(_SLIDE, _FULL), sliding_window=12, is_causal=False), (40,)
    ),
    "full-causal": DraftCase(TinyTarget(), TinyDraft.of(TinyTarget(), is_causal=True, seed=2), (40,)),
    # use_sliding_window false: such a layer has no window, and is causal all the same.
    "sliding-unwindowed": DraftCase(
        TinyTarget(), TinyDraft.of(TinyTarget(), layer_types=(_SLIDE, _FULL), seed=7), (40,)
    ),
    # A window narrower than the block cuts inside the block too, on both sides when it is not causal.
    "window-in-block": DraftCase(
        TinyTarget(), TinyDraft.of(TinyTarget(), layer_types=(_SLIDE, _SLIDE), sliding_window=5, seed=3), (3, 40)
    ),
    "window-in-block-not-causal": DraftCase(
        TinyTarget(),
        TinyDraft.of(TinyTarget(), layer_types=(_SLIDE, _SLIDE), sliding_window=5, is_causal=False, seed=4),
        (3, 40),
    ),
    # Taps not in rising order, one layer, one KV head, tied target, logits and embeddings scaled and capped.
    "scaled-tied": DraftCase(
        TARGET_CASES["tied-hv3"].model,
        TinyDraft.of(
            TARGET_CASES["tied-hv3"].model,
            n_layer=1,
            n_head=3,
            n_head_kv=1,
            target_ids=(2, 0),
            logit_scale=0.5,
            softcap=6.0,
            embedding_scale=1.5,
            seed=5,
        ),
        (33,),
    ),
    # More context than a prefill chunk of 512; the window reaches back over the chunk's edge.
    "long": DraftCase(
        TinyTarget(n_ctx=1024),
        TinyDraft.of(TinyTarget(n_ctx=1024), layer_types=(_SLIDE, _FULL), sliding_window=100, seed=6),
        (560,),
    ),
}


def token_ids(n_vocab: int, n: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """n token ids from numpy's frozen stream, repeated here and there so that attention has something to find."""
    rng = np.random.RandomState(1000 + seed)
    ids = rng.randint(0, n_vocab, n).astype(np.int32)
    for at in range(24, n, 24):
        ids[at : at + 8] = ids[at - 20 : at - 12][: len(ids[at : at + 8])]
    return ids


def checked_positions(n: int) -> list[int]:
    """Positions whose vectors are kept: the start, both sides of every run of 32 and 64, the end."""
    edges = [p + d for p in range(32, n, 32) for d in (-2, -1, 0, 1)]
    return sorted({p for p in [*range(10), *edges, *range(n - 4, n)] if 0 <= p < n})


def fingerprint(*weights: Mapping[str, F32]) -> str:
    """sha256 over names, shapes and float32 values."""
    digest = hashlib.sha256()
    for group in weights:
        for name in sorted(group):
            digest.update(f"{name} {group[name].shape}\n".encode())
            digest.update(np.ascontiguousarray(group[name], "<f4").tobytes())
    return digest.hexdigest()
