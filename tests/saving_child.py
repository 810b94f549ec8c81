"""Programs that save sessions, to be killed, limited, or given a disk of their own.

saving_child.py TARGET FILE kill N: forks savers and kills each at a random moment. Each time FILE must be the last
    session that was finished, or the one after it. Prints in how many cases a half-written one lay beside it.
saving_child.py TARGET FILE full: saves a short session, then one that does not fit. Prints the error.
saving_child.py TARGET FILE limit: the same, with a limit on the size of files instead of a full disk.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pydflash
from pydflash import Session


def load(path: Path) -> list[int]:
    """The tokens of a saved session, whose conversation must be of the same save."""
    with Session.load(path, n_threads=1) as session:
        assert session.messages == [{"role": "user", "content": str(session.n_tokens)}]
        return session.tokens


def kill(session: Session, path: Path, n: int) -> dict[str, object]:
    """A saver's sessions grow by a token a save, so that the number of tokens says which one a file is."""
    rng = random.Random(1)
    ids = [rng.randrange(280) for _ in range(5000)]

    def save(n_tokens: int) -> None:
        session.append(ids[session.n_tokens : n_tokens])
        session.messages = [{"role": "user", "content": str(n_tokens)}]
        session.save(path)

    session.append(ids[:199])
    save(200)
    found, n_middle = ids[:200], 0
    for _ in range(n):
        started, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for n_tokens in range(201, 5000):
                    os.write(say, b"s")
                    save(n_tokens)
            finally:
                os._exit(1)
        os.close(say)
        latest = 200 + len(os.read(started, 1))  # it has begun
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the saver ended by itself"
        latest += len(os.read(started, 5000))
        os.close(started)
        before = len(found) if latest == 201 else latest - 1
        found = load(path)
        assert found == ids[: len(found)]
        assert len(found) in (before, latest), f"{len(found)} tokens found, {latest} were being saved after {before}"
        n_middle += any(name.endswith(".tmp") for name in os.listdir(path.parent))
    save(201)
    return {"middle": n_middle, "files": os.listdir(path.parent)}


def full(session: Session, path: Path) -> dict[str, object]:
    def save(n_tokens: int) -> None:
        session.append([1] * (n_tokens - session.n_tokens))
        session.messages = [{"role": "user", "content": str(n_tokens)}]
        session.save(path)

    save(5)
    try:
        save(500)
        error = None
    except pydflash.SessionFileError as caught:
        error = str(caught)
    assert session.n_tokens == 500
    return {"error": error, "tokens": len(load(path)), "files": os.listdir(path.parent)}


def main(target: str, path: Path, what: str, *n: str) -> None:
    with Session(target, kv_type="f16", n_threads=1) as session:
        if what == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
        print(json.dumps(kill(session, path, int(n[0])) if what == "kill" else full(session, path)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
