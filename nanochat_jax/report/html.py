"""report.html: one page without outside resources. Everything that comes from a run is escaped."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from nanochat_jax.report.curves import draw_curves
from nanochat_jax.report.sections import Section
from nanochat_jax.report.series import draw_series
from nanochat_jax.report.summary import Report, percent

STYLE = Path(__file__).with_name("report.css")
# label -> the stages that may have the result (the first one that does counts), and its name
TILES = {
    "validation bits per byte": (("base_loss", "base_train"), "val_bpb"),
    "CORE": (("base_eval",), "core"),
    "ChatCORE": (("chat_eval_sft", "chat_eval_mid"), "chatcore_6"),
    "arithmetic with the calculator": (("chat_eval_sft", "chat_eval_mid"), "arithmetic"),
    "spelling": (("chat_eval_sft", "chat_eval_mid"), "spelling"),
    "counting letters": (("chat_eval_sft", "chat_eval_mid"), "letter_count"),
    "held-out accuracy after RL": (("chat_rl",), "accuracy"),
}
PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nanochat training report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
{style}</style></head>
<body><main>
{body}
</main></body></html>
"""


def page(report: Report) -> str:
    """The whole document."""
    times = f"Run started {report.started}. " if report.started else ""
    body = [
        "<h1>nanochat training report</h1>",
        f'<p class="sub">{_text(times)}Report made {_text(report.generated)}.</p>',
        _tiles(report),
    ]
    if report.summary:
        body.append(f'<h2>Summary</h2><div class="card">{_table(report.summary)}</div>')
    if charts := draw_curves(report.sections):
        body.append(f"<h2>Curves</h2>{charts}")
    if charts := draw_series(report.sections):
        body.append(f"<h2>Miniseries</h2>{charts}")
    body += ["<h2>Sections</h2>", *map(_section, report.sections)]
    if report.missing:
        body.append(f'<p class="note">Sections not logged: {_text(", ".join(report.missing))}.</p>')
    body.append(f'<h2>Machine and code</h2><div class="card">{_definitions(report.facts)}</div>')
    return PAGE.format(style=STYLE.read_text("utf-8"), body="\n".join(filter(None, body)))


def _markdown() -> MarkdownIt:
    """Without HTML, and without anything that refers to another page."""
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
    parser.disable(["link", "image", "autolink", "reference"])
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    return parser


def _section(section: Section) -> str:
    time = _text(section.timestamp.replace("T", " ")[:19])
    parser = _markdown()
    content = "".join(
        _definitions(item) if isinstance(item, Mapping) else parser.render(item)
        for item in section.items
    )
    summary = f'<summary>{_text(section.section)}</summary><p class="time">{time}</p>'
    return f"<details>{summary}{content}</details>"


def _tiles(report: Report) -> str:
    tiles = {}
    for label, (stages, name) in TILES.items():
        found = [report.results[stage] for stage in stages if stage in report.results]
        if (value := next((results[name] for results in found if name in results), None)) is None:
            continue
        decimal = f"{value:.4f}" if isinstance(value, float) else str(value)
        tiles[label] = percent(value) if stages[0].startswith("chat_") else decimal
    if not report.wall_clock.startswith("unknown"):
        tiles["total wall clock time"] = report.wall_clock
    cards = (
        f'<div class="card tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>'
        for label, value in tiles.items()
    )
    return f'<div class="tiles">{"".join(cards)}</div>' if tiles else ""


def _definitions(item: Mapping[str, Any]) -> str:
    pairs = (f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in item.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head; "-" marks a missing value."""
    head = "".join(f"<th scope=col>{_text(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[1:])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _cell(text: str) -> str:
    return "<td class=none>-</td>" if text == "-" else f"<td>{_text(text)}</td>"


def _text(value: Any) -> str:
    return html.escape(str(value))
