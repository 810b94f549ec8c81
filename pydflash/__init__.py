"""A GGUF runtime for hybrid Qwen3.5 targets with DFlash drafting and DDTree verification.

with pydflash.Session() as session:
    print(session.generate("def fibonacci(n):").text)
"""

from pydflash.device import DeviceInfo, device_info
from pydflash.errors import (
    ArgumentError,
    ContextFullError,
    DeviceError,
    DraftMismatchError,
    InternalError,
    ModelFileError,
    ModelFormatError,
    OutOfMemoryError,
    PydflashError,
    SessionFileError,
    StateError,
    UnknownOptionError,
    UnsupportedModelError,
)
from pydflash.plan import Plan, plan
from pydflash.results import Chunk, Result, Stats
from pydflash.session import Session
from pydflash.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Chunk",
    "ContextFullError",
    "DeviceError",
    "DeviceInfo",
    "DraftMismatchError",
    "InternalError",
    "ModelFileError",
    "ModelFormatError",
    "OutOfMemoryError",
    "Plan",
    "PydflashError",
    "Result",
    "Session",
    "SessionFileError",
    "StateError",
    "Stats",
    "Tokenizer",
    "UnknownOptionError",
    "UnsupportedModelError",
    "device_info",
    "plan",
]
