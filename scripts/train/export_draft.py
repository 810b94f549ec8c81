"""Stage 6: write the drafter as z-lab lays it out: config.json and BF16 model.safetensors.

    python scripts/train/export_draft.py --out models/tiny-draft

Owns the mapping from drafter.py's names. Training called this already for intermediate files. Refuses nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from common import EOT, IM_END, MODELS, announce, log, parser
from drafter import DraftConfig
from safetensors.torch import save_file

LAYER = {
    "norm": "input_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "o.weight": "self_attn.o_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn.gate.weight": "mlp.gate_proj.weight",
    "ffn.up.weight": "mlp.up_proj.weight",
    "ffn.down.weight": "mlp.down_proj.weight",
}
TOP = {"fc.weight": "fc.weight", "hidden_norm": "hidden_norm.weight", "norm": "norm.weight"}


def hf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, rest = name.split(".", 2)
    return f"layers.{layer}.{LAYER[rest]}"


def export_draft(state: dict[str, torch.Tensor], c: DraftConfig, n_vocab: int, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tensors = {hf_name(k): v.detach().bfloat16().contiguous() for k, v in state.items()}
    save_file(tensors, out / "model.part", metadata={"format": "pt"})
    (out / "model.part").chmod(0o644)  # safetensors writes for its owner alone
    os.replace(out / "model.part", out / "model.safetensors")
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "block_size": c.block,
        "dflash_config": {"mask_token_id": c.mask, "target_layer_ids": c.taps},
        "num_target_layers": c.target_layers,
        "hidden_size": c.n_embd,
        "intermediate_size": c.n_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_head_kv,
        "head_dim": c.head_dim,
        "layer_types": ["full_attention"] * c.n_layer,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": c.n_layer,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "max_position_embeddings": 262144,
        "vocab_size": n_vocab,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": EOT,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--out", type=Path, default=MODELS / "tiny-draft")
    a = p.parse_args()
    announce(a.work)
    saved = torch.load(a.work / "draft.pt")
    export_draft(saved["model"], DraftConfig(**saved["config"]), 4096, a.out)
    log(f"wrote {a.out} after {saved['step']} steps")


if __name__ == "__main__":
    main()
