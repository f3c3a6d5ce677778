"""Figures as PNG and as SVG for a page."""

import io
import xml.etree.ElementTree as ET

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lt_train.runtime.drawing import COLOURS, PALETTE, add_legend, new_figure, note, note_of, printable, styled, to_svg, write_png


@styled
def with_legend_of_columns(*labels: str) -> Figure:
    figure, (axes,) = new_figure([200.0])
    for label in labels:
        axes.plot([1, 2], [0.5, 0.25], label=label)
    axes.set_xlabel("step")
    add_legend(figure, columns=2)
    return figure


@styled
def drawn(label: str = "training", tooltip: str = "0.5 at step 1") -> Figure:
    figure, (axes,) = new_figure([200.0])
    (line,) = axes.plot([1, 2, 3], [0.5, 0.25, 0.125], color=COLOURS["trained"], label=label)
    note(line, tooltip)
    add_legend(figure)
    return figure


def test_colours_of_an_svg_are_those_of_the_page():
    svg = to_svg(drawn(), "losses")
    assert "stroke:var(--trained)" in svg and "fill:var(--ink)" in svg
    assert "#" not in svg.replace('href="#', "").replace("&#", "")
    assert len(set(COLOURS.values())) == len(PALETTE)


def test_a_note_is_the_tooltip_of_its_artist_alone():
    figure = drawn()
    root = ET.fromstring(to_svg(figure, "losses"))
    ((parent, title),) = [(group, child) for group in root.iter("g") for child in group if child.tag == "title"]
    assert title.text == "0.5 at step 1" == note_of(figure.axes[0].lines[0])
    assert parent.find("path") is not None and parent.get("pointer-events") == "visiblePainted"
    assert root.get("pointer-events") == "none"


def test_texts_are_escaped_and_no_formulas_and_what_xml_refuses_is_replaced():
    label, tooltip = "$\\frac{1}$ </title><script>", '</title><script>alert("x")</script>\x00\ud83d'
    svg = to_svg(drawn(printable(label), tooltip), "<b>")
    assert "<script" not in svg
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "<b>"
    assert next(root.iter("title")).text == '</title><script>alert("x")</script>\ufffd\ufffd'
    assert label in [text.text for text in root.iter("text")]


def test_an_svg_refers_to_nothing_outside_itself_and_names_no_font():
    svg = to_svg(drawn(), "losses")
    assert "url(" not in svg and "http" not in svg and "font-family" not in svg
    root = ET.fromstring(svg)
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    assert ids == {element.get("href").removeprefix("#") for element in root.iter("use")}


def test_the_same_figure_is_the_same_svg():
    assert to_svg(drawn(), "losses") == to_svg(drawn(), "losses")


@pytest.mark.parametrize("label", ["short", "a label that is much longer than a chart is wide, and continues on a second line"])
def test_the_legend_lies_below_and_inside_the_figure(label):
    figure = drawn(label)
    to_svg(figure, "losses")
    legend, (axes,) = figure.legends[0].get_window_extent(), figure.axes
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width and 0 <= legend.y0 < legend.y1 < axes.bbox.y0
    assert axes.bbox.height > 120


def test_a_legend_of_two_columns_has_room_for_the_longer_one():
    long = "a label that takes two lines of its column"
    figure = with_legend_of_columns(long, long, "short", "short")
    to_svg(figure, "losses")
    (axes,) = figure.axes
    assert figure.legends[0].get_window_extent().y1 < axes.xaxis.get_tightbbox().y0


def test_a_png_replaces_a_former_one_in_one_step(tmp_path):
    path = tmp_path / "deep/picture.png"
    for _ in range(2):
        write_png(drawn(), path)
    height, width, _ = imread(io.BytesIO(path.read_bytes()), format="png").shape
    assert width > 1600 and height > 700
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
