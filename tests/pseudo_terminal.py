"""A program on a terminal of its own: type into it, wait for what it shows, see how it ends.

with PseudoTerminal([sys.executable, "-m", "pydflash", "chat"]) as terminal:
    terminal.expect("> ")
    terminal.send("hello\\n")
    terminal.send(CTRL_D)
    assert terminal.wait() == 0
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

CTRL_C, CTRL_D = "\x03", "\x04"


class PseudoTerminal:
    """stdin, stdout and stderr of the program are one terminal, 120 columns wide. `shown` is all of it so far."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 60) -> None:
        self._timeout = timeout
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 120)) if hasattr(termios, "tcsetwinsize") else None
        self.process = subprocess.Popen(
            list(command),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", **(env or {})},
            preexec_fn=lambda: self._own_terminal(theirs),
        )
        os.close(theirs)
        self.shown = ""
        self._raw = b""
        self._seen = 0

    @staticmethod
    def _own_terminal(theirs: int) -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one thread: two wait for each other when it is busy
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def send(self, text: str) -> None:
        """Types."""
        os.write(self._ours, text.encode())

    def press(self, key: str, *, until: str) -> re.Match[str]:
        """Types a key, and again every two seconds until this is shown: Python's readline forgets a signal that comes
        between two of its own calls."""
        for _ in range(int(self._timeout / 2)):
            self.send(key)
            try:
                return self.expect(until, timeout=2)
            except AssertionError:
                pass
        return self.expect(until)

    def expect(self, pattern: str, *, timeout: float | None = None) -> re.Match[str]:
        """Waits until what was shown since the last match holds this; the match."""
        ends = time.monotonic() + (self._timeout if timeout is None else timeout)
        while True:
            found = re.compile(pattern).search(self.shown, self._seen)
            if found:
                self._seen = found.end()
                return found
            if time.monotonic() > ends or not self._read(0.2):
                raise AssertionError(f"{pattern!r} did not come; shown since: {self.shown[self._seen :]!r}")

    def wait(self) -> int:
        """Reads to the end; the exit code."""
        ends = time.monotonic() + self._timeout
        while time.monotonic() < ends and self._read(0.2):
            pass
        return self.process.wait(timeout=self._timeout)

    def _read(self, seconds: float) -> bool:
        """Takes in what there is; False when nothing will come any more."""
        ready, _, _ = select.select([self._ours], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self._raw += data
        self.shown = self._raw.decode(errors="replace")
        return bool(data)
