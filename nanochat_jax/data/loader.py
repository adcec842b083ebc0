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
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
import pyarrow as pa
from grain.experimental import ThreadPrefetchIterDataset

from nanochat_jax.data.packing import BestFitPacker, Packer, Snapshot, StreamPacker, TokenizedStream
from nanochat_jax.data.shards import DocumentStream, ShardReader, require_text, split_shards
from nanochat_jax.errors import UsageError

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]  # inputs, targets: int32 [rows, T]; target -1 is not trained
PACKERS: dict[str, type[Packer]] = {"bestfit": BestFitPacker, "stream": StreamPacker}
PREFETCHED_BATCHES = 4


class Encoder(Protocol):
    """The part of `Tokenizer` that data loading needs."""

    @property
    def bos_id(self) -> int: ...

    def encode_batch(
        self, texts: Any, prepend: int, num_threads: int
    ) -> tuple[np.ndarray, np.ndarray]: ...


class BatchSource(Protocol):
    """Source of a `Loader`. `next_batch` raises StopIteration at the end, if there is one."""

    def next_batch(self) -> Batch: ...

    def snapshot(self) -> Snapshot: ...

    def place(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class _SourceIterator(grain.DatasetIterator):
    def __init__(self, source: BatchSource):
        super().__init__()
        self._source = source

    def __next__(self) -> Batch:
        return self._source.next_batch()

    def get_state(self) -> dict[str, Any]:
        return {"snapshot": self._source.snapshot(), "place": self._source.place()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._source.set_state(state["snapshot"]())


class _SourceDataset(grain.IterDataset):
    def __init__(self, source: BatchSource):
        super().__init__()
        self._source = source

    def __iter__(self) -> grain.DatasetIterator:
        return _SourceIterator(self._source)


class Loader:
    """Iterator over the batches of a source. `get_state` does not include prefetched batches."""

    def __init__(self, source: BatchSource):
        self._first_state = source.snapshot()()
        dataset = ThreadPrefetchIterDataset(
            _SourceDataset(source), prefetch_buffer_size=PREFETCHED_BATCHES
        )
        # `close` empties this list, so that nothing is left to shut down at exit.
        self._open = [iter(dataset)]
        # Also called when this object is garbage-collected, and at exit.
        self.close = weakref.finalize(self, _close, self._open)
        self.reset()

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("the loader is closed")
        return self._open[0]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """JSON-serializable position after the last batch returned."""
        return self._iterator.get_state()["snapshot"]()

    @property
    def place(self) -> dict[str, Any]:
        """Position of the last batch returned, as a small dict for logs. Requires a returned batch.

        Cheaper than `get_state`, which serializes about a thousand buffered documents.
        """
        return self._iterator.get_state()["place"]

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which `state` was taken. Starts prefetching immediately."""
        self._iterator.set_state({"snapshot": lambda: state, "place": {}})
        self._iterator.start_prefetch()

    def reset(self) -> None:
        """Return to the first batch and prefetch. Call this at the end of an evaluation."""
        self.set_state(self._first_state)


def _close(open_iterators: list[grain.DatasetIterator]) -> None:
    while open_iterators:
        open_iterators.pop().close()


class PretrainingSource:
    """This process's rows of each global batch, from the packers of its virtual shards."""

    def __init__(
        self,
        packers: dict[int, Packer],
        *,
        rows_per_shard: int,
        packing: str,
        num_shards: int,
        corpus: dict[str, int],
    ):
        """corpus: size in bytes of each shard file, by name."""
        self._packers, self._rows_per_shard = packers, rows_per_shard
        self._settings, self._corpus = {"packing": packing, "num_shards": num_shards}, corpus

    def next_batch(self) -> Batch:
        rows = [packer.next_rows(self._rows_per_shard) for packer in self._packers.values()]
        return {
            name: np.concatenate(parts) for name, parts in zip(("inputs", "targets"), zip(*rows))
        }

    def place(self) -> dict[str, Any]:
        return next(iter(self._packers.values())).place()

    def snapshot(self) -> Snapshot:
        shards = {str(shard): packer.snapshot() for shard, packer in self._packers.items()}
        return lambda: (
            self._settings
            | {
                "corpus": self._corpus,
                "shards": {shard: snapshot() for shard, snapshot in shards.items()},
            }
        )

    def set_state(self, state: dict[str, Any]) -> None:
        for name, mine in self._settings.items():
            if state[name] != mine:
                raise UsageError(
                    f"the saved data position has {name} {state[name]}, this run {mine}: they "
                    "must agree"
                )
        # Saved files must exist with the same size; additional files are allowed.
        for name, size in state["corpus"].items():
            if name not in self._corpus:
                raise UsageError(
                    f"the saved data position is of a corpus with {name}, which is not there any "
                    "more"
                )
            if size != self._corpus[name]:
                raise UsageError(
                    f"the saved data position is of a corpus in which {name} had {size:,} bytes, "
                    f"now it has {self._corpus[name]:,}: the text is not the same"
                )
        if more := len(self._corpus) - len(state["corpus"]):
            logger.warning(
                "%d shards have come since the data position was saved: they are read in their "
                "turn",
                more,
            )
        for shard, packer in self._packers.items():
            if str(shard) not in state["shards"]:
                raise UsageError(
                    f"the saved data position lacks virtual shard {shard} of "
                    f"{self._settings['num_shards']}: "
                    "merge the states of all processes first"
                )
            packer.set_state(state["shards"][str(shard)])


def pretraining_loader(
    directory: Path | str,
    tokenizer: Encoder,
    *,
    split: str,
    batch_size: int,
    sequence_len: int,
    packing: str = "bestfit",
    process_index: int = 0,
    process_count: int = 1,
    num_shards: int | None = None,
    buffer_docs: int = 1000,
) -> Loader:
    """Endless batches of `split` ("train" or "val"), from its beginning.

    Args:
      batch_size: rows of the global batch of one micro-step. This process yields batch_size /
        process_count of them, the process_index-th contiguous part.
      packing: "bestfit" (`BestFitPacker`) or "stream" (`StreamPacker`).
      num_shards: virtual shards; default gcd(batch_size, 8). One shard in one process gives
        upstream's batches for one rank.
      buffer_docs: total documents in the best-fit buffers of all virtual shards. Shared, because
        documents longer than a row stay buffered for long: with this many per shard, the buffers
        could hold all of a small corpus.

    Yields dicts of inputs and targets, int32 [batch_size / process_count, sequence_len].
    """
    if packing not in PACKERS:
        raise UsageError(f"unknown packing {packing!r}: expected one of {', '.join(PACKERS)}")
    if num_shards is None:
        num_shards = math.gcd(batch_size, 8)
    if batch_size % num_shards or num_shards % process_count:
        raise UsageError(
            f"{num_shards} virtual shards must divide the batch of {batch_size} rows and be a "
            "multiple of the "
            f"{process_count} processes: give --data-shards, a multiple of {process_count} that "
            "divides the rows"
        )
    per_process = num_shards // process_count
    shards = split_shards(directory, split)
    require_text(shards, {"train": "training", "val": "validation"}[split])
    reader = ShardReader(shards, cached_row_groups=2 * per_process)
    threads = min(8, os.cpu_count() or 1)

    def encode(texts: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        return tokenizer.encode_batch(texts, prepend=tokenizer.bos_id, num_threads=threads)

    options = {"buffer_docs": -(-buffer_docs // num_shards)} if packing == "bestfit" else {}
    packers = {}
    for shard in range(process_index * per_process, (process_index + 1) * per_process):
        stream = TokenizedStream(DocumentStream(reader, shard, num_shards), encode)
        packers[shard] = PACKERS[packing](stream, sequence_len, **options)
    return Loader(
        PretrainingSource(
            packers,
            rows_per_shard=batch_size // num_shards,
            packing=packing,
            num_shards=num_shards,
            corpus=reader.sizes,
        )
    )


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states that all processes took after the same batch, in any order.

    A conversation loader has the same state on every process; a pretraining loader has the state of
    its virtual shards. The result restores on any number of processes. Raises ValueError if the
    states are of different runs or steps, or do not cover every virtual shard exactly once.
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
