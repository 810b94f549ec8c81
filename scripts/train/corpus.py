"""Stage 1: the corpus and the tokenizer.

    python scripts/train/corpus.py --lib /usr/lib/python3.11 [--more /usr/lib/python3.13 ...]

Text: every .py of CPython's standard library but tests and code-page tables, plus the files that only the `--more`
versions have (same rules), plus question-and-answer pairs made from the docstrings in Qwen's chat form. Files listed in
common.HELD_OUT go to the validation set alone. Writes corpus.json (what went in), tokenizer.json, train.npy, valid.npy
(uint16 ids) and docs.npy (document starts) into --work. PSF licence throughout. Refuses nothing but an empty library.
"""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import numpy as np
from common import EOT, HELD_OUT, SPECIALS, VOCAB_SIZE, announce, log, parser
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Qwen3.5's split (llama.cpp's pre-tokenizer "qwen35"): letters take their combining marks, digits go one by one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SKIP = {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "lib-dynload", "pgen2", "_bundled"}
QUESTIONS = [
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name}.",
    "Describe {name} in a few words.",
    "How would you document {name}?",
]


def library(root: Path) -> dict[str, str]:
    """Relative path -> text of every file of one standard library that the rules above let in."""
    out = {}
    for path in sorted(root.rglob("*.py")):
        rel = path.relative_to(root)
        if SKIP.isdisjoint(rel.parts) and not rel.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="ignore").replace("\r\n", "\n")
            if text.strip():
                out[rel.as_posix()] = text
    return out


def chats(files: dict[str, str], rng: random.Random) -> list[str]:
    """One chat per documented public function, class or method."""
    out = []
    for rel, text in files.items():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        module = rel.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        todo: list[tuple[str, ast.AST]] = [(module, tree)]
        while todo:
            name, node = todo.pop()
            doc = (
                ast.get_docstring(node)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                else None
            )
            if doc and len(doc) >= 20:
                answer = doc.strip().split("\n\n")
                answer = "\n\n".join(answer[: rng.choice([1, 1, 2])])[:600]
                question = rng.choice(QUESTIONS).format(name=name)
                out.append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
                    todo.append((f"{name}.{child.name}", child))
    rng.shuffle(out)
    return out


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--lib", type=Path, required=True, help="Lib folder of CPython 3.11")
    p.add_argument("--more", type=Path, nargs="*", default=[], help="Lib folders of versions with other files")
    p.add_argument("--chat-share", type=float, default=0.05, help="share of the characters that chat pairs may take")
    a = p.parse_args()
    announce(a.work)
    rng = random.Random(1)
    files = library(a.lib)
    if not files:
        raise SystemExit(f"no standard library under {a.lib}: pass the folder that holds os.py")
    for more in a.more:
        new = {k: v for k, v in library(more).items() if k not in files and k not in HELD_OUT}
        log(f"{more}: {len(new)} files that are new, {sum(map(len, new.values()))} characters")
        files.update(new)
    held = {k: files.pop(k) for k in HELD_OUT}
    talk = chats(files, rng)
    budget = int(a.chat_share * sum(map(len, files.values())))
    kept, used = [], 0
    for t in talk:
        if used + len(t) > budget:
            break
        kept.append(t)
        used += len(t)
    log(f"{len(files)} files, {sum(map(len, files.values()))} characters; {len(kept)} of {len(talk)} chats, {used}")

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        files.values(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.add_special_tokens(SPECIALS)
    assert tok.get_vocab_size() == VOCAB_SIZE
    assert tok.token_to_id(SPECIALS[0]) == EOT
    tok.save(str(a.work / "tokenizer.json"))

    docs = list(files.values()) + ["".join(kept[i : i + 8]) for i in range(0, len(kept), 8)]
    rng.shuffle(docs)
    for name, texts in (("train", docs), ("valid", [held[k] for k in HELD_OUT])):
        ids = [[*e.ids, EOT] for e in tok.encode_batch(texts)]
        flat = np.concatenate([np.array(i, np.uint16) for i in ids])
        np.save(a.work / f"{name}.npy", flat)
        np.save(a.work / f"{name}_docs.npy", np.cumsum([0] + [len(i) for i in ids]))
        log(f"{name}: {len(flat)} tokens, {sum(map(len, texts)) / len(flat):.2f} characters a token")
    (a.work / "corpus.json").write_text(
        json.dumps(
            {"files": sorted(files), "held_out": HELD_OUT, "chats": len(kept), "characters": sum(map(len, docs))},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
