"""How the target's choice is made, and when a run ends: one frozen set of settings, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, TypeVar

from pydflash import options
from pydflash._timeline import Progress
from pydflash.errors import ArgumentError, UnknownOptionError, nearest
from pydflash.options import Budget, Stop

_PENALTIES = ("repeat_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of a run. Every method that runs takes one, or single settings by name: `generate(prompt, seed=1)`.

    temperature: 0 takes the likeliest token each time; above, tokens are drawn.
    top_k, top_p, min_p: narrow the choice, in this order, each on what the former left; 0, 1 and 0 are off.
    repeat_penalty: of tokens that the prompt or the output holds, positive logits are divided by it and negative ones
        multiplied (Keskar et al. 2019, arXiv 1909.05858); 1 is off.
    presence_penalty, frequency_penalty: taken from the logits of tokens that the output holds, once, and once for each
        time (OpenAI's definition); 0 is off.
    logit_bias: added to the logits of token ids before all else; float("-inf") forbids a token.
    seed: 0 to 2**64 - 1. None picks one, which the result tells. Drafting does not change what a seed draws.
    max_tokens: at most so many; None: until the context is full.
    stop: a string or a token id, or several, that end the text. The text is cut right before them.
    logprobs: with each token, the log-probability that the model gave it, before all of these settings, and the so many
        likeliest instead of it (0 to 20). None: none of it.
    ignore_eos: do not end at the model's own end tokens.

    Raises ArgumentError, UnknownOptionError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 256
    stop: Stop = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k", "top_p", "min_p", *_PENALTIES):
            options.setting(name, getattr(self, name))
        for name in ("seed", "max_tokens", "logprobs"):
            if getattr(self, name) is not None:
                options.setting(name, getattr(self, name))
        options.biases(self.logit_bias)
        options.stops(self.stop, 2**31 - 1)


class Settings(TypedDict, total=False):
    """What every method that runs takes by name: the fields of `Sampling`, and

    budget, chain: as for the session, for this run.
    response_format: what the text must be; see `pydflash.constraint`.
    progress: called with a `Progress` after each chunk of the prompt.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | None
    max_tokens: int | None
    stop: Stop
    logprobs: int | None
    ignore_eos: bool
    budget: Budget | None
    chain: bool | None
    response_format: Mapping[str, Any] | None
    progress: Callable[[Progress], None] | None


class ChatSettings(Settings, total=False):
    """What every method that renders messages takes by name: `Settings`, and

    tools: what the model may call, in OpenAI's shape.
    thinking: the template's enable_thinking; None leaves it to the template.
    template_variables: whatever else the template knows.
    """

    tools: Sequence[Mapping[str, Any]] | None
    thinking: bool | None
    template_variables: Mapping[str, Any] | None


@dataclass(frozen=True)
class RunOptions:
    """`Settings`, sorted."""

    sampling: Sampling
    budget: Budget | None = None
    chain: bool | None = None
    response_format: Mapping[str, Any] | None = None
    progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True)
class ChatOptions(RunOptions):
    """`ChatSettings`, sorted."""

    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: bool | None = None
    template_variables: Mapping[str, Any] | None = None


Options = TypeVar("Options", bound=RunOptions)


def sorted_options(kind: type[Options], method: str, sampling: Sampling | None, settings: Mapping[str, Any]) -> Options:
    """Sampling, single fields of it changed by name, and what else a run has.

    method: for the sentence that refuses an unknown name. Raises UnknownOptionError, ArgumentError.
    """
    of_sampling = [item.name for item in fields(Sampling)]
    others = [item.name for item in fields(kind) if item.name != "sampling"]
    for name in settings:
        if name not in (*of_sampling, *others):
            known = ["sampling", *of_sampling, *others]
            advice = nearest(name, known) or f"; it has {', '.join(known)}"
            raise UnknownOptionError(f"Session.{method} has no option {name!r}{advice}")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ArgumentError(f"sampling is {sampling!r}; give a pydflash.Sampling, or single settings by name")
    made = kind(
        replace(sampling or Sampling(), **{name: settings[name] for name in settings if name in of_sampling}),
        **{name: settings[name] for name in settings if name in others},
    )
    if made.progress is not None and not callable(made.progress):
        raise ArgumentError(f"progress is {made.progress!r}; it must be a function that takes a Progress")
    return made
