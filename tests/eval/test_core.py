"""CORE: prompts and spans against upstream's, scores against a plain computation, the bundle."""

import csv
import dataclasses
import functools
import io
import json
import random
import stat
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import load_trained
from random_model import random_params

from nanochat_jax.errors import UsageError
from nanochat_jax.eval import core, scoring
from nanochat_jax.eval.bundle import ensure_bundle
from nanochat_jax.eval.core import CoreTask
from nanochat_jax.eval.scoring import Row, RowScore, Scorer
from nanochat_jax.model import loss
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.gpt import forward, unembed
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.tokenizer import Tokenizer

CONFIG = GPTConfig.modern(
    2, aspect_ratio=32, head_dim=32, sequence_len=64, vocab_size=300, window_pattern="SL"
)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def random_rows(count: int, lengths: tuple[int, ...]) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        length = lengths[i % len(lengths)]
        start = int(rng.integers(1, length))
        rows.append(Row(rng.integers(0, 300, length).astype(np.int32), start, length))
    return rows


@pytest.mark.parametrize(
    "kind, line, message",
    [
        ("multiple_choice", "[" * 100_000, "nested too deeply"),
        ("multiple_choice", "3", "strings query"),
        (
            "multiple_choice",
            '{"query": "a", "choices": ["b"], "gold": 1}',
            "gold must be the index",
        ),
        ("multiple_choice", '{"query": "a", "choices": [3], "gold": 0}', "an array of strings"),
        ("schema", '{"context_options": ["b"], "gold": 0}', "strings continuation"),
        ("language_modeling", '{"context": "b", "continuation": null}', "strings context"),
    ],
)
def test_a_damaged_example_is_refused_with_file_and_line(tmp_path, kind, line, message):
    path = tmp_path / "task.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(UsageError, match=f"task.jsonl line 2 is damaged .*{message}"):
        core.read_items(dataclasses.replace(task(kind), path=path))


@pytest.mark.parametrize(
    "yaml", ["[" * 100_000, "icl_tasks: 3", "3", "icl_tasks:\n- {label: a", "icl_tasks: [3]"]
)
def test_a_damaged_bundle_is_refused(tmp_path, yaml):
    (tmp_path / "core.yaml").write_text(yaml)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\na,50\n")
    with pytest.raises(UsageError, match="core.yaml or eval_meta_data.csv in .* is damaged"):
        core.read_tasks(tmp_path)


@jax.jit
def all_logits(params, tokens):  # [T] -> [T, V]
    return unembed(params, forward(params, tokens[None], config=CONFIG)[0][0], config=CONFIG)


@pytest.mark.parametrize(("era", "max_per_task"), [("classic", 60), ("modern", 40)])
def test_prompts_and_spans_are_upstreams(test_data, era, max_per_task):
    _, _, tokenizer, golden = load_trained(test_data, era)
    reference = json.loads((golden / "core_examples.json").read_text())
    tasks = core.read_tasks(test_data / "data" / "eval_bundle")
    assert [task.label for task in tasks] == list(reference)
    for task in tasks:
        items = core.read_items(task, max_per_task)
        expected = reference[task.label]
        groups = core.tokenize_task(tokenizer, task, items, range(len(expected)))
        for index, (rows, example) in enumerate(zip(groups, expected, strict=True)):
            where = f"{task.label} {index}"
            assert core.render_prompts(task, items, index)[-1].endswith(
                example["last_prompt_tail"]
            ), where
            assert [len(row.tokens) for row in rows] == example["lengths"], where
            assert [row.start for row in rows] == example["start"], where
            assert [row.end for row in rows] == example["end"], where
            scores = [RowScore(loss, example["correct"]) for loss in example["mean_loss"]]
            assert core.is_correct(task, items[index], scores) == example["correct"], where


@pytest.mark.parametrize(
    ("era", "max_per_task", "tolerance"), [("classic", 60, 1e-3), ("modern", 40, 1e-4)]
)
def test_losses_and_verdicts_are_upstreams(test_data, era, max_per_task, tolerance):
    """Tolerance: classic rotary tables are rounded to bfloat16."""
    config, params, tokenizer, golden = load_trained(test_data, era)
    reference = json.loads((golden / "core_examples.json").read_text())
    scorer = Scorer(config=config, params=params)
    tasks = {task.label: task for task in core.read_tasks(test_data / "data" / "eval_bundle")}
    keyed = []
    for label in ("copa", "winograd", "lambada_openai", "openbook_qa"):
        items = core.read_items(tasks[label], max_per_task)
        groups = core.tokenize_task(tokenizer, tasks[label], items, range(len(reference[label])))
        keyed += [((label, i), group) for i, group in enumerate(groups)]
    scores = dict(scorer(keyed))
    for label in ("copa", "winograd", "lambada_openai", "openbook_qa"):
        items = core.read_items(tasks[label], max_per_task)
        for i, example in enumerate(reference[label]):
            found = scores[label, i]
            np.testing.assert_allclose(
                [score.mean_nll for score in found], example["mean_loss"], atol=tolerance
            )
            assert core.is_correct(tasks[label], items[i], found) == example["correct"], (
                f"{label} {i}"
            )


def test_centering_and_table_are_upstreams(test_data):
    text = (test_data / "golden" / "trained-classic" / "core_max_per_task_60.csv").read_text()
    table = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()[1:-1])]
    tasks = core.read_tasks(test_data / "data" / "eval_bundle")
    # The table is rounded: the accuracies are whole examples of 60 (32 for the one task that has
    # fewer).
    sizes = {task.label: len(core.read_items(task, 60)) for task in tasks}
    accuracy = {
        label: core.mean_of(round(float(value) * sizes[label]), sizes[label])
        for label, value, _ in table
    }
    centered = {task.label: core.center(accuracy[task.label], task.baseline) for task in tasks}
    result = core.CoreResult(accuracy, centered, sum(centered.values()) / len(centered))
    assert core.format_csv(result) == text


def task(kind: str, num_fewshot: int = 0, delimiter: str = " ") -> CoreTask:
    return CoreTask(
        label="t", type=kind, path=None, num_fewshot=num_fewshot, delimiter=delimiter, baseline=0.25
    )


def test_fewshot_examples_never_include_the_question_and_are_clamped():
    for index in range(5):
        assert index not in core.fewshot_indices(index, 20, 10)
        others = [*range(index), *range(index + 1, 20)]
        assert core.fewshot_indices(index, 20, 10) == random.Random(1234 + index).sample(others, 10)
        assert sorted(core.fewshot_indices(index, 5, 10)) == [i for i in range(5) if i != index]
    assert core.fewshot_indices(0, 1, 10) == []


def test_prompts_show_the_right_answers_of_other_examples():
    items = [{"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(3)]
    shown = core.fewshot_indices(0, 3, 2)
    shots = "".join(f"q{i}\nA: {'ab'[i % 2]}\n\n" for i in shown)
    prompts = core.render_prompts(task("multiple_choice", 2, "\nA: "), items, 0)
    assert prompts == [shots + "q0\nA: a", shots + "q0\nA: b"]
    items = [{"context": f" c{i} ", "continuation": f"k{i}"} for i in range(2)]
    assert core.render_prompts(task("language_modeling", 1), items, 0) == [
        "c1 k1\n\nc0",
        "c1 k1\n\nc0 k0",
    ]
    items = [{"context_options": ["x", "y"], "continuation": "z", "gold": 1} for _ in range(2)]
    assert core.render_prompts(task("schema", 1), items, 0) == ["y z\n\nx z", "y z\n\ny z"]


def test_spans_of_each_task_type():
    spans = lambda kind, prompts: [
        (row.start, row.end) for row in core.make_rows(task(kind), prompts)
    ]  # noqa: E731
    assert spans("multiple_choice", [[9, 1, 2, 3], [9, 1, 5]]) == [(2, 4), (2, 3)]
    assert spans("multiple_choice", [[9, 1], [9, 1, 5]]) == [(2, 2), (2, 3)]
    assert spans("schema", [[9, 4, 4, 7, 8], [9, 5, 7, 8]]) == [(3, 5), (2, 4)]
    assert spans("language_modeling", [[9, 1], [9, 1, 2, 3]]) == [(2, 4)]
    with pytest.raises(ValueError, match="do not begin"):
        core.make_rows(task("language_modeling"), [[9, 1, 4], [9, 1, 2, 3]])


def test_the_lowest_mean_loss_wins_and_the_first_of_equals():
    choose = lambda *losses: next(  # noqa: E731
        gold
        for gold in range(len(losses))
        if core.is_correct(
            task("multiple_choice"), {"gold": gold}, [RowScore(loss, False) for loss in losses]
        )
    )
    assert choose(3.0, 1.0, 2.0) == 1
    assert choose(2.0, 1.0, 1.0) == 1
    assert choose(1.0, float("nan")) == 0


def test_a_model_gone_wrong_is_an_error_not_a_score(serve, tmp_path, params):
    publish, _ = serve
    bundle = ensure_bundle(Paths(tmp_path / "base"), url=publish(zip_of(bundle_files())))
    broken = params | {"lm_head": np.full_like(params["lm_head"], np.nan)}
    with pytest.raises(FloatingPointError, match="not finite, at example"):
        core.evaluate_core(
            Scorer(config=CONFIG, params=broken),
            Tokenizer({bytes([i]): i for i in range(256)}),
            bundle,
        )


def alone(rows: list[Row]) -> list[tuple[int, list[Row]]]:
    return [(i, [row]) for i, row in enumerate(rows)]


def random_examples(shared: tuple[int, ...], choices: int) -> list[tuple[int, list[Row]]]:
    """Examples whose rows share prefixes of these lengths; spans begin there or later."""
    rng, examples = np.random.default_rng(1), []
    for i, size in enumerate(shared):
        prefix = rng.integers(0, 300, size)
        rows = []
        for _ in range(1 + i % choices):
            rest = rng.integers(0, 300, rng.integers(1, 40))
            tokens = np.concatenate([prefix, rest]).astype(np.int32)
            start = int(rng.integers(max(1, size), len(tokens))) if i % 3 else max(1, size)
            rows.append(Row(tokens, start, len(tokens)))
        examples.append((i, rows))
    return examples


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_scores_equal_a_plain_computation_at_any_length(arch, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_TOKENS", 32)
    monkeypatch.setattr(scoring, "WINDOW", 7)
    monkeypatch.setattr(scoring, "ROW_LENGTH", 128)  # longer rows are fewer in a batch
    config = (
        CONFIG
        if arch == "modern"
        else GPTConfig.classic(2, n_embd=64, n_head=2, n_kv_head=1, sequence_len=64, vocab_size=300)
    )
    params = random_params(config)
    plain = jax.jit(
        lambda params, tokens: unembed(
            params, forward(params, tokens[None], config=config)[0][0], config=config
        )
    )
    examples = random_examples((0, 1, 31, 32, 33, 65, 129), choices=3) + alone(
        random_rows(3, (3, 100, 31))
    )
    examples = [(key, rows) for key, (_, rows) in enumerate(examples)]
    scores = dict(Scorer(config=config, params=params, num_rows=3)(examples))
    assert sorted(scores) == list(range(len(examples)))
    for key, rows in examples:
        for row, score in zip(rows, scores[key], strict=True):
            padded = np.zeros(256, np.int32)
            padded[: row.end] = row.tokens
            log_probs = np.asarray(jax.nn.log_softmax(plain(params, padded)))
            at = np.arange(row.start, row.end)
            np.testing.assert_allclose(
                score.mean_nll, -log_probs[at - 1, row.tokens[at]].mean(), rtol=1e-4
            )
            assert score.all_argmax == (log_probs[at - 1].argmax(-1) == row.tokens[at]).all()


def test_a_shared_prefix_is_computed_once(params, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_TOKENS", 32)
    pieces = []

    def record(name, argument):
        function = getattr(scoring, name)

        def recording(*args, **options):
            pieces.append(args[argument].shape)
            return function(*args, **options)

        monkeypatch.setattr(scoring, name, recording)

    record("_begin", 1)
    record("_extend", 2)
    rows = [Row(np.r_[np.arange(65), last].astype(np.int32), 65, 66) for last in (7, 8, 9, 10)]
    ((_, scores),) = Scorer(config=CONFIG, params=params, num_rows=1)([(0, rows)])
    assert pieces == [(1, 32), (1, 32)] and len({score.mean_nll for score in scores}) == 4


def test_a_span_that_the_model_would_write_is_all_argmax(params):
    greedy = np.array([5, 17, 3] + [0] * 6, np.int32)
    for i in range(3, 9):  # what is to the right of a position does not change it
        greedy[i] = all_logits(params, jnp.asarray(greedy))[i - 1].argmax()
    wrong = greedy.copy()
    wrong[-2] = (wrong[-2] + 1) % 300
    # a fault outside of the span does not count
    rows = [Row(greedy, 3, 9), Row(wrong, 3, 9), Row(wrong, 3, 7)]
    scores = dict(Scorer(config=CONFIG, params=params)(alone(rows)))
    assert [scores[i][0].all_argmax for i in range(3)] == [True, False, True]


def test_an_empty_span_has_no_loss(params):
    row = Row(np.arange(1, 9, dtype=np.int32), 8, 8)
    ((_, (score, other)),) = Scorer(config=CONFIG, params=params)(
        [(0, [row, Row(np.arange(1, 12, dtype=np.int32), 8, 11)])]
    )
    assert np.isnan(score.mean_nll) and score.all_argmax and other.mean_nll > 0


def test_a_mesh_gives_the_same_scores(params, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_TOKENS", 32)
    examples = random_examples((5, 31, 40, 70), choices=2)
    expected = dict(Scorer(config=CONFIG, params=params, num_rows=2)(examples))
    sharded = Scorer(
        config=CONFIG, params=params, num_rows=1, compute=Compute(mesh=make_mesh("4x1"))
    )
    for key, scores in sharded(examples):
        for score, other in zip(scores, expected[key], strict=True):
            np.testing.assert_allclose(score.mean_nll, other.mean_nll, rtol=1e-5)
            assert score.all_argmax == other.all_argmax


def test_logits_are_cut_into_affordable_chunks(params, monkeypatch):
    examples = alone(random_rows(4, (64, 64)))
    scorer = Scorer(config=CONFIG, params=params, num_rows=4)
    whole = dict(scorer(examples))
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4 * 300 * 3)  # three positions
    scoring._score.clear_cache()
    for key, (score,) in scorer(examples):
        np.testing.assert_allclose(score.mean_nll, whole[key][0].mean_nll, rtol=1e-5)
    scoring._score.clear_cache()


# The bundle. A small one: three tasks, one of each type.

CORE_YAML = """
icl_tasks:
- {label: choices, dataset_uri: a/choices.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,
   continuation_delimiter: "\\nAnswer: "}
- {label: schemas, dataset_uri: a/schemas.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: words, dataset_uri: b/words.jsonl, num_fewshot: [10], icl_task_type: language_modeling}
"""
ROWS = {
    "a/choices.jsonl": [
        {"query": f"Is {i} even?", "choices": ["yes", "no"], "gold": i % 2} for i in range(7)
    ],
    "a/schemas.jsonl": [
        {
            "context_options": [f"{name} saw {i}, she" for name in ("Ann", "Bob")],
            "continuation": "left",
            "gold": 0,
        }
        for i in range(3)
    ],
    "b/words.jsonl": [
        {"context": f"After {i} comes", "continuation": f"{i + 1}"} for i in range(4)
    ],
}


def bundle_files() -> dict[str, str]:
    files = {
        f"eval_bundle/eval_data/{name}": "\n".join(map(json.dumps, rows))
        for name, rows in ROWS.items()
    }
    meta = "Eval Task,Task Category,Random baseline\nchoices,x,50\nschemas,x,50\nwords,x,0\n"
    return files | {"eval_bundle/core.yaml": CORE_YAML, "eval_bundle/eval_meta_data.csv": meta}


def zip_of(files: dict[str, str], *links: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path):
    """A function from bytes to the loopback URL that gives them, and the requests so far."""
    root, requests = tmp_path / "www", []
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def publish(content: bytes) -> str:
        (root / "eval_bundle.zip").write_bytes(content)
        return f"http://127.0.0.1:{server.server_port}/eval_bundle.zip"

    yield publish, requests
    server.shutdown()
    server.server_close()


def left_behind(paths: Paths) -> list[str]:
    return sorted(path.name for path in paths.base.iterdir() if path.name != ".eval_bundle.lock")


def test_a_bundle_is_fetched_once_and_evaluated(serve, tmp_path, params):
    publish, requests = serve
    paths = Paths(tmp_path / "base")
    url = publish(zip_of(bundle_files() | {"__MACOSX/._core.yaml": "junk"}))
    assert ensure_bundle(paths, url=url) == paths.eval_bundle and len(requests) == 1
    assert left_behind(paths) == ["eval_bundle"]
    assert ensure_bundle(paths, url="http://127.0.0.1:9/none") == paths.eval_bundle

    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    seen = []
    result = core.evaluate_core(
        Scorer(config=CONFIG, params=params),
        tokenizer,
        paths.eval_bundle,
        on_example=lambda label, index, rows, scores, correct: seen.append((label, index, correct)),
    )
    expected = [
        (label, i)
        for label, size in (("choices", 7), ("schemas", 3), ("words", 4))
        for i in range(size)
    ]
    assert sorted((label, index) for label, index, _ in seen) == expected
    assert result.accuracy["choices"] == pytest.approx(
        sum(right for label, _, right in seen if label == "choices") / 7
    )
    assert result.centered["choices"] == pytest.approx(2 * result.accuracy["choices"] - 1)
    assert result.core == pytest.approx(np.mean(list(result.centered.values())))
    scorer = Scorer(config=CONFIG, params=params)
    few = core.evaluate_core(scorer, tokenizer, paths.eval_bundle, max_per_task=2)
    assert few.accuracy["choices"] in (0, 0.5, 1)


@pytest.mark.parametrize(
    "spoil", ["outside", "absolute", "link", "incomplete", "torn", "not a zip"]
)
def test_a_bad_archive_is_refused_and_leaves_nothing(serve, tmp_path, spoil):
    publish, _ = serve
    paths, files = Paths(tmp_path / "base"), bundle_files()
    content = {
        "outside": lambda: zip_of(files | {"eval_bundle/../../evil": "x"}),
        "absolute": lambda: zip_of(files | {"/tmp/evil": "x"}),
        "link": lambda: zip_of(files, "eval_bundle/eval_data/link"),
        "incomplete": lambda: zip_of(
            {name: text for name, text in files.items() if "words" not in name}
        ),
        "torn": lambda: zip_of(files)[:-300],
        "not a zip": lambda: b"<html>sign in</html>",
    }[spoil]()
    with pytest.raises(UsageError):
        ensure_bundle(paths, url=publish(content))
    assert left_behind(paths) == [] and not (tmp_path / "evil").exists()
