"""Padded batches with few distinct shapes, under a token budget."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np


def bucket(length: int, unit: int = 32, *, steps: int = 2) -> int:
    """Return the padded length of a sequence, a multiple of `unit`.

    There are `steps` padded lengths per doubling; for 2: `unit` times 1, 2, 3, 4, 6, 8, 12, ...
    """
    units = max(1, -(-length // unit))
    step = max(1, (1 << (units - 1).bit_length()) // (2 * steps))
    return unit * step * -(-units // step)


def padded_batches(
    sequences: Sequence[Sequence[int]], *, tokens: int, devices: int = 1
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield sequence indices and their tokens [B, T] int32, padded with 0, shortest first.

    Rows after the last index are filler. `tokens` is the budget of a batch over all devices. B is
    a multiple of `devices`; if T exceeds the budget per device, each device gets one row.
    """

    def padded(index: int) -> int:
        return bucket(len(sequences[index]))

    for length, group in groupby(sorted(range(len(sequences)), key=padded), key=padded):
        indices, rows = list(group), devices * max(1, tokens // (length * devices))
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            batch = np.zeros((rows, length), np.int32)
            for row, index in zip(batch, chosen):
                row[: len(sequences[index])] = sequences[index]
            yield chosen, batch
