"""The report as a file: what stands in it, that nothing of the data becomes markup, and what stops it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lt_train.report import samples, write_report
from lt_train.runtime.errors import UserError
from tests.support.made_runs import ANSWERS, PROBLEMS, gates_profile, made_run, record

NASTY = "</script><script>document.title='owned'</script><!--<img src=x onerror=alert(1)> & \u2028 \ud83d \x00 ]]> 证明"


class Page(HTMLParser):
    """Elements, attributes and texts of a page; JSON by the id of its script."""

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.attributes, self.visible, self.data = text, [], [], "", {}
        self._stack = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop()[0] != tag:
            pass

    def handle_data(self, text):
        tag, attributes = self._stack[-1] if self._stack else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data[attributes["id"]] = json.loads(text)
        elif tag not in ("script", "style"):
            self.visible += text


def page_of(*runs: Path) -> Page:
    return Page(write_report(runs, runs[0].parent / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    """Of an unchanged run."""
    return page_of(made_run(tmp_path_factory.mktemp("runs")))


def test_the_page_shows_scores_charts_and_every_sample(page):
    for text in ("75.0 ± 25.0", "reach, trained", "1.200 ± 0.115", "KV cache against length",
                 "Layer profile", "lazy_ratio: attention of the last queries", "gradient norm",
                 "Accuracy within a budget of tokens", "4 problems, greedy",
                 "truncated answers count as incorrect"):  # fmt: skip
        assert text in page.visible, text
    sets = page.data["index"]
    assert [(each["variant"], len(each["samples"])) for each in sets] == [
        ("base", 4), ("reach, untrained", 4), ("reach, trained", 4)
    ]  # fmt: skip
    for number, records in enumerate(ANSWERS.values()):
        assert ["".join(both) for both in page.data[f"texts-{number}"]] == [record.text for record in records]
        assert [row[2] for row in sets[number]["samples"]] == [int(record.correct) for record in records]
    assert page.data["problems-0"] == {key: [text, [answer]] for key, text, answer in PROBLEMS}


def test_a_run_scored_by_gates_shows_the_curve_and_the_rise_that_was_predicted(tmp_path, page):
    run = made_run(tmp_path)
    gates_profile().save(run / "profile/profile.json")
    scored = page_of(run)
    assert "Predicted rise against KV cache" in scored.visible
    assert "+1.5 nats on long-reach tokens, untrained (+1.6 if every layer streamed)" in scored.visible
    assert "redicted rise" not in page.visible


def test_problems_of_several_models_are_in_the_page_once(page):
    assert {each["problems"] for each in page.data["index"]} == {0}
    assert [key for key in page.data if key.startswith("problems")] == ["problems-0"]


def test_nothing_of_the_data_becomes_markup(page, tmp_path):
    plain = page
    records = [record("p0", tokens=64, text=NASTY + "</think>" + NASTY), *ANSWERS["base"][1:]]
    problem = NASTY.replace("\ud83d", "")  # half a character stands in answers alone: a problem with one is refused
    problems = [("p0", problem, "2"), *PROBLEMS[1:]]
    run = made_run(tmp_path, "nasty", {**ANSWERS, "base": records}, problems)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("base: nobody/nothing", f"base: {json.dumps('<script>alert(2)</script>')}"))
    page = page_of(run)
    assert page.tags == plain.tags
    embedded = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.source, re.DOTALL)
    assert len(embedded) == len(page.data) and not any("<" in data or ">" in data for data in embedded)
    whole = NASTY.replace("\ud83d", "\ufffd")  # half a character cannot be written as UTF-8
    assert page.data["texts-0"][0] == [whole + "</think>", whole]
    assert page.data["problems-0"]["p0"][0] == problem
    assert "<script>alert(2)</script>" in page.visible


def test_the_page_needs_no_network_and_allows_its_own_script_alone(page):
    addresses = [value for name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert all(address.startswith(("#", "data:")) for address in addresses), addresses
    assert "url(" not in page.source and "@import" not in page.source
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[^']+';", policy)


def test_a_long_trace_is_shortened_and_the_page_shows_to_what(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_CHARACTERS", 1000)
    monkeypatch.setattr(samples.character_limit, "__defaults__", (1000, samples.MAX_TOTAL_CHARACTERS))
    records = [record("p0", text="<think>" + "a" * 30_000 + "</think>end"), *ANSWERS["base"][1:]]
    page = page_of(made_run(tmp_path, answers={"base": records}))
    assert "Traces of up to 1,000 characters are complete. 1 of 4 are longer" in page.visible
    thought, answer = page.data["texts-0"][0]
    assert "characters left out" in thought and answer == "end"


def test_six_thousand_samples_take_little_more_room_than_their_texts(tmp_path):
    text = "<think>" + "So the next step is to add. " * 30 + "</think>It is \\boxed{2}"
    problems = [(f"p{number}", f"What is {number}?", "2") for number in range(1500)]
    records = [record(key, text=text) for key, _, _ in problems]
    run = made_run(tmp_path, answers=dict.fromkeys(("base", "converted", "trained"), records), problems=problems)
    written = write_report([run], tmp_path / "report.html").stat().st_size
    assert written < 1.25 * 4500 * len(text) + 300_000


def test_several_runs_stand_side_by_side(tmp_path):
    page = page_of(made_run(tmp_path, "one"), made_run(tmp_path, "two"))
    assert {each["run"] for each in page.data["index"]} == {"one", "two"}
    assert page.visible.count("optimizer step") == 2


def test_runs_of_one_name_are_distinguished_by_their_place(tmp_path):
    page = page_of(made_run(tmp_path / "here", "tiny"), made_run(tmp_path / "there", "tiny"))
    assert {each["run"] for each in page.data["index"]} == {str(tmp_path / "here/tiny"), str(tmp_path / "there/tiny")}


def test_a_source_that_is_gone_leaves_the_ids_and_is_named(run):
    (run.parent / "tiny-problems.jsonl").unlink()
    page = page_of(run)
    assert "the problems of ledger are shown by their ids only" in page.visible and "tiny-problems.jsonl" in page.visible
    assert page.data["problems-0"] == {}
    assert page.data["index"][0]["samples"][0][0] == "p0"


def test_other_problems_than_those_of_the_scores_are_not_shown(run):
    path = run.parent / "tiny-problems.jsonl"
    path.write_text(path.read_text().replace("What is 1+1?", "What is 1+0?"))
    page = page_of(run)
    assert "now holds other problems than those of this evaluation" in page.visible
    assert page.data["problems-0"] == {}


def test_samples_that_are_gone_are_named_and_the_rest_is_shown(run):
    (run / "eval/base/ledger/samples.jsonl").unlink()
    page = page_of(run)
    assert "the samples of base under ledger are not in the run folder any more" in page.visible
    assert [each["variant"] for each in page.data["index"]] == ["reach, untrained", "reach, trained"]
    assert "75.0 ± 25.0" in page.visible


def test_a_run_without_training_profile_and_samples_still_has_its_tables(run):
    for part in ("train", "profile", "eval/converted", "eval/trained"):
        shutil.rmtree(run / part)
    (run / "eval/base/ledger/samples.jsonl").unlink()
    page = page_of(run)
    assert "75.0 ± 25.0" in page.visible and "No layer profile" in page.visible and "was not trained" in page.visible


def test_a_former_report_is_replaced_in_one_step(run, tmp_path):
    out = tmp_path / "deep/report.html"
    write_report([run], out)
    first = out.read_text()
    shutil.rmtree(run / "eval/converted")
    write_report([run], out)
    assert out.read_text() != first
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_made_leaves_the_former_one(run, tmp_path):
    out = write_report([run], tmp_path / "report.html")
    before = out.read_bytes()
    (run / "eval/base/ledger/scores.json").write_text("{")
    with pytest.raises(UserError):
        write_report([run], out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("eval/base/ledger/scores.json", "{", r"scores\.json: not a (complete|valid) scores\.json"),
        ("eval/base/ledger/samples.jsonl", "{}\n", r"samples\.jsonl:1: not a sample of this version"),
        ("eval/base/ledger/meta.json", "{}", r"meta\.json: lacks the fingerprint"),
        ("profile/profile.json", "[]", r"profile\.json: not a (complete|valid) layer profile"),
        ("train/log.jsonl", '{"loss": 1.0}\n', r"log\.jsonl: not a valid training log"),
        ("train/log.jsonl", '{"step": 1', r"log\.jsonl:1: not JSON"),
        ("train/log.jsonl", '{"loss": 1}\n{"resumed_from": 3}\n', r"log\.jsonl: not a valid training log"),
        ("recipe.yaml", "name: [", r"recipe\.yaml: not a valid recipe"),
        ("hybrid/layers.json", "{", r"layers\.json: not a complete"),
        ("hybrid/layers.json", "[]", r"layers\.json: not a valid choice of layers\. Fix: delete it and run again"),
        ("hybrid/layers.json", '{"converted": ["x"]}', r"layers\.json: not a valid choice of layers"),
        ("hybrid/layers.json", "{}", r"layers\.json: not a valid choice of layers"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(run, path, content, message):
    (run / path).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([run], run / "report.html")
    assert not (run / "report.html").exists()


def test_no_run_no_scores_and_no_place_for_the_page_are_errors_with_a_fix(run, tmp_path):
    with pytest.raises(UserError, match="name one or more run folders"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"no run: .*recipe\.yaml is missing\. Fix: start it"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="named twice"):
        write_report([run, run / "../tiny"], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"a folder\. Fix: name the file"):
        write_report([run], tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=r"loop: no run: "):
        write_report([tmp_path / "loop"], tmp_path / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the report cannot be written"):
        write_report([run], tmp_path / "file/report.html")
    shutil.rmtree(run / "eval")
    with pytest.raises(UserError, match=r"no scores yet.*lt-train eval"):
        write_report([run], tmp_path / "report.html")
