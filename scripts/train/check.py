"""Stage 3b: the exported file against llama.cpp (the prebuilt `xllamacpp` wheel): same greedy ids as model.py.

    python scripts/train/check.py --gguf models/tiny-target-f16.gguf

Compares greedy continuations of held-out prefixes, token for token, and says where the first difference is and how
close the two best logits were there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xllamacpp
from common import MODELS, announce, log, parser
from model import CHUNK, Target, TargetConfig


def server(gguf: Path, n_ctx: int = 2048) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.warmup = n_ctx, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def greedy(s: xllamacpp.Server, ids: list[int], n: int) -> list[int]:
    """The ids that llama.cpp continues with at temperature 0, end of text ignored."""
    out = s.handle_completions(
        {"prompt": ids, "n_predict": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "logprobs": 1}
    )
    return [t["id"] for t in out["choices"][0]["logprobs"]["content"]]


@torch.no_grad()
def logits(model: Target, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), V] in f32; padded on the right to whole chunks, which a causal model does not see."""
    padded = ids + [0] * (-len(ids) % CHUNK)
    return model(torch.tensor([padded]))[0, : len(ids)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--gguf", type=Path, default=MODELS / "tiny-target-f16.gguf")
    p.add_argument("--prompts", type=int, default=12)
    p.add_argument("--tokens", type=int, default=64)
    a = p.parse_args()
    announce(a.work)
    torch.set_num_threads(1)
    saved = torch.load(a.work / "target.pt")
    model = Target(TargetConfig(**saved["config"]))
    model.load_state_dict(
        {k: v.half().float() if v.dim() == 2 and not k.endswith("conv") else v for k, v in saved["model"].items()}
    )
    valid = np.load(a.work / "valid.npy")
    s, same = server(a.gguf), 0
    for i, start in enumerate(np.linspace(0, len(valid) - 400, a.prompts).astype(int)):
        prompt = valid[start : start + 20 + 25 * (i % 12)].tolist()
        theirs = greedy(s, prompt, a.tokens)
        z = logits(model, prompt + theirs)[len(prompt) - 1 : -1]
        ours = z.argmax(-1).tolist()
        wrong = [j for j in range(len(theirs)) if ours[j] != theirs[j]]
        same += not wrong
        if wrong:
            top = z[wrong[0]].topk(2).values
            log(f"prompt {i}: differs at token {wrong[0]}, margin of our best two logits {top[0] - top[1]:.4f}")
    log(f"{same} of {a.prompts} prompts, {a.tokens} tokens each: the same greedy ids")


if __name__ == "__main__":
    main()
