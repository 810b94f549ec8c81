"""Muon for the matrices of the layers, AdamW for the rest, gradients averaged between processes through gloo.

Owns the update and nothing else; the schedule is a factor given to `step`. Each process orthogonalises its share of
the matrices and the results are summed, since Newton-Schulz costs as much as a fifth of a step at this batch size.
Refuses nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def orthogonalise(g: Tensor) -> Tensor:
    """Newton-Schulz, five quintic steps in bf16 (Keller Jordan's coefficients)."""
    x = g.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).float()


class Optimizer:
    """`matrices` go through Muon at lr_muon; every (params, lr) in `rest` through AdamW."""

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[tuple[list[nn.Parameter], float]],
        lr_muon: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
    ):
        self.matrices, self.lr_muon, self.weight_decay = matrices, lr_muon, weight_decay
        self.momentum = [torch.zeros_like(p) for p in matrices]
        self.adam = torch.optim.AdamW(
            [{"params": p, "lr": lr, "peak": lr} for p, lr in rest], betas=betas, weight_decay=weight_decay, fused=True
        )
        self.params = matrices + [p for group, _ in rest for p in group]
        self.world, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def average_gradients(self) -> None:
        if self.world == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in self.params])
        dist.all_reduce(flat)
        flat /= self.world
        for p, part in zip(self.params, flat.split([p.numel() for p in self.params]), strict=True):
            p.grad.copy_(part.view_as(p))

    @torch.no_grad()
    def step(self, factor: float, clip: float = 1.0) -> float:
        """One update at `factor` times the peak rates; returns the norm of the gradient before clipping."""
        self.average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.params, clip)
        updates = []
        for i, (p, m) in enumerate(zip(self.matrices, self.momentum, strict=True)):
            m.lerp_(p.grad, 0.05)
            if i % self.world == self.rank:
                u = orthogonalise(p.grad.lerp(m, 0.95)) * max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            else:
                u = torch.zeros_like(p)
            updates.append(u)
        if self.world > 1:
            flat = torch.cat([u.flatten() for u in updates])
            dist.all_reduce(flat)
            updates = [
                x.view_as(p) for x, p in zip(flat.split([p.numel() for p in self.matrices]), self.matrices, strict=True)
            ]
        for p, u in zip(self.matrices, updates, strict=True):
            p.mul_(1 - factor * self.lr_muon * self.weight_decay).add_(u, alpha=-factor * self.lr_muon)
        for group in self.adam.param_groups:
            group["lr"] = group["peak"] * factor
        self.adam.step()
        for p in self.params:
            p.grad = None
        return float(norm)

    def state_dict(self) -> dict:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.momentum = state["momentum"]
        self.adam.load_state_dict(state["adam"])
