"""Small random models for tests: qwen35 targets and dflash drafters, written as GGUF or as Hugging Face lays them out.

    target = TinyTarget(k_heads=2, v_heads=6, tied=True)
    path = target.write(tmp_path / "target.gguf", types="q8_0", tokenizer=True)
    draft = TinyDraft.of(target, layer_types=("sliding_attention", "full_attention"), sliding_window=12)
    draft.write(tmp_path / "draft.gguf")             # GGUF
    draft.write_folder(tmp_path / "draft")           # z-lab's layout: config.json + model.safetensors

A model is its dataclass: equal fields give equal bytes, everywhere, since the weights are integers from numpy's frozen
RandomState stream times one float32. `hf_config` and `hf_weights` are what transformers and the dflash package load, so
the same model can be run there; `gguf_keys` and `tensors` are what `write` puts into the file, for tests that want to
break it. Weights are scaled so that nothing is degenerate: logits spread over several nats, and recurrent decays run
from a few per mille to a few times e per token, as in trained models.

This file knows how the two formats spell a model. It computes no forward pass; the expected values come from elsewhere.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def uniform(shape: tuple[int, ...], low: float, high: float, *key: object) -> F32:
    """Uniform float32 weights, a function of `key` alone (CRC-32 of its text seeds the stream)."""
    rng = np.random.RandomState(zlib.crc32(repr(key).encode()))
    steps = rng.randint(0, 1 << 16, size=shape).astype(np.float32)  # exact in float32
    weights: F32 = np.float32(low) + steps * np.float32((high - low) / 65535)
    return weights


def _matrix(shape: tuple[int, int], gain: float, *key: object) -> F32:
    """[n_out, n_in] with outputs of standard deviation `gain` for inputs of standard deviation 1."""
    a = gain * (3 / shape[1]) ** 0.5
    return uniform(shape, -a, a, *key)


# ---- writing -----------------------------------------------------------------------------------------------------

Types = str | Mapping[str, str]


def write_gguf(
    path: Path | str, arch: str, keys: Mapping[str, Any], tensors: Mapping[str, F32], *, types: Types = "f32"
) -> Path:
    """Writes a GGUF file. Python ints become u32, floats f32, lists of ints i32; numpy scalars keep their type.

    tensors: name -> float32 array in row-major shape, the reverse of ggml's ne.
    types: ggml type of all matrices ("f32", "f16", "bf16", "q8_0", "q4_0", ... whatever the gguf package can quantise
    to), or {part of a tensor's name: type}, first match wins, else f32. Vectors and the convolution always stay f32.
    The caller sees to it that quantised rows are whole blocks.
    """
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        add_key(writer, key, value)
    for name, data in tensors.items():
        wanted = types if isinstance(types, str) else next((t for part, t in types.items() if part in name), "f32")
        if data.ndim < 2 or "conv1d" in name or wanted == "f32":
            writer.add_tensor(name, np.ascontiguousarray(data, np.float32))
        elif wanted == "f16":
            writer.add_tensor(name, data.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[wanted.upper()]
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    return _finish(writer, path)


def copy_gguf(
    source: Path | str, path: Path | str, *, f32: bool = False, keys: Mapping[str, Any] | None = None
) -> Path:
    """Copies a GGUF. f32: with every tensor dequantised. keys: values that take the place of the file's own; keys that
    the file does not have are not added."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(path), arch)
    changed = {"general.file_type": 0} if f32 else {}  # 0: all f32
    changed |= keys or {}
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = changed.get(name, entry.contents())
            writer.add_key_value(name, value, entry.types[0], entry.types[-1] if len(entry.types) > 1 else None)
    for tensor in reader.tensors:
        if f32:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return _finish(writer, path)


def to_f32(source: Path | str, path: Path | str) -> Path:
    """Copies a GGUF with every tensor dequantised to f32, so that runtimes can be compared to the token."""
    return copy_gguf(source, path, f32=True)


def _finish(writer: gguf.GGUFWriter, path: Path | str) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kind = gguf.GGUFValueType
    numpy_kinds = {
        np.uint8: kind.UINT8, np.int8: kind.INT8, np.uint16: kind.UINT16, np.int16: kind.INT16,
        np.uint32: kind.UINT32, np.int32: kind.INT32, np.uint64: kind.UINT64, np.int64: kind.INT64,
        np.float32: kind.FLOAT32, np.float64: kind.FLOAT64,
    }  # fmt: skip
    if type(value) in numpy_kinds:
        writer.add_key_value(key, value.item(), numpy_kinds[type(value)])
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def byte_tokenizer(n_vocab: int) -> dict[str, Any]:
    """GGUF keys of a byte-level BPE that both llama.cpp and pydflash read: 256 bytes, some merges, three specials last.

    n_vocab must be at least 262. Ids 0..255 are the bytes in GPT-2's order; <|endoftext|>, <|im_start|>, <|im_end|> are
    the last three ids; what lies between is merges of ASCII letters.
    """
    if n_vocab < 262:
        raise ValueError(f"a byte tokenizer needs n_vocab >= 262, not {n_vocab}")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    tokens = [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]
    letters = "etaoinsrhldcumfpgwybvkxjqz"
    pairs = [(a, b) for a in letters for b in letters] + [("\u0120", a) for a in letters]
    merges = [a + " " + b for a, b in pairs[: n_vocab - 259]]
    tokens += [m.replace(" ", "") for m in merges]
    tokens += [f"<|unused{i}|>" for i in range(n_vocab - 3 - len(tokens))]
    types = [1] * (256 + len(merges)) + [5] * (n_vocab - 259 - len(merges)) + [3] * 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": [*tokens, "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": n_vocab - 1,
        "tokenizer.ggml.padding_token_id": n_vocab - 3,
        "tokenizer.ggml.add_bos_token": False,
    }


# ---- target ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyTarget:
    """A random qwen35 model. Defaults: 3 GDN layers and 1 attention layer, Hv/Hk = 2, GQA, half a head rotated."""

    n_layer: int = 4
    n_embd: int = 64
    n_ff: int = 96
    n_vocab: int = 288
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    n_rot: int = 16  # rotated dims of each attention head
    k_heads: int = 2  # GDN key heads
    v_heads: int = 4  # GDN value heads
    state: int = 16  # GDN head size d
    conv: int = 4
    interval: int = 4  # layer i is full attention when (i + 1) % interval == 0
    recurrent: tuple[bool, ...] | None = None  # per layer; wins over interval
    tied: bool = False
    mtp: bool = False  # adds a next-token-prediction block after the trunk, as released files have
    scales: bool = False  # adds blk.N.<name>.scale tensors; the model computes the same
    eps: float = 1e-6
    rope_theta: float = 10000.0
    n_ctx: int = 512
    seed: int = 0

    @property
    def is_recurrent(self) -> list[bool]:
        if self.recurrent is not None:
            return list(self.recurrent)
        return [(i + 1) % self.interval != 0 for i in range(self.n_layer)]

    @property
    def rope_sections(self) -> list[int]:
        half = self.n_rot // 2
        return [half - (half + 1) // 3 - half // 3, (half + 1) // 3, half // 3]

    # -- Hugging Face's spelling (transformers.Qwen3_5ForCausalLM)

    def hf_config(self) -> dict[str, Any]:
        """Arguments of transformers.Qwen3_5TextConfig."""
        return {
            "vocab_size": self.n_vocab,
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_ff,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_head_kv,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.n_ctx,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "partial_rotary_factor": self.n_rot / self.head_dim,
                "mrope_section": self.rope_sections,
                "mrope_interleaved": True,
            },
            "linear_conv_kernel_dim": self.conv,
            "linear_key_head_dim": self.state,
            "linear_value_head_dim": self.state,
            "linear_num_key_heads": self.k_heads,
            "linear_num_value_heads": self.v_heads,
            "layer_types": ["linear_attention" if r else "full_attention" for r in self.is_recurrent],
        }

    def hf_weights(self) -> dict[str, F32]:
        """State dict of Qwen3_5ForCausalLM: norms lack the +1, A is a log, value heads are grouped by key head."""
        key = ("target", self.seed)
        e, ff, d = self.n_embd, self.n_ff, self.state
        qkv = (2 * self.k_heads + self.v_heads) * d
        a = 0.7 if self.tied else 1.7  # a tied head would make logits as wide as its rows
        w: dict[str, F32] = {"model.embed_tokens.weight": uniform((self.n_vocab, e), -a, a, *key, "embed")}
        for i, recurrent in enumerate(self.is_recurrent):
            at = f"model.layers.{i}."

            def matrix(name: str, n_out: int, n_in: int, gain: float, at: str = at) -> None:
                w[at + name] = _matrix((n_out, n_in), gain, *key, at + name)

            def vector(name: str, n: int, low: float, high: float, at: str = at) -> None:
                w[at + name] = uniform((n,), low, high, *key, at + name)

            vector("input_layernorm.weight", e, -0.4, 0.4)
            vector("post_attention_layernorm.weight", e, -0.4, 0.4)
            if recurrent:
                matrix("linear_attn.in_proj_qkv.weight", qkv, e, 1.0)
                matrix("linear_attn.in_proj_z.weight", self.v_heads * d, e, 1.0)
                matrix("linear_attn.in_proj_a.weight", self.v_heads, e, 1.0)
                matrix("linear_attn.in_proj_b.weight", self.v_heads, e, 1.0)
                w[at + "linear_attn.conv1d.weight"] = uniform((qkv, 1, self.conv), -0.9, 0.9, *key, at, "conv")
                vector("linear_attn.dt_bias", self.v_heads, -6.0, -1.5)  # softplus: 0.0025 to 0.2
                vector("linear_attn.A_log", self.v_heads, -1.0, 2.7)  # A: 0.37 to 15
                vector("linear_attn.norm.weight", d, 0.6, 1.4)
                matrix("linear_attn.out_proj.weight", e, self.v_heads * d, 1.2)
            else:
                matrix("self_attn.q_proj.weight", 2 * self.n_head * self.head_dim, e, 1.0)
                matrix("self_attn.k_proj.weight", self.n_head_kv * self.head_dim, e, 1.0)
                matrix("self_attn.v_proj.weight", self.n_head_kv * self.head_dim, e, 1.5)
                matrix("self_attn.o_proj.weight", e, self.n_head * self.head_dim, 1.5)
                vector("self_attn.q_norm.weight", self.head_dim, 0.0, 1.0)
                vector("self_attn.k_norm.weight", self.head_dim, 0.0, 1.0)
            matrix("mlp.gate_proj.weight", ff, e, 1.0)
            matrix("mlp.up_proj.weight", ff, e, 1.0)
            matrix("mlp.down_proj.weight", e, ff, 1.0)
        w["model.norm.weight"] = uniform((e,), -0.4, 0.4, *key, "norm")
        if not self.tied:
            w["lm_head.weight"] = _matrix((self.n_vocab, e), 2.5, *key, "head")
        return w

    # -- GGUF's spelling

    def gguf_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "block_count": self.n_layer + self.mtp,
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self.eps,
            "rope.freq_base": self.rope_theta,
            "rope.dimension_count": self.n_rot,
            "rope.dimension_sections": [*self.rope_sections, 0],
            "ssm.conv_kernel": self.conv,
            "ssm.inner_size": self.v_heads * self.state,
            "ssm.state_size": self.state,
            "ssm.time_step_rank": self.v_heads,
            "ssm.group_count": self.k_heads,
            "full_attention_interval": self.interval,
        }
        if self.recurrent is not None:
            keys["attention.recurrent_layers"] = [*self.recurrent, *[False] * self.mtp]
        if self.mtp:
            keys["nextn_predict_layers"] = 1
        return {f"qwen35.{name}": value for name, value in keys.items()}

    def tensors(self) -> dict[str, F32]:
        """The same model under GGUF's names: norms carry the +1, A is -exp(A_log), value heads are tiled."""
        hf = self.hf_weights()
        out = {"token_embd.weight": hf["model.embed_tokens.weight"], "output_norm.weight": hf["model.norm.weight"] + 1}
        if not self.tied:
            out["output.weight"] = hf["lm_head.weight"]
        for i, recurrent in enumerate(self.is_recurrent):
            out.update(self._block(hf, f"model.layers.{i}.", f"blk.{i}.", recurrent))
        if self.scales:
            out = self._with_scales(out)
        if self.mtp:
            at, e = f"blk.{self.n_layer}.", self.n_embd
            extra = TinyTarget(**{**self.__dict__, "n_layer": 1, "recurrent": (False,), "mtp": False, "seed": -1})
            out.update(extra._block(extra.hf_weights(), "model.layers.0.", at, False))
            out[at + "nextn.eh_proj.weight"] = _matrix((e, 2 * e), 1.0, self.seed, "eh_proj")
            for name in ("enorm", "hnorm", "shared_head_norm"):
                out[at + f"nextn.{name}.weight"] = uniform((e,), 0.6, 1.4, self.seed, name)
        return out

    def write(self, path: Path | str, *, types: Types = "f32", tokenizer: bool = False) -> Path:
        """Writes the GGUF; with `tokenizer` it also carries byte_tokenizer(n_vocab), else no vocabulary at all."""
        keys = self.gguf_keys() | (byte_tokenizer(self.n_vocab) if tokenizer else {})
        return write_gguf(path, "qwen35", keys, self.tensors(), types=types)

    def _block(self, hf: Mapping[str, F32], src: str, dst: str, recurrent: bool) -> dict[str, F32]:
        names = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
        out = {
            "attn_norm.weight": hf[src + "input_layernorm.weight"] + 1,
            "post_attention_norm.weight": hf[src + "post_attention_layernorm.weight"] + 1,
        }
        if recurrent:
            gdn = {name: hf[src + "linear_attn." + name] for name in ("dt_bias", "A_log")}
            proj = {n: hf[f"{src}linear_attn.{n}.weight"] for n in (
                "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "norm", "out_proj")}  # fmt: skip
            out |= {
                "attn_qkv.weight": self._tile_v_part(proj["in_proj_qkv"]),
                "attn_gate.weight": self._tile(proj["in_proj_z"]),
                "ssm_conv1d.weight": self._tile_v_part(proj["conv1d"][:, 0]),
                "ssm_dt.bias": self._tile(gdn["dt_bias"]),
                "ssm_a": self._tile(-np.exp(gdn["A_log"])),
                "ssm_alpha.weight": self._tile(proj["in_proj_a"]),
                "ssm_beta.weight": self._tile(proj["in_proj_b"]),
                "ssm_norm.weight": proj["norm"],
                "ssm_out.weight": np.ascontiguousarray(self._tile(proj["out_proj"].T).T),
            }
        else:
            names |= {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}
            names |= {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
            out["attn_q_norm.weight"] = hf[src + "self_attn.q_norm.weight"] + 1
            out["attn_k_norm.weight"] = hf[src + "self_attn.k_norm.weight"] + 1
        out |= {f"{ours}.weight": hf[f"{src}{theirs}.weight"] for ours, theirs in names.items()}
        return {dst + name: data for name, data in out.items()}

    def _tile(self, x: F32) -> F32:
        """Value heads along axis 0, from grouped (head h uses key head h // r) to tiled (key head h % Hk)."""
        r = self.v_heads // self.k_heads
        return np.ascontiguousarray(x.reshape(self.k_heads, r, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape))

    def _tile_v_part(self, x: F32) -> F32:
        split = 2 * self.k_heads * self.state  # rows q | k | v
        return np.concatenate([x[:split], self._tile(x[split:])])

    @staticmethod
    def _with_scales(tensors: Mapping[str, F32]) -> dict[str, F32]:
        out: dict[str, F32] = {}
        for n, (name, data) in enumerate(tensors.items()):
            if data.ndim == 2 and name.startswith("blk.") and "conv1d" not in name:
                scale = np.float32(2.0 ** (n % 5 - 2))  # a power of two, so that the product is what it was
                out[name] = data / scale
                out[name.removesuffix("weight") + "scale"] = np.array([scale], np.float32)
            else:
                out[name] = data
        return out


# ---- drafter -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyDraft:
    """A random DFlash drafter. `of(target)` fits width, vocabulary and tapped layers to a target."""

    n_embd: int = 64
    n_vocab: int = 288
    n_target_layers: int = 4
    target_ids: tuple[int, ...] = (0, 2)  # Hugging Face's ids: the output of that layer (GGUF counts one more)
    n_layer: int = 2
    n_ff: int = 96
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    block_size: int = 8
    mask_token_id: int = 7
    layer_types: tuple[str, ...] | None = None  # None: all full_attention
    sliding_window: int | None = None
    is_causal: bool | None = None
    logit_scale: float | None = None
    softcap: float | None = None
    embedding_scale: float | None = None
    eps: float = 1e-6
    rope_theta: float = 10000.0
    n_ctx: int = 512
    seed: int = 0
    extra_config: Mapping[str, Any] = field(default_factory=dict)  # further top-level entries of config.json

    @classmethod
    def of(cls, target: TinyTarget, **fields: Any) -> TinyDraft:
        fitted = {"n_embd": target.n_embd, "n_vocab": target.n_vocab, "n_target_layers": target.n_layer}
        return cls(**{**fitted, "n_ctx": target.n_ctx, "target_ids": (0, target.n_layer - 2), **fields})

    @property
    def slides(self) -> list[bool]:
        return [kind == "sliding_attention" for kind in self.layer_types or ["full_attention"] * self.n_layer]

    def hf_config(self) -> dict[str, Any]:
        """config.json as z-lab writes it."""
        dflash: dict[str, Any] = {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_ids)}
        scalars = {
            "output_multiplier": self.logit_scale,
            "final_logit_softcapping": self.softcap,
            "input_embedding_scale": self.embedding_scale,
        }
        dflash |= {name: value for name, value in scalars.items() if value is not None}
        config: dict[str, Any] = {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "vocab_size": self.n_vocab,
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_ff,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_head_kv,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.n_ctx,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention" if s else "full_attention" for s in self.slides],
            "sliding_window": self.sliding_window,
            "use_sliding_window": self.sliding_window is not None,
            "max_window_layers": self.n_layer,
            "num_target_layers": self.n_target_layers,
            "block_size": self.block_size,
            "dflash_config": dflash,
            "torch_dtype": "float32",
        }
        if self.is_causal is not None:
            config["is_causal"] = self.is_causal
        return config | dict(self.extra_config)

    def hf_weights(self) -> dict[str, F32]:
        """State dict of dflash.model.DFlashDraftModel. Its norms carry no hidden +1."""
        key, e, d = ("draft", self.seed), self.n_embd, self.head_dim
        shapes = {
            "self_attn.q_proj": (self.n_head * d, e),
            "self_attn.k_proj": (self.n_head_kv * d, e),
            "self_attn.v_proj": (self.n_head_kv * d, e),
            "self_attn.o_proj": (e, self.n_head * d),
            "mlp.gate_proj": (self.n_ff, e),
            "mlp.up_proj": (self.n_ff, e),
            "mlp.down_proj": (e, self.n_ff),
        }
        w = {"fc.weight": _matrix((e, len(self.target_ids) * e), 1.0, *key, "fc")}
        for name in ("hidden_norm", "norm"):
            w[f"{name}.weight"] = uniform((e,), 0.6, 1.4, *key, name)
        for i in range(self.n_layer):
            at = f"layers.{i}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                w[f"{at}{name}.weight"] = uniform((e,), 0.6, 1.4, *key, at, name)
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                w[f"{at}{name}.weight"] = uniform((d,), 1.0, 2.0, *key, at, name)
            for name, shape in shapes.items():
                gain = 2.0 if name == "self_attn.o_proj" else 1.0
                w[f"{at}{name}.weight"] = _matrix(shape, gain, *key, at, name)
        return w

    def gguf_keys(self) -> dict[str, Any]:
        # A folder's sliding layers without a window are causal and see everything: here, a window as long as n_ctx.
        window = self.sliding_window or (self.n_ctx if any(self.slides) else None)
        keys: dict[str, Any] = {
            "block_count": self.n_layer,
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": self.eps,
            "rope.freq_base": self.rope_theta,
            "block_size": self.block_size,
            "target_layers": [i + 1 for i in self.target_ids],
        }
        optional = {
            "attention.causal": self.is_causal,
            "attention.sliding_window": window,
            "attention.sliding_window_pattern": self.slides if window is not None else None,
            "logit_scale": self.logit_scale,
            "final_logit_softcapping": self.softcap,
            "embedding_scale": self.embedding_scale,
        }
        keys |= {name: value for name, value in optional.items() if value is not None}
        keys = {f"dflash.{name}": value for name, value in keys.items()}
        return keys | {"tokenizer.ggml.mask_token_id": self.mask_token_id}

    def tensors(self) -> dict[str, F32]:
        """The same weights under GGUF's names."""
        renamed = {
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
            "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "fc": "fc", "hidden_norm": "enc.output_norm",
            "norm": "output_norm",
        }  # fmt: skip
        out: dict[str, F32] = {}
        for name, data in self.hf_weights().items():
            stem = name.removesuffix(".weight")
            if stem.startswith("layers."):
                _, layer, stem = stem.split(".", 2)
                out[f"blk.{layer}.{renamed[stem]}.weight"] = data
            else:
                out[f"{renamed[stem]}.weight"] = data
        return out

    def write(self, path: Path | str, *, types: Types = "f32", tokenizer: bool = False) -> Path:
        """Writes the GGUF; with `tokenizer` it also carries the target's vocabulary (llama.cpp wants one)."""
        keys = self.gguf_keys() | (byte_tokenizer(self.n_vocab) if tokenizer else {})
        return write_gguf(path, "dflash", keys, self.tensors(), types=types)

    def write_folder(self, folder: Path | str, *, dtype: str = "F32") -> Path:
        """Writes config.json and model.safetensors (dtype "F32", "F16" or "BF16") into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.hf_config(), indent=1) + "\n")
        write_safetensors(folder / "model.safetensors", self.hf_weights(), dtype=dtype)
        return folder


def write_safetensors(path: Path | str, tensors: Mapping[str, F32], *, dtype: str = "F32") -> Path:
    """A safetensors file by hand, since numpy has no bfloat16: u64 header length, JSON header, data."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    end = 0
    for name, data in tensors.items():
        if dtype == "BF16":
            bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
            blob = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()
        else:
            blob = data.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [end, end + len(blob)]}
        end += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return Path(path)
