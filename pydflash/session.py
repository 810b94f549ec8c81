"""A conversation with one model: opening it, running it, looking inside.

Owns the order of calls on one pf_session and the lock around them. What a run gives back is in `results`, what the
options may be in `options`.
"""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsIndex

from pydflash import options
from pydflash._handles import Handles, PathLike, draft_file, target_file
from pydflash._lib import check, ffi, lib
from pydflash._text import TextStream
from pydflash.device import choose
from pydflash.errors import (
    ArgumentError,
    ContextFullError,
    OutOfMemoryError,
    StateError,
    UnsupportedModelError,
    checked_options,
)
from pydflash.options import KvType, Stop
from pydflash.plan import plan_pair, read_plan
from pydflash.results import Chunk, Counters, FinishReason, Result, Stats, Tally
from pydflash.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Request:
    """A run, all of it checked."""

    ids: list[int]
    max_tokens: int
    stops: list[str]
    params: Any  # pf_generate_params
    stop_ids: Any  # the array params points into
    seed: int


class Session:
    """One timeline of tokens on one model; a context manager.

    target: a GGUF of architecture `qwen35`. None opens the tiny pair that ships with pydflash.
    draft: the target's DFlash drafter, a GGUF or a folder as z-lab lays it out (converted once, into the user's cache).
        None with a target of one's own: plain decoding.
    n_ctx: tokens the session can hold, prompt and output together, at most what the model was trained for. None: the
        largest that fits into the free memory with a twentieth of it to spare.
    kv_type: type of the KV cache: "f32", "f16", "q8_0" or "q4_0", or a pair of them for K and V. "auto": the first of
        f16 and q8_0 with which n_ctx fits in the same way, else q4_0.
    budget: nodes of the tree that each target pass verifies, besides the root, 0 to 63; 0 is plain decoding. Memory is
        set aside for trees of this size; a run that asks for a larger one allocates more.
    chain: draft one line of tokens instead of a tree.
    device: "cpu", "cuda", or "auto": "cuda" where that can be had, else "cpu"; see `pydflash.device_info`. Afterwards
        the attribute says which of the two it is.
    n_batch: tokens a prefill pass evaluates at once, 64 to 4096 in steps of 64.
    n_ring: committed positions the drafter can attend to.
    n_threads: None: one for each core this process may use.

    Calls from several threads wait for one another; `cancel` is for those that cannot. A stream is one call a chunk:
    `generate`, `stream`, `logits` and the like replace the timeline, and a stream of before then raises StateError.

    Raises ModelFileError, ModelFormatError, UnsupportedModelError, DraftMismatchError, OutOfMemoryError, DeviceError,
    ArgumentError.
    """

    @checked_options
    def __init__(
        self,
        target: PathLike | None = None,
        draft: PathLike | None = None,
        *,
        n_ctx: int | None = None,
        kv_type: KvType = "auto",
        budget: int = 16,
        chain: bool = False,
        device: str = "auto",
        n_batch: int = 512,
        n_ring: int = 4096,
        n_threads: int | None = None,
    ) -> None:
        self.device = choose(device)
        params = options.session_params(
            n_ctx=n_ctx, kv_type=kv_type, n_batch=n_batch, n_ring=n_ring, n_threads=n_threads, budget=budget
        )
        self._lock = threading.Lock()
        self._epoch = 0  # counts the timelines, so that a stream knows when its own is gone
        self._cancelled = False
        self._stats: Stats | None = None
        self._budget = int(params.budget)
        self._chain = bool(chain)
        self._n_batch = int(params.n_batch)
        if target is None:
            from pydflash import models

            target = models.target_path()
            draft = models.draft_path() if draft is None else draft
        target = target_file(target)
        draft = None if draft is None else draft_file(draft)
        if self.device != "cpu":  # where weights are copied, what does not fit is refused before they are
            planned = plan_pair(target, draft, params, self.device)
            if not planned.fits:
                raise OutOfMemoryError(
                    f"a context of {planned.n_ctx} tokens takes {planned.total:.0f} MiB, but {self.device} has "
                    f"{planned.free:.0f} free:\n{planned}"
                )
        self._core = Handles(target, draft, self.device)
        self._core.open_session(params)
        self._finalizer = weakref.finalize(self, self._core.free)
        self._finalizer.atexit = False  # at exit a daemon thread may still be inside; the process frees it all
        self.n_vocab = self._core.n_vocab
        self.n_embd = self._core.n_embd
        self.n_layer = self._core.n_layer
        self.block_size = self._core.block_size
        self.plan = read_plan(lambda out: lib.pf_session_get_plan(self._core.session, out))
        self.n_ctx = self.plan.n_ctx
        self._no_tokenizer: UnsupportedModelError | None = None
        self.tokenizer: Tokenizer | None = None
        try:
            self.tokenizer = Tokenizer.from_gguf(target)
        except UnsupportedModelError as error:  # such a model takes and gives ids
            self._no_tokenizer = error

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the models and caches; every other call raises StateError from then on. Closing twice is fine."""
        with self._lock:
            self._finalizer()

    # ---- text and ids --------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`. UnsupportedModelError when the model has no tokenizer."""
        return self._need_tokenizer().encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; see `Tokenizer.decode`. UnsupportedModelError when the model has no tokenizer."""
        return self._need_tokenizer().decode(ids, skip_special=skip_special)

    # ---- running -------------------------------------------------------------------------------------------------

    @checked_options
    def generate(
        self,
        prompt: str | Iterable[SupportsIndex],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Stop = None,
        ignore_eos: bool = False,
        budget: int | None = None,
        chain: bool | None = None,
    ) -> Result:
        """Continues a prompt, and returns when that is done.

        prompt: text, or token ids. It replaces whatever the session held.
        max_tokens: at most so many; None: until the context is full.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn, after top_k (0: off), top_p (1:
            off) and min_p (0: off) have narrowed the choice.
        seed: 0 to 2**64 - 1. None picks one, which the result tells. Drafting does not change what a seed draws.
        stop: a string or a token id, or several, that end the text. The text is cut right before them.
        ignore_eos: do not end at the model's own end tokens.
        budget, chain: as for the session, for this run.

        Raises ArgumentError, ContextFullError (the prompt does not fit), UnsupportedModelError (text for a model
        without a tokenizer). KeyboardInterrupt ends the run at the next step and leaves the session usable.
        """
        request = self._request(
            prompt, max_tokens, temperature, top_k, top_p, min_p, seed, stop, ignore_eos, budget, chain
        )
        with self._timeline():
            for chunk in self._run(request):
                if chunk.result is not None:
                    return chunk.result
        raise AssertionError("a run ends with a result")

    @checked_options
    def stream(
        self,
        prompt: str | Iterable[SupportsIndex],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Stop = None,
        ignore_eos: bool = False,
        budget: int | None = None,
        chain: bool | None = None,
    ) -> Iterator[Chunk]:
        """As `generate`, one chunk a step; the last chunk carries the result.

        The prompt is checked at once and evaluated when the first chunk is asked for. A stream may be left at any
        time. StateError when another call has replaced the timeline in the meantime.
        """
        request = self._request(
            prompt, max_tokens, temperature, top_k, top_p, min_p, seed, stop, ignore_eos, budget, chain
        )
        return self._stream(request)

    def cancel(self) -> None:
        """Ends the run going on, in whatever thread, at its next step: its finish_reason is then "cancelled"."""
        self._cancelled = True

    def reset(self) -> None:
        """Back to the empty timeline."""
        with self._timeline():
            check(lib.pf_session_reset(self._core.session))

    @property
    def stats(self) -> Stats | None:
        """Figures of the last finished run; None before the first."""
        return self._stats

    @property
    def counters(self) -> Counters:
        """What has travelled to and from the device, and what was built there, since the session was opened."""
        with self._open():
            counters = ffi.new("pf_counters *", {"size": ffi.sizeof("pf_counters")})
            check(lib.pf_session_counters(self._core.session, counters))
            return Counters(*(int(getattr(counters, name)) for name in Counters.__dataclass_fields__))

    @property
    def n_tokens(self) -> int:
        """Tokens on the timeline."""
        with self._open():
            return int(lib.pf_session_n_tokens(self._core.session))

    # ---- looking inside: each replaces the timeline and leaves it empty --------------------------------------------

    def logits(self, ids: Iterable[SupportsIndex]) -> NDArray[np.float32]:
        """The target's logits after each of the ids: float32 [n, n_vocab]."""
        import numpy as np

        given = self._given(ids)
        out = np.empty((len(given), self.n_vocab), np.float32)
        with self._timeline():
            check(lib.pf_session_logits(self._core.session, given, len(given), ffi.from_buffer("float[]", out)))
        return out

    def hidden(self, ids: Iterable[SupportsIndex], layers: Sequence[int]) -> NDArray[np.float32]:
        """The residual stream at the input of each of `layers`: float32 [n, len(layers), n_embd].

        Layers count as a drafter's `target_layers` does: k is the output of layer k - 1, before any norm.
        """
        import numpy as np

        given = self._given(ids)
        try:
            wanted = [options.integer("layers", layer, 0, self.n_layer) for layer in layers]
        except TypeError:
            raise ArgumentError(f"layers is {layers!r}, not a sequence of layer numbers") from None
        out = np.empty((len(given), len(wanted), self.n_embd), np.float32)
        with self._timeline():
            check(
                lib.pf_session_hidden(
                    self._core.session, given, len(given), wanted, len(wanted), ffi.from_buffer("float[]", out)
                )
            )
        return out

    def draft_logits(self, ids: Iterable[SupportsIndex]) -> NDArray[np.float32]:
        """The drafter's logits for the positions after the ids, the last of which is pending: float32
        [block_size - 1, n_vocab]. StateError without a drafter."""
        import numpy as np

        if self.block_size == 0:
            raise StateError("this session has no drafter; open it with draft=...")
        given = self._given(ids)
        out = np.empty((self.block_size - 1, self.n_vocab), np.float32)
        with self._timeline():
            check(lib.pf_session_draft_logits(self._core.session, given, len(given), ffi.from_buffer("float[]", out)))
        return out

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the session has allocated, by the names of `plan`'s rows: the plan's own figures, until a run asks
        for a larger budget, or for the logits of many tokens. On a CUDA device flash attention's copies lie in the
        compute buffer."""
        with self._open():
            rows = read_plan(lambda out: lib.pf_session_get_memory(self._core.session, out)).rows
        return {row.name: row.n_bytes for row in rows}

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _request(
        self,
        prompt: str | Iterable[SupportsIndex],
        max_tokens: int | None,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int | None,
        stop: Stop,
        ignore_eos: bool,
        budget: int | None,
        chain: bool | None,
    ) -> _Request:
        """Checks everything, so that what is refused is refused before any work."""
        if budget and not self.block_size:
            raise ArgumentError(f"budget is {budget}, but this session has no drafter; open it with draft=...")
        texts, stop_ids = options.stops(stop, self.n_vocab)
        if texts:
            self._need_tokenizer()
        if self.tokenizer is not None and not ignore_eos:
            stop_ids = sorted(self.tokenizer.stop_ids | set(stop_ids))
        seed = secrets.randbits(32) if seed is None else seed
        params, array = options.generate_params(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            budget=(self._budget if budget is None else budget) if self.block_size else 0,
            chain=self._chain if chain is None else bool(chain),
            stop_ids=stop_ids,
        )
        most = self.n_ctx if max_tokens is None else options.integer("max_tokens", max_tokens, 0, 2**31 - 1)
        ids = self.tokenize(prompt) if isinstance(prompt, str) else options.token_ids("prompt", prompt, self.n_vocab)
        if not ids:
            raise ArgumentError("the prompt is empty: the model needs at least one token to go on from")
        room = self.n_ctx - len(ids)
        if room < min(most, 1):
            need = len(ids) + min(most, 1)
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens, {need - self.n_ctx} too many for n_ctx={self.n_ctx}"
                f"{' and one token of output' if most else ''}: shorten it, or open the session with a larger n_ctx",
                need=need,
                free=self.n_ctx,
            )
        return _Request(ids, min(most, room), texts, params, array, seed)

    def _stream(self, request: _Request) -> Generator[Chunk, None, None]:
        run = self._run(request)
        epoch = None
        while True:
            with self._open() if epoch is not None else self._timeline():
                if epoch not in (None, self._epoch):
                    raise StateError("this stream has ended: another call has replaced the session's timeline")
                epoch = self._epoch
                chunk = next(run, None)
            if chunk is None:
                return
            yield chunk

    def _run(self, request: _Request) -> Generator[Chunk, None, None]:
        """The whole run, one chunk a step; the caller holds the timeline."""
        session = self._core.session
        self._cancelled = False
        try:
            check(lib.pf_session_reset(session))
            check(
                lib.pf_session_configure(session, request.params)
            )  # before append: the budget sizes what prefill keeps
            tally = Tally(len(request.ids))
            text = TextStream(self.tokenizer, request.stops)
            started = time.perf_counter()
            for piece in self._prefill_pieces(request.ids):
                if not self._cancelled:
                    check(lib.pf_session_append(session, piece, len(piece)))
            tally.prefilled(time.perf_counter() - started)

            step = ffi.new("pf_step_result *", {"size": ffi.sizeof("pf_step_result")})
            commit_ms = ffi.new("double *")
            left = request.max_tokens
            finish: FinishReason | None = None
            while finish is None:
                kept: list[int] = []
                given = ""
                if self._cancelled:
                    finish = "cancelled"
                elif left == 0:
                    finish = "length"
                else:
                    started = time.perf_counter()
                    check(lib.pf_session_step(session, left, step))
                    tokens = ffi.unpack(step.tokens, step.n_tokens)
                    # A stop token has no text.
                    given, n_cut = text.push(tokens[:-1] if step.stopped else tokens)
                    kept = tokens[:n_cut]
                    check(lib.pf_session_commit(session, len(kept), commit_ms))
                    tally.step(
                        step,
                        kept,
                        ended=bool(step.stopped) or len(tokens) == left,
                        commit_ms=commit_ms[0],
                        seconds=time.perf_counter() - started,
                    )
                    left -= len(kept)
                    if n_cut is not None or step.stopped:
                        finish = "stop"
                    elif left == 0:
                        finish = "length"
                result = None
                if finish is not None:
                    given += text.finish()
                tally.text(given)
                if finish is not None:
                    result = tally.result(finish, request.seed)
                    self._stats = result.stats
                yield Chunk(given, kept, len(kept), result)
        except GeneratorExit:  # left by the caller, between steps
            raise
        except BaseException:
            lib.pf_session_reset(session)  # there may be a step nobody committed
            raise

    def _prefill_pieces(self, ids: list[int]) -> Iterator[list[int]]:
        """Slices that each evaluate one full batch: the last token given stays pending until the next call."""
        edges = [0, *range(1 + self._n_batch, len(ids), self._n_batch), len(ids)]
        for start, end in pairwise(edges):
            yield ids[start:end]

    def _given(self, ids: Iterable[SupportsIndex]) -> list[int]:
        given = options.token_ids("ids", ids, self.n_vocab)
        if not given:
            raise ArgumentError("ids is empty; give at least one token")
        if len(given) > self.n_ctx:
            raise ContextFullError(
                f"{len(given)} tokens are {len(given) - self.n_ctx} more than n_ctx={self.n_ctx} has room for",
                need=len(given),
                free=self.n_ctx,
            )
        return given

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedModelError(f"{self._no_tokenizer}; give and take token ids instead")
        return self.tokenizer

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The lock, on a session that is open."""
        with self._lock:
            if not self._finalizer.alive:
                raise StateError("the session is closed")
            yield

    @contextmanager
    def _timeline(self) -> Iterator[None]:
        """The lock, for a call that replaces the timeline."""
        with self._open():
            self._epoch += 1
            yield
