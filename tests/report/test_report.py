import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax.errors import NotFound, UsageError
from nanochat_jax.metrics import read_metrics
from nanochat_jax.report import charts, html, sections


def write_metrics(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_small_run(report_dir: Path) -> None:
    """Sections out of order, as reruns leave them."""
    chat = {"arc_easy": 0.4684, "chatcore_6": 0.2793, "gsm8k": 0.0697}
    sections.log_section(
        report_dir, "Chat evaluation sft", [chat], stage="chat_eval_sft", results=chat
    )
    sections.log_section(
        report_dir, "Zoo", ["Something of the user's own."], stage="zoo", results={"apes": 3}
    )
    sections.log_section(
        report_dir, "Base model loss", [], stage="base_loss", results={"val_bpb": 0.812}
    )
    core = {"core": 0.191, "hellaswag": 0.26, "boolq": -0.4172}
    sections.log_section(
        report_dir, "Base model evaluation", [core], stage="base_eval", results=core
    )
    results = {"val_bpb": 0.9, "device": "8 x TPU"}
    sections.log_section(
        report_dir, "Base model training", ["Note."], stage="base_train", results=results
    )


class Elements(HTMLParser):
    """Checks that tags nest and close; collects (tag, attributes)."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


def test_sections_come_in_the_fixed_order_with_unknown_ones_last(tmp_path):
    log_small_run(tmp_path)
    sections.generate(tmp_path, tmp_path)
    titles = re.findall(r"^## (.*)", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert titles == [
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Chat evaluation sft",
        "Zoo",
        "Summary",
    ]


def test_missing_sections_are_named(tmp_path):
    log_small_run(tmp_path)
    sections.generate(tmp_path, tmp_path)
    line = re.search(r"Sections not logged: (.*)", (tmp_path / "report.md").read_text())[1]
    assert set(line.split(", ")) == set(sections.SECTION_ORDER) - {
        "base-model-training",
        "base-model-loss",
        "base-model-evaluation",
        "chat-evaluation-sft",
    }


def test_summary_takes_json_results_and_never_prose(tmp_path):
    log_small_run(tmp_path)
    sections.log_section(
        tmp_path, "Midtraining", ["- CORE: 0.99\n- GSM8K: 0.99"], stage="mid_train", results={}
    )
    sections.generate(tmp_path, tmp_path)
    rows = re.findall(
        r"^\| (\S.*?) +\| (.*) \|$", (tmp_path / "report.md").read_text(), re.MULTILINE
    )
    table = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert list(table) == ["Metric", "CORE", "val bpb", "ARC-Easy", "GSM8K", "ChatCORE (6)"]
    assert table["CORE"] == ["0.1910", "-", "-", "-"]
    # base_loss, measured after base_train, wins
    assert table["val bpb"] == ["0.8120", "-", "-", "-"]
    assert table["GSM8K"] == ["-", "-", "7.0%", "-"]


def test_results_json_nests_by_stage_and_is_strict_json(tmp_path):
    results = {"val_loss": math.nan, "x": np.float32(0.5), "n": np.int64(7)}
    sections.log_section(tmp_path, "Chat SFT", [], stage="chat_sft", results=results)
    sections.generate(tmp_path, tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert results == {"chat_sft": {"val_loss": "nan", "x": 0.5, "n": 7}}


def test_logging_a_section_again_replaces_it(tmp_path):
    for bpb in (1.5, 1.25):
        sections.log_section(
            tmp_path,
            "Base model loss",
            [{"val bpb": bpb}],
            stage="base_loss",
            results={"val_bpb": bpb},
        )
    sections.generate(tmp_path, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "1.2500" in text and "1.5000" not in text


def evaluate(report_dir, model, results):
    with sections.earlier_evaluation(report_dir, "Chat evaluation sft", model) as earlier:
        merged = (earlier.results if earlier else {}) | results
        sections.log_section(
            report_dir,
            "Chat evaluation sft",
            [f"Model: {model}"],
            stage="chat_eval_sft",
            results=merged,
            model=model,
        )


def test_no_evaluation_removes_anothers_results(tmp_path):
    for model, results in (
        ("d4, step 9", {"gsm8k": 0.1, "mmlu": 0.2}),
        ("d4, step 9", {"mine": 0.3, "mmlu": 0.4}),
        ("d6, step 9", {"gsm8k": 0.5}),
        ("d4, step 9", {"last": 0.6}),
    ):
        evaluate(tmp_path, model, results)
    sections.generate(tmp_path, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "chat_eval_sft": {"gsm8k": 0.1, "mmlu": 0.4, "mine": 0.3, "last": 0.6},
        "chat_eval_sft d6, step 9": {"gsm8k": 0.5},
    }
    assert "## Chat evaluation sft d6, step 9" in (tmp_path / "report.md").read_text()


def test_items_are_printed_as_upstream_does(tmp_path):
    items = [
        {"lr": 0.02, "tiny": 1.25e-5, "steps": 21400, "batch": 32, "ok": True},
        None,
        {},
        "",
        "free text",
    ]
    sections.log_section(tmp_path, "Midtraining", items, stage="mid_train")
    lines = (tmp_path / "midtraining.md").read_text().splitlines()
    assert lines[0] == "## Midtraining" and re.fullmatch(
        r"timestamp: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", lines[1]
    )
    assert lines[2:] == [
        "",
        "- lr: 0.0200",
        "- tiny: 1.25e-05",
        "- steps: 21,400",
        "- batch: 32",
        "- ok: True",
        "",
        "free text",
    ]


def test_reset_removes_everything_of_the_old_run_and_nothing_else(tmp_path):
    log_small_run(tmp_path)
    sections.generate(tmp_path, tmp_path)
    (tmp_path / "midtraining.md").write_text("## Midtraining\n")  # torn: its json was never written
    (tmp_path / "notes.txt").write_text("mine")
    sections.reset(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "header.json",
        "header.md",
        "notes.txt",
    ]
    assert "Run started: " in (tmp_path / "header.md").read_text()


def test_wall_clock_runs_from_reset_to_the_last_section_before_rl(tmp_path):
    sections.reset(tmp_path)
    log_small_run(tmp_path)
    sections.log_section(tmp_path, "Chat RL", [], stage="chat_rl")

    def set_time(name, key, time):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: time}))

    set_time("header.json", "started", "2026-01-01T10:00:00+00:00")
    for path in tmp_path.glob("*.json"):
        if path.name != "header.json":
            set_time(path.name, "timestamp", "2026-01-01T11:00:00+00:00")
    set_time("chat-evaluation-sft.json", "timestamp", "2026-01-01T15:51:20+02:00")
    set_time("chat-rl.json", "timestamp", "2026-01-03T10:00:00+00:00")
    sections.generate(tmp_path, tmp_path)
    assert "Total wall clock time: 3h51m\n" in (tmp_path / "report.md").read_text()


def test_without_reset_the_wall_clock_is_unknown_not_zero(tmp_path):
    log_small_run(tmp_path)
    sections.generate(tmp_path, tmp_path)
    assert "Total wall clock time: unknown" in (tmp_path / "report.md").read_text()


def test_page_is_well_formed_self_contained_and_escapes_what_a_model_wrote(tmp_path):
    evil = '<script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)>'
    sections.reset(tmp_path)
    log_small_run(tmp_path)
    table = f"### {evil}\n\n| a | b |\n|---|---|\n| {evil} | 2 |\n\n```\n{evil}\n```\n\n- {evil}"
    sections.log_section(
        tmp_path,
        f"Odd {evil}",
        [{"sample": evil, evil: 1}, table],
        stage=evil,
        results={evil: evil},
    )
    chat = {evil.upper(): 0.5}
    sections.log_section(
        tmp_path, "Chat evaluation mid", [], stage="chat_eval_mid", results=chat | {"device": evil}
    )
    sections.generate(tmp_path, tmp_path)
    page = Elements((tmp_path / "report.html").read_text())
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "img", "link", "iframe"}
    for _, attributes in page.seen:
        assert not {"src", "href", "onerror", "onload"} & set(attributes)
    assert page.text.count(evil) >= 6


def test_page_draws_the_curves_of_each_stage(tmp_path):
    rows = [{"step": s, "kind": "train", "loss": 3 + math.exp(-s / 50)} for s in range(300)]
    rows += [
        {"step": s, "kind": "eval", "val_bpb": 1 + math.exp(-s / 50)} for s in range(0, 300, 50)
    ]
    path = write_metrics(tmp_path / "metrics.jsonl", rows)
    log_small_run(tmp_path)
    sections.log_section(tmp_path, "Base model training", [], stage="base_train", curves=path)
    sections.log_section(
        tmp_path, "Midtraining", [], stage="mid_train", curves=tmp_path / "lost.jsonl"
    )
    sections.generate(tmp_path, tmp_path)
    page = Elements((tmp_path / "report.html").read_text())
    labels = [attributes["aria-label"] for tag, attributes in page.seen if tag == "svg"]
    assert labels[:2] == ["Pretraining: training loss", "Pretraining: validation bits per byte"]
    assert "lost.jsonl is gone" in page.text


def test_metrics_of_a_resumed_run_count_each_step_once_and_skip_a_torn_line(tmp_path, caplog):
    rows = [{"step": s, "kind": "train", "loss": 1.0} for s in (0, 1, 2, 3)]
    rows += [{"step": s, "kind": "train", "loss": 2.0} for s in (2, 3, 4)]
    path = write_metrics(tmp_path / "metrics.jsonl", rows)
    path.write_text(path.read_text() + '{"step": 5, "kind": "tra')
    metrics = html.rows_by_kind(read_metrics(path))
    assert [(row["step"], row["loss"]) for row in metrics["train"]] == [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 2),
    ]
    assert "1 damaged lines" in caplog.text


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_file_of_the_users_is_kept_and_a_report_is_replaced(tmp_path, caplog, name):
    log_small_run(tmp_path / "report")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("# nanochat training report\nmy quarterly figures")

    def generate():
        sections.generate(tmp_path / "report", out)
        return sorted(path.name for path in out.iterdir())

    kept = name.replace(".", ".old-1.")
    expected = sorted(["report.md", "report.html", kept])
    assert (
        generate() == expected
        and f"{out / name} is not a report of this program: kept as {kept}" in caplog.text
    )
    assert (out / kept).read_text().endswith("my quarterly figures")
    sections.reset(tmp_path / "report")  # another run
    log_small_run(tmp_path / "report")
    assert generate() == expected
    with (out / name).open("a") as file:
        file.write("and what I think of it")
    assert generate() == sorted([*expected, name.replace(".", ".old-2.")])


def test_a_working_directory_that_cannot_be_written_is_one_line(tmp_path):
    log_small_run(tmp_path / "report")
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UsageError, match=f"{path} is a file where a directory is needed"):
        sections.generate(tmp_path / "report", path)


def line_points(svg: str) -> list[tuple[float, float]]:
    points = re.search(r'<polyline class="line s0" points="([^"]*)"', svg)[1]
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_line_chart_maps_points_to_the_axes(tmp_path):
    line = charts.Line(label="loss", points=[(0, 4.0), (50, 2.0), (100, 3.0), (100, math.nan)])
    svg = charts.line_chart("t", [line], x_label="step", y_label="loss")
    (x0, y0), (x1, y1), (x2, y2) = line_points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    # SVG's y grows downwards
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.2) and y0 < y2 < y1
    ticks = {
        float(label): float(y)
        for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)
    }
    assert ticks[3.0] - 4 == pytest.approx(y2, abs=0.2)


def test_line_chart_is_not_flattened_by_the_first_steps():
    points = [(s, 2.0 + 0.5 * math.exp(-s / 500) + 9 * math.exp(-s / 3)) for s in range(1000)]
    svg = charts.line_chart("t", [charts.Line(label="loss", points=points)], x_label="", y_label="")
    ys = [y for x, y in line_points(svg)]
    middle, last = ys[len(ys) // 5], ys[-1]
    assert last - middle > 0.3 * charts.HEIGHT
    assert "first steps lie above" in svg


@pytest.mark.parametrize(
    "low,high", [(0, 1), (-0.42, 0.53), (2.4, 4.1), (0, 21400), (1e-6, 3e-6), (0.39, 0.6)]
)
def test_ticks_are_round_rising_and_inside(low, high):
    values = charts.ticks(low, high)
    assert 3 <= len(values) <= 11
    steps = np.diff(values)
    assert np.allclose(steps, steps[0])
    leading = steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.0001))
    assert min(abs(leading - one) for one in (1, 2, 5)) < 1e-6
    assert low - 1e-9 <= values[0] and values[-1] <= high * (1 + 1e-9)


def test_thinning_keeps_the_extremes():
    points = [(s, math.sin(s)) for s in range(20000)]
    points[777] = (777, 50.0)
    points[12345] = (12345, -50.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MAX_POINTS + 2
    assert (777, 50.0) in kept and (12345, -50.0) in kept
    assert kept == sorted(kept)


def test_generating_from_nothing_or_from_a_torn_section_is_the_users_to_know(tmp_path):
    with pytest.raises(NotFound, match="no sections"):
        sections.generate(tmp_path, tmp_path)
    (tmp_path / "midtraining.json").write_text('{"section": "Midtr')
    with pytest.raises(UsageError, match=r"midtraining\.json is not a report section"):
        sections.generate(tmp_path, tmp_path)


def test_accuracies_are_percent_on_the_page_and_core_is_a_score(tmp_path):
    log_small_run(tmp_path)
    sections.generate(tmp_path, tmp_path)
    text = Elements((tmp_path / "report.html").read_text()).text
    assert text.count("27.9%") == 2  # ChatCORE, on its card and in the table
    assert "46.8%" in text and "0.1910" in text and "19.1%" not in text


@pytest.mark.parametrize("steps", [range(5), [3], [0, 2], range(0, 21400, 100)])
def test_there_is_no_half_a_step_on_an_axis(steps):
    line = charts.Line(label="loss", points=[(step, 1.0) for step in steps])
    svg = charts.line_chart("t", [line], x_label="step", y_label="loss")
    values = [
        float(text.replace("k", "e3"))
        for text in re.findall(r'class="tick"[^>]*text-anchor="middle">([^<]*)<', svg)
    ]
    assert len(values) >= 2 and all(value == int(value) for value in values)


@pytest.mark.parametrize("name", ["report", "Results", "header", "", "!!"])
def test_section_names_that_would_overwrite_the_report_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a report file"):
        sections.log_section(tmp_path, name, [], stage="x")


def test_command_line_resets_and_generates_into_the_current_directory(tmp_path):
    def run(*arguments):
        root = Path(sections.__file__).parents[2]
        environment = {
            "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(root),
        }
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "nanochat_jax.report", *arguments]
        return subprocess.run(command, env=environment, cwd=here, capture_output=True, text=True)

    empty = run("generate")
    assert empty.returncode == 2 and empty.stderr.startswith("error: no sections in ")
    assert run("reset").returncode == 0
    sections.log_section(tmp_path / "base/report", "Midtraining", [{"steps": 3}], stage="mid_train")
    done = run()
    assert done.returncode == 0, done.stderr
    for name in ("report.md", "report.html"):
        assert (tmp_path / "here" / name).read_bytes() == (
            tmp_path / "base/report" / name
        ).read_bytes()
    assert "mid_train" in (tmp_path / "base/report/results.json").read_text()
