import json
import os
import platform

import pytest

from lt_train.pipeline import run_folder
from lt_train.pipeline.run_folder import RunFolder
from lt_train.recipe.loading import load_recipe
from lt_train.recipe.schema import Recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import replacing, write_text

RECIPE = """
name: tiny
model: {base: BASE}
hybrid: {lazy_layer_ratio: 0.5, w_recent: 8}
data: {source: DATA, format: still, max_length: 64}
eval: [{benchmark: ledger, path: DATA, max_new_tokens: 8}]
"""


@pytest.fixture
def recipe_with(tmp_path):
    """Make the recipe with overrides; its model and data are files whose content alone matters here."""
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    data.write_text("{}\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("BASE", str(base)).replace("DATA", str(data)))

    def make(*overrides: str) -> Recipe:
        return load_recipe(path, overrides)

    return make


def opened(recipe, tmp_path):
    """The folder of a run that was begun, or resumes: its profile has a first sample."""
    folder = RunFolder(recipe, tmp_path / "runs")
    with folder.begin():
        write_text(folder.paths.stage("profile") / "samples.jsonl", "")
    return folder


def test_a_run_resumes_with_the_recipe_it_was_begun_with(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    opened(recipe_with(), tmp_path)
    assert load_recipe(folder.paths.root / "recipe.yaml") == recipe_with()


def test_a_run_begun_with_another_recipe_is_not_touched(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    before = (folder.paths.root / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"hybrid\.w_recent: 8, 9"):
        opened(recipe_with("hybrid.w_recent=9"), tmp_path)
    assert (folder.paths.root / "recipe.yaml").read_text() == before


def test_a_folder_that_was_renamed_is_reported_with_the_name_under_which_it_resumes(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    folder.paths.root.rename(tmp_path / "runs" / "mine")
    with pytest.raises(UserError, match=r"runs/mine: it is the run 'tiny', whose folder was renamed or copied.*/runs/tiny;"):
        opened(recipe_with("name=mine"), tmp_path)


def test_a_run_that_was_refused_before_it_made_anything_starts_again_with_another_recipe_and_data(recipe_with, tmp_path):
    folder = RunFolder(recipe_with(), tmp_path / "runs")
    with pytest.raises(UserError, match="too wide"), folder.begin():
        raise UserError("hybrid.w_recent: too wide")
    (tmp_path / "data.jsonl").write_text('{"mended": 1}\n')
    folder = opened(recipe_with("hybrid.w_recent=4"), tmp_path)
    assert load_recipe(folder.paths.root / "recipe.yaml").hybrid.w_recent == 4
    opened(recipe_with("hybrid.w_recent=4"), tmp_path)


def test_evaluations_may_be_added_to_a_begun_run(recipe_with, tmp_path):
    opened(recipe_with(), tmp_path)
    folder = opened(recipe_with("eval.0.samples=4", "eval.0.temperature=0.6"), tmp_path)
    assert "samples: 4" in (folder.paths.root / "recipe.yaml").read_text()


@pytest.mark.parametrize("changed", ["data.jsonl", "base/model.safetensors", "base/config.json"])
def test_a_run_does_not_go_on_when_its_inputs_changed(recipe_with, tmp_path, changed):
    opened(recipe_with(), tmp_path)
    (tmp_path / changed).write_text('{"other": 1}')
    with pytest.raises(UserError, match="changed since this run was begun"):
        opened(recipe_with(), tmp_path)


def test_a_run_does_not_go_on_when_weights_in_the_middle_of_a_file_changed(recipe_with, tmp_path):
    """As where another adapter was merged into the base: embeddings, head and norms, at the ends of a file, stay."""
    recipe, weights = recipe_with(), bytes(2**21)
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(weights * 3)
    folder = opened(recipe, tmp_path)
    opened(recipe, tmp_path)
    path.write_bytes(weights + b"1" * len(weights) + weights)
    with pytest.raises(UserError, match=r"tiny: model\.base changed since this run was begun"):
        opened(recipe, tmp_path)
    inputs = json.loads(folder.paths.inputs.read_text())
    folder.paths.inputs.write_text(json.dumps({name: inputs[name] for name in ("model.base", "data.source")}))
    opened(recipe, tmp_path)  # begun by a version that recorded no weights
    path.write_bytes(weights * 3)
    with pytest.raises(UserError, match=r"model\.base changed"):
        opened(recipe, tmp_path)


def test_a_deleted_record_of_the_inputs_is_made_again(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    (folder.paths.root / "inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json: .*delete it"):
        opened(recipe_with(), tmp_path)
    (folder.paths.root / "inputs.json").unlink()
    opened(recipe_with(), tmp_path)
    assert json.loads((folder.paths.root / "inputs.json").read_text()).keys() == {
        "model.base",
        "model.base: weights",
        "data.source",
    }


def test_auto_is_one_dtype_in_a_run_whichever_machine_resumes_it(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    folder.check_auto_dtype("bfloat16")
    folder = opened(recipe_with(), tmp_path)
    folder.check_auto_dtype("bfloat16")
    with pytest.raises(UserError, match="auto: it is float32 on this machine and was bfloat16 when this run was begun"):
        folder.check_auto_dtype("float32")
    opened(recipe_with(), tmp_path).check_auto_dtype("bfloat16")  # what was refused is not recorded


def test_a_run_that_made_nothing_may_compute_in_another_dtype(recipe_with, tmp_path):
    for dtype in ("bfloat16", "float32"):
        with (folder := RunFolder(recipe_with(), tmp_path / "runs")).begin():
            folder.check_auto_dtype(dtype)


def test_a_run_of_an_earlier_version_opens_without_a_recorded_dtype(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    assert "model.dtype: auto" not in json.loads(folder.paths.inputs.read_text())
    opened(recipe_with(), tmp_path).check_auto_dtype("float32")


def test_two_processes_do_not_work_in_one_run(recipe_with, tmp_path):
    with (
        RunFolder(recipe_with(), tmp_path / "runs").begin(),
        pytest.raises(UserError, match="another lt-train is working"),
        RunFolder(recipe_with(), tmp_path / "runs").begin(),
    ):
        pass


def test_a_stage_is_done_only_when_its_block_ended_well(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    with pytest.raises(RuntimeError), folder.doing("profile"):
        raise RuntimeError
    assert not folder.is_done("profile")
    with folder.doing("profile", key="a"):
        pass
    assert folder.is_done("profile", key="a")
    assert not folder.is_done("profile", key="b")
    assert json.loads((folder.paths.root / "stages/profile.json").read_text())["versions"]["torch"]


def test_a_stage_of_which_something_was_deleted_is_done_again(recipe_with, tmp_path):
    folder = opened(recipe_with(), tmp_path)
    made = folder.paths.stage("train") / "final/adapter.json"
    with folder.doing("train"):
        made.parent.mkdir(parents=True)
        made.write_text("{}")
        (made.parent / ".half-written.tmp").write_text("")
    (made.parent / ".half-written.tmp").unlink()
    assert folder.is_done("train")
    made.unlink()
    assert not folder.is_done("train")


@pytest.mark.parametrize("damage", ["{", "name: [", "\x00"])
def test_a_damaged_record_of_a_run_is_an_error_with_a_fix(recipe_with, tmp_path, damage):
    folder = opened(recipe_with(), tmp_path)
    (folder.paths.root / "recipe.yaml").write_text(damage)
    with pytest.raises(UserError, match=r"Move|another"):
        opened(recipe_with(), tmp_path)


def test_other_processes_of_a_launch_join_what_the_first_one_began(recipe_with, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SECONDS_TO_AGREE", 0.0)
    monkeypatch.setattr(run_folder, "SECONDS_TO_BEGIN", 0.0)
    with (first := RunFolder(recipe_with(), tmp_path / "runs")).begin():
        with pytest.raises(UserError, match=r"the first process does not work in this folder.*--runs"):
            RunFolder(recipe_with(), tmp_path / "runs of another machine").join()
        first.announce()
        RunFolder(recipe_with(), tmp_path / "runs").join()
        with pytest.raises(UserError, match=r"recipe: this machine has others(?s:.*)hybrid\.w_recent: 8, 9"):
            RunFolder(recipe_with("hybrid.w_recent=9"), tmp_path / "runs").join()
        monkeypatch.setattr(run_folder, "package_versions", lambda: dict.fromkeys(run_folder.PACKAGES, "0"))
        with pytest.raises(UserError, match=r"packages: this machine has others(?s:.*)torch: .*, '0'"):
            RunFolder(recipe_with(), tmp_path / "runs").join()


@pytest.mark.parametrize(("file", "named"), [("data.jsonl", "data.source"), ("base/model.safetensors", "model.base: weights")])
def test_a_machine_whose_files_differ_from_those_of_the_first_process_does_not_join(
    file, named, recipe_with, tmp_path, monkeypatch
):
    """As where each machine has a copy of its own, and one is stale."""
    monkeypatch.setattr(run_folder, "SECONDS_TO_AGREE", 0.0)
    with (first := RunFolder(recipe_with(), tmp_path / "runs")).begin():
        first.announce()
        (tmp_path / file).write_text('{"other": 1}\n')
        with pytest.raises(UserError, match=rf"base or data: this machine has others(?s:.*){named}"):
            RunFolder(recipe_with(), tmp_path / "runs").join()


def test_what_an_earlier_launch_left_is_read_again_until_the_first_process_has_written(recipe_with, tmp_path, monkeypatch):
    with (first := RunFolder(recipe_with(), tmp_path / "runs")).begin():
        write_text(first.paths.launch, "{}")
        monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: first.announce())
        RunFolder(recipe_with(), tmp_path / "runs").join()


def test_what_a_process_left_that_was_killed_while_it_wrote_is_removed_by_the_next_one(recipe_with, tmp_path):
    written = opened(recipe_with(), tmp_path).paths.stage("eval") / "base/ledger/scores.json"
    with pytest.raises(UserError, match="spoilt"), replacing(written) as mine:
        mine.write_text("")
        dead = 2**22 + 1  # beyond the largest number of a process
        names = f".a.{platform.node()}.{dead}.tmp", f".b.node-7.cluster.{os.getpid()}.tmp", ".c.tmp", "d.tmp"
        places = {name: mine.with_name(name) for name in names}
        for path in places.values():
            path.write_text("")
        opened(recipe_with(), tmp_path)
        assert mine.exists() and [name for name, path in places.items() if path.exists()] == [".c.tmp", "d.tmp"]
        raise UserError("spoilt")
