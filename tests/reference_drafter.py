"""A DFlash drafter's block in float64 numpy, from the definition: what it may attend to is an argument.

One block behind a pending token at position n attends, not causally, to itself and to the last `n_context` positions
before n, each from the target's features of that position. Full attention layers only; it refuses sliding ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


class ReferenceDrafter:
    """The weights of a drafter's GGUF and of its target's embedding and head, as float64."""

    def __init__(self, target: Path | str, draft: Path | str) -> None:
        file = gguf.GGUFReader(draft)
        keys = {name: entry.contents() for name, entry in file.fields.items()}
        if any(keys.get("dflash.attention.sliding_window_pattern", [])):
            raise ValueError(f"{draft} has sliding layers")
        self.w = _weights(file, "")
        self.w |= {k: v for k, v in _weights(gguf.GGUFReader(target), ("token_embd", "output.")).items()
                   if k not in self.w}  # fmt: skip
        self.target_layers: list[int] = keys["dflash.target_layers"]
        self.mask_token_id: int = keys["tokenizer.ggml.mask_token_id"]
        self.block_size: int = keys["dflash.block_size"]
        self._n_layer: int = keys["dflash.block_count"]
        self._n_head: int = keys["dflash.attention.head_count"]
        self._head_dim: int = keys["dflash.attention.key_length"]
        self._eps: float = keys["dflash.attention.layer_norm_rms_epsilon"]
        self._rope_base: float = keys["dflash.rope.freq_base"]

    def logits(self, features: npt.NDArray[Any], pending: int, n_context: int) -> F64:
        """[block_size - 1, n_vocab]. features: [n, len(target_layers), n_embd], of the positions before `pending`."""
        w, n = self.w, len(features)
        first = max(0, n - n_context)
        seen = features[first:].reshape(n - first, -1).astype(np.float64)
        context = self._rms(seen @ w["fc.weight"].T, w["enc.output_norm.weight"])
        at_context, at_block = np.arange(first, n), np.arange(n, n + self.block_size)
        h = w["token_embd.weight"][[pending] + [self.mask_token_id] * (self.block_size - 1)]
        for i in range(self._n_layer):

            def part(name: str, i: int = i) -> F64:
                return w[f"blk.{i}.{name}.weight"]

            x = self._rms(h, part("attn_norm"))
            q = self._rope(self._rms(self._heads(x @ part("attn_q").T), part("attn_q_norm")), at_block)
            k, v = (
                np.concatenate([self._heads(context @ part(name).T), self._heads(x @ part(name).T)])
                for name in ("attn_k", "attn_v")
            )
            k = self._rope(self._rms(k, part("attn_k_norm")), np.concatenate([at_context, at_block]))
            group = self._n_head // k.shape[1]  # query heads g * group ... share key head g
            k, v = (np.repeat(t, group, axis=1) for t in (k, v))
            score = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self._head_dim)
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            h = h + np.einsum("hqk,khd->qhd", weight, v).reshape(self.block_size, -1) @ part("attn_output").T
            x = self._rms(h, part("ffn_norm"))
            gate = x @ part("ffn_gate").T
            h = h + (gate / (1 + np.exp(-gate)) * (x @ part("ffn_up").T)) @ part("ffn_down").T
        head = w["output.weight"] if "output.weight" in w else w["token_embd.weight"]
        return self._rms(h, w["output_norm.weight"])[1:] @ head.T

    def _heads(self, x: F64) -> F64:
        return x.reshape(len(x), -1, self._head_dim)

    def _rms(self, x: F64, weight: F64) -> F64:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._eps) * weight

    def _rope(self, x: F64, position: npt.NDArray[np.int64]) -> F64:
        """NeoX pairs (i, i + d/2), x [n, heads, d]."""
        half = x.shape[-1] // 2
        angle = position[:, None] * self._rope_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _weights(file: gguf.GGUFReader, prefix: str | tuple[str, ...]) -> dict[str, F64]:
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type)
        .reshape([int(n) for n in reversed(t.shape)])
        .astype(np.float64)
        for t in file.tensors
        if t.name.startswith(prefix)
    }
