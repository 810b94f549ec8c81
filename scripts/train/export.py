"""Stage 3: write the target as GGUF (F16 matrices; F32 norms, convolution and per-head vectors).

    python scripts/train/export.py --out models/tiny-target-f16.gguf

Owns the mapping from model.py's names to GGUF's. Training called this already for intermediate files. Refuses a
tokenizer whose size is not the model's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import torch
from common import CHAT_TEMPLATE, EOT, FIRST_SPECIAL, IM_END, MASK, MODELS, announce, log, parser
from model import TargetConfig

ATTENTION = {
    "q.weight": "attn_q.weight",
    "k.weight": "attn_k.weight",
    "v.weight": "attn_v.weight",
    "o.weight": "attn_output.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
}
DELTA_NET = {
    "qkv.weight": "attn_qkv.weight",
    "z.weight": "attn_gate.weight",
    "alpha.weight": "ssm_alpha.weight",
    "beta.weight": "ssm_beta.weight",
    "o.weight": "ssm_out.weight",
    "conv": "ssm_conv1d.weight",
    "dt": "ssm_dt.bias",
    "a_log": "ssm_a",
    "norm": "ssm_norm.weight",
}
BLOCK = {
    "norm": "attn_norm.weight",
    "ffn_norm": "post_attention_norm.weight",
    "ffn.gate.weight": "ffn_gate.weight",
    "ffn.up.weight": "ffn_up.weight",
    "ffn.down.weight": "ffn_down.weight",
}
TOP = {"embed.weight": "token_embd.weight", "norm": "output_norm.weight", "head.weight": "output.weight"}


def gguf_name(name: str, c: TargetConfig) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    mixer = ATTENTION if c.is_attention(int(layer)) else DELTA_NET
    return f"blk.{layer}." + (BLOCK[rest] if rest in BLOCK else mixer[rest.removeprefix("mixer.")])


def add_tokenizer(w: gguf.GGUFWriter, path: Path, n_vocab: int) -> None:
    model = json.loads(path.read_text())
    vocab = {**model["model"]["vocab"], **{t["content"]: t["id"] for t in model["added_tokens"]}}
    if len(vocab) != n_vocab:
        raise SystemExit(f"{path} has {len(vocab)} tokens, the model {n_vocab}: train them together")
    tokens = sorted(vocab, key=vocab.__getitem__)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen35")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.NORMAL] * FIRST_SPECIAL + [gguf.TokenType.CONTROL] * (n_vocab - FIRST_SPECIAL))
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]])
    w.add_eos_token_id(IM_END)
    w.add_pad_token_id(EOT)
    w.add_mask_token_id(MASK)
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)


def export_target(
    state: dict[str, torch.Tensor], c: TargetConfig, tokenizer: Path, out: Path, f32: bool = False
) -> None:
    """Write `state` (a Target's state_dict) to `out`, through a temporary file beside it."""
    part = out.with_suffix(".part")
    w = gguf.GGUFWriter(part, "qwen35")
    w.add_name("pydflash tiny target")
    w.add_license("PSF-2.0")
    w.add_description("Trained on CPython's standard library; see models/README.md")
    w.add_file_type(gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_F16)
    w.add_block_count(c.n_layer)
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.n_embd)
    w.add_feed_forward_length(c.n_ff)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_head_kv)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_rope_freq_base(c.rope_theta)
    w.add_rope_dimension_count(c.rope_dim)
    w.add_rope_dimension_sections(list(c.rope_sections))
    w.add_ssm_conv_kernel(c.conv)
    w.add_ssm_inner_size(c.n_v * c.d_state)
    w.add_ssm_state_size(c.d_state)
    w.add_ssm_time_step_rank(c.n_v)
    w.add_ssm_group_count(c.n_k)
    w.add_full_attention_interval(c.interval)
    w.add_vocab_size(c.n_vocab)
    add_tokenizer(w, tokenizer, c.n_vocab)
    for name, tensor in state.items():
        target = gguf_name(name, c)
        x = tensor.detach().float()
        if name.endswith("a_log"):
            x = -x.exp()
        matrix = x.dim() == 2 and not name.endswith("conv") and not f32
        w.add_tensor(target, x.numpy().astype(np.float16 if matrix else np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(part, out)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--out", type=Path, default=MODELS / "tiny-target-f16.gguf")
    p.add_argument("--f32", action="store_true", help="keep matrices in F32")
    a = p.parse_args()
    announce(a.work)
    saved = torch.load(a.work / "target.pt")
    a.out.parent.mkdir(exist_ok=True)
    export_target(saved["model"], TargetConfig(**saved["config"]), a.work / "tokenizer.json", a.out, a.f32)
    log(f"wrote {a.out}, {a.out.stat().st_size / 2**20:.1f} MiB, after {saved['tokens'] / 1e6:.2f}M tokens")


if __name__ == "__main__":
    main()
