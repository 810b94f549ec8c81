"""Stage 4: the target's own text, with the hidden states that its drafter will see.

    python scripts/train/generate.py --minutes 14

Windows of the training text are prefilled once; from every `stride`-th place in them the target goes on by itself for
`stride` tokens, greedily (about two thirds) or sampled, so a window gives prefixes of many lengths. Some batches start
from chat prompts instead. Never from held-out files. Each batch becomes one shard-*.pt in WORK/own (tokens, their
temperatures, and features in bf16: the concatenated outputs of the tapped layers); run again to add more. Stops after
--minutes or --tokens.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from common import IM_START, announce, log, parser
from decode import branch, empty_state, pick, prefill, step
from model import Target, TargetConfig
from tokenizers import Tokenizer

# (windows, tokens a window, stride) and how often: mostly short, some long contexts
SHAPES = [((96, 512, 64), 0.55), ((96, 512, 128), 0.3), ((48, 1024, 128), 0.15)]
TEMPERATURES = [0.0] * 8 + [0.5, 0.7, 0.9, 1.0]


def default_taps(n_layer: int, count: int = 5) -> list[int]:
    """The drafter's usual choice of target layers, by output: round(1 + i (L - 4) / (n - 1))."""
    return [round(1 + i * (n_layer - 4) / (count - 1)) for i in range(count)]


def load_target(work: Path) -> Target:
    """The trained target with the F16 matrices of its GGUF."""
    saved = torch.load(work / "target.pt")
    model = Target(TargetConfig(**saved["config"]))
    model.load_state_dict(
        {k: v.half().float() if v.dim() == 2 and not k.endswith("conv") else v for k, v in saved["model"].items()}
    )
    return model.requires_grad_(False).eval()


def continuations(
    model: Target, states, last, stride: int, taps: list[int], temperature: list[float], gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """From each state, `stride` tokens: ids [J, N, stride], features [J, N, stride, F] (the last token's are zero)."""
    ids, feats = [], []
    for st, x, t in zip(states, last, temperature, strict=True):
        st = branch(model, st, stride)
        token = pick(model.head(x).float(), t, gen)
        row, tap = [token], []
        for _ in range(stride - 1):
            z, f = step(model, token, st, taps)
            token = pick(z, t, gen)
            row.append(token)
            tap.append(f)
        ids.append(torch.stack(row, 1))
        feats.append(torch.stack([*tap, torch.zeros_like(tap[0])], 1))
    return torch.stack(ids), torch.stack(feats)


def chat_batch(
    model: Target, prompts: list[list[int]], room: int, taps: list[int], temperature: float, gen: torch.Generator
) -> dict:
    """Prompts of many lengths, stepped together: a row starts to speak where its prompt ends."""
    n, longest = len(prompts), max(map(len, prompts))
    total = longest + room
    forced = torch.full((n, total), -1)
    for i, p in enumerate(prompts):
        forced[i, : len(p)] = torch.tensor(p)
    st, rows, feats, token = empty_state(model, n, total), [], [], forced[:, 0]
    for t in range(total):
        rows.append(token)
        if t + 1 == total:
            break
        z, f = step(model, token, st, taps)
        feats.append(f)
        token = torch.where(forced[:, t + 1] >= 0, forced[:, t + 1], pick(z, temperature, gen))
    return {
        "kind": "rows",
        "ids": torch.stack(rows, 1).short(),
        "feats": torch.stack([*feats, torch.zeros_like(feats[0])], 1),
        "begin": torch.tensor([len(p) for p in prompts]),
    }


def chat_prompts(train: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    """Every question of the training text, up to where the assistant starts to answer."""
    opening = tokenizer.encode("<|im_start|>assistant\n").ids
    starts, out = np.flatnonzero(train == IM_START), []
    for a, b in itertools.pairwise(starts):
        end = b + len(opening)
        if train[b:end].tolist() == opening and end - a < 64:
            out.append(train[a:end].tolist())
    return out


def run(rank: int, a) -> None:
    torch.set_num_threads(1)
    announce(a.work)
    model = load_target(a.work)
    taps = default_taps(model.c.n_layer)
    train = np.load(a.work / "train.npy")
    chats = chat_prompts(train, Tokenizer.from_file(str(a.work / "tokenizer.json")))
    folder = a.work / "own"
    folder.mkdir(exist_ok=True)
    began, made = time.time(), 0
    number = rank
    while time.time() - began < 60 * a.minutes and made < a.tokens / a.procs:
        path = folder / f"shard-{number:05d}.pt"
        number += a.procs
        if path.exists():
            continue
        rng = np.random.default_rng([a.seed, number])
        gen = torch.Generator().manual_seed(int(rng.integers(2**62)))
        t0 = time.time()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if rng.random() < 0.06:
                rows = [chats[i] for i in rng.integers(len(chats), size=128)]
                temperature = float(rng.choice(TEMPERATURES))
                shard = chat_batch(model, rows, 64, taps, temperature, gen) | {"temperature": [temperature]}
                count = 128 * 64
            else:
                n, w, stride = SHAPES[rng.choice(len(SHAPES), p=[p for _, p in SHAPES])][0]
                starts = rng.integers(len(train) - w, size=n)
                ids = torch.from_numpy(np.stack([train[s : s + w] for s in starts]).astype(np.int64))
                feats, last, states = prefill(model, ids, taps, stride)
                temperatures = rng.choice(TEMPERATURES, size=len(states)).tolist()
                own, own_feats = continuations(model, states, last, stride, taps, temperatures, gen)
                shard = {
                    "kind": "window",
                    "stride": stride,
                    "ids": ids.short(),
                    "feats": feats,
                    "own": own.short(),
                    "own_feats": own_feats,
                    "temperature": temperatures,
                }
                count = own.numel()
        part = path.with_suffix(".part")
        torch.save(shard, part)
        os.replace(part, path)
        made += count
        if rank == 0:
            log(f"{path.name}: {made * a.procs} tokens so far, {count / (time.time() - t0):.0f} tok/s a process")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--minutes", type=float, default=14)
    p.add_argument("--tokens", type=float, default=4e6)
    p.add_argument("--procs", type=int, default=2)
    p.add_argument("--seed", type=int, default=2)
    a = p.parse_args()
    mp.spawn(run, (a,), a.procs)


if __name__ == "__main__":
    main()
