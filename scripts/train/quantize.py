"""Stage 7: the Q4_K_M mix of the F16 target, made with pydflash's own quantiser.

    python scripts/train/quantize.py --source models/tiny-target-f16.gguf --out models/tiny-target-q4_k_m.gguf

Owns the choice of types, which follows llama.cpp's Q4_K_M: Q6_K for the output and for ffn_down, attn_v and attn_qkv of
half of the layers, Q4_K for the other matrices; norms, convolution, per-head vectors and the two narrow gates
(ssm_alpha, ssm_beta) stay as they are. Refuses rows that are no multiple of 256 values. Needs pydflash installed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import gguf
import numpy as np
from common import MODELS, log

from pydflash._lib import check, ffi, lib

KEEP = ("ssm_alpha.weight", "ssm_beta.weight", "ssm_conv1d.weight")
MORE = ("ffn_down.weight", "attn_v.weight", "attn_qkv.weight")
WRITER_KEYS = ("general.architecture", "general.file_type", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")


def more_bits(layer: int, n_layer: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2


def quantised_type(name: str, n_layer: int) -> gguf.GGMLQuantizationType:
    if name == "output.weight":
        return gguf.GGMLQuantizationType.Q6_K
    if name.endswith(MORE) and more_bits(int(name.split(".")[1]), n_layer):
        return gguf.GGMLQuantizationType.Q6_K
    return gguf.GGMLQuantizationType.Q4_K


def quantise(x: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """x [rows, n_per_row] f32 -> bytes [rows, row size]."""
    x = np.ascontiguousarray(x, np.float32)
    rows, n = x.shape
    size = lib.pf_row_size(int(kind), n)
    if size < 0:
        raise SystemExit(f"rows of {n} values cannot be {kind.name}: use a multiple of 256")
    out = np.empty((rows, size), np.uint8)
    check(
        lib.pf_quantize(
            int(kind),
            ffi.cast("float *", ffi.from_buffer(x)),
            n,
            rows,
            ffi.from_buffer(out, require_writable=True),
            out.nbytes,
        )
    )
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", type=Path, default=MODELS / "tiny-target-f16.gguf")
    p.add_argument("--out", type=Path, default=MODELS / "tiny-target-q4_k_m.gguf")
    a = p.parse_args()
    reader = gguf.GGUFReader(a.source)
    n_layer = reader.fields["qwen35.block_count"].contents()
    part = a.out.with_suffix(".part")
    w = gguf.GGUFWriter(part, "qwen35")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, field in reader.fields.items():
        if name not in WRITER_KEYS:
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            w.add_key_value(name, field.contents(), field.types[0], sub)
    for t in reader.tensors:
        if len(t.shape) == 2 and not t.name.endswith(KEEP):
            kind = quantised_type(t.name, n_layer)
            w.add_tensor(t.name, quantise(t.data.astype(np.float32), kind), raw_dtype=kind)
        else:
            w.add_tensor(t.name, np.array(t.data))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(part, a.out)
    log(f"wrote {a.out}, {a.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
