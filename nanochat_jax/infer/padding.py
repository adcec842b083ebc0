"""Sequences of any length in batches of few shapes: a few padded lengths, and the rows that a
budget of tokens allows.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np


def bucket(length: int, unit: int = 32, *, steps: int = 2) -> int:
    """The padded length of a sequence: `unit` times 1, 2, 3, 4, 6, 8, 12, 16, ..., `steps` of them
    to a doubling.
    """
    units = max(1, -(-length // unit))
    step = max(1, (1 << (units - 1).bit_length()) // (2 * steps))
    return unit * step * -(-units // step)


def padded_batches(
    sequences: Sequence[Sequence[int]], *, tokens: int, devices: int = 1
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Indices, and their sequences [B, T] int32 padded with 0; rows beyond the indices are filler.
    Short ones come first.

    `tokens` is the budget of one batch over all devices, of which B is a multiple; a sequence
    longer than it has a row of its own on each of them.
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
