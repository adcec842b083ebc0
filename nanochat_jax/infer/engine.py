"""The engine: continuous batching over a fixed number of slots in one KV cache.

Prompts are padded, prefilled in batches and inserted into free slots; a prompt already cached in a
slot is copied instead. One dispatch advances the active slots by several tokens. Between
dispatches, `EngineLoop` ends sequences, answers tool calls and admits new requests. The cache
length and the number of slots per dispatch are as small as the active sequences allow, because
attention reads all of them.

Each request has its own random stream, independent of the batch. Batch composition can change the
last bits of the logits (about 1e-6 in float32), because it changes the prefill batch, the slots
per dispatch and the cache length.

`Engine` is immutable and may be shared; `EngineLoop` holds the state of one batch in flight and
belongs to one thread.
"""

import copy
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nanochat_jax.infer import decode
from nanochat_jax.infer.decode import DecodeConfig, Slots
from nanochat_jax.infer.padding import buckets, cache_lengths, row_counts, smallest_fit
from nanochat_jax.infer.request import Generation, Request, Result, TokenizerLike, Vocabulary
from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import param_shardings
from nanochat_jax.model.weights import Params

log = logging.getLogger(__name__)

SHORTEST_PROMPT = 32  # smallest padded length of a prefill
FIRST_TOKEN_SECONDS = 0.1  # a slower dispatch delays first tokens too much
# Limits of a prefill with several prompts. The tokens, padding included, are enough for any device.
PREFILL_ROWS = 8
PREFILL_TOKENS = 2048


class Engine:
    """A model ready to generate.

    Args:
        params: stored in the compute dtype, sharded over the mesh.
        num_slots: maximum number of concurrent sequences.
        steps_per_dispatch: tokens per slot and dispatch. More hides dispatch latency; fewer stream
            more smoothly and waste less on sequences that end.
        max_len: tokens per sequence, prompt included; the model's `sequence_len` if None.
        compute: slots are sharded over its mesh's data axis and heads over its model axis, if the
          sizes divide.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: Params,
        tokenizer: TokenizerLike,
        *,
        num_slots: int = 8,
        compute: Compute = REFERENCE,
        steps_per_dispatch: int = 8,
        max_len: int | None = None,
    ) -> None:
        if num_slots < 1 or steps_per_dispatch < 1:
            raise ValueError(
                "num_slots and steps_per_dispatch must be at least 1, "
                f"got {num_slots} and {steps_per_dispatch}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.steps_per_dispatch = steps_per_dispatch
        self.max_len = config.sequence_len if max_len is None else max_len
        if self.max_len < 2:
            raise ValueError(
                f"max_len must be at least 2, for prompt and reply, got {self.max_len}"
            )
        self.vocabulary = Vocabulary(tokenizer)
        self.prompt_buckets = buckets(min(SHORTEST_PROMPT, self.max_len), self.max_len)
        self.cache_buckets = cache_lengths(self.max_len)
        # Slots sharded over devices are not gathered.
        self.row_buckets = (
            row_counts(num_slots)
            if compute.mesh is None or compute.mesh.shape["data"] == 1
            else (num_slots,)
        )
        self.static = DecodeConfig(
            config, compute, self.cache_buckets[0], self.vocabulary.python_end
        )
        self._compiled: set[tuple[Any, ...]] = set()  # only for the log
        self._set_params(params)

    @property
    def devices(self) -> list[jax.Device]:
        mesh = self.static.compute.mesh
        return jax.devices()[:1] if mesh is None else list(mesh.devices.flat)

    def _set_params(self, params: Params) -> None:
        # A cast inside the decoding loop would read full-precision parameters every step.
        compute = self.static.compute
        params = jax.tree.map(lambda leaf: leaf.astype(compute.dtype), params)
        if compute.mesh is not None:
            params = jax.device_put(params, param_shardings(self.config, compute.mesh))
        self.params = decode.split_layers(params, config=self.config)

    def with_params(self, params: Params) -> "Engine":
        """Return an engine with other parameters that reuses the compiled programs."""
        other = copy.copy(self)
        other._set_params(params)
        return other

    def generation(self, request: Request) -> Generation:
        """Return the request's `Generation` for `EngineLoop.admit`.

        Raises ValueError if the prompt does not fit the context or has ids outside the vocabulary,
        or if a stop token is unknown.
        """
        prompt = request.tokens
        if not all(0 <= token < self.config.vocab_size for token in prompt):
            raise ValueError(
                f"the prompt has ids outside of the vocabulary of {self.config.vocab_size}"
            )
        if request.truncate:
            room = self.max_len - min(request.max_tokens, self.max_len // 2)
            if len(prompt) > room:
                head = prompt[:1] if prompt[0] == self.vocabulary.bos and room > 1 else ()
                prompt = head + prompt[len(prompt) - room + len(head) :]
        if len(prompt) >= self.max_len:
            raise ValueError(
                f"prompt of {len(prompt)} tokens does not fit in the context of {self.max_len}"
            )
        stop = [
            self.vocabulary.resolve(token, self.config.vocab_size) for token in request.stop_tokens
        ]
        max_tokens = min(request.max_tokens, self.max_len - len(prompt))
        return Generation(request, prompt, max_tokens, stop, self.vocabulary)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Return the results of any number of requests, in order.

        Raises ValueError, with the request's index, before any computation if one is invalid.
        """
        generations = []
        for index, request in enumerate(requests):
            try:
                generations.append(self.generation(request))
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from error
        loop = EngineLoop(self, streaming=False)
        waiting = deque(generations)
        while waiting or loop.num_active:
            loop.admit([waiting.popleft() for _ in range(min(loop.num_free, len(waiting)))])
            loop.step()
        return [generation.result() for generation in generations]

    def warmup(self) -> None:
        """Compile every program that serving can need."""
        began = time.monotonic()
        loop = EngineLoop(self)
        for size in self.cache_buckets:
            loop.resize(size)
            for rows in self.row_buckets:
                loop.decode([], rows=rows)
            loop.copy(0, 0)
        prompts = {}
        for length in self.prompt_buckets:
            for rows in self.prefill_rows(length):
                prompts[length] = loop.prefill([(0,)] * rows, length)[0]
        for size in reversed(self.cache_buckets):
            loop.resize(size)
            for shorter, length in itertools.pairwise((0, *self.prompt_buckets)):
                if shorter < size:
                    loop.insert(prompts[length], 0)
        log.info(
            "the engine is ready: %d programs in %.1f s",
            len(self._compiled),
            time.monotonic() - began,
        )

    def prefill_rows(self, length: int) -> tuple[int, ...]:
        """Return the batch sizes of a prefill of padded `length`: 1 and the maximum."""
        most = min(PREFILL_ROWS, self.num_slots, PREFILL_TOKENS // length)
        return tuple(sorted({1, max(1, most)}))

    def log_compilation(self, program: str, *shape: int) -> None:
        if (program, *shape) not in self._compiled:
            self._compiled.add((program, *shape))
            log.debug("compiling %s %s", program, list(shape))


class EngineLoop:
    """One batch in flight. Not thread-safe.

    Call `admit` while slots are free and `step` while any is active. Discard the loop after an
    exception from the device: the cache is lost. With `streaming`, a first token comes from a
    one-step dispatch if the previous full dispatch was slow.
    """

    def __init__(self, engine: Engine, *, streaming: bool = True) -> None:
        self._engine = engine
        self._streaming = streaming
        # whether the last dispatch was full and slow; assumed before the first
        self._slow = streaming
        self._slots: list[Generation | None] = [None] * engine.num_slots
        # Tokens whose keys and values a slot holds: the prompt without its last token. They stay
        # after the generation ends, until the slot is used again.
        self._cached: list[tuple[int, ...]] = [()] * engine.num_slots
        self.cache = Slots((), ())  # allocated for the first sequence

    @property
    def num_active(self) -> int:
        return len(self._slots) - self.num_free

    @property
    def num_free(self) -> int:
        return self._slots.count(None)

    def admit(self, generations: Sequence[Generation]) -> None:
        """Assign a slot to each generation and fill it with the keys and values of its prompt.

        A prompt that a slot already holds is copied from there, or reused in place if that slot is
        free. All others are prefilled, once each, and inserted. The last prompt token is left to
        the first decode step, which samples the first new token.

        Raises ValueError for more than `num_free`.
        """
        if len(generations) > self.num_free:
            raise ValueError(f"{len(generations)} generations for {self.num_free} free slots")
        if not generations:
            return
        self._make_room(generations)
        needed = {generation.prompt[:-1] for generation in generations}
        slots_of: dict[tuple[int, ...], list[int]] = {}  # by the prompt to prefill
        for generation in generations:
            prompt = generation.prompt[:-1]
            sources = [
                slot for slot, cached in enumerate(self._cached) if prompt and cached == prompt
            ]
            slot = self._choose_slot(sources, needed)
            if sources and slot not in sources:
                self.copy(sources[0], slot)
            elif prompt and not sources:
                slots_of.setdefault(prompt, []).append(slot)
            self._cached[slot] = prompt if sources else ()
            self._slots[slot] = generation
        self._prefill(slots_of)

    def _choose_slot(self, sources: list[int], needed: set[tuple[int, ...]]) -> int:
        """Return a free slot: one of `sources`, else one without a prompt that is `needed`."""
        free = [slot for slot, generation in enumerate(self._slots) if generation is None]
        return min(free, key=lambda slot: (slot not in sources, self._cached[slot] in needed, slot))

    def _prefill(self, slots_of: dict[tuple[int, ...], list[int]]) -> None:
        """Prefill each prompt, in batches of one padded length, and insert it into its slots."""
        by_length: dict[int, deque[tuple[int, ...]]] = {}
        for prompt in slots_of:
            length = smallest_fit(len(prompt), self._engine.prompt_buckets)
            by_length.setdefault(length, deque()).append(prompt)
        for length, waiting in by_length.items():
            most = self._engine.prefill_rows(length)[-1]
            while waiting:
                # A batch at most half full costs more than separate prefills.
                size = min(most, len(waiting)) if 2 * len(waiting) > most else 1
                batch = [waiting.popleft() for _ in range(size)]
                computed = self.prefill(batch, length)
                for prompt, keys_and_values in zip(batch, computed, strict=False):
                    for slot in slots_of[prompt]:
                        self.insert(keys_and_values, slot)
                        self._cached[slot] = prompt

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Advance every active slot by up to `steps_per_dispatch` tokens.

        `meanwhile` is called after the dispatch, while the device computes.
        """
        active = [
            (slot, generation)
            for slot, generation in enumerate(self._slots)
            if generation is not None
        ]
        if not active:
            return meanwhile()
        self._make_room()
        began = time.monotonic()
        short = self._slow and any(not generation.tokens for _, generation in active)
        rows, emitted, logprobs = self.decode(
            active, steps=1 if short else self._engine.steps_per_dispatch
        )
        meanwhile()
        # waits for the device
        tokens, logs = np.asarray(emitted).tolist(), np.asarray(logprobs).tolist()
        for row, (slot, generation) in zip(rows, active, strict=True):
            self._accept(slot, generation, tokens[row], logs[row])
        # Never two short dispatches in a row: new requests would slow down all others.
        self._slow = (
            self._streaming and not short and time.monotonic() - began > FIRST_TOKEN_SECONDS
        )

    def cancel(self, generation: Generation) -> None:
        """End a generation early with its tokens so far. No effect if it is done."""
        if not generation.done:
            generation.finish("cancelled")
        if generation in self._slots:
            self._slots[self._slots.index(generation)] = None

    def _make_room(self, admitted: Sequence[Generation] = ()) -> None:
        """Resize the cache to the length that the next step needs."""
        steps = self._engine.steps_per_dispatch
        needed = max(
            min(generation.length + steps, len(generation.prompt) + generation.max_tokens)
            for generation in (*self._slots, *admitted)
            if generation is not None
        )
        self.resize(smallest_fit(needed, self._engine.cache_buckets))

    def resize(self, length: int) -> None:
        """Resize the cache to `length` positions, one of the engine's `cache_buckets`."""
        engine = self._engine
        if not self.cache.k:
            engine.log_compilation("new_slots", engine.num_slots, engine.cache_buckets[0])
            self.cache = decode.new_slots(
                rows=engine.num_slots, length=engine.cache_buckets[0], static=engine.static
            )
        sizes = engine.cache_buckets
        # one size at a time, so that only adjacent sizes are compiled
        while (old := self.cache.length) != length:
            size = sizes[sizes.index(old) + (1 if length > old else -1)]
            engine.log_compilation("resize", engine.num_slots, old, size)
            self.cache = decode.resize(self.cache, length=size, static=engine.static)
        self._cached = [cached if len(cached) <= length else () for cached in self._cached]

    def prefill(self, prompts: Sequence[tuple[int, ...]], length: int) -> tuple[jax.Array, ...]:
        """Return keys and values of prompts padded to `length`, filler rows last."""
        engine = self._engine
        rows = smallest_fit(len(prompts), engine.prefill_rows(length))
        tokens = np.zeros((rows, length), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        engine.log_compilation("prefill", rows, length)
        return decode.prefill(engine.params, tokens, lengths, static=engine.static)

    def insert(self, prompt: jax.Array, slot: int) -> None:
        """Write one prefilled prompt into a slot."""
        engine = self._engine
        engine.log_compilation("insert", engine.num_slots, self.cache.length, prompt.shape[3])
        self.cache = decode.insert(self.cache, prompt, np.int32(slot), static=engine.static)

    def copy(self, source: int, target: int) -> None:
        """Copy slot `source` to slot `target`."""
        engine = self._engine
        engine.log_compilation("copy", engine.num_slots, self.cache.length)
        self.cache = decode.copy(
            self.cache, np.int32(source), np.int32(target), static=engine.static
        )

    def decode(
        self, active: Sequence[tuple[int, Generation]], *, steps: int = 1, rows: int = 1
    ) -> tuple[list[int], jax.Array, jax.Array]:
        """Dispatch `steps` decode steps for these (slot, generation), on at least `rows` slots.

        Returns each generation's row index, the tokens [R, K] (-1 if inactive) and their
        log-probabilities [R, K].
        """
        engine = self._engine
        rows = smallest_fit(max(rows, len(active)), engine.row_buckets)
        used = [slot for slot, _ in active]
        idle = [slot for slot, generation in enumerate(self._slots) if generation is None]
        slots = sorted(used + idle[: rows - len(used)])
        row_of = np.searchsorted(slots, used).tolist()
        table = decode.new_rows(
            rows,
            length=self.cache.length,
            steps=engine.steps_per_dispatch,
            stops=engine.vocabulary.max_stop_ids,
        )
        table["slot"] = slots
        for row, (_, generation) in zip(row_of, active, strict=True):
            decode.fill_row(table[row], generation, engine.config.vocab_size)
        engine.log_compilation("decode", rows, self.cache.length)
        self.cache, emitted, logprobs = decode.decode(
            engine.params, self.cache, decode.decode_inputs(table, steps), static=engine.static
        )
        return row_of, emitted, logprobs

    def _accept(
        self, slot: int, generation: Generation, tokens: list[int], logprobs: list[float]
    ) -> None:
        """Pass new tokens to their generation; an exception becomes its `error`."""
        try:
            for token, logprob in zip(tokens, logprobs, strict=True):
                if token < 0 or generation.done:
                    break
                if token >= self._engine.config.vocab_size:
                    raise FloatingPointError("the model's logits are not finite")
                sampled = not generation.injected
                if not sampled:
                    generation.injected.popleft()
                generation.accept(token, sampled=sampled, logprob=logprob)
        except Exception as error:
            generation.error = error
        if generation.done:
            self._slots[slot] = None
