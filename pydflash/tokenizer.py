"""Text to token ids and back, as a GGUF file describes it: byte-level BPE of the GPT-2 and Qwen kind.

Encoding runs in the `tokenizers` package; decoding is a table of bytes, exact for any ids. Refuses vocabularies of
another kind and pre-tokenizers it does not know by name: a tokenizer that is nearly right is worse than none.
"""

from __future__ import annotations

import codecs
import operator
import os
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from pydflash._gguf import Gguf
from pydflash.errors import ArgumentError, ModelFormatError, UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
# Qwen3.5 counts combining marks as letters. Its tokenizer.json also normalises to NFC, which GGUF runtimes do not.
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_SPLITS = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "qwen35": _QWEN35,
}

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
# Control tokens that end a turn; files seldom name more than one of them in their keys.
_END_TEXTS = frozenset(("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"))
# What models say to be read by programs. Files differ in whether these are control tokens; they are text here.
_SAID_TEXTS = frozenset(f"<{end}{name}>" for end in ("", "/") for name in ("think", "tool_call", "tool_response"))
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, every other byte for chr(256 + i), in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer. Build it with `Tokenizer.from_gguf`.

    n_vocab: number of tokens.
    bos_id, eos_id: beginning and end of text, or None.
    stop_ids: every token that ends a generation: EOS and, where the vocabulary has them, the ends of a chat turn.
    chat_template: the file's Jinja template, or None.
    special: the spelling of every control and user-defined token, and its id.
    source: the file it came from.
    """

    def __init__(
        self,
        tokens: list[str],
        merges: list[str],
        *,
        pre: str,
        token_types: list[int] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        end_ids: Iterable[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        source: str = "tokenizer",
    ) -> None:
        if pre not in _SPLITS:
            raise UnsupportedModelError(
                f"{source}: pre-tokenizer {pre!r} is not one of {', '.join(_SPLITS)}", path=source
            )
        if token_types is not None and len(token_types) != len(tokens):
            raise ModelFormatError(
                f"{source}: tokenizer.ggml.token_type has {len(token_types)} entries for {len(tokens)} tokens",
                path=source,
            )
        for name, token_id in (("bos", bos_id), ("eos", eos_id), *(("end", token_id) for token_id in end_ids)):
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise ModelFormatError(
                    f"{source}: the {name} token is {token_id}, but there are {len(tokens)} tokens", path=source
                )
        self.source = source
        self._tokens = tokens
        self._merges = merges
        self._split = _SPLITS[pre]
        # Few tokens are special; everything else is _NORMAL.
        self._types = {i: kind for i, kind in enumerate(token_types or ()) if kind != _NORMAL}
        self._types |= {
            i: _USER_DEFINED for i, kind in self._types.items() if kind == _CONTROL and tokens[i] in _SAID_TEXTS
        }
        self.special = {
            tokens[i]: i for i, kind in self._types.items() if kind in (_CONTROL, _USER_DEFINED) and tokens[i]
        }
        self._add_bos = add_bos
        self.n_vocab = len(tokens)
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stop_ids = frozenset(
            {i for i in (eos_id, *end_ids) if i is not None} | {i for s, i in self.special.items() if s in _END_TEXTS}
        )
        self.chat_template = chat_template

    @property
    def special_ids(self) -> frozenset[int]:
        """Every token that is not plain text: control and user-defined ones, and unused entries."""
        return frozenset(self._types)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads the tokenizer of a GGUF file; it may hold a vocabulary alone.

        Raises ModelFileError or ModelFormatError for a file that cannot be read, UnsupportedModelError for one whose
        tokenizer is missing or of another kind.
        """
        with Gguf(path) as gguf:
            model = gguf.get_str("tokenizer.ggml.model")
            if model in (None, "none", "no_vocab"):
                raise UnsupportedModelError(f"{gguf.path} has no tokenizer", path=path)
            if model != "gpt2":
                raise UnsupportedModelError(
                    f"{gguf.path}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') is supported",
                    path=path,
                )
            tokens = gguf.get_strings("tokenizer.ggml.tokens")
            merges = gguf.get_strings("tokenizer.ggml.merges")
            if tokens is None or merges is None:
                missing = "tokens" if tokens is None else "merges"
                raise ModelFormatError(f"{gguf.path}: tokenizer.ggml.{missing} is missing", path=path)
            ends = (gguf.get_int(f"tokenizer.ggml.{key}") for key in _END_KEYS[1:])
            return cls(
                tokens,
                merges,
                pre=gguf.get_str("tokenizer.ggml.pre") or "(none stated)",
                token_types=gguf.get_ints("tokenizer.ggml.token_type"),
                bos_id=gguf.get_int("tokenizer.ggml.bos_token_id"),
                eos_id=gguf.get_int("tokenizer.ggml.eos_token_id"),
                end_ids=[end for end in ends if end is not None],
                add_bos=bool(gguf.get_int("tokenizer.ggml.add_bos_token")),
                chat_template=gguf.get_str("tokenizer.chat_template"),
                source=gguf.path,
            )

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        add_special: begin with BOS if the file says its model expects that (Qwen's do not).
        parse_special: read the spelling of a special token ("<|im_end|>") as that token. When False it is plain text,
            of user-defined tokens too: what to use for text that somebody else wrote.
        """
        ids = [self.bos_id] if add_special and self._add_bos and self.bos_id is not None else []
        if not parse_special or self._special_pattern is None:
            return ids + self._encode_plain(text)
        # The pattern is one group, so plain text and special tokens take turns, plain text first.
        for index, piece in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self.special[piece])
            elif piece:
                ids += self._encode_plain(piece)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        skip_special: leave control tokens ("<|im_end|>") out. User-defined ones ("<think>") are text and stay.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The exact bytes of token ids, as `decode` takes them."""
        return b"".join(self.token_bytes(token_id, skip_special=skip_special) for token_id in ids)

    def token_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """The bytes one token stands for; unused entries of the vocabulary have none."""
        token_id = operator.index(token_id)
        if not 0 <= token_id < self.n_vocab:
            raise ArgumentError(f"token id {token_id} is not in the vocabulary, which has {self.n_vocab} tokens")
        token, kind = self._tokens[token_id], self._types.get(token_id, _NORMAL)
        if kind == _UNUSED or (skip_special and kind in (_CONTROL, _UNKNOWN)):
            return b""
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            return token.encode()
        try:
            return bytes([_BYTE_OF[char] for char in token])
        except KeyError:
            return token.encode()

    def stream_decoder(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes ids as they come and gives out whole characters only."""
        return StreamDecoder(self, skip_special=skip_special)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        """Any special token, the longest first where several begin at one place."""
        texts = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    @cached_property
    def _bpe(self) -> Any:
        """The `tokenizers` pipeline. Building it takes most of a load's time, so decoding alone never does."""
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Pipeline

        bad = next((i for i, merge in enumerate(self._merges) if merge.count(" ") != 1), None)
        if bad is not None:
            raise ModelFormatError(
                f"{self.source}: tokenizer.ggml.merges[{bad}] is {self._merges[bad]!r}, not two tokens and a space",
                path=self.source,
            )
        # One join and one split: three times as fast as splitting 248k strings one by one.
        halves = " ".join(self._merges).split(" ") if self._merges else []
        vocab = dict(zip(self._tokens, range(self.n_vocab), strict=True))
        missing = next((byte for letter, byte in _BYTE_OF.items() if letter not in vocab), None)
        if missing is not None:
            raise ModelFormatError(
                f"{self.source}: tokenizer.ggml.tokens has no token for byte 0x{missing:02x}, so text would be lost",
                path=self.source,
            )
        try:
            # No cache of words: the thread would keep it when the tokenizer is gone. Encoding 250,000 tokens takes
            # 0.43 s instead of 0.33.
            model = models.BPE(vocab, list(zip(halves[::2], halves[1::2], strict=True)), cache_capacity=0)
        except Exception as error:  # the package raises plain Exception
            raise ModelFormatError(f"{self.source}: tokenizer.ggml.merges: {error}", path=self.source) from None
        pipeline = Pipeline(model)
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self._split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return pipeline

    def _encode_plain(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"the text cannot be UTF-8: character {error.start} is the lone surrogate {text[error.start]!r}"
            ) from None
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids


class StreamDecoder:
    """Token ids in, text out, in pieces of whole characters.

    The pieces joined are exactly `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that one more token completes; empty while a character is still in the middle of its bytes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=self._skip_special))

    def flush(self) -> str:
        """What was held back, as U+FFFD if it never became a character; the decoder then starts afresh."""
        return self._utf8.decode(b"", final=True)
