"""Scales and elements of the charts."""

import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.report.svg import MARKERS, Scale, binary_ticks, element, linear_ticks, marker, tooltip

VALUES = st.floats(-1e6, 1e6, allow_nan=False)


@given(VALUES, st.floats(1e-6, 1e6))
def test_ticks_are_at_equal_steps_and_cover_the_values_without_more_than_a_step_beyond(low, width):
    ticks = linear_ticks(low, low + width)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert 2 <= len(ticks) <= 9
    assert max(steps) - min(steps) <= 1e-6 * max(steps) + 1e-9
    slack = 1e-6 * width + 1e-9
    assert ticks[0] <= low + slack and low + width <= ticks[-1] + slack
    assert low - ticks[0] <= steps[0] + slack and ticks[-1] - low - width <= steps[0] + slack


def test_ticks_are_numbers_that_people_count_in():
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(0.93, 1.0) == pytest.approx([0.92, 0.94, 0.96, 0.98, 1.0])


@given(st.floats(1, 1e6), st.floats(8, 1e4))
def test_ticks_of_lengths_are_powers_of_two_inside_the_axis(low, times):
    ticks = binary_ticks(low, low * times)
    assert ticks and all(low * 0.999 <= tick <= low * times * 1.001 and tick == 2 ** round(tick).bit_length() / 2 for tick in ticks)


@given(st.floats(8, 1e6), st.floats(2, 8))
def test_a_narrow_range_of_lengths_has_ticks_between_powers_too(low, times):
    ticks = binary_ticks(low, low * times)
    assert len(ticks) >= 3 and ticks == sorted(set(ticks)) and all(low * 0.999 <= tick <= low * times * 1.001 for tick in ticks)


@given(st.floats(1, 1e3), st.floats(1.1, 1e3), st.floats(0, 1))
def test_a_log_scale_puts_equal_ratios_at_equal_distances(low, times, share):
    scale = Scale(low, low * times, 50, 400, log=True)
    assert scale(low * times**share) == pytest.approx(50 + 350 * share, abs=1e-6)


def test_texts_and_attributes_are_escaped():
    drawn = str(element("g", tooltip('</title><script>alert("x")</script>'), class_='"><script>'))
    assert "<script" not in drawn
    assert ET.fromstring(drawn).find("title").text == '</title><script>alert("x")</script>'


def test_runs_are_told_apart_by_shape():
    assert len({str(marker(run, 0.0, 0.0)) for run in range(len(MARKERS))}) == len(MARKERS)
