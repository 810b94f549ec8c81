"""What a .gitignore leaves out, by the rules of gitignore(5).

Only the folder that is read and what lies in it counts: no .gitignore further up, no exclude file of the user's.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class _Rule:
    parts: tuple[re.Pattern[str] | None, ...]  # one for each name of the path; None stands for any number of them
    folders_only: bool
    ignores: bool


class GitIgnore:
    """The rules of one .gitignore."""

    def __init__(self, text: str) -> None:
        self._rules = [rule for line in text.splitlines() if (rule := _rule(line)) is not None]

    def says(self, path: str, is_folder: bool) -> bool | None:
        """Whether `path`, relative to the .gitignore's folder, is ignored (True) or wanted back (False); None when no
        rule is about it. The last rule that matches decides."""
        names = path.split("/")
        for rule in reversed(self._rules):
            if (is_folder or not rule.folders_only) and _matches(rule.parts, names):
                return rule.ignores
        return None


def _rule(line: str) -> _Rule | None:
    line = re.sub(r"(?<!\\)((?:\\\\)*) +$", r"\1", line)
    if not line or line.startswith("#"):
        return None
    ignores = not line.startswith("!")
    line = line if ignores else line[1:]
    folders_only = line.endswith("/")
    pattern = line.rstrip("/") if folders_only else line
    if not pattern.strip("/"):
        return None
    names = pattern.removeprefix("/").split("/")
    if "/" not in pattern:  # it may lie anywhere
        names.insert(0, "**")
    if names[-1] == "**" and len(names) > 1:  # all that is inside, not the folder itself
        names.append("*")
    return _Rule(tuple(None if name == "**" else _name(name) for name in names), folders_only, ignores)


def _name(pattern: str) -> re.Pattern[str]:
    """One name's pattern. fnmatch knows no backslash and writes [^a] as [!a]."""
    pattern = re.sub(r"\\(.)", lambda found: f"[{found[1]}]" if found[1] in "*?[" else found[1], pattern)
    return re.compile(fnmatch.translate(pattern.replace("[^", "[!")))


def _matches(parts: tuple[re.Pattern[str] | None, ...], names: list[str]) -> bool:
    """Whether the parts match all of the names."""
    ends = {0}  # how many names the parts so far can have matched
    for part in parts:
        if part is None:
            ends = set(range(min(ends), len(names) + 1))
        else:
            ends = {n + 1 for n in ends if n < len(names) and part.match(names[n])}
        if not ends:
            return False
    return len(names) in ends
