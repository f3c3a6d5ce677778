"""`lt-train init`: a recipe that validates, fits and runs, with a reason for each value; or an error, and nothing written."""

import errno
import json
from pathlib import Path

import pytest
import yaml

from lt_train.planning import setup
from lt_train.planning.data_survey import BYTES_PER_TOKEN
from lt_train.planning.new_recipe import write_recipe
from lt_train.planning.setup import Machine
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.units import GIB, MIB
from tests.support.families import BASES
from tests.support.processes import checks_of_exports_are_forked
from tests.support.repository import REPOSITORY

TINY = REPOSITORY / "data/tiny-reasoner"
CPU = Machine(1, 4 * GIB, cpu=True)


def rows_of_the_ledger(count):
    lines = (REPOSITORY / "data/ledger/train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line) for line in lines]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    """80 rows of the ledger in the working directory."""
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "rows.jsonl", rows_of_the_ledger(80))


def comments(text):
    """Setting -> the comment behind it."""
    return {line.split(":")[0].strip(): line.split("  # ")[1] for line in text.splitlines() if "  # " in line}


def test_the_recipe_validates_fits_and_reports_why_each_value_was_chosen(lt_train, data, monkeypatch):
    monkeypatch.setattr(setup, "machine_here", lambda gpus, memory: CPU)
    code, out, err = lt_train("init", "my.yaml", "--base", TINY, "--data", "rows.jsonl")
    assert code == 0, err
    assert "recipe: my.yaml" in out and "fits: " in out
    assert sorted(path.name for path in Path().iterdir()) == ["my.yaml", "rows.jsonl"]
    text = Path("my.yaml").read_text(encoding="utf-8")
    made, why = yaml.safe_load(text), comments(text)
    assert made["name"] == "my" and made["data"]["source"] == "rows.jsonl" and made["model"]["base"] == str(TINY)
    assert made["data"] | {"format": "still", "max_length": 192, "heldout": 8} == made["data"]
    assert made["hybrid"]["w_recent"] + made["hybrid"]["w_sink"] == 16, "an eighth of a sample: of 1,024 nothing would be hidden"
    assert made["train"]["method"] == "lora" and made["train"]["batch_size"] == 8
    assert "all 80 rows looked at: 80 samples with reasoning" in why["source"]
    assert "recognised by question, combined_text" in why["format"]
    assert "median 175" in why["max_length"] and "by the base's tokenizer" in why["max_length"]
    assert "qwen3, 8 layers" in why["base"] and "the largest that fits" in why["micro_batch_size"]
    assert lt_train("validate", "my.yaml")[0] == 0
    assert lt_train("plan", "my.yaml", "--cpu", "--gpus", 1, "--gpu-memory", 4)[0] == 0


def test_the_recipe_runs(lt_train, data):
    assert lt_train("init", "my.yaml", "--base", TINY, "--data", "rows.jsonl")[0] == 0
    shorter = ("train.epochs=null", "train.max_steps=1", "hybrid.calibration.samples=1", "eval=[]")
    with checks_of_exports_are_forked():
        code, _, err = lt_train("run", "my.yaml", *(given for setting in shorter for given in ("--set", setting)))
    assert code == 0, err
    assert Path("runs/my/export/config.json").is_file()


@pytest.mark.parametrize(
    ("gpus", "mib", "method", "deepspeed", "checkpointing"),
    [
        (1, 200, "full", None, False),
        (1, 40, "full", None, True),
        (8, 40, "full", "launch/zero2.json", False),
        (1, 30, "lora", None, False),
    ],
)
def test_the_plan_decides_method_sharding_and_checkpointing(gpus, mib, method, deepspeed, checkpointing, data):
    plan = write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", None, Machine(gpus, mib * MIB))
    train = yaml.safe_load(Path("my.yaml").read_text())["train"]
    assert (train["method"], train["deepspeed"], train["gradient_checkpointing"]) == (method, deepspeed, checkpointing)
    assert plan.works and train["batch_size"] % (gpus * train["micro_batch_size"]) == 0


def test_the_batch_is_divided_by_any_number_of_gpus(data):
    write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", None, Machine(3, GIB))
    assert yaml.safe_load(Path("my.yaml").read_text())["train"]["batch_size"] == 9


@pytest.mark.parametrize(
    ("mib", "problem"),
    [(2, "no training of it fits 1 GPU of 2 MiB, not even LoRA"), (8, "scoring its layers does not fit 1 GPU of 8 MiB")],
)
def test_what_fits_nowhere_is_refused(mib, problem, data):
    with pytest.raises(UserError, match=f"{problem}.*Fix: give more GPUs"):
        write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", None, Machine(1, mib * MIB))
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_what_a_shipped_recipe_sets_is_kept_where_base_data_and_machine_do_not_decide(data):
    write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", "quickstart", CPU)
    text = Path("my.yaml").read_text()
    made = yaml.safe_load(text)
    assert "Settings without a comment are those of quickstart" in text
    assert made["train"]["max_steps"] == 60 and made["train"]["learning_rate"] == 1e-3 and "epochs" not in made["train"]
    assert made["hybrid"]["compare"] == ["lazy_ratio"] and made["hybrid"]["w_recent"] == 12
    assert made["data"]["source"] == "rows.jsonl" and made["eval"][0]["benchmark"] == "ledger"
    assert Path(made["eval"][0]["path"]).is_file()


def test_files_of_a_recipe_elsewhere_are_still_found(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # there the recipe's own paths lie
    data = write_rows(tmp_path / "rows.jsonl", rows_of_the_ledger(80))
    write_recipe(tmp_path / "my.yaml", "data/tiny-reasoner", str(data), "recipes/quickstart.yaml", CPU)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(Path("my.yaml"))
    assert recipe.data.source == "rows.jsonl" and recipe.eval[0].path == str(REPOSITORY / "data/ledger/test.jsonl")


def test_a_window_that_would_show_whole_samples_is_shortened_also_with_a_shipped_recipe(data):
    write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", "qwen3-8b", CPU)
    made = yaml.safe_load(Path("my.yaml").read_text())
    assert made["hybrid"]["w_recent"] == 12 and made["lora"]["rank"] == 16 and made["data"]["max_length"] == 192


def test_tags_of_other_models_are_converted_and_faulty_rows_dropped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n} + 1?", "combined_text": f"<think>one more than {n}</think>It is {n + 1}."} for n in range(30)]
    write_rows(Path("rows.jsonl"), [*rows, {"question": "2 + 2?", "combined_text": ""}])
    write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", None, CPU)
    text = Path("my.yaml").read_text()
    made = yaml.safe_load(text)["data"]
    assert (made["reasoning_tags"], made["faulty"]) == ("convert", "drop")
    assert "between <think> and </think>" in text and "1 of the rows looked at cannot be trained on" in text


def test_without_a_local_tokenizer_lengths_are_estimated_and_it_is_reported(data):
    BASES["qwen3"].save_pretrained("base")
    write_recipe(Path("my.yaml"), "base", "rows.jsonl", None, CPU)
    text = Path("my.yaml").read_text()
    made = yaml.safe_load(text)
    assert f"estimated, {BYTES_PER_TOKEN} bytes a token" in text
    assert made["model"]["base"] == "base" and made["data"]["max_length"] == 128


def test_the_length_holds_the_long_samples_and_no_outlier_and_held_out_rows_are_limited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = rows_of_the_ledger(700)

    def add_steps(row, count):
        row["combined_text"] = row["combined_text"].replace("<|begin_of_thought|>", "<|begin_of_thought|>" + count * "1. x>b8=8\n")

    add_steps(rows[7], 500)
    for row in rows[20:60]:
        add_steps(row, 10)
    write_rows(Path("rows.jsonl"), rows)
    write_recipe(Path("my.yaml"), str(TINY), "rows.jsonl", None, CPU)
    data = yaml.safe_load(Path("my.yaml").read_text())["data"]
    assert data["max_length"] == 256 and data["heldout"] == 64


def test_an_existing_file_is_not_overwritten(lt_train, data):
    Path("my.yaml").write_text("mine")
    code, _, err = lt_train("init", "my.yaml", "--base", TINY, "--data", "rows.jsonl")
    assert code == 2 and "my.yaml: exists already" in err
    assert Path("my.yaml").read_text() == "mine"


def test_a_place_that_takes_no_file_is_an_error(lt_train, data):
    code, _, err = lt_train("init", "/proc/my.yaml", "--base", TINY, "--data", "rows.jsonl")
    assert code == 2 and "/proc/my.yaml: cannot be written: No such file or directory. Fix: name a file in another folder" in err


REFUSED = {
    "unreadable data": (TINY, "faulty.jsonl", "--data: faulty.jsonl: ", "not JSON"),
    "no such data": (TINY, "missing.jsonl", "--data: missing.jsonl: ", "no file or folder"),
    "a value without data": (TINY, "", "--data: '': empty", ""),
    "no known format": (TINY, "strange.jsonl", "--data: strange.jsonl:1: ", "no known format"),
    "no reasoning": (TINY, "plain.jsonl", "--data: plain.jsonl: ", "none of the 3 samples looked at holds reasoning"),
    "one row": (TINY, "one.jsonl", "--data: one.jsonl: ", "1 row: too few"),
    "one row that is sound": (TINY, "sound.jsonl", "--data: sound.jsonl: ", "one sample of it can be trained on: too few"),
    "a base of another kind": ("gpt2", "rows.jsonl", "--base: gpt2: ", "no hybrid class"),
    "no base": ("./nowhere", "rows.jsonl", "--base: ./nowhere: ", "no folder"),
    "a value without a base": ("", "rows.jsonl", "--base: '': empty", ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_become_a_run_is_refused_and_nothing_is_left_behind(what, lt_train, data):
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    Path("faulty.jsonl").write_text('{"question": \n{"a"\n')
    plain = [{"question": f"{n}?", "combined_text": f"{n}"} for n in range(3)]
    write_rows(Path("plain.jsonl"), plain)
    write_rows(Path("one.jsonl"), rows_of_the_ledger(1))
    Path("sound.jsonl").write_text(Path("one.jsonl").read_text() + '{"a"\n')
    write_rows(Path("strange.jsonl"), [{"a": 1}, {"a": 2}])
    before = sorted(Path().iterdir())
    base, source, option, problem = REFUSED[what]
    code, out, err = lt_train("init", "my.yaml", "--base", base, "--data", source)
    assert code == 2 and "Traceback" not in out + err
    assert err.startswith(f"error {option}") and problem in err
    assert "model.base" not in err and "data.source" not in err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("--from", "qwen-9"), "--from: qwen-9: there is no such file"),
        (("--gpus", 0), "--gpus: 0"),
        (("--gpu-memory", -1), "--gpu-memory: -1"),
        (("--gpu-memory", "nan"), "--gpu-memory: nan"),
    ],
)
def test_options_that_cannot_be_are_refused(given, problem, lt_train, data):
    code, out, err = lt_train("init", "my.yaml", "--base", TINY, "--data", "rows.jsonl", *given)
    assert code == 2 and problem in err and "Traceback" not in out + err


def test_a_folder_that_is_not_there_is_refused(lt_train, data):
    code, _, err = lt_train("init", "none/my.yaml", "--base", TINY, "--data", "rows.jsonl")
    assert code == 2 and "there is no folder" in err


def test_a_full_disk_leaves_no_half_of_a_recipe(lt_train, data, monkeypatch):
    def write_half(path, text, encoding):
        path.write_bytes(text.encode(encoding)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    code, _, err = lt_train("init", "my.yaml", "--base", TINY, "--data", "rows.jsonl")
    assert code == 2 and "my.yaml: cannot be written: No space left on device" in err
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
