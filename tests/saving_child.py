"""The children of test_container: run as programs, so that they can be killed, limited and given a disk of their own.

saving_child.py kill FILE N     forks savers and kills each at a random moment; each time FILE must be one that a saver
                                had finished, or the one it was at, whole. Prints how many it caught in the middle.
saving_child.py full FILE       saves a small file, then one that does not fit; prints the error and what is left.
saving_child.py limit FILE      the same, with a limit on the size of files instead of a full disk.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pydflash import _container
from pydflash.errors import SessionFileError

SIZES = {"kv": 300_000, "state": 5_000, "empty": 0}


def content(generation: int, name: str) -> bytes:
    return random.Random(f"{generation} {name}").randbytes(SIZES[name])


def save(path: Path, generation: int, pause: float = 0) -> None:
    def blocks(name: str) -> Iterator[bytes]:
        whole = content(generation, name)
        for start in range(0, len(whole), 50_000):
            time.sleep(pause)
            yield whole[start : start + 50_000]

    sections = [_container.NewSection(name, size, blocks(name)) for name, size in SIZES.items()]
    _container.write(path, {"generation": generation}, sections)


def load(path: Path) -> int:
    """The generation of a file, all of which must be of that one."""
    with _container.Container(path) as file:
        file.verify()
        generation = int(file.meta["generation"])
        for name in SIZES:
            assert file.read(name, at_most=10**6) == content(generation, name)
        return generation


def kill(path: Path, n: int) -> None:
    rng = random.Random(1)
    save(path, 0)
    generation = n_middle = 0
    for _ in range(n):
        started, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                while True:
                    generation += 1
                    os.write(say, b"s")
                    save(path, generation, pause=0.0005)
            finally:
                os._exit(1)
        os.close(say)
        latest = generation + len(os.read(started, 1))  # it has begun
        time.sleep(rng.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the saver ended by itself"
        latest += len(os.read(started, 1000))
        os.close(started)
        found = load(path)
        assert found in (latest - 1, latest), f"{found} was found, {latest} was being saved"
        n_middle += any(name.endswith(".tmp") for name in os.listdir(path.parent))
        generation = found
    save(path, generation + 1)
    print(json.dumps({"middle": n_middle, "files": os.listdir(path.parent)}))


def full(path: Path) -> None:
    SIZES["kv"] = 10_000
    save(path, 1)
    SIZES["kv"] = 5_000_000
    try:
        save(path, 2)
        error = None
    except SessionFileError as caught:
        error = str(caught)
    SIZES["kv"] = 10_000
    print(json.dumps({"error": error, "generation": load(path), "files": os.listdir(path.parent)}))


def limit(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    full(path)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        {"full": full, "limit": limit}[sys.argv[1]](Path(sys.argv[2]))
