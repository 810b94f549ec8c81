"""Options checked before anything is opened or run: every refusal names the option, its value and what it may be."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias

from pydflash._lib import ffi, lib
from pydflash.errors import ArgumentError, nearest

KV_TYPES = ("f32", "f16", "q8_0", "q4_0")
MAX_BUDGET: int = lib.PF_MAX_NODES - 1

# What a setting of a run may be, by its name.
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
_INTEGERS: dict[str, tuple[int, int]] = {
    "budget": (0, MAX_BUDGET),
    "top_k": (0, 2**31 - 1),
    "seed": (0, 2**64 - 1),
    "max_tokens": (0, 2**31 - 1),
    "logprobs": (0, lib.PF_MAX_LOGPROBS),
}

Budget: TypeAlias = "int | str"  # nodes, or "auto"
Stop: TypeAlias = "str | int | Sequence[str | int] | None"
KvType: TypeAlias = "str | tuple[str, str]"


def integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """An integer within [low, high]; numpy's count, floats and bools do not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ArgumentError(f"{name} is {value!r}; it must be an integer from {low} to {high}")
    return number


def number(name: str, value: SupportsFloat, low: float, high: float) -> float:
    """A number within [low, high]."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = float("nan")
    if not low <= result <= high:
        raise ArgumentError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
    return result


def setting(name: str, value: Any) -> Any:
    """A setting of a run, within its bounds."""
    return number(name, value, *_NUMBERS[name]) if name in _NUMBERS else integer(name, value, *_INTEGERS[name])


def budget_of(value: Budget) -> int:
    """A budget as the core takes it: 0 to 63 nodes, or PF_BUDGET_AUTO for "auto"."""
    if isinstance(value, str) and value == "auto":
        return int(lib.PF_BUDGET_AUTO)
    try:
        return int(setting("budget", value))
    except ArgumentError:
        raise ArgumentError(f"budget is {value!r}; it must be 'auto', or an integer from 0 to {MAX_BUDGET}") from None


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """One of a few names."""
    if isinstance(value, str) and value in known:
        return value
    raise ArgumentError(f"{name} is {value!r}{nearest(str(value), known) or '; it must be one of ' + ', '.join(known)}")


def token_ids(name: str, ids: Iterable[SupportsIndex], n_vocab: int) -> list[int]:
    """Token ids of any iterable of integers (lists, numpy arrays), each within the vocabulary."""
    try:
        if isinstance(ids, (bytes, bytearray)):  # iterable, and of integers, but not of token ids
            raise TypeError
        checked = list(map(operator.index, ids))
    except TypeError:
        raise ArgumentError(f"{name} is {_brief(ids)}, not a sequence of integer token ids") from None
    for i, token_id in enumerate(checked):
        if not 0 <= token_id < n_vocab:
            raise ArgumentError(f"{name}[{i}] is {token_id}, but the vocabulary has {n_vocab} tokens")
    return checked


def kv_type_of(text: str) -> KvType:
    """A KV type as a command line gives it: a name, or one for K and one for V with a comma between."""
    k, comma, v = text.partition(",")
    return (k, v) if comma else k


def kv_types(value: KvType) -> tuple[int, int]:
    """ggml types of the K and the V cache; -1 for "auto"."""
    if value == "auto":
        return -1, -1
    pair = (value, value) if isinstance(value, str) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ArgumentError(
            f"kv_type is {value!r}; it must be auto, one of {', '.join(KV_TYPES)}, or a pair of them (K, V)"
        )
    known = KV_TYPES if value is pair else ("auto", *KV_TYPES)
    k, v = (int(lib.pf_type_from_name(one_of("kv_type", name, known).encode())) for name in pair)
    return k, v


def stops(value: Stop, n_vocab: int) -> tuple[list[str], list[int]]:
    """Stop strings and stop token ids."""
    if value is None:
        return [], []
    try:
        items = [value] if isinstance(value, (str, SupportsIndex)) else list(value)
    except TypeError:
        raise ArgumentError(f"stop is {value!r}; it must be a string, a token id, or a sequence of them") from None
    texts = [item for item in items if isinstance(item, str)]
    if "" in texts:
        raise ArgumentError("stop holds an empty string, which would end every text before it begins")
    return texts, token_ids("stop", [item for item in items if not isinstance(item, str)], n_vocab)


def session_params(
    *, n_ctx: int | None, kv_type: KvType, n_batch: int, n_ring: int, n_threads: int | None, budget: Budget
) -> Any:
    """A filled pf_session_params."""
    params = ffi.new("pf_session_params *")
    lib.pf_session_params_default(params)
    params.n_ctx = 0 if n_ctx is None else integer("n_ctx", n_ctx, 1, 2**31 - 1)
    params.type_k, params.type_v = kv_types(kv_type)
    params.n_batch = integer("n_batch", n_batch, 64, 4096)
    if params.n_batch % 64:
        raise ArgumentError(f"n_batch is {n_batch}; it must be a multiple of 64")
    params.n_ring = integer("n_ring", n_ring, 1, 2**31 - 1)
    params.n_threads = 0 if n_threads is None else integer("n_threads", n_threads, 1, 512)
    params.budget = budget_of(budget)
    return params


def generate_params(
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    budget: Budget,
    chain: bool,
    stop_ids: list[int],
    repeat_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    copying: bool = True,
) -> tuple[Any, Any]:
    """A filled pf_generate_params, and the arrays it points into, which must live until it has been used."""
    params = ffi.new("pf_generate_params *")
    lib.pf_generate_params_default(params)
    params.budget = budget_of(budget)
    params.shape = lib.PF_SHAPE_CHAIN if chain else lib.PF_SHAPE_TREE
    params.temperature = setting("temperature", temperature)
    params.top_k = setting("top_k", top_k)
    params.top_p = setting("top_p", top_p)
    params.min_p = setting("min_p", min_p)
    params.seed = setting("seed", seed)
    params.repeat_penalty = setting("repeat_penalty", repeat_penalty)
    params.presence_penalty = setting("presence_penalty", presence_penalty)
    params.frequency_penalty = setting("frequency_penalty", frequency_penalty)
    params.n_logprobs = -1 if logprobs is None else setting("logprobs", logprobs)
    params.copying = bool(copying)
    bias = biases(logit_bias)
    arrays = ffi.new("int32_t[]", stop_ids), ffi.new("int32_t[]", list(bias)), ffi.new("float[]", list(bias.values()))
    params.stop_ids, params.bias_ids, params.bias = arrays
    params.n_stop_ids, params.n_bias = len(stop_ids), len(bias)
    return params, arrays


def biases(value: Mapping[int, float] | None) -> dict[int, float]:
    """What to add to the logits of tokens: -1000 to 1000, or -inf to forbid one. The core knows its vocabulary."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ArgumentError(f"logit_bias is {_brief(value)}, not a mapping of token ids to numbers")
    checked = {}
    for token, bias in value.items():
        token = integer("a token id in logit_bias", token, 0, 2**31 - 1)
        forbidden = isinstance(bias, float) and bias == -math.inf
        checked[token] = -math.inf if forbidden else number(f"logit_bias[{token}]", bias, -1000, 1000)
    return checked


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
