"""A GGUF runtime for hybrid Qwen3.5 targets with DFlash drafting and DDTree verification.

with pydflash.Session() as session:
    print(session.generate("def fibonacci(n):").text)
"""

from pydflash._timeline import Progress
from pydflash.device import DeviceInfo, device_info
from pydflash.errors import (
    ArgumentError,
    ContextFullError,
    DeviceError,
    DocumentError,
    DraftMismatchError,
    HubError,
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
from pydflash.results import Chunk, Costs, Result, Stats, TokenLogprob
from pydflash.sampling import Sampling
from pydflash.session import Checkpoint, Session
from pydflash.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Checkpoint",
    "Chunk",
    "ContextFullError",
    "Costs",
    "DeviceError",
    "DeviceInfo",
    "DocumentError",
    "DraftMismatchError",
    "HubError",
    "InternalError",
    "ModelFileError",
    "ModelFormatError",
    "OutOfMemoryError",
    "Plan",
    "Progress",
    "PydflashError",
    "Result",
    "Sampling",
    "Session",
    "SessionFileError",
    "StateError",
    "Stats",
    "TokenLogprob",
    "Tokenizer",
    "UnknownOptionError",
    "UnsupportedModelError",
    "device_info",
    "plan",
]
