"""Stage 2: train the target.

    python scripts/train/train_target.py --minutes 58

Two processes of one thread, gradients averaged through gloo. The learning rate follows the elapsed share of --minutes:
20 steps of warm-up, flat to 35%, then linear to 2%, so that the run ends on time whatever else the machine does.
Writes target.pt (model, optimiser, place in the data; run the same command again to go on) every two minutes,
target-curve.csv, and every --export-every minutes target-f16.gguf. Both processes may be paused with SIGSTOP.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import announce, append_row, log, parser, save_state
from export import export_target
from model import Target, TargetConfig
from optim import Optimizer


def windows(ids: np.ndarray, length: int, seed: int):
    """Endless windows of length + 1 tokens: each epoch starts at a random offset and goes through them shuffled."""
    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        starts = np.arange(rng.integers(length), len(ids) - length - 1, length)
        rng.shuffle(starts)
        for s in starts:
            yield ids[s : s + length + 1]
        epoch += 1


def validate(model: Target, valid: np.ndarray, length: int, batch: int, count: int, rank: int, world: int) -> float:
    """Mean loss over `count` batches a process, spread over the held-out text.

    With gradients on and in training's shapes, since either change would cost minutes of recompilation.
    """
    n = batch * count * world
    starts = np.linspace(0, len(valid) - length - 2, n).astype(int)[rank::world]
    total = torch.zeros(1)
    for i in range(0, len(starts), batch):
        x = torch.from_numpy(np.stack([valid[s : s + length + 1] for s in starts[i : i + batch]]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            total += model.loss(model.hidden(x[:, :-1])[0], x[:, 1:]).detach()
    total /= count
    if world > 1:
        dist.all_reduce(total)
    return float(total) / world


def optimizer(model: Target, a) -> Optimizer:
    named = dict(model.blocks.named_parameters())
    matrices = [p for n, p in named.items() if n.endswith(".weight") and min(p.shape) > 16]
    small = [p for n, p in named.items() if not (n.endswith(".weight") and min(p.shape) > 16)]
    return Optimizer(
        matrices, [([model.embed.weight], 0.01), ([model.head.weight], 0.003), ([*small, model.norm], 0.003)], a.lr
    )


def factor(step: int, progress: float) -> float:
    decay = 1.0 if progress < 0.35 else max(0.02, 1 - 0.98 * (progress - 0.35) / 0.65)
    return min(1.0, (step + 1) / 20) * decay


def run(rank: int, a, rendezvous: str) -> None:
    torch.set_num_threads(1)
    announce(a.work)
    if a.procs > 1:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=a.procs, timeout=datetime.timedelta(hours=6)
        )
    torch.manual_seed(a.seed)
    model = Target(TargetConfig())
    opt = optimizer(model, a)
    step = tokens = 0
    spent = 0.0
    checkpoint = a.work / "target.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step, tokens, spent = state["step"], state["tokens"], state["spent"]
    if a.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
        model.loss = torch.compile(model.loss, dynamic=False)
    data = windows(np.load(a.work / "train.npy"), a.length, a.seed)
    valid = np.load(a.work / "valid.npy")
    for _ in range(tokens // a.length + rank):
        next(data)
    per_step = a.batch * a.length * a.procs
    curve = a.work / "target-curve.csv"
    began = last_save = last_export = time.time()
    next_valid, losses = 0.0, []
    if rank == 0:
        log(f"{sum(p.numel() for p in model.parameters())} parameters, {per_step} tokens a step, from step {step}")
    done = False
    while not done:
        now = torch.tensor([spent + time.time() - began], dtype=torch.float64)
        if a.procs > 1:
            dist.broadcast(now, 0)
        progress = float(now) / (60 * a.minutes)
        done = progress >= 1
        if not done:
            rows = []
            for _ in range(a.batch):
                rows.append(next(data))
                for _ in range(a.procs - 1):
                    next(data)
            x = torch.from_numpy(np.stack(rows).astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(model.hidden(x[:, :-1])[0], x[:, 1:])
            loss.backward()
            opt.step(factor(step, progress))
            losses.append(loss.item())
            step, tokens = step + 1, tokens + per_step
        if progress >= next_valid or done:
            value = validate(model, valid, a.length, a.batch, 50 // a.batch if done else 8, rank, a.procs)
            next_valid = progress + a.valid_every / a.minutes
            if rank == 0:
                train = float(np.mean(losses)) if losses else float("nan")
                log(
                    f"{progress:6.1%} step {step} tokens {tokens / 1e6:.2f}M train {train:.3f} valid {value:.3f} "
                    f"{(tokens) / float(now):.0f} tok/s"
                )
                append_row(
                    curve,
                    minutes=f"{float(now) / 60:.2f}",
                    step=step,
                    tokens=tokens,
                    train_loss=f"{train:.4f}",
                    valid_loss=f"{value:.4f}",
                    lr_factor=f"{factor(step, progress):.3f}",
                )
            losses.clear()
        if rank == 0 and (done or time.time() - last_save > 120):
            last_save = time.time()
            save_state(
                checkpoint,
                model=model.state_dict(),
                opt=opt.state_dict(),
                config=model.c.to_dict(),
                step=step,
                tokens=tokens,
                spent=float(now),
            )
            if done or time.time() - last_export > 60 * a.export_every:
                last_export = time.time()
                export_target(model.state_dict(), model.c, a.work / "tokenizer.json", a.work / "target-f16.gguf")
                log(f"wrote {a.work / 'target-f16.gguf'}")
    if a.procs > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--minutes", type=float, default=58, help="wall-clock budget, pauses included")
    p.add_argument("--procs", type=int, default=2)
    p.add_argument("--batch", type=int, default=2, help="windows a process and step")
    p.add_argument("--length", type=int, default=1024, help="tokens a window")
    p.add_argument("--lr", type=float, default=0.02, help="Muon's peak rate")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--valid-every", type=float, default=2, help="minutes")
    p.add_argument("--export-every", type=float, default=12, help="minutes")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    a = p.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(a.work / "inductor"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    rendezvous = a.work / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    with contextlib.suppress(KeyboardInterrupt):
        if a.procs == 1:
            run(0, a, "")
        else:
            mp.spawn(run, (a, f"file://{rendezvous.resolve()}"), a.procs)


if __name__ == "__main__":
    main()
