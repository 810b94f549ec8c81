"""`python -m pydflash`, and `pydflash` where the package is installed: the command line, which `cli` owns."""

import sys

from pydflash.cli import main

if __name__ == "__main__":
    sys.exit(main())
