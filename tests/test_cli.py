"""The command line from outside: `info` on hostile and on large files, exit codes, what is loaded."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gguf_files import BOOL, F32, I32, STRING, U64, File, Tensor, array_key, key, text, write_sample
from tests.hub_server import Repo, serving
from tests.pseudo_terminal import PseudoTerminal
from tests.test_run import one_core

HOSTILE = "\x1b]0;owned\x07 \x1b[2J\x9b31m\x7f\u202eabc\r\nnext\ttab"
# Whatever can move a cursor, set a title, or turn the text around: C0 without newline, DEL, C1, directions.
DRIVES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pydflash", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, preexec_fn=one_core)


def write(path: Path, file: File) -> Path:
    path.write_bytes(file.bytes())
    return path


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "sample.gguf")
    found = json.loads(run("info", tmp_path / "sample.gguf", "--json", "--tensors").stdout)
    keys = found["keys"]
    assert list(keys) == list(values)
    for name, value in values.items():
        if isinstance(value, list):
            assert keys[name]["n"] == len(value)
            assert keys[name]["value"] == (pytest.approx(value[:8]) if name == "a.f32" else value[:8])
        else:
            assert keys[name]["value"] == value
            assert type(keys[name]["value"]) is type(value)
    assert {t["name"]: (t["type"], t["shape"]) for t in found["tensors"]} == {
        "f32": ("f32", [5, 3]), "f16": ("f16", [4, 3, 2]), "i32": ("i32", [7]), "Q8_0": ("q8_0", [64, 4]),
        "Q4_0": ("q4_0", [64, 4]), "BF16": ("bf16", [64, 4]), "last": ("f32", [32, 2, 2, 2]),
    }  # fmt: skip
    size = (tmp_path / "sample.gguf").stat().st_size
    for tensor in found["tensors"]:
        assert 0 < tensor["offset"] <= size - tensor["n_bytes"]
    lines = run("info", tmp_path / "sample.gguf", "--tensors").stdout.splitlines()
    (row,) = (line for line in lines if line.startswith("tokenizer.ggml.tokens"))
    assert '100: "token 0", "token 1"' in row
    assert any(re.fullmatch(r"last +f32 +\[32, 2, 2, 2\] +\d+ +1024", line) for line in lines)


def test_info_on_values_that_would_drive_a_terminal(tmp_path: Path) -> None:
    path = write(
        tmp_path / "hostile.gguf",
        File(
            keys=[
                key("general.name", STRING, HOSTILE),
                key("bytes", STRING, b"\xff\xfe\x9b31m"),
                array_key("list", STRING, [HOSTILE, "b"]),
                key("nan", F32, float("nan")),
                key("yes", BOOL, 1),
                key("wide", U64, 2**64 - 1),
                array_key("numbers", I32, range(-2, 2000)),
                key("long", STRING, "x" * 5000),
            ],
            tensors=[Tensor("a", (4, 2))],
        ),
    )
    done = run("info", path)
    assert done.returncode == 0, done.stderr
    assert not DRIVES.search(done.stdout)
    for part in (r"\x1b]0;owned\x07", r"\u202eabc\r\nnext\ttab", r"\xff", "2,002: -2, -1, 0", "(5,000 characters)"):
        assert part in done.stdout
    as_json = run("info", path, "--json").stdout
    assert not DRIVES.search(as_json)
    keys = json.loads(as_json)["keys"]
    assert keys["general.name"]["value"] == HOSTILE
    assert keys["long"]["value"] == "x" * 5000
    assert (keys["nan"]["value"], keys["yes"]["value"]) == ("nan", True)
    with PseudoTerminal([sys.executable, "-m", "pydflash", "info", str(path)]) as terminal:
        assert terminal.wait() == 0
    styles = re.compile(r"\x1b\[[0-9;]*m")  # of rich's own
    assert not DRIVES.search(styles.sub("", terminal.shown.replace("\r\n", "\n")))
    assert r"\x1b]0;owned\x07" in terminal.shown


@pytest.mark.parametrize(
    "file",
    [
        File(keys=[key(f"name{HOSTILE}", STRING, "x")]),
        File(keys=[key("k", STRING, "x")], tensors=[Tensor(f"w{HOSTILE}", (4,))]),
        File(magic=b"\x1b[2J"),
        File(keys=[text(b"\x9b\xff") + struct.pack("<I", STRING) + text("x")]),
    ],
)
def test_info_refuses_names_that_would_drive_a_terminal(file: File, tmp_path: Path) -> None:
    done = run("info", write(tmp_path / "hostile.gguf", file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert not DRIVES.search(done.stderr)


def test_info_is_quick_on_a_large_vocabulary(tmp_path: Path) -> None:
    n = 248320
    path = write(
        tmp_path / "large.gguf",
        File(
            keys=[
                array_key("tokenizer.ggml.tokens", STRING, [f"token{i}" for i in range(n)]),
                array_key("tokenizer.ggml.merges", STRING, [f"tok en{i}" for i in range(n)]),
                array_key("tokenizer.ggml.token_type", I32, [1] * n),
            ]
        ),
    )

    def seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = seconds()
    done = run("info", path)
    assert "248,320: " in done.stdout
    assert seconds() - before < 0.5  # of the processor: how busy the machine is does not count


# ---- the others ------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy() -> None:
    heavy = ("numpy", "rich", "tokenizers", "gguf", "llguidance", "minijinja", "pypdf", "huggingface_hub")
    code = (
        "import sys, pydflash.cli\n"
        "try: pydflash.cli.main(['run', '--help'])\n"
        f"except SystemExit: print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 2, "COMMAND"),
        (("frobnicate",), 2, "invalid choice"),
        (("info",), 2, "GGUF"),
        (("info", "nowhere.gguf"), 1, "nowhere.gguf"),
        (("info", os.devnull), 1, "error: "),
        (("info", "/"), 1, "error: "),
        (("convert", "nowhere", "out.gguf"), 1, "nowhere is not a folder"),
        (("bench", "--budgets", 64, "--target", "{target}", "--draft", "{draft}"), 2, "budget is 64"),
        (("bench", "--rounds", 0), 2, "--rounds must be at least 1"),
        (("bench", "--depths", "1Q"), 2, "invalid N value: '1Q'"),
        (("bench", "--markdown", "/"), 1, "cannot write /"),
        (("bench", "--json", "nowhere/out.json"), 1, "there is no folder"),
    ],
)
def test_refusals(arguments: tuple[object, ...], code: int, sentence: str, tiny_target: Path, tiny_draft: Path) -> None:
    done = run(*(str(argument).format(target=tiny_target, draft=tiny_draft) for argument in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("info",), ("run", "--prompt", "a", "-n", "4", "--target")])
def test_output_that_nobody_takes(arguments: tuple[str, ...], tiny_target: Path) -> None:
    command = shlex.join([sys.executable, "-m", "pydflash", *arguments, str(tiny_target)])
    full = subprocess.run(f"{command} > /dev/full", shell=True, capture_output=True, text=True, preexec_fn=one_core)
    assert (full.returncode, full.stderr) == (1, "error: cannot write the output: No space left on device\n")
    left = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} | true"], capture_output=True, text=True)
    assert left.returncode in (0, 1)  # the reader may leave before or behind the last line
    closed = subprocess.run(f"{command} <&- >&-", shell=True, capture_output=True, text=True, preexec_fn=one_core)
    assert closed.returncode == 0
    for done in (full, left, closed):
        assert "Traceback" not in done.stderr


def test_convert_is_the_module_s_own(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "models" / "tiny-draft"
    done = run("convert", folder, tmp_path / "a.gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "pydflash.convert", folder, tmp_path / "b.gguf", "--type", "q8_0"]
    subprocess.run(list(map(str, command)), capture_output=True, check=True)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# ---- models by name --------------------------------------------------------------------------------------------------


def test_a_pair_is_pulled_and_then_runs_by_its_name(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    cache = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_TOKEN": "", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def pydflash(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pydflash", *map(str, arguments)]
        return subprocess.run(
            command, env=cache | env, input="", capture_output=True, text=True, check=False, preexec_fn=one_core
        )

    name = ("some/target", "--draft", "some/draft")
    ask = ("--prompt", "a", "-n", 8, "--kv-type", "f32", "--json")
    missing = pydflash("run", "--target", *name, *ask)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr == (
        "error: some/target is not on this machine yet: run 'pydflash pull some/target --draft some/draft'\n"
    )
    assert "pydflash pull qwen3.5-27b" in pydflash("plan", "--target", "qwen3.5-27b").stderr
    assert "did you mean 'qwen3.5-27b'" in pydflash("plan", "--target", "qwen3.5-27").stderr
    with serving() as hub:
        hub.repos["some/target"] = Repo({"target.gguf": tiny_target.read_bytes()})
        hub.repos["some/draft"] = Repo({"draft.gguf": tiny_draft.read_bytes()})
        pulled = pydflash("pull", *name, HF_ENDPOINT=hub.endpoint)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stderr == ""
    target, draft = (line.split()[1] for line in pulled.stdout.splitlines())
    assert Path(target).read_bytes() == tiny_target.read_bytes()
    assert Path(draft).read_bytes() == tiny_draft.read_bytes()
    assert pydflash("pull", *name, "--local-files-only").stdout == pulled.stdout
    by_name = json.loads(pydflash("run", "--target", *name, *ask).stdout)
    by_path = json.loads(pydflash("run", "--target", tiny_target, "--draft", tiny_draft, *ask).stdout)
    assert (by_name["ids"], by_name["n_steps"]) == (by_path["ids"], by_path["n_steps"])
    plain = json.loads(pydflash("run", "--target", "some/target", "--no-draft", *ask).stdout)
    assert (plain["ids"], plain["n_steps"]) == (by_path["ids"], 8)
