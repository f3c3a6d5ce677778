"""Charts of one look: matplotlib figures, written as PNG, or as SVG that follows the theme of the page around it.

A figure's unit is a pixel of the page. `COLOURS` are those of a light page; in an SVG each becomes the variable of a style sheet.
"""

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lt_train.runtime.files import replacing

PALETTE: Mapping[str, tuple[str, str]] = {
    "ground": ("#f4f6f8", "#10151b"),
    "card": ("#ffffff", "#18202a"),
    "ink": ("#1f2933", "#e3e9f0"),
    "soft": ("#566375", "#9dabbb"),
    "line": ("#dbe1e8", "#2c3845"),
    "grid": ("#e8ecf1", "#263140"),
    "tint": ("#dff3ef", "#17382f"),
    "base": ("#76869b", "#93a5ba"),
    "trained": ("#159e87", "#2dc2a7"),
    "converted": ("#2f6fc4", "#71a9f2"),
    "lazy_ratio": ("#8658c6", "#b797ec"),
    "nll": ("#bd4b88", "#e88fbe"),
    "reach": ("#0c87a8", "#4fc4e4"),
    "kl": ("#4a8f3c", "#84c977"),
    "random": ("#5b5f66", "#b9bec6"),
    "gates": ("#b3493a", "#f08a7a"),
    "periodic": ("#8a6a0b", "#d6ae43"),
    "incorrect": ("#d5671c", "#f29350"),
}
"""Name -> the colour on a light page, on a dark one."""

COLOURS = {name: light for name, (light, _) in PALETTE.items()}

WIDTH = 460.0
"""Pixels of a chart: on a phone of 400 pixels its texts keep about ten."""

PNG_DPI = 256
"""Of 72 units to the inch: enough for 80 layers side by side."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["base"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlesize": 12.5,
    "axes.titley": 1.0,
    "errorbar.capsize": 4,
    "figure.facecolor": COLOURS["card"],
    "figure.titlesize": 12.5,
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "grid.color": COLOURS["grid"],
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0,
    "legend.columnspacing": 1.4,
    "legend.fontsize": 12.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.5,
    "legend.labelcolor": COLOURS["ink"],
    "lines.markeredgecolor": COLOURS["card"],
    "lines.markersize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "lt-train",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "xtick.bottom": False,
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "ytick.left": False,
}

styled = rc_context(STYLE)
"""Decorator of functions that make or write figures."""

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_NOTE = "note:"
_LINE, _BELOW, _RIGHT = 18.0, 46.0, 16.0
"""Pixels: of a line of text, below the last panel for its labels, and to the right of all."""


def new_figure(
    heights: Sequence[float], *, width: float = WIDTH, left: float = 58, title_lines: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other, which share their horizontal axis; pixels.

    Places are fixed: matplotlib's layout engines would double the time of a page.
    """
    title = 10 + _LINE * title_lines
    height = sum(heights) + title * len(heights) + _BELOW
    figure, top = Figure(figsize=(width / 72, height / 72), dpi=72), height
    panels: list[Axes] = []
    for each in heights:
        top -= title + each
        place = (left / width, top / height, 1 - (left + _RIGHT) / width, each / height)
        panels.append(figure.add_axes(place, sharex=panels[0] if panels else None))
        panels[-1].yaxis.set_major_locator(MaxNLocator(min(5, max(2, int(each / 30))), steps=[1, 2, 2.5, 5, 10]))
        panels[-1].tick_params(labelbottom=len(panels) == len(heights))
    return figure, panels


def add_legend(figure: Figure, handles: Sequence[Artist] | None = None, columns: int = 1) -> None:
    """Name what is drawn, below the panels: what has a label in the first, or `handles`."""
    shown = figure.axes[0].get_legend_handles_labels()[0] if handles is None else list(handles)
    labels = [textwrap.fill(str(handle.get_label()), 56 // columns) for handle in shown]
    lines = max(sum(label.count("\n") + 1 for label in column) for column in np.array_split(labels, columns))
    former, height = figure.bbox.height, figure.bbox.height + _LINE * lines
    figure.set_figheight(height / 72)
    for axes in figure.axes:
        place = axes.get_position()
        bottom = place.y0 * former + height - former
        axes.set_position((place.x0, bottom / height, place.width, place.height * former / height))
    figure.legend(handles=shown, labels=labels, loc="lower left", bbox_to_anchor=(0, 0), ncols=columns)


def note(artist: Artist, text: str) -> None:
    """Give `artist` a tooltip in the SVG: the backend writes its gid as an id, which `to_svg` looks for."""
    artist.set_gid(_NOTE + printable(text))


def note_of(artist: Artist) -> str | None:
    """The tooltip that `note` gave."""
    return (artist.get_gid() or "").removeprefix(_NOTE) or None


def printable(text: str) -> str:
    """The text without characters that XML or a font engine refuses."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


@styled
def write_png(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        _save(figure, temporary, "png")


@styled
def to_svg(figure: Figure, label: str) -> str:
    """An SVG element for a page: no links, no ids but of shapes used twice, texts in the page's font."""
    written = io.BytesIO()
    _save(figure, written, "svg")
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}clipPath", f"{_SVG}style"):
                parent.remove(child)
    used = {element.get(_HREF, "").removeprefix("#") for element in root.iter(f"{_SVG}use")}
    for element in list(root.iter()):
        _clean(element, used)
    width, height = (72 * inches for inches in figure.get_size_inches())
    root.attrib = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    root.attrib |= {"role": "img", "aria-label": printable(label), "pointer-events": "none"}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)  # inside HTML an svg element needs no namespace
    return re.sub(r'<path [^>]*style="fill:none" />|<defs />', "", ElementTree.tostring(root, encoding="unicode"))


def _save(figure: Figure, target: Path | io.BytesIO, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a page has further fonts
        if kind == "png":
            figure.savefig(target, format="png", dpi=PNG_DPI)
        else:
            figure.savefig(target, format="svg", facecolor="none")


def _clean(element: ElementTree.Element, used: set[str]) -> None:
    """Leave colours, fonts and what is hovered to the page, and drop what it does not need: about two thirds of the bytes."""
    attributes = element.attrib
    identity = attributes.pop("id", "")
    attributes.pop("clip-path", None)
    if identity.startswith(_NOTE):
        title = ElementTree.Element(f"{_SVG}title")
        title.text = identity.removeprefix(_NOTE)
        element.insert(0, title)
        attributes["pointer-events"] = "visiblePainted"
    elif identity in used:
        attributes["id"] = identity
    if (link := attributes.pop(_HREF, None)) is not None:
        attributes["href"] = link
    for name, value in attributes.items():
        if name == "style":
            value = re.sub(r"font-family:[^;]*;?|stroke-line(cap|join):[^;]*;?|(?<=[;:]) ", "", value).removesuffix(";")
            attributes[name] = re.sub("#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), value)
        elif name in ("d", "x", "y", "transform"):
            attributes[name] = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
    if "d" in attributes:
        attributes["d"] = re.sub(r" *([A-Za-z]) *", r"\1", attributes["d"])
    if attributes.get("transform", "").startswith("rotate(-0 "):
        del attributes["transform"]
    if element.tag not in (f"{_SVG}text", f"{_SVG}title"):
        element.text = None
    element.tail = None


_VARIABLES = {light: f"var(--{name})" for name, light in COLOURS.items()}
