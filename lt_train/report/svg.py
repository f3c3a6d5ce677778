"""SVG by hand: elements, scales, axes. Colours and fonts are the style sheet's, by class, so a chart follows the page's theme."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

NICE_STEPS = (1, 2, 2.5, 5, 10)
MARKERS = ("circle", "square", "diamond", "triangle")
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
"""Shapes of points and dashes of lines tell runs apart; colours tell variants apart."""


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; `class_` stands for class, an underscore in any other name for a hyphen. None leaves an attribute out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"' for key, value in attributes.items() if value is not None
    )
    inside = Markup("").join(children)
    return Markup(f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>")


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `end`; `log`: equal ratios are equal distances."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        slack = 1e-9 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers at equal steps that cover [low, high], at most one step beyond."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in NICE_STEPS if nice * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def binary_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of two inside [low, high], thinned evenly; where there are fewer than three, halves or quarters of them between."""
    powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
    every = max(1, math.ceil(len(powers) / most))
    found = [2.0**power for power in powers if power % every == 0] or [2.0**power for power in powers]
    for parts in (2, 4):
        if len(found) < 3:
            found = _parts_of_two(low, high, parts)
    return found


def _parts_of_two(low: float, high: float, parts: int) -> list[float]:
    """Numbers inside [low, high] that cut every doubling into equal parts."""
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)))
    between = [2.0**power * (1 + part / parts) for power in powers for part in range(parts)] + [2.0**powers.stop]
    return [value for value in between if low * (1 - 1e-9) <= value <= high * (1 + 1e-9) and value == int(value)]


def decimal_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high]."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Plot:
    """The axes of one chart, in pixels of its own coordinates."""

    width: float
    height: float
    x: Scale
    y: Scale
    headroom: float = 18
    """Between the top of the axes and the vertical axis' name."""

    def document(self, label: str, *children: Markup) -> Markup:
        return element(
            "svg",
            *children,
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            width=f"{self.width:g}",
            height=f"{self.height:g}",
            role="img",
            aria_label=label,
        )

    def axes(
        self,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        x_label: str,
        y_label: str,
    ) -> Markup:
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        parts = []
        for value, text in y_ticks:
            at = self.y(value)
            parts.append(element("line", class_="grid", x1=left, x2=right, y1=at, y2=at))
            parts.append(element("text", escape(text), class_="tick y", x=left - 7, y=at + 4))
        for value, text in x_ticks:
            at = self.x(value)
            parts.append(element("line", class_="axis", x1=at, x2=at, y1=bottom, y2=bottom + 4))
            parts.append(element("text", escape(text), class_="tick x", x=at, y=bottom + 17))
        parts.append(element("line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom))
        parts.append(element("text", escape(x_label), class_="name x", x=(left + right) / 2, y=bottom + 36))
        parts.append(element("text", escape(y_label), class_="name y", x=2.0, y=top - self.headroom))
        return Markup("").join(parts)


def plot(
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    log_x: bool = False,
    log_y: bool = False,
    width: float = 460,
    height: float = 290,
) -> Plot:
    """A plot of these ranges, with room for its labels."""
    return Plot(width, height, Scale(*x, 58, width - 24, log_x), Scale(*y, height - 44, 36, log_y))


def tooltip(text: str) -> Markup:
    return element("title", escape(text))


def marker(kind: int, x: float, y: float, note: str | None = None, radius: float = 5.0) -> Markup:
    """A point whose shape is that of run `kind`."""
    shape, inside = MARKERS[kind % len(MARKERS)], () if note is None else (tooltip(note),)
    if shape == "circle":
        return element("circle", *inside, class_="point", cx=x, cy=y, r=radius)
    corners = {
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.25), (1.15, 0.85), (-1.15, 0.85)),
    }[shape]
    points = " ".join(f"{x + dx * radius:.2f},{y + dy * radius:.2f}" for dx, dy in corners)
    return element("polygon", *inside, class_="point", points=points)


def path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def steps(points: Sequence[tuple[float, float]]) -> str:
    """A path that keeps its height up to the next point."""
    drawn = f"M{points[0][0]:.2f} {points[0][1]:.2f}"
    return drawn + "".join(f"H{x:.2f}V{y:.2f}" for x, y in points[1:])


def padded(low: float, high: float, least: float, share: float = 0.08) -> tuple[float, float]:
    """A range a little wider than [low, high], and no narrower than `least`."""
    pad = max(share * (high - low), (least - (high - low)) / 2)
    return low - pad, high + pad


def labelled(values: Sequence[float], write: Callable[[float], str]) -> list[tuple[float, str]]:
    return [(value, write(value)) for value in values]
