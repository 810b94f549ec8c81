"""Running the trained target with state: prefill of whole windows, then one token at a time for many rows.

Owns the generation-time state of model.Target: KV rows, recurrent state and the last raw convolution columns. All
rows of a batch stand at the same length, which keeps positions scalar and needs no mask. Refuses windows and strides
that are no multiple of CHUNK.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from model import Attention, GatedDeltaNet, Target, delta_scan, rms, rope_table
from torch import Tensor


@dataclass
class State:
    """`length` tokens in; attention: k, v [N, Hkv, capacity, D] a layer; GDN: s [N, Hv, dk, dv], tail [N, K-1, C]."""

    length: int
    k: list[Tensor]
    v: list[Tensor]
    s: list[Tensor]
    tail: list[Tensor]


def empty_state(model: Target, rows: int, capacity: int) -> State:
    c = model.c
    kv = [torch.zeros(rows, c.n_head_kv, capacity, c.head_dim) for b in model.blocks if b.attention]
    gdn = [b for b in model.blocks if not b.attention]
    return State(
        0,
        kv,
        [x.clone() for x in kv],
        [torch.zeros(rows, c.n_v, c.d_state, c.d_state) for _ in gdn],
        [torch.zeros(rows, c.conv - 1, (2 * c.n_k + c.n_v) * c.d_state) for _ in gdn],
    )


@torch.no_grad()
def prefill(model: Target, ids: Tensor, taps: list[int], stride: int) -> tuple[Tensor, Tensor, list[State]]:
    """Run ids [N, W] and keep the state at every multiple of `stride`.

    Returns tapped outputs [N, W, len(taps) * E] bf16, the normed last hidden state at those places [W / stride, N, E]
    and the states there, whose KV rows are views into the window (see `branch`).
    """
    c, (n, w) = model.c, ids.shape
    cos, sin = rope_table(c.rope_theta, c.rope_dim, torch.arange(w))
    places = range(stride, w + 1, stride)
    states = [State(p, [], [], [], []) for p in places]
    h, seen = model.embed(ids), []
    for i, block in enumerate(model.blocks):
        x = rms(h, block.norm, c.eps)
        m = block.mixer
        if isinstance(m, Attention):
            q, k, v, gate = m.project(x, cos, sin)
            r = c.n_head // c.n_head_kv
            a = F.scaled_dot_product_attention(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), is_causal=True)
            h = h + m.o(a.transpose(1, 2).reshape(n, w, -1) * torch.sigmoid(gate))
            for st in states:
                st.k.append(k[:, :, : st.length])
                st.v.append(v[:, :, : st.length])
        else:
            raw = F.pad(m.qkv(x), (0, 0, c.conv - 1, 0)).float()
            u = F.silu(sum(raw[:, j : j + w] * m.conv[:, j] for j in range(c.conv)))
            q, k, v = m.heads(u)
            g, beta = (y.transpose(1, 2) for y in m.gates(x))
            s, parts = x.new_zeros(n, c.n_v, c.d_state, c.d_state, dtype=torch.float32), []
            for st in states:
                at = slice(st.length - stride, st.length)
                with torch.autocast("cpu", enabled=False):  # the state stays f32, as in every runtime
                    o, s = delta_scan(q[:, :, at], k[:, :, at], v[:, :, at], g[:, :, at], beta[:, :, at], s)
                parts.append(o)
                st.s.append(s)
                st.tail.append(raw[:, st.length : st.length + c.conv - 1])
            h = h + m.finish(torch.cat(parts, 2), x)
        h = h + block.ffn(rms(h, block.ffn_norm, c.eps))
        if i in taps:
            seen.append(h.bfloat16())
    last = torch.stack([h[:, p - 1] for p in places])
    return torch.cat(seen, -1), rms(last, model.norm, c.eps), states


def branch(model: Target, st: State, room: int) -> State:
    """A copy of the state with room for `room` more tokens, in the dtype that SDPA likes."""

    def grow(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], x.shape[1], st.length + room, x.shape[3])
        out[:, :, : st.length] = x
        return out

    return State(
        st.length,
        [grow(x) for x in st.k],
        [grow(x) for x in st.v],
        [x.clone() for x in st.s],
        [x.clone() for x in st.tail],
    )


@torch.no_grad()
def step(model: Target, ids: Tensor, st: State, taps: list[int]) -> tuple[Tensor, Tensor]:
    """Feed ids [N], one token a row, and advance st. Returns logits [N, V] and tapped outputs [N, len(taps) * E]."""
    c, n = model.c, ids.shape[0]
    cos, sin = rope_table(c.rope_theta, c.rope_dim, torch.tensor([st.length]))
    h, seen, ia, ig = model.embed(ids).unsqueeze(1), [], 0, 0
    for i, block in enumerate(model.blocks):
        x = rms(h, block.norm, c.eps)
        m = block.mixer
        if isinstance(m, Attention):
            q, k, v, gate = m.project(x, cos, sin)
            keys, values = st.k[ia], st.v[ia]
            keys[:, :, st.length] = k[:, :, 0].to(keys.dtype)
            values[:, :, st.length] = v[:, :, 0].to(values.dtype)
            ia += 1
            # the query heads of one KV head become rows of one attention: no copy of keys per head
            q = q.view(n, c.n_head_kv, c.n_head // c.n_head_kv, c.head_dim).to(keys.dtype)
            a = F.scaled_dot_product_attention(q, keys[:, :, : st.length + 1], values[:, :, : st.length + 1])
            y = m.o(a.reshape(n, 1, -1) * torch.sigmoid(gate))
        else:
            assert isinstance(m, GatedDeltaNet)
            raw = torch.cat([st.tail[ig], m.qkv(x).float()], 1)  # [N, K, C]
            st.tail[ig] = raw[:, 1:]
            u = F.silu((raw * m.conv.t()).sum(1, keepdim=True))
            q, k, v = (y.squeeze(2) for y in m.heads(u))  # [N, Hv, d]
            g, beta = (y.squeeze(1) for y in m.gates(x))  # [N, Hv]
            s = st.s[ig]
            s *= g.exp()[..., None, None]
            with torch.autocast("cpu", enabled=False):
                sk, sq = torch.matmul(torch.stack([k, q], 2), s).unbind(2)  # S^T k and S^T q in one pass over S
            delta = (v - sk) * beta.unsqueeze(-1)
            s.addcmul_(k.unsqueeze(-1), delta.unsqueeze(-2))
            o = (sq + (k * q).sum(-1, keepdim=True) * delta) * c.d_state**-0.5
            ig += 1
            y = m.finish(o.unsqueeze(2), x)
        h = h + y
        h = h + block.ffn(rms(h, block.ffn_norm, c.eps))
        if i in taps:
            seen.append(h.bfloat16())
    st.length += 1
    return model.head(rms(h, model.norm, c.eps)).squeeze(1).float(), torch.cat(seen, -1).squeeze(1)


def pick(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Next ids [N]: argmax at temperature 0, else one sample a row."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
