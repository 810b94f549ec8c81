"""One of two programs that share a folder of documents.

sharing_child.py TARGET DRAFT FOLDER SECONDS SEED: reads eight documents in a random order, in a folder with room for
three, and goes on from each with the tokens that a session without a folder says. Prints how often a document was found
and how often it was not, and the folder's limit in bytes. Whatever else happens, a line in the log among it, ends it
with status 1.
"""

from __future__ import annotations

import logging
import sys
import time

import numpy as np

from pydflash import Session


class Raises(logging.Handler):
    """A warning is a failure."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


def main(target: str, draft: str, folder: str, seconds: float, seed: int) -> None:
    logging.getLogger("pydflash").addHandler(Raises(logging.WARNING))
    documents = [np.random.default_rng(i).integers(0, 280, 130 + i).tolist() for i in range(8)]
    options = {"kv_type": "f32", "n_threads": 1, "n_batch": 64, "checkpoint_every": 64}
    with Session(target, draft, **options) as session:
        expected = [session.generate(ids, max_tokens=6, ignore_eos=True).ids for ids in documents]
        size = int(3.2 * session.save(f"{folder}/{seed}.size"))
    rng = np.random.default_rng(100 + seed)
    found = [0, 0]
    end = time.monotonic() + seconds
    with Session(target, draft, cache_dir=folder, cache_size=size, **options) as session:
        while time.monotonic() < end or min(found) == 0:
            i = int(rng.integers(8))
            session.reset()
            result = session.generate(documents[i], max_tokens=6, ignore_eos=True)
            assert result.ids == expected[i]
            found[0 if result.cached_tokens else 1] += 1
    print(*found, size)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
