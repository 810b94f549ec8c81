"""One of two processes that use one folder of documents at once.

sharing_child.py TARGET DRAFT FOLDER SECONDS SEED: prints how often it put, hit and missed; anything that is not as it
should be, a line in the log among it, ends it with status 1.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import numpy as np

from pydflash._handles import Models
from pydflash._lib import check, lib
from pydflash.document_cache import DocumentCache
from pydflash.store import Core, stored_bytes
from tests.test_timeline_core import Core as Timeline


class Raises(logging.Handler):
    """A warning is a failure."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


def main(target: Path, draft: Path, folder: Path, seconds: float, seed: int) -> None:
    logging.getLogger("pydflash").addHandler(Raises(logging.WARNING))
    pair = Models(target, draft, "cpu")
    line = Timeline(pair)
    core = Core(line.session, pair)
    documents = [np.random.default_rng(i).integers(0, 280, 100 + i).astype(np.int32) for i in range(8)]
    rows = []
    for ids in documents:
        line.reset()
        line.append(ids.tolist())
        rows.append(line.all())
    cache = DocumentCache(folder, 3 * stored_bytes(core, []) + 3 * 5 * 4096)
    rng = np.random.default_rng(100 + seed)
    counts = [0, 0, 0]
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(counts) == 0:
        i = int(rng.integers(8))
        saved = cache.restore(core, documents[i])
        counts[2 if saved is None else 1] += 1
        if saved is None:
            line.reset()
            check(lib.pf_session_append(line.session, documents[i].tolist(), len(documents[i])))
            assert cache.put(core, snapshots=[])
            counts[0] += 1
        else:
            assert line.all() == rows[i]
            saved.close()
    line.handles.free()
    print(*counts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
