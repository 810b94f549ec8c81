"""Documents, from files to the text that a model reads: plain text of any kind, HTML, PDF, and folders of them.

What cannot be read is refused with a sentence; in a folder it is left out, and counted. Nothing is guessed from a
file's name but HTML (.html, .htm, .xhtml): a PDF is what begins as one, text is what is none of the known binary
formats and decodes: UTF-8, with or without a byte-order mark; UTF-16 or UTF-32 with one; else, when no more than a
quarter of it is outside ASCII, Windows-1252. A few broken bytes in UTF-8 become U+FFFD. Line ends become newlines.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydflash._gitignore import GitIgnore
from pydflash.errors import DocumentError, checked_path

MAX_TEXT = 64 << 20  # bytes: over ten million tokens, more than any context
MAX_PDF = 1 << 30  # bytes
MAX_FILES = 20_000  # of a folder
VENDORED = frozenset(
    ("__pycache__", "bower_components", "node_modules", "site-packages", "third_party", "vendor", "venv")
)
GENERATED = re.compile(r".*(\.min\.(js|css)|\.(js|css)\.map|-lock\.(json|yaml)|\.lock|\.lockb)|go\.sum", re.IGNORECASE)
HTML = (".html", ".htm", ".xhtml")
BINARY = (  # how files begin that somebody may take for documents
    (b"PK\x03\x04", "a ZIP archive, as Word, Excel, OpenDocument and EPUB files are; save it as PDF or plain text"),
    (b"\xd0\xcf\x11\xe0", "an Office file of the old format; save it as PDF or plain text"),
    (b"{\\rtf", "an RTF file; save it as PDF or plain text"),
    (b"GGUF", "a GGUF model; it is opened with Session(target) or --target"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)
# Neither the working folder nor ours may come first on the path of our programs: they could hide other modules.
START = """
import sys
sys.path = [entry for entry in sys.path if entry]
import runpy
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class Document:
    """One document.

    name: its file name; of a file in a folder the path from that folder on, with slashes.
    text: what it says; the pages of a PDF each begin with a line "[page 3]".
    n_pages: of a PDF, else None.
    """

    name: str
    text: str
    n_pages: int | None = None

    def as_prompt(self) -> str:
        """The document as a model is given it, its name first:

            <document name="report.pdf" pages="12">
            [page 1]
            …
            </document>

        The text stands there to the letter. So that neither a name nor a text can pass for another document, the name
        is escaped as in XML, what is unprintable in it as in Python, and where the text has such a tag itself, the
        outer one gets a number that the text does not have: <document-2 …> … </document-2>.
        """
        tag, n = "document", 1
        while re.search(rf"<\s*/?\s*{tag}", self.text, re.IGNORECASE):
            n += 1
            tag = f"document-{n}"
        name = _printable(self.name)
        for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
            name = name.replace(character, escaped)
        pages = "" if self.n_pages is None else f' pages="{self.n_pages}"'
        end = "" if self.text.endswith("\n") else "\n"
        return f'<{tag} name="{name}"{pages}>\n{self.text}{end}</{tag}>\n'


class Documents(list[Document]):
    """A list of documents that also says what it lacks.

    skipped: how many files (links, folders) were left out, by reason: "hidden", "ignored" (by a .gitignore), "vendored"
    (folders such as node_modules), "generated" (lock files, minified scripts), "link", "special", and the reasons of
    DocumentError: "empty", "binary", "encrypted", ….
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: Counter[str] = Counter()


def read_documents(path: str | os.PathLike[str]) -> Documents:
    """The documents at `path`: one for a file, all that can be read for a folder, in the order of their names, a
    folder's own files before its subfolders.

    Symbolic links inside a folder are not followed.

    Raises DocumentError where there is nothing to read; its `reason` says why in a word.
    """
    root = checked_path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(root).st_mode)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    documents = Documents()
    if not is_folder:
        documents.append(_read_file(root, _printable(root.name)))
        return documents
    n_left = MAX_TEXT
    for file, name in _walk(root, documents.skipped):
        try:
            document = _read_file(file, name)
        except DocumentError as error:
            if error.reason == "package":
                raise
            documents.skipped[error.reason] += 1
            continue
        documents.append(document)
        n_left -= len(document.text)
        if n_left < 0:
            raise _refused(
                root,
                "large",
                f"holds over {MAX_TEXT:,} characters of text, more than any context; give a smaller folder",
            )
    if not documents:
        left_out = ", ".join(f"{n} {reason}" for reason, n in documents.skipped.items())
        raise _refused(
            root, "empty", f"has no file in it that can be read{f' (left out: {left_out})' if left_out else ''}"
        )
    return documents


# ---- folders -----------------------------------------------------------------------------------------------------


def _walk(root: Path, skipped: Counter[str]) -> Iterator[tuple[Path, str]]:
    """The files of a folder that are worth reading, each with the name of its document."""
    n_files = 0
    top = _printable(root.resolve().name)
    # A folder, its name, its names from the root on, and the .gitignores above it with their depths. No recursion:
    # paths can be deeper than Python's stack.
    folders: list[tuple[Path, str, tuple[str, ...], tuple[tuple[int, GitIgnore], ...]]] = [(root, top, (), ())]
    while folders:
        folder, name, parts, ignores = folders.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise _unreadable(root, error) from None
            skipped["unreadable"] += 1
            continue
        if any(entry.name == ".gitignore" for entry in entries):
            try:
                rules = _decoded(_read_bytes(folder / ".gitignore", MAX_TEXT), folder)
                ignores = (*ignores, (len(parts), GitIgnore(rules)))
            except DocumentError:  # then it says nothing
                pass
        inner = []
        for entry in entries:
            try:
                is_link, is_folder, is_file = entry.is_symlink(), entry.is_dir(follow_symlinks=False), entry.is_file()
            except OSError:
                skipped["unreadable"] += 1
                continue
            here = (*parts, entry.name)
            reason = ""
            if entry.name.startswith("."):
                reason = "hidden"
            elif is_link:
                reason = "link"
            elif is_folder and entry.name in VENDORED:
                reason = "vendored"
            elif _is_ignored(here, is_folder, ignores):
                reason = "ignored"
            elif not is_folder and not is_file:
                reason = "special"
            elif is_file and GENERATED.fullmatch(entry.name):
                reason = "generated"
            if reason:
                skipped[reason] += 1
                continue
            path, document = folder / entry.name, f"{name}/{_printable(entry.name)}"
            if is_folder:
                inner.append((path, document, here, ignores))
                continue
            n_files += 1
            if n_files > MAX_FILES:
                raise _refused(root, "large", f"has over {MAX_FILES:,} files in it; give a smaller folder")
            yield path, document
        folders.extend(reversed(inner))


def _is_ignored(parts: tuple[str, ...], is_folder: bool, ignores: tuple[tuple[int, GitIgnore], ...]) -> bool:
    for depth, rules in reversed(ignores):  # the nearest decides
        said = rules.says("/".join(parts[depth:]), is_folder)
        if said is not None:
            return said
    return False


# ---- files -------------------------------------------------------------------------------------------------------


def _read_file(path: Path, name: str) -> Document:
    start = _read_bytes(path, 1024, only_start=True)
    if start.startswith(b"%PDF-") or (path.suffix.lower() == ".pdf" and b"%PDF-" in start):
        return _read_pdf(path, name)
    if path.suffix.lower() == ".pdf":
        raise _refused(
            path, "damaged" if start else "empty", "is no PDF: it does not begin as one" if start else "is empty"
        )
    data = _read_bytes(path, MAX_TEXT)
    text = _decoded(data, path)
    if path.suffix.lower() in HTML:
        text = _html_text(path, text)
    if not text.strip():
        raise _refused(path, "empty", "has no text in it" if data else "is empty")
    return Document(name, text)


def _read_pdf(path: Path, name: str) -> Document:
    with _opened(path, MAX_PDF) as file:
        output = _program("_pdf.py", [str(MAX_TEXT)], path, stdin=file)
    found: dict[str, Any] = json.loads(output)
    if "error" in found:
        raise _refused(path, found["error"], found["detail"])
    pages: list[str | None] = found["pages"]
    if not pages:
        raise _refused(path, "empty", "has no pages")
    if all(page is None for page in pages):
        raise _refused(path, "damaged", f"is not a sound PDF: none of its {len(pages):,} pages can be read")
    if not any(page and page.strip() for page in pages):
        raise _refused(
            path,
            "scanned",
            f"holds no text on its {len(pages):,} pages: if they are scanned, have their text recognised first, as "
            "ocrmypdf does",
        )
    texts = ("(this page cannot be read)" if page is None else _newlines(page).strip("\n") for page in pages)
    text = "\n\n".join(f"[page {n}]\n{page}".rstrip("\n") for n, page in enumerate(texts, 1))
    return Document(name, text, len(pages))


def _html_text(path: Path, page: str) -> str:
    return _program("_html.py", [], path, input=page.encode()).decode()


def _program(program: str, arguments: list[str], path: Path, **streams: Any) -> bytes:
    """What one of our programs prints; each limits its own time and memory."""
    script = Path(__file__).with_name(program)
    try:
        done = subprocess.run(
            [sys.executable, "-c", START, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            **streams,
        )
    except OSError as error:
        python = sys.executable or "Python"
        raise _refused(
            path, "unreadable", f"cannot be read, since {python} cannot be started: {error.strerror}"
        ) from None
    if done.returncode:
        raise _refused(path, "damaged", "cannot be read: it takes too much time or memory")
    return bytes(done.stdout)


def _opened(path: Path, limit: int) -> IO[bytes]:
    """A regular file of a plausible size."""
    try:
        # A pipe without a writer would block here otherwise.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise _refused(path, "special", "is no regular file")
    if found.st_size > limit:
        file.close()
        raise _too_large(path, limit)
    return file


def _read_bytes(path: Path, limit: int, only_start: bool = False) -> bytes:
    with _opened(path, sys.maxsize if only_start else limit) as file:
        try:
            data = file.read(limit if only_start else limit + 1)
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


# ---- text --------------------------------------------------------------------------------------------------------


def _decoded(data: bytes, path: Path) -> str:
    for start, what in BINARY:
        if data.startswith(start):
            raise _refused(path, "binary", f"is {what}")
    for mark, encoding in MARKS:
        if data.startswith(mark):
            try:
                return _checked(data[len(mark) :].decode(encoding), path)
            except UnicodeDecodeError as error:
                raise _refused(
                    path, "encoding", f"begins as {encoding.upper()} does but is not, from byte {error.start:,} on"
                ) from None
    if b"\0" in data:
        raise _refused(path, "binary", f"is no text: byte {data.index(0):,} is zero")
    try:
        return _checked(data.decode(), path)
    except UnicodeDecodeError as error:
        first = error
    declared = re.search(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?([\w.:-]{1,40})", data[:2048], re.IGNORECASE)
    if declared and path.suffix.lower() in HTML:
        try:
            # Browsers take Latin-1 for Windows-1252.
            name = codecs.lookup(declared[1].decode()).name
            return _checked(data.decode("cp1252" if name in ("iso8859-1", "ascii") else name), path)
        except (LookupError, UnicodeError):
            pass
    repaired = data.decode(errors="replace")
    n_broken = repaired.count("\N{REPLACEMENT CHARACTER}")
    if sum(character > "\x7f" for character in repaired) > 2 * n_broken:
        return _checked(repaired, path)
    if 4 * sum(byte > 0x7F for byte in data) <= len(data):
        try:
            return _checked(data.decode("cp1252"), path)
        except UnicodeDecodeError:
            pass
    raise _refused(path, "encoding", f"is not UTF-8 (byte {first.start:,} cannot be); convert it, as iconv does")


def _checked(text: str, path: Path) -> str:
    """The text with newlines, refused where it has more control characters than text has."""
    n_control = len(re.findall("[\x00-\x06\x0e-\x1a\x1c-\x1f]", text))
    if "\0" in text or 100 * n_control > len(text):
        raise _refused(path, "binary", "is no text: it is full of control characters")
    return _newlines(text)


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _printable(name: str) -> str:
    """A name on one line that any terminal and any encoding can show."""
    name = os.fsencode(name).decode(errors="backslashreplace") if _has_surrogates(name) else name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _has_surrogates(name: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in name)


# ---- sentences ---------------------------------------------------------------------------------------------------


def _refused(path: Path, reason: str, what: str) -> DocumentError:
    return DocumentError(f"{_printable(str(path))} {what}", reason=reason, path=path)


def _too_large(path: Path, limit: int) -> DocumentError:
    return _refused(path, "large", f"is larger than {limit >> 20:,} MiB, more text than any context holds")


def _unreadable(path: str | os.PathLike[str], error: Exception) -> DocumentError:
    name = _printable(os.fspath(path))
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR):
        return DocumentError(f"{name} does not exist", reason="missing", path=path)
    why = error.strerror if isinstance(error, OSError) else str(error)
    return DocumentError(f"{name} cannot be read: {why}", reason="unreadable", path=path)
