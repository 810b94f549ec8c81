"""An open session as far as any model has one: the lock, text and ids, figures, and looking inside.

Owns when a call may touch the core; what a timeline is for, `session` knows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

from pydflash import options
from pydflash._conversation import Conversation
from pydflash._experience import Experience
from pydflash._handles import Handles, Models
from pydflash._lib import check, ffi, lib
from pydflash._timeline import Timeline
from pydflash.errors import ArgumentError, ContextFullError, StateError, UnsupportedModelError
from pydflash.options import Budget
from pydflash.plan import read_plan
from pydflash.results import Costs, Counters, Stats
from pydflash.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Self

Ids = Iterable[SupportsIndex]


@dataclass(frozen=True)
class Kept:
    """What a session was opened with, besides what its plan says. shipped: no model was named."""

    budget: Budget
    chain: bool
    copying: bool
    checkpoint_every: int
    checkpoint_memory: int
    shipped: bool


class OpenSession:
    """What `Session` is apart from what it says. `_open_on` opens it, with `_options` set before.

    device: "cpu" or "cuda". n_ctx, n_vocab, n_embd, n_layer: the models' and the plan's. block_size: the drafter's, 0
    without one. plan: what it was opened with. tokenizer: None when the model has none that is known.
    """

    tokenizer: Tokenizer | None
    _no_tokenizer: UnsupportedModelError | None
    _conversation: Conversation
    _options: Kept

    def _open_on(self, models: Models, params: Any) -> None:
        self._lock = threading.Lock()
        self._epoch = 0  # counts the changes of the timeline, so that a stream knows when its own is gone
        self._cancelled = False
        self._owner: int | None = None  # the thread that is inside
        self._unsettled: Callable[[], None] | None = None  # of a run: makes the conversation what stands by now
        self._stats: Stats | None = None
        self._params = params
        self._core = Handles(models, params)
        plan = read_plan(lambda out: lib.pf_session_get_plan(self._core.session, out))
        self._experience = Experience(models, (params.n_threads, plan.kv_type))
        self._experience.load(self._core.session)
        self._finalizer = weakref.finalize(self, self._core.free)
        self._finalizer.atexit = False  # at exit a daemon thread may still be inside; the process frees it all
        self.device = models.device
        self.n_vocab, self.n_embd, self.n_layer = models.n_vocab, models.n_embd, models.n_layer
        self.block_size = models.block_size
        self.plan = plan
        self.n_ctx = self.plan.n_ctx
        n_batch = self.plan.n_batch
        self._held = Timeline(
            self._core.session,
            n_batch=n_batch,
            every=-(-self._options.checkpoint_every // n_batch) * n_batch,
            memory=self._options.checkpoint_memory,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the caches, and the models once no fork uses them; every other call raises StateError from then on.
        Closing twice is fine."""
        self._refuse_to_wait_for_itself()
        with self._lock:
            if self._finalizer.alive:
                self._experience.save(self._core.session)
            self._finalizer()

    # ---- text and ids --------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`. UnsupportedModelError when the model has no tokenizer."""
        return self._need_tokenizer().encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; see `Tokenizer.decode`. UnsupportedModelError when the model has no tokenizer."""
        return self._need_tokenizer().decode(ids, skip_special=skip_special)

    @property
    def tokens(self) -> list[int]:
        """Token ids of the whole timeline."""
        with self._open():
            ids: list[int] = self._held.tokens().tolist()
            return ids

    @property
    def n_tokens(self) -> int:
        """Tokens on the timeline."""
        with self._open():
            return self._held.n_tokens

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

    def costs(self) -> Costs:
        """What passes and drafts take here, this deep into the context: measured now if they have not been.

        StateError while the session holds no tokens.
        """
        with self._open():
            if self._held.n_tokens == 0:
                raise StateError(
                    "the session holds no tokens; give it a prompt, for costs() to say what passes take there"
                )
            costs = ffi.new("pf_costs *", {"size": ffi.sizeof("pf_costs")})
            check(lib.pf_session_get_costs(self._core.session, costs))
            passes = dict(zip(costs.n_nodes, costs.pass_ms, strict=True))
            return Costs(passes, costs.draft_ms if self.block_size else None)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the session has allocated, by the names of `plan`'s rows: the plan's own figures, until a run asks
        for a larger budget, or for the logits of many tokens. Kept graphs come with use, up to what the plan says. On a
        CUDA device flash attention's copies lie in the compute buffer."""
        with self._open():
            rows = read_plan(lambda out: lib.pf_session_get_memory(self._core.session, out)).rows
        return {row.name: row.n_bytes for row in rows}

    # ---- looking inside: each replaces the timeline and leaves it empty --------------------------------------------

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """The target's logits after each of the ids: float32 [n, n_vocab]. What the session held is gone."""
        import numpy as np

        given = self._given(ids)
        out = np.empty((len(given), self.n_vocab), np.float32)
        with self._changing():
            self._clear()
            check(lib.pf_session_logits(self._core.session, given, len(given), ffi.from_buffer("float[]", out)))
        return out

    def hidden(self, ids: Ids, layers: Sequence[int]) -> NDArray[np.float32]:
        """The residual stream at the input of each of `layers`: float32 [n, len(layers), n_embd].

        Layers count as a drafter's `target_layers` does: k is the output of layer k - 1, before any norm. What
        the session held is gone.
        """
        import numpy as np

        given = self._given(ids)
        try:
            wanted = [options.integer("layers", layer, 0, self.n_layer) for layer in layers]
        except TypeError:
            raise ArgumentError(f"layers is {layers!r}, not a sequence of layer numbers") from None
        out = np.empty((len(given), len(wanted), self.n_embd), np.float32)
        with self._changing():
            self._clear()
            check(
                lib.pf_session_hidden(
                    self._core.session, given, len(given), wanted, len(wanted), ffi.from_buffer("float[]", out)
                )
            )
        return out

    def draft_logits(self, ids: Ids) -> NDArray[np.float32]:
        """The drafter's logits for the positions after the ids, the last of which is pending: float32
        [block_size - 1, n_vocab]. What the session held is gone. StateError without a drafter."""
        import numpy as np

        if self.block_size == 0:
            raise StateError("this session has no drafter; open it with draft=...")
        given = self._given(ids)
        out = np.empty((self.block_size - 1, self.n_vocab), np.float32)
        with self._changing():
            self._clear()
            check(lib.pf_session_draft_logits(self._core.session, given, len(given), ffi.from_buffer("float[]", out)))
        return out

    # ---- for every call --------------------------------------------------------------------------------------------

    def _given(self, ids: Ids) -> list[int]:
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

    def _clear(self) -> None:
        self._held.clear()
        self._conversation.freeze([])

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UnsupportedModelError(f"{self._no_tokenizer}; give and take token ids instead")
        return self.tokenizer

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The lock, on a session that is open."""
        self._refuse_to_wait_for_itself()
        with self._lock:
            if not self._finalizer.alive:
                raise StateError("the session is closed")
            self._owner = threading.get_ident()
            # After an interrupt between a step and its commit the step's first token stands; else this does nothing.
            lib.pf_session_commit(self._core.session, 1, ffi.NULL)
            try:
                yield
            finally:
                self._owner = None

    def _refuse_to_wait_for_itself(self) -> None:
        if self._owner == threading.get_ident():
            raise StateError(
                "this call comes from inside another one of the same session, as from a progress function or a signal "
                "handler, and would wait for it forever; only cancel() may be called there"
            )

    def _settle(self, *, for_good: bool = False) -> None:
        """The conversation becomes what stands by now; for_good: and no run that went on until now changes it again."""
        if self._unsettled is not None:
            self._unsettled()
        if for_good:
            self._unsettled = None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The lock, for a call that changes the timeline."""
        with self._open():
            self._settle(for_good=True)
            self._epoch += 1
            self._cancelled = False
            yield
