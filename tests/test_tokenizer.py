"""The tokenizer: training against the definition and upstream's vocabulary, encoding, storage."""

import itertools
import pickle
import random
import re
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from golden_data import golden_tokenizer

import nanochat_jax
from nanochat_jax import rustbpe
from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.tokenizer import META_FILE, RANKS_FILE, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's 1234567 "
    "o'clock.\n",
    "naïve café — “quotes” … 日本語 한국어 русский العربية 👩‍👩‍👧‍👦 \t\r\n\n  x  ",
    "def f(x):\n    return x**2  # the square\n\n\nclass Thing:\n\tpass\n",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def golden():
    return golden_tokenizer()


def shard_texts(directory, names):
    for name in names:
        yield from pq.read_table(directory / name, columns=["text"])["text"].to_pylist()


# --------------------------------------------------------------------------------------------------


def learn_slowly(chunks, num_merges):
    """The definition of BPE training: recount every pair before every merge."""
    words = [[list(chunk.encode()), count] for chunk, count in Counter(chunks).items()]
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(num_merges):
        counts = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                counts[pair] += count
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        for word in words:
            ids, merged, index = word[0], [], 0
            while index < len(ids):
                if tuple(ids[index : index + 2]) == best:
                    merged.append(len(tokens))
                    index += 2
                else:
                    merged.append(ids[index])
                    index += 1
            word[0] = merged
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize("seed", range(8))
def test_training_equals_the_definition_ties_and_runs_included(seed):
    rng = random.Random(seed)
    alphabet = "abé 日"[: rng.randint(1, 5)]
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(30)]
    pattern = r"[^ ]+| +"
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        iter(texts), 256 + 60, buffer_size=rng.choice([1, 7, 8192]), pattern=pattern
    )
    chunks = [chunk for text in texts for chunk in re.findall(pattern, text)]
    expected = learn_slowly(chunks, 60)
    assert trainer.get_mergeable_ranks() == [(token, rank) for rank, token in enumerate(expected)]
    assert trainer.get_pattern() == pattern


def test_vocabulary_equals_upstreams(golden, test_data):
    upstream, expected = golden
    texts = shard_texts(test_data / "data/base_data", expected["trained_on"])
    trained = Tokenizer.train(
        (text[: expected["doc_cap"]] for text in texts), expected["vocab_size"]
    )
    assert trained.mergeable_ranks == upstream.mergeable_ranks
    assert trained.special_tokens == expected["special_tokens"]
    assert trained.pattern == expected["pattern"]


def test_training_stops_when_no_pair_is_left(caplog):
    tokenizer = Tokenizer.train(["ab ab", "x"], 1000)
    # " a" and "ab" share no chunk: "ab", then " ab"
    assert tokenizer.vocab_size == 256 + 2 + len(SPECIAL_TOKENS)
    assert "ran out of pairs" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], 255), ValueError, "at least 256, got 255"),
        ((["a"], -1), ValueError, "at least 256, got -1"),
        ((["a"], 2**40), ValueError, "at most 2097151, got 1099511627776"),
        ((["a"], 300, 0), ValueError, "buffer_size"),
        ((["a"], 300, 1, "("), ValueError, "bad split pattern"),
        ((["a", 3], 300), TypeError, "item 1 is int"),
        (([b"a"], 300), TypeError, "item 0 is bytes"),
        ((7, 300), TypeError, "not iterable"),
        ((["\ud800"], 300), ValueError, "surrogates"),
        # needs too much backtracking
        (([" " * 1_200_000], 300, 1, r"\s+(?!\S)"), ValueError, "split pattern"),
    ],
)
def test_bad_training_input_is_an_error_and_changes_nothing(arguments, error, message):
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(["hello hello"], 260)
    before = trainer.get_mergeable_ranks(), trainer.get_pattern()
    with pytest.raises(error, match=re.escape(message)):
        trainer.train_from_iterator(*arguments)
    assert (trainer.get_mergeable_ranks(), trainer.get_pattern()) == before


DOCUMENTS = [*TEXTS, "", "é" * 50, "x" * 3, "a\u0301b " * 9]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two Parquet files of `DOCUMENTS` with nulls between them, small row groups."""
    directory = tmp_path_factory.mktemp("shards")
    for index, (kind, texts) in enumerate(
        [(pa.string(), DOCUMENTS[:30]), (pa.large_string(), DOCUMENTS[30:])]
    ):
        table = pa.table({"n": range(len(texts) + 2), "text": pa.array([None, *texts, None], kind)})
        pq.write_table(table, directory / f"{index}.parquet", row_group_size=7)
    return sorted(directory.iterdir())


@pytest.mark.parametrize(
    ("max_chars", "doc_cap"), [(None, None), (None, 10), (300, 40), (399, 40), (400, 40), (1, 1)]
)
def test_parquet_gives_the_vocabulary_of_its_texts(shards, max_chars, doc_cap):
    texts, total = [], 0
    for text in DOCUMENTS:
        texts.append(text[:doc_cap])
        total += len(texts[-1])
        if max_chars is not None and total > max_chars:
            break
    expected = rustbpe.Tokenizer()
    expected.train_from_iterator(texts, 330)
    for threads in (1, 3):
        trained, calls = rustbpe.Tokenizer(), []
        trained.train_from_parquet(
            shards,
            330,
            max_chars=max_chars,
            doc_cap=doc_cap,
            num_threads=threads,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        assert trained.get_mergeable_ranks() == expected.get_mergeable_ranks()
        merges = len(trained.get_mergeable_ranks()) - 256
        assert ("count", total, total) in calls and calls[-1] == ("merge", merges, merges)


def test_trouble_with_a_parquet_file_names_it(shards, tmp_path):
    def note_of(caught):
        return "".join(caught.value.__notes__)

    train = rustbpe.Tokenizer().train_from_parquet
    with pytest.raises(FileNotFoundError) as caught:
        train([*shards, tmp_path / "none.parquet"], 300)
    assert "none.parquet" in note_of(caught)
    (tmp_path / "bad.parquet").write_bytes(shards[0].read_bytes()[:-9])
    with pytest.raises(pa.ArrowInvalid) as caught:
        train([tmp_path / "bad.parquet"], 300)
    assert "bad.parquet" in note_of(caught)
    with pytest.raises(ValueError, match='no column "words", only n, text') as caught:
        train(shards, 300, column="words")
    assert "0.parquet" in note_of(caught)
    with pytest.raises(TypeError, match="array of int64"):
        train(shards, 300, column="n")


@pytest.mark.parametrize("stage", ["count", "merge"])
def test_an_exception_of_the_callback_ends_training(shards, stage):
    def progress(current, done, total):
        if current == stage:
            raise RuntimeError("enough")

    trainer = rustbpe.Tokenizer()
    for train in (
        lambda: trainer.train_from_parquet(shards, 300, progress=progress),
        lambda: trainer.train_from_iterator(TEXTS, 300, progress=progress),
    ):
        with pytest.raises(RuntimeError, match="enough"):
            train()
    assert len(trainer.get_mergeable_ranks()) == 256


def test_a_signal_stops_training():
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    rng = random.Random(0)
    text = " ".join(["".join(rng.choices("abcdefghij", k=30)) for _ in range(20_000)])
    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        start = time.perf_counter()
        with pytest.raises(Interrupted):
            Tokenizer.train([text], 600_000)  # would take many times longer
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert time.perf_counter() - start < 10


# --------------------------------------------------------------------------------------------------


def random_text(rng, length):
    pools = (
        "abcdefgh ",
        " \n\t\r\u00a0\u3000",
        "0123456789½Ⅷ",
        "éßñſK한日م",
        "'\"!?.,;:-_()*#",
        "🙂👩‍👧🇫🇷\u0301\x00",
    )
    return "".join(rng.choice(rng.choice(pools)) for _ in range(length))


def reference(tokenizer):
    return tiktoken.Encoding(
        "x", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.mergeable_ranks, special_tokens={}
    )


# GPT-4's pattern with other numbers of digits, and some that the splitter leaves to the regular
# expression engine.
PATTERNS = [
    SPLIT_PATTERN,
    SPLIT_PATTERN.replace("{1,2}", "{1,3}"),
    r"\S+|\s+",
    r"(?s).{1,200}",
    r"[a-z]+(?!\d)| ?\w|\W+",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_unicode_gets_tiktokens_ids_and_comes_back(pattern):
    texts = [random_text(random.Random(seed), seed) for seed in range(300)] + TEXTS[:3]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, 500, pattern=pattern)
    tokenizer = Tokenizer(dict(trainer.get_mergeable_ranks()), pattern=pattern)
    expected = reference(tokenizer)
    unseen = [random_text(random.Random(seed), 400) for seed in range(300, 330)]
    for text in texts + unseen:
        ids = tokenizer.encode(text)
        assert ids == expected.encode_ordinary(text)
        assert ids == trainer.encode(text)
        if pattern.startswith("'"):  # the others may leave text between their matches
            assert tokenizer.decode(ids) == text
            assert trainer.decode(ids) == text.encode()


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_fuzzed_texts_get_tiktokens_ids(digits):
    """Runs of every class of characters cross the 64-byte blocks of the scanner."""
    rng, pattern = random.Random(digits), SPLIT_PATTERN.replace("{1,2}", f"{{1,{digits}}}")
    pools = ["abc ", " \n\t\r\u00a0\u3000\x85", "0123456789½Ⅷ٣", "éßſK한日م", "'\"!?.-#"]
    pools += ["🙂\u0301\x00\U0010ffff", "'sdmtlvreSDMTLVREſ ", " \n", "\r\n"]

    def fuzzed():
        pieces = []
        for _ in range(rng.randrange(40)):
            pool = rng.choice(pools)
            pieces.append("".join(rng.choices(pool, k=rng.choice([1, 1, 2, 3, 5, 60, 130]))))
        return "".join(pieces)[: rng.choice([20, 63, 64, 65, 200, 1000])]

    texts = [fuzzed() for _ in range(6000)]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts[:300], 600, pattern=pattern)
    tokenizer = Tokenizer(dict(trainer.get_mergeable_ranks()), pattern=pattern)
    rows = zip(
        texts,
        tokenizer.encode(texts, num_threads=2),
        reference(tokenizer).encode_ordinary_batch(texts),
        strict=True,
    )
    for text, ids, expected in rows:
        assert ids == expected, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("seed", range(20))
def test_a_vocabulary_that_nobody_trained_gets_tiktokens_ids(seed):
    rng = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += {"".join(rng.choices("aab ", k=rng.randint(2, 6))).encode() for _ in range(60)}
    rng.shuffle(tokens)
    tokenizer = Tokenizer(
        {token: rank for rank, token in enumerate(tokens)}, pattern=r"(?s).{1,300}"
    )
    expected = reference(tokenizer)
    for length in (1, 7, 50, 1000):
        text = "".join(rng.choices("aaabc ", k=length))
        assert tokenizer.encode(text) == expected.encode_ordinary(text)


@pytest.mark.parametrize("token", [-1, 256, 2**40])
def test_an_id_without_a_token_is_refused(token):
    with pytest.raises(ValueError, match=f"no token has id {token}"):
        rustbpe.Tokenizer().decode([97, token])


def test_text_without_a_place_to_cut_gets_tiktokens_ids(tokenizer):
    rng = random.Random(0)
    for text in (
        "".join(rng.choices("theqbrown", k=50_000)),
        "a" * 100_000,
        "'" * 30_000,
        " " * 30_000,
    ):
        ids = tokenizer.encode(text)
        assert ids == reference(tokenizer).encode_ordinary(text)
        assert tokenizer.decode(ids) == text


def test_a_batch_is_the_ids_of_all_texts_in_one_array(tokenizer):
    texts = [*TEXTS, "", "a\ud800b", "<|bos|>"]
    for threads in (1, 3):
        ids, offsets = tokenizer.encode_batch(texts, "<|bos|>", num_threads=threads)
        assert ids.dtype == np.int32 and offsets.dtype == np.int64
        rows = [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]
        assert rows == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    ids, offsets = tokenizer.encode_batch([])
    assert (ids.size, offsets.tolist()) == (0, [0])


def test_several_python_threads_share_a_tokenizer(tokenizer):
    batches = [TEXTS[start:] * 20 for start in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda texts: tokenizer.encode_batch(texts, num_threads=2), batches)
        )
    for texts, (ids, offsets) in zip(batches, results, strict=True):
        assert ids.tolist() == [token for text in texts for token in tokenizer.encode(text)]
        assert len(offsets) == len(texts) + 1


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_arrow_arrays_give_the_ids_of_their_strings(tokenizer, kind):
    array = pa.array([*TEXTS, ""], kind)
    for column in (
        array,
        array[7:19],
        array[:0],
        pa.chunked_array([array[3:], array[:2]]),
        pa.chunked_array([], kind),
    ):
        expected = tokenizer.encode_batch(column.to_pylist(), 5)
        for ours, theirs in zip(tokenizer.encode_batch(column, 5), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="1 of 2 texts are null"):
        tokenizer.encode_batch(pa.array(["a", None], kind))
    with pytest.raises(TypeError, match="Arrow array of int64"):
        tokenizer.encode_batch(pa.array([1]))


def test_an_arrow_array_that_is_no_utf8_is_refused(tokenizer):
    for data, offsets in [(b"a\xffb", [0, 1, 3]), ("é".encode(), [0, 1, 2])]:
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(data)]
        with pytest.raises(ValueError, match="UTF-?8"):
            tokenizer.encode_batch(pa.Array.from_buffers(pa.string(), 2, buffers))


def test_prepend_and_append_take_ids_and_names(tokenizer):
    ids = tokenizer.encode("hello")
    assert tokenizer.encode("hello", prepend="<|bos|>", append=7) == [tokenizer.bos_id, *ids, 7]
    assert tokenizer.encode(["hello", ""], prepend=0) == [[0, *ids], [0]]
    with pytest.raises(KeyError, match="<|eos|>"):
        tokenizer.encode("hello", append="<|eos|>")


def test_a_pickled_tokenizer_is_the_same(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert copy.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_special_tokens_in_text_are_text(tokenizer):
    first_special = tokenizer.special_tokens["<|bos|>"]
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < first_special
        assert tokenizer.decode(ids) == f"a{name}b"
        assert tokenizer.decode([tokenizer.encode_special(name)]) == name


def test_specials_come_last(tokenizer):
    assert list(tokenizer.special_tokens.values()) == list(
        range(tokenizer.vocab_size - 9, tokenizer.vocab_size)
    )
    assert tokenizer.bos_id == tokenizer.vocab_size - 9


def test_token_bytes_add_up_to_the_text(tokenizer):
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert not lengths[list(tokenizer.special_tokens.values())].any()
    for text in TEXTS[:3]:
        assert lengths[tokenizer.encode(text, prepend="<|bos|>")].sum() == len(text.encode())


def test_broken_utf8_decodes_to_replacement_characters(tokenizer):
    ids = list("é".encode())
    assert tokenizer.decode_bytes(ids) == "é".encode()
    assert tokenizer.decode(np.array(ids)) == "é"
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    with pytest.raises(KeyError):
        tokenizer.decode([tokenizer.vocab_size])


# --------------------------------------------------------------------------------------------------


def test_loading_gives_back_what_was_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == [
        RANKS_FILE,
        META_FILE,
    ]


def test_the_fingerprint_tells_tokenizers_apart(tokenizer):
    ranks = tokenizer.mergeable_ranks
    swapped = ranks | {b"a": ranks[b"b"], b"b": ranks[b"a"]}
    others = [
        Tokenizer(ranks, pattern=r"\S+|\s+"),
        Tokenizer(ranks, special_tokens=SPECIAL_TOKENS[:1]),
        Tokenizer(swapped),
    ]
    assert len({tokenizer.fingerprint(), *(other.fingerprint() for other in others)}) == 4


DAMAGE = {
    "bad base64": (RANKS_FILE, lambda text: text.replace("\nAQ==", "\nA*==", 1), "line 2"),
    "not a number": (RANKS_FILE, lambda text: text.replace("AQ== 1\n", "AQ== one\n"), "line 2"),
    "missing rank": (RANKS_FILE, lambda text: text.replace("AQ== 1\n", ""), RANKS_FILE),
    "token twice": (RANKS_FILE, lambda text: text.replace("AQ== 1\n", "AA== 1\n"), "line 2"),
    "cut short": (RANKS_FILE, lambda text: text[: text.rindex("\n", 0, -1) + 1], META_FILE),
    "another's": (
        RANKS_FILE,
        lambda text: re.sub(r"(\S+) 256\n(\S+) 257\n", r"\2 256\n\1 257\n", text),
        META_FILE,
    ),
    "no json": (META_FILE, lambda text: text[:-10], META_FILE),
    "no pattern": (META_FILE, lambda text: text.replace('"pattern"', '"patern"'), META_FILE),
    "wrong size": (
        META_FILE,
        lambda text: re.sub(r'"vocab_size": \d+', '"vocab_size": 9', text),
        META_FILE,
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_a_usage_error_that_names_the_file(tokenizer, tmp_path, name, damage, message):
    tokenizer.save(tmp_path)
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(damage(text))
    assert (tmp_path / name).read_text() != text
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        Tokenizer.load(tmp_path)
    assert not isinstance(caught.value, NotFound)


def test_ranks_must_be_a_vocabulary():
    ranks = {bytes([byte]): byte for byte in range(256)}
    with pytest.raises(ValueError, match="each once"):
        Tokenizer(ranks | {b"ab": 300})
    with pytest.raises(ValueError, match="byte 255"):
        Tokenizer({token: rank for token, rank in ranks.items() if rank < 255} | {b"ab": 255})


def test_a_pattern_that_can_match_nothing_is_refused():
    with pytest.raises(ValueError, match=r"matches the empty string"):
        Tokenizer({bytes([i]): i for i in range(256)}, pattern=r"\w*|\W")


def test_a_crate_that_is_not_built_is_said_with_the_command_that_builds_it(monkeypatch):
    monkeypatch.delattr(nanochat_jax, "rustbpe")
    monkeypatch.setitem(sys.modules, "nanochat_jax.rustbpe", None)
    with pytest.raises(UsageError, match=r"crate is not built \(.*rustbpe.*maturin develop"):
        Tokenizer.train(TEXTS, 300)


def test_an_exception_of_the_iterator_comes_through():
    def texts():
        yield "a"
        raise RuntimeError("no more disk")

    with pytest.raises(RuntimeError, match="no more disk"):
        Tokenizer.train(texts(), 300)


@pytest.mark.parametrize("seed", range(4))
def test_arbitrary_bytes_come_back(tokenizer, seed):
    noise = random.Random(seed).randbytes(5000)
    for text in (noise.decode("latin-1"), noise.decode("utf-8", "replace")):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == reference(tokenizer).encode_ordinary(text)
    assert tokenizer.decode_bytes(list(noise)) == noise


def test_a_list_gives_the_ids_of_each(tokenizer):
    assert tokenizer.encode(TEXTS, num_threads=3) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode([]) == []


def test_endless_white_space_is_encoded(tokenizer):
    text = "a\n" + " " * 1_200_000 + "b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(["", text]) == [[], ids]


def test_texts_may_come_from_an_iterator_whatever_is_in_them():
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    ids, offsets = tokenizer.encode_batch(text for text in ("a", "\ud800", "b"))
    assert tokenizer.decode(ids) == "a\ufffdb" and len(offsets) == 4
