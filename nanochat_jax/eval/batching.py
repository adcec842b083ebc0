"""Sequences of any length in batches of few shapes: a few padded lengths, and the rows that a budget of tokens allows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jax import Array
from jax.sharding import Mesh

from nanochat_jax.sharding import data_size, spread_rows

Key = TypeVar("Key")

SHORTEST = 32


def bucket(length: int, unit: int = SHORTEST) -> int:
    """The padded length of a sequence: `unit` times 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    units = max(1, -(-length // unit))
    power = 1 << (units - 1).bit_length()
    return unit * (power * 3 // 4 if power > 2 and units <= power * 3 // 4 else power)


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How evaluations fill their batches.

    Attributes:
        tokens: budget of one batch over all devices; a sequence longer than it has a row of its own on each of them.
        mesh: spreads the rows over its data axis; None: wherever the parameters are.
    """

    tokens: int
    mesh: Mesh | None = None

    def num_rows(self, length: int) -> int:
        """Rows B of every batch of padded length `length`; a multiple of the data axis."""
        devices = 1 if self.mesh is None else data_size(self.mesh)
        return devices * max(1, self.tokens // (length * devices))

    def batches(self, sequences: Iterable[tuple[Key, Sequence[int]]]) -> Iterator[tuple[list[Key], np.ndarray]]:
        """Keys, and tokens [B, T] int32 padded with 0; the first rows are those of the keys, any others are filler.

        In the order in which batches fill up; at most one open batch per length is held back.
        """
        waiting: dict[int, list[tuple[Key, Sequence[int]]]] = {}
        for key, tokens in sequences:
            length = bucket(len(tokens))
            rows = waiting.setdefault(length, [])
            rows.append((key, tokens))
            if len(rows) == self.num_rows(length):
                yield self._pad(waiting.pop(length), length)
        for length in sorted(waiting):
            yield self._pad(waiting[length], length)

    def _pad(self, rows: list[tuple[Key, Sequence[int]]], length: int) -> tuple[list[Key], np.ndarray]:
        batch = np.zeros((self.num_rows(length), length), np.int32)
        for i, (_, tokens) in enumerate(rows):
            batch[i, : len(tokens)] = tokens
        return [key for key, _ in rows], batch

    def place(self, *arrays: np.ndarray) -> tuple[Array | np.ndarray, ...]:
        """Arrays [B, ...], which every process holds whole, on the devices of the mesh."""
        if self.mesh is None:
            return arrays
        return tuple(spread_rows(self.mesh, array) for array in arrays)
