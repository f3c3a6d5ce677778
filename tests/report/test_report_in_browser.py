"""The report in a headless Chromium: it is drawn, it complains of nothing, and its filters find what they should."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lt_train.report import write_report
from tests.support.headless import CHROMIUM, Tab, headless_tab
from tests.support.made_runs import ANSWERS, made_run, record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to open the report: apt-get install chromium"),
]
LONG = "<think>Let me think of gulls. <b>bold</b> </script>" + "and so on " * 300 + "</think>It is \\boxed{2}"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    answers = {**ANSWERS, "trained": [replace(ANSWERS["trained"][0], text=LONG), *ANSWERS["trained"][1:]]}
    return write_report([made_run(folder, answers=answers)], folder / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Tab]:
    with headless_tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser, report) -> Iterator[Tab]:
    """The report, just opened; whatever the page does, the console must stay empty and nothing be fetched."""
    browser.complaints.clear()  # those of a page that another test opened
    browser.requests.clear()
    browser.look(1280)
    browser.open(report)
    yield browser
    assert browser.complaints == []
    assert {url for url in browser.requests if url != "about:blank"} <= {report.resolve().as_uri()}


def choose(tab: Tab, name: str, value: str) -> None:
    """As a user does: set a control, which then says that it was changed; wait for the list to follow, of typing after 150 ms."""
    pause = 150 if name == "text" else 0
    tab.run(
        f"""(() => {{ const control = document.getElementById("filters").elements["{name}"];
        if (control instanceof RadioNodeList) [...control].find((radio) => radio.value === {value!r}).click();
        else {{ control.value = {value!r}; control.dispatchEvent(new Event("input", {{bubbles: true}})); }}
        return new Promise((done) => setTimeout(done, {pause})); }})()"""
    )


def count(tab: Tab) -> str:
    return tab.run("document.getElementById('count').textContent")


def listed(tab: Tab) -> list[str]:
    return tab.run("[...document.querySelectorAll('.sample > summary')].map((row) => row.innerText.replaceAll('\\n', ' '))")


@pytest.mark.parametrize("width", [400, 1280, 2560])
def test_the_page_is_drawn_in_light_and_dark_and_fits_its_width(tab, report, tmp_path, width):
    brightness = []
    for dark in (False, True):
        tab.look(width, dark=dark)
        tab.open(report)
        pixels = np.asarray(Image.open(tab.screenshot(tmp_path / "page.png")).convert("L"), dtype=float)
        assert pixels.shape[1] == width and pixels.std() > 5, "nothing is drawn"
        brightness.append(pixels.mean())
        assert tab.run("document.documentElement.scrollWidth <= window.innerWidth"), "the page is wider than its window"
    light, dark = brightness
    assert light > 200 > 80 > dark


def test_a_table_with_long_names_and_numbers_fits_a_laptop(browser, tmp_path):
    lost = [replace(record, correct=False, score=0.0, tokens=32_768) for record in ANSWERS["base"]]
    kept = [replace(record, correct=True, score=1.0) for record in ANSWERS["base"]]
    answers = {"base": kept, "converted-by-lazy_ratio": lost, "converted": lost, "trained": kept}
    browser.look(1280)
    browser.open(write_report([made_run(tmp_path, answers=answers)], tmp_path / "report.html"))
    beyond = browser.run("[...document.querySelectorAll('.table')].map((box) => box.scrollWidth - box.clientWidth)")
    assert max(beyond) <= 1


def test_charts_have_colours_and_their_texts_can_be_read_on_a_phone(tab, report):
    tab.look(400)
    tab.open(report)
    trained = """[...document.querySelectorAll('.drawing path')].map((path) => getComputedStyle(path).stroke)"""
    assert "rgb(21, 158, 135)" in tab.run(trained)
    tab.run("document.documentElement.dataset.theme = 'dark'")
    assert "rgb(45, 194, 167)" in tab.run(trained) and "rgb(21, 158, 135)" not in tab.run(trained)
    smallest = tab.run(
        """Math.min(...[...document.querySelectorAll('.drawing text')].map((text) => parseFloat(getComputedStyle(text).fontSize)
        * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width))"""
    )
    assert smallest >= 9


def test_texts_of_charts_stay_inside_and_are_in_the_font_of_the_page(tab, report):
    for width in (400, 1280):
        tab.look(width)
        tab.open(report)
        beyond = tab.run(
            """[...document.querySelectorAll('.drawing text')].filter((text) => {
            const box = text.getBoundingClientRect(), svg = text.ownerSVGElement.getBoundingClientRect();
            return box.left < svg.left - 1 || box.right > svg.right + 1 || box.top < svg.top - 1 || box.bottom > svg.bottom + 1;
            }).map((text) => text.textContent)"""
        )
        assert beyond == []
    fonts = tab.run("[...document.querySelectorAll('.drawing text')].map((text) => getComputedStyle(text).fontFamily)")
    assert set(fonts) == {tab.run("getComputedStyle(document.body).fontFamily")}


def test_a_point_shows_its_tooltip_and_the_layer_under_a_point_its_own(tab):
    hovered = """(find) => { const target = find(); target.scrollIntoView({block: 'center'});
        const box = target.getBoundingClientRect();
        let hit = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
        while (hit && !hit.querySelector(':scope > title')) hit = hit.parentElement;
        return hit && hit.querySelector('title').textContent; }"""
    accuracy = "[...document.querySelectorAll('title')].find((title) => title.textContent.includes('accuracy 75')).parentElement"
    assert tab.run(f"({hovered})(() => {accuracy}.querySelector('use'))").startswith("base: accuracy 75.0 %")
    layer = "[...document.querySelectorAll('title')].find((title) => title.textContent.startsWith('layer 1: ')).parentElement"
    assert "keeps full attention in this run" in tab.run(f"({hovered})(() => {layer}.querySelector('path'))")


def test_filters_find_evaluation_model_verdict_and_text(tab):
    assert count(tab) == "12 of 12 samples"
    choose(tab, "verdict", "incorrect")
    assert count(tab) == "5 of 12 samples"
    choose(tab, "variant", "reach, untrained")
    assert count(tab) == "3 of 12 samples"
    choose(tab, "verdict", "truncated")
    assert [row.split()[:3] for row in listed(tab)] == [["✂", "truncated", "p1"]]
    choose(tab, "verdict", "lost")
    assert count(tab) == "2 of 12 samples"
    choose(tab, "variant", "")
    choose(tab, "verdict", "won")
    assert [row.split()[2] for row in listed(tab)] == ["p3"]
    choose(tab, "verdict", "")
    choose(tab, "text", "GULLS")
    assert [row.split()[2] for row in listed(tab)] == ["p0"]
    choose(tab, "text", "what is 3+3")
    assert count(tab) == "3 of 12 samples"
    choose(tab, "text", "")
    choose(tab, "order", "longest")
    assert "512 tokens" in listed(tab)[0]


def test_filters_come_back_with_the_address(tab, report):
    choose(tab, "verdict", "incorrect")
    fragment = tab.run("location.hash")
    tab.open(report, fragment)
    assert fragment == "#samples?verdict=incorrect" and count(tab) == "5 of 12 samples"


def test_a_sample_opens_to_problem_folded_reasoning_and_both_answers(tab):
    choose(tab, "text", "so on and so on")
    choose(tab, "text", "")
    choose(tab, "variant", "reach, trained")
    tab.run("document.querySelector('.sample > summary').click()")
    tab.wait_for("document.querySelector('.sample .body')")
    shown = tab.run("document.querySelector('.sample .body').innerText")
    assert "What is 1+1?" in shown and "It is \\boxed{2}" in shown and "gulls" not in shown
    assert tab.run("[...document.querySelectorAll('.answers p')].map((p) => p.innerText)")[:3] == ["2", "2", "✓ correct"]
    tab.run("document.querySelector('.body summary').click()")
    tab.wait_for("document.querySelector('.body details pre')")
    reasoning = tab.run("document.querySelector('.body details pre').textContent")
    assert reasoning == LONG[: LONG.index("</think>") + len("</think>")]
    tab.run("[...document.querySelectorAll('.chips button')].find((chip) => chip.innerText.includes('untrained')).click()")
    assert tab.run("document.querySelector('.chips [aria-pressed=true]').innerText").startswith("reach, untrained")


def test_what_was_searched_for_is_marked_in_an_opened_sample(tab):
    choose(tab, "text", "gulls")
    tab.run("document.querySelector('.sample > summary').click()")
    tab.wait_for("document.querySelector('.body mark')")
    assert tab.run("document.querySelector('.body mark').textContent") == "gulls"


def test_the_theme_button_goes_round(tab):
    seen = []
    for _ in range(3):
        tab.run("document.getElementById('theme').click()")
        seen.append(tab.run("getComputedStyle(document.documentElement).colorScheme"))
    assert seen == ["dark", "light", "light dark"]


def test_thousands_of_long_samples_are_listed_and_searched_in_no_time(browser, tmp_path):
    problems = [(f"p{number}", f"What is {number}?", "2") for number in range(1500)]
    records = [record(key, text=f"<think>{'and so on ' * 500}{key} end</think>It is 2") for key, _, _ in problems]
    run = made_run(tmp_path, answers={"base": records, "trained": records}, problems=problems)
    started = time.monotonic()
    browser.open(write_report([run], tmp_path / "report.html"))
    assert count(browser) == "3,000 of 3,000 samples"
    assert len(listed(browser)) <= 120, "rows are drawn as they come into view"
    choose(browser, "text", "p1234 end")
    assert count(browser) == "2 of 3,000 samples"
    browser.run("document.getElementById('more').scrollIntoView()")
    choose(browser, "text", "")
    browser.run("document.getElementById('more').scrollIntoView()")
    browser.wait_for("document.querySelectorAll('.sample').length >= 80")
    assert time.monotonic() - started < 30
