"""A series of models of several depths: its CSV file, its optimum, its charts."""

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nanochat_jax.errors import MALFORMED
from nanochat_jax.files import write_file
from nanochat_jax.report.charts import Line, Point, line_chart
from nanochat_jax.report.sections import Section

STAGE = "miniseries"
# Columns after these are parameters by optimizer group. `budget` is empty without budgets, `core`
# if it was not evaluated.
COLUMNS = (
    *("depth", "budget", "steps", "tokens", "scaling_parameters", "tokens_per_parameter"),
    *("flops", "seconds", "val_bpb", "core"),
)
COLORS = 4  # of report.css
CURVE_POINTS = 7  # of a drawn parabola

Row = Mapping[str, float]


def write_series(path: Path, rows: Sequence[Row]) -> None:
    """Write one row per model. All rows have the same keys; a missing number is NaN."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {name: "" if math.isnan(value) else f"{value:.10g}" for name, value in row.items()}
        for row in rows
    )
    write_file(path, text.getvalue())


def read_series(path: Path) -> list[Row]:
    """The rows of `write_series`."""
    with path.open(newline="") as file:
        return [
            {name: float(text or "nan") for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def by_budget(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """The rows of each budget in FLOPs, by rising tokens per parameter."""
    budgets = sorted({row["budget"] for row in rows if not math.isnan(row["budget"])})
    return {
        budget: sorted(
            (row for row in rows if row["budget"] == budget),
            key=lambda row: row["tokens_per_parameter"],
        )
        for budget in budgets
    }


def parabola(points: Sequence[Point]) -> np.ndarray | None:
    """Coefficients of bits per byte as a parabola of log10(tokens per parameter).

    None with fewer than three models, or if its lowest point is not between theirs.
    """
    if len({x for x, _ in points}) < 3:
        return None
    xs = np.log10([x for x, _ in points])
    curve = np.polyfit(xs, [y for _, y in points], 2)
    if curve[0] <= 0 or not xs.min() <= -curve[1] / (2 * curve[0]) <= xs.max():
        return None
    return curve


def optimum(rows: Sequence[Row]) -> float | None:
    """Tokens per parameter at which a budget's parabola is lowest (Hoffmann et al., 2022)."""
    curve = parabola(_points(rows))
    return None if curve is None else float(10 ** (-curve[1] / (2 * curve[0])))


def _points(rows: Sequence[Row]) -> list[Point]:
    return [(row["tokens_per_parameter"], row["val_bpb"]) for row in rows]


def draw_series(sections: Sequence[Section]) -> str:
    """HTML with the charts of a logged series; a note if its file is missing or damaged."""
    blocks = []
    for section in sections:
        if section.stage != STAGE or not section.curves:
            continue
        path = Path(section.curves)
        try:
            rows = read_series(path)
            charts = [_bpb_by_flops(rows), _bpb_by_ratio(rows), _parameters(rows)]
        except (FileNotFoundError, *MALFORMED) as error:
            wrong = "missing" if isinstance(error, FileNotFoundError) else "damaged"
            blocks.append(f'<p class="note">{html.escape(f"No charts, {path} is {wrong}.")}</p>')
            continue
        blocks.append(f'<div class="charts">{"".join(charts)}</div>')
    return "".join(blocks)


def _bpb_by_flops(rows: Sequence[Row]) -> str:
    """One line per depth with budgets, else one line."""
    depths = sorted({row["depth"] for row in rows}) if by_budget(rows) else [None]
    lines = []
    for index, depth in enumerate(depths):
        points = sorted(
            (math.log10(row["flops"]), row["val_bpb"])
            for row in rows
            if depth in (None, row["depth"])
        )
        label = "the series" if depth is None else f"d{depth:.0f}"
        lines.append(Line(label=label, points=points, color=index % COLORS, markers=True))
    return line_chart("Bits per byte by training FLOPs", lines, "log10 of FLOPs")


def _bpb_by_ratio(rows: Sequence[Row]) -> str:
    """One line per budget, with its parabola; "" without budgets."""
    lines = []
    for index, (budget, models) in enumerate(by_budget(rows).items()):
        points = [(math.log10(x), y) for x, y in _points(models)]
        best, color = optimum(models), index % COLORS
        label = f"{budget:.3g} FLOPs" + (f", best at {best:.2g}" if best else "")
        lines.append(Line(label=label, points=points, color=color, markers=True))
        if (curve := parabola(_points(models))) is not None:
            xs = np.linspace(points[0][0], points[-1][0], CURVE_POINTS)
            drawn = list(zip(xs.tolist(), np.polyval(curve, xs).tolist(), strict=True))
            lines.append(Line(label="parabola", points=drawn, color=color, faint=True))
    title = "Bits per byte by tokens per parameter"
    return line_chart(title, lines, "log10 of tokens per parameter")


def _parameters(rows: Sequence[Row]) -> str:
    """Parameters of each optimizer group, by depth. The scalars would be a line at 0."""
    models = {row["depth"]: row for row in rows}
    groups = [name for name in rows[0] if name not in (*COLUMNS, "scalars")]
    lines = [
        Line(
            label=name,
            points=[(depth, models[depth][name]) for depth in sorted(models)],
            color=index % COLORS,
            markers=True,
        )
        for index, name in enumerate(groups)
    ]
    return line_chart("Parameters by group", lines, "depth")
