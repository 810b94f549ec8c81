"""The text of an HTML page, in Markdown's forms: a program of its own, since the standard library's parser takes time
quadratic in what a malformed page leaves open. It imports nothing of pydflash, so that it starts quickly.

    PROGRAM < PAGE > TEXT          both UTF-8

Kept: headings, paragraphs, lists, tables (cells between bars), code, links and what pictures are said to show. Dropped:
scripts, styles, templates and drawings. Past CPU_SECONDS the program ends without a word.
"""

from __future__ import annotations

import re
import resource
import sys
from html.parser import HTMLParser

CPU_SECONDS = 30
DROPPED = frozenset(("script", "style", "template", "svg", "iframe", "object", "noscript"))
PARAGRAPHS = frozenset(
    ("address", "article", "aside", "blockquote", "body", "details", "dl", "fieldset", "figcaption", "figure")
) | frozenset(("footer", "form", "header", "main", "nav", "ol", "p", "section", "summary", "table", "title", "ul"))
LINES = frozenset(("br", "caption", "dd", "div", "dt", "li", "option", "tr"))
CODE = frozenset(("code", "kbd", "samp", "tt"))
HEADINGS = {f"h{n}": "#" * n + " " for n in range(1, 7)}
MAX_LINK = 200  # characters; a longer one is for machines


def text_of(page: str) -> str:
    """The text of a whole page."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    reader.end_pre()
    return "".join(reader.out).strip("\n")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.gap = 0  # line ends that are due before the next text
        self.space = False  # a blank is due, unless a line begins
        self.at_start = True  # of a line, or of a table's cell: blanks and paragraphs have no effect
        self.dropping: list[str] = []
        self.lists: list[int] = []  # the number of the last item; -1 where items have none
        self.links: list[tuple[int, str, bool]] = []  # where in `out` each begins, and whether a line did there
        self.in_row = False
        self.pre: list[str] | None = None
        self.language = ""

    # ---- what the parser calls -----------------------------------------------------------------------------------

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.dropping:
            if tag == self.dropping[0]:
                self.dropping.append(tag)
            return
        if tag in DROPPED:
            self.dropping.append(tag)
            return
        named = {name: value or "" for name, value in attrs}
        if self.pre is not None:
            if tag == "code":
                self.language = _language(named) or self.language
            elif tag == "br":
                self.pre.append("\n")
            return
        if tag == "pre":
            self.pre, self.language = [], _language(named)
        elif tag in HEADINGS:
            self.break_line(2)
            self.say(HEADINGS[tag], begins=True)
        elif tag == "hr":
            self.break_line(2)
            self.say("---")
            self.break_line(2)
        elif tag in ("td", "th"):
            self.begin_cell()
        elif tag in PARAGRAPHS:
            self.break_line(1 if self.lists and tag in ("ul", "ol") else 2)
            if tag in ("ul", "ol"):
                self.lists.append(_start(named) if tag == "ol" else -1)
        elif tag in LINES:
            self.break_line(1, always=tag != "div")
            self.in_row = self.in_row and tag != "tr"
            if tag == "li":
                self.begin_item()
            elif tag == "dd":
                self.say("  ", begins=True)
        elif tag in CODE:
            self.say("`", begins=True)
        elif tag == "a" and _is_shown(named.get("href", "")):
            begins = self.at_start
            self.say("[", begins=True)
            self.links.append((len(self.out), named["href"], begins))
        elif tag == "img" and named.get("alt", "").strip():
            self.say(f"[image: {' '.join(named['alt'].split())}]")
        elif tag in ("sup", "sub"):
            self.say("^" if tag == "sup" else "_", begins=True)

    def handle_endtag(self, tag: str) -> None:
        if self.dropping:
            if tag == self.dropping[0]:
                self.dropping.pop()
            return
        if tag == "pre":
            self.end_pre()
        if self.pre is not None:
            return
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()
            self.break_line(1 if self.lists else 2)
        elif tag in PARAGRAPHS or tag in HEADINGS:
            self.break_line(2)
        elif tag in LINES:
            self.break_line(1, always=tag != "div")
        elif tag in CODE:
            self.out.append("`")
        elif tag == "a" and self.links:
            start, href, began = self.links.pop()
            if len(self.out) > start:
                self.out.append(f"]({href})")
            else:
                self.out[start - 1 :] = []
                self.at_start = began

    def handle_data(self, data: str) -> None:
        if self.dropping:
            return
        if self.pre is not None:
            self.pre.append(data)
            return
        words = data.split()
        if words:
            self.space = self.space or data[0].isspace()
            self.say(" ".join(words))
        self.space = self.space or data[-1:].isspace()

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Where <![ ends: browsers take it for a comment, the base class would raise."""
        return self.rawdata.find(">", i) + 1 or -1

    # ---- what is written -----------------------------------------------------------------------------------------

    def say(self, text: str, begins: bool = False) -> None:
        """Writes text after the line ends or the blank that are due; with begins, what follows is still a start."""
        if self.gap and self.out:
            self.out.append("\n" * self.gap)
        elif self.space and not self.at_start:
            self.out.append(" ")
        self.out.append(text)
        self.gap, self.space, self.at_start = 0, False, begins

    def break_line(self, n: int, always: bool = False) -> None:
        """At least n line ends come next; only `always` if a cell or an item has just begun."""
        if always or not (self.at_start and self.gap == 0):
            self.gap = max(self.gap, n)
            self.at_start = True

    def begin_item(self) -> None:
        mark = "- "
        if self.lists and self.lists[-1] >= 0:
            self.lists[-1] += 1
            mark = f"{self.lists[-1]}. "
        self.say("  " * (len(self.lists) - 1) + mark, begins=True)

    def begin_cell(self) -> None:
        if self.in_row:
            self.gap, self.space = 0, False
            self.say(" | ", begins=True)
        else:
            self.break_line(1)
            self.say("", begins=True)  # the line is this cell's, whatever comes
        self.in_row = True

    def end_pre(self) -> None:
        if self.pre is None:
            return
        code, self.pre = "".join(self.pre).strip("\n"), None
        if code.strip():
            longest = max((len(run) for run in re.findall("`+", code)), default=0)
            fence = "`" * max(3, longest + 1)
            self.break_line(2)
            self.say(f"{fence}{self.language}\n{code}\n{fence}")
            self.break_line(2)


def _language(attributes: dict[str, str]) -> str:
    found = re.search(r"\b(?:language|lang)-([\w+#-]+)", attributes.get("class", ""))
    return found[1] if found else ""


def _start(attributes: dict[str, str]) -> int:
    """The number before that of an ordered list's first item."""
    start = attributes.get("start", "")
    return int(start) - 1 if re.fullmatch("[1-9][0-9]{0,8}", start) else 0


def _is_shown(href: str) -> bool:
    kind = re.match(r"([a-zA-Z][\w+.-]*):", href)
    return 0 < len(href) <= MAX_LINK and href[0] != "#" and (not kind or kind[1].lower() in ("http", "https", "mailto"))


def main() -> None:
    """The program."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    limit = CPU_SECONDS if hard == resource.RLIM_INFINITY else min(CPU_SECONDS, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    sys.stdout.buffer.write(text_of(sys.stdin.buffer.read().decode()).encode())


if __name__ == "__main__":
    main()
