"""Graphs of single ggml ops, computed by our fork's own shared libraries through ctypes.

Owns the few dozen ggml functions that the op tests and the op benchmark call, and the life of one graph. It refuses
nothing: arguments go to ggml as they are, and ggml aborts the process on operands it does not accept.

Arrays are numpy's; a tensor's shape is the array's reversed (ne order, first dimension contiguous).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import gguf
import numpy as np

NUMPY_TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 26: np.dtype(np.int32)}  # by ggml_type
GGML_TYPES = {dtype: number for number, dtype in NUMPY_TYPES.items()}
CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU

Pointer = ctypes.c_void_p
Size = ctypes.c_size_t
Int64 = ctypes.c_int64


class TensorHead(ctypes.Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", Pointer),
        ("ne", Int64 * 4),
        ("nb", Size * 4),
    )


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", Size), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (Pointer, [InitParams]),
    "ggml_free": (None, [Pointer]),
    "ggml_nbytes": (Size, [Pointer]),
    "ggml_new_tensor": (Pointer, [Pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(Int64)]),
    "ggml_view_4d": (Pointer, [Pointer, Pointer, *[Int64] * 4, *[Size] * 4]),
    "ggml_new_graph_custom": (Pointer, [Pointer, Size, ctypes.c_bool]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_backend_dev_init": (Pointer, [Pointer, Pointer]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [Pointer, Pointer]),
    "ggml_backend_free": (None, [Pointer]),
    "ggml_backend_alloc_ctx_tensors": (Pointer, [Pointer, Pointer]),
    "ggml_backend_buffer_free": (None, [Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_tensor_get": (None, [Pointer, Pointer, Size, Size]),
    "ggml_backend_graph_compute": (ctypes.c_int, [Pointer, Pointer]),
    "ggml_backend_reg_dev_count": (Size, [Pointer]),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, Size]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, ctypes.c_char_p]),
    "ggml_mul_mat": (Pointer, [Pointer] * 3),
    "ggml_flash_attn_ext": (Pointer, [*[Pointer] * 5, *[ctypes.c_float] * 3]),
    "ggml_gated_delta_net": (Pointer, [*[Pointer] * 7, Int64]),
    "ggml_ssm_conv_tree": (Pointer, [Pointer] * 5),
    "ggml_ssm_conv_tree_persist": (Pointer, [Pointer] * 4),
    "ggml_gated_delta_net_tree": (Pointer, [Pointer] * 8),
    "ggml_gated_delta_net_tree_out": (Pointer, [Pointer] * 2),
    "ggml_gated_delta_net_tree_delta": (Pointer, [Pointer] * 2),
    "ggml_gated_delta_net_tree_persist": (Pointer, [Pointer] * 6),
    "ggml_tree_mask": (Pointer, [*[Pointer] * 3, Int64]),
    "ggml_block_mask": (Pointer, [*[Pointer] * 2, *[Int64] * 4, ctypes.c_bool]),
    "ggml_top_k_logp": (Pointer, [*[Pointer] * 2, ctypes.c_int]),
}


def library_folder() -> Path:
    """Where the installed `_pydflash` keeps the shared libraries. Nothing of it is imported."""
    spec = importlib.util.find_spec("_pydflash")
    if spec is None or spec.origin is None:
        raise RuntimeError("_pydflash is not installed: run `pip install .`, or put a build folder on PYTHONPATH.")
    return Path(spec.origin).parent


class Ggml:
    """The fork and one backend: device "cpu" or "cuda", its first device."""

    def __init__(self, folder: Path | None = None, device: str = "cpu") -> None:
        folder = folder or library_folder()
        self._base = ctypes.CDLL(str(folder / "libpydflash-ggml-base.so"))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self._base, name)
            function.restype, function.argtypes = result, arguments
        loader = ctypes.CDLL(str(folder / "libpydflash-ggml.so"))
        loader.ggml_backend_load.restype, loader.ggml_backend_load.argtypes = Pointer, [ctypes.c_char_p]
        registry = None
        for kind in dict.fromkeys(("cpu", device)):  # the CPU's is always there, as in a session
            libraries = sorted(folder.glob(f"libpydflash-ggml-{kind}*.so"))
            registry = loader.ggml_backend_load(str(libraries[0]).encode()) if libraries else None
        if not registry or not self.call("ggml_backend_reg_dev_count", registry):
            raise RuntimeError(f"the backend {device!r} in {folder} is not there, cannot be loaded, or finds no device")
        self._registry = registry
        self.device = self.call("ggml_backend_reg_dev_get", registry, 0)
        self.backend = self.call("ggml_backend_dev_init", self.device, None)
        address = self.call("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_set_n_threads")
        self._set_n_threads = ctypes.CFUNCTYPE(None, Pointer, ctypes.c_int)(address) if address else None

    def call(self, name: str, *arguments: Any) -> Any:
        return getattr(self._base, name)(*arguments)

    def features(self) -> set[str]:
        """What the backend was compiled for, by ggml's names: "AVX2", "AVX512_VNNI"."""
        address = self.call("ggml_backend_reg_get_proc_address", self._registry, b"ggml_backend_get_features")
        if not address:
            return set()
        rows = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_char_p), Pointer)(address)(self._registry)
        found = set()
        while rows[0]:  # pairs of a name and a value, up to one of nulls
            found |= {rows[0].decode()} if rows[1] == b"1" else set()
            rows = ctypes.cast(ctypes.byref(rows.contents, 2 * ctypes.sizeof(Pointer)), type(rows))
        return found

    def set_n_threads(self, n_threads: int) -> None:
        """Of the CPU; a GPU has its own ideas."""
        if self._set_n_threads:
            self._set_n_threads(self.backend, n_threads)

    def graph(self) -> Graph:
        return Graph(self)


class Graph:
    """Tensors, ops over them, and one computation; free with `with`.

    Tensors are the addresses ggml returns. Everything lives in one buffer, so any tensor can be read after `compute`.
    """

    def __init__(self, ggml: Ggml, max_nodes: int = 256) -> None:
        self._ggml = ggml
        self._max_nodes = max_nodes
        self._context = ggml.call("ggml_init", InitParams(1 << 20, None, True))
        self._buffer: int | None = None
        self._inputs: list[tuple[int, np.ndarray]] = []

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._buffer:
            self._ggml.call("ggml_backend_buffer_free", self._buffer)
        self._ggml.call("ggml_free", self._context)

    def tensor(self, array: np.ndarray) -> int:
        """An input holding `array` (float32, float16 or int32)."""
        return self.packed(GGML_TYPES[array.dtype], array, *array.shape)

    def packed(self, ggml_type: int, raw: np.ndarray, *shape: int) -> int:
        """An input of any type and of `shape` values, given as its bytes."""
        ne = (Int64 * len(shape))(*reversed(shape))
        tensor = self._ggml.call("ggml_new_tensor", self._context, ggml_type, len(shape), ne)
        self._inputs.append((tensor, np.ascontiguousarray(raw)))
        return int(tensor)

    def view(self, source: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> int:
        """A view of `shape`, rows contiguous; strides of all dimensions but the last, and the offset, in bytes."""
        ne = [*reversed(shape), 1, 1, 1][:4]
        nb = list(reversed(strides))
        while len(nb) < 3:
            nb.append((nb[-1] if nb else 4 * ne[0]) * ne[len(nb)])
        return int(self._ggml.call("ggml_view_4d", self._context, source, *ne, *nb, offset))

    def op(self, name: str, *operands: Any) -> int:
        return int(self._ggml.call(name, self._context, *operands))

    def supported(self, tensor: int) -> bool:
        return bool(self._ggml.call("ggml_backend_dev_supports_op", self._ggml.device, tensor))

    def prepare(self, *outputs: int) -> Callable[[], None]:
        """Allocate, fill the inputs, build the graph of `outputs`; returns what computes it."""
        if self._buffer is None:
            self._buffer = self._ggml.call("ggml_backend_alloc_ctx_tensors", self._context, self._ggml.backend)
            for tensor, array in self._inputs:
                self._ggml.call("ggml_backend_tensor_set", tensor, array.ctypes.data, 0, array.nbytes)
        graph = self._ggml.call("ggml_new_graph_custom", self._context, self._max_nodes, False)
        for output in outputs:
            self._ggml.call("ggml_build_forward_expand", graph, output)

        def compute() -> None:
            status = self._ggml.call("ggml_backend_graph_compute", self._ggml.backend, graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

        return compute

    def compute(self, *outputs: int, n_threads: int = 1) -> None:
        self._ggml.set_n_threads(n_threads)
        self.prepare(*outputs)()

    def read(self, tensor: int, *shape: int) -> np.ndarray:
        """The contents of a tensor, strided or not, as an array of `shape`."""
        head = ctypes.cast(tensor, ctypes.POINTER(TensorHead)).contents
        raw = np.empty(self._ggml.call("ggml_nbytes", tensor), np.uint8)
        self._ggml.call("ggml_backend_tensor_get", tensor, raw.ctypes.data, 0, raw.nbytes)
        values = np.ndarray(tuple(head.ne)[::-1], NUMPY_TYPES[head.type], raw, 0, tuple(head.nb)[::-1])
        array: np.ndarray = values.reshape(shape).copy()
        return array


def assert_builder_aborts(script: str) -> None:
    """Runs Python that calls a builder of ggml-tree.c on operands it must refuse; sys.argv[1] is the library folder."""
    run = subprocess.run(
        [sys.executable, "-c", script, str(library_folder())],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else ggml starts a debugger on itself
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGABRT
    assert "ggml-tree.c" in run.stderr


def packed_cache(graph: Graph, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> tuple[int, np.ndarray]:
    """values [n_kv, head_kv, d] as a session keeps them, a row for every token: the tensor that attention is shown, and
    what it holds, [head_kv, n_kv, d]."""
    n_kv, n_head_kv, d = values.shape
    rows = gguf.quants.quantize(values.reshape(n_kv, n_head_kv * d), kind)
    tensor = graph.packed(kind, rows, n_kv, n_head_kv * d)
    strides = (rows.nbytes, rows[0].nbytes // n_head_kv, rows[0].nbytes)
    shown = graph.view(tensor, (1, n_head_kv, n_kv, d), strides, 0)
    return shown, gguf.quants.dequantize(rows, kind).reshape(values.shape).swapaxes(0, 1)
