"""Training batches, prefetched in a background thread and resumable after every batch.

The rows of a global batch are divided among *virtual shards*, whose number is constant for a run.
Each virtual shard has its own position in the corpus and its own packer. A process yields the rows
of a contiguous range of virtual shards, so the global batches do not depend on the number of
processes. The merged states of all processes restore on any number of processes.
"""

import logging
import math
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_jax.data.documents import DocumentStream, ShardReader
from nanochat_jax.data.packing import BestFitPacker, Packer, Snapshot, State, StreamPacker
from nanochat_jax.data.shards import require_text, split_shards
from nanochat_jax.errors import UsageError

logger = logging.getLogger(__name__)

HostBatch = dict[str, np.ndarray]  # inputs, targets: int32 [rows, T]; target -1 is not trained
PACKERS: dict[str, type[Packer]] = {"bestfit": BestFitPacker, "stream": StreamPacker}
PREFETCHED_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """Rows of a global batch [batch_size, sequence_len], of which this process makes its
    contiguous part.
    """

    batch_size: int
    sequence_len: int
    process_index: int = 0
    process_count: int = 1

    @property
    def local(self) -> slice:
        count = self.batch_size // self.process_count
        return slice(self.process_index * count, (self.process_index + 1) * count)


class BatchSource:
    """What a `Loader` prefetches: an iterator over (batch, position, snapshot)."""

    def next_batch(self) -> HostBatch:
        """Raises StopIteration at the end, if there is one."""
        raise NotImplementedError

    @property
    def position(self) -> dict[str, Any]:
        """Position for logs, as a small dict."""
        raise NotImplementedError

    def snapshot(self) -> Snapshot:
        raise NotImplementedError

    def set_state(self, state: State) -> None:
        raise NotImplementedError

    def __iter__(self) -> "BatchSource":
        return self

    def __next__(self) -> tuple[HostBatch, dict[str, Any], Snapshot]:
        return self.next_batch(), self.position, self.snapshot()

    def get_state(self) -> State:
        """Empty: Grain copies it for every batch, so the snapshot travels with the batch."""
        return {}


class Loader:
    """Iterator over the batches of a source, with the state after the last batch returned."""

    def __init__(self, source: BatchSource):
        self._snapshot = source.snapshot()
        self._first_state = self._snapshot()
        # Here, because evaluations and the planner import this module without training.
        from grain.experimental import ThreadPrefetchDatasetIterator

        iterator = ThreadPrefetchDatasetIterator(source, PREFETCHED_BATCHES)
        self._open = [iterator]  # emptied by `close`, so nothing is left to shut down at exit
        # Also called when this object is garbage-collected, and at exit.
        self.close = weakref.finalize(self, _close, self._open)
        self.reset()

    @property
    def _iterator(self) -> Any:
        if not self._open:
            raise ValueError("the loader is closed")
        return self._open[0]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> HostBatch:
        batch, self.position, self._snapshot = next(self._iterator)
        return batch

    def get_state(self) -> State:
        """The state after the last batch returned, without the prefetched ones."""
        return self._snapshot()

    def set_state(self, state: State) -> None:
        """Continue after the batch at which `state` was taken. Starts prefetching immediately."""
        self._iterator.set_state(state)
        self._snapshot = lambda: state
        self._iterator.start_prefetch()

    def reset(self) -> None:
        """Return to the first batch and prefetch. Call this at the end of an evaluation."""
        self.set_state(self._first_state)


def _close(open_iterators: list[Any]) -> None:
    while open_iterators:
        open_iterators.pop().close()


class PretrainingSource(BatchSource):
    """This process's rows of each global batch, from the packers of its virtual shards."""

    def __init__(
        self,
        packers: dict[int, Packer],
        *,
        rows_per_shard: int,
        settings: dict[str, Any],
        corpus: dict[str, int],
    ):
        """settings: values that a saved state must share; corpus: bytes of each shard file."""
        self._packers, self._rows_per_shard = packers, rows_per_shard
        self._settings, self._corpus = settings, corpus

    def next_batch(self) -> HostBatch:
        rows = [packer.next_rows(self._rows_per_shard) for packer in self._packers.values()]
        inputs, targets = map(np.concatenate, zip(*rows, strict=True))
        return {"inputs": inputs, "targets": targets}

    @property
    def position(self) -> dict[str, Any]:
        return next(iter(self._packers.values())).position

    def snapshot(self) -> Snapshot:
        shards = {str(shard): packer.snapshot() for shard, packer in self._packers.items()}
        return lambda: {
            **self._settings,
            "corpus": self._corpus,
            "shards": {shard: state() for shard, state in shards.items()},
        }

    def set_state(self, state: State) -> None:
        for name, value in self._settings.items():
            if state[name] != value:
                raise UsageError(
                    f"the saved data position has {name} {state[name]}, this run {value}: they "
                    "must agree"
                )
        self._check_corpus(state["corpus"])
        for shard, packer in self._packers.items():
            if str(shard) not in state["shards"]:
                raise UsageError(
                    f"the saved data position lacks virtual shard {shard} of "
                    f"{self._settings['num_shards']}: merge the states of all processes first"
                )
            packer.set_state(state["shards"][str(shard)])

    def _check_corpus(self, saved: dict[str, int]) -> None:
        """Saved files must exist with the same size; additional files are allowed."""
        for name, size in saved.items():
            if name not in self._corpus:
                raise UsageError(f"the saved data position needs {name}, which no longer exists")
            if size != self._corpus[name]:
                raise UsageError(
                    f"{name} had {size:,} bytes when the data position was saved, now it has "
                    f"{self._corpus[name]:,}: the text is not the same"
                )
        if more := len(self._corpus) - len(saved):
            logger.warning(
                "%d shards are new since the data position was saved: they are read in order", more
            )


def pretraining_loader(
    directory: Path | str,
    tokenizer: Any,
    *,
    split: str,
    packing: str = "bestfit",
    num_shards: int | None = None,
    buffer_docs: int = 1000,
    **rows: int,
) -> Loader:
    """Endless batches of `split` ("train" or "val"), from its beginning.

    Args:
      tokenizer: a `Tokenizer`, or another object with `bos_id` and `encode_batch`.
      packing: "bestfit" (`BestFitPacker`) or "stream" (`StreamPacker`).
      num_shards: virtual shards; default gcd(batch_size, 8). One shard in one process gives
        upstream's batches for one rank.
      buffer_docs: total documents in the best-fit buffers of all virtual shards. Shared, because
        documents longer than a row stay buffered for long: with this many per shard, the buffers
        could hold all of a small corpus.
      rows: the fields of `BatchRows`.

    Yields dicts of inputs and targets, int32 [batch_size / process_count, sequence_len].
    """
    shape = BatchRows(**rows)
    if packing not in PACKERS:
        raise UsageError(f"unknown packing {packing!r}: expected one of {', '.join(PACKERS)}")
    num_shards = math.gcd(shape.batch_size, 8) if num_shards is None else num_shards
    if shape.batch_size % num_shards or num_shards % shape.process_count:
        raise UsageError(
            f"{num_shards} virtual shards must divide the batch of {shape.batch_size} rows and be "
            f"a multiple of the {shape.process_count} processes: set `data_shards` to a multiple "
            f"of {shape.process_count} that divides the rows"
        )
    per_process = num_shards // shape.process_count
    paths = split_shards(directory, split)
    require_text(paths, {"train": "training", "val": "validation"}[split])
    reader = ShardReader(paths, cached_row_groups=2 * per_process)
    threads = min(8, os.cpu_count() or 1)
    options = {"buffer_docs": -(-buffer_docs // num_shards)} if packing == "bestfit" else {}
    packers = {}
    for shard in range(per_process * shape.process_index, per_process * (shape.process_index + 1)):
        documents = DocumentStream(
            reader,
            lambda texts: tokenizer.encode_batch(texts, tokenizer.bos_id, threads),
            shard,
            num_shards,
        )
        packers[shard] = PACKERS[packing](documents, shape.sequence_len, **options)
    return Loader(
        PretrainingSource(
            packers,
            rows_per_shard=shape.batch_size // num_shards,
            settings={"packing": packing, "num_shards": num_shards},
            corpus=reader.sizes,
        )
    )


def merge_states(states: Sequence[State]) -> State:
    """Merge the states that all processes took after the same batch, for any number of processes.

    Raises ValueError if they are of different runs or steps, or do not cover every virtual shard
    exactly once.
    """
    merged = states[0].copy()
    for state in states:
        if unlike := [
            name for name in merged if name != "shards" and state.get(name) != merged[name]
        ]:
            raise ValueError(
                f"states of different runs or steps: they differ in {', '.join(unlike)}"
            )
    if "shards" in merged:
        shards = [shard for state in states for shard in state["shards"]]
        if repeated := {shard for shard in shards if shards.count(shard) > 1}:
            raise ValueError(f"virtual shards {sorted(repeated)} occur in two states")
        if len(shards) != merged["num_shards"]:
            raise ValueError(f"states of {len(shards)} of {merged['num_shards']} virtual shards")
        merged["shards"] = {shard: at for state in states for shard, at in state["shards"].items()}
    return merged
