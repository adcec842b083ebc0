import json
import math
import re

import numpy as np
import pytest

from nanochat_jax.metrics import read_metrics
from nanochat_jax.report import charts, curves, sections


def line_points(svg: str) -> list[tuple[float, float]]:
    points = re.search(r'<polyline class="line s0" points="([^"]*)"', svg)[1]
    return [tuple(map(float, point.split(","))) for point in points.split()]


def test_line_chart_maps_points_to_the_axes():
    line = charts.Line(label="loss", points=[(0, 4.0), (50, 2.0), (100, 3.0), (100, math.nan)])
    svg = charts.line_chart("t", [line])
    (x0, y0), (x1, y1), (x2, y2) = line_points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    # SVG's y grows downwards
    assert y1 - y0 == pytest.approx(2 * (y1 - y2), abs=0.2) and y0 < y2 < y1
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)
    ticks = {float(label): float(y) for y, label in labels}
    assert ticks[3.0] - 4 == pytest.approx(y2, abs=0.2)


def test_line_chart_is_not_flattened_by_the_first_steps():
    points = [(s, 2.0 + 0.5 * math.exp(-s / 500) + 9 * math.exp(-s / 3)) for s in range(1000)]
    svg = charts.line_chart("t", [charts.Line(label="loss", points=points)])
    ys = [y for x, y in line_points(svg)]
    assert ys[-1] - ys[len(ys) // 5] > 0.3 * charts.HEIGHT
    assert "first steps are above" in svg


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


def test_metrics_of_a_resumed_run_count_each_step_once_and_skip_a_torn_line(tmp_path, caplog):
    rows = [{"step": s, "kind": "train", "loss": 1.0} for s in (0, 1, 2, 3)]
    rows += [{"step": s, "kind": "train", "loss": 2.0} for s in (2, 3, 4)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), '{"step": 5, "kind": "tra']))
    train = curves.rows_by_kind(read_metrics(path))["train"]
    assert [(row["step"], row["loss"]) for row in train] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert "1 damaged lines" in caplog.text


def test_curves_of_each_stage_are_drawn_and_missing_files_named(tmp_path):
    rows = [{"step": s, "kind": "train", "loss": 3 + math.exp(-s / 50)} for s in range(300)]
    rows += [{"step": s, "kind": "eval", "val_bpb": 1 + math.exp(-s / 50)} for s in (0, 150)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections.log_section(tmp_path, "Base model training", [], stage="base_train", curves=path)
    sections.log_section(tmp_path, "Midtraining", [], stage="mid_train", curves=tmp_path / "lost")
    drawn = curves.draw_curves(sections.read_sections(tmp_path))
    assert re.findall('aria-label="(.*?)"', drawn) == [
        "Pretraining: training loss",
        "Pretraining: validation bits per byte",
    ]
    assert "lost is missing" in drawn


def test_thinning_keeps_the_extremes():
    points = [(s, math.sin(s)) for s in range(20000)]
    points[777], points[12345] = (777, 50.0), (12345, -50.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MAX_POINTS + 2 and kept == sorted(kept)
    assert {(777, 50.0), (12345, -50.0)} <= set(kept)
