"""Batches of conversations: a token stream for midtraining, rows of complete conversations for SFT.

Every process runs the same packer over the whole mixture and keeps its part of the rows. So the
global batches and the state do not depend on the number of processes.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from nanochat_jax.conversation import render_conversation
from nanochat_jax.data.loader import BatchRows, BatchSource, HostBatch, Loader
from nanochat_jax.data.packing import STATE_CHANGED, FitBuffer, Snapshot, State, TokenRun
from nanochat_jax.errors import UsageError, one_line
from nanochat_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STREAM_MAX_TOKENS = 2048
SAMPLED_CONVERSATIONS = 16
IGNORE = -1


class ConversationTask(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ConversationSource(BatchSource):
    """Base of all modes: renders conversations and makes `num_epochs` passes (None: endless)."""

    mode: str

    def __init__(
        self,
        task: ConversationTask,
        tokenizer: Tokenizer,
        rows: BatchRows,
        *,
        num_epochs: int | None,
    ):
        self.size = len(task)
        if not self.size:
            raise UsageError("the mixture holds no conversation")
        self._task, self._tokenizer, self._rows = task, tokenizer, rows
        self._num_epochs = num_epochs
        self._epoch = self._cursor = 0  # completed passes; next conversation to render
        self.num_cut = 0  # conversations truncated to max_tokens
        self.num_skipped = 0  # conversations without a token to train on, also by truncation
        self._clear()
        self._fingerprint = self._sample()

    @property
    def position(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "cursor": self._cursor}

    def _render(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [n] and mask bool [n], n <= max_tokens."""
        try:
            ids, mask = render_conversation(
                self._tokenizer, self._task[index], max_tokens=self._max_tokens + 1
            )
        # also raised for a damaged data set
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"conversation {index} of the mixture: {one_line(error)}") from error
        self.num_cut += len(ids) > self._max_tokens
        return np.array(ids[: self._max_tokens], np.int32), np.array(mask[: self._max_tokens], bool)

    def _sample(self) -> str:
        """Checksum of some rendered conversations: detects another tokenizer, text or template."""
        digest = hashlib.sha256()
        for index in range(0, self.size, -(-self.size // SAMPLED_CONVERSATIONS)):
            digest.update(self._render(index)[0].tobytes())
        self.num_cut = 0
        return digest.hexdigest()[:16]

    def _start_epoch(self) -> None:
        """Start the next pass. Raises StopIteration after the last one."""
        if self._epoch + 1 == self._num_epochs:
            raise StopIteration
        self._epoch, self._cursor = self._epoch + 1, 0

    def _state(self, **more: Any) -> State:
        return {
            "mode": self.mode,
            "size": self.size,
            "fingerprint": self._fingerprint,
            **self.position,
            "num_cut": self.num_cut,
            "num_skipped": self.num_skipped,
            **more,
        }

    def set_state(self, state: State) -> None:
        for name, value in (("mode", self.mode), ("size", self.size)):
            if state[name] != value:
                raise UsageError(
                    f"the saved data position is of a mixture with {name} {state[name]}, this one "
                    f"has {value}: they must agree"
                )
        if state["fingerprint"] != self._fingerprint:
            raise UsageError(STATE_CHANGED)
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._clear()
        self._restore(state)
        self.num_cut, self.num_skipped = state["num_cut"], state["num_skipped"]

    @property
    def _max_tokens(self) -> int:
        """Tokens of a conversation; longer ones are truncated."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Start without conversations that are rendered but not returned."""
        raise NotImplementedError

    def _restore(self, state: State) -> None:
        """Render the conversations that the state names."""
        raise NotImplementedError


class StreamSource(ConversationSource):
    """Concatenated conversations, every token trained (upstream's midtraining), as a `TokenRun`."""

    mode = "stream"

    @property
    def _max_tokens(self) -> int:
        return STREAM_MAX_TOKENS

    def _clear(self) -> None:
        self._run = TokenRun(self._next_conversation)

    def next_batch(self) -> HostBatch:
        inputs, targets = self._run.next_rows(self._rows.batch_size, self._rows.sequence_len)
        return {"inputs": inputs[self._rows.local], "targets": targets[self._rows.local]}

    def snapshot(self) -> Snapshot:
        state = self._state(offset=self._run.offset, piece_len=len(self._run.piece))
        return lambda: state

    def _restore(self, state: State) -> None:
        if state["cursor"]:
            self._run.piece, _ = self._render(self._cursor - 1)
            self._run.offset = state["offset"]
            if len(self._run.piece) != state["piece_len"]:
                raise UsageError(STATE_CHANGED)

    def _next_conversation(self) -> np.ndarray:
        if self._cursor == self.size:
            self._start_epoch()
        ids, _ = self._render(self._cursor)
        self._cursor += 1
        return ids


class RowsSource(ConversationSource):
    """Rows of complete conversations (upstream's SFT since January 2026).

    A row of T+1 tokens takes the longest buffered conversation that fits until none fits, then
    padding with BOS. Targets are trained only where the assistant wrote the token. A conversation
    longer than a row is truncated. A conversation without a token to train on is skipped. An epoch
    has each conversation once: its last rows are packed from a buffer that is no longer refilled.
    """

    mode = "rows"
    buffered = 100  # maximum conversations in the buffer
    fills = True

    @property
    def _max_tokens(self) -> int:
        return self._rows.sequence_len + 1

    def _clear(self) -> None:
        self._buffer = FitBuffer()  # items: (index, ids, mask)

    def next_batch(self) -> HostBatch:
        shape = (self._rows.batch_size, self._max_tokens)
        tokens, learned = np.full(shape, self._tokenizer.bos_id, np.int32), np.zeros(shape, bool)
        for row, row_learned in zip(tokens, learned, strict=True):
            filled = 0
            for _, ids, mask in self._plan_row():
                row[filled : filled + len(ids)], row_learned[filled : filled + len(ids)] = ids, mask
                filled += len(ids)
        targets = np.where(learned[:, 1:], tokens[:, 1:], IGNORE).astype(np.int32)
        return {"inputs": tokens[self._rows.local, :-1], "targets": targets[self._rows.local]}

    def snapshot(self) -> Snapshot:
        state, buffered = self._state(), self._buffer.snapshot()
        return lambda: state | {"buffer": [index for _, (index, *_) in buffered()]}

    def _restore(self, state: State) -> None:
        for index in state["buffer"]:
            ids, mask = self._render(index)
            self._buffer.add(len(ids), (index, ids, mask))

    def _plan_row(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(index, ids, mask) of each conversation in the next row; at least one."""
        row = []
        space = self._max_tokens
        self._refill()
        while not len(self._buffer):
            if self.num_skipped and self.num_skipped == self.size * (self._epoch + 1):
                raise UsageError(
                    f"none of the {self.size} conversations has a token to train on within a row "
                    f"of {self._rows.sequence_len} tokens: use longer rows"
                )
            self._start_epoch()
            self._refill()
        while (entry := self._buffer.pop_longest(space)) is not None:
            length, conversation = entry
            row.append(conversation)
            if not self.fills:
                break
            space -= length
            self._refill()
        return row

    def _refill(self) -> None:
        while len(self._buffer) < self.buffered and self._cursor < self.size:
            ids, mask = self._render(self._cursor)
            if mask.any():
                self._buffer.add(len(ids), (self._cursor, ids, mask))
            else:
                self.num_skipped += 1
            self._cursor += 1


class SingleSource(RowsSource):
    """One conversation per row, in the mixture's order (upstream's SFT until January 2026)."""

    mode = "single"
    buffered = 1
    fills = False


SOURCES = {source.mode: source for source in (StreamSource, RowsSource, SingleSource)}


class ConversationLoader(Loader):
    """Batches of the conversations of `task`, in its order, from the first.

    Args:
      mode: "stream" (`StreamSource`), "rows" (`RowsSource`) or "single" (`SingleSource`).
      num_epochs: the loader ends with the last full batch of this many epochs (None: endless).
      name: purpose of the mixture, for logs.
      rows: the fields of `BatchRows`.

    Yields dicts of inputs and targets, int32 [batch_size / process_count, sequence_len]; target -1
    is not trained.
    """

    def __init__(
        self,
        task: ConversationTask,
        tokenizer: Tokenizer,
        *,
        mode: str,
        num_epochs: int | None = None,
        name: str = "training",
        **rows: int,
    ):
        self._name, shape = name, BatchRows(**rows)
        if mode not in SOURCES:
            raise UsageError(f"unknown mode {mode!r}: expected one of {', '.join(SOURCES)}")
        if shape.batch_size % shape.process_count:
            raise UsageError(
                f"{shape.process_count} processes do not divide the batch of {shape.batch_size} "
                "rows: choose another size"
            )
        self._make_source = functools.partial(SOURCES[mode], task, tokenizer, shape)
        super().__init__(self._make_source(num_epochs=num_epochs))

    def count_batches(self, num_epochs: int = 1, *, at_most: int | None = None) -> int:
        """Number of full batches in `num_epochs` epochs, counted by making them.

        Stops at `at_most`, which is meant for one epoch. Logs how many conversations are truncated
        or skipped.
        """
        source, count = self._make_source(num_epochs=num_epochs), 0
        with contextlib.suppress(StopIteration):
            while count != at_most:
                source.next_batch()
                count += 1
        if source.num_cut or source.num_skipped:
            read = source.position["cursor"]
            logger.warning(
                "%s mixture: of %s%d conversations, %d were truncated and %d skipped, because "
                "nothing was left to train on",
                self._name,
                "the first " * (read < source.size),
                read,
                source.num_cut // num_epochs,
                source.num_skipped // num_epochs,
            )
        return count
