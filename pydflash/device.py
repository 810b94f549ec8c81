"""Devices: what there is to run on, and what "auto" means on this machine."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

from pydflash._lib import check, ffi, lib
from pydflash.options import one_of

DEVICES = ("auto", "cpu", "cuda")

_told = threading.Event()  # what keeps "auto" off the GPU is said once in a process


@dataclass(frozen=True)
class DeviceInfo:
    """A device, as `device_info` found it.

    kind: "cpu" or "cuda".
    name: as its maker calls it.
    n_bytes, n_free: its memory, and what of it is free now, in bytes.
    why_cpu: for "auto" that stands for the CPU though a CUDA backend is installed: why, with the loader's own words.
    """

    kind: str
    name: str
    n_bytes: int
    n_free: int
    why_cpu: str


def device_info(device: str = "auto") -> DeviceInfo:
    """The device that "auto", "cpu" or "cuda" stands for on this machine.

    "cuda" is the first CUDA device, of those that CUDA_VISIBLE_DEVICES leaves. "auto" is "cuda" where that can be had,
    and "cpu" elsewhere. Raises ArgumentError for another name, DeviceError when "cuda" cannot be had, with the reason.
    """
    one_of("device", device, DEVICES)
    info = ffi.new("pf_device_info *", {"size": ffi.sizeof("pf_device_info")})
    check(lib.pf_device_get_info(device.encode(), info))
    return DeviceInfo(
        kind="cuda" if info.is_cuda else "cpu",
        name=ffi.string(info.name).decode("utf-8", "replace"),
        n_bytes=int(info.n_bytes),
        n_free=int(info.n_free),
        why_cpu=ffi.string(info.why_cpu).decode("utf-8", "replace"),
    )


def choose(device: str) -> str:
    """The kind that a name stands for; warns, once in a process, when "auto" cannot use the CUDA backend there is."""
    info = device_info(device)
    if info.why_cpu and not _told.is_set():
        _told.set()
        warnings.warn(f"device 'auto' is the CPU: {info.why_cpu}", RuntimeWarning, stacklevel=4)
    return info.kind
