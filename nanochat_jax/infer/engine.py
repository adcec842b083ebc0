"""The engine: a fixed number of slots over one KV cache, filled and refilled while the others keep decoding.

Prompts are padded to a few lengths and prefilled several at once, then each is put into a free slot. One dispatch
advances all slots by several tokens; between dispatches the host looks at what came: it ends sequences, answers tool
calls, and admits the next requests. The cache starts short and grows as sequences do, since attention reads all of it.

`Engine` is immutable and may be shared; `EngineLoop` holds the state of one batch in flight and belongs to one thread.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanochat_jax.config import GPTConfig
from nanochat_jax.gpt import KVCache, Params
from nanochat_jax.infer import device
from nanochat_jax.infer.device import Dispatch, Program
from nanochat_jax.infer.request import Generation, Request, Result, TokenizerLike, Vocabulary
from nanochat_jax.infer.sampling import SamplingParams
from nanochat_jax.sharding import param_shardings

log = logging.getLogger(__name__)

SHORTEST_PROMPT = 32  # smallest padded length of a prefill
SHORTEST_CACHE = 256
PREFILL_TOKENS = 8192  # most tokens, padding included, in one prefill: bounds its attention scores in memory


def buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Doubling sizes from `smallest` below `largest`, then `largest`."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def _bucket(size: int, sizes: Iterable[int]) -> int:
    return next(each for each in sizes if each >= size)


class Engine:
    """A model ready to generate.

    Args:
        params: the model's; kept in `compute_dtype`, and spread over the mesh if there is one.
        tokenizer: of which the special tokens, `encode` and `decode_bytes` are used.
        num_slots: sequences in flight at once.
        steps_per_dispatch: tokens per slot between two looks of the host. More hides dispatch latency, less streams
            more smoothly and wastes less on sequences that end.
        max_len: longest sequence, prompt included; the model's `sequence_len` if None.
        max_prefill_rows: most prompts prefilled at once.
        mesh: axes ("data", "model"): slots are spread over data, heads over model, where the numbers divide.
    """

    def __init__(
        self,
        config: GPTConfig,
        params: Params,
        tokenizer: TokenizerLike,
        *,
        num_slots: int = 8,
        compute_dtype: Any = jnp.float32,
        steps_per_dispatch: int = 8,
        max_len: int | None = None,
        max_prefill_rows: int = 8,
        mesh: Mesh | None = None,
    ) -> None:
        for name, value in (("num_slots", num_slots), ("steps_per_dispatch", steps_per_dispatch),
                            ("max_prefill_rows", max_prefill_rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.config = config
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.steps_per_dispatch = steps_per_dispatch
        self.max_len = config.sequence_len if max_len is None else max_len
        if self.max_len < 2:
            raise ValueError(f"max_len must be at least 2, a prompt and a reply, got {self.max_len}")
        dtype = jnp.dtype(compute_dtype)
        # Cast once: a cast inside the decoding loop would read the parameters in full precision every step.
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        if mesh is not None:
            params = jax.device_put(params, param_shardings(config, mesh))
        self.params = device.split_layers(params)
        self.vocabulary = Vocabulary(tokenizer)
        max_rows = min(max_prefill_rows, num_slots)
        self.program = Program(config, dtype, max_rows, self.vocabulary.terminal, self.vocabulary.python_end, mesh)
        self.prompt_buckets = buckets(min(SHORTEST_PROMPT, self.max_len), self.max_len)
        self.cache_buckets = buckets(min(SHORTEST_CACHE, self.max_len), self.max_len)
        self.row_buckets = buckets(1, max_rows)
        self._compiled: set[tuple[Any, ...]] = set()  # for the log alone

    def budget(self, request: Request) -> int:
        """Tokens the request may generate: its `max_tokens`, or what the context leaves; ValueError if that is none."""
        length = len(request.tokens)
        if length >= self.max_len:
            raise ValueError(f"prompt of {length} tokens does not fit in the context of {self.max_len}")
        if not all(0 <= token < self.config.vocab_size for token in request.tokens):
            raise ValueError(f"the prompt has ids outside of the vocabulary of {self.config.vocab_size}")
        return min(request.max_tokens, self.max_len - length)

    def generation(self, request: Request) -> Generation:
        """A request ready for `EngineLoop.admit`. Raises ValueError as `budget` does."""
        return Generation(request, self.budget(request), self.vocabulary)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Results of all requests, in their order; any number of them.

        Raises ValueError before any work if a prompt does not fit, and names which.
        """
        generations = []
        for index, request in enumerate(requests):
            try:
                generations.append(self.generation(request))
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from error
        loop = EngineLoop(self)
        waiting = deque(generations)
        while waiting or loop.num_active:
            loop.admit([waiting.popleft() for _ in range(min(loop.num_free, len(waiting)))])
            loop.step()
        return [generation.result() for generation in generations]

    def warmup(self) -> None:
        """Compile all that serving can need, so that no request waits for it."""
        loop = EngineLoop(self)
        for length in self.cache_buckets:
            loop.reserve(length)
            loop.decode([])
            for bucket in (each for each in self.prompt_buckets if each <= length):
                for rows in self.prefill_rows(bucket):
                    prompts, logits = loop.prefill([(0,)] * rows, bucket)
                    loop.insert(prompts, row=0, slot=0)
                    loop.sample_first(logits, [])

    def prefill_rows(self, bucket: int) -> tuple[int, ...]:
        """How many prompts of a padded length a prefill may hold, ascending."""
        return tuple(rows for rows in self.row_buckets if rows == 1 or rows * bucket <= PREFILL_TOKENS)

    def log_compilation(self, program: str, *shape: int) -> None:
        if (program, *shape) not in self._compiled:
            self._compiled.add((program, *shape))
            log.debug("compiling %s %s", program, list(shape))


class EngineLoop:
    """One batch in flight: `admit` while slots are free, `step` while any is active, `cancel` at will.

    A generation that is done has left its slot. Not for several threads at once. After an exception from the device the
    cache is lost: throw the loop away.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._slots: list[Generation | None] = [None] * engine.num_slots
        self.cache: KVCache | None = None

    @property
    def num_active(self) -> int:
        return sum(each is not None for each in self._slots)

    @property
    def num_free(self) -> int:
        return len(self._slots) - self.num_active

    def admit(self, generations: Sequence[Generation]) -> None:
        """Prefill, at most `num_free`, and draw the first token of each. Equal prompts are computed once."""
        if len(generations) > self.num_free:
            raise ValueError(f"{len(generations)} generations for {self.num_free} free slots")
        if not generations:
            return
        if self.num_active == 0:
            self.cache = None  # start over with a short one
        self.reserve(max(len(generation.request.tokens) for generation in generations))
        free = [slot for slot, occupant in enumerate(self._slots) if occupant is None]
        by_bucket: dict[int, dict[tuple[int, ...], list[tuple[int, Generation]]]] = {}
        for slot, generation in zip(free, generations, strict=False):
            prompt = generation.request.tokens
            by_prompt = by_bucket.setdefault(_bucket(len(prompt), self._engine.prompt_buckets), {})
            by_prompt.setdefault(prompt, []).append((slot, generation))
            self._slots[slot] = generation
        for bucket, by_prompt in by_bucket.items():
            prompts, most = list(by_prompt), self._engine.prefill_rows(bucket)[-1]
            for start in range(0, len(prompts), most):
                self._start(bucket, {prompt: by_prompt[prompt] for prompt in prompts[start : start + most]})

    def step(self) -> None:
        """Advance every active slot by up to `steps_per_dispatch` tokens."""
        active = [(slot, generation) for slot, generation in enumerate(self._slots) if generation is not None]
        if not active:
            return
        steps = self._engine.steps_per_dispatch
        self.reserve(max(min(each.length + steps, len(each.request.tokens) + each.max_tokens) for _, each in active))
        emitted = self.decode(active)
        for slot, generation in active:
            self._accept(slot, generation, [token for token in emitted[slot].tolist() if token >= 0])

    def cancel(self, generation: Generation) -> None:
        """End a generation early, keeping what it has; nothing happens to one that is done."""
        if not generation.done:
            generation.finish("cancelled")
        if generation in self._slots:
            self._slots[self._slots.index(generation)] = None

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in every slot, keeping what the cache holds."""
        engine = self._engine
        target = _bucket(length, engine.cache_buckets)
        if self.cache is None:
            engine.log_compilation("new_cache", engine.num_slots, target)
            self.cache = device.new_cache(rows=engine.num_slots, length=target, program=engine.program)
        for size in engine.cache_buckets:  # through all sizes between, so that only neighbours are compiled
            if self.cache.k[0].shape[2] < size <= target:
                engine.log_compilation("grow", engine.num_slots, size)
                self.cache = device.grow(self.cache, length=size, program=engine.program)

    def prefill(self, prompts: Sequence[tuple[int, ...]], bucket: int) -> tuple[KVCache, jax.Array]:
        """Cache of prompts padded to `bucket`, and the logits [max_rows, V] after each; filler rows come last."""
        engine = self._engine
        rows = _bucket(len(prompts), engine.prefill_rows(bucket))
        tokens = np.zeros((rows, bucket), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        engine.log_compilation("prefill", rows, bucket)
        return device.prefill(engine.params, tokens, lengths, program=engine.program)

    def insert(self, prompts: KVCache, *, row: int, slot: int) -> None:
        """Put one row of a prefill's cache into a slot."""
        program = self._engine.program
        self.cache = device.insert(self.cache, prompts, np.int32(row), np.int32(slot), program=program)

    def sample_first(self, logits: jax.Array, rows: Sequence[tuple[int, int, Generation]]) -> np.ndarray:
        """First tokens [B] from a prefill's logits; each of `rows` is (row of the logits, slot, generation)."""
        source = np.zeros(len(self._slots), np.int32)
        position = np.zeros(len(self._slots), np.int32)
        for row, slot, generation in rows:
            source[slot] = row
            position[slot] = len(generation.request.tokens)
        sampling = self._sampling([(slot, generation) for _, slot, generation in rows])
        return np.asarray(device.sample_first(logits, source, position, sampling, program=self._engine.program))

    def decode(self, active: Sequence[tuple[int, Generation]]) -> np.ndarray:
        """One dispatch for these (slot, generation); tokens [B, K], -1 where a slot rested."""
        engine, size = self._engine, len(self._slots)
        dispatch = Dispatch(
            token=np.zeros(size, np.int32),
            active=np.zeros(size, bool),
            remaining=np.zeros(size, np.int32),
            forced=np.zeros((size, engine.steps_per_dispatch), np.int32),
            num_forced=np.zeros(size, np.int32),
            sampling=self._sampling(active),
        )
        for slot, generation in active:
            dispatch.token[slot] = generation.tokens[-1]
            dispatch.active[slot] = True
            dispatch.remaining[slot] = generation.max_tokens - len(generation.tokens)
            forced = list(generation.forced)[: engine.steps_per_dispatch]
            dispatch.forced[slot, : len(forced)] = forced
            dispatch.num_forced[slot] = len(forced)
        engine.log_compilation("decode", size, self.cache.k[0].shape[2])
        self.cache, emitted = device.decode(engine.params, self.cache, dispatch, program=engine.program)
        return np.asarray(emitted)

    def _start(self, bucket: int, by_prompt: dict[tuple[int, ...], list[tuple[int, Generation]]]) -> None:
        prompts, logits = self.prefill(list(by_prompt), bucket)
        rows = [(row, slot, each) for row, users in enumerate(by_prompt.values()) for slot, each in users]
        for row, slot, _ in rows:
            self.insert(prompts, row=row, slot=slot)
        first = self.sample_first(logits, rows)
        for _, slot, generation in rows:
            self._accept(slot, generation, [int(first[slot])])

    def _accept(self, slot: int, generation: Generation, tokens: list[int]) -> None:
        """Hand new tokens to their generation; what goes wrong in that is this generation's error, not the batch's."""
        try:
            for token in tokens:
                if token >= self._engine.config.vocab_size:
                    raise FloatingPointError("the model's logits are not finite")
                sampled = not generation.forced
                if not sampled:
                    generation.forced.popleft()
                generation.accept(token, sampled=sampled)
                if generation.done:
                    break
        except Exception as error:
            generation.error = error
        if generation.done:
            self._slots[slot] = None

    def _sampling(self, active: Sequence[tuple[int, Generation]]) -> SamplingParams:
        size = len(self._slots)
        params = SamplingParams(
            temperature=np.zeros(size, np.float32),
            top_k=np.zeros(size, np.int32),
            top_p=np.ones(size, np.float32),
            seed=np.zeros((size, 2), np.uint32),
        )
        for slot, generation in active:
            request = generation.request
            params.temperature[slot] = request.temperature
            params.top_k[slot] = min(request.top_k, self._engine.config.vocab_size)
            params.top_p[slot] = request.top_p
            params.seed[slot] = (request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF)
        return params
