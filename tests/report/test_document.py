import json
import math
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nanochat_jax.report import machine, sections
from nanochat_jax.report.document import generate, reset


def log(report_dir, section, stage, results=None, *items, **more):
    sections.log_section(report_dir, section, items, stage=stage, results=results, **more)


def log_small_run(report_dir):
    """Sections out of order, as reruns leave them."""
    chat = {"arc_easy": 0.4684, "chatcore_6": 0.2793, "gsm8k": 0.0697}
    log(report_dir, "Chat evaluation sft", "chat_eval_sft", chat, chat)
    log(report_dir, "Zoo", "zoo", {"apes": 3}, "A section of the user's own.")
    log(report_dir, "Base model loss", "base_loss", {"val_bpb": 0.812})
    core = {"core": 0.191, "hellaswag": 0.26, "boolq": -0.4172}
    log(report_dir, "Base model evaluation", "base_eval", core, core)
    results = {"val_bpb": 0.9, "devices": "8 x TPU"}
    log(report_dir, "Base model training", "base_train", results, "Note.")


@pytest.fixture
def markdown(tmp_path):
    def make():
        generate(tmp_path, tmp_path)
        return (tmp_path / "report.md").read_text()

    return make


class Elements(HTMLParser):
    """Checks that tags nest and close; collects (tag, attributes) and the text."""

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


def test_sections_are_in_order_with_unknown_ones_last_and_missing_ones_named(tmp_path, markdown):
    log_small_run(tmp_path)
    text = markdown()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Chat evaluation sft",
        "Zoo",
        "Summary",
    ]
    missing = re.search(r"Sections not logged: (.*)", text)[1].split(", ")
    logged = {"base-model-training", "base-model-loss", "base-model-evaluation"}
    assert set(missing) == set(sections.SECTION_ORDER) - logged - {"chat-evaluation-sft"}
    assert "- Devices: 8 x TPU" in text


def test_summary_takes_json_results_and_never_prose(tmp_path, markdown):
    log_small_run(tmp_path)
    log(tmp_path, "Midtraining", "mid_train", {}, "- CORE: 0.99\n- GSM8K: 0.99")
    rows = re.findall(r"^\| (\S.*?) +\| (.*) \|$", markdown(), re.MULTILINE)
    table = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert list(table) == ["Metric", "CORE", "val bpb", "ARC-Easy", "GSM8K", "ChatCORE (6)"]
    assert table["CORE"] == ["0.1910", "-", "-", "-"]
    # base_loss, measured after base_train, wins
    assert table["val bpb"] == ["0.8120", "-", "-", "-"]
    assert table["GSM8K"] == ["-", "-", "7.0%", "-"]


def test_results_json_nests_by_stage_and_is_strict_json(tmp_path, markdown):
    results = {"val_loss": math.nan, "x": np.float32(0.5), "n": np.int64(7)}
    log(tmp_path, "Chat SFT", "chat_sft", results)
    markdown()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert results == {"chat_sft": {"val_loss": "nan", "x": 0.5, "n": 7}}


def test_no_evaluation_removes_anothers_results(tmp_path, markdown):
    section = "Chat evaluation sft"
    for model, results in (
        ("d4, step 9", {"gsm8k": 0.1, "mmlu": 0.2}),
        ("d4, step 9", {"mine": 0.3, "mmlu": 0.4}),
        ("d6, step 9", {"gsm8k": 0.5}),
        ("d4, step 9", {"last": 0.6}),
    ):
        with sections.earlier_evaluation(tmp_path, section, model) as earlier:
            merged = (earlier.results if earlier else {}) | results
            log(tmp_path, section, "chat_eval_sft", merged, f"Model: {model}", model=model)
    text = markdown()
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "chat_eval_sft": {"gsm8k": 0.1, "mmlu": 0.4, "mine": 0.3, "last": 0.6},
        "chat_eval_sft d6, step 9": {"gsm8k": 0.5},
    }
    assert "## Chat evaluation sft d6, step 9" in text


def test_reset_removes_everything_of_the_old_run_and_nothing_else(tmp_path, markdown):
    log_small_run(tmp_path)
    markdown()
    (tmp_path / "midtraining.md").write_text("## Midtraining\n")  # torn: its json was never written
    (tmp_path / "notes.txt").write_text("mine")
    reset(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"header.json", "header.md", "notes.txt"}
    assert "Run started: " in (tmp_path / "header.md").read_text()


def test_wall_clock_is_the_time_from_reset_to_the_last_section_before_rl(tmp_path, markdown):
    log_small_run(tmp_path)
    assert "Total wall clock time: unknown" in markdown()
    reset(tmp_path)
    log_small_run(tmp_path)
    log(tmp_path, "Chat RL", "chat_rl")

    def set_time(name, key, time):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: time}))

    for path in tmp_path.glob("*.json"):
        if path.name != "header.json":
            set_time(path.name, "timestamp", "2026-01-01T11:00:00+00:00")
    set_time("header.json", "started", "2026-01-01T10:00:00+00:00")
    set_time("chat-evaluation-sft.json", "timestamp", "2026-01-01T15:51:20+02:00")
    set_time("chat-rl.json", "timestamp", "2026-01-03T10:00:00+00:00")
    assert "Total wall clock time: 3h51m\n" in markdown()


def test_page_is_well_formed_self_contained_and_escapes_what_a_model_wrote(tmp_path, markdown):
    evil = '<script src="https://evil.example/x.js"></script><img src=x onerror=alert(1)>'
    links = "![i](https://evil.example/i.png) [l](https://evil.example) <https://evil.example>"
    reset(tmp_path)
    log_small_run(tmp_path)
    table = f"### {evil}\n\n| a | b |\n|---|---|\n| {evil} | 2 |\n\n"
    table += f"```\n{evil}\n```\n\n- {evil}\n\n{links}"
    log(tmp_path, f"Odd {evil}", evil, {evil: evil}, {"sample": evil, evil: 1}, table)
    results = {evil.upper(): 0.5, "devices": evil}
    log(tmp_path, "Chat evaluation mid", "chat_eval_mid", results)
    markdown()
    page = Elements((tmp_path / "report.html").read_text())
    assert not {tag for tag, _ in page.seen} & {"script", "img", "link", "iframe", "a"}
    for _, attributes in page.seen:
        assert not {"src", "href", "onerror", "onload"} & set(attributes)
    assert page.text.count(evil) >= 6


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_a_users_file_is_kept_and_a_report_is_replaced(tmp_path, caplog, name):
    report, out = tmp_path / "report", tmp_path / "out"
    log_small_run(report)
    out.mkdir()
    (out / name).write_text("# nanochat training report\nmy quarterly figures")

    def files():
        generate(report, out)
        return {path.name for path in out.iterdir()}

    kept = name.replace(".", ".old-1.")
    expected = {"report.md", "report.html", kept}
    assert files() == expected
    assert f"{out / name} is not a report of this program: kept as {kept}" in caplog.text
    assert (out / kept).read_text().endswith("my quarterly figures")
    reset(report)  # another run
    log_small_run(report)
    assert files() == expected
    with (out / name).open("a") as file:
        file.write("and what I think of it")
    assert files() == expected | {name.replace(".", ".old-2.")}


@pytest.mark.parametrize("name", ["report", "Results", "header", "", "!!"])
def test_section_names_that_would_overwrite_the_report_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="cannot name a report file"):
        log(tmp_path, name, "x")


def test_commands_reset_and_generate_into_the_current_directory(tmp_path, monkeypatch, capsys):
    base, here = tmp_path / "base", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("nanochat_jax.report", run_name="__main__")
        return end.value.code or 0

    assert run("generate") == 2 and capsys.readouterr().err.startswith("error: no sections in ")
    assert run("reset") == 0
    log(base / "report", "Midtraining", "mid_train", None, {"steps": 3})
    assert run() == 0
    for name in ("report.md", "report.html"):
        assert (here / name).read_bytes() == (base / "report" / name).read_bytes()
    assert "mid_train" in (base / "report/results.json").read_text()


def test_logging_a_section_again_replaces_it(tmp_path, markdown):
    for bpb in (1.5, 1.25):
        log(tmp_path, "Base model loss", "base_loss", {"val_bpb": bpb}, {"val bpb": bpb})
    text = markdown()
    assert "1.2500" in text and "1.5000" not in text


def test_the_code_is_described_in_a_checkout_only(monkeypatch):
    root = Path(machine.__file__).parents[2]
    answers = {"rev-parse": str(root), "ls-files": "README.md"}
    monkeypatch.setattr(machine, "_git", lambda _, command, *__: answers.get(command))
    assert "Git" in machine.machine_facts() and "1 files" in machine.code_size()
    monkeypatch.setattr(machine, "_git", lambda *_: None)
    assert "Git" not in machine.machine_facts() and machine.code_size() is None
