"""Packing follows the rule of best fit."""

import numpy as np
import pytest

from nanochat_jax.data.documents import Position
from nanochat_jax.data.packing import BestFitPacker, FitBuffer, StreamPacker
from nanochat_jax.errors import UsageError

BOS = 0
DOCS_PER_GROUP = 16


class Documents:
    """An endless source in memory: row groups of 16 documents, drawn in batches of 5; every token
    but BOS is unique.
    """

    def __init__(self, lengths):
        starts = np.cumsum([1, *(length - 1 for length in lengths)])
        self.documents = [
            np.concatenate([[BOS], np.arange(start, start + length - 1)]).astype(np.int32)
            for start, length in zip(starts[:-1], lengths, strict=True)
        ]
        self.position = Position()
        self.num_loaded = 0

    def at(self, place):
        return self.documents[place.row_group * DOCS_PER_GROUP + place.row]

    def next_batch(self):
        epoch, _, group, row = self.position
        stop = min(row + 5, DOCS_PER_GROUP, len(self.documents) - group * DOCS_PER_GROUP)
        places = [Position(epoch, 0, group, r) for r in range(row, stop)]
        if group * DOCS_PER_GROUP + stop == len(self.documents):
            self.position = Position(epoch + 1)
        else:
            self.position = (
                Position(epoch, 0, group + 1)
                if stop == DOCS_PER_GROUP
                else Position(epoch, 0, group, stop)
            )
        return [(place, self.at(place)) for place in places]

    def load(self, places):
        assert len({place[:3] for place in places}) == 1
        self.num_loaded += len(places)
        return [self.at(place) for place in places]

    def seek(self, position):
        self.position = position

    def file_name(self, file):
        return f"file{file}"

    def file_index(self, name):
        return int(name.removeprefix("file"))


def random_lengths(count, longest, seed=0):
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


def pack_by_hand(batches, buffer_docs, capacity, num_rows):
    """The rule of best fit, word by word, on lists."""
    buffer, rows = [], []
    for _ in range(num_rows):
        row = []
        while len(row) < capacity:
            while len(buffer) < buffer_docs:
                buffer += [tokens.tolist() for _, tokens in next(batches)]
            space = capacity - len(row)
            fitting = [document for document in buffer if len(document) <= space]
            # both give the first of equals
            chosen = max(fitting, key=len) if fitting else min(buffer, key=len)
            del buffer[next(i for i, document in enumerate(buffer) if document is chosen)]
            row += chosen[:space]
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("longest", "buffer_docs"), [(12, 20), (60, 20), (60, 1), (200, 50)])
def test_best_fit_equals_the_rule_spelled_out(longest, buffer_docs):
    lengths = random_lengths(3000, longest)
    source = Documents(lengths)
    expected = pack_by_hand(iter(source.next_batch, None), buffer_docs, 33, 300)
    assert source.position.epoch == 0  # the rule spelled out knows no passes
    inputs, targets = BestFitPacker(Documents(lengths), 32, buffer_docs=buffer_docs).next_rows(300)
    np.testing.assert_array_equal(inputs, expected[:, :-1])
    np.testing.assert_array_equal(targets, expected[:, 1:])
    assert (inputs[:, 0] == BOS).all()


def test_every_document_of_a_small_corpus_is_used_in_each_pass():
    lengths = random_lengths(100, 64)
    packer, passes = BestFitPacker(Documents(lengths), 32, buffer_docs=500), 12
    rows = []
    while packer.snapshot()()["position"]["epoch"] < passes:
        rows.append(packer.next_rows(1)[0])
    tokens, uses = np.unique(np.concatenate(rows), return_counts=True)
    second_tokens = [document[1] for document in packer._documents.documents if len(document) > 1]
    missing = set(second_tokens) - set(tokens.tolist())
    assert (
        len(missing) <= len(second_tokens) * 0.1
    )  # one that only ever fills the last place of a row shows its BOS alone
    uses = dict(zip(tokens.tolist(), uses.tolist(), strict=True))
    assert max(uses[token] for token in second_tokens if token in uses) <= passes
    assert np.median([uses.get(token, 0) for token in second_tokens]) >= passes - 2


def test_restore_reads_no_document_before_a_row_takes_it():
    lengths = random_lengths(400, 100)
    packer = BestFitPacker(Documents(lengths), 32, buffer_docs=100)
    packer.next_rows(50)
    source = Documents(lengths)
    restored = BestFitPacker(source, 32, buffer_docs=100)
    restored.set_state(packer.snapshot()())
    assert source.num_loaded == 0
    restored.next_rows(1)
    assert 0 < source.num_loaded < 100


def test_restore_with_other_documents_is_refused():
    for make in (
        lambda source: BestFitPacker(source, 32, buffer_docs=30),
        lambda source: StreamPacker(source, 32),
    ):
        packer = make(Documents([50] * 100))
        packer.next_rows(2)
        other = make(Documents([5] * 100))
        with pytest.raises(UsageError, match="tokenizer or the texts have changed"):
            other.set_state(packer.snapshot()())
            other.next_rows(30)


def test_stream_is_the_concatenation_of_all_documents():
    lengths = random_lengths(200, 40)
    source, packer = Documents(lengths), StreamPacker(Documents(lengths), 16)
    whole = np.concatenate(source.documents * 2)
    taken = 0
    for count in (1, 3, 2, 5, 40, 1):
        inputs, targets = packer.next_rows(count)
        expected = whole[taken : taken + count * 16 + 1]
        np.testing.assert_array_equal(inputs.ravel(), expected[:-1])
        np.testing.assert_array_equal(targets.ravel(), expected[1:])
        taken += count * 16 + 1


def test_fit_buffer_prefers_the_first_of_equal_length():
    buffer = FitBuffer()
    for length, item in ((3, "a"), (5, "b"), (3, "c"), (5, "d"), (8, "e")):
        buffer.add(length, item)
    assert buffer.pop_longest(2) is None
    assert [buffer.pop_longest(7), buffer.pop_shortest(), buffer.pop_longest(7)] == [
        (5, "b"),
        (3, "a"),
        (5, "d"),
    ]
    assert buffer.snapshot()() == [(3, "c"), (8, "e")]
