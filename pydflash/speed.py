"""How fast a session could be: the bytes that a step must move, from the headers of its files, and the time a card's
memory and tensor cores take for them.

    pair = read_pair("target.gguf", "draft.gguf")
    step_bytes(pair, n_nodes=23, depth=131072, kv_type="q4_0")       # by part
    print(predict(pair, plan, bandwidth=936, tflops=142))            # step time and tokens/s at every depth and budget

Everything here is arithmetic on sizes: nothing is loaded, nothing runs, nothing is measured. What a card cannot keep
to itself passes its memory at least once, so times are floors. Left out is what stays in the card's own caches: the
nodes' activations between two operations.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydflash import options
from pydflash._gguf import Gguf, TensorInfo
from pydflash._handles import PathLike, draft_file, target_file
from pydflash._lib import lib
from pydflash.cards import CARDS, PUBLISHED, PUBLISHED_FOR, Published
from pydflash.errors import ArgumentError, ModelFormatError
from pydflash.options import KvType
from pydflash.plan import Plan

DEPTHS = (1 << 10, 8 << 10, 32 << 10, 128 << 10)
# Tree nodes besides the root, and whether they are one line.
WAYS = ((0, False), (8, False), (15, True), (16, False), (22, False), (32, False), (63, False))
MOST_NODES = max(budget for budget, _ in WAYS)
# Of what a card's maker states for its tensor cores: few kernels reach more.
ARITHMETIC = 0.5
_F16, _F32 = 2, 4  # bytes

# ---- what the files hold -----------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """n_bytes: of all tensors. narrow, wide: values of the quantised matrices, and of the others."""

    n_bytes: int = 0
    narrow: int = 0
    wide: int = 0


@dataclass(frozen=True)
class Pair:
    """The sizes of a target and its drafter, as far as a step's time hangs on them. Bytes, where nothing else is said.

    target: weights of a pass, but for the head and the token embedding, of which a pass reads a few rows.
    head, draft_head: what the pass and what the draft multiply with for logits; usually the same tensor.
    drafter: its weights, all but embedding and head. context: those of them that are read once more for the context
        (the K and V of what was accepted), in a graph of its own.
    state: recurrent and convolution state of all layers. scratch: of a tree's node, what a commit needs.
    ring_row: values of K and V that the drafter keeps for a token.
    block: tokens of a draft, the pending one included; 0 without a drafter.
    """

    target: Weights
    head: Weights
    drafter: Weights
    draft_head: Weights
    context: Weights
    n_ctx: int  # the most that the target was trained for
    n_layer: int
    n_embd: int
    n_vocab: int
    n_attn: int
    n_head: int
    kv_row: int  # values of K, or of V, in one layer
    head_dim: int
    state: int
    scratch: int
    ring_row: int
    block: int
    file_type: int | None  # general.file_type of the target

    def kv_bytes(self, kv_type: KvType) -> int:
        """K and V of one token in all layers."""
        return self.n_attn * sum(_row_bytes(name, self.kv_row) for name in _types(kv_type))


def read_pair(target: PathLike, draft: PathLike | None = None) -> Pair:
    """Reads the headers. A drafter's folder is converted first. Raises ModelFileError, ModelFormatError."""
    with Gguf(target_file(target)) as file:
        pair = _read_target(file)
    return pair if draft is None else _with_drafter(pair, draft)


def _read_target(file: Gguf) -> Pair:
    need = _needs(file, file.get_str("general.architecture") or "qwen35")
    n_layer = need("block_count") - need("nextn_predict_layers", 0)
    tensors = {t.name: t for t in file.tensors() if _layer(t.name) < n_layer}  # an MTP block behind is not run
    if "token_embd.weight" not in tensors:
        raise ModelFormatError(f"{file.path}: there is no tensor token_embd.weight", path=file.path)
    embedding = tensors.pop("token_embd.weight")
    head = weights([tensors.pop("output.weight", embedding)])
    n_recurrent = sum(name.endswith(".ssm_out.weight") for name in tensors)
    key_heads, inner, d_key = need("ssm.group_count"), need("ssm.inner_size"), need("ssm.state_size")
    channels = 2 * key_heads * d_key + inner
    return Pair(
        target=weights(tensors.values()),
        head=head,
        drafter=Weights(),
        draft_head=Weights(),
        context=Weights(),
        n_ctx=need("context_length"),
        n_layer=n_layer,
        n_embd=need("embedding_length"),
        n_vocab=embedding.ne[1],
        n_attn=sum(name.endswith(".attn_k.weight") for name in tensors),
        n_head=need("attention.head_count"),
        kv_row=need("attention.head_count_kv") * need("attention.key_length"),
        head_dim=need("attention.key_length"),
        state=_F32 * n_recurrent * (inner * d_key + channels * (need("ssm.conv_kernel") - 1)),
        scratch=_F32 * n_recurrent * (key_heads * d_key + inner + need("ssm.time_step_rank") + channels),
        ring_row=0,
        block=0,
        file_type=file.get_int("general.file_type"),
    )


def _with_drafter(pair: Pair, draft: PathLike) -> Pair:
    with Gguf(draft_file(draft)) as file:
        need = _needs(file, "dflash")
        tensors = {t.name: t for t in file.tensors() if t.name != "token_embd.weight"}
        own_head = tensors.pop("output.weight", None)
        row = 2 * need("block_count") * need("attention.head_count_kv") * need("attention.key_length")
        return replace(
            pair,
            drafter=weights(tensors.values()),
            draft_head=weights([own_head]) if own_head else pair.head,
            context=weights(t for name, t in tensors.items() if re.search(r"\.attn_[kv]\.weight$", name)),
            ring_row=row,
            block=need("block_size"),
        )


def weights(tensors: Iterable[TensorInfo]) -> Weights:
    """What some tensors take, and the values of those that are multiplied with."""
    n_bytes = narrow = wide = 0
    for tensor in tensors:
        n_bytes += tensor.n_bytes
        if tensor.ne[1] > 1 and not tensor.name.endswith("conv1d.weight"):
            if tensor.type in ("f32", "f16", "bf16"):
                wide += math.prod(tensor.ne)
            else:
                narrow += math.prod(tensor.ne)
    return Weights(n_bytes, narrow, wide)


def _needs(file: Gguf, arch: str) -> Callable[..., int]:
    def need(name: str, default: int | None = None) -> int:
        value = file.get_int(f"{arch}.{name}")
        value = default if value is None else value
        if value is None:
            raise ModelFormatError(f"{file.path}: the key '{arch}.{name}' is missing", path=file.path)
        return value

    return need


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if re.match(r"blk\.\d+\.", name) else -1


def _types(kv_type: KvType) -> tuple[str, str]:
    """The names of K's and V's types."""
    options.kv_types(kv_type)  # refuses what is none
    if kv_type == "auto":
        raise ArgumentError("kv_type is auto; the bytes of a step hang on it, so it must be a type")
    return (kv_type, kv_type) if isinstance(kv_type, str) else kv_type


def _row_bytes(name: str, n_values: int) -> int:
    n_bytes = int(lib.pf_row_size(lib.pf_type_from_name(name.encode()), n_values))
    if n_bytes < 0:
        raise ArgumentError(
            f"kv_type is {name}, into whose blocks this model's rows of {n_values} values do not divide"
        )
    return n_bytes


# ---- what a step moves -------------------------------------------------------------------------------------------


class StepBytes(NamedTuple):
    """Bytes that pass the memory in one step, by what they are.

    target: weights of the target's layers. lm_head: the head, read by the pass and, when drafting, once more.
    drafter: its weights and the K and V it keeps. kv: K and V of the context, and of the nodes.
    kv_copy: the f16 copy of K and V that CUDA's attention makes of another type for several nodes, written and read;
        no floor asks for it, but the program as it is does it.
    state: recurrent and convolution state: read by the pass, read and written by the commit.
    rest: what the tree leaves for the commit, logits, masks.
    """

    target: int
    lm_head: int
    drafter: int
    kv: int
    kv_copy: int
    state: int
    rest: int

    @property
    def floor(self) -> int:
        """All but what a better program would not move."""
        return sum(self) - self.kv_copy


def step_bytes(
    pair: Pair, *, n_nodes: int, depth: int, kv_type: KvType, n_ring: int = 4096, device: str = "cuda"
) -> StepBytes:
    """What a step moves that verifies n_nodes (the root included; 1 is plain decoding) behind `depth` tokens.

    n_ring: as of the session. device: "cuda", or "cpu", which copies no caches.
    """
    rows = depth + n_nodes
    types = _types(kv_type)
    wide = _F32 if types[0] == "f32" else _F16  # of the drafter's K and V
    drafts = pair.block > 0 and n_nodes > 1
    n_drafted = min(pair.block, n_nodes) - 1 if drafts else 0
    drafter = pair.drafter.n_bytes + pair.context.n_bytes + wide * pair.ring_row * (min(depth, n_ring) + pair.block)
    copied = sum(_is_copied(name, n_nodes) for name in types) if device == "cuda" else 0
    logits = 2 * _F32 * pair.n_vocab * (n_nodes + n_drafted)  # written, and read for what is likeliest
    mask = _F16 * rows * n_nodes * (1 + pair.n_attn)  # written once, read by every layer
    return StepBytes(
        target=pair.target.n_bytes,
        lm_head=pair.head.n_bytes + (pair.draft_head.n_bytes if drafts else 0),
        drafter=drafter if drafts else 0,
        kv=pair.kv_bytes(kv_type) * rows,
        kv_copy=copied * 2 * _F16 * pair.n_attn * pair.kv_row * rows,
        state=3 * pair.state,
        rest=pair.scratch * n_nodes + logits + mask,
    )


def _is_copied(name: str, n_nodes: int) -> bool:
    """Whether CUDA's attention makes an f16 copy of a cache: it answers a single query from what is quantised."""
    return name == "f32" or (name != "f16" and n_nodes > 1)


def step_ops(pair: Pair, *, n_nodes: int, depth: int) -> dict[str, tuple[int, int]]:
    """Multiplications and additions of a step by part of `StepBytes`: with quantised weights, and with others."""
    n_drafted = min(pair.block, n_nodes) - 1 if pair.block and n_nodes > 1 else 0
    block = pair.block if n_drafted else 0

    def products(*terms: tuple[Weights, int]) -> tuple[int, int]:
        return sum(2 * w.narrow * n for w, n in terms), sum(2 * w.wide * n for w, n in terms)

    return {
        "target": products((pair.target, n_nodes)),
        "lm_head": products((pair.head, n_nodes), (pair.draft_head, n_drafted)),
        "drafter": products((pair.drafter, block)),
        "kv": (0, 4 * pair.n_attn * pair.n_head * pair.head_dim * (depth + n_nodes) * n_nodes),
    }


# ---- how many tokens it gives ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acceptance:
    """Tokens a step gives, by budget. source: where the figures come from, in words. chain: of a line of 15."""

    source: str
    tree: dict[int, float]
    chain: float

    def at(self, budget: int, chain: bool = False) -> float:
        """Between known budgets by the logarithm of the nodes; beyond the last one as there. Plain decoding gives 1."""
        if budget == 0:
            return 1.0
        if chain:
            return self.chain
        known = [(0, 1.0), *sorted(self.tree.items())]
        i = bisect_left(known, (budget, 0.0))
        if i == len(known):
            return known[-1][1]
        (low, below), (high, above) = known[i - 1], known[i]
        share = math.log((budget + 1) / (low + 1)) / math.log((high + 1) / (low + 1))
        return below + share * (above - below)


SHIPPED = Acceptance(
    "measured with the small pair that ships (scripts/measure.py), not with this one",
    {8: 4.15, 16: 4.78, 32: 5.25, 63: 5.56},
    3.94,
)


def read_acceptance(text: str) -> Acceptance:
    """A number of tokens a step, for every budget, or a file that `pydflash bench --json` has written, of which the
    greedy runs count. Raises ArgumentError."""
    if re.fullmatch(r"\d+(\.\d*)?", text):
        accepted = options.number("accepted", float(text), 1, MOST_NODES + 1)
        return Acceptance("as given", {1: accepted}, accepted)
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    try:
        for run in json.loads(Path(text).read_text(encoding="utf-8"))["runs"]:
            if run["temperature"] == 0:
                tokens[run["arm"]] += run["n_tokens"]
                steps[run["arm"]] += run["n_steps"]
    except OSError as error:
        raise ArgumentError(f"accepted is {text!r}, no number and no file to read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        raise ArgumentError(f"accepted is {text!r}, a file that 'pydflash bench --json' has not written") from None
    found = {arm: tokens[arm] / n for arm, n in steps.items() if n}
    tree = {int(arm.split()[1]): each for arm, each in found.items() if re.fullmatch(r"tree \d+", arm)}
    if not tree:
        raise ArgumentError(f"accepted is {text!r}, in which no tree was measured greedily")
    return Acceptance(f"measured, {text}", tree, found.get("chain", tree[min(tree)]))


# ---- how long it takes -------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The prediction of one step. ms: by part, of the memory alone. arithmetic_ms: by how much the arithmetic of the
    parts takes longer than their bytes. accepted: tokens it gives."""

    depth: int
    budget: int
    chain: bool
    moved: StepBytes
    ms: dict[str, float]
    arithmetic_ms: float
    accepted: float

    @property
    def step_ms(self) -> float:
        """Of the whole step."""
        return sum(self.ms.values()) + self.arithmetic_ms

    @property
    def tokens_per_second(self) -> float:
        """At most."""
        return 1e3 * self.accepted / self.step_ms


@dataclass(frozen=True)
class Speed:
    """A prediction; str() is a table in which every line says that it is one.

    bandwidth: GB/s. tflops: of the card, None where they are not known and arithmetic is left out.
    published: speeds of other projects for this pair on this card, each beside what is predicted for the same case.
    """

    card: str
    bandwidth: float
    tflops: float | None
    kv_type: tuple[str, str]
    source: str
    steps: tuple[Step, ...]
    published: tuple[tuple[Published, Step], ...]

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; every row has "predicted": true."""
        return {
            "predicted": True,
            **{name: getattr(self, name) for name in ("card", "bandwidth", "tflops", "kv_type")},
            "accepted_from": self.source,
            "steps": [_row(step) for step in self.steps],
            "published": [{"predicted": _row(step), "published": found._asdict()} for found, step in self.published],
        }

    def __str__(self) -> str:
        return "\n".join(f"predicted  {line}" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        kv_type = ",".join(dict.fromkeys(self.kv_type))
        where = f"{self.card}, {self.bandwidth:g} GB/s"
        yield f"from sizes alone, nothing was run: {where}, KV {kv_type}; at least so many ms, by what is moved"
        if self.tflops:
            yield f"arithmetic: what it takes longer than its bytes, at {ARITHMETIC:.0%} of {self.tflops:g} f16 TFLOPS"
        if any(step.moved.kv_copy for step in self.steps):
            yield "kv_copy: attention's own f16 copy of K and V, which a lower floor would not have"
        yield f"accepted: tokens a step, {self.source}"
        heads = ["depth", "budget", *StepBytes._fields, "arithmetic", "step ms", "accepted", "tokens/s"]
        rows = [
            [f"{step.depth:,}", _way(step), *(f"{ms:.2f}" for ms in step.ms.values()), f"{step.arithmetic_ms:.2f}",
             f"{step.step_ms:.2f}", f"{step.accepted:.2f}", f"{step.tokens_per_second:.0f}"]
            for step in self.steps
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        for row in (heads, *rows):
            yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for found, step in self.published:
            yield (
                f"{step.tokens_per_second:.0f} tokens/s, where {found.tokens_per_second:g} of another program were "
                f"published: {_way(step)}, depth {found.depth:,}, KV {found.kv_type}, {found.accepted:.2f} a step, "
                f"{found.what} ({found.source})"
            )


def _way(step: Step) -> str:
    return "plain" if step.budget == 0 else f"chain {step.budget}" if step.chain else f"tree {step.budget}"


def _row(step: Step) -> dict[str, Any]:
    return {
        "predicted": True,
        "depth": step.depth,
        "budget": step.budget,
        "chain": step.chain,
        "bytes": step.moved._asdict(),
        "ms": {name: round(ms, 4) for name, ms in (step.ms | {"arithmetic": step.arithmetic_ms}).items()},
        "step_ms": round(step.step_ms, 4),
        "accepted": round(step.accepted, 4),
        "tokens_per_second": round(step.tokens_per_second, 2),
    }


def predict(
    pair: Pair,
    plan: Plan,
    *,
    card: str | None = None,
    bandwidth: float | None = None,
    accepted: Acceptance = SHIPPED,
    ways: Iterable[tuple[int, bool]] = WAYS,
) -> Speed:
    """The steps of a planned session at every depth that its context holds, on a card of CARDS or of a bandwidth.

    card: a key of CARDS. bandwidth: GB/s, instead of the card's. accepted: tokens a step. ways: budgets, and whether
    they are a line; without a drafter only the plain one counts. Raises ArgumentError.
    """
    if card is None and bandwidth is None:
        raise ArgumentError("a speed is predicted from a gpu or from a bandwidth, and neither is given")
    speed = CARDS[card].bandwidth if card and bandwidth is None else options.number("bandwidth", bandwidth or 0, 1, 1e5)
    tflops = CARDS[card].tflops if card else None
    per_ms = ARITHMETIC * tflops * 1e9 if tflops else math.inf  # operations with f16; with int8 twice as many

    def step(depth: int, budget: int, chain: bool, kv_type: KvType, accepted: float) -> Step:
        moved = step_bytes(pair, n_nodes=budget + 1, depth=depth, kv_type=kv_type, n_ring=plan.n_ring)
        ms = {part: n_bytes / speed / 1e6 for part, n_bytes in moved._asdict().items()}
        longer = 0.0
        for part, (narrow, wide) in step_ops(pair, n_nodes=budget + 1, depth=depth).items():
            memory = ms[part] + (ms["kv_copy"] if part == "kv" else 0)
            longer += max(0.0, (narrow / 2 + wide) / per_ms - memory)
        return Step(depth, budget, chain, moved, ms, longer, accepted)

    possible = [way for way in ways if way[0] == 0 or pair.block]
    depths = [depth for depth in DEPTHS if depth <= plan.n_ctx] or [plan.n_ctx]
    steps = [step(depth, *way, plan.kv_type, accepted.at(*way)) for depth in depths for way in possible]
    same = (pair.n_layer, pair.n_embd, pair.file_type) == PUBLISHED_FOR
    published = [
        (found, step(found.depth, found.budget, False, found.kv_type, found.accepted))
        for found in PUBLISHED
        if same and found.card == card and (pair.block or not found.budget)
    ]
    name = card or "a card that is not named"
    return Speed(name, speed, tflops, plan.kv_type, accepted.source, tuple(steps), tuple(published))
