"""The DFlash drafter in PyTorch, and the search for how much of its tree a target would accept.

Owns the drafter's definition (z-lab's layout: fc over the tapped target layers, hidden_norm, a few layers whose
queries come from [pending, MASK ...] and whose keys also come from the context, final norm; embedding and head are the
target's, frozen) and the simulation of chain and tree acceptance against a known greedy continuation. Refuses nothing.
"""

from __future__ import annotations

import heapq
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from common import MASK
from model import SwiGLU, rms, rope, rope_table
from torch import Tensor, nn


@dataclass
class DraftConfig:
    n_embd: int = 256
    n_ff: int = 768
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    rope_theta: float = 1e7
    eps: float = 1e-6
    block: int = 16
    taps: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    target_layers: int = 8
    mask: int = MASK

    def to_dict(self) -> dict:
        return asdict(self)


class DraftLayer(nn.Module):
    def __init__(self, c: DraftConfig):
        super().__init__()
        self.c = c
        self.norm = nn.Parameter(torch.ones(c.n_embd))
        self.q = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.k = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.o = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = nn.Parameter(torch.ones(c.head_dim))
        self.k_norm = nn.Parameter(torch.ones(c.head_dim))
        self.ffn_norm = nn.Parameter(torch.ones(c.n_embd))
        self.ffn = SwiGLU(c.n_embd, c.n_ff)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B, Hkv, T, D] of x [B, T, E]; cos, sin [B, 1, T, D / 2]."""
        c, (b, t, _) = self.c, x.shape
        v = self.v(x).view(b, t, c.n_head_kv, c.head_dim).transpose(1, 2)
        k = rms(self.k(x).view(b, t, c.n_head_kv, c.head_dim), self.k_norm, c.eps).transpose(1, 2)
        return rope(k, cos, sin).to(v.dtype), v

    def forward(
        self, h: Tensor, ctx: Tensor, rot_h: tuple[Tensor, Tensor], rot_ctx: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """h [B, S, E] block rows, ctx [B, T, E]; mask [B, 1, S, T + S], True where a query may look."""
        c, (b, s, _) = self.c, h.shape
        x = rms(h, self.norm, c.eps)
        q = rms(self.q(x).view(b, s, c.n_head, c.head_dim), self.q_norm, c.eps).transpose(1, 2)
        kc, vc = self.keys(ctx, *rot_ctx)
        kb, vb = self.keys(x, *rot_h)
        k, v = torch.cat([kc, kb], 2), torch.cat([vc, vb], 2)
        q, r = rope(q, *rot_h).to(v.dtype), c.n_head // c.n_head_kv
        a = F.scaled_dot_product_attention(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), attn_mask=mask)
        h = h + self.o(a.transpose(1, 2).reshape(b, s, -1))
        return h + self.ffn(rms(h, self.ffn_norm, c.eps))


class Drafter(nn.Module):
    def __init__(self, c: DraftConfig, embed: Tensor, head: Tensor):
        super().__init__()
        self.c = c
        self.fc = nn.Linear(len(c.taps) * c.n_embd, c.n_embd, bias=False)
        self.hidden_norm = nn.Parameter(torch.ones(c.n_embd))
        self.layers = nn.ModuleList(DraftLayer(c) for _ in range(c.n_layer))
        self.norm = nn.Parameter(torch.ones(c.n_embd))
        self.register_buffer("embed", embed, persistent=False)
        self.register_buffer("head", head, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5)
            if name.endswith(("o.weight", "down.weight")):
                nn.init.zeros_(p)

    def forward(self, feats: Tensor, pending: Tensor, place: Tensor, first: Tensor) -> Tensor:
        """Blocks at many anchors of many rows in one pass.

        feats [B, T, F]: tapped features of a row's tokens (positions 0 .. T-1 of the crop); pending [B, A]: the token
        at each anchor; place [B, A]: the anchor's position in the crop, so that its context is [first, place).
        Returns normed hidden states [B, A, block - 1, E]; `logits` turns them into logits.
        """
        c, (b, t, _), a = self.c, feats.shape, pending.shape[1]
        s = c.block
        ctx = rms(self.fc(feats), self.hidden_norm, c.eps)
        ids = torch.full((b, a, s), c.mask)
        ids[:, :, 0] = pending
        h = F.embedding(ids, self.embed).view(b, a * s, -1)
        at = (place.unsqueeze(-1) + torch.arange(s)).view(b, 1, a * s)
        rot_h = rope_table(c.rope_theta, c.head_dim, at)
        rot_ctx = rope_table(c.rope_theta, c.head_dim, torch.arange(t).view(1, 1, t))
        j = torch.arange(t)
        see = (j < place.unsqueeze(-1)) & (j >= first.view(b, 1, 1))  # [B, A, T]
        own = torch.eye(a, dtype=torch.bool).repeat_interleave(s, 0).repeat_interleave(s, 1)
        mask = torch.cat([see.repeat_interleave(s, 1), own.expand(b, -1, -1)], -1).unsqueeze(1)
        for layer in self.layers:
            h = layer(h, ctx, rot_h, rot_ctx, mask)
        return rms(h, self.norm, c.eps).view(b, a, s, -1)[:, :, 1:]

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head)


def tree_nodes(logp: list[list[float]], budget: int) -> list[tuple[int, ...]]:
    """Best-first tree over per-depth log-probabilities (sorted, rank 0 first): the rank tuples of `budget` nodes."""
    heap, out = [(-logp[0][0], (0,))], []
    while heap and len(out) < budget:
        cost, path = heapq.heappop(heap)
        out.append(path)
        depth, rank = len(path) - 1, path[-1]
        if rank + 1 < len(logp[depth]):
            heapq.heappush(heap, (cost + logp[depth][rank] - logp[depth][rank + 1], (*path[:-1], rank + 1)))
        if depth + 1 < len(logp):
            heapq.heappush(heap, (cost - logp[depth + 1][0], (*path, 0)))
    return out


def accepted(top_ids: list[list[int]], logp: list[list[float]], truth: list[int], budget: int) -> int:
    """How many drafted tokens a greedy target accepts: budget nodes of a tree, or budget 0 for the chain of rank 0."""
    ranks = []
    for ids, want in zip(top_ids, truth, strict=False):
        if want not in ids:
            break
        ranks.append(ids.index(want))
    if budget == 0:
        return next((i for i, r in enumerate(ranks) if r), len(ranks))
    nodes = set(tree_nodes(logp, budget))
    n = 0
    while n < len(ranks) and tuple(ranks[: n + 1]) in nodes:
        n += 1
    return n


def walk(top_ids, logp, greedy: list[int], tokens: int, budget: int) -> tuple[int, int]:
    """Decode `tokens` tokens of a known continuation: (tokens committed, target passes).

    greedy[0] is the first pending token; top_ids[i] and logp[i] belong to the block anchored at greedy[i].
    """
    at = passes = 0
    while at < tokens:
        at += 1 + accepted(top_ids[at], logp[at], greedy[at + 1 :], budget)
        passes += 1
    return at, passes
