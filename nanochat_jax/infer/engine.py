"""The engine: a fixed number of slots over one KV cache, filled and refilled while the others keep
decoding.

Prompts are padded to a few lengths and prefilled several at once, then each is put into a free
slot; a prompt that a slot holds already is copied from there. One dispatch advances all slots by
several tokens; between dispatches the host looks at what came: it ends sequences, answers tool
calls, and admits the next requests. The cache is as long as the longest sequence present needs,
and a dispatch takes as few slots as the sequences present need, since attention reads all of them.

A request's tokens do not depend on who shares the batch: its random numbers are its own. Company
does choose how many prompts are prefilled together, how many slots step together and how long the
cache is, and so the last bits of the logits (some 1e-6 in float32).

`Engine` is immutable and may be shared; `EngineLoop` holds the state of one batch in flight and
belongs to one thread.
"""

import copy
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from nanochat_jax.infer import decode
from nanochat_jax.infer.decode import DecodeConfig, Slots
from nanochat_jax.infer.request import (
    MAX_STOP_TOKENS,
    Generation,
    Request,
    Result,
    TokenizerLike,
    Vocabulary,
)
from nanochat_jax.model.compute import REFERENCE, Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.sharding import param_shardings
from nanochat_jax.model.weights import Params

log = logging.getLogger(__name__)

SHORTEST_PROMPT = 32  # smallest padded length of a prefill
SHORTEST_CACHE = 256
FIRST_TOKEN_SECONDS = 0.1  # most that a first token may wait for the rest of its dispatch
# most tokens, padding included, of several prompts in one prefill: no device needs more at once
PREFILL_TOKENS = 2048


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Doubling sizes from `smallest` below `largest`, then `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def cache_lengths(largest: int) -> tuple[int, ...]:
    """Lengths of the cache: doubling from `SHORTEST_CACHE`, and one halfway up each time, since
    every step reads all.
    """
    sizes = buckets(min(SHORTEST_CACHE, largest), largest)
    halfway = (size + size // 2 for size in sizes)
    return tuple(sorted({*sizes, *(size for size in halfway if size < largest)}))


def row_counts(num_slots: int) -> tuple[int, ...]:
    """How many slots a dispatch may take: 1, 8, 64, ... and all. Each count is a program for every
    length of the cache.
    """
    return (
        *itertools.takewhile(
            lambda count: count < num_slots, (8**power for power in itertools.count())
        ),
        num_slots,
    )


def _bucket(size: int, sizes: Iterable[int]) -> int:
    return next(each for each in sizes if each >= size)


class Engine:
    """A model ready to generate.

    Args:
        params: the model's; the engine keeps a copy in the compute dtype, sharded over the mesh.
        tokenizer: of which the special tokens, `encode` and `decode_bytes` are used.
        num_slots: sequences in flight at once.
        steps_per_dispatch: tokens per slot between two looks of the host. More hides dispatch
            latency, less streams more smoothly and wastes less on sequences that end.
        max_len: longest sequence, prompt included; the model's `sequence_len` if None.
        max_prefill_rows: most prompts prefilled at once.
        compute: slots are sharded over its mesh's data axis, heads over its model axis, where the
          numbers divide.
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
        max_prefill_rows: int = 8,
    ) -> None:
        for name, value in (
            ("num_slots", num_slots),
            ("steps_per_dispatch", steps_per_dispatch),
            ("max_prefill_rows", max_prefill_rows),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.config = config
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.steps_per_dispatch = steps_per_dispatch
        self.max_len = config.sequence_len if max_len is None else max_len
        if self.max_len < 2:
            raise ValueError(
                f"max_len must be at least 2, a prompt and a reply, got {self.max_len}"
            )
        self.vocabulary = Vocabulary(tokenizer)
        self.prompt_buckets = buckets(min(SHORTEST_PROMPT, self.max_len), self.max_len)
        self.cache_buckets = cache_lengths(self.max_len)
        # Slots that are spread over devices are not gathered from them.
        self.row_buckets = (
            row_counts(num_slots)
            if compute.mesh is None or compute.mesh.shape["data"] == 1
            else (num_slots,)
        )
        self.static = DecodeConfig(
            config, compute, self.cache_buckets[0], self.vocabulary.python_end
        )
        self._max_prefill_rows = min(max_prefill_rows, num_slots)
        self._compiled: set[tuple[Any, ...]] = set()  # for the log alone
        self._take(params)

    def _take(self, params: Params) -> None:
        # Cast once: a cast inside the decoding loop would read the parameters in full precision
        # every step.
        compute = self.static.compute
        params = jax.tree.map(lambda leaf: leaf.astype(compute.dtype), params)
        if compute.mesh is not None:
            params = jax.device_put(params, param_shardings(self.config, compute.mesh))
        self.params = decode.split_layers(params, config=self.config)

    def with_params(self, params: Params) -> "Engine":
        """An engine like this one for other parameters of the model; nothing is compiled again."""
        other = copy.copy(self)
        other._take(params)
        return other

    def generation(self, request: Request) -> Generation:
        """A request ready for `EngineLoop.admit`.

        Raises ValueError if its prompt leaves no room in the context, or has ids outside of the
        vocabulary, or if there is no such stop token.
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
            self.vocabulary.resolve(each, self.config.vocab_size) for each in request.stop_tokens
        ]
        return Generation(
            request,
            prompt,
            min(request.max_tokens, self.max_len - len(prompt)),
            stop,
            self.vocabulary,
        )

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Results of all requests, in their order; any number of them. Equal prompts are computed
        once.

        Raises ValueError before any work if a request cannot be served, and names which.
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
        """Compile all that serving can need, so that no request waits for it."""
        began = time.monotonic()
        loop = EngineLoop(self)
        for size in self.cache_buckets:
            loop.resize(size)
            for rows in self.row_buckets:
                loop.decode([], rows=rows)
            loop.copy(0, 0)
        prompts = {
            bucket: [loop.prefill([(0,)] * rows, bucket) for rows in self.prefill_rows(bucket)][0][
                0
            ]
            for bucket in self.prompt_buckets
        }
        for size in reversed(self.cache_buckets):
            loop.resize(size)
            for shorter, bucket in zip(
                (0, *self.prompt_buckets), self.prompt_buckets, strict=False
            ):
                if shorter < size:
                    loop.insert(prompts[bucket], 0)
        log.info(
            "the engine is ready: %d programs in %.1f s",
            len(self._compiled),
            time.monotonic() - began,
        )

    def prefill_rows(self, bucket: int) -> tuple[int, ...]:
        """How many prompts of a padded length a prefill may hold: one, or as many as fit."""
        return tuple(sorted({1, max(1, min(self._max_prefill_rows, PREFILL_TOKENS // bucket))}))

    def log_compilation(self, program: str, *shape: int) -> None:
        if (program, *shape) not in self._compiled:
            self._compiled.add((program, *shape))
            log.debug("compiling %s %s", program, list(shape))


class EngineLoop:
    """One batch in flight: `admit` while slots are free, `step` while any is active, `cancel` at
    will.

    A generation that is done has left its slot. Not for several threads at once. After an
    exception from the device the cache is lost: throw the loop away.

    `streaming` looks at the first token of a reply as soon as it is there, where a whole dispatch
    takes long.
    """

    def __init__(self, engine: Engine, *, streaming: bool = True) -> None:
        self._engine = engine
        self._streaming = streaming
        # whether the last dispatch was a whole one that took long, as is feared of the first
        self._slow = streaming
        self._slots: list[Generation | None] = [None] * engine.num_slots
        # The prompt, all but its last token, that a slot's first positions hold; also once its
        # generation is done.
        self._held: list[tuple[int, ...]] = [()] * engine.num_slots
        self.cache = Slots((), ())  # none before the first sequence comes

    @property
    def num_active(self) -> int:
        return sum(each is not None for each in self._slots)

    @property
    def num_free(self) -> int:
        return len(self._slots) - self.num_active

    def admit(self, generations: Sequence[Generation]) -> None:
        """Give each a slot, at most `num_free`, and prefill their prompts; each prompt that a slot
        holds is copied.

        The last token of a prompt is left to the first step, whose logits are those of the first
        token to draw.
        """
        if len(generations) > self.num_free:
            raise ValueError(f"{len(generations)} generations for {self.num_free} free slots")
        if not generations:
            return
        self._make_room(generations)
        wanted = {generation.prompt[:-1] for generation in generations}
        new: dict[int, dict[tuple[int, ...], list[int]]] = {}  # slots by prompt by padded length
        for generation in generations:
            free = [slot for slot, occupant in enumerate(self._slots) if occupant is None]
            prompt = generation.prompt[:-1]
            sources = (
                [slot for slot, held in enumerate(self._held) if held == prompt] if prompt else []
            )
            slot = next((slot for slot in free if slot in sources), None)
            if slot is None:
                slot = next((slot for slot in free if self._held[slot] not in wanted), free[0])
                if sources:
                    self.copy(sources[0], slot)
                elif prompt:
                    by_prompt = new.setdefault(
                        _bucket(len(prompt), self._engine.prompt_buckets), {}
                    )
                    by_prompt.setdefault(prompt, []).append(slot)
                self._held[slot] = prompt if sources else ()
            self._slots[slot] = generation
        for bucket, by_prompt in new.items():
            self._prefill(bucket, deque(by_prompt.items()))

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Advance every active slot by up to `steps_per_dispatch` tokens; `meanwhile` is called
        once the device has begun.
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
        # Never two short ones on end, or those who arrive would slow everyone down.
        self._slow = (
            self._streaming and not short and time.monotonic() - began > FIRST_TOKEN_SECONDS
        )

    def cancel(self, generation: Generation) -> None:
        """End a generation early, keeping what it has; nothing happens to one that is done."""
        if not generation.done:
            generation.finish("cancelled")
        if generation in self._slots:
            self._slots[self._slots.index(generation)] = None

    def _make_room(self, newcomers: Sequence[Generation] = ()) -> None:
        """Fit the cache to what the next step needs: longer, or shorter once long sequences have
        left.
        """
        steps = self._engine.steps_per_dispatch
        present = [each for each in (*self._slots, *newcomers) if each is not None]
        needed = max(
            min(each.length + steps, len(each.prompt) + each.max_tokens) for each in present
        )
        self.resize(_bucket(needed, self._engine.cache_buckets))

    def resize(self, length: int) -> None:
        """Give every slot `length` positions, one of the engine's `cache_buckets`."""
        engine = self._engine
        if not self.cache.k:
            engine.log_compilation("new_slots", engine.num_slots, engine.cache_buckets[0])
            self.cache = decode.new_slots(
                rows=engine.num_slots, length=engine.cache_buckets[0], static=engine.static
            )
        sizes = engine.cache_buckets
        # through all sizes between, so that only neighbours are compiled
        while (old := self.cache.length) != length:
            size = sizes[sizes.index(old) + (1 if length > old else -1)]
            engine.log_compilation("resize", engine.num_slots, old, size)
            self.cache = decode.resize(self.cache, length=size, static=engine.static)
        self._held = [held if len(held) <= length else () for held in self._held]

    def prefill(self, prompts: Sequence[tuple[int, ...]], bucket: int) -> tuple[jax.Array, ...]:
        """Keys and values of prompts, one of `prefill_rows` at most, padded to `bucket`; filler
        comes last.
        """
        engine = self._engine
        rows = _bucket(len(prompts), engine.prefill_rows(bucket))
        tokens = np.zeros((rows, bucket), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        engine.log_compilation("prefill", rows, bucket)
        return decode.prefill(engine.params, tokens, lengths, static=engine.static)

    def insert(self, prompt: jax.Array, slot: int) -> None:
        """Put one prompt of a prefill into a slot."""
        engine = self._engine
        engine.log_compilation("insert", engine.num_slots, self.cache.length, prompt.shape[3])
        self.cache = decode.insert(self.cache, prompt, np.int32(slot), static=engine.static)

    def copy(self, source: int, target: int) -> None:
        """Make a slot hold what another does."""
        engine = self._engine
        engine.log_compilation("copy", engine.num_slots, self.cache.length)
        self.cache = decode.copy(
            self.cache, np.int32(source), np.int32(target), static=engine.static
        )

    def decode(
        self, active: Sequence[tuple[int, Generation]], *, steps: int = 1, rows: int = 1
    ) -> tuple[list[int], jax.Array, jax.Array]:
        """Begin a dispatch of `rows` slots or more for these (slot, generation).

        Returns the row of each in what follows: tokens [R, K], -1 where a slot rested, and their
          log-probabilities.
        """
        engine, most = self._engine, self._engine.steps_per_dispatch
        rows = _bucket(max(rows, len(active)), engine.row_buckets)
        taken = [slot for slot, _ in active]
        idle = [slot for slot, occupant in enumerate(self._slots) if occupant is None]
        slots = sorted(taken + idle[: rows - len(taken)])
        row_of = np.searchsorted(slots, taken).tolist()
        stops = len(engine.vocabulary.terminal) + MAX_STOP_TOKENS
        table = decode.new_rows(rows, length=self.cache.length, steps=most, stops=stops)
        table["slot"] = slots
        for row, (_, generation) in zip(row_of, active, strict=True):
            request, injected = generation.request, list(generation.forced)[:most]
            at = table[row]
            at["length"], at["active"] = generation.length, True
            at["previous"], at["token"] = generation.newest
            at["remaining"] = generation.max_tokens - len(generation.tokens)
            at["injected"][: len(injected)], at["num_injected"] = injected, len(injected)
            at["stop"][: len(generation.stop_ids)] = generation.stop_ids
            at["logprobs"], at["temperature"], at["top_p"] = (
                request.logprobs,
                request.temperature,
                request.top_p,
            )
            at["top_k"] = min(request.top_k, engine.config.vocab_size)
            at["seed"] = (request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF)
        engine.log_compilation("decode", rows, self.cache.length)
        self.cache, emitted, logprobs = decode.decode(
            engine.params, self.cache, decode.decode_inputs(table, steps), static=engine.static
        )
        return row_of, emitted, logprobs

    def _prefill(self, bucket: int, waiting: deque[tuple[tuple[int, ...], list[int]]]) -> None:
        """Prefill prompts of one padded length and put each into its slots."""
        most = self._engine.prefill_rows(bucket)[-1]
        while waiting:
            # A batch that is hardly half full costs more than its prompts one by one.
            size = min(most, len(waiting)) if 2 * len(waiting) > most else 1
            batch = [waiting.popleft() for _ in range(size)]
            computed = self.prefill([prompt for prompt, _ in batch], bucket)
            for (prompt, slots), keys_and_values in zip(batch, computed, strict=False):
                for slot in slots:
                    self.insert(keys_and_values, slot)
                    self._held[slot] = prompt

    def _accept(
        self, slot: int, generation: Generation, tokens: list[int], logprobs: list[float]
    ) -> None:
        """Hand new tokens to their generation; what goes wrong in that is this generation's error,
        not the batch's.
        """
        try:
            for token, logprob in zip(tokens, logprobs, strict=True):
                if token < 0 or generation.done:
                    break
                if token >= self._engine.config.vocab_size:
                    raise FloatingPointError("the model's logits are not finite")
                sampled = not generation.forced
                if not sampled:
                    generation.forced.popleft()
                generation.accept(token, sampled=sampled, logprob=logprob)
        except Exception as error:
            generation.error = error
        if generation.done:
            self._slots[slot] = None
