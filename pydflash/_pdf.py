"""The text of a PDF, page by page: a program of its own, since a malformed PDF can keep its reader busy forever or fill
the memory. It imports nothing of pydflash, so that it starts quickly.

    PROGRAM MAX_CHARACTERS < FILE.pdf

It prints one JSON object: {"pages": [text or null where a page cannot be read, ...]}, or {"error": reason, "detail":
sentence part}, reason as in DocumentError. A page gets PAGE_SECONDS of processor time, all of them CPU_SECONDS; past
that, or past MEMORY bytes, the program ends without a word.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, BinaryIO

PAGE_SECONDS = 10.0
CPU_SECONDS = 600
MEMORY = 4 << 30
MAX_SLOW = 3  # pages; after that the file is to blame


class Slow(BaseException):
    """A page takes too long; no Exception, so that nobody on the way takes it for one of his own."""


def read(stream: BinaryIO, max_characters: int, page_seconds: float = PAGE_SECONDS) -> dict[str, Any]:
    """The object that is printed. Raises nothing that a file could bring about."""
    try:
        import pypdf
        from pypdf.errors import DependencyError, FileNotDecryptedError, WrongPasswordError
    except ImportError:
        return {"error": "package", "detail": "is a PDF, which needs a package more: run 'pip install pypdf'"}
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    pages: list[str | None] = []
    n_slow = n_characters = 0
    try:
        with limited(2 * page_seconds):
            reader = pypdf.PdfReader(stream)
            if reader.is_encrypted and not reader.decrypt(""):
                return {"error": "encrypted", "detail": "is protected by a password"}
            n_pages = len(reader.pages)
        for i in range(n_pages):
            try:
                with limited(page_seconds):
                    text = reader.pages[i].extract_text()
            except (DependencyError, FileNotDecryptedError):
                raise
            except Exception:  # pypdf raises its own errors, and whatever else a malformed page leads it into
                pages.append(None)
            except Slow:
                n_slow += 1
                if n_slow == MAX_SLOW:
                    return {"error": "damaged", "detail": f"has pages that take over {page_seconds:g} s to read"}
                pages.append(None)
            else:
                # Halves of surrogate pairs are put together; one without its other half is no character.
                pages.append(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", ""))
                n_characters += len(text)
                if n_characters > max_characters:
                    return {"error": "large", "detail": f"holds over {max_characters:,} characters"}
    except DependencyError:
        return {
            "error": "encrypted",
            "detail": "is encrypted with AES, which needs a package more: run 'pip install pypdf[crypto]'",
        }
    except (FileNotDecryptedError, WrongPasswordError):
        return {"error": "encrypted", "detail": "is protected by a password"}
    except MemoryError:
        return {"error": "damaged", "detail": "takes too much memory to read"}
    except Slow:
        return {"error": "damaged", "detail": f"takes over {2 * page_seconds:g} s to open"}
    except Exception as error:
        return {"error": "damaged", "detail": f"is not a sound PDF ({type(error).__name__}: {str(error)[:200]})"}
    return {"pages": pages}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Slow in the block after so many seconds of processor time; for the main thread."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Slow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main() -> None:
    """The program."""
    for kind, limit in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    found = read(sys.stdin.buffer, int(sys.argv[1]))
    sys.stdout.buffer.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
