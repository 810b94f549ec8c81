"""A z-lab drafter folder (config.json and model.safetensors) into one GGUF file.

pydflash convert Qwen3.5-27B-DFlash/ draft.gguf --type q8_0
"""

from __future__ import annotations

import argparse

HELP = "a z-lab drafter folder into a GGUF file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this command: those of `python -m pydflash.convert`."""
    from pydflash import convert

    convert.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Writes the file."""
    from pydflash import convert

    return convert.run(options)
