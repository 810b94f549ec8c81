"""Engines as processes of their own: ours behind lines of JSON, llama.cpp behind its server's HTTP.

An Engine owns its process: it starts it, gives it prompts, reads what the kernel says of its memory, and ends it. A
process whose turn it is not stands still (SIGSTOP), so that threads that wait by spinning take nothing from another's
turn. What a run took is what the engine's own clock says of prefill and of decoding; what it took here, transport
included, is kept beside that.
"""

from __future__ import annotations

import ctypes
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PR_SET_PDEATHSIG = 1  # of Linux' prctl
START_SECONDS = 300.0  # until a server answers: a large model is read, and repacked, first


class EngineError(Exception):
    """An engine that did not start or did not answer, in its own words."""


@dataclass(frozen=True)
class Setup:
    """What an engine is opened with; both keep an f16 KV cache and every other default of their own.

    n_draft: tokens that llama.cpp drafts for each pass; ours is told with each run. synthetic: its bench-only mean
    length of what it accepts, whatever the target says; its text is then not valid.
    """

    target: Path
    draft: Path | None
    n_ctx: int
    n_threads: int
    n_draft: int = 0
    synthetic: float | None = None


@dataclass(frozen=True)
class Answer:
    """One greedy generation of exactly so many tokens, nothing kept from earlier ones.

    The prompt's last token belongs to prefill in llama.cpp and to the first pass in ours: each counts the tokens whose
    seconds it gives.
    """

    ids: list[int]
    n_prefilled: int
    prefill_seconds: float
    n_decoded: int
    decode_seconds: float
    n_passes: int
    wall_seconds: float
    n_drafted: int = 0
    ms: dict[str, float] = field(default_factory=dict)  # by part of a step, sums

    @property
    def prefill_rate(self) -> float:
        """Tokens a second."""
        return self.n_prefilled / self.prefill_seconds


def _ends_with_its_parent() -> None:
    """What stands still would otherwise keep its memory for ever when this program is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Engine:
    """A process, and what can be asked of any."""

    about: dict[str, Any]  # what it says of itself
    forbidden: Sequence[int] = ()  # end tokens that it never says, so that nobody may say them

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                preexec_fn=_ends_with_its_parent,
            )

    def generate(
        self, ids: Sequence[int], n_tokens: int, settings: dict[str, Any], forbidden: Sequence[int] = ()
    ) -> Answer:
        """Raises EngineError. forbidden: tokens that are not said.

        With "n_passes" in the settings it ends behind so many passes, all of them whole: n_tokens must be more than
        they can give, since what is left to say bounds what is drafted.
        """
        raise NotImplementedError

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Only inside does the process run."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def memory(self) -> dict[str, float]:
        """MiB: the most that was resident, and what is now, in files that are mapped and outside of them."""
        fields = {"VmHWM:": "peak", "RssAnon:": "anonymous", "RssFile:": "files"}
        lines = (line.split() for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines())
        return {fields[name]: int(rest[0]) / 1024 for name, *rest in lines if name in fields}

    def log(self) -> str:
        """What it wrote on stderr so far."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """Ends the process."""
        for end in (self.process.terminate, self.process.kill):
            end()
            self.process.send_signal(signal.SIGCONT)
            try:
                self.process.wait(10)
                break
            except subprocess.TimeoutExpired:
                pass
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def failed(self, what: str) -> EngineError:
        """An error with the last it said."""
        said = [line for line in self.log().splitlines() if line.strip() and not line.startswith(("#", "["))]
        return EngineError(f"{what}: {' / '.join(said[-3:]) or 'it said nothing'}")


class LinesEngine(Engine):
    """An engine that answers each line of JSON with one: ours, or what a test puts in its place.

    The first line is a Setup, the answer what the engine says of itself; each that follows is {"ids", "n_tokens",
    "forbidden", **settings}, the answer an Answer less the time it took here. {"error": sentence} ends either.
    """

    def __init__(self, command: Sequence[str], setup: Setup, log: Path) -> None:
        super().__init__(command, log)
        draft = None if setup.draft is None else str(setup.draft)
        try:
            self.about = self._ask(
                {"target": str(setup.target), "draft": draft, "n_ctx": setup.n_ctx, "n_threads": setup.n_threads}
            )
        except EngineError:
            self.close()
            raise

    def generate(
        self, ids: Sequence[int], n_tokens: int, settings: dict[str, Any], forbidden: Sequence[int] = ()
    ) -> Answer:
        start = time.perf_counter()
        reply = self._ask({"ids": list(ids), "n_tokens": n_tokens, "forbidden": list(forbidden), **settings})
        return Answer(wall_seconds=time.perf_counter() - start, **reply)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self.failed(f"{Path(self.process.args[1]).name} ended")  # type: ignore[arg-type,index]
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(reply["error"])
        return reply


def pydflash_engine(setup: Setup, log: Path) -> LinesEngine:
    """Ours."""
    return LinesEngine([sys.executable, str(HERE / "pydflash_worker.py")], setup, log)


class LlamaCpp(Engine):
    """A llama.cpp server: the one inside xllamacpp, or a llama-server of the user's.

    Without a drafter it decodes plainly, with one it drafts chains of setup.n_draft tokens.
    """

    def __init__(self, setup: Setup, log: Path, server: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(HERE / "xllamacpp_server.py")] if server is None else [str(server)]
        super().__init__([*command, *_arguments(setup, port)], log)
        try:
            self._wait()
        except EngineError:
            self.close()
            raise
        self.about = {"system": self._said("system_info:"), "buffers": self._said("model buffer size")}
        self.forbidden = sorted({int(token) for token in re.findall(r"EOG token\s*= (\d+)", self.log())})

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise self.failed("llama.cpp ended while it was opening")
            try:
                with urllib.request.urlopen(self._address + "/health"):
                    return
            except OSError:
                time.sleep(0.05)
        raise self.failed(f"llama.cpp did not answer within {START_SECONDS:.0f} s")

    def _said(self, what: str) -> list[str]:
        lines = (line.partition(what) for line in self.log().splitlines())
        return [f"{before.split(':')[-1].strip()} {after.strip(' =|')}".strip() for before, hit, after in lines if hit]

    def generate(
        self, ids: Sequence[int], n_tokens: int, settings: dict[str, Any], forbidden: Sequence[int] = ()
    ) -> Answer:
        assert set(forbidden) <= set(self.forbidden), "ignore_eos forbids what ends a text, and nothing else"
        body: dict[str, Any] = {
            "prompt": list(ids),
            "n_predict": n_tokens,
            "return_tokens": True,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0.0,
            "samplers": ["top_k"],  # nothing else is computed for a greedy token
            "top_k": 1,
            **settings,
        }
        n_passes = body.pop("n_passes", None)
        if n_passes is not None:
            body |= {"stream": True, "timings_per_token": True}
        request = urllib.request.Request(
            self._address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request) as answer:
                reply = json.load(answer) if n_passes is None else _first_passes(answer, n_passes)
        except OSError as error:
            raise self.failed(f"llama.cpp did not answer ({error})") from None
        timings = reply["timings"]
        return Answer(
            ids=reply["tokens"],
            n_prefilled=timings["prompt_n"],
            prefill_seconds=timings["prompt_ms"] / 1e3,
            n_decoded=max(0, timings["predicted_n"] - 1),  # the first comes out of prefill, its clock starts behind it
            decode_seconds=timings["predicted_ms"] / 1e3,
            n_passes=_passes(timings),
            wall_seconds=time.perf_counter() - start,
            n_drafted=timings.get("draft_n", 0),
        )


def _passes(timings: dict[str, Any]) -> int:
    """A pass gives what it accepts and one token more."""
    return int(max(0, timings["predicted_n"] - 1) - timings.get("draft_n_accepted", 0))


def _first_passes(stream: Iterable[bytes], n_passes: int) -> dict[str, Any]:
    """Reads the events of a stream, one a token, until so many passes have come whole; leaving it ends the run."""
    ids: list[int] = []
    timings: dict[str, Any] = {"predicted_ms": None}
    n_seen = -1  # prefill gives the first token
    for line in stream:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        n_seen += event["timings"]["predicted_ms"] != timings["predicted_ms"]  # the tokens of a pass share its time
        if n_seen > n_passes:
            break
        timings = event["timings"]
        ids += event.get("tokens", ())
    return {"tokens": ids, "timings": timings}


def _arguments(setup: Setup, port: int) -> list[str]:
    """llama-server's; everything that is not named stands at its default, but that prompts are not kept in memory."""
    words: list[Any] = ["--model", setup.target, "--ctx-size", setup.n_ctx, "--parallel", 1, "--cache-ram", 0]
    words += ["--threads", setup.n_threads, "--threads-batch", setup.n_threads, "--host", "127.0.0.1", "--port", port]
    words += ["--gpu-layers", 0, "--fit", "off", "--verbosity", 4]
    if setup.draft is not None:
        words += ["--spec-type", "draft-dflash", "--spec-draft-model", setup.draft]
        words += ["--spec-draft-n-max", setup.n_draft, "--spec-draft-threads", setup.n_threads]
    if setup.synthetic is not None:
        words += ["--spec-synth-len", setup.synthetic]
    return [str(word) for word in words]
