"""How much memory a session will take, from the headers of its files: nothing is loaded and no GPU is needed.

    plan = pydflash.plan("target.gguf", "draft.gguf", n_ctx=131072, kv_type="q4_0", budget=22, vram="24GiB")
    print(plan)                    # a table
    plan.mib["KV cache"], plan.total, plan.left

Caches and compute buffers are measured by ggml's own allocator over the real graphs, and are what a session then
allocates, to the byte. What can't be measured without the device is marked as assumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydflash import options
from pydflash._handles import Models, PathLike, draft_file, target_file
from pydflash._lib import check, ffi, lib
from pydflash.device import DEVICES, choose
from pydflash.errors import ArgumentError, checked_options
from pydflash.options import Budget, KvType

MIB = 1 << 20
_UNITS = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "kib": 2**10, "m": 1e6, "mb": 1e6, "mib": 2**20, "g": 1e9, "gb": 1e9,
          "gib": 2**30}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of a plan.

    kind: "measured" and "assumed" rows make up the total; "aside" rows do not: a graph's share of the compute buffer,
        what lies in the memory of another device.
    """

    name: str
    n_bytes: int
    kind: Literal["measured", "assumed", "aside"]

    @property
    def mib(self) -> float:
        """The same in MiB."""
        return self.n_bytes / MIB


@dataclass(frozen=True)
class Plan:
    """What a session takes. Sizes without a unit in their name are MiB; str() is a table.

    n_ctx, kv_type: as asked for, or as chosen where that was left open.
    free: what there is to fit into, the model's own weights included. left: what would remain of it.
    advice: what would fit, when this does not.
    """

    device: str
    n_ctx: int
    kv_type: tuple[str, str]
    n_batch: int
    n_ring: int
    budget: int
    rows: tuple[Row, ...]
    total: float
    free: float
    fits: bool
    advice: str

    @property
    def mib(self) -> dict[str, float]:
        """MiB by row."""
        return {row.name: row.mib for row in self.rows}

    @property
    def left(self) -> float:
        """MiB of `free` that remain."""
        return self.free - self.total

    def as_dict(self) -> dict[str, Any]:
        """MiB by row with total, free and left, and the settings, as JSON takes them."""
        settings = ("device", "n_ctx", "kv_type", "n_batch", "n_ring", "budget", "fits", "advice")
        figures = self.mib | {"total": self.total, "free": self.free, "left": self.left}
        everything = asdict(self)
        return {
            **{name: round(value, 3) for name, value in figures.items()},
            "assumed": [row.name for row in self.rows if row.kind == "assumed"],
            "aside": [row.name for row in self.rows if row.kind == "aside"],
            "settings": {name: everything[name] for name in settings},
        }

    def __str__(self) -> str:
        notes = {"measured": "", "assumed": "assumed", "aside": "not counted"}
        lines = [(row.name, row.mib, notes[row.kind]) for row in self.rows]
        lines += [("total", self.total, ""), ("left", self.left, f"of {self.free:,.1f}")]
        head = (
            f"{self.device}, n_ctx {self.n_ctx}, kv_type {','.join(dict.fromkeys(self.kv_type))}, "
            f"n_batch {self.n_batch}, n_ring {self.n_ring}, budget {self.budget}"
        )
        width = max(len(name) for name, *_ in lines)
        table = [f"{name:{width}} {mib:12,.1f} MiB  {note}".rstrip() for name, mib, note in lines]
        return "\n".join([head, *table, *([self.advice] if self.advice else [])])


@checked_options
def plan(
    target: PathLike,
    draft: PathLike | None = None,
    *,
    n_ctx: int | None = None,
    kv_type: KvType = "auto",
    budget: Budget = "auto",
    n_batch: int = 512,
    n_ring: int = 4096,
    device: str = "auto",
    vram: int | str | None = None,
) -> Plan:
    """Plans the session that the same options would open, and opens none.

    target, draft, n_ctx, kv_type, budget, n_batch, n_ring: as for `Session`.
    device: "cpu", "cuda", or "auto": a CUDA card when vram is given, else what a session would take here.
    vram: plan for so much memory instead of what is free here: bytes, or text such as "24GiB" or "16000 MiB".

    A plan that does not fit is not an error: `fits` says so, `advice` what would. Raises ModelFileError,
    ModelFormatError, UnsupportedModelError, DraftMismatchError, DeviceError, ArgumentError.
    """
    free = 0 if vram is None else n_bytes("vram", vram)
    params = options.session_params(
        n_ctx=n_ctx, kv_type=kv_type, n_batch=n_batch, n_ring=n_ring, n_threads=None, budget=budget
    )
    options.one_of("device", device, DEVICES)
    if vram is None:
        device = choose(device)
    elif device == "auto":
        device = "cuda"
    draft = None if draft is None else draft_file(draft)
    return plan_pair(target_file(target), draft, params, device, free)


def plan_pair(target: Path, draft: Path | None, params: Any, device: str, free: int = 0) -> Plan:
    """Plans a session with the given pf_session_params on "cpu" or "cuda"; free 0: into what the device has free."""
    return plan_models(Models(target, draft, "cpu"), params, device, free)  # there opening reads headers alone


def plan_models(models: Models, params: Any, device: str, free: int = 0) -> Plan:
    """Plans a session on models that are open."""
    return read_plan(lambda out: lib.pf_plan_make(models.model, models.drafter, params, device.encode(), free, out))


def read_plan(fill: Callable[[Any], int]) -> Plan:
    """What a function of the core writes into a pf_plan."""
    p = ffi.new("pf_plan *", {"size": ffi.sizeof("pf_plan")})
    check(fill(p))
    kinds: dict[int, Literal["measured", "assumed", "aside"]] = {
        lib.PF_ROW_COUNTED: "measured",
        lib.PF_ROW_ASSUMED: "assumed",
        lib.PF_ROW_ASIDE: "aside",
    }
    rows = [p.rows[i] for i in range(p.n_rows)]
    return Plan(
        device="cuda" if p.on_cuda else "cpu",
        n_ctx=int(p.params.n_ctx),
        kv_type=(_type_name(p.params.type_k), _type_name(p.params.type_v)),
        n_batch=int(p.params.n_batch),
        n_ring=int(p.params.n_ring),
        budget=int(p.params.budget),
        rows=tuple(Row(_text(row.name), int(row.n_bytes), kinds[row.kind]) for row in rows),
        total=p.total / MIB,
        free=p.free / MIB,
        fits=bool(p.fits),
        advice=_text(p.advice),
    )


def n_bytes(name: str, value: int | str) -> int:
    """A size: a count of bytes, or text with a unit (KiB, MiB, GiB, or decimal kB, MB, GB)."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2].lower() in _UNITS:
            value = round(float(match[1]) * _UNITS[match[2].lower()])
        else:
            raise ArgumentError(
                f"{name} is {value!r}; it must be a size such as '24GiB', '16000MiB' or a count of bytes"
            )
    return options.integer(name, value, 1, 2**62)


def _text(value: Any) -> str:
    return str(ffi.string(value).decode("utf-8", "replace"))


def _type_name(kind: int) -> str:
    return _text(lib.pf_type_name(kind))
