"""Padded sizes: few distinct shapes, because each one is compiled."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

SHORTEST_CACHE = 256


def padded_length(length: int, unit: int = 32, *, steps: int = 2) -> int:
    """Return the padded length of a sequence, a multiple of `unit`.

    There are `steps` padded lengths per doubling; for 2: `unit` times 1, 2, 3, 4, 6, 8, 12, ...
    """
    units = max(1, -(-length // unit))
    step = max(1, (1 << (units - 1).bit_length()) // (2 * steps))
    return unit * step * -(-units // step)


def by_padded_length(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
    """Yield each padded length and the indices of the sequences that have it, shortest first."""

    def padded(index: int) -> int:
        return padded_length(len(sequences[index]))

    for length, indices in groupby(sorted(range(len(sequences)), key=padded), key=padded):
        yield length, list(indices)


def padded_batches(
    sequences: Sequence[Sequence[int]], *, tokens: int, devices: int = 1
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield sequence indices and their tokens [B, T] int32, padded with 0, shortest first.

    Rows after the last index are filler. `tokens` is the budget of a batch over all devices. B is
    a multiple of `devices`; if T exceeds the budget per device, each device gets one row.
    """

    for length, indices in by_padded_length(sequences):
        rows = devices * max(1, tokens // (length * devices))
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            batch = np.zeros((rows, length), np.int32)
            for row, index in zip(batch, chosen):
                row[: len(sequences[index])] = sequences[index]
            yield chosen, batch


def cache_lengths(largest: int) -> tuple[int, ...]:
    """Return cache lengths: doubling from `SHORTEST_CACHE`, with one halfway between."""
    smallest = min(SHORTEST_CACHE, largest)
    doubled = (smallest << power for power in range(largest.bit_length()))
    sizes = [*(size for size in doubled if size < largest), largest]
    halfway = (size + size // 2 for size in sizes)
    return tuple(sorted({*sizes, *(size for size in halfway if size < largest)}))


def row_counts(num_slots: int) -> tuple[int, ...]:
    """Return the numbers of slots per dispatch: 1, 8, 64, ... and `num_slots`."""
    return (*(8**power for power in range(20) if 8**power < num_slots), num_slots)


def smallest_fit(size: int, sizes: Iterable[int]) -> int:
    """Return the smallest of the ascending `sizes` that holds `size`."""
    return next(padded for padded in sizes if padded >= size)
