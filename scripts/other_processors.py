#!/usr/bin/env python3
"""The tests of kernels and models, with the CPU backend as it is compiled for other processors than this one.

    python scripts/other_processors.py                             # haswell, skylakex, x64
    python scripts/other_processors.py haswell --tests tests/test_equivalence.py -k greedy

Builds with PYDFLASH_PORTABLE in build/portable (nine minutes on two cores the first time, then what changed) and gives
the tests a package with only the named library: haswell is AVX2 with FMA and F16C, skylakex AVX-512 without VNNI and
BF16, x64 nothing beyond SSE2. Two minutes each, four for x64. A library that needs what this processor lacks is left
out, and said so. Further options are pytest's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "portable"
PREFIX = "libpydflash-ggml-cpu-"
PROCESSORS = ("haswell", "skylakex", "x64")
TESTS = (
    *("tree_ops", "step_ops", "attention", "weight_products", "weight_types", "number_formats"),
    *("oracle_target", "oracle_draft"),  # what they add up to
)


def main() -> int:
    about, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("processors", nargs="*", default=PROCESSORS, metavar="NAME", help="as ggml names its libraries")
    parser.add_argument("--tests", nargs="+", metavar="PATH", default=[f"tests/test_{name}.py" for name in TESTS])
    args, further = parser.parse_known_args()

    build()
    package = BUILD / "_pydflash"
    built = sorted(path.name[len(PREFIX) : -len(".so")] for path in package.glob(f"{PREFIX}*.so"))
    unknown = [name for name in args.processors if name not in built]
    if unknown:
        parser.error(f"there is no {' or '.join(unknown)}; ggml's names are {', '.join(built)}")

    failed = []
    for name in args.processors:
        library = f"{PREFIX}{name}.so"
        if not ctypes.CDLL(str(package / library)).ggml_backend_score():
            print(f"{name}: this processor lacks an instruction it needs; left out")
            continue
        folder = BUILD / f"only-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        others = [f"{PREFIX}{other}.so" for other in built if other != name]
        shutil.copytree(package, folder / "_pydflash", symlinks=True, ignore=shutil.ignore_patterns(*others))
        start = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *args.tests, *further],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        )
        print(f"{name}: exit code {run.returncode} after {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] if run.returncode else []
    return 1 if failed else 0


def build() -> None:
    configure = ["cmake", "--preset", "dev", "-B", str(BUILD), "-DPYDFLASH_PORTABLE=ON"]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
