"""Makes the vectors in tests/oracles/ that the tests hold pydflash to, with other people's runtimes.

    pip install '.[oracle]'
    python scripts/make_oracles.py --all

target    transformers' Qwen3_5ForCausalLM on random small models  -> tests/oracles/target.npz
draft     the dflash package's DFlashDraftModel on the same        -> tests/oracles/draft.npz
llamacpp  llama.cpp (xllamacpp) on the shipped model in models/    -> tests/oracles/llamacpp.json, llamacpp.npz
checks    what the runtime assumes, tried against transformers and llama.cpp; writes nothing

Everything is seeded; the same packages give the same files. It refuses packages of other versions than the ones named
here, and stops with status 1 when a check fails, before writing what depends on it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.oracles import cases  # noqa: E402
from tests.tiny_models import F32, TinyDraft, TinyTarget, to_f32  # noqa: E402

PINNED = {"torch": "2.13.0", "transformers": "5.23.0", "dflash": "0.1.0"}
OLDEST_LLAMACPP = (2026, 10)  # xllamacpp numbers its releases by year and month of llama.cpp
SHIPPED_TARGET = ROOT / "models" / "tiny-target-f16.gguf"
SHIPPED_DRAFT = ROOT / "models" / "tiny-draft"
N_PREDICT = 64
SETTINGS = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1, "cache_prompt": False, "seed": 1}


Ids = npt.NDArray[np.int32]


def say(text: str) -> None:
    print(text, flush=True)


def origin(what: str, *packages: str, **more: Any) -> dict[str, Any]:
    """Where a file of vectors comes from, for the reader of the file."""
    return {
        "what": what,
        "command": "python scripts/make_oracles.py --all",
        "versions": {p: importlib.metadata.version(p) for p in (*packages, "numpy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        **more,
    }


# ---- transformers ------------------------------------------------------------------------------------------------


def torch_target(model: TinyTarget) -> Any:
    """Qwen3_5ForCausalLM in float32 on one thread, with the tiny model's weights and nothing left at its default."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.set_num_threads(1)
    net = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**model.hf_config())).eval()
    state = {name: torch.from_numpy(data) for name, data in model.hf_weights().items()}
    missing, unexpected = net.load_state_dict(state, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if model.tied else set()):
        raise SystemExit(f"the tiny model's names do not fit transformers: missing {missing}, unexpected {unexpected}")
    return net


def run_target(net: Any, ids: Ids) -> tuple[F32, F32]:
    """Logits [n, n_vocab] and the input of every layer [n, n_layer, n_embd]."""
    import torch

    with torch.inference_mode():
        out = net(torch.tensor([ids.tolist()]), output_hidden_states=True, use_cache=False)
    # hidden_states[k] is the input of layer k; the last entry has been through the final norm and is no layer's input.
    hidden = torch.stack([h[0] for h in out.hidden_states[:-1]], dim=1)
    return out.logits[0].float().numpy(), hidden.float().numpy()


def make_target() -> None:
    arrays: dict[str, Any] = {}
    for name, case in cases.TARGET_CASES.items():
        ids = cases.token_ids(case.model.n_vocab, case.n_tokens)
        net = torch_target(case.model)
        logits, hidden = run_target(net, ids)
        changed = ids.copy()
        changed[0] = (changed[0] + 1) % case.model.n_vocab
        memory = float(np.abs(run_target(net, changed)[0][-1] - logits[-1]).max())
        exact = float(np.abs(run_target(net.double(), ids)[0] - logits).max())
        scale = float(np.abs(logits).max())
        say(
            f"target {name}: logits std {logits.std():.2f}, max {scale:.1f}; float32 against float64 weights "
            f"{exact / scale:.1e} of that; token 0 moves the last logits by {memory:.3f}"
        )
        if not (1.0 < logits.std() < 5.0 and memory > 0.05 and exact < 1e-4 * scale):
            raise SystemExit(f"target {name}: a degenerate model proves nothing; change its weights' scale")
        at = cases.checked_positions(len(ids))
        arrays |= {
            f"{name}.ids": ids,
            f"{name}.positions": np.array(at, np.int32),
            f"{name}.logits": logits[at],
            f"{name}.hidden": hidden[at],
            f"{name}.weights": np.array(cases.fingerprint(case.model.hf_weights())),
        }
    about = origin("Qwen3_5ForCausalLM, float32, eager torch on the CPU, one thread", "torch", "transformers")
    save(cases.TARGET_FILE, arrays, about)


# ---- dflash ------------------------------------------------------------------------------------------------------


def torch_draft(draft: TinyDraft) -> Any:
    """The package's drafter, read back from z-lab's layout, so that config.json is read as it reads it."""
    from dflash.model import DFlashDraftModel

    with tempfile.TemporaryDirectory() as folder:
        draft.write_folder(folder)
        net, info = DFlashDraftModel.from_pretrained(folder, output_loading_info=True, dtype="float32")
    if any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise SystemExit(f"the tiny drafter's names do not fit the dflash package: {info}")
    return net.eval()


def run_draft(net: Any, target: Any, ids: Ids, *, bf16_features: bool = False) -> F32:
    """Logits [block_size - 1, n_vocab] for the block that starts with the pending token ids[-1].

    bf16_features: round the target's hidden states to bfloat16 first, as a runtime that stores them so does.
    """
    import torch
    from dflash.model import _draft_value, _output_head, _raw_input_embeddings, extract_context_feature

    n = len(ids) - 1
    with torch.inference_mode():
        out = target(torch.tensor([ids.tolist()]), output_hidden_states=True, use_cache=False)
        features = extract_context_feature(out.hidden_states, net.target_layer_ids)[:, :n]
        if bf16_features:
            features = features.bfloat16().float()
        block = torch.full((1, net.block_size), net.mask_token_id)
        block[0, 0] = int(ids[-1])
        scale = float(_draft_value(net.config, "input_embedding_scale", 1.0))
        hidden = net(
            position_ids=torch.arange(n + net.block_size)[None],
            noise_embedding=_raw_input_embeddings(target, block, scale),
            target_hidden=features,
        )
        logits: F32 = net.compute_logits(hidden[:, 1:], _output_head(target))[0].float().numpy()
    return logits


def make_draft() -> None:
    arrays: dict[str, Any] = {}
    for name, case in cases.DRAFT_CASES.items():
        target, net = torch_target(case.target), torch_draft(case.draft)
        arrays[f"{name}.weights"] = np.array(cases.fingerprint(case.target.hf_weights(), case.draft.hf_weights()))
        for n in case.n_tokens:
            ids = cases.token_ids(case.target.n_vocab, n, seed=1)
            logits = run_draft(net, target, ids)
            changed = ids.copy()
            changed[max(n - 2, 0)] = (changed[max(n - 2, 0)] + 1) % case.target.n_vocab
            context = float(np.abs(run_draft(net, target, changed) - logits).max())
            say(
                f"draft {name}, {n} tokens: logits std {logits.std():.2f}; the token before moves them by {context:.3f}"
            )
            if not (logits.std() > 0.5 and context > 0.05):
                raise SystemExit(f"draft {name}: a degenerate model proves nothing; change its weights' scale")
            arrays |= {
                f"{name}.{n}.ids": ids,
                f"{name}.{n}.logits": logits,
                f"{name}.{n}.logits_bf16_features": run_draft(net, target, ids, bf16_features=True),
            }
    about = origin("DFlashDraftModel, float32, eager torch on the CPU, one thread", "torch", "transformers", "dflash")
    save(cases.DRAFT_FILE, arrays, about)


# ---- llama.cpp ---------------------------------------------------------------------------------------------------


class LlamaCpp:
    """A llama.cpp server inside this process: one slot, one thread, f32 KV cache, no flash attention, no GPU."""

    def __init__(self, target: Path, draft: Path | None = None) -> None:
        import xllamacpp as x

        params = x.CommonParams()
        params.model.path = str(target)
        params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = False
        params.verbosity = 1
        if draft is not None:
            params.speculative.types = [x.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_DFLASH]
            params.speculative.draft.mparams.path = str(draft)
            params.speculative.draft.cpuparams.n_threads = 1
        self.server = x.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    def tokenize(self, text: str) -> list[int]:
        return list(self.post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"])

    def greedy(self, ids: Sequence[int], n: int) -> dict[str, Any]:
        return self.post("/completion", {"prompt": list(ids), "n_predict": n, "return_tokens": True, **SETTINGS})

    def logprobs(self, ids: Sequence[int], n_vocab: int) -> F32:
        """log-softmax [n_vocab] after ids."""
        body = {"prompt": list(ids), "n_predict": 1, "n_probs": n_vocab, **SETTINGS, "samplers": []}
        row = np.full(n_vocab, np.nan, np.float32)
        said = self.post("/completion", body).get("completion_probabilities")  # nothing when the end token comes first
        for entry in said[0]["top_logprobs"] if said else ():
            row[entry["id"]] = entry["logprob"]
        if np.isnan(row).any():
            raise SystemExit(f"llama.cpp did not return the whole vocabulary after {list(ids)[-8:]}: change the prompt")
        return row


# Beginnings of the kind of text the shipped model knows; none is copied from a file.
PROMPTS = [
    "def fibonacci(n):\n",
    "import os\nimport sys\n\n\ndef main():\n",
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "    for key, value in self.items():\n        if value is None:\n",
    '"""Utilities for reading and writing archives.\n\n',
    "try:\n    import ssl\nexcept ImportError:\n",
    "def parse_header(line):\n    # Split the line at the first colon\n",
    "    def close(self):\n        with self._lock:\n",
    "@property\ndef name(self):\n    return ",
    "if __name__ == '__main__':\n",
    "async def handler(reader, writer):\n    data = await ",
    "    raise ValueError(f\"expected a positive number, got {",
    "_CACHE = {}\n\n\ndef lookup(path):\n    try:\n        return _CACHE[path]\n    except KeyError:\n",
    "x = [i * i for i in range(10)]\nassert sum(x) == ",
]  # fmt: skip
N_LOGPROB_PROMPTS = 6


def n_vocab_of(path: Path) -> int:
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    return int(tensors["token_embd.weight"].shape[1])


def make_llamacpp(model: Path, draft: Path | None) -> None:
    quantised = model.with_name(model.name.replace("f16", "q4_k_m"))
    for path in (model, quantised):
        if not path.is_file():
            raise SystemExit(f"{path} is not there: name the F16 target with --model, its Q4_K_M mix lies beside it")
    n_vocab = n_vocab_of(model)
    with tempfile.TemporaryDirectory() as folder:
        f32 = to_f32(model, Path(folder) / "target-f32.gguf")
        llama = LlamaCpp(f32)
        prompts = []
        for text in PROMPTS:
            ids = llama.tokenize(text)
            answer = llama.greedy(ids, N_PREDICT)
            prompts.append({"text": text, "ids": ids, "greedy": answer["tokens"], "stop": answer["stop_type"]})
        asked = [p["ids"] for p in prompts[:N_LOGPROB_PROMPTS]]
        rows = {"logprobs.f32": np.stack([llama.logprobs(ids, n_vocab) for ids in asked])}
        for kind, path in (("f16", model), ("q4_k_m", quantised)):
            as_shipped = LlamaCpp(path)
            rows[f"logprobs.{kind}"] = np.stack([as_shipped.logprobs(ids, n_vocab) for ids in asked])
        say(
            f"llamacpp: {len(prompts)} prompts, {sum(len(p['greedy']) for p in prompts)} tokens, "
            f"{sum(p['stop'] == 'eos' for p in prompts)} ended by the end token"
        )
        if draft is not None:
            check_llamacpp_draft(f32, draft, prompts, Path(folder))
    about = origin(
        "greedy continuations by llama.cpp: the model dequantised to f32, f32 KV cache, no flash attention, one thread",
        "xllamacpp",
        request=SETTINGS | {"n_predict": N_PREDICT},
    )
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (model, quantised)}
    document = {"origin": about, "sha256": sha256, "prompts": prompts}
    lines = json.dumps(document, indent=1, ensure_ascii=False)
    lines = _one_line_lists(lines)
    cases.LLAMACPP_FILE.write_text(lines + "\n")
    say(f"wrote {cases.LLAMACPP_FILE.relative_to(ROOT)}, {cases.LLAMACPP_FILE.stat().st_size:,} bytes")
    save(cases.LLAMACPP_LOGPROBS_FILE, rows | {"sha256": np.array(json.dumps(sha256))}, about)


def _one_line_lists(text: str) -> str:
    import re

    return re.sub(r"\[\s+([-\d,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)


def check_llamacpp_draft(target: Path, draft: Path, prompts: list[dict[str, Any]], folder: Path) -> None:
    """llama.cpp must open the drafter as pydflash writes it, and draft with it the text it says without."""
    if draft.is_dir():
        try:
            from pydflash.convert import convert
        except ImportError as error:
            raise SystemExit(f"{draft} is a folder, and pydflash converts it: pip install . first ({error})") from None

        convert(draft, folder / "draft.gguf", target=target)
        draft = folder / "draft.gguf"
    llama = LlamaCpp(target, draft)
    same = drafted = accepted = 0
    for prompt in prompts:
        answer = llama.greedy(prompt["ids"], N_PREDICT)
        same += answer["tokens"] == prompt["greedy"]
        drafted += answer["timings"].get("draft_n", 0)
        accepted += answer["timings"].get("draft_n_accepted", 0)
    say(f"llama.cpp with the drafter: {same}/{len(prompts)} continuations the same, {accepted}/{drafted} accepted")
    if drafted == 0 or accepted == 0:
        raise SystemExit(f"llama.cpp did not draft with {draft}: it accepted {accepted} of {drafted} drafted tokens")


# ---- checks ------------------------------------------------------------------------------------------------------


def check_assumptions() -> None:
    check_mrope()
    check_l2_norm()
    check_gguf_spelling()


def check_mrope() -> None:
    """For text, M-RoPE is NeoX rope on the one position, whatever its sections."""
    import torch

    worst = 0.0
    for sections in ([3, 3, 2], [8, 0, 0], [2, 2, 4]):
        model = TinyTarget(rope_theta=1e7, seed=9)
        config = torch_target(model).config
        config.rope_parameters["mrope_section"] = sections
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding, apply_rotary_pos_emb

        positions = torch.tensor([0, 1, 7, 300, 511])
        cos, sin = Qwen3_5TextRotaryEmbedding(config)(torch.zeros(1), positions[None, None].expand(3, 1, -1))
        x = torch.randn(1, 2, 5, model.head_dim, generator=torch.Generator().manual_seed(0))
        theirs = apply_rotary_pos_emb(x, x, cos, sin)[0].double().numpy()[0]
        worst = max(worst, float(np.abs(theirs - neox_rope(x.double().numpy()[0], positions.numpy(), model)).max()))
    say(f"check: M-RoPE on equal positions against NeoX rope, three choices of sections: {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit("M-RoPE for text is not NeoX rope on the temporal position")


def neox_rope(x: Any, positions: Any, model: TinyTarget) -> Any:
    """Rotates pairs (i, i + n_rot/2) of the first n_rot dims. x: [heads, n, head_dim] float64."""
    half = model.n_rot // 2
    angle = positions[:, None] * model.rope_theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half : 2 * half]
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle), x[..., 2 * half :]]
    return np.concatenate(turned, axis=-1)


def check_l2_norm() -> None:
    """q and k are divided by sqrt(sum of squares + eps): it shows only in vectors of length near sqrt(eps)."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import l2norm

    x = torch.linspace(-1, 1, 16) * torch.tensor([[1.0], [1e-2], [1e-3], [1e-4]])
    theirs, squares = l2norm(x, dim=-1, eps=1e-6).double().numpy(), (x.double() ** 2).sum(-1, keepdim=True).numpy()
    inside = float(np.abs(theirs - x.double().numpy() / np.sqrt(squares + 1e-6)).max())
    outside = float(np.abs(theirs - x.double().numpy() / np.maximum(np.sqrt(squares), 1e-6)).max())
    say(f"check: l2 norm against sqrt(sum + eps) {inside:.1e}, against max(norm, eps) {outside:.1e}")
    if inside > 1e-6 or outside < 1e-3:
        raise SystemExit("the l2 norm of q and k is not x / sqrt(sum of squares + eps)")


def check_gguf_spelling() -> None:
    """The tiny targets say the same as GGUF in llama.cpp as in transformers: the spelling of the format is theirs."""
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases.TARGET_CASES.items():
            ids = cases.token_ids(case.model.n_vocab, case.n_tokens)
            logits = run_target(torch_target(case.model), ids)[0][-1].astype(np.float64)
            expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            llama = LlamaCpp(case.model.write(Path(folder) / "target.gguf", tokenizer=True))
            found = llama.logprobs([int(i) for i in ids], case.model.n_vocab)
            error = float(np.abs(found - expected).max() / np.abs(logits).max())
            say(f"check: llama.cpp against transformers on {name}: {error:.1e} of the logits' scale")
            if error > 1e-3:
                raise SystemExit(f"llama.cpp and transformers differ on {name}: the GGUF is spelled wrongly")


# ---- the command -------------------------------------------------------------------------------------------------


def save(path: Path, arrays: dict[str, Any], about: dict[str, Any]) -> None:
    np.savez_compressed(path, origin=np.array(json.dumps(about)), **arrays)
    say(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size:,} bytes")


def check_versions(packages: Sequence[str]) -> None:
    for package in packages:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"{package} is not installed: pip install '.[oracle]'") from None
        if package in PINNED and found.split("+")[0] != PINNED[package]:
            raise SystemExit(f"{package} {PINNED[package]} is needed, {found} is installed: pip install '.[oracle]'")
        if package == "xllamacpp" and tuple(map(int, found.split(".")[:2])) < OLDEST_LLAMACPP:
            raise SystemExit(f"xllamacpp of October 2026 or newer is needed, {found} is installed")


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    say(f"{what}: {time.perf_counter() - start:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("target", "draft", "llamacpp", "checks", "all"):
        parser.add_argument(f"--{name}", action="store_true", help="all four parts" if name == "all" else None)
    parser.add_argument("--model", type=Path, default=SHIPPED_TARGET, help="target GGUF for llama.cpp")
    parser.add_argument("--drafter", type=Path, help="drafter (GGUF or z-lab folder) that llama.cpp should try")
    args = parser.parse_args()
    parts = [p for p in ("checks", "target", "draft", "llamacpp") if args.all or getattr(args, p)]
    if not parts:
        parser.error("nothing to do: --all, or some of --target --draft --llamacpp --checks")
    check_versions([*PINNED, "xllamacpp"] if set(parts) - {"llamacpp"} else ["xllamacpp"])
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    drafter = args.drafter or (SHIPPED_DRAFT if SHIPPED_DRAFT.is_dir() and args.model == SHIPPED_TARGET else None)
    actions = {
        "checks": check_assumptions,
        "target": make_target,
        "draft": make_draft,
        "llamacpp": lambda: make_llamacpp(args.model, drafter),
    }
    for part in parts:
        with timed(part):
            actions[part]()


if __name__ == "__main__":
    main()
