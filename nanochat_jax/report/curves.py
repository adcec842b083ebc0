"""The charts of a run, drawn from the `metrics.jsonl` of its training stages.

To draw one more metric, add it to one of the tables: `metrics.jsonl` has it by the same name.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_jax.metrics import read_metrics
from nanochat_jax.report.charts import Line, Point, line_chart, smooth
from nanochat_jax.report.sections import Section

STAGES = {
    "base_train": "Pretraining",
    "mid_train": "Midtraining",
    "chat_sft": "Supervised finetuning",
    "chat_rl": "Reinforcement learning",
}
# Metric -> title; of rows of kind "train" or "eval".
TRAIN_CURVES = {"reward": "mean reward", "loss": "training loss"}
EVAL_CURVES = {
    "accuracy": "held-out accuracy",
    "val_bpb": "validation bits per byte",
    "val_loss": "validation loss",
}
LAST_TRAIN_CURVES = {
    "entropy": "entropy in nats per token",
    "sequence_length": "tokens of prompt and reply",
}
NOT_DRAWN = {("chat_rl", "loss")}  # the value of a policy loss has no meaning
MIN_POINTS_TO_SMOOTH = 30

Row = Mapping[str, Any]


def rows_by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of metrics by kind ("train", "eval"), by rising step."""
    kinds: dict[str, dict[float, Row]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind")), {})[row["step"]] = row
    return {kind: [steps[step] for step in sorted(steps)] for kind, steps in kinds.items()}


def draw_curves(sections: Sequence[Section]) -> str:
    """HTML with all charts; a note for a stage whose file is missing."""
    files = {section.stage: Path(section.curves) for section in sections if section.curves}
    blocks = []
    for color, (stage, title) in enumerate(STAGES.items()):
        if stage not in files:
            continue
        if not files[stage].exists():
            text = html.escape(f"{title}: no curves, {files[stage]} is missing.")
            blocks.append(f'<p class="note">{text}</p>')
            continue
        charts = _lines(stage, rows_by_kind(read_metrics(files[stage])), color)
        figures = [line_chart(f"{title}: {name}", lines) for name, lines in charts.items()]
        if any(figures):
            blocks.append(f'<div class="charts">{"".join(figures)}</div>')
    return "".join(blocks)


def _lines(stage: str, metrics: Mapping[str, list[Row]], color: int) -> dict[str, list[Line]]:
    """The lines of each chart, by the chart's title."""
    train, evals = metrics.get("train", []), metrics.get("eval", [])
    charts = _train_lines(stage, train, TRAIN_CURVES, color)
    for name, title in EVAL_CURVES.items():
        points = _points(evals, name)
        charts[title] = [Line(label=title, points=points, color=color, markers=True)]
    passes = {name for row in evals for name in row if name.startswith("pass@")}
    if names := sorted(passes, key=lambda name: (len(name), name)):
        few = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
        charts["pass@k"] = [
            Line(label=name, points=_points(evals, name), color=index, markers=True)
            for index, name in enumerate(few)
        ]
    return charts | _train_lines(stage, train, LAST_TRAIN_CURVES, color)


def _train_lines(
    stage: str, rows: Sequence[Row], titles: Mapping[str, str], color: int
) -> dict[str, list[Line]]:
    return {
        title: _noisy(title, _points(rows, name), color)
        for name, title in titles.items()
        if (stage, name) not in NOT_DRAWN
    }


def _points(rows: Sequence[Row], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _noisy(label: str, points: list[Point], color: int) -> list[Line]:
    if len(points) < MIN_POINTS_TO_SMOOTH:
        return [Line(label=label, points=points, color=color, markers=len(points) < 12)]
    return [
        Line(label="each step", points=points, color=color, faint=True),
        Line(label="moving average", points=smooth(points), color=color),
    ]
