#!/usr/bin/env python3
"""`pydflash run` from a checkout; see its --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind an installed pydflash

from pydflash.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
