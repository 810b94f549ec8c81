"""z-lab's DFlash drafters, from their Hugging Face folder to one GGUF (architecture `dflash`).

    python -m pydflash.convert FOLDER DRAFT.gguf [--target TARGET.gguf] [--type q8_0]

Matrices keep their type (BF16 stays BF16), or become Q8_0, half the size; norms become F32, as ggml wants them. What a
folder describes beyond plain DFlash (DFlash2's convolutions and selector, DSpark's Markov head, scaled rope, biases) is
refused, not dropped. With the target's GGUF at hand its tokenizer is copied too: llama.cpp will not load a drafter
without one, pydflash does not need it. The file appears under its name only when it is whole.

The math it describes is that of the `dflash` 0.1.0 package; the key and tensor names are those llama.cpp reads.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydflash._gguf import Gguf
from pydflash._safetensors import Weight, read_json, read_weights
from pydflash.errors import (
    ArgumentError,
    DraftMismatchError,
    ModelFileError,
    ModelFormatError,
    PydflashError,
    UnsupportedModelError,
    checked_path,
)

if TYPE_CHECKING:
    import gguf

VERSION = 1  # part of the key of a cached conversion: raise it when the same folder would give another file


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    target: str | os.PathLike[str] | None = None,
    matrix_type: str | None = None,
) -> None:
    """Writes the drafter in folder `source` as the GGUF file `destination`.

    target: the target's GGUF, whose tokenizer is copied for llama.cpp's sake.
    matrix_type: "q8_0" quantises the matrices, rows that are no multiple of 32 excepted; None leaves them as they are.

    Raises ModelFileError (a file cannot be read or written), ModelFormatError (config.json and weights contradict each
    other), UnsupportedModelError (not a plain DFlash drafter), DraftMismatchError (another target's drafter).
    """
    import gguf

    if matrix_type not in (None, "q8_0"):
        raise ArgumentError(f"matrix_type is {matrix_type!r}; it must be 'q8_0', or None to leave matrices as they are")
    folder = checked_path(source)
    config = _read_config(folder)
    weights = _match_weights(folder, config, read_weights(folder))
    with _whole_or_nothing(checked_path(destination)) as partial:
        writer = gguf.GGUFWriter(partial, "dflash")
        try:
            _add_keys(writer, config)
            if target is None:
                writer.add_uint32("tokenizer.ggml.mask_token_id", config.mask_token_id)
            else:
                _add_target(writer, config, checked_path(target))
            for name, weight in weights.items():
                _add_tensor(writer, name, weight, quantised=matrix_type is not None)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


@dataclass(frozen=True)
class _Config:
    """What config.json says, as the GGUF states it."""

    path: Path
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ctx: int
    n_vocab: int
    rms_eps: float
    rope_theta: float
    block_size: int
    mask_token_id: int
    n_target_layers: int | None
    target_layers: list[int]  # the layer whose input is tapped: Hugging Face's id + 1
    causal: bool | None  # None: sliding layers are causal within the block, full ones are not
    window: int | None
    sliding: list[bool]  # one a layer
    embedding_scale: float | None
    logit_scale: float | None
    softcap: float | None


def _read_config(folder: Path) -> _Config:
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelFileError(f"{folder} is not a folder", path=folder)
    top = read_json(path)
    own = top.get("dflash_config") or {}
    if not isinstance(own, dict):
        raise ModelFormatError(f"{path}: dflash_config is not an object", path=path)
    merged = top | own  # as the reference looks these up: dflash_config first
    _refuse_extensions(folder, path, top, own)

    def number(name: str, value: Any, *, least: float = 1) -> Any:
        if type(value) not in (int, float) or not value >= least:
            raise ModelFormatError(f"{path}: {name} is {value!r}, not a number of at least {least}", path=path)
        return value

    def integer(name: str, *, least: int = 1, default: int | None = None) -> int:
        value = merged.get(name, default)
        if type(value) is not int or not least <= value < 2**31:
            raise ModelFormatError(f"{path}: {name} is {value!r}, not an integer of at least {least}", path=path)
        return value

    def optional_float(name: str) -> float | None:
        return None if merged.get(name) is None else float(number(name, merged[name], least=0))

    n_layer = integer("num_hidden_layers")
    n_ctx = integer("max_position_embeddings")
    n_target_layers = integer("num_target_layers") if merged.get("num_target_layers") is not None else None
    rope = top.get("rope_parameters") or top.get("rope_scaling") or {}
    causal = top.get("is_causal")
    window, sliding = _sliding_layers(path, top, n_layer, n_ctx, causal)
    return _Config(
        path=path,
        n_layer=n_layer,
        n_embd=integer("hidden_size"),
        n_ff=integer("intermediate_size"),
        n_head=integer("num_attention_heads"),
        n_head_kv=integer("num_key_value_heads"),
        head_dim=integer("head_dim"),
        n_ctx=n_ctx,
        n_vocab=integer("vocab_size"),
        rms_eps=float(number("rms_norm_eps", top.get("rms_norm_eps"), least=0)),
        rope_theta=float(number("rope_theta", rope.get("rope_theta", top.get("rope_theta")))),
        block_size=integer("block_size", least=2, default=16),
        mask_token_id=integer("mask_token_id", least=0),
        n_target_layers=n_target_layers,
        target_layers=[layer + 1 for layer in _target_layer_ids(path, merged, n_target_layers, n_layer)],
        causal=None if causal is None else bool(causal),
        window=window,
        sliding=sliding,
        embedding_scale=optional_float("input_embedding_scale"),
        logit_scale=optional_float("output_multiplier"),
        softcap=optional_float("final_logit_softcapping") or None,
    )


def _refuse_extensions(folder: Path, path: Path, top: dict[str, Any], own: dict[str, Any]) -> None:
    """What the plain DFlash graph does not compute. A key that is null, false or at its neutral value is fine."""

    def refuse(what: str) -> None:
        raise UnsupportedModelError(f"{path}: {what}; only plain DFlash drafters can be converted", path=path)

    architectures = top.get("architectures")
    if any(own.get(key) for key in ("conv_kernel_size", "selector_rank")) or architectures == ["DFlash2DraftModel"]:
        refuse("this is a DFlash2 drafter, with convolutions and a candidate selector")
    if any(top.get(key) for key in ("markov_rank", "markov_head_type")) or "DSpark" in str(architectures):
        refuse("this is a DSpark drafter, with a Markov head")
    if architectures != ["DFlashDraftModel"]:
        refuse(f"architectures is {architectures!r}, not ['DFlashDraftModel']")
    if top.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is {top['hidden_act']!r}, not 'silu'")
    if top.get("attention_bias"):
        refuse("attention_bias is set, and DFlash's projections have no biases")
    rope = top.get("rope_parameters") or top.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelFormatError(f"{path}: rope_parameters is not an object", path=path)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default" or rope.get("partial_rotary_factor", 1) != 1 or top.get("rope_is_neox_style") is False:
        refuse(f"its rope is not the plain one over whole heads (rope_type {rope_type!r})")
    for key in ("attention_value_scale", "use_swa", "swa_window_size", "causal"):
        if own.get(key):
            refuse(f"dflash_config.{key} is set, which the reference model does not know")
    if (folder / "mask_embedding.pt").exists():
        refuse("the folder has a mask embedding of its own, where DFlash uses the target's")


def _target_layer_ids(path: Path, merged: dict[str, Any], n_target_layers: int | None, n_layer: int) -> list[int]:
    """Hugging Face's ids of the tapped layers; spread over the target when config.json does not list them."""
    ids = merged.get("target_layer_ids")
    if ids is None:
        if n_target_layers is None:
            raise ModelFormatError(f"{path}: neither target_layer_ids nor num_target_layers is given", path=path)
        if n_layer == 1:
            return [n_target_layers // 2]
        return [round(1 + i * (n_target_layers - 4) / (n_layer - 1)) for i in range(n_layer)]
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < 2**31 - 1 for i in ids):
        raise ModelFormatError(f"{path}: target_layer_ids is {ids!r}, not a list of layer numbers", path=path)
    if n_target_layers is not None and max(ids) >= n_target_layers:
        raise ModelFormatError(f"{path}: target_layer_ids {ids} go past num_target_layers {n_target_layers}", path=path)
    return ids


def _sliding_layers(
    path: Path, top: dict[str, Any], n_layer: int, n_ctx: int, causal: bool | None
) -> tuple[int | None, list[bool]]:
    """The window and which layers have it, by the rules of transformers' Qwen3Config."""
    window = top.get("sliding_window") if top.get("use_sliding_window") else None
    if window is not None and (type(window) is not int or not 1 <= window < 2**31):
        raise ModelFormatError(f"{path}: sliding_window is {window!r}, not a count of positions", path=path)
    kinds = top.get("layer_types")
    if kinds is None:
        first = top.get("max_window_layers", 28)
        sliding = [window is not None and i >= first for i in range(n_layer)]
    elif (
        not isinstance(kinds, list)
        or len(kinds) != n_layer
        or not set(kinds) <= {"full_attention", "sliding_attention"}
    ):
        raise ModelFormatError(
            f"{path}: layer_types is {kinds!r}, not {n_layer} of 'full_attention' and 'sliding_attention'", path=path
        )
    else:
        sliding = [kind == "sliding_attention" for kind in kinds]
    if not any(sliding):
        return None, sliding
    if window is None:
        # Such layers see everything, but are causal within the block unless is_causal says otherwise: to the GGUF, a
        # window as wide as the context.
        return (n_ctx, sliding) if causal is None else (None, [False] * n_layer)
    return window, sliding


def _match_weights(folder: Path, config: _Config, weights: dict[str, Weight]) -> dict[str, Weight]:
    """The folder's tensors under their GGUF names: all that DFlash has, in shape, and nothing else."""
    c = config
    n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "fc.weight": ("fc", (c.n_embd, len(c.target_layers) * c.n_embd)),
        "hidden_norm.weight": ("enc.output_norm", (c.n_embd,)),
        "norm.weight": ("output_norm", (c.n_embd,)),
    }
    for i in range(c.n_layer):
        for theirs, ours, shape in (
            ("input_layernorm", "attn_norm", (c.n_embd,)),
            ("self_attn.q_proj", "attn_q", (n_q, c.n_embd)),
            ("self_attn.k_proj", "attn_k", (n_kv, c.n_embd)),
            ("self_attn.v_proj", "attn_v", (n_kv, c.n_embd)),
            ("self_attn.o_proj", "attn_output", (c.n_embd, n_q)),
            ("self_attn.q_norm", "attn_q_norm", (c.head_dim,)),
            ("self_attn.k_norm", "attn_k_norm", (c.head_dim,)),
            ("post_attention_layernorm", "ffn_norm", (c.n_embd,)),
            ("mlp.gate_proj", "ffn_gate", (c.n_ff, c.n_embd)),
            ("mlp.up_proj", "ffn_up", (c.n_ff, c.n_embd)),
            ("mlp.down_proj", "ffn_down", (c.n_embd, c.n_ff)),
        ):
            expected[f"layers.{i}.{theirs}.weight"] = (f"blk.{i}.{ours}", shape)
    found = {name.removeprefix("model."): weight for name, weight in weights.items() if "rotary_emb" not in name}
    for name, ours in (("embed_tokens.weight", "token_embd"), ("lm_head.weight", "output")):
        if name in found:  # a drafter usually takes the target's
            expected[name] = (ours, (c.n_vocab, c.n_embd))

    for name in expected.keys() - found.keys():
        raise ModelFormatError(f"{folder}: the weights lack {name}", path=folder)
    for name in found.keys() - expected.keys():
        raise UnsupportedModelError(f"{folder}: tensor {name} is not part of a plain DFlash drafter", path=folder)
    for name, (_, wanted) in expected.items():
        if found[name].shape != wanted:
            raise ModelFormatError(
                f"{folder}: {name} has shape {list(found[name].shape)}, but config.json makes it {list(wanted)}",
                path=folder,
            )
        if found[name].dtype not in ("F32", "F16", "BF16"):
            raise UnsupportedModelError(
                f"{folder}: {name} is {found[name].dtype}; F32, F16 and BF16 can be converted", path=folder
            )
    return {f"{ours}.weight": found[name] for name, (ours, _) in expected.items()}


def _add_keys(writer: gguf.GGUFWriter, config: _Config) -> None:
    c = config
    writer.add_string("general.type", "model")
    writer.add_string("general.name", c.path.parent.resolve().name)
    for key, count in (
        ("block_count", c.n_layer),
        ("context_length", c.n_ctx),
        ("embedding_length", c.n_embd),
        ("feed_forward_length", c.n_ff),
        ("attention.head_count", c.n_head),
        ("attention.head_count_kv", c.n_head_kv),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("block_size", c.block_size),
        ("vocab_size", c.n_vocab),
    ):
        writer.add_uint32(f"dflash.{key}", count)
    writer.add_float32("dflash.attention.layer_norm_rms_epsilon", c.rms_eps)
    writer.add_float32("dflash.rope.freq_base", c.rope_theta)
    writer.add_array("dflash.target_layers", c.target_layers)
    if c.causal is not None:
        writer.add_bool("dflash.attention.causal", c.causal)
    if c.window is not None:
        writer.add_uint32("dflash.attention.sliding_window", c.window)
        writer.add_array("dflash.attention.sliding_window_pattern", c.sliding)
    for key, value in (
        ("embedding_scale", c.embedding_scale),
        ("logit_scale", c.logit_scale),
        ("final_logit_softcapping", c.softcap),
    ):
        if value is not None:
            writer.add_float32(f"dflash.{key}", value)


def _add_target(writer: gguf.GGUFWriter, config: _Config, target: Path) -> None:
    """The target's tokenizer and the form of its rope, after a check that the drafter is this target's."""
    import gguf

    with Gguf(target) as file:
        arch = file.get_str("general.architecture")
        n_embd, n_layer = file.get_int(f"{arch}.embedding_length"), file.get_int(f"{arch}.block_count")
        if n_embd != config.n_embd:
            raise DraftMismatchError(
                f"{target} is {n_embd} wide; the drafter in {config.path.parent} is for a target {config.n_embd} wide",
                path=target,
            )
        if n_layer is not None and max(config.target_layers) > n_layer:
            raise DraftMismatchError(
                f"{target} has {n_layer} layers, but the drafter in {config.path.parent} taps the input of layer "
                f"{max(config.target_layers)}",
                path=target,
            )
        if f"{arch}.rope.dimension_sections" in file:
            # llama.cpp gives drafters of M-RoPE targets the same positions; only the first axis, time, turns anything.
            writer.add_array("dflash.rope.dimension_sections", [config.head_dim // 2, 0, 0, 0])
        for key in file:
            if key.startswith("tokenizer.") and key != "tokenizer.ggml.mask_token_id":
                kind, element = file.types(key)
                element_type = None if element is None else gguf.GGUFValueType(element)
                writer.add_key_value(key, file.get(key), gguf.GGUFValueType(kind), element_type)
    writer.add_uint32("tokenizer.ggml.mask_token_id", config.mask_token_id)


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: Weight, *, quantised: bool) -> None:
    import gguf
    import numpy as np

    def values() -> np.ndarray[Any, Any]:  # float32
        if weight.dtype == "BF16":  # the upper half of an F32
            return (weight.raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return weight.raw.view(_NUMPY[weight.dtype]).astype(np.float32)

    if len(weight.shape) == 1:
        writer.add_tensor(name, values())
    elif quantised and weight.shape[1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values().reshape(weight.shape), kind), raw_dtype=kind)
    elif weight.dtype == "BF16":
        rows = weight.raw.reshape(weight.shape[0], -1)  # uint8 [n_rows, 2 * n_columns]
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, weight.raw.view(_NUMPY[weight.dtype]).reshape(weight.shape))


_NUMPY = {"F32": "<f4", "F16": "<f2"}


@contextmanager
def _whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A name to write to, which becomes `destination` if all goes well and vanishes if not."""
    partial = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}")
    try:
        partial.touch(exist_ok=False)
        yield partial
        os.replace(partial, destination)
    except OSError as error:
        raise ModelFileError(f"cannot write {destination}: {error.strerror or error}", path=destination) from None
    finally:
        partial.unlink(missing_ok=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("folder", type=Path, help="config.json and model.safetensors (or its shards)")
    parser.add_argument("destination", type=Path, help="the GGUF file to write")
    parser.add_argument("--target", type=Path, help="the target's GGUF: copy its tokenizer, for llama.cpp")
    parser.add_argument("--type", choices=["q8_0"], help="quantise the matrices (default: leave them as they are)")


def run(options: argparse.Namespace) -> int:
    """Does what the command line says."""
    convert(options.folder, options.destination, target=options.target, matrix_type=options.type)
    print(f"{options.destination}: {options.destination.stat().st_size / 1e6:.1f} MB")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line: 0 when the file is written, 1 with one sentence when it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m pydflash.convert", description="z-lab DFlash folder to GGUF")
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except PydflashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
