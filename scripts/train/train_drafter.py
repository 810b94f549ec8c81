"""Stage 5: train the drafter on the target's own text.

    python scripts/train/train_drafter.py --minutes 40

Target frozen; random anchors in the target's own tokens, or right before them; a block [anchor, MASK ...] sees the
features of everything strictly before the anchor and itself both ways; cross-entropy of slot k against the token at
anchor + k with weight exp(-(k - 1) / 7), as the chance that a slot is kept: the head over the vocabulary is half of the
work. Muon for matrices, AdamW for the rest, the rate following the elapsed share of --minutes. Every --valid-every
minutes the acceptance on held-out prefixes (chain and trees, looping continuations apart) goes into draft-curve.csv;
draft.pt holds the state (run the same command again to go on) and WORK/draft the exported model.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F  # noqa: N812
from common import announce, append_row, log, parser, save_state
from decode import empty_state, pick, step
from drafter import DraftConfig, Drafter, walk
from export_draft import export_draft
from generate import default_taps, load_target
from heldout import loops, prefixes
from model import Target
from optim import Optimizer
from train_target import factor

BUDGETS = [0, 8, 16, 32]


def usable(shard: dict, greedy: bool) -> dict | None:
    """The shard with the continuations to train on listed in `rows`; None when there are none."""
    rows = [j for j, t in enumerate(shard["temperature"]) if t == 0 or not greedy]
    return shard | {"rows": rows} if rows else None


def random_row(shard: dict, rng: np.random.Generator, crop: int):
    """A random row of a shard, cut or padded on the left to `crop` tokens.

    Returns ids [crop], features [crop, F], the first place that is no padding, and the first of the target's own text.
    """
    if shard["kind"] == "window":
        stride = shard["stride"]
        j, n = rng.choice(shard["rows"]), rng.integers(shard["own"].shape[1])
        p = (j + 1) * stride
        begin = min(p, crop - stride)
        ids = torch.cat([shard["ids"][n, p - begin : p], shard["own"][j, n]])
        feats = torch.cat([shard["feats"][n, p - begin : p], shard["own_feats"][j, n]])
    else:
        n = rng.integers(shard["ids"].shape[0])
        ids, feats, begin = shard["ids"][n][:crop], shard["feats"][n][:crop], int(shard["begin"][n])
    pad = crop - len(ids)
    return F.pad(ids, (pad, 0)).long(), F.pad(feats, (0, 0, pad, 0)), pad, pad + begin


def batch_of(shards: list[dict], rng: np.random.Generator, rows: int, crop: int, anchors: int, block: int):
    picked = [random_row(shards[rng.integers(len(shards))], rng, crop) for _ in range(rows)]
    ids = torch.stack([r[0] for r in picked])
    feats = torch.stack([r[1] for r in picked])
    first = torch.tensor([r[2] for r in picked])
    place = torch.stack([torch.from_numpy(rng.choice(np.arange(r[3] - 1, crop - 2), anchors)) for r in picked])
    want = place.unsqueeze(-1) + torch.arange(1, block)  # [B, A, block - 1]
    labels = torch.gather(ids, 1, want.clamp(max=crop - 1).flatten(1)).view_as(want)
    labels = labels.masked_fill(want >= crop, -1)
    return feats, torch.gather(ids, 1, place), place, first, labels


@torch.no_grad()
def held_out(target: Target, valid: np.ndarray, count: int, tokens: int, block: int, taps: list[int]):
    """Greedy continuations of held-out prefixes: a list of (ids, features, prefix length), tokens + block past it."""
    prompts = prefixes(valid, count)
    total = max(map(len, prompts)) + tokens + block
    forced = torch.full((count, total), -1)
    for i, p in enumerate(prompts):
        forced[i, : len(p)] = torch.tensor(p)
    st, rows, feats, token = empty_state(target, count, total), [], [], forced[:, 0]
    for t in range(total):
        rows.append(token)
        z, f = step(target, token, st, taps)
        feats.append(f)
        if t + 1 < total:
            token = torch.where(forced[:, t + 1] >= 0, forced[:, t + 1], pick(z, 0.0))
    ids, feats = torch.stack(rows, 1), torch.stack(feats, 1)
    ends = [len(p) + tokens + block for p in prompts]
    return [(ids[i, :e], feats[i, :e], len(p)) for i, (p, e) in enumerate(zip(prompts, ends, strict=True))]


@torch.no_grad()
def acceptance(model: Drafter, cases, tokens: int) -> dict[str, list[float]]:
    """Tokens per target pass for every budget, over the cases that do not loop and over those that do."""
    totals = {"plain": np.zeros((len(BUDGETS), 2)), "loop": np.zeros((len(BUDGETS), 2))}
    counts = {"plain": 0, "loop": 0}
    for ids, feats, n in cases:
        n -= 1  # the first pending token is the prompt's last
        place = torch.arange(n, n + tokens).unsqueeze(0)
        with torch.autocast("cpu", torch.bfloat16):
            x = model(feats[: n + tokens].unsqueeze(0), ids[n : n + tokens].unsqueeze(0), place, torch.tensor([0]))
            z = model.logits(x[0]).float()
        top = z.log_softmax(-1).topk(8)
        top_ids, logp = top.indices.tolist(), top.values.tolist()
        greedy = ids[n:].tolist()
        kind = "loop" if loops(greedy[1 : tokens + 1]) else "plain"
        counts[kind] += 1
        for i, budget in enumerate(BUDGETS):
            totals[kind][i] += walk(top_ids, logp, greedy, tokens, budget)
    out = {k: [float(a / max(1, b)) for a, b in v] for k, v in totals.items()}
    out["count"] = [counts["plain"], counts["loop"]]
    return out


def run(rank: int, a, rendezvous: str) -> None:
    torch.set_num_threads(1)
    announce(a.work)
    if a.procs > 1:
        dist.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=a.procs, timeout=datetime.timedelta(hours=6)
        )
    target = load_target(a.work)
    c = DraftConfig(
        n_layer=a.layers,
        n_ff=a.ff,
        taps=default_taps(target.c.n_layer),
        target_layers=target.c.n_layer,
        n_embd=target.c.n_embd,
    )
    torch.manual_seed(a.seed)
    model = Drafter(c, target.embed.weight.data, target.head.weight.data)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    opt = Optimizer(matrices, [([p for p in model.parameters() if p.dim() == 1], 0.003)], a.lr)
    step_no, spent = 0, 0.0
    checkpoint = a.work / "draft.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step_no, spent = state["step"], state["spent"]
    cases, curve = [], a.work / "draft-curve.csv"
    if rank == 0:
        with torch.autocast("cpu", torch.bfloat16):
            cases = held_out(target, np.load(a.work / "valid.npy"), a.cases, 40, c.block, c.taps)
        log(f"{sum(p.numel() for p in model.parameters())} parameters, from step {step_no}")
    if a.compile:
        for layer in model.layers:
            layer.compile(dynamic=True)
    weight = torch.exp(-torch.arange(c.block - 1) / a.gamma)
    rng = np.random.default_rng([a.seed, rank, step_no])
    began = last_save = time.time()
    next_valid, losses, done, shards, names = 0.0, [], False, [], []
    while not done:
        now = torch.tensor([spent + time.time() - began], dtype=torch.float64)
        if a.procs > 1:
            dist.broadcast(now, 0)
        progress = float(now) / (60 * a.minutes)
        done = progress >= 1
        if step_no % 200 == 0 or not shards:  # shards may still be arriving
            fresh = [p for p in sorted((a.work / "own").glob("shard-*.pt")) if p not in names]
            names += fresh
            shards += [s for s in (usable(torch.load(p, mmap=True), a.greedy) for p in fresh) if s]
        if not done:
            crop = 256 if rng.random() < 0.85 else 768
            rows = a.rows if crop == 256 else max(1, a.rows // 2)
            feats, pending, place, first, labels = batch_of(shards, rng, rows, crop, a.anchors, c.block)
            keep = (labels >= 0) & (torch.rand(labels.shape) < weight)
            with torch.autocast("cpu", torch.bfloat16):
                z = model.logits(model(feats, pending, place, first)[keep]).float()
            loss = F.cross_entropy(z, labels[keep])
            loss.backward()
            opt.step(factor(step_no, progress))
            losses.append(loss.item())
            step_no += 1
        if rank == 0 and (progress >= next_valid or done):
            next_valid = progress + a.valid_every / a.minutes
            got = acceptance(model, cases if done else cases[: a.cases // 2], 40)
            mean = float(np.mean(losses)) if losses else float("nan")
            log(
                f"{progress:6.1%} step {step_no} loss {mean:.3f} chain/8/16/32 "
                + " ".join(f"{x:.2f}" for x in got["plain"])
                + " looping "
                + " ".join(f"{x:.2f}" for x in got["loop"])
                + f" cases {got['count']} shards {len(shards)}"
            )
            figures = dict(zip(["chain", "tree8", "tree16", "tree32"], got["plain"], strict=True))
            figures |= {"loop_chain": got["loop"][0], "loop_tree16": got["loop"][2]}
            append_row(
                curve,
                minutes=f"{float(now) / 60:.2f}",
                step=step_no,
                blocks=step_no * a.rows * a.anchors * a.procs,
                loss=f"{mean:.4f}",
                **{name: f"{x:.3f}" for name, x in figures.items()},
                lr_factor=f"{factor(step_no, progress):.3f}",
            )
            losses.clear()
        if rank == 0 and (done or time.time() - last_save > 180):
            last_save = time.time()
            save_state(
                checkpoint,
                model=model.state_dict(),
                opt=opt.state_dict(),
                config=c.to_dict(),
                step=step_no,
                spent=float(now),
            )
            export_draft(model.state_dict(), c, target.c.n_vocab, a.work / "draft")
    if a.procs > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--minutes", type=float, default=40, help="wall-clock budget, pauses included")
    p.add_argument("--procs", type=int, default=2)
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--ff", type=int, default=768)
    p.add_argument("--rows", type=int, default=16, help="rows a process and step")
    p.add_argument("--anchors", type=int, default=8, help="blocks a row")
    p.add_argument("--gamma", type=float, default=7.0)
    p.add_argument("--greedy", action="store_true", help="only what the target said greedily")
    p.add_argument("--lr", type=float, default=0.02, help="Muon's peak rate")
    p.add_argument("--cases", type=int, default=160, help="held-out prefixes")
    p.add_argument("--seed", type=int, default=3)
    p.add_argument("--valid-every", type=float, default=5, help="minutes")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    a = p.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(a.work / "inductor"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rendezvous: Path = a.work / "rendezvous-draft"
    rendezvous.unlink(missing_ok=True)
    with contextlib.suppress(KeyboardInterrupt):
        if a.procs == 1:
            run(0, a, "")
        else:
            mp.spawn(run, (a, f"file://{rendezvous.resolve()}"), a.procs)


if __name__ == "__main__":
    main()
