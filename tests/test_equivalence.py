"""Drafting changes the speed, never the text: tree = chain = plain, greedy and sampled.

On F32 weights with an F32 KV cache this holds to the token, over held-out prompts, also with a drafter of random
weights. With rounder weights or caches, near-ties of the target may fall either way; there the test looks at the margin
between the two likeliest tokens where two runs part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pydflash
from pydflash import models
from pydflash._lib import check, ffi, lib
from tests.chi_square import chi_square_p
from tests.tiny_models import TinyDraft, TinyTarget, to_f32

N_TOKENS = 128
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02}


def heldout(n: int) -> list[str]:
    """The first n prompts from files that the shipped pair was not trained on."""
    prompts = json.loads((Path(__file__).parent / "data" / "heldout_prompts.json").read_text())["prompts"]
    assert len(prompts) >= n
    return [p["text"] for p in prompts[:n]]


@pytest.fixture(scope="module")
def f32_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_f32(models.target_path(), tmp_path_factory.mktemp("f32") / "target.gguf")


@pytest.fixture(scope="module")
def exact(f32_target: Path) -> Iterator[pydflash.Session]:
    with pydflash.Session(f32_target, models.draft_path(), kv_type="f32", n_ctx=1024, n_threads=1) as session:
        yield session


def write_random_draft(path: Path, session: pydflash.Session, **fields: Any) -> Path:
    """A drafter of random weights that fits the session's target."""
    draft = TinyDraft(
        n_embd=session.n_embd,
        n_vocab=session.n_vocab,
        n_target_layers=session.n_layer,
        target_ids=(0, session.n_layer // 2),
        block_size=16,
        **fields,
    )
    return draft.write(path)


def run(session: pydflash.Session, prompt: str | list[int], budget: int, **options: Any) -> list[int]:
    settings = {"max_tokens": N_TOKENS, "ignore_eos": True, **options}
    return session.generate(prompt, budget=budget, **settings).ids


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_tree_chain_and_plain_say_the_same(exact: pydflash.Session, sampling: dict[str, Any]) -> None:
    accepted = []
    for seed, prompt in enumerate(heldout(50)):
        options = {**sampling, "seed": seed}
        plain = run(exact, prompt, 0, **options)
        assert len(plain) == N_TOKENS
        assert run(exact, prompt, 16, **options) == plain, f"tree, prompt {seed}"
        accepted.append(exact.stats.mean_accepted if exact.stats else 0.0)
        assert run(exact, prompt, 15, chain=True, **options) == plain, f"chain, prompt {seed}"
    assert np.mean(accepted) > 1.5  # or nothing was tested


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_drafter_of_random_weights_changes_nothing(
    f32_target: Path, exact: pydflash.Session, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    draft = write_random_draft(tmp_path / "random.gguf", exact)
    # Copying would say much of it.
    with pydflash.Session(f32_target, draft, kv_type="f32", n_ctx=1024, n_threads=1, copying=False) as session:
        for seed, prompt in enumerate(heldout(50)):
            options = {**sampling, "seed": seed}
            plain = run(exact, prompt, 0, **options)
            assert run(session, prompt, 6, **options) == plain, f"tree, prompt {seed}"
            assert session.stats is not None
            assert session.stats.mean_accepted < 1.5
            assert run(session, prompt, 3, chain=True, **options) == plain, f"chain, prompt {seed}"


def test_every_budget_says_the_same(exact: pydflash.Session) -> None:
    prompt = heldout(1)[0]
    plain = run(exact, prompt, 0, max_tokens=64)
    for budget in [1, 2, 3, 4, 5, 7, 8, 15, 17, 31, 32, 47, 62, 63]:
        assert run(exact, prompt, budget, max_tokens=64) == plain, f"budget {budget}"


def test_two_threads_and_a_long_context_say_the_same(f32_target: Path) -> None:
    """Past 512 rows the backend cuts one token's attention into pieces, by thread."""
    prompt = "".join(heldout(12))
    with pydflash.Session(
        f32_target, models.draft_path(), kv_type="f32", n_ctx=1024, n_threads=available(2)
    ) as session:
        ids = session.tokenize(prompt)[:900]
        assert run(session, ids, 16, max_tokens=100) == run(session, ids, 0, max_tokens=100)


def available(n: int) -> int:
    """n threads, or as many as there are cores."""
    return min(n, len(os.sched_getaffinity(0)))


def test_a_prompt_of_one_token(exact: pydflash.Session) -> None:
    """The drafter then has no context at all."""
    for token in (5, 300, 1234):
        assert run(exact, [token], 16, max_tokens=40) == run(exact, [token], 0, max_tokens=40)


def test_a_short_ring_only_costs_acceptance(f32_target: Path, exact: pydflash.Session) -> None:
    """Context past the drafter's ring is evicted slot by slot; the text does not change."""
    with pydflash.Session(
        f32_target, models.draft_path(), kv_type="f32", n_ctx=1024, n_ring=256, n_batch=64, n_threads=1
    ) as session:
        for prompt in heldout(4):
            assert run(session, prompt, 16, max_tokens=400) == run(exact, prompt, 0, max_tokens=400)


@pytest.mark.parametrize(
    ("kv_type", "largest_margin"), [("f16", 0.1), ("q8_0", 0.3), ("q4_0", 1.0)], ids=["f16", "q8_0", "q4_0"]
)
def test_rounder_caches_part_only_at_near_ties(kv_type: str, largest_margin: float) -> None:
    """The shipped F16 pair: where tree and plain part, the target's two likeliest tokens must be close."""
    with pydflash.Session(kv_type=kv_type, n_ctx=1024, n_threads=1) as session:
        same = 0
        prompts = heldout(20)
        for prompt in prompts:
            ids = session.tokenize(prompt)
            plain = run(session, ids, 0, max_tokens=64)
            tree = run(session, ids, 16, max_tokens=64)
            at = next((i for i, (a, b) in enumerate(zip(plain, tree, strict=True)) if a != b), None)
            if at is None:
                same += 1
                continue
            row = session.logits(ids + plain[:at])[-1]
            assert abs(float(row[plain[at]] - row[tree[at]])) < largest_margin, f"part at token {at}"
        assert same >= len(prompts) // 2


# ---- the step by itself ------------------------------------------------------------------------------------------


def steps(session: pydflash.Session, ids: list[int], n: int, keep: Any, budget: int = 16) -> list[int]:
    """Greedy decoding through the C interface, committing keep(n_tokens) tokens of each step."""
    core = session._core.session
    params = ffi.new("pf_generate_params *")
    lib.pf_generate_params_default(params)
    params.budget = budget
    check(lib.pf_session_reset(core))
    check(lib.pf_session_configure(core, params))
    check(lib.pf_session_append(core, ids, len(ids)))
    out: list[int] = []
    step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    while len(out) < n:
        check(lib.pf_session_step(core, 64, step))
        kept = keep(step.n_tokens)
        out += list(step.tokens[0:kept])
        check(lib.pf_session_commit(core, kept, ffi.NULL))
        assert lib.pf_session_n_tokens(core) == len(ids) + len(out)
    return out[:n]


def test_what_a_commit_does_not_keep_never_happened(exact: pydflash.Session) -> None:
    rng = np.random.default_rng(3)
    for prompt in heldout(6):
        ids = exact.tokenize(prompt)
        plain = run(exact, ids, 0, max_tokens=96)
        assert steps(exact, ids, 96, lambda n: int(rng.integers(1, n + 1))) == plain
        assert steps(exact, ids, 24, lambda n: 1) == plain[:24]


def test_pieces_of_a_prompt_are_the_prompt(exact: pydflash.Session) -> None:
    core = exact._core.session
    ids = exact.tokenize("".join(heldout(6)))[:700]
    plain = run(exact, ids, 0, max_tokens=32)
    rng = np.random.default_rng(5)
    check(lib.pf_session_reset(core))
    params = ffi.new("pf_generate_params *")
    lib.pf_generate_params_default(params)
    check(lib.pf_session_configure(core, params))
    start = 0
    while start < len(ids):
        n = int(rng.integers(1, 90))
        piece = ids[start : start + n]
        check(lib.pf_session_append(core, piece, len(piece)))
        start += n
    out: list[int] = []
    step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
    while len(out) < 32:
        check(lib.pf_session_step(core, 32 - len(out), step))
        out += list(step.tokens[0 : step.n_tokens])
        check(lib.pf_session_commit(core, step.n_tokens, ffi.NULL))
    assert out == plain


def test_a_stop_token_ends_an_accepted_path_in_the_middle(exact: pydflash.Session) -> None:
    ended_early = 0
    for prompt in heldout(8):
        plain = run(exact, prompt, 0, max_tokens=64)
        for at in (7, 20, 41):
            first = plain.index(plain[at])
            result = exact.generate(prompt, budget=16, max_tokens=64, stop=[plain[at]], ignore_eos=True)
            assert result.finish_reason == "stop"
            assert result.ids == plain[: first + 1]
            assert exact.n_tokens == len(exact.tokenize(prompt)) + first + 1
            ended_early += first < 63
    assert ended_early > 0


def test_generation_ends_where_the_context_ends(f32_target: Path) -> None:
    with pydflash.Session(f32_target, models.draft_path(), kv_type="f32", n_ctx=200) as session:
        ids = session.tokenize(heldout(1)[0])[:120]
        tree = session.generate(ids, max_tokens=None, ignore_eos=True, budget=16)
        assert tree.finish_reason == "length"
        assert len(tree.ids) == 80
        assert tree.ids == session.generate(ids, max_tokens=None, ignore_eos=True, budget=0).ids


# ---- the distribution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 6], ids=["plain", "tree"])
def test_samples_follow_the_targets_distribution(tmp_path: Path, budget: int) -> None:
    """The first two tokens over 20,000 seeds at temperature 1 against the softmax of the logits: chi-square."""
    target = TinyTarget(n_vocab=12, n_layer=2, interval=2)
    draft = TinyDraft.of(target, target_ids=(0,), n_layer=1, block_size=4)
    n_seeds = 20_000
    with pydflash.Session(
        target.write(tmp_path / "target.gguf"),
        draft.write(tmp_path / "draft.gguf"),
        kv_type="f32",
        n_ctx=64,
        n_threads=1,
    ) as session:
        prompt = [3, 1, 4]
        expected = np.empty((12, 12))
        first = softmax(session.logits(prompt)[-1])
        for token in range(12):
            expected[token] = first[token] * softmax(session.logits([*prompt, token])[-1])
        counts = np.zeros((12, 12))
        n_drafted = 0
        for seed in range(n_seeds):
            result = session.generate(
                prompt, max_tokens=2, temperature=1.0, seed=seed + n_seeds * (budget > 0), budget=budget
            )
            counts[tuple(result.ids)] += 1
            n_drafted += result.stats.n_steps == 1
    assert (n_drafted > n_seeds // 20) == (budget > 0)  # the tree was really used
    assert chi_square_p(counts, expected * n_seeds) > 1e-4


def softmax(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


# ---- the long run ------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_over_4000_tokens() -> None:
    def resident() -> int:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * 4096

    with pydflash.Session(n_ctx=4352, budget=16, n_threads=1) as session:
        prompt = heldout(1)[0]
        # The first time caches are touched as far as the context reaches, and every shape of graph is met.
        after = []
        for _ in range(2):
            assert len(session.generate(prompt, max_tokens=4000, ignore_eos=True).ids) == 4000
            after.append(resident())
    assert after[1] - after[0] < 4 << 20
