"""Line charts as inline SVG.

Colors are CSS classes (`s0`, `s1`, ... by series), which the page defines for light and dark.
matplotlib would write fixed colors and ten times the bytes, and the package does not depend on it.
"""

import dataclasses
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 250  # of the viewBox; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 46, 466, 12, 208  # edges of the plot area
MAX_POINTS = 500  # per line; a screen shows no more

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    label: str
    points: Sequence[Point]  # by rising x
    color: int = 0
    faint: bool = False  # the noisy measurement behind a smoothed line
    markers: bool = False


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About 5 round numbers (1, 2 or 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(step, 1) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about 2% of the points, bias-corrected as in Adam."""
    span = min(max(len(points) / 50, 4), 50)
    factor = 1 - 2 / (span + 1)
    smoothed, average = [], 0.0
    for index, (x, y) in enumerate(points, start=1):
        average = factor * average + (1 - factor) * y
        smoothed.append((x, average / (1 - factor**index)))
    return smoothed


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """About `limit` points: the lowest and the highest of each group of consecutive points."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [p for group in groups for p in sorted({min(group, key=_y), max(group, key=_y)})]


@dataclass(frozen=True)
class _Axes:
    """The range of the data, and its mapping to the plot area."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    cut: bool  # the first points lie above y_high
    whole: bool  # x values are integers

    @classmethod
    def around(cls, points: Sequence[Point]) -> "_Axes":
        xs, ys = [x for x, _ in points], [y for _, y in points]
        x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)
        settled = max(y for x, y in points if x >= x_low + 0.03 * (x_high - x_low))
        cut = len(points) > 30 and settled - y_low < 0.6 * (y_high - y_low)
        y_high = settled if cut else y_high
        pad = 0.06 * (y_high - y_low) or abs(y_high) * 0.05 or 1.0
        y_low, y_high = (y_low - pad if y_low < 0 else max(y_low - pad, 0.0)), y_high + pad
        if x_high == x_low:
            x_low, x_high = x_low - 1, x_high + 1
        return cls(x_low, x_high, y_low, y_high, cut, all(x == int(x) for x in xs))

    def position(self, point: Point) -> Point:
        x = LEFT + (point[0] - self.x_low) / (self.x_high - self.x_low) * (RIGHT - LEFT)
        y = TOP + (self.y_high - point[1]) / (self.y_high - self.y_low) * (BOTTOM - TOP)
        return round(x, 1), round(max(y, -HEIGHT), 1)

    def svg(self, x_name: str) -> str:
        parts = [_rule("axis", LEFT, BOTTOM, RIGHT, BOTTOM)]
        for value in ticks(self.y_low, self.y_high):
            _, y = self.position((self.x_low, value))
            parts += [_rule("grid", LEFT, y, RIGHT, y), _tick(LEFT - 7, y + 4, value, "end")]
        for value in ticks(self.x_low, self.x_high, whole=self.whole):
            x, _ = self.position((value, self.y_low))
            parts += [_rule("axis", x, BOTTOM, x, BOTTOM + 4), _tick(x, BOTTOM + 18, value)]
        parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 6, x_name, "label"))
        return "".join(parts)


def line_chart(title: str, lines: Sequence[Line], x_name: str = "step") -> str:
    """A figure with axes and, for several lines, a legend; "" without a finite point.

    `x_name` is below the horizontal axis.

    If the first steps are so high that they would flatten the rest, they are cut off, with a note.
    """
    lines = [
        dataclasses.replace(line, points=[p for p in line.points if all(map(math.isfinite, p))])
        for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    axes = _Axes.around([point for line in lines for point in line.points])
    area = f'x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"'
    box = f'viewBox="{LEFT} {TOP} {RIGHT - LEFT} {BOTTOM - TOP}"'
    curves = "".join(_polyline(line, axes) for line in lines)
    dots = "".join(_markers(line, axes, x_name) for line in lines)
    keys = [f'<li><i class="key {_style(i)}"></i>{html.escape(i.label)}</li>' for i in lines]
    notes = [f'<ul class="legend">{"".join(keys)}</ul>'] if len(lines) > 1 else []
    if axes.cut:
        notes.append('<p class="note">The first steps are above the top of the axis.</p>')
    title = html.escape(title)
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f"{axes.svg(x_name)}<svg {area} {box}>{curves}</svg>{dots}</svg>{''.join(notes)}</figure>"
    )


def _style(line: Line) -> str:
    return f"s{line.color}" + " faint" * line.faint


def _polyline(line: Line, axes: _Axes) -> str:
    path = " ".join(f"{x},{y}" for x, y in map(axes.position, thin(line.points)))
    return f'<polyline class="line {_style(line)}" points="{path}"/>'


def _markers(line: Line, axes: _Axes, x_name: str) -> str:
    """Dots with tooltips, for lines with few points."""
    dots = []
    for point in thin(line.points, 60) if line.markers or len(line.points) == 1 else []:
        if point[1] <= axes.y_high:
            x, y = axes.position(point)
            tip = html.escape(f"{line.label}, {x_name} {point[0]:g}: {point[1]:.4f}")
            circle = f'<circle class="dot s{line.color}" cx="{x}" cy="{y}" r="3.2">'
            dots.append(f"{circle}<title>{tip}</title></circle>")
    return "".join(dots)


def _rule(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str = "middle") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {at}>{html.escape(text)}</text>'


def _tick(x: float, y: float, value: float, anchor: str = "middle") -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return _text(x, y, f"{value / size:g}{suffix}", "tick", anchor)
    return _text(x, y, f"{value:.6g}", "tick", anchor)


def _y(point: Point) -> float:
    return point[1]
