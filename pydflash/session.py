"""A conversation with one model: opening it, running it, keeping it, going back, looking inside.

Owns the order of calls on one pf_session and the lock around them. What the session holds is `_timeline`'s to know,
what that means `_conversation`'s; one run is in `_run`, its settings in `sampling`, what it gives back in `results`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from pydflash import options
from pydflash._conversation import Conversation, Message, Rendered, checked_messages
from pydflash._handles import Models, PathLike, draft_file, target_file
from pydflash._lib import check, ffi, lib
from pydflash._open_session import Ids, Kept, OpenSession
from pydflash._run import Request, run
from pydflash._timeline import Progress
from pydflash.device import choose
from pydflash.errors import (
    ArgumentError,
    ContextFullError,
    OutOfMemoryError,
    StateError,
    UnsupportedModelError,
    checked_options,
)
from pydflash.options import Budget, KvType
from pydflash.plan import n_bytes, plan_pair
from pydflash.results import Chunk, Result
from pydflash.sampling import ChatOptions, RunOptions, Sampling, sorted_options
from pydflash.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from pydflash.documents import Documents
    from pydflash.sampling import ChatSettings, Settings
    from pydflash.store import Core, SavedSession

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A timeline to go back to: n_tokens tokens, and the messages they mean."""

    n_tokens: int
    _ids: NDArray[np.int32] = field(repr=False)  # [n_tokens]
    _conversation: Conversation = field(repr=False)


class Session(OpenSession):
    """One timeline of tokens on one model; a context manager.

    target: a GGUF of architecture `qwen35`. None opens the tiny pair that ships with pydflash.
    draft: the target's DFlash drafter, a GGUF or a folder as z-lab lays it out (converted once, into the user's cache).
        None with a target of one's own: plain decoding.
    n_ctx: tokens the session can hold, prompt and output together, at most what the model was trained for. None: the
        largest that fits into the free memory with a twentieth of it to spare.
    kv_type: type of the KV cache: "f32", "f16", "q8_0" or "q4_0", or a pair of them for K and V. "auto": the first of
        f16 and q8_0 with which n_ctx fits in the same way, else q4_0.
    budget: nodes of the tree that each target pass verifies, besides the root, 0 to 63; 0 is plain decoding. Memory is
        set aside for trees of this size; a run that asks for a larger one allocates more. "auto": each step takes the
        number that gives the most tokens a second, by what passes take on this machine and how often drafts prove
        right, both learned and kept in the user's cache; where nothing pays it does not draft. It knows passes of 1, 2,
        3, 4, 6, 8, 12, 16, 24, 32, 48 and 64 nodes, and in a session of a smaller budget takes those within it. Passes
        of another size round in another way: what is to be the same to the last bit every time takes a number.
    chain: draft one line of tokens instead of a tree.
    copying: let tokens that stood behind the last few before, anywhere on the timeline, share the tree with the
        drafter's. Neither this nor any drafting changes what is said.
    device: "cpu", "cuda", or "auto": "cuda" where that can be had, else "cpu"; see `pydflash.device_info`. Afterwards
        the attribute says which of the two it is.
    n_batch: tokens a prefill pass evaluates at once, 64 to 4096 in steps of 64.
    n_ring: committed positions the drafter can attend to.
    n_threads: None: one for each core this process may use.
    checkpoint_every: the state is kept every so many tokens of a prompt (rounded up to whole batches), and where
        messages end, so that a later prompt that begins in the same way can go on from there.
    checkpoint_memory: host memory that all of that may take: bytes, or text such as "2GiB". When it is full, the oldest
        but the first go.
    cache_dir: a folder that keeps long prompts on disk once they have been read, for any session with the same model
        and settings.
    cache_size: what that folder may grow to; the least recently used go first.

    What the session holds is one timeline of tokens. A run is given the whole timeline that it is to continue
    (`generate`, `chat`) or what to put behind it (`append`, `ask`); what the session holds of it already is not
    evaluated again.

    Threads: calls from several threads wait for one another; `cancel` is for those that cannot. A stream is one call a
    chunk: when another call has changed the timeline in the meantime, the next chunk raises StateError. After an error
    or Ctrl-C the session can be used and holds what had been evaluated; it is empty only when the sentence says that it
    was reset.

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
        budget: Budget = "auto",
        chain: bool = False,
        copying: bool = True,
        device: str = "auto",
        n_batch: int = 512,
        n_ring: int = 4096,
        n_threads: int | None = None,
        checkpoint_every: int = 4096,
        checkpoint_memory: int | str = "2GiB",
        cache_dir: PathLike | None = None,
        cache_size: int | str = "16GiB",
    ) -> None:
        device = choose(device)
        params = options.session_params(
            n_ctx=n_ctx, kv_type=kv_type, n_batch=n_batch, n_ring=n_ring, n_threads=n_threads, budget=budget
        )
        options.integer("checkpoint_every", checkpoint_every, 1, 2**31 - 1)
        self._options = Kept(
            budget=budget,
            chain=bool(chain),
            copying=bool(copying),
            checkpoint_every=checkpoint_every,
            checkpoint_memory=n_bytes("checkpoint_memory", checkpoint_memory),
            shipped=target is None and draft is None,
        )
        if target is None:
            from pydflash import models

            target = models.target_path()
            draft = models.draft_path() if draft is None else draft
        target = target_file(target)
        draft = None if draft is None else draft_file(draft)
        if device != "cpu":  # where weights are copied, what does not fit is refused before they are
            planned = plan_pair(target, draft, params, device)
            if not planned.fits:
                raise OutOfMemoryError(
                    f"a context of {planned.n_ctx} tokens takes {planned.total:.0f} MiB, but {device} has "
                    f"{planned.free:.0f} free:\n{planned}"
                )
        self._no_tokenizer: UnsupportedModelError | None = None
        self.tokenizer: Tokenizer | None = None
        self._open_on(Models(target, draft, device), params)
        try:
            self.tokenizer = Tokenizer.from_gguf(target)
        except UnsupportedModelError as error:  # such a model takes and gives ids
            self._no_tokenizer = error
        self._conversation = Conversation(self.tokenizer)
        self._cache = None
        most = n_bytes("cache_size", cache_size)
        if cache_dir is not None:
            from pydflash.document_cache import DocumentCache

            self._cache = DocumentCache(cache_dir, most)

    # ---- running -------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: str | Ids | None, sampling: Sampling | None = None, **settings: Unpack[Settings]
    ) -> Result:
        """Continues a prompt, and returns when that is done.

        prompt: text, or token ids: the whole timeline from now on. None goes on from what the session holds.
        sampling, settings: a `Sampling`, and single fields of it or of `Settings` by name.

        Raises ArgumentError, ContextFullError (the prompt does not fit), UnsupportedModelError (text for a model
        without a tokenizer). KeyboardInterrupt ends the run at the next step.
        """
        return self._whole(
            lambda: self._given_prompt(prompt), sorted_options(RunOptions, "generate", sampling, settings)
        )

    def stream(
        self, prompt: str | Ids | None, sampling: Sampling | None = None, **settings: Unpack[Settings]
    ) -> Iterator[Chunk]:
        """As `generate`, one chunk a step; the last chunk carries the result.

        The prompt is checked at once and evaluated when the first chunk is asked for. A stream may be left at any time.
        """
        return self._stream(
            lambda: self._given_prompt(prompt), sorted_options(RunOptions, "stream", sampling, settings)
        )

    def chat(self, messages: Messages, sampling: Sampling | None = None, **settings: Unpack[ChatSettings]) -> Result:
        """Answers messages: the whole timeline from now on, in the model's chat template.

        messages: OpenAI's: {"role": "system" | "user" | "assistant" | "tool", "content": text or text parts, and
            "reasoning_content", "tool_calls", "tool_call_id" where they belong}. Special tokens spelt in them are text.
        sampling, settings: as for `generate`, and the fields of `ChatSettings`: tools, thinking, template_variables.

        The answer's parts are the result's content, reasoning and tool_calls. Afterwards `session.messages` are these
        messages and the answer. Raises what `generate` does, and UnsupportedModelError for a model without a template.
        """
        wanted = sorted_options(ChatOptions, "chat", sampling, settings)
        return self._whole(lambda: self._chat(messages, wanted), wanted)

    def stream_chat(
        self, messages: Messages, sampling: Sampling | None = None, **settings: Unpack[ChatSettings]
    ) -> Iterator[Chunk]:
        """As `chat`, one chunk a step; the last chunk carries the result."""
        wanted = sorted_options(ChatOptions, "stream_chat", sampling, settings)
        return self._stream(lambda: self._chat(messages, wanted), wanted)

    def ask(self, question: str, sampling: Sampling | None = None, **settings: Unpack[ChatSettings]) -> Result:
        """Answers a user's next message, behind everything the session holds; otherwise as `chat`."""
        wanted = sorted_options(ChatOptions, "ask", sampling, settings)
        return self._whole(lambda: self._question(question, wanted), wanted)

    def stream_ask(
        self, question: str, sampling: Sampling | None = None, **settings: Unpack[ChatSettings]
    ) -> Iterator[Chunk]:
        """As `ask`, one chunk a step; the last chunk carries the result."""
        wanted = sorted_options(ChatOptions, "stream_ask", sampling, settings)
        return self._stream(lambda: self._question(question, wanted), wanted)

    def cancel(self) -> None:
        """Ends the call going on, in whatever thread, at its next step or batch of the prompt: a run's finish_reason is
        then "cancelled"."""
        self._cancelled = True

    # ---- what the session holds ----------------------------------------------------------------------------------

    def append(self, content: str | Ids | Messages, *, progress: Callable[[Progress], None] | None = None) -> int:
        """Puts text, token ids or messages behind what the session holds, evaluates them, and says how many tokens
        there are now.

        Ctrl-C and `cancel` end it at the next batch; what is evaluated by then stays. Raises ArgumentError,
        ContextFullError, UnsupportedModelError; nothing has changed then.
        """
        if isinstance(content, Sequence) and content and isinstance(content[0], Mapping):
            return self._append_messages(checked_messages(content), progress)
        return self._append_text(cast("str | Ids", content), progress)

    def append_document(self, path: PathLike, *, progress: Callable[[Progress], None] | None = None) -> Documents:
        """Puts a document, or a folder of them, behind what the session holds; gives what was read (see
        `pydflash.documents`).

        A user's message each, where the model has a chat template, else text. Raises DocumentError, and what `append`
        does.
        """
        from pydflash.documents import read_documents

        tokenizer = self._need_tokenizer()
        documents = read_documents(path)
        texts = [document.as_prompt() for document in documents]
        try:
            if tokenizer.chat_template is None:
                self._append_text("".join(texts), progress, parse_special=False)
            else:
                self._append_messages([{"role": "user", "content": text} for text in texts], progress)
        except ContextFullError as error:
            raise ContextFullError(f"{path} does not fit: {error}", need=error.need, free=error.free) from None
        return documents

    def checkpoint(self) -> Checkpoint:
        """This place, to `rewind` to later."""
        with self._open():
            self._settle()
            self._held.snapshot()
            ids = self._held.tokens()
            return Checkpoint(len(ids), ids, self._conversation.copy())

    @checked_options
    def rewind(self, to: Checkpoint | int) -> None:
        """Back to a checkpoint, or to the first so many tokens; what followed them never happened.

        Takes the evaluation of the tokens since the nearest place whose state was kept. After so many tokens `messages`
        are those of the call that ended there; where none did, the tokens stay as they are and messages begin anew
        behind them. Ctrl-C and `cancel` end it at the next batch of those tokens; the first tokens, as far as they are
        evaluated by then, stay. Raises ArgumentError; nothing has changed then.
        """
        with self._changing():
            if isinstance(to, Checkpoint):
                ids = to._ids
                conversation = to._conversation.copy()
            else:
                held = self._held.tokens()
                ids = held[: options.integer("to", to, 0, len(held))]
                conversation = self._conversation.copy()
                conversation.back_to(ids.tolist())
            self._check_room(len(ids), 0)

            def settle() -> None:
                held = self._held.tokens().tolist()
                if len(held) < len(ids):
                    conversation.back_to(held)
                self._conversation = conversation

            self._unsettled = settle
            if len(ids):
                self._held.extend_to(ids, cancelled=lambda: self._cancelled)
            else:
                self._held.clear()
            self._settle(for_good=True)

    def reset(self) -> None:
        """Back to the empty timeline."""
        with self._changing():
            self._clear()

    def fork(self) -> Session:
        """A second session with the same timeline, which goes its own way; the models are shared, the caches copied.

        OutOfMemoryError, with the plan, when a second one does not fit; this one is as it was.
        """
        with self._open():
            self._settle()
            models = self._core.models
            assert models is not None
            twin = Session.__new__(Session)
            twin._options, twin._cache = self._options, self._cache
            twin.tokenizer, twin._no_tokenizer = self.tokenizer, self._no_tokenizer
            params = ffi.new("pf_session_params *", self._params[0])
            params.n_ctx = self.n_ctx
            params.type_k, params.type_v = options.kv_types(self.plan.kv_type)
            twin._open_on(models, params)
            check(lib.pf_session_copy(twin._core.session, self._core.session))
            twin._held.replace_snapshots(self._held.snapshots)
            twin._conversation = self._conversation.copy()
            return twin

    def save(self, path: PathLike) -> int:
        """Writes all that the session holds to a file, for `Session.load`; returns the file's size in bytes.

        The file is the old one or the new one at any moment, whatever happens. Raises SessionFileError, and
        ArgumentError when messages hold what JSON cannot say.
        """
        from pydflash.store import save_session

        with self._open():
            self._settle()
            return save_session(
                path,
                self._store_core(),
                conversation=self._conversation.as_dict(),
                snapshots=self._held.snapshots,
                options={**asdict(self._options), "n_ctx": self.n_ctx},
            )

    @classmethod
    def load(
        cls, path: PathLike, target: PathLike | None = None, draft: PathLike | None = None, **options: Any
    ) -> Session:
        """Opens a session as `save` left it, and goes on with exactly the tokens it would have said.

        target, draft: None for the models it was saved with, where they were then.
        options: `Session`'s; what shapes the state (kv_type, n_batch, n_ring) is the file's.

        Everything is checked before anything is used. Raises SessionFileError for a file that is damaged, or does not
        fit these models and options, and what opening a session does.
        """
        from pydflash.store import SavedSession

        with SavedSession(path) as saved:
            shipped = saved.options.pop("shipped", False)
            if target is None and not shipped:
                target = (saved.models["target"] or {}).get("path")
                draft = (saved.models["draft"] or {}).get("path") if draft is None else draft
            shaping = {name: saved.settings[name] for name in ("kv_type", "n_batch", "n_ring")}
            session = cls(target, draft, **{**saved.options, **shaping, **options})
            try:
                session._restore(saved)
            except BaseException:
                session.close()
                raise
            return session

    def restore(self, path: PathLike) -> None:
        """What a saved session held takes the place of what this one holds.

        The models must be the same, and what shapes the state (kv_type, n_batch, n_ring). Everything is checked before
        anything changes. Raises SessionFileError, ContextFullError.
        """
        from pydflash.store import SavedSession

        with SavedSession(path) as saved, self._changing():
            self._restore(saved)

    def _restore(self, saved: SavedSession) -> None:
        from pydflash.store import restore_into

        try:
            conversation = self._conversation.restored(saved.conversation, saved.ids.tolist())
        except ArgumentError as error:
            raise saved.wrong(f"holds messages that cannot be: {error}", "section 'conversation'") from None
        restore_into(self._store_core(), saved, forget=self._held.forget_snapshots)
        self._held.replace_snapshots(saved.read_snapshots())
        self._conversation = conversation

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, as `chat` and `ask` left it. Assign to it to change what the next `ask` follows."""
        with self._open():
            self._settle()
            return self._conversation.messages

    @messages.setter
    def messages(self, messages: Messages) -> None:
        with self._open():
            self._settle(for_good=True)
            self._conversation.replace_messages(checked_messages(messages) if messages else [])

    # ---- inside ----------------------------------------------------------------------------------------------------

    # What makes a prompt runs under the lock, since it may look at what the session holds.

    def _given_prompt(self, prompt: str | Ids | None) -> _Prompt:
        if prompt is None:
            return _Prompt(Rendered(self._held.tokens().tolist(), []), follows=True)
        if isinstance(prompt, str):
            return _Prompt(Rendered(self.tokenize(prompt), []))
        return _Prompt(Rendered(options.token_ids("prompt", prompt, self.n_vocab), []))

    def _chat(self, messages: Messages, wanted: ChatOptions, raw: Sequence[int] = ()) -> _Prompt:
        given = checked_messages(messages)
        variables = wanted.template_variables
        if variables is not None and not isinstance(variables, Mapping):
            raise ArgumentError(f"template_variables is {variables!r}; it must map names to values")
        rendered = self._conversation.render(
            given, raw=raw, answer=True, tools=wanted.tools, thinking=wanted.thinking, variables=variables
        )
        return _Prompt(rendered, raw=raw, messages=given, tools=wanted.tools or ())

    def _question(self, question: str, wanted: ChatOptions) -> _Prompt:
        if not isinstance(question, str):
            raise ArgumentError(f"question must be text, not {type(question).__name__}; chat() takes messages")
        held = self._conversation
        messages = [*held.messages, {"role": "user", "content": question}]
        return replace(self._chat(messages, wanted, held.raw), follows=True)

    def _append_messages(self, messages: list[Message], progress: Callable[[Progress], None] | None) -> int:
        with self._changing():
            conversation = self._conversation
            everything = [*conversation.messages, *messages]
            rendered = conversation.render(everything, raw=conversation.raw, answer=False)
            self._check_room(len(rendered.ids), 0)
            self._prefill(rendered.ids, rendered.ends, progress)
            if not self._cancelled:
                conversation.say(everything, conversation.raw, self._held.tokens().tolist())
            return self._held.n_tokens

    def _append_text(
        self, content: str | Ids, progress: Callable[[Progress], None] | None, *, parse_special: bool = True
    ) -> int:
        with self._changing():
            held = self._held.tokens().tolist()
            if isinstance(content, str):
                new = self._need_tokenizer().encode(content, add_special=not held, parse_special=parse_special)
            else:
                new = options.token_ids("content", content, self.n_vocab)
            if new:
                self._check_room(len(held) + len(new), 0)
                self._unsettled = lambda: self._conversation.freeze(self._held.tokens().tolist())
                self._prefill([*held, *new], (), progress)
                self._settle(for_good=True)
            return self._held.n_tokens

    def _prefill(self, ids: list[int], ends: Iterable[int], progress: Callable[[Progress], None] | None) -> int:
        """Makes the ids the timeline; gives how many of them were not evaluated."""
        import numpy as np

        wanted = np.array(ids, np.int32)
        if self._cache is None:
            return self._held.extend_to(wanted, ends=ends, progress=progress, cancelled=lambda: self._cancelled)
        return self._cache.prefill(
            self._store_core(), self._held, wanted, ends=ends, progress=progress, cancelled=lambda: self._cancelled
        )

    def _store_core(self) -> Core:
        from pydflash.store import Core

        assert self._core.models is not None
        return Core(self._core.session, self._core.models)

    def _request(self, prompt: _Prompt, wanted: RunOptions) -> Request:
        """Checks everything, so that what is refused is refused before any work."""
        sampling = wanted.sampling
        budget = self._options.budget if wanted.budget is None else wanted.budget
        options.budget_of(budget)
        if wanted.budget not in (None, 0, "auto") and not self.block_size:
            raise ArgumentError(f"budget is {wanted.budget}, but this session has no drafter; open it with draft=...")
        texts, stop_ids = options.stops(sampling.stop, self.n_vocab)
        if texts:
            self._need_tokenizer()
        constraint = None
        if wanted.response_format is not None:
            from pydflash.constraint import Constraint

            after = "</think>\n\n" if prompt.rendered.thinking_open else None
            constraint = Constraint.compile(wanted.response_format, self._need_tokenizer(), after=after)
        if self.tokenizer is not None and (constraint is not None or not sampling.ignore_eos):
            stop_ids = sorted(self.tokenizer.stop_ids | set(stop_ids))
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        params, keep = options.generate_params(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            budget=budget if self.block_size else 0,
            chain=self._options.chain if wanted.chain is None else bool(wanted.chain),
            stop_ids=stop_ids,
            repeat_penalty=sampling.repeat_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias,
            logprobs=sampling.logprobs,
            copying=self._options.copying,
        )
        ids = prompt.rendered.ids
        if not ids:
            raise ArgumentError("the prompt is empty: give a text or ids, at least one token to go on from")
        most = self.n_ctx if sampling.max_tokens is None else sampling.max_tokens
        self._check_room(len(ids), min(most, 1))
        answer = None
        if prompt.messages is not None:
            from pydflash.chat.answer import AnswerStream

            answer = AnswerStream(thinking_open=prompt.rendered.thinking_open, tools=prompt.tools)

        def settle() -> None:
            """What stands now is what was asked and what has been said so far."""
            held = self._held.tokens().tolist()
            if prompt.messages is None or answer is None:
                self._conversation.freeze(held)
            else:
                said = [answer.message()] if answer.content or answer.reasoning or answer.tool_calls else []
                self._conversation.say([*prompt.messages, *said], prompt.raw, held)

        return Request(
            ids=ids,
            ends=prompt.rendered.ends,
            max_tokens=min(most, self.n_ctx - len(ids)),
            stops=texts,
            params=params,
            keep=keep,
            seed=seed,
            n_logprobs=sampling.logprobs,
            progress=wanted.progress,
            answer=answer,
            constraint=constraint,
            settle=settle,
        )

    def _run(self, request: Request) -> Generator[Chunk, None, None]:
        self._unsettled = request.settle
        for chunk in run(
            self._core.session,
            self._held,
            self.tokenizer,
            request,
            lambda: self._cancelled,
            lambda: self._prefill(request.ids, request.ends, request.progress),
        ):
            if chunk.result is not None:
                self._stats = chunk.result.stats
                self._settle(for_good=True)
            yield chunk

    def _whole(self, prompt: Callable[[], _Prompt], wanted: RunOptions) -> Result:
        with self._changing():
            for chunk in self._run(self._request(prompt(), wanted)):
                if chunk.result is not None:
                    return chunk.result
        raise AssertionError("a run ends with a result")

    def _stream(self, prompt: Callable[[], _Prompt], wanted: RunOptions) -> Iterator[Chunk]:
        with self._open():
            self._settle()
            made = prompt()
            request = self._request(made, wanted)
            return self._chunks(request, self._epoch if made.follows else None)

    def _chunks(self, request: Request, follows: int | None) -> Iterator[Chunk]:
        """follows: the epoch that the prompt belongs to, when it is made of what the session held."""
        chunks = self._run(request)
        epoch = None
        while True:
            with self._open() if epoch is not None else self._changing():
                if epoch is None and follows is not None:
                    epoch = follows + 1  # this call's own, if none came between
                if epoch not in (None, self._epoch):
                    raise StateError("this stream has ended: another call has changed the session's timeline")
                epoch = self._epoch
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _check_room(self, n: int, n_output: int) -> None:
        if n + n_output > self.n_ctx:
            raise ContextFullError(
                f"the prompt has {n} tokens, {n + n_output - self.n_ctx} too many for n_ctx={self.n_ctx}"
                f"{' and one token of output' if n_output else ''}: shorten it, or open the session with a larger "
                "n_ctx",
                need=n + n_output,
                free=self.n_ctx,
            )


@dataclass(frozen=True)
class _Prompt:
    """What a run is to continue.

    follows: it begins with what the session held when it was made. messages: of a chat, behind raw tokens; None where
    tokens are all there is.
    """

    rendered: Rendered
    follows: bool = False
    raw: Sequence[int] = ()
    messages: list[Message] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
