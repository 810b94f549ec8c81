"""What the real CUDA backend says it can compute, asked without building it.

Owns the extraction of ggml-cuda's own supports_op, and of the functions that it asks, from our fork's sources into one
file that g++ compiles. It refuses a fork whose sources no longer hold them. The device is an RTX 3090 (harness.cpp).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.cuda_emulator import FLAGS, HERE, rewrite_common

# file: what of it is needed, each from its first line to the brace or semicolon that closes it at the line's start
NEEDED = {
    "fwht.cu": ["bool ggml_cuda_op_mul_mat_use_fwht("],
    "fattn.cu": [
        "enum best_fattn_kernel {",
        "static bool ggml_cuda_fattn_kv_type_supported(",
        "static best_fattn_kernel ggml_cuda_get_best_fattn_kernel(",
        "bool ggml_cuda_flash_attn_ext_supported(",
    ],
    "tree-ops.cu": ["static bool is_head_size(", "bool ggml_cuda_tree_op_supported("],
    "ggml-cuda.cu": ["static bool ggml_backend_cuda_device_supports_op("],
}

# What they use of the rest of ggml-cuda: none of it decides about an op of ours.
AROUND = """
#include "common.cuh"
#include "ggml-backend-impl.h"

struct ggml_backend_cuda_device_context { int device = 0; };
struct ggml_backend_cuda_buffer_type_context { int device = 0; };
static bool ggml_backend_buft_is_cuda(ggml_backend_buffer_type_t) { return false; }
static bool ggml_cuda_lightning_indexer_supported(int, const ggml_tensor *) { return false; }
static bool ggml_cuda_flash_attn_ext_mma_f16_may_use_sparse(int, int, int, int) { return false; }
static bool ggml_cuda_flash_attn_ext_mma_f16_shall_use_sparse(int, const ggml_tensor *, int, int) { return false; }

const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = [] {
        ggml_cuda_device_info i = {};
        i.devices[0].cc = 860;
        i.devices[0].smpb = 48 << 10;
        return i;
    }();
    return info;
}
int ggml_cuda_get_device() { return 0; }
"""

ENTRY = """
extern "C" bool cuda_supports_op(const ggml_tensor * op) {
    static ggml_backend_cuda_device_context context;
    static ggml_backend_device device = [] {
        ggml_backend_device d = {};
        d.context = &context;
        return d;
    }();
    return ggml_backend_cuda_device_supports_op(&device, op);
}
"""


def extract(text: str, start: str) -> str:
    found = re.findall(r"^" + re.escape(start) + r"[^;]*?\{\n(?:.*\n)*?\};?\n", text, flags=re.MULTILINE)
    if start.startswith("enum"):
        found = re.findall(r"^" + re.escape(start) + r"\n(?:.*\n)*?\};\n", text, flags=re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"{start!r} is in the fork {len(found)} times")
    return str(found[0])


def compile_object(fork: Path, folder: Path) -> Path:
    """An object file with `bool cuda_supports_op(const ggml_tensor *)`, of the fork laid out at `fork`."""
    cuda = fork / "src" / "ggml-cuda"
    stride = re.findall(r"^#define FATTN_KQ_STRIDE .*$", (cuda / "fattn-common.cuh").read_text(), flags=re.MULTILINE)
    parts = [AROUND, *stride]
    for name, starts in NEEDED.items():
        parts += [extract((cuda / name).read_text(), start) for start in starts]
    source = folder / "supports.cpp"
    source.write_text("\n".join([*parts, ENTRY]))
    (folder / "common.cuh").write_text(rewrite_common((cuda / "common.cuh").read_text()))
    includes = [folder, HERE / "include", fork / "include", fork / "src", cuda]
    command = ["g++", *FLAGS, "-DGGML_CUDA_NO_VMM", "-include", str(HERE / "include" / "cuda_runtime.h")]
    command += [*(f"-I{path}" for path in includes), "-c", str(source), "-o", str(folder / "supports.o")]
    subprocess.run(command, check=True)
    return folder / "supports.o"
