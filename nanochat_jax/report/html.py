"""report.html: one page with no outside resources. Everything that comes from a run is escaped."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_jax.metrics import read_metrics
from nanochat_jax.report.charts import Line, Point, line_chart, smooth

TILES = (  # label, stages to look in (the first that has it), result
    ("validation bits per byte", ("base_loss", "base_train"), "val_bpb"),
    ("CORE", ("base_eval",), "core"),
    ("ChatCORE", ("chat_eval_sft", "chat_eval_mid"), "chatcore_6"),
    ("arithmetic with the calculator", ("chat_eval_sft", "chat_eval_mid"), "arithmetic"),
    ("spelling", ("chat_eval_sft", "chat_eval_mid"), "spelling"),
    ("counting letters", ("chat_eval_sft", "chat_eval_mid"), "letter_count"),
    ("held-out accuracy after RL", ("chat_rl",), "accuracy"),
)
LABELS = {  # of results whose name is not how people write them
    "core": "CORE",
    "chatcore_5": "ChatCORE (5)",
    "chatcore_6": "ChatCORE (6)",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
    "spelling_bee": "SpellingBee",
    "train_bpb": "train bpb",
    "val_bpb": "val bpb",
    "val_loss": "val loss",
}
LOSS_CHARTS = {
    "base_train": "Pretraining",
    "mid_train": "Midtraining",
    "chat_sft": "Supervised finetuning",
    "chat_rl": "Reinforcement learning",
}
TRAIN_CURVES = {"reward": "mean reward", "loss": "training loss"}
EVAL_CURVES = {
    "accuracy": "held-out accuracy",
    "val_bpb": "validation bits per byte",
    "val_loss": "validation loss",
}
RL_CURVES = {"entropy": "entropy, nats a token", "sequence_length": "tokens of prompt and reply"}
MIN_POINTS_TO_SMOOTH = 30

STYLE = """
:root { --bg: #f7f7f5; --card: #fff; --ink: #1c1c1a; --soft: #6a6a65; --rule: #e3e3de; --grid: #ecece8;
  --s0: #2563c9; --s1: #d9682b; --s2: #23876a; --s3: #8a4fb8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --bg: #161615; --card: #1f1f1d; --ink: #ecebe6; --soft: #a3a29b;
  --rule: #363632; --grid: #2d2d2a; --s0: #6ea3f5; --s1: #f0935b; --s2: #4fbf9b; --s3: #bd8be6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
.sub, .note, .time { color: var(--soft); font-size: .85rem; } .sub { margin: .2rem 0 1.4rem; }
.card, figure, details { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 1rem; margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.charts { display: flex; flex-wrap: wrap; justify-content: center; gap: .8rem; align-items: start; margin-bottom: .8rem; }
.charts figure { flex: 0 0 calc(50% - .4rem); }
figcaption { font-weight: 600; margin-bottom: .4rem; } .note { margin: .3rem 0 0; }
svg { display: block; width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .faint { opacity: .3; }
.line.faint { stroke-width: 1; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.line { stroke: var(--c); } .dot { fill: var(--c); } .dot { stroke: var(--card); stroke-width: 1; }
.key { display: inline-block; width: .9em; height: .9em; border-radius: 3px; background: var(--c); margin-right: .4em;
  vertical-align: -.1em; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .4rem 0 0;
  font-size: .85rem; color: var(--soft); }
/* A shadow at the right edge while more of the table lies there; what covers it scrolls with the table. */
.wide { overflow-x: auto; background:
  linear-gradient(to left, var(--card) 40%, transparent) right / 2.5rem 100% no-repeat local,
  linear-gradient(to left, color-mix(in srgb, var(--ink) 30%, transparent), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } thead th { color: var(--soft); font-weight: 500; }
.none { color: var(--soft); opacity: .6; } tbody tr:last-child td { border-bottom: 0; }
details { margin-bottom: .6rem; } summary { cursor: pointer; font-weight: 600; }
details .time { margin: .2rem 0 .8rem; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: .15rem 1.2rem; margin: .4rem 0;
  font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 860px) { .charts figure { flex-basis: 100%; } }
@media (max-width: 480px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
  svg text { font-size: 17px; } table { font-size: .85rem; } th, td { padding: .3rem; } }
@media print { body { background: none; } figure, .card, details { break-inside: avoid; } }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a stage logged: `items` are markdown strings and mappings, `results` what tables and
    charts are made of.
    """

    slug: str
    section: str
    stage: str
    timestamp: str  # ISO 8601 with offset
    items: list[Any] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    curves: str | None = None  # path of a metrics.jsonl
    model: str | None = None  # what was evaluated


@dataclass(frozen=True, kw_only=True)
class Report:
    """What both documents show."""

    sections: list[Section]  # in order
    started: str | None  # times as people read them
    generated: str
    facts: dict[str, str]  # of the machine
    summary: list[list[str]]  # rows of printed cells, the head first, "-" where absent
    results: dict[str, dict[str, Any]]  # by stage
    wall_clock: str
    missing: list[str]  # sections that were not logged


def page(report: Report) -> str:
    """The whole document."""
    times = f"Run started {report.started}. " if report.started else ""
    body = [
        "<h1>nanochat training report</h1>",
        f'<p class="sub">{_text(times)}Report made {_text(report.generated)}.</p>',
        _tiles(report.results, report.wall_clock),
    ]
    if report.summary:
        body.append(f'<h2>Summary</h2><div class="card">{_table(report.summary)}</div>')
    if charts := _curves(report.sections):
        body.append(f"<h2>Curves</h2>{charts}")
    body.append("<h2>Sections</h2>")
    for section in report.sections:
        time = section.timestamp.replace("T", " ")[:19]
        content = "".join(
            _definitions(item) if isinstance(item, Mapping) else markdown(item)
            for item in section.items
        )
        title = _text(section.section)
        body.append(
            f'<details><summary>{title}</summary><p class="time">{_text(time)}</p>{content}</details>'
        )
    if report.missing:
        body.append(f'<p class="note">Sections not logged: {_text(", ".join(report.missing))}.</p>')
    body.append(f'<h2>Machine and code</h2><div class="card">{_definitions(report.facts)}</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>nanochat training report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'\">"
        f"<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + "\n</main></body></html>\n"
    )


def rows_by_kind(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics by kind ("train", "eval"), by rising step; a step logged twice counts once,
    as the later row.
    """
    kinds: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind")), {})[row["step"]] = row
    return {kind: [steps[step] for step in sorted(steps)] for kind, steps in kinds.items()}


def markdown(text: str) -> str:
    """The little markdown that stages write: headings, tables, paragraphs."""
    out: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if match := re.match(r"#{1,6} +(.*)", lines[0]):
            out.append(f"<h3>{_text(match[1])}</h3>")
        elif len(lines) > 1 and all(line.lstrip().startswith("|") for line in lines):
            cells = [
                [cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines
            ]
            out.append(
                _table(
                    [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
                )
            )
        else:
            out.append(f"<p>{'<br>'.join(map(_text, lines))}</p>")
    return "".join(out)


def _tiles(results: Mapping[str, Mapping[str, Any]], wall_clock: str) -> str:
    tiles = []
    for label, stages, name in TILES:
        value = next(
            (results[stage][name] for stage in stages if name in results.get(stage, {})), None
        )
        if value is not None:
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            tiles.append((label, percent(value) if stages[0].startswith("chat_") else shown))
    if not wall_clock.startswith("unknown"):
        tiles.append(("total wall clock time", wall_clock))
    cards = [
        f'<div class="card tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>'
        for label, value in tiles
    ]
    return f'<div class="tiles">{"".join(cards)}</div>' if cards else ""


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _noisy(label: str, points: list[Point], color: int) -> list[Line]:
    if len(points) < MIN_POINTS_TO_SMOOTH:
        return [Line(label=label, points=points, color=color, markers=len(points) < 12)]
    return [
        Line(label="each step", points=points, color=color, faint=True),
        Line(label="moving average", points=smooth(points), color=color),
    ]


def _curves(sections: Sequence[Section]) -> str:
    curves = {section.stage: Path(section.curves) for section in sections if section.curves}
    out = []
    for color, (stage, title) in enumerate(LOSS_CHARTS.items()):
        if stage not in curves:
            continue
        if not curves[stage].exists():
            out.append(
                f'<p class="note">{_text(f"{title}: no curves, {curves[stage]} is gone")}.</p>'
            )
            continue
        metrics = rows_by_kind(read_metrics(curves[stage]))
        train, evals = metrics.get("train", []), metrics.get("eval", [])
        charts = {}  # lines by what they show, in order
        rl = stage == "chat_rl"
        for name, what in TRAIN_CURVES.items():
            if not (rl and name == "loss"):  # a policy loss says nothing
                charts[what] = _noisy(what, _points(train, name), color)
        for name, what in EVAL_CURVES.items():
            charts[what] = [
                Line(label=what, points=_points(evals, name), color=color, markers=True)
            ]
        if names := sorted(
            {n for row in evals for n in row if n.startswith("pass@")}, key=lambda n: (len(n), n)
        ):
            shown = dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
            charts["pass@k"] = [
                Line(label=n, points=_points(evals, n), color=c, markers=True)
                for c, n in enumerate(shown)
            ]
        for name, what in RL_CURVES.items() if rl else ():
            charts[what] = _noisy(what, _points(train, name), color)
        figures = [
            line_chart(f"{title}: {what}", lines, x_label="step", y_label=what)
            for what, lines in charts.items()
        ]
        if any(figures):
            out.append(f'<div class="charts">{"".join(figures)}</div>')
    return "".join(out)


def percent(accuracy: Any) -> str:
    """As the evaluations print it."""
    return f"{accuracy:.1%}" if isinstance(accuracy, float) else str(accuracy)


def label_of(result: str) -> str:
    """How people write the name of a result."""
    return LABELS.get(result, result.replace("_", " "))


def _definitions(item: Mapping[str, Any]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in item.items())
        + "</dl>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head."""
    head = "".join(f"<th scope=col>{_text(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return "<td class=none>-</td>" if text == "-" else f"<td>{_text(text)}</td>"


def _text(value: Any) -> str:
    return html.escape(str(value))
