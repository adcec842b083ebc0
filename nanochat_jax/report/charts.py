"""Line charts as inline SVG, with the standard library only.

Colours are CSS classes (`s0`, `s1`, ... for series), so a page gives them for light and dark.
Every text is escaped.
"""

import dataclasses
import html
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 270  # of the viewBox; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 46
MAX_POINTS = 500  # per line; a screen shows no more

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    points: Sequence[Point]  # by rising x
    color: int = 0
    faint: bool = False  # the noisy measurement behind a smoothed line
    markers: bool = False


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]; `whole`:
    integers alone.
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fiftieth of the points, corrected for its start at
    zero (as in Adam).
    """
    span = min(max(len(points) / 50, 4), 50)
    factor = 1 - 2 / (span + 1)
    out, average = [], 0.0
    for index, (x, y) in enumerate(points, start=1):
        average = factor * average + (1 - factor) * y
        out.append((x, average / (1 - factor**index)))
    return out


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: equal buckets by index, each kept as its lowest and highest
    point.
    """
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        point for bucket in buckets for point in sorted({min(bucket, key=_y), max(bucket, key=_y)})
    ]


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """A figure with axes, ticks and, where there are several lines, a legend. Points that are not
    finite are left out.

    The first steps of a run lie far above the rest: where they would flatten it, they are cut off,
    and it says so.
    """
    lines = [
        dataclasses.replace(line, points=[p for p in line.points if all(map(math.isfinite, p))])
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    points = [point for line in lines for point in line.points]
    x_low, x_high, y_low, y_high = (
        min(points)[0],
        max(points)[0],
        min(map(_y, points)),
        max(map(_y, points)),
    )
    settled = max(y for x, y in points if x >= x_low + 0.03 * (x_high - x_low))
    cut = len(points) > 30 and settled - y_low < 0.6 * (y_high - y_low)
    if cut:
        y_high = settled
    pad = 0.06 * (y_high - y_low) or abs(y_high) * 0.05 or 1.0
    y_low, y_high = (y_low - pad if y_low < 0 else max(y_low - pad, 0.0)), y_high + pad
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (right - LEFT)
        y = TOP + (y_high - point[1]) / (y_high - y_low) * (floor - TOP)
        return round(x, 1), round(max(y, -HEIGHT), 1)

    # unique on the page, the same every time
    clip = f"clip-{zlib.crc32(repr((title, x_high, y_high)).encode()):x}"
    parts = [
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{floor - TOP}"/></clipPath>'
    ]
    for value in ticks(y_low, y_high):
        _, y = place((x_low, value))
        parts += [
            _rule("grid", LEFT, y, right, y),
            _text(LEFT - 7, y + 4, _number(value), "tick", "end"),
        ]
    # there is no half a step
    for value in ticks(x_low, x_high, whole=all(x == int(x) for x, _ in points)):
        x, _ = place((value, y_low))
        parts += [
            _rule("axis", x, floor, x, floor + 4),
            _text(x, floor + 20, _number(value), "tick"),
        ]
    parts += [
        _rule("axis", LEFT, floor, right, floor),
        _text((LEFT + right) / 2, HEIGHT - 8, x_label, "label"),
    ]
    parts.append(
        f'<g transform="translate(13 {(TOP + floor) / 2}) rotate(-90)">{_text(0, 0, y_label, "label")}</g>'
    )
    for line in lines:
        style = f"line s{line.color}" + " faint" * line.faint
        path = " ".join(f"{x},{y}" for x, y in map(place, thin(line.points)))
        parts.append(f'<g clip-path="url(#{clip})"><polyline class="{style}" points="{path}"/></g>')
    for line in lines:
        shown = thin(line.points, 60) if line.markers or len(line.points) == 1 else []
        for point in shown:
            if point[1] <= y_high:
                x, y = place(point)
                tip = html.escape(f"{line.label}, {x_label} {point[0]:g}: {point[1]:.4f}")
                parts.append(
                    f'<circle class="dot s{line.color}" cx="{x}" cy="{y}" r="3.2"><title>{tip}</title></circle>'
                )
    notes = '<p class="note">The first steps lie above the top of the axis.</p>' if cut else ""
    if len(lines) > 1:
        keys = "".join(
            f'<li><i class="key s{line.color}{" faint" * line.faint}"></i>{html.escape(line.label)}</li>'
            for line in lines
        )
        notes = f'<ul class="legend">{keys}</ul>{notes}'
    title = html.escape(title)
    return (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{''.join(parts)}</svg>{notes}</figure>"
    )


def _rule(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "middle") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _number(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:.6g}"


def _y(point: Point) -> float:
    return point[1]
