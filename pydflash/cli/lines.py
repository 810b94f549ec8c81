"""Lines typed or piped in: editing and history on a terminal, plain reading elsewhere, several lines as one message.

A line that ends with a backslash goes on in the next; a message that begins with three double quotes ends with them.
The history is a file in the user's state folder that only the user can read.
"""

from __future__ import annotations

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

QUOTES = '"""'
N_HISTORY = 1000  # lines kept


class Lines:
    """Where messages come from. `interactive`: a person types them, and sees the prompt."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty()
        self._edited = self.interactive and sys.stdout.isatty()
        if not self.interactive:
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if self._edited:
            import readline

            readline.set_auto_history(False)
            self._readline = readline
            with suppress(OSError, UnicodeError):
                for line in history_file().read_text(encoding="utf-8").splitlines():
                    readline.add_history(line)

    def message(self, prompt: str) -> str:
        """The next message, without its marks; EOFError at the end, KeyboardInterrupt at Ctrl-C."""
        text = self._line(prompt)
        if text.lstrip().startswith(QUOTES):
            text = text.lstrip()[len(QUOTES) :]
            while not text.rstrip().endswith(QUOTES):
                text += "\n" + self._line("... ")
            return text.rstrip()[: -len(QUOTES)]
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._line("... ")
        return text

    def save(self) -> None:
        """Writes the history, for the user alone; a folder that cannot be written is no reason to complain."""
        if not self._edited:
            return
        path = history_file()
        n = self._readline.get_current_history_length()
        kept = [self._readline.get_history_item(i) or "" for i in range(max(1, n - N_HISTORY + 1), n + 1)]
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in kept)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _line(self, prompt: str) -> str:
        if self._edited:
            line = input(prompt)
            if line.strip():
                self._readline.add_history(line)
            return line
        if self.interactive:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def history_file() -> Path:
    """$XDG_STATE_HOME/pydflash/chat_history, or the same in ~/.local/state."""
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "pydflash" / "chat_history"
