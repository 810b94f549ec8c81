"""The tiny target in PyTorch: a `qwen35` hybrid, three Gated DeltaNet layers to each full attention layer.

Owns the definition, its shapes and the order of its heads: value head h uses key head h % n_k, which is GGUF's tiled
order, so that export has nothing to reorder. Norm weights are the multiplier itself (Hugging Face keeps weight - 1).
Training runs on whole sequences; `State` carries KV rows, recurrent and convolution state for generation.
Refuses sequence lengths that are no multiple of `CHUNK` when a whole sequence is given without state.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

CHUNK = 64


@dataclass
class TargetConfig:
    n_vocab: int = 4096
    n_embd: int = 256
    n_ff: int = 512
    n_layer: int = 8
    interval: int = 4  # layer i is full attention iff (i + 1) % interval == 0
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    rope_dim: int = 16
    rope_sections: tuple[int, ...] = (3, 3, 2, 0)
    rope_theta: float = 1e7
    n_ctx: int = 262144
    n_k: int = 4  # GDN key heads
    n_v: int = 8  # GDN value heads
    d_state: int = 32
    conv: int = 4
    eps: float = 1e-6

    def is_attention(self, i: int) -> bool:
        return (i + 1) % self.interval == 0

    def to_dict(self) -> dict:
        return asdict(self)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_table(cfg_theta: float, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dim / 2] at the given positions, for pairs (i, i + dim / 2)."""
    inv = cfg_theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angle = positions.float().unsqueeze(-1) * inv
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] values of every head. x [..., T, D]; cos, sin broadcast to [..., T, half]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class SwiGLU(nn.Module):
    def __init__(self, n_embd: int, n_ff: int):
        super().__init__()
        self.gate = nn.Linear(n_embd, n_ff, bias=False)
        self.up = nn.Linear(n_embd, n_ff, bias=False)
        self.down = nn.Linear(n_ff, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self, c: TargetConfig):
        super().__init__()
        self.c = c
        self.q = nn.Linear(c.n_embd, c.n_head * 2 * c.head_dim, bias=False)  # per head: D query values, D gate values
        self.k = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_head_kv * c.head_dim, bias=False)
        self.o = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = nn.Parameter(torch.ones(c.head_dim))
        self.k_norm = nn.Parameter(torch.ones(c.head_dim))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q [B, H, T, D] and k, v [B, Hkv, T, D] after norm and rope; gate [B, T, H * D]."""
        c, (b, t, _) = self.c, x.shape
        q, gate = self.q(x).view(b, t, c.n_head, 2, c.head_dim).unbind(3)
        k = self.k(x).view(b, t, c.n_head_kv, c.head_dim)
        v = self.v(x).view(b, t, c.n_head_kv, c.head_dim).transpose(1, 2)
        q = rope(rms(q, self.q_norm, c.eps).transpose(1, 2), cos, sin).to(v.dtype)
        k = rope(rms(k, self.k_norm, c.eps).transpose(1, 2), cos, sin).to(v.dtype)
        return q, k, v, gate.reshape(b, t, -1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (b, t, _) = self.c, x.shape
        q, k, v, gate = self.project(x, cos, sin)
        r = c.n_head // c.n_head_kv
        a = F.scaled_dot_product_attention(q, k.repeat_interleave(r, 1), v.repeat_interleave(r, 1), is_causal=True)
        return self.o(a.transpose(1, 2).reshape(b, t, -1) * torch.sigmoid(gate))


def delta_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The gated delta rule over a whole sequence, in WY form by chunks.

    q, k, v [B, H, T, d] f32; g (log decay) and beta [B, H, T]; s [B, H, d_key, d_value]. Returns o like v, and the
    state after the last token.
    """
    b, h, t, d = q.shape
    n, c = t // CHUNK, CHUNK
    q, k, v = (x.reshape(b * h, n, c, d) for x in (q * d**-0.5, k, v))
    g, beta = g.reshape(b * h, n, c).cumsum(-1), beta.reshape(b * h, n, c, 1)
    i = torch.arange(c)
    decay = torch.exp((g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(i[:, None] < i[None, :], -1e9))
    kt = k.transpose(-1, -2)
    a = (beta * (k @ kt) * decay).tril(-1)  # [BH, N, C, C], strictly lower
    e = g.exp().unsqueeze(-1)
    uw = torch.linalg.solve_triangular(a, torch.cat([beta * v, beta * e * k], -1), upper=False, unitriangular=True)
    u, w = uw.split(d, -1)
    qk = (q @ kt) * decay
    qe, ke, last = q * e, (k * torch.exp(g[..., -1:] - g).unsqueeze(-1)).transpose(-1, -2), e[:, :, -1:]
    s, out = s.reshape(b * h, d, d), []
    for u_j, w_j, qk_j, qe_j, ke_j, last_j in zip(*(x.unbind(1) for x in (u, w, qk, qe, ke, last)), strict=True):
        delta = torch.baddbmm(u_j, w_j, s, alpha=-1)
        out.append(torch.baddbmm(torch.bmm(qe_j, s), qk_j, delta))
        s = torch.baddbmm(last_j * s, ke_j, delta)
    return torch.stack(out, 1).view(b, h, t, d), s.view(b, h, d, d)


class GatedDeltaNet(nn.Module):
    def __init__(self, c: TargetConfig):
        super().__init__()
        self.c = c
        key, value = c.n_k * c.d_state, c.n_v * c.d_state
        self.qkv = nn.Linear(c.n_embd, 2 * key + value, bias=False)
        self.z = nn.Linear(c.n_embd, value, bias=False)
        self.alpha = nn.Linear(c.n_embd, c.n_v, bias=False)
        self.beta = nn.Linear(c.n_embd, c.n_v, bias=False)
        self.o = nn.Linear(value, c.n_embd, bias=False)
        self.conv = nn.Parameter(torch.empty(2 * key + value, c.conv).uniform_(-0.5, 0.5))
        # FLA's init: time steps log-uniform in [0.001, 0.1], A uniform in (0, 16)
        dt = torch.exp(torch.rand(c.n_v) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.a_log = nn.Parameter(torch.empty(c.n_v).uniform_(0.01, 16).log())
        self.norm = nn.Parameter(torch.ones(c.d_state))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay g and beta, both [B, T, Hv] f32."""
        beta = torch.sigmoid(self.beta(x).float())
        return -self.a_log.exp() * F.softplus(self.alpha(x).float() + self.dt), beta

    def heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolved qkv [B, T, C] f32 into unit q, k and v, all [B, Hv, T, d]; key heads tiled."""
        c, (b, t, _) = self.c, u.shape
        key = c.n_k * c.d_state
        q, k, v = (x.view(b, t, -1, c.d_state).transpose(1, 2) for x in u.split([key, key, c.n_v * c.d_state], -1))
        q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + c.eps)
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + c.eps)
        r = c.n_v // c.n_k
        return q.repeat(1, r, 1, 1), k.repeat(1, r, 1, 1), v

    def finish(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, Hv, T, d]: norm per head, gate, output projection."""
        b, t, _ = x.shape
        y = rms(o.transpose(1, 2), self.norm, self.c.eps).reshape(b, t, -1)
        return self.o(y * F.silu(self.z(x).float()))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        raw = F.pad(self.qkv(x), (0, 0, self.c.conv - 1, 0)).float()
        u = F.silu(sum(raw[:, j : j + t] * self.conv[:, j] for j in range(self.c.conv)))
        q, k, v = self.heads(u)
        g, beta = self.gates(x)
        zero = x.new_zeros(b, self.c.n_v, self.c.d_state, self.c.d_state, dtype=torch.float32)
        o, _ = delta_scan(q, k, v, g.transpose(1, 2), beta.transpose(1, 2), zero)
        return self.finish(o, x)


class Block(nn.Module):
    def __init__(self, c: TargetConfig, attention: bool):
        super().__init__()
        self.c, self.attention = c, attention
        self.norm = nn.Parameter(torch.ones(c.n_embd))
        self.mixer = Attention(c) if attention else GatedDeltaNet(c)
        self.ffn_norm = nn.Parameter(torch.ones(c.n_embd))
        self.ffn = SwiGLU(c.n_embd, c.n_ff)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = rms(h, self.norm, self.c.eps)
        h = h + (self.mixer(x, cos, sin) if self.attention else self.mixer(x))
        return h + self.ffn(rms(h, self.ffn_norm, self.c.eps))


class Target(nn.Module):
    def __init__(self, c: TargetConfig):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.n_vocab, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, c.is_attention(i)) for i in range(c.n_layer))
        self.norm = nn.Parameter(torch.ones(c.n_embd))
        self.head = nn.Linear(c.n_embd, c.n_vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.01)
        for name, p in self.named_parameters():
            if p.dim() == 2 and name.startswith("blocks") and not name.endswith("conv"):
                nn.init.normal_(p, std=0.5 * p.shape[1] ** -0.5)
            if name.endswith(("mixer.o.weight", "ffn.down.weight")):
                nn.init.zeros_(p)

    def hidden(self, ids: Tensor, taps: list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """ids [B, T] -> the normed last hidden state [B, T, E], and the outputs of the layers named in taps."""
        cos, sin = rope_table(self.c.rope_theta, self.c.rope_dim, torch.arange(ids.shape[1]))
        h, seen = self.embed(ids), []
        for i, block in enumerate(self.blocks):
            h = block(h, cos, sin)
            if taps and i in taps:
                seen.append(h)
        return rms(h, self.norm, self.c.eps), seen

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids)[0])

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the normed hidden states x [B, T, E] against labels [B, T]."""
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())
