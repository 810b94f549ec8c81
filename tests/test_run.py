"""`pydflash run`, and scripts/run.py from outside: its output streams, its JSON, its exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pydflash
from pydflash.cli import main
from pydflash.documents import read_documents
from tests.tiny_models import TinyDraft, TinyTarget

SCRIPT = Path(__file__).parent.parent / "scripts" / "run.py"
KEYS = {
    "text", "ids", "n_prompt", "n_generated", "n_steps", "mean_accepted", "accepted_by_depth", "prefill_tps",
    "decode_tps", "ms", "output_hash", "finish_reason",
}  # fmt: skip
SAMPLED = ("--temperature", 1.0, "--seed", 5)


def one_core() -> None:
    """One core, so one thread: two wait for each other on a busy machine. Ctrl-C as a terminal has it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would its children


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, check=False, preexec_fn=one_core)


def run_json(*arguments: object, stdin: bytes = b"") -> dict[str, Any]:
    done = run(*arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def pair(tiny_target: Path, tiny_draft: Path) -> tuple[object, ...]:
    return ("--target", tiny_target, "--draft", tiny_draft, "--kv-type", "f32")


def test_json_is_what_a_session_says(pair: tuple[object, ...], tiny_session: pydflash.Session) -> None:
    found = run_json(*pair, "--prompt", "the tree", "--n-gen", 24, "--budget", 16, *SAMPLED)
    expected = tiny_session.generate("the tree", max_tokens=24, budget=16, temperature=1.0, seed=5)
    assert set(found) == KEYS
    assert set(found["ms"]) == {"draft", "build", "verify", "accept", "commit"}
    assert found["ids"] == expected.ids
    assert found["text"] == expected.text
    assert found["finish_reason"] == expected.finish_reason
    assert found["output_hash"] == expected.stats.output_hash
    assert found["n_prompt"] == expected.stats.n_prompt
    assert found["n_steps"] == expected.stats.n_steps
    assert found["accepted_by_depth"] == expected.stats.accepted_by_depth
    assert found["mean_accepted"] == found["n_generated"] / found["n_steps"]


def test_text_goes_to_stdout_and_figures_to_stderr(pair: tuple[object, ...]) -> None:
    done = run(*pair, "--prompt", "the tree", "--n-gen", 24, *SAMPLED)
    found = run_json(*pair, "--prompt", "the tree", "--n-gen", 24, *SAMPLED)
    assert done.returncode == 0
    assert done.stdout.decode() == found["text"]  # to the character
    (line,) = done.stderr.decode().splitlines()
    for figure in (f"{found['n_prompt']} + {found['n_generated']} tokens", found["output_hash"], "seed 5", "tok/s"):
        assert figure in line


def test_where_the_prompt_comes_from(pair: tuple[object, ...], tmp_path: Path) -> None:
    text = "first line\nthe € tree\n"
    (tmp_path / "prompt.txt").write_text(text)
    expected = run_json(*pair, "--prompt", text, "-n", 4)["output_hash"]
    assert run_json(*pair, "-f", tmp_path / "prompt.txt", "-n", 4)["output_hash"] == expected
    assert run_json(*pair, "-n", 4, stdin=text.encode())["output_hash"] == expected
    assert run_json(*pair, "-f", "-", "-n", 4, stdin=text.encode())["output_hash"] == expected
    assert run_json(*pair, "--prompt", "-", "--raw", "-n", 4, stdin=text.encode())["output_hash"] == expected


def test_ways_to_decode(pair: tuple[object, ...], tiny_target: Path, tmp_path: Path) -> None:
    ask = ("--prompt", "the tree", "--n-gen", 24, "--kv-type", "f32", *SAMPLED)
    tree = run_json(*pair, *ask)
    chain = run_json(*pair, *ask, "--chain", "--budget", 3)
    plain = run_json(*pair, *ask, "--budget", 0)
    alone = run_json("--target", tiny_target, "--no-draft", *ask)
    folder = run_json(
        "--target", tiny_target, "--draft", TinyDraft.of(TinyTarget()).write_folder(tmp_path / "draft"), *ask
    )
    assert tree["ids"] == chain["ids"] == plain["ids"] == alone["ids"] == folder["ids"]
    assert len(chain["accepted_by_depth"]) <= 3
    assert plain["n_steps"] == alone["n_steps"] == plain["n_generated"]
    assert folder["n_steps"] == tree["n_steps"]


def test_sampling_and_context_options(pair: tuple[object, ...]) -> None:
    greedy = run_json(*pair, "--prompt", "a", "-n", 8)
    assert run_json(*pair, "--prompt", "a", "-n", 8, "--temperature", 2, "--top-k", 1)["ids"] == greedy["ids"]
    assert run_json(*pair, "--prompt", "a", "-n", 8, "--temperature", 2, "--top-p", 1e-6)["ids"] == greedy["ids"]
    assert run_json(*pair, "--prompt", "a", "-n", 8, "--temperature", 2, "--min-p", 1)["ids"] == greedy["ids"]
    assert run_json(*pair, "--prompt", "a", "-n", 200, "--n-ctx", 64)["n_generated"] <= 63
    for kv_type in ("q4_0", "q8_0,f16"):
        assert run_json(*pair, "--prompt", "a", "-n", 4, "--kv-type", kv_type)["n_generated"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--prompt", "x", "--target", "nowhere.gguf"), 1, "error: the target nowhere.gguf does not exist"),
        (("--prompt", "x", "--target", "{target}", "--draft", "nowhere"), 1, "error: the draft nowhere does not exist"),
        (("--prompt", "x", "--target", "{draft}"), 1, "architecture 'dflash'"),
        (("--prompt", "x", "--target", "{target}", "--draft", "{target}"), 1, "architecture 'qwen35'"),
        (("--prompt", "x", "--target", "{target}", "--draft", "{wide}"), 1, "128"),
        (("--prompt", "x", "--target", "{script}"), 1, "run.py"),
        (("-f", "nowhere.txt", "--target", "{target}"), 1, "cannot read the prompt from nowhere.txt"),
        (("-f", "{target}", "--target", "{target}"), 1, "the prompt is not UTF-8"),
        (("--prompt", "x" * 600, "--target", "{target}"), 1, "89 too many for n_ctx=512"),
        (("--prompt", "", "--target", "{target}"), 2, "the prompt is empty"),
        (("--prompt", "x", "--target", "{target}", "--budget", 64), 2, "budget is 64"),
        (("--prompt", "x", "--target", "{target}", "--kv-type", "q8"), 2, "did you mean 'q8_0'?"),
        (("--prompt", "x", "--temprature", 1), 2, "unrecognized arguments: --temprature"),
        (("--prompt", "x", "--n-gen", "many"), 2, "invalid int value"),
        (("--prompt", "x", "-f", "y"), 2, "not allowed with"),
        (("--prompt", "x", "--no-draft", "--chain"), 2, "--no-draft goes without"),
    ],
)
def test_refusals(
    arguments: tuple[object, ...], code: int, sentence: str, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    wide = TinyDraft(n_embd=128).write(tmp_path / "wide.gguf")
    names = {"target": tiny_target, "draft": tiny_draft, "wide": wide, "script": SCRIPT}
    done = run(*(str(argument).format(**names) for argument in arguments))
    assert done.returncode == code
    assert done.stdout == b""
    assert sentence in done.stderr.decode()
    if code == 1:
        assert len(done.stderr.decode().splitlines()) == 1


def test_ctrl_c_ends_the_run_at_its_next_step(pair: tuple[object, ...]) -> None:
    arguments = command(*pair, "--prompt", "the tree", "-n", 500, *SAMPLED, "--budget", 0)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=one_core) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)  # the first text is there, so the run is going on
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("500 tokens were done before the signal came")
    assert process.returncode == 130
    (line,) = errors.decode().splitlines()
    assert "cancelled" in line
    assert (begun + rest).decode()


def test_ctrl_c_while_waiting_for_the_prompt() -> None:
    with subprocess.Popen(
        command("-f", "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=one_core
    ) as process:
        assert process.stderr is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, b"", b"")


def test_a_reader_that_leaves(pair: tuple[object, ...]) -> None:
    arguments = command(*pair, "--prompt", "the tree", "-n", 400, *SAMPLED)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=one_core) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert b"Traceback" not in errors


def test_the_shipped_pair_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--prompt", "def fibonacci(n):", "-n", 48),
        capture_output=True,
        cwd=tmp_path,
        text=True,
        preexec_fn=one_core,
    )
    assert done.returncode == 0, done.stderr
    assert "48 tokens" in done.stderr
    passes = float(done.stderr.split(" tokens each")[0].split()[-1])
    assert passes > 2  # a trained drafter: a random one accepts next to nothing


# ---- what `pydflash run` passes on -----------------------------------------------------------------------------------


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["run", "--json", "--n-threads", "1", *map(str, arguments)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_every_setting_of_sampling(
    pair: tuple[object, ...], tiny_session: pydflash.Session, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        *("--temperature", 1.2, "--top-k", 200, "--top-p", 0.95, "--min-p", 0.001, "--repeat-penalty", 1.2),
        *("--presence-penalty", 0.5, "--frequency-penalty", 0.25, "--logit-bias", "65=3", "--logit-bias", "66=-inf"),
        *("--seed", 7, "--ignore-eos", "--logprobs", 2, "--n-gen", 20, "--stop", "zzz", "--stop", "yyy"),
    )
    settings = pydflash.Sampling(
        temperature=1.2,
        top_k=200,
        top_p=0.95,
        min_p=0.001,
        repeat_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={65: 3.0, 66: float("-inf")},
        seed=7,
        ignore_eos=True,
        logprobs=2,
        max_tokens=20,
        stop=["zzz", "yyy"],
    )
    found = run_here(capsys, *pair, "--prompt", "the tree", *flags)
    expected = tiny_session.generate("the tree", settings)
    assert found["ids"] == expected.ids
    assert expected.logprobs is not None
    for token, wanted in zip(found["logprobs"], expected.logprobs, strict=True):
        assert (token["id"], token["token"]) == (wanted.id, tiny_session.detokenize([wanted.id]))
        assert token["logprob"] == pytest.approx(wanted.logprob, abs=1e-4)
        assert [top["id"] for top in token["top"]] == [token_id for token_id, _ in wanted.top]


def test_documents_and_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "oak.txt").write_text("An oak is a tree.\n")
    (tmp_path / "fir.md").write_text("# Fir\n")
    shared = ("--n-ctx", 1024, "--kv-type", "f32", "-n", 12, "--prompt", "What is an oak?")
    files = ("--file", tmp_path / "oak.txt", "--file", tmp_path / "fir.md")
    documents = [read_documents(path)[0].as_prompt() for path in files[1::2]]
    with pydflash.Session(n_ctx=1024, kv_type="f32", n_threads=1) as session:
        raw = session.generate("".join(documents) + "What is an oak?", max_tokens=12)
        assert run_here(capsys, *shared, *files)["ids"] == raw.ids
        messages = [{"role": "user", "content": text} for text in (*documents, "What is an oak?")]
        chat = session.chat([{"role": "system", "content": "Be brief."}, *messages], max_tokens=12)
    found = run_here(capsys, *shared, *files, "--chat", "--system", "Be brief.")
    assert (found["ids"], found["content"], found["reasoning"]) == (chat.ids, chat.content, chat.reasoning)
    assert found["tool_calls"] == []


def test_forms_of_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                                  "additionalProperties": False}))  # fmt: skip
    lark = tmp_path / "sum.lark"
    lark.write_text('start: NUMBER ("+" NUMBER)+\nNUMBER: /[0-9]{1,2}/\n')
    shared = ("--n-ctx", 1024, "-n", 40, "--prompt", "def f(n):")
    assert run_here(capsys, *shared, "--choice", "yes", "--choice", "no")["text"] in ("yes", "no")
    assert re.fullmatch("[a-c]{5}-[0-9]", run_here(capsys, *shared, "--regex", "[a-c]{5}-[0-9]")["text"])
    assert isinstance(json.loads(run_here(capsys, *shared, "--json-schema", schema)["text"])["n"], int)
    assert re.match(r"[0-9]{1,2}\+[0-9]{1,2}", run_here(capsys, *shared, "--lark", lark)["text"])


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--regex", "("), 2, "error: "),
        (("--system", "Be brief."), 2, "go with --chat"),
        (("--think",), 2, "go with --chat"),
        (("--logprobs", 2), 2, "--logprobs goes with --json"),
        (("--logit-bias", "a=1"), 2, "invalid ID=B value"),
        (("--top-p", 2), 2, "top_p is 2.0"),
        (("--file", "nowhere.txt"), 1, "nowhere.txt does not exist"),
        (("--json-schema", "nowhere.json"), 1, "cannot read nowhere.json"),
        (("--json-schema", SCRIPT), 2, "is not JSON"),
        (("--regex", "a", "--choice", "b"), 2, "not allowed with"),
    ],
)
def test_refusals_of_what_is_passed_on(
    arguments: tuple[object, ...], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["run", "--prompt", "a", *map(str, arguments)])
    except SystemExit as ended:  # as argparse does
        found = ended.code
    output = capsys.readouterr()
    assert (found, output.out) == (code, "")
    assert sentence in output.err
