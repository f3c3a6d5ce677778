"""An unfinished run says what is done and what is missing, and every run how it was made."""

import shutil
from pathlib import Path

import pytest
import yaml

from lt_train.report import write_report
from lt_train.report.contents import read_runs
from lt_train.report.provenance import provenance, stage_times
from lt_train.runtime.errors import UserError
from tests.support.made_runs import finish_stage, made_run
from tests.support.repository import REPOSITORY


def missing_of(run: Path) -> tuple[str, ...]:
    return read_runs([run])[0].missing


def undo(run: Path, *stages: str) -> None:
    for stage in stages:
        (run / f"stages/{stage}.json").unlink()


def change(run: Path, **parts: dict | list | None) -> None:
    """Of the recipe in the run folder: settings of parts, or whole parts."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for name, part in parts.items():
        recipe[name] = recipe[name] | part if isinstance(part, dict) else part
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def evaluations(run: Path, **changes: object) -> list[dict]:
    return [{**each, **changes} for each in yaml.safe_load((run / "recipe.yaml").read_text())["eval"]]


def test_a_finished_run_misses_nothing(run):
    assert missing_of(run) == () and read_runs([run])[0].unfinished is None
    assert "not finished" not in write_report([run], run.parent / "report.html").read_text()


def test_an_unfinished_run_is_reported_as_such_before_its_results(run):
    undo(run, "train", "eval", "export")
    shutil.rmtree(run / "eval/trained")
    change(run, hybrid={"compare": ["lazy_ratio"]})
    page = write_report([run], run.parent / "report.html").read_text()
    text = (
        "tiny: not finished. Done: profile, convert. Missing: train (logged up to step 3), "
        "eval (ledger of trained, ledger of converted-by-lazy_ratio, heldout_loss of trained), export. "
        f"Resume: lt-train run {run / 'recipe.yaml'} --runs {run.parent}"
    )
    assert page.count(text) == 2 and page.index(text) < page.index('id="results"')


def test_a_run_in_the_folder_runs_is_resumed_without_naming_it(run, monkeypatch):
    undo(run, "export")
    monkeypatch.chdir(run.parent.parent)
    (found,) = read_runs([Path("runs/tiny")])
    assert found.unfinished.endswith("Missing: export. Resume: lt-train run runs/tiny/recipe.yaml")


def test_a_run_without_scores_is_an_error_that_lists_its_stages(run):
    shutil.rmtree(run / "eval")
    undo(run, "eval", "export")
    with pytest.raises(
        UserError, match=r"no scores yet: not finished\. Done: profile, convert, train\. Missing: eval \(.*\), export\."
    ):
        read_runs([run])


@pytest.mark.parametrize(
    ("stage", "file"), [("profile", "profile/profile.json"), ("train", "train/log.jsonl"), ("export", "export/config.json")]
)
def test_a_stage_whose_files_are_gone_is_missing(run, stage, file):
    (run / file).unlink()
    assert [name.split()[0] for name in missing_of(run)] == [stage]


def test_an_evaluation_that_the_recipe_has_since_the_stage_was_finished_is_missing(run):
    change(run, eval=[*evaluations(run), evaluations(run, name="harder", variants=["trained"])[0]])
    assert missing_of(run) == ("eval (harder of trained)",)


def test_what_the_recipe_does_not_request_is_not_missing(run):
    change(run, train=None, hybrid={"strategy": "periodic"}, eval=evaluations(run, variants=["base"]))
    undo(run, "profile", "train")
    assert missing_of(run) == ()


@pytest.mark.parametrize("damage", ["{", "[]", '{"stage": "train"}', '{"stage": "train", "seconds": "long"}'])
def test_a_damaged_marker_is_an_error_that_names_it(run, damage):
    (run / "stages/train.json").write_text(damage)
    with pytest.raises(UserError, match=r"stages/train\.json: not a (valid|complete) stage marker"):
        read_runs([run])


def test_a_page_shows_how_its_run_was_made(run):
    made = dict(provenance(read_runs([run])[0]))
    assert made == {
        "streaming layers": "0, 2",
        "full-attention layers": "1, 3",
        "streaming layers by lazy_ratio": "0, 1",
        "seed": "0",
        "learning rate": "0.001, cosine",
        "rows of the data": "rows 12, too long 3, dropped 3, truncated 0, train 5, heldout 4",
        "calibration samples": "2",
        "versions": "lt-train 0.1.0, torch 2.13.0",
        "machine": "x86_64, 2 cores",
    }
    page = write_report([run], run.parent / "report.html").read_text()
    assert "How it was made" in page and "lazy_layer_ratio: 0.5" in page
    for value in (*made.values(), "90 minutes", "2026-01-02 03:04:05 UTC"):
        assert value in page


def test_every_finished_stage_has_its_time(run):
    assert stage_times(read_runs([run])[0]) == [
        ("profile", "40 seconds", "2026-01-02 03:04:05 UTC"),
        ("convert", "0.5 seconds", "2026-01-02 03:04:05 UTC"),
        ("train", "90 minutes", "2026-01-02 03:04:05 UTC"),
        ("eval", "90 seconds", "2026-01-02 03:04:05 UTC"),
        ("export", "8 seconds", "2026-01-02 03:04:05 UTC"),
    ]


def test_versions_that_changed_between_stages_are_named_with_their_stages(run):
    finish_stage(run, "eval", 1.0, versions={})
    marker = (run / "stages/eval.json").read_text().replace("2.13.0", "2.14.0").replace("2 cores", "8 cores")
    (run / "stages/eval.json").write_text(marker)
    made = dict(provenance(read_runs([run])[0]))
    assert made["versions"] == "profile, convert, train, export: lt-train 0.1.0, torch 2.13.0; eval: lt-train 0.1.0, torch 2.14.0"
    assert made["machine"] == "profile, convert, train, export: x86_64, 2 cores; eval: x86_64, 8 cores"


def test_a_run_of_before_shows_how_it_was_made_as_far_as_it_recorded_it():
    (run,) = read_runs([REPOSITORY / "tests/fixtures/run_before_the_folders/finished/old"])
    made = dict(provenance(run))
    assert run.missing == () and made["rows of the data"] == "not recorded"
    assert made["training"].startswith("2,800 tokens, 0.45 seconds") and "trl 1.16.0" in made["versions"]


def test_a_warm_up_is_named_with_the_learning_rate(tmp_path):
    run = made_run(tmp_path)
    change(run, train={"learning_rate": 1e-5, "warmup_ratio": 0.1})
    assert dict(provenance(read_runs([run])[0]))["learning rate"] == "1e-05, cosine, warm-up over 0.1 of the steps"
