"""The engine: continuous batching over a fixed number of slots in one KV cache.

A prompt reuses the longest prefix that a slot holds (slots.py). The rest is prefilled in pieces of
a few lengths, between the dispatches that advance the active slots by several tokens. Between
dispatches, `EngineLoop` also ends sequences, answers tool calls and admits new requests. The cache
length and the number of slots per dispatch are as small as the active sequences allow, because
attention reads all of them.

Each request has its own random stream, independent of the batch. Batch composition can change the
last bits of the logits (about 1e-6 in float32), because it changes the reused prefix, the prefill
batch, the slots per dispatch and the cache length.

`Engine` is immutable and may be shared; `EngineLoop` holds the state of one batch in flight and
belongs to one thread.
"""

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from nanochat_jax.infer import decode
from nanochat_jax.infer.decode import DecodeConfig, Slots
from nanochat_jax.infer.padding import cache_lengths, row_counts, smallest_fit
from nanochat_jax.infer.programs import Programs
from nanochat_jax.infer.request import Generation, Request, Result, TokenizerLike, Vocabulary
from nanochat_jax.infer.slots import Slot, SlotTable
from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import param_shardings
from nanochat_jax.model.weights import Params

FIRST_TOKEN_SECONDS = 0.1  # a slower dispatch delays first tokens too much
# Padded lengths of a prefill. A piece is used if at least two thirds of it would be tokens. Finer
# pieces cost more dispatches per prompt, each about as much as 30 to 45 tokens on a CPU.
PIECES = (16, 32, 64, 128, 256)
# Slots and padded length of a prefill of several prompts. More tokens gain nothing on any device.
BATCH_ROWS, BATCH_PIECE = 8, 64
# Most tokens to prefill, padding included, before the next dispatch: while other requests stream,
# and otherwise.
PREFILL_TOKENS_STREAMING = 512
PREFILL_TOKENS = 2048
# Dispatches for which the cache stays long enough for an idle slot's tokens. After about as many,
# the longer cache has cost the others as much time as prefilling the lost tokens again would.
KEEP_DISPATCHES = 16


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
        self.cache_buckets = cache_lengths(self.max_len)
        self.pieces = tuple(piece for piece in PIECES if piece <= self.max_len) or (self.max_len,)
        # Slots sharded over devices are not gathered.
        self.row_buckets = (
            row_counts(num_slots)
            if compute.mesh is None or compute.mesh.shape["data"] == 1
            else (num_slots,)
        )
        fewest, *more = self.row_buckets
        self.prefill_shapes = [(fewest, piece) for piece in self.pieces]
        if more and more[0] <= BATCH_ROWS and BATCH_PIECE in self.pieces:
            self.prefill_shapes.append((more[0], BATCH_PIECE))
        self.static = DecodeConfig(config, compute, self.vocabulary.python_end)
        self.programs = Programs()
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
        self.params = decode.split_layers(params, config=self.config, compute=compute)

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
        self.check_ids(prompt)
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

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise ValueError if tokens have ids outside the vocabulary."""
        if not all(0 <= token < self.config.vocab_size for token in tokens):
            raise ValueError(
                f"the prompt has ids outside of the vocabulary of {self.config.vocab_size}"
            )

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

    def prefill_shape(self, missing: Sequence[int], *, most: int | None = None) -> tuple[int, int]:
        """Return (rows, padded length) of the next prefill of prompts that lack `missing` tokens.

        It takes the first prompts, as many as it has rows. A prefill of several is chosen if it has
        at most `most` tokens, padding included.
        """
        rows, piece = self.prefill_shapes[-1]
        tokens = sum(min(count, piece) for count in missing[:rows])
        if 3 * tokens >= 2 * rows * piece and (most is None or rows * piece <= most):
            return rows, piece
        full = (piece for piece in reversed(self.pieces) if 3 * missing[0] >= 2 * piece)
        return self.row_buckets[0], next(full, self.pieces[0])


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
        self._slots = SlotTable(engine.num_slots)
        self._dispatches = 0
        self.cache = Slots((), ())  # allocated for the first sequence

    @property
    def num_active(self) -> int:
        return len(self._slots.occupied)

    @property
    def num_free(self) -> int:
        return len(self._slots.free)

    def admit(self, generations: Sequence[Generation]) -> None:
        """Assign a slot to each generation. `step` prefills what the slot lacks of the prompt.

        The last prompt token is left to the first decode step, which samples the first new token.
        Raises ValueError for more than `num_free`.
        """
        if len(generations) > self.num_free:
            raise ValueError(f"{len(generations)} generations for {self.num_free} free slots")
        self._slots.assign(generations, self._dispatches)

    def fill(self, budget: int | None = None) -> None:
        """Copy the prefixes and prefill the rest of the admitted prompts.

        With a `budget`, stop once a slot is ready and `budget` tokens, padding included, are
        prefilled. A prefill of several slots is never larger than the budget.
        """
        self._make_room()
        left = budget
        while True:
            for source, target in self._slots.copies():
                self.copy(source.index, target.index)
            waiting = [slot for slot in self._slots.occupied if slot.missing and not slot.source]
            ready = any(slot.is_ready for slot in self._slots)
            if not waiting or (left is not None and ready and left <= 0):
                return
            waiting.sort(key=lambda slot: slot.last_used)
            missing = [slot.missing for slot in waiting]
            rows, piece = self._engine.prefill_shape(missing, most=budget)
            self.prefill(waiting[:rows], rows, piece)
            if left is not None:
                left -= rows * piece

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Advance every active slot by up to `steps_per_dispatch` tokens.

        `meanwhile` is called while the device computes.
        """
        if not self.num_active:
            return meanwhile()
        began = time.monotonic()
        streams = any(slot.is_ready and slot.active.tokens for slot in self._slots)
        budget = PREFILL_TOKENS_STREAMING if streams else PREFILL_TOKENS
        self.fill(budget if self._streaming else None)
        active = [slot for slot in self._slots if slot.is_ready]
        short = self._slow and any(not slot.active.tokens for slot in active)
        rows, emitted, logprobs = self.decode(
            active, steps=1 if short else self._engine.steps_per_dispatch
        )
        self._dispatches += 1
        meanwhile()
        # waits for the device
        tokens, logs = np.asarray(emitted).tolist(), np.asarray(logprobs).tolist()
        for row, slot in zip(rows, active, strict=True):
            self._accept(slot, tokens[row], logs[row])
        # Never two short dispatches in a row: new requests would slow down all others.
        self._slow = (
            self._streaming and not short and time.monotonic() - began > FIRST_TOKEN_SECONDS
        )

    def cancel(self, generation: Generation) -> None:
        """End a generation early with its tokens so far. No effect if it is done."""
        if not generation.done:
            generation.finish("cancelled")
        for slot in self._slots.occupied:
            if slot.generation is generation:
                slot.release(self._dispatches)

    def _make_room(self) -> None:
        """Resize the cache to the length that the next step needs.

        It stays long enough for the tokens of recently used idle slots.
        """
        steps = self._engine.steps_per_dispatch
        needed = max(
            min(generation.length + steps, len(generation.prompt) + generation.max_tokens)
            for slot in self._slots.occupied
            if (generation := slot.generation)
        )
        kept = (
            len(slot.kept)
            for slot in self._slots.free
            if slot.last_used + KEEP_DISPATCHES > self._dispatches
        )
        self.resize(smallest_fit(max(needed, *kept, 1), self._engine.cache_buckets))

    def resize(self, length: int) -> None:
        """Resize the cache to `length` positions, one of the engine's `cache_buckets`."""
        engine = self._engine
        if not self.cache.k:
            rows, shortest = engine.num_slots, engine.cache_buckets[0]
            self.cache = self.run(
                decode.new_slots, sizes=(rows, shortest), rows=rows, length=shortest
            )
        sizes = engine.cache_buckets
        # one size at a time, so that only adjacent sizes are compiled
        while (old := self.cache.length) != length:
            size = sizes[sizes.index(old) + (1 if length > old else -1)]
            self.cache = self.run(
                decode.resize, self.cache, sizes=(engine.num_slots, old, size), length=size
            )
        self._slots.truncate(length)

    def prefill(self, batch: Sequence[Slot], rows: int, piece: int) -> None:
        """Prefill the next tokens of these slots, at most `piece` of each and `rows` slots."""
        engine = self._engine
        slots, row_of = self._rows([slot.index for slot in batch], rows)
        start, previous = np.full(rows, self.cache.length, np.int32), np.zeros(rows, np.int32)
        tokens, valid = np.zeros((rows, piece), np.int32), np.zeros(rows, np.int32)
        for row, slot in zip(row_of, batch, strict=True):
            prompt, first = slot.active.prompt, slot.filled
            new = prompt[first : min(first + piece, len(prompt) - 1)]
            start[row], valid[row], tokens[row, : len(new)] = first, len(new), new
            previous[row] = prompt[first - 1] if first else 0
            slot.filled += len(new)
        inputs = decode.PrefillInputs(slots, start, previous, tokens, valid)
        sizes = rows, piece, self.cache.length
        self.cache = self.run(decode.prefill, engine.params, self.cache, inputs, sizes=sizes)

    def _rows(self, used: list[int], rows: int) -> tuple[np.ndarray, list[int]]:
        """Return `rows` ascending slot indices that include `used`, and the rows of these."""
        taken = set(used)
        others = [slot.index for slot in self._slots if slot.index not in taken]
        slots = np.sort(np.array(used + others[: rows - len(used)], np.int32))
        return slots, np.searchsorted(slots, used).tolist()

    def copy(self, source: int, target: int) -> None:
        """Copy slot `source` to slot `target`."""
        sizes = self._engine.num_slots, self.cache.length
        slots = np.int32(source), np.int32(target)
        self.cache = self.run(decode.copy, self.cache, *slots, sizes=sizes)

    def decode(
        self, active: Sequence[Slot], *, steps: int = 1, rows: int = 1
    ) -> tuple[list[int], jax.Array, jax.Array]:
        """Dispatch `steps` decode steps for these slots, on at least `rows` slots.

        Returns each slot's row index, the tokens [R, K] (-1 if inactive) and their
        log-probabilities [R, K].
        """
        engine = self._engine
        rows = smallest_fit(max(rows, len(active)), engine.row_buckets)
        slots, row_of = self._rows([slot.index for slot in active], rows)
        table = decode.new_rows(
            rows,
            length=self.cache.length,
            steps=engine.steps_per_dispatch,
            stops=engine.vocabulary.max_stop_ids,
        )
        table["slot"] = slots
        for row, slot in zip(row_of, active, strict=True):
            decode.fill_row(table[row], slot.active, engine.config.vocab_size)
        inputs, sizes = decode.decode_inputs(table, steps), (rows, self.cache.length)
        self.cache, emitted, logprobs = self.run(
            decode.decode, engine.params, self.cache, inputs, sizes=sizes
        )
        return row_of, emitted, logprobs

    def run(self, function: Any, *args: Any, sizes: tuple[int, ...], **static: Any) -> Any:
        """Run a jitted function of decode.py. `sizes` are what it is compiled for."""
        with self._engine.programs.use(function.__name__, *sizes):
            return function(*args, static=self._engine.static, **static)

    def _accept(self, slot: Slot, tokens: list[int], logprobs: list[float]) -> None:
        """Pass new tokens to the slot's generation; an exception becomes its `error`."""
        generation = slot.active
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
            slot.release(self._dispatches)
        if generation.error is not None:
            slot.kept = ()
