"""`pydflash chat`, piped and on a terminal, with the pair that ships."""

from __future__ import annotations

import io
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pydflash
from pydflash.cli import main
from pydflash.cli.lines import history_file
from tests.pseudo_terminal import CTRL_C, CTRL_D, PseudoTerminal

COMMAND = [sys.executable, "-m", "pydflash"]
SESSION = ("--n-ctx", "4096", "--kv-type", "f32", "--n-threads", "1", "--budget", "16")
SHORT = (*SESSION, "--n-gen", "16", "--temperature", "0.8", "--seed", "5")  # greedily, all answers are much the same
ENDLESS = (*SESSION, "--ignore-eos", "--temperature", "1", "--seed", "5", "--budget", "0")
CUT = "cut: it has reached --n-gen, or the context is full\n"
STYLES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


Chat = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """The command with lines piped in, within this process: what it does takes less than starting one."""

    def piped(lines: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = ["chat", *SHORT, *map(str, arguments)]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        try:
            code: Any = main(command)
        except SystemExit as ended:  # as argparse does
            code = ended.code
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return piped


def terminal(tmp_path: Path, *arguments: str, **env: str) -> PseudoTerminal:
    return PseudoTerminal([*COMMAND, "chat", *arguments], env={"XDG_STATE_HOME": str(tmp_path / "state"), **env})


@pytest.fixture
def session() -> pydflash.Session:
    with pydflash.Session(n_ctx=4096, kv_type="f32", budget=16, n_threads=1) as session:
        yield session


def ask(session: pydflash.Session, *questions: str) -> str:
    """What a session says to these, each ending its line."""
    answers = (session.ask(question, max_tokens=16, temperature=0.8, seed=5) for question in questions)
    return "".join(answer.content.removesuffix("\n") + "\n" for answer in answers)


# ---- piped -----------------------------------------------------------------------------------------------------------


def test_each_line_is_a_message_and_stdout_has_the_answers(session: pydflash.Session, chat: Chat) -> None:
    done = chat("What is a tree?\n\nAnd a leaf?\n")
    assert (done.returncode, done.stderr.replace(CUT, "")) == (0, "")
    assert done.stdout == ask(session, "What is a tree?", "And a leaf?")
    cut = chat("What is a tree?\n", "--n-gen", 1)
    assert cut.stderr == CUT
    assert done.stdout.startswith(cut.stdout[:-1])


def test_messages_of_several_lines(session: pydflash.Session, chat: Chat) -> None:
    expected = ask(session, "def f():\n    return 1")
    assert chat("def f():\\\n    return 1\n").stdout == expected
    assert chat('"""def f():\n    return 1"""\n').stdout == expected
    session.reset()
    assert chat("//quit is text here\n").stdout == ask(session, "/quit is text here")


def test_a_saved_conversation_goes_on_as_it_would_have(tmp_path: Path, chat: Chat) -> None:
    path = tmp_path / "tree.session"
    through = chat(f"What is a tree?\n/save {path}\nAnd a leaf?\nAnd a root?\n")
    assert through.returncode == 0, through.stderr
    later = chat("And a leaf?\nAnd a root?\n", "--load", path)
    assert later.returncode == 0, later.stderr
    first = chat("What is a tree?\n").stdout
    assert through.stdout == first + later.stdout
    again = chat(f"Something else\n/load {path}\nAnd a leaf?\n")
    assert again.stdout.endswith(chat("And a leaf?\n", "--load", path).stdout)


def test_what_is_taken_back_never_happened(chat: Chat) -> None:
    straight = chat("What is a tree?\nAnd a leaf?\n").stdout
    first = chat("What is a tree?\n").stdout
    again = chat("What is a tree?\nAnd a stone?\nAnd a hill?\n/rewind 2\nAnd a leaf?\n").stdout
    assert again.startswith(first)
    assert again.endswith(straight.removeprefix(first))


def test_system_messages_and_documents(session: pydflash.Session, tmp_path: Path, chat: Chat) -> None:
    (tmp_path / "tree.txt").write_text("An oak is a tree.\n")
    session.messages = [{"role": "system", "content": "Be brief."}]
    session.append_document(tmp_path / "tree.txt")
    expected = ask(session, "What is an oak?")
    assert chat("What is an oak?\n", "--system", "Be brief.", "--file", tmp_path / "tree.txt").stdout == expected
    typed = chat(f"/system Be wordy.\n/file {tmp_path / 'tree.txt'}\n/system Be brief.\nWhat is an oak?\n")
    assert typed.stdout == expected
    assert re.search(r"tree.txt: 1 document, \d+ tokens; \d+ of 4,096 used", typed.stderr)
    without = chat(f"/file {tmp_path / 'tree.txt'}\n/rewind\nWhat is an oak?\n").stdout
    session.reset()
    assert without == ask(session, "What is an oak?")


def test_a_command_that_fails_is_a_sentence_and_the_conversation_goes_on(
    session: pydflash.Session, tmp_path: Path, chat: Chat
) -> None:
    damaged = tmp_path / "damaged.session"
    session.save(damaged)
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    wrong = {
        f"/load {damaged}": str(damaged),
        "/stat": "there is no command 'stat', did you mean 'stats'?",
        "/file nowhere.txt": "nowhere.txt does not exist",
        "/file": "the command is /file PATH",
        "/load nowhere": "nowhere",
        "/save /nowhere/x": "/nowhere",
        "/rewind 2": "there are 1 messages of yours",
        "/rewind x": "a count of messages",
        "/think maybe": "/think on or /think off",
        "/draft": "/draft on or /draft off",
    }
    done = chat("\n".join(["What is a tree?", *wrong, "And a leaf?", ""]))
    assert done.returncode == 1
    assert done.stdout == ask(session, "What is a tree?", "And a leaf?")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, sentence in zip(errors, wrong.values(), strict=True):
        assert sentence in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--load", "nowhere.session"), 1, "nowhere.session"),
        (("--file", "nowhere.txt"), 1, "nowhere.txt does not exist"),
        (("--target", "nowhere.gguf"), 1, "nowhere.gguf does not exist"),
        (("--temperature", "-1"), 2, "temperature is -1"),
        (("--no-draft", "--chain"), 2, "--no-draft goes without"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, sentence: str, chat: Chat) -> None:
    done = chat("hello\n", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_the_answer_and_keeps_the_session(tmp_path: Path) -> None:
    with terminal(tmp_path, *ENDLESS) as shell:
        shell.expect("Ctrl-D leaves")
        shell.expect("> ")
        shell.send("What is a tree?\n")
        shell.expect(r"tree\?\r\n\S+")  # the answer has begun
        shell.send(CTRL_C)
        shell.expect("stopped; what was said so far stands")
        shell.expect("> ")
        shell.send("/stats\n")
        shell.expect(r"cancelled \| [0-9a-f]{16} \| seed 5")
        shell.expect(r"2 messages, \d+ of 4,096 tokens")
        shell.expect("> ")
        shell.send("unfinished")
        shell.expect("unfinished")
        shell.press(CTRL_C, until="> ")
        shell.send("/think maybe\n")
        shell.expect("error: the command is /think on or /think off")
        shell.expect("> ")
        shell.send("And a leaf?\n")
        shell.expect(r"leaf\?\r\n\S+")
        shell.send(CTRL_C)
        shell.expect("stopped")
        shell.expect("> ")
        shell.send(CTRL_D)
        assert shell.wait() == 0
    assert "Traceback" not in shell.shown


def test_ctrl_c_while_a_document_is_read(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("An oak is a tree. " * 8000)
    with terminal(tmp_path, *SHORT, "--n-ctx", "65536") as shell:
        shell.expect("> ")
        shell.send(f"/file {tmp_path / 'long.txt'}\n")
        shell.expect(r"\d of \d\d,\d\d\d tokens")
        shell.send(CTRL_C)
        shell.expect("stopped; the document is not part of the conversation")
        shell.expect("> ")
        shell.send("/stats\n")
        shell.expect("0 messages")
        shell.expect("> ")
        shell.send("What is a tree?\n")
        shell.expect(r"tree\?\r\n\S+")
        shell.expect("> ")
        shell.send(CTRL_D)
        assert shell.wait() == 0


def test_history_is_kept_for_the_user_alone(tmp_path: Path) -> None:
    with terminal(tmp_path, *SHORT) as shell:
        shell.expect("> ")
        shell.send("What is a tree?\n")
        shell.expect(r"tree\?\r\n\S")
        shell.expect("\n> ")
        shell.send("/quit\n")
        assert shell.wait() == 0
    path = tmp_path / "state" / "pydflash" / history_file().name
    assert path.read_text() == "What is a tree?\n/quit\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with terminal(tmp_path, *SHORT) as shell:
        shell.expect("> ")
        shell.send("\x1b[A\x1b[A\n")  # up, up
        shell.expect(r"What is a tree\?\r\n\S+")
        shell.expect("> ")
        shell.send(CTRL_D)
        assert shell.wait() == 0


def test_drafted_tokens_in_another_shade(tmp_path: Path, chat: Chat) -> None:
    plain = chat("def fibonacci(n):\n").stdout

    def shown(**env: str) -> str:
        with terminal(tmp_path, *SHORT, "--show-drafted", **env) as shell:
            shell.expect("> ")
            shell.send("def fibonacci(n):\n")
            shell.expect(r"\(n\):\r\n")
            answer = shell.expect(r"(?s)(.*?\n)\r?(\x1b\S*)?> ")[1]
            shell.send(CTRL_D)
            assert shell.wait() == 0
        assert STYLES.sub("", answer).replace("\r\n", "\n").endswith((plain, plain + CUT))
        return answer

    with pydflash.Session(n_ctx=4096, kv_type="f32", budget=16, n_threads=1) as session:
        chunks = list(session.stream_ask("def fibonacci(n):", max_tokens=16, temperature=0.8, seed=5))
        n_drafted = sum(len(session.detokenize(chunk.ids[:-1])) for chunk in chunks)
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", shown().replace("\r\n", "\n"), re.DOTALL))
    assert len(green) == n_drafted > 0
    assert "\x1b[32m" not in shown(NO_COLOR="1")


def test_an_answer_cannot_drive_the_terminal() -> None:
    code = (
        "from pydflash import Chunk\n"
        "from pydflash.cli.answer import AnswerWriter\n"
        "writer = AnswerWriter(None)\n"
        r"text = 'a\x1b]0;owned\x07\x9b2Jb\r\u202e[red]c'" + "\n"
        "writer.push(Chunk(text, [1], 1, content=text, reasoning=text))\n"
        "writer.finish()\n"
    )
    with PseudoTerminal([sys.executable, "-c", code]) as shell:
        assert shell.wait() == 0
    shown = STYLES.sub("", shell.shown).replace("\r\n", "\n")
    assert shown == 2 * (r"a\x1b]0;owned\x07\x9b2Jb\r\u202e[red]c" + "\n")
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert piped.decode() == "a\x1b]0;owned\x07\x9b2Jb\r\u202e[red]c\n"
