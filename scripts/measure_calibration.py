#!/usr/bin/env python3
"""What learning how often drafts prove right is worth: trees by the drafter's own probabilities beside trees by learned
ones.

    python scripts/measure_calibration.py                 # the shipped pair; about 6 minutes on 2 cores
    python scripts/measure_calibration.py --prompts 20

A block is drafted at every position of greedy continuations of tests/data/heldout_prompts.json. Half of the prompts
teach: every node that a tree of the budget visits there. On the other half both trees are grown from the same blocks,
and followed along what the target says next; then the halves change places. Prompts whose continuation loops
are left out. Prints a table: tokens a pass, their ratio with its standard error over prompts, and what the trees had
promised of what they kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from measuring import PROMPTS, counted, machine, table

import pydflash
from pydflash._lib import check, ffi, lib
from pydflash.bench.figures import loops

BUDGETS = (4, 8, 15, 16, 32, 63)
N_RANK = 64


class Block(NamedTuple):
    """A drafted block: ids and log-probabilities [n_depth, N_RANK]; what the target says behind the pending token."""

    ids: NDArray[np.int32]
    logp: NDArray[np.float32]
    said: list[int]


class Tree(NamedTuple):
    tokens: list[int]
    parents: list[int]
    ranks: list[int]
    scores: list[float]


def drafted(session: pydflash.Session, text: str, n_tokens: int) -> list[Block]:
    """The blocks of a continuation; none when it loops."""
    prompt = session.tokenize(text)
    said = session.generate(prompt, budget=0, max_tokens=n_tokens + session.block_size, ignore_eos=True).ids
    if loops(said):
        return []
    blocks = []
    for i in range(n_tokens):
        logits = session.draft_logits(prompt + said[: i + 1])
        ids, logp = np.empty((len(logits), N_RANK), np.int32), np.empty((len(logits), N_RANK), np.float32)
        for d, row in enumerate(logits):
            out = ffi.from_buffer("int32_t[]", ids[d]), ffi.from_buffer("float[]", logp[d])
            check(lib.pf_top_k(ffi.from_buffer("float[]", row), len(row), N_RANK, *out))
        blocks.append(Block(ids, logp, said[i + 1 :]))
    return blocks


def grown(block: Block, budget: int, weights: Any) -> Tree:
    """The tree of a budget; weights: a pf_calibration, or NULL."""
    n = lib.PF_MAX_NODES
    columns = [ffi.new("int32_t[]", n) for _ in range(4)]
    score, n_nodes = ffi.new("float[]", n), ffi.new("int32_t *")
    given = ffi.from_buffer("int32_t[]", block.ids), ffi.from_buffer("float[]", block.logp), *block.ids.shape
    rest = budget, lib.PF_SHAPE_TREE, weights, -1, ffi.NULL, ffi.NULL, ffi.NULL
    check(lib.pf_tree_build(*given, *rest, *columns, score, n_nodes))
    token, parent, _, rank = (ffi.unpack(column, n_nodes[0]) for column in columns)
    return Tree(token, parent, rank, ffi.unpack(score, n_nodes[0]))


def followed(tree: Tree, said: list[int]) -> list[int]:
    """The nodes that are visited, the root first."""
    children = {(parent, token): i for i, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True))}
    path = [0]
    for token in said:
        node = children.get((path[-1], token))
        if node is None:
            break
        path.append(node)
    return path


def taught(blocks: list[Block], budget: int) -> Any:
    """The weights that a session would have learned from these with trees of this budget."""
    depth, deviations, logp, chosen = [], [], [], []
    for block in blocks:
        tree = grown(block, budget, ffi.NULL)
        path = followed(tree, block.said)
        for d, node in enumerate(path[: len(block.ids)]):
            (right,) = np.nonzero(block.ids[d] == block.said[d])
            depth.append(d + 1)
            deviations.append(sum(tree.ranks[above] != 0 for above in path[: path.index(node) + 1]))
            logp.append(block.logp[d])
            chosen.append(int(right[0]) if len(right) else -1)
    out = ffi.new("pf_calibration *")
    rows = np.array(logp, np.float32)
    check(lib.pf_calibrate(depth, deviations, ffi.from_buffer("float[]", rows), chosen, *rows.shape, out))
    return out


def compared(prompts: list[list[Block]]) -> list[list[object]]:
    """A row for every budget."""
    kept = np.zeros((2, len(BUDGETS), len(prompts)))  # tokens a pass: raw, learned
    promised = np.zeros_like(kept)
    for half in (0, 1):
        for b, budget in enumerate(BUDGETS):
            learned = taught([block for blocks in prompts[1 - half :: 2] for block in blocks], budget)
            for i in range(half, len(prompts), 2):
                for k, weights in enumerate((ffi.NULL, learned)):
                    trees = [grown(block, budget, weights) for block in prompts[i]]
                    paths = [followed(tree, block.said) for tree, block in zip(trees, prompts[i], strict=True)]
                    kept[k, b, i] = np.mean([len(path) for path in paths])
                    promised[k, b, i] = np.mean([np.exp(tree.scores).sum() for tree in trees])
    rows: list[list[object]] = []
    for b, budget in enumerate(BUDGETS):
        raw, learned = kept[:, b].mean(-1)
        difference = kept[1, b] - kept[0, b]
        error = difference.std(ddof=1) / np.sqrt(len(prompts)) / raw
        ratios = promised[:, b].mean(-1) / kept[:, b].mean(-1)
        gain = f"{learned / raw:.3f} ± {error:.3f}"
        rows.append([budget, f"{raw:.3f}", f"{learned:.3f}", gain, *(f"{ratio:.3f}" for ratio in ratios)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", metavar="FILE")
    parser.add_argument("--draft", metavar="FILE")
    parser.add_argument("--prompts", type=int, default=60, metavar="N", help="default: 60")
    parser.add_argument("--n-gen", type=int, default=32, metavar="N", help="blocks of each (default: 32)")
    parser.add_argument("--n-threads", type=int, metavar="N")
    o = parser.parse_args()
    texts = [prompt["text"] for prompt in json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]]
    with pydflash.Session(o.target, o.draft, n_ctx=2048, kv_type="f32", n_threads=o.n_threads) as session:
        prompts = [drafted(session, text, o.n_gen) for text in counted("prompt", texts[: o.prompts])]
    prompts = [blocks for blocks in prompts if blocks]
    print(f"{len(prompts)} prompts that do not loop, {o.n_gen} blocks each, greedy. {machine()}.\n")
    heads = ["nodes", "raw", "learned", "learned / raw", "promised of kept, raw", "learned"]
    print(table(heads, compared(prompts)))


if __name__ == "__main__":
    main()
