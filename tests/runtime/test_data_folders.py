"""Which files of a folder are read: downloads of the hub, folders of save_to_disk, and files of one's own."""

import json
from pathlib import Path

import pytest

from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import load_rows


def laid(folder: Path, *names: str, readme: str = "") -> Path:
    """Files of one row each, which names its file."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"file": name}) + "\n")
    if readme:
        (folder / "README.md").write_text(f"---\n{readme}\n---\n# A data set\n")
    return folder


def read(folder: Path, split: str = "train", subset: str | None = None) -> list[str]:
    return [row["file"] for _, row in load_rows(str(folder), split, subset=subset)]


def test_the_shared_case_of_a_hub_snapshot_gives_its_data_alone(shared_cases: Path) -> None:
    assert [row["question"] for _, row in load_rows(str(shared_cases / "rows/hub_snapshot"))] == ["6 x 7?"]


def test_a_snapshot_s_data_lie_a_folder_down_and_what_lies_beside_them_is_none(tmp_path: Path) -> None:
    laid(tmp_path, "data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl")
    laid(tmp_path, "dataset_infos.json", ".cache/huggingface/download/x.jsonl", "__pycache__/y.json")
    assert read(tmp_path) == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert read(tmp_path, "test") == ["data/test-00000-of-00001.jsonl"]


def test_splits_are_recognized_by_any_word_of_a_name_and_by_folders(tmp_path: Path) -> None:
    laid(tmp_path, "math_train.jsonl", "math_test.jsonl", "validation/part.jsonl")
    assert read(tmp_path) == ["math_train.jsonl"]
    assert read(tmp_path, "validation") == ["validation/part.jsonl"]


def test_several_subsets_are_never_mixed_in_silence(tmp_path: Path) -> None:
    laid(tmp_path, "main/train-0.jsonl", "socratic/train-0.jsonl")
    with pytest.raises(UserError, match=r"several subsets: main, socratic\. Fix: name one by data\.subset"):
        read(tmp_path)
    assert read(tmp_path, subset="socratic") == ["socratic/train-0.jsonl"]
    with pytest.raises(UserError, match=r"data\.subset: other: .*it has main, socratic"):
        read(tmp_path, subset="other")


METADATA = """configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
- config_name: metadata
  data_files:
  - split: train
    path: metadata/train-*"""


def test_a_readme_s_declared_files_are_those_of_its_subsets_and_splits(tmp_path: Path) -> None:
    laid(tmp_path, "data/train-0.jsonl", "metadata/train-0.jsonl", "extra.json", readme=METADATA)
    assert read(tmp_path) == ["data/train-0.jsonl"]
    assert read(tmp_path, subset="metadata") == ["metadata/train-0.jsonl"]
    with pytest.raises(UserError, match="no subset 'other' among default, metadata"):
        read(tmp_path, subset="other")
    with pytest.raises(UserError, match="no file of the split 'test'"):
        read(tmp_path, "test")


@pytest.mark.parametrize(
    "declared",
    [
        "data_files: part.jsonl",
        "data_files: ['part.jsonl']",
        "data_files: {train: part.jsonl}",
        "data_files: [{split: train, path: [part.jsonl]}]",
    ],
)
def test_every_way_to_declare_files_is_read(tmp_path: Path, declared: str) -> None:
    laid(tmp_path, "part.jsonl", "train.jsonl", readme=f"configs:\n- config_name: only\n  {declared}")
    assert read(tmp_path) == ["part.jsonl"]


def test_several_declared_subsets_without_a_default_must_be_named(tmp_path: Path) -> None:
    declared = "configs:\n- {config_name: main, data_files: main/*}\n- {config_name: socratic, data_files: socratic/*}"
    laid(tmp_path, "main/a.jsonl", "socratic/a.jsonl", readme=declared)
    with pytest.raises(UserError, match="several subsets: main, socratic"):
        read(tmp_path)
    assert read(tmp_path, subset="main") == ["main/a.jsonl"]


def test_declared_files_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    laid(tmp_path, "train.jsonl", readme="configs:\n- {config_name: default, data_files: data/*}")
    with pytest.raises(UserError, match=r"README\.md declares files .*none of them is there"):
        read(tmp_path)


@pytest.mark.parametrize("head", ["license: mit", "configs: [", "- a list"])
def test_a_readme_that_declares_nothing_changes_nothing(tmp_path: Path, head: str) -> None:
    assert read(laid(tmp_path, "train.jsonl", readme=head)) == ["train.jsonl"]


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([{"file": "one"}])
    one.save_to_disk(tmp_path / "one")
    DatasetDict({"train": one, "test": Dataset.from_list([{"file": "two"}])}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == read(tmp_path / "both") == ["one"]
    assert read(tmp_path / "both", "test") == ["two"]
    with pytest.raises(UserError, match="no split 'dev'; there are train, test"):
        read(tmp_path / "both", "dev")
    (tmp_path / "one/data-00000-of-00001.arrow").write_bytes(b"cut")
    with pytest.raises(UserError, match="not a complete folder of save_to_disk"):
        read(tmp_path / "one")
