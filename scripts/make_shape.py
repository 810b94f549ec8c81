#!/usr/bin/env python3
"""A GGUF pair with the exact shapes, types and metadata of a released model, and random weights.

    python scripts/make_shape.py --shape 27b --out shapes/27b            # 16.5 GB + 3.5 GB
    python scripts/make_shape.py --shape 27b --out shapes/27b --sparse   # the same headers over holes: planning only
    python scripts/make_shape.py --shape 27b --out shapes/27b-8 --target-type bf16 --layers 8      # 11.2 GB + 3.5 GB

Writes target.gguf (the Q4_K_M mix that llama.cpp's quantiser picks for this architecture, or BF16) and draft.gguf (the
DFlash drafter, BF16). Without the real weights this shows what a real model needs: memory, load time, time a pass. What
it says is noise. There is no tokenizer: such a model takes and gives ids. --vocab gives both files one whose tokens
mean nothing but are as many, since llama.cpp's server opens no model without. --layers cuts the target to its first
layers, where the whole is too large; its name says so, and pydflash.shape.layers how many the whole has.

The weights are scaled so that every product keeps the size of what goes in: logits stay finite and differ. They depend
on --seed, --shape and the tensor's name alone. Written in pieces of 32 MiB; a file appears under its name when whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Kind = gguf.GGMLQuantizationType
Bytes = npt.NDArray[np.uint8]
PIECE = 32 << 20  # bytes written at once


@dataclass(frozen=True)
class Shape:
    """What differs between the sizes. The rest is common to Qwen3.5 and stands in target_keys() and draft_keys()."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    v_heads: int  # Gated DeltaNet value heads
    tied: bool
    draft_layers: int
    draft_ff: int
    draft_sliding: int | None  # window of every layer but the last; None: all attend to everything
    target_layers: tuple[int, ...]  # as GGUF counts: Hugging Face's id + 1
    mask_token_id: int


# Targets: config.json (text_config) of Qwen/Qwen3.5-27B, -9B and -4B. Drafters: config.json of z-lab/Qwen3.5-27B-DFlash
# and of z-lab/Qwen3.5-4B-DFlash in its six-layer version (634,425,856 parameters). Of z-lab/Qwen3.5-9B-DFlash width,
# layers and size (2.41 GiB) are known, which leave room for eight taps; which ones, and the window, is taken from the
# 4B's: both targets have 32 layers.
_TAPS_32 = (2, 6, 10, 14, 18, 22, 26, 30)
SHAPES = {
    "27b": Shape("Qwen3.5-27B", 64, 5120, 17408, 24, 48, False, 5, 17408, None, (2, 17, 32, 47, 62), 248070),
    "9b": Shape("Qwen3.5-9B", 32, 4096, 12288, 16, 32, False, 6, 12288, 4096, _TAPS_32, 248077),
    "4b": Shape("Qwen3.5-4B", 32, 2560, 9216, 16, 32, True, 6, 9216, 4096, _TAPS_32, 248077),
}

N_VOCAB, N_CTX, EPS, THETA = 248320, 262144, 1e-6, 1e7
HEAD_DIM, N_HEAD_KV, N_ROT, ROPE_SECTIONS, INTERVAL = 256, 4, 64, [11, 11, 10, 0], 4
K_HEADS, D_STATE, CONV = 16, 128, 4  # Gated DeltaNet: key heads, size of a head, width of the convolution
DRAFT_HEADS, DRAFT_HEADS_KV, DRAFT_DIM, BLOCK = 32, 8, 128, 16


@dataclass(frozen=True)
class Tensor:
    """name, ggml's ne, type, and how large its values shall be: the standard deviation of a matrix, the bounds of a
    vector."""

    name: str
    ne: tuple[int, ...]
    kind: Kind
    scale: float | tuple[float, float]

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.ne[0] // block * size

    @property
    def n_bytes(self) -> int:
        return self.row_bytes * (self.ne[1] if len(self.ne) > 1 else 1)


# ---- what the files hold -----------------------------------------------------------------------------------------


def q4_k_m(name: str, layer: int, n_layer: int, tied: bool) -> Kind:
    """The type that llama.cpp's Q4_K_M gives a matrix of this architecture (llama-quant.cpp, without an importance
    matrix): Q6_K for the head, and in the first and last eighth and every third layer between for ffn_down and for
    whatever carries an attention's values, here attn_v or attn_qkv, one of which each layer has."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return Kind.Q6_K
    more = layer < n_layer // 8 or layer >= 7 * n_layer // 8 or (layer - n_layer // 8) % 3 == 2
    sensitive = name.endswith(("attn_v.weight", "attn_qkv.weight", "ffn_down.weight"))
    return Kind.Q6_K if sensitive and more else Kind.Q4_K


def cut(s: Shape, n_layer: int) -> Shape:
    """The same with fewer layers, of each kind as many in proportion; the drafter's taps are spread over them."""
    taps = len(s.target_layers)
    if n_layer % INTERVAL or not taps <= n_layer <= s.n_layer:
        least = -(-taps // INTERVAL) * INTERVAL
        raise ValueError(f"--layers is {n_layer}; it must be {least} to {s.n_layer} in steps of {INTERVAL}")
    if n_layer == s.n_layer:
        return s
    spread = tuple(i * n_layer // taps + 1 for i in range(taps))
    return replace(s, name=f"{s.name} ({n_layer} of {s.n_layer} layers)", n_layer=n_layer, target_layers=spread)


def target_tensors(s: Shape, kind: Kind | None = None) -> Iterator[Tensor]:
    """kind: of the matrices; None is the Q4_K_M mix."""
    e, inner = s.n_embd, s.v_heads * D_STATE
    channels = 2 * K_HEADS * D_STATE + inner

    def matrix(name: str, n_in: int, n_out: int, gain: float = 1.0, layer: int = 0) -> Tensor:
        return Tensor(name, (n_in, n_out), kind or q4_k_m(name, layer, s.n_layer, s.tied), gain * n_in**-0.5)

    def vector(name: str, n: int, low: float = 0.6, high: float = 1.4) -> Tensor:
        return Tensor(name, (n,), Kind.F32, (low, high))

    yield matrix("token_embd.weight", e, N_VOCAB, 2.5 if s.tied else e**0.5)  # a tied one is the head as well
    yield vector("output_norm.weight", e)
    if not s.tied:
        yield matrix("output.weight", e, N_VOCAB, 2.5)
    for i in range(s.n_layer):
        at = f"blk.{i}."
        yield vector(at + "attn_norm.weight", e)
        if (i + 1) % INTERVAL == 0:
            yield matrix(at + "attn_q.weight", e, 2 * s.n_head * HEAD_DIM, layer=i)  # query and gate
            yield matrix(at + "attn_k.weight", e, N_HEAD_KV * HEAD_DIM, layer=i)
            yield matrix(at + "attn_v.weight", e, N_HEAD_KV * HEAD_DIM, layer=i)
            yield matrix(at + "attn_output.weight", s.n_head * HEAD_DIM, e, 1.5, layer=i)
            yield vector(at + "attn_q_norm.weight", HEAD_DIM)
            yield vector(at + "attn_k_norm.weight", HEAD_DIM)
        else:
            yield matrix(at + "attn_qkv.weight", e, channels, layer=i)
            yield matrix(at + "attn_gate.weight", e, inner, layer=i)
            yield Tensor(at + "ssm_conv1d.weight", (CONV, channels), Kind.F32, (-0.9, 0.9))
            yield vector(at + "ssm_dt.bias", s.v_heads, -6.0, -1.5)
            yield vector(at + "ssm_a", s.v_heads, -15.0, -0.4)
            yield matrix(at + "ssm_alpha.weight", e, s.v_heads, layer=i)
            yield matrix(at + "ssm_beta.weight", e, s.v_heads, layer=i)
            yield vector(at + "ssm_norm.weight", D_STATE)
            yield matrix(at + "ssm_out.weight", inner, e, 1.2, layer=i)
        yield vector(at + "post_attention_norm.weight", e)
        yield matrix(at + "ffn_gate.weight", e, s.n_ff, layer=i)
        yield matrix(at + "ffn_up.weight", e, s.n_ff, layer=i)
        yield matrix(at + "ffn_down.weight", s.n_ff, e, layer=i)


def target_keys(s: Shape, kind: Kind | None = None) -> dict[str, Any]:
    file_type = gguf.LlamaFileType.MOSTLY_BF16 if kind == Kind.BF16 else gguf.LlamaFileType.MOSTLY_Q4_K_M
    return {
        "general.name": f"{s.name} shape, random weights",
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "qwen35.vocab_size": N_VOCAB,
        "qwen35.block_count": s.n_layer,
        "qwen35.context_length": N_CTX,
        "qwen35.embedding_length": s.n_embd,
        "qwen35.feed_forward_length": s.n_ff,
        "qwen35.attention.head_count": s.n_head,
        "qwen35.attention.head_count_kv": N_HEAD_KV,
        "qwen35.attention.key_length": HEAD_DIM,
        "qwen35.attention.value_length": HEAD_DIM,
        "qwen35.attention.layer_norm_rms_epsilon": EPS,
        "qwen35.rope.freq_base": THETA,
        "qwen35.rope.dimension_count": N_ROT,
        "qwen35.rope.dimension_sections": ROPE_SECTIONS,
        "qwen35.ssm.conv_kernel": CONV,
        "qwen35.ssm.inner_size": s.v_heads * D_STATE,
        "qwen35.ssm.state_size": D_STATE,
        "qwen35.ssm.time_step_rank": s.v_heads,
        "qwen35.ssm.group_count": K_HEADS,
        "qwen35.full_attention_interval": INTERVAL,
        "tokenizer.ggml.model": "none",
    }


def vocabulary(n_vocab: int) -> dict[str, Any]:
    """A tokenizer's keys: the 256 bytes as gpt2's alphabet spells them, one merge, and names for the rest."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that are their own letter
    hidden = iter(range(256, 512))
    alphabet = [chr(byte if byte in shown else next(hidden)) for byte in range(256)]
    space = alphabet[ord(" ")]
    tokens = [*alphabet, space + space]
    tokens += [f"<|{i}|>" for i in range(len(tokens), n_vocab)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(gguf.TokenType.NORMAL)] * (n_vocab - 1) + [int(gguf.TokenType.CONTROL)],
        "tokenizer.ggml.merges": [f"{space} {space}"],
        "tokenizer.ggml.eos_token_id": n_vocab - 1,
    }


def draft_tensors(s: Shape, kind: Kind) -> Iterator[Tensor]:
    e, d = s.n_embd, DRAFT_DIM

    def matrix(name: str, n_in: int, n_out: int, gain: float = 1.0) -> Tensor:
        return Tensor(name, (n_in, n_out), kind, gain * n_in**-0.5)

    def vector(name: str, n: int) -> Tensor:
        return Tensor(name, (n,), Kind.F32, (0.6, 1.4))

    yield matrix("fc.weight", len(s.target_layers) * e, e)
    yield vector("enc.output_norm.weight", e)
    yield vector("output_norm.weight", e)
    for i in range(s.draft_layers):
        at = f"blk.{i}."
        yield vector(at + "attn_norm.weight", e)
        yield matrix(at + "attn_q.weight", e, DRAFT_HEADS * d)
        yield matrix(at + "attn_k.weight", e, DRAFT_HEADS_KV * d)
        yield matrix(at + "attn_v.weight", e, DRAFT_HEADS_KV * d)
        yield matrix(at + "attn_output.weight", DRAFT_HEADS * d, e, 1.5)
        yield vector(at + "attn_q_norm.weight", d)
        yield vector(at + "attn_k_norm.weight", d)
        yield vector(at + "ffn_norm.weight", e)
        yield matrix(at + "ffn_gate.weight", e, s.draft_ff)
        yield matrix(at + "ffn_up.weight", e, s.draft_ff)
        yield matrix(at + "ffn_down.weight", s.draft_ff, e)


def draft_keys(s: Shape, kind: Kind) -> dict[str, Any]:
    file_type = gguf.LlamaFileType.MOSTLY_Q8_0 if kind == Kind.Q8_0 else gguf.LlamaFileType.MOSTLY_BF16
    keys: dict[str, Any] = {
        "general.name": f"{s.name} DFlash shape, random weights",
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "dflash.block_count": s.draft_layers,
        "dflash.context_length": N_CTX,
        "dflash.embedding_length": s.n_embd,
        "dflash.feed_forward_length": s.draft_ff,
        "dflash.attention.head_count": DRAFT_HEADS,
        "dflash.attention.head_count_kv": DRAFT_HEADS_KV,
        "dflash.attention.key_length": DRAFT_DIM,
        "dflash.attention.value_length": DRAFT_DIM,
        "dflash.attention.layer_norm_rms_epsilon": EPS,
        "dflash.rope.freq_base": THETA,
        "dflash.block_size": BLOCK,
        "dflash.target_layers": list(s.target_layers),
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.mask_token_id": s.mask_token_id,
    }
    if s.draft_sliding is not None:
        keys["dflash.attention.sliding_window"] = s.draft_sliding
        keys["dflash.attention.sliding_window_pattern"] = [True] * (s.draft_layers - 1) + [False]
    return keys


# ---- random values -----------------------------------------------------------------------------------------------


def _f16(value: float, n: int) -> Bytes:
    return np.full(n, value, "<f2").view(np.uint8).reshape(n, 2)


# Random bytes become blocks of a type with values of mean 0 and standard deviation `s` (the divisors are those of a
# block of uniform bytes whose scale is 1): only the f16 scales are set.


def _q4_k(raw: Bytes, s: float) -> Bytes:
    """256 values d * scale * q - dmin * min, scale and min in 0..63, q in 0..15: dmin = 7.5 d centres them."""
    blocks = raw.reshape(-1, 144)
    blocks[:, 0:2] = _f16(s / 258.3, len(blocks))
    blocks[:, 2:4] = _f16(s / 258.3 * 7.5, len(blocks))
    return raw


def _q6_k(raw: Bytes, s: float) -> Bytes:
    """256 values d * scale * (q - 32), scale in -128..127, q in 0..63."""
    blocks = raw.reshape(-1, 210)
    blocks[:, 208:210] = _f16(s / 1365.6, len(blocks))
    return raw


def _q8_0(raw: Bytes, s: float) -> Bytes:
    """32 values d * q, q in -128..127."""
    blocks = raw.reshape(-1, 34)
    blocks[:, 0:2] = _f16(s / 73.9, len(blocks))
    return raw


def _bf16(raw: Bytes, s: float) -> Bytes:
    """Random sign and mantissa, exponent one of four: the largest power of two at most s / 0.88, and three below it."""
    bits = raw.view("<u2")
    top = 127 + int(np.floor(np.log2(s / 0.88)))
    bits[:] = (bits & 0x807F) | ((top - (bits >> 7 & 3)) << 7)
    return raw


FILLERS: dict[Kind, Callable[[Bytes, float], Bytes]] = {
    Kind.Q4_K: _q4_k,
    Kind.Q6_K: _q6_k,
    Kind.Q8_0: _q8_0,
    Kind.BF16: _bf16,
}


def values(t: Tensor, shape: str, seed: int) -> Iterator[Bytes]:
    """The tensor's bytes in pieces, a function of name, shape and seed (numpy's frozen PCG64 stream)."""
    stream = np.random.PCG64([seed, zlib.crc32(f"{shape}/{t.name}".encode())])
    if isinstance(t.scale, tuple):
        low, high = t.scale
        unit = (stream.random_raw(int(np.prod(t.ne))) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        yield (np.float32(low) + unit * np.float32(high - low)).view(np.uint8)
        return
    rows = max(1, PIECE // t.row_bytes)
    for first in range(0, t.ne[1], rows):
        n = min(rows, t.ne[1] - first) * t.row_bytes
        raw = stream.random_raw((n + 7) // 8).view(np.uint8)[:n]
        yield FILLERS[t.kind](raw, t.scale)


# ---- writing -----------------------------------------------------------------------------------------------------


def pad(n: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(n, gguf.GGUF_DEFAULT_ALIGNMENT))


def write(
    path: Path, arch: str, keys: dict[str, Any], tensors: list[Tensor], shape: str, seed: int, sparse: bool
) -> int:
    """Writes one file and returns its size."""
    partial = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(partial, arch)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for t in tensors:
        writer.add_tensor_info(t.name, tuple(reversed(t.ne)), np.dtype(np.float32), t.n_bytes, t.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = pad(partial.stat().st_size)
        size = start + sum(pad(t.n_bytes) for t in tensors)
        with partial.open("r+b") as file:
            file.truncate(size)
            file.seek(start)
            for t in [] if sparse else tensors:
                for piece in values(t, shape, seed):
                    file.write(piece)
                file.seek(pad(t.n_bytes) - t.n_bytes, os.SEEK_CUR)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def room_for(tensors: list[Tensor]) -> int:
    return sum(pad(t.n_bytes) for t in tensors) + (16 << 20)  # the header, with a vocabulary, is below 10 MiB


def main(arguments: list[str] | None = None) -> int:
    about, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES), help="the model to take the shape of")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for target.gguf and draft.gguf")
    parser.add_argument("--target-type", choices=("q4_k_m", "bf16"), default="q4_k_m", help="the target's matrices")
    parser.add_argument("--layers", type=int, metavar="N", help="of the target (default: all)")
    parser.add_argument("--draft-type", choices=("bf16", "q8_0"), default="bf16", help="the drafter's matrices")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the weights, 0 or more (default 0)")
    parser.add_argument("--sparse", action="store_true", help="headers over holes, all weights zero: for planning only")
    parser.add_argument("--vocab", action="store_true", help="with a vocabulary that means nothing, for llama.cpp")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; it must be 0 or more")

    shape = SHAPES[options.shape]
    words = vocabulary(N_VOCAB) if options.vocab else {}
    whole = {"pydflash.shape.layers": shape.n_layer}
    if options.layers is not None:
        try:
            shape = cut(shape, options.layers)
        except ValueError as error:
            parser.error(str(error))
    target_kind = Kind.BF16 if options.target_type == "bf16" else None
    draft_kind = Kind[options.draft_type.upper()]
    target = target_keys(shape, target_kind) | whole | words
    files = [
        ("target.gguf", "qwen35", target, list(target_tensors(shape, target_kind))),
        ("draft.gguf", "dflash", draft_keys(shape, draft_kind) | words, list(draft_tensors(shape, draft_kind))),
    ]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        present = [str(options.out / name) for name, *_ in files if (options.out / name).exists()]
        if present and not options.force:
            print(f"make_shape: {' and '.join(present)} exist; --force replaces them", file=sys.stderr)
            return 1
        need = 0 if options.sparse else sum(room_for(tensors) for *_, tensors in files)
        free = shutil.disk_usage(options.out).free
        if need > free:
            print(
                f"make_shape: {options.out} has {free / 1e9:.1f} GB free and the pair needs {need / 1e9:.1f} GB; "
                "name another folder, a smaller shape, or --sparse if planning is all you want",
                file=sys.stderr,
            )
            return 1
        for name, arch, keys, tensors in files:
            size = write(options.out / name, arch, keys, tensors, options.shape, options.seed, options.sparse)
            print(f"{options.out / name}: {len(tensors)} tensors, {size:,} bytes{', sparse' if options.sparse else ''}")
    except OSError as error:
        print(f"make_shape: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
