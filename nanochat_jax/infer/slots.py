"""The slots of the cache: who occupies each, which tokens it holds, and what a prompt can reuse.

A prompt starts from the longest prefix of its tokens that any slot holds: its own conversation's
earlier turns, another conversation with the same system prompt, or the same prompt. The reused
tokens need not end where a request ended: generated text is not always tokenized the same when it
comes back in the next prompt. A slot keeps its tokens until it is assigned to another request. The
least recently used slot is assigned first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nanochat_jax.infer.request import Generation

# A shorter prefix is copied from another slot only if it is the complete prompt. Otherwise,
# prefilling it together with the rest costs as much.
MIN_COPIED = 16


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading tokens that two sequences of the same type share."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


@dataclass(eq=False)
class Slot:
    """One row of the cache.

    Attributes:
        generation: the active request, or None.
        filled: tokens of its prompt in the cache. The last prompt token is never prefilled: the
            first decode step feeds it.
        kept: the tokens that an idle slot holds.
        source: the slot whose prefix will be copied once it is filled that far, or None.
        last_used: the dispatch at which it was last assigned, released or chosen as a source.
    """

    index: int
    generation: Generation | None = None
    filled: int = 0
    kept: tuple[int, ...] = ()
    source: "Slot | None" = None
    last_used: int = 0

    @property
    def active(self) -> Generation:
        """The generation of an occupied slot."""
        assert self.generation is not None
        return self.generation

    @property
    def missing(self) -> int:
        """Prompt tokens to prefill."""
        return 0 if self.generation is None else len(self.generation.prompt) - 1 - self.filled

    @property
    def is_ready(self) -> bool:
        """Whether the generation can decode."""
        return self.generation is not None and self.missing == 0

    @property
    def planned(self) -> tuple[int, ...]:
        """The tokens that the slot holds once its prompt is filled."""
        return self.kept if self.generation is None else self.generation.cached

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens whose keys and values the slot holds."""
        return self.planned if self.missing == 0 else self.planned[: self.filled]

    def release(self, now: int) -> None:
        """End the generation; the slot keeps its tokens."""
        self.kept, self.generation, self.source = self.tokens, None, None
        self.last_used = now


class SlotTable:
    """All slots of one cache."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot(index) for index in range(count)]

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    @property
    def occupied(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.generation is not None]

    @property
    def free(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.generation is None]

    def assign(self, generations: Sequence[Generation], now: int) -> None:
        """Assign a free slot to each generation, with the longest prefix that a slot holds.

        A prefix in another slot is not copied yet: that slot becomes `Slot.source`. `now` is the
        number of the next dispatch.
        """
        for generation in generations:  # a slot that one of them reuses is assigned last
            source, length = self._longest(generation)
            if source.generation is None and length >= MIN_COPIED:
                source.last_used = now
        for generation in generations:
            source, length = self._longest(generation)
            slot = self._choose(source, length)
            slot.generation, slot.filled, slot.source, slot.last_used = generation, 0, None, now
            if slot is source:
                slot.filled = length
            elif length >= min(MIN_COPIED, slot.missing) > 0:
                slot.source = source
            generation.reused = slot.filled

    def _longest(self, generation: Generation) -> tuple[Slot, int]:
        """Return the slot that holds or will hold the longest prefix of the prompt, and its length.

        A slot that waits for another slot is never a source, so slots cannot wait in a circle.
        """
        prompt = generation.prompt[:-1]
        shared = [
            (0 if slot.source else shared_length(prompt, slot.planned), slot) for slot in self.slots
        ]
        length, slot = max(
            shared, key=lambda pair: (pair[0], pair[1].missing == 0, pair[1].generation is None)
        )
        return slot, length

    def _choose(self, source: Slot, length: int) -> Slot:
        """Return `source` if it is free and at least half of its tokens are reused.

        Otherwise return the least recently used free slot.
        """
        if source.generation is None and 2 * length >= len(source.kept):
            return source
        return min(self.free, key=lambda slot: slot.last_used)

    def copies(self) -> list[tuple[Slot, Slot]]:
        """Return (source, target) of the prefixes that can be copied now, in this order.

        A slot also stops waiting if its source will never hold the planned prefix. It then copies
        the shorter prefix that the source holds, or nothing.
        """
        ready = []
        for slot in self.occupied:
            if (source := slot.source) is None:
                continue
            prompt = slot.active.prompt[:-1]
            held = shared_length(prompt, source.tokens)
            if held < shared_length(prompt, source.planned):
                continue  # it is being filled
            slot.source = None
            enough = held >= min(MIN_COPIED, len(prompt))
            slot.active.reused = slot.filled = held if enough else 0
            if slot.filled:
                ready.append((source, slot))
        return ready

    def truncate(self, length: int) -> None:
        """Forget the kept tokens from position `length` on."""
        for slot in self.free:
            slot.kept = slot.kept[:length]
