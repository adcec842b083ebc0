"""Line and bar charts as inline SVG, with the standard library only.

Colours are CSS classes (`s0`, `s1`, ... for series), so a page gives them for light and dark. Every text is escaped.
"""

import html
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 270  # of the viewBox; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46
MAX_POINTS = 500  # per line; a screen shows no more
ROW = 22  # height of one bar with its gap

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    points: Sequence[Point]  # by rising x
    color: int = 0
    faint: bool = False  # the noisy measurement behind a smoothed line
    markers: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:.6g}"


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a fiftieth of the points, corrected for its start at zero (as in Adam)."""
    span = min(max(len(points) / 50, 4), 50)
    factor = 1 - 2 / (span + 1)
    out, average = [], 0.0
    for index, (x, y) in enumerate(points, start=1):
        average = factor * average + (1 - factor) * y
        out.append((x, average / (1 - factor**index)))
    return out


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: equal buckets by index, each kept as its lowest and highest point."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    out = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        out += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return out


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """A figure with axes, ticks and, where there are several lines, a legend. Points that are not finite are left out.

    The first steps of a run lie far above the rest: where they would flatten it, they are cut off, and it says so.
    """
    lines = [
        Line(
            label=line.label,
            points=[point for point in line.points if all(map(math.isfinite, point))],
            color=line.color,
            faint=line.faint,
            markers=line.markers,
        )
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    x_low = min(line.points[0][0] for line in lines)
    x_high = max(line.points[-1][0] for line in lines)
    ys = [y for line in lines for _, y in line.points]
    y_low, y_high, cut = min(ys), max(ys), False
    settled = [y for line in lines for x, y in line.points if x >= x_low + 0.03 * (x_high - x_low)]
    if len(ys) > 30 and settled and max(settled) - y_low < 0.6 * (y_high - y_low):
        y_high, cut = max(settled), True
    pad = 0.06 * (y_high - y_low) or abs(y_high) * 0.05 or 1.0
    y_low, y_high = (y_low - pad if y_low < 0 else max(y_low - pad, 0.0)), y_high + pad
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1

    def place(point: Point) -> str:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_high - point[1]) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{max(y, -HEIGHT):.1f}"

    clip = f"clip-{zlib.crc32(repr((title, x_high, y_high)).encode()):x}"  # unique on the page, the same every time
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>'
    )
    for value in ticks(y_low, y_high):
        y = float(place((x_low, value)).split(",")[1])
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{tick_label(value)}</text>')
    floor = HEIGHT - BOTTOM
    for value in ticks(x_low, x_high):
        x = float(place((value, y_low)).split(",")[0])
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{floor + 18}" text-anchor="middle">{tick_label(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (TOP + floor) / 2
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>"
    )
    parts.append(f'<g clip-path="url(#{clip})">')
    for line in lines:
        points = thin(line.points)
        style = f"line s{line.color}" + (" faint" if line.faint else "")
        parts.append(f'<polyline class="{style}" points="{" ".join(map(place, points))}"/>')
    parts.append("</g>")
    for line in lines:
        if line.markers or len(line.points) == 1:
            for point in [point for point in thin(line.points, 60) if point[1] <= y_high]:
                x, y = place(point).split(",")
                parts.append(
                    f'<circle class="dot s{line.color}" cx="{x}" cy="{y}" r="3.2">'
                    f"<title>{html.escape(f'{line.label}, {x_label} {point[0]:g}: {point[1]:.4f}')}</title></circle>"
                )
    parts.append("</svg>")
    notes = _legend([(line.label, line.color, line.faint) for line in lines])
    if cut:
        notes += '<p class="note">The first steps lie above the top of the axis.</p>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}{notes}</figure>"


def bar_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    series: Sequence[tuple[str, int]],
    *,
    x_label: str,
) -> str:
    """Horizontal bars: a group per row, a bar per series (label, color). None leaves a bar out; negatives go left."""
    values = [v for _, row in rows for v in row if v is not None and math.isfinite(v)]
    if not values:
        return ""
    low, high = min(0.0, *values), max(0.0, *values)
    high = 1.0 if 0.6 < high <= 1.0 else high or 1.0
    names = min(190, 16 + 7 * max(len(name) for name, _ in rows))
    left = names + (46 if low < 0 else 0)  # the numbers of negative bars stand left of them
    right, thickness = 52, 14 if len(series) == 1 else 11
    group = max(ROW, len(series) * (thickness + 2) + 10)
    floor = TOP + group * len(rows)
    height = floor + BOTTOM

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - right)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">']
    for value in ticks(low, high, 4):
        x = f"{place(value):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{floor + 16}" text-anchor="middle">{tick_label(value)}</text>')
    for place_of_row, (name, row) in enumerate(rows):
        center = TOP + group * (place_of_row + 0.5)
        y = center + 4
        parts.append(f'<text class="name" x="{names - 8}" y="{y}" text-anchor="end">{html.escape(name)}</text>')
        y = center - len(series) * (thickness + 2) / 2
        for (label, color), value in zip(series, row, strict=True):
            if value is not None and math.isfinite(value):
                start, end = sorted((place(0.0), place(value)))
                anchor = f'x="{end + 5:.1f}"' if value >= 0 else f'x="{start - 5:.1f}" text-anchor="end"'
                parts.append(
                    f'<rect class="bar s{color}" x="{start:.1f}" y="{y + 1:.1f}" width="{max(end - start, 1):.1f}" '
                    f'height="{thickness}" rx="2"><title>{html.escape(f"{name}, {label}: {value:.4f}")}</title></rect>'
                    f'<text class="value" {anchor} y="{y + thickness / 2 + 5:.1f}">{value:.3f}</text>'
                )
            y += thickness + 2
    zero = f"{place(0.0):.1f}"
    parts.append(f'<line class="axis" x1="{zero}" x2="{zero}" y1="{TOP}" y2="{floor}"/>')
    middle = (left + WIDTH - right) / 2
    label = html.escape(x_label)
    parts.append(f'<text class="label" x="{middle}" y="{height - 8}" text-anchor="middle">{label}</text></svg>')
    legend = _legend([(label, color, False) for label, color in series])
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}{legend}</figure>"


def _legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    if len(entries) < 2:
        return ""
    items = "".join(
        f'<li><i class="key s{color}{" faint" if faint else ""}"></i>{html.escape(label)}</li>'
        for label, color, faint in entries
    )
    return f'<ul class="legend">{items}</ul>'
