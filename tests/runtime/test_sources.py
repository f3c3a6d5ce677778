import json
from pathlib import Path

import pytest

from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import load_rows, resolve_data, resolve_model

ROWS = [{"question": "a", "n": 1}, {"question": "b", "n": 2}, {"question": "ü\u2028", "n": 3}]


def write_rows(path: Path, rows: list[dict] = ROWS) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_local_model_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == "owner/model"
    (tmp_path / "owner/model").mkdir(parents=True)
    with pytest.raises(UserError, match="this folder holds no model") as error:
        resolve_model("owner/model")
    assert str(tmp_path / "owner/model/config.json") in str(error.value)
    (tmp_path / "owner/model/config.json").write_text("{}")
    assert resolve_model("owner/model") == "owner/model"
    assert resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["./models/x", "/models/x", "a/b/c", "~/models/x", "", "a b", "..", "models/../x", "a/b/"])
def test_a_model_that_is_neither_a_folder_nor_a_hub_id_is_reported_with_where_it_was_looked_for(name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_model(name)
    assert str(Path(name).expanduser().absolute()) in str(error.value)


def test_a_folder_with_an_adapter_is_refused_with_the_advice_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config\.json\), no model.*merge_and_unload"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"an adapter .* beside a model, to which transformers would add it.*merge_and_unload"):
        resolve_model(str(tmp_path))


def test_a_model_named_by_its_file_is_refused_with_the_advice_to_name_the_folder(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(UserError, match="is a file; name the folder"):
        resolve_model(str(weights))


@pytest.mark.parametrize("name", ["none.jsonl", "data/none.parquet", "./none", "../data/none", "a/b/c"])
def test_data_that_are_neither_a_file_nor_a_hub_id_are_reported_with_where_they_were_looked_for(name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_data(name)
    assert str(Path(name).absolute()) in str(error.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").touch()
    with pytest.raises(UserError, match=r"a data file ends in \.jsonl, .*\.parquet, .*not in \.xlsx"):
        resolve_data(str(tmp_path / "data.xlsx"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rows_come_with_their_place_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"data{suffix}")
    rows = list(load_rows(str(path)))
    assert [row for _, row in rows] == ROWS
    assert rows[1][0] == (f"{path}:2" if suffix == ".jsonl" else f"{path}, row 2")
    assert len(list(load_rows(str(path), limit=2))) == 2


def test_a_folder_gives_the_rows_of_all_its_files_in_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "b.parquet", ROWS[1:])
    write_rows(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").touch()
    assert [row["n"] for _, row in load_rows(str(tmp_path))] == [1, 2, 3]


def test_a_folder_with_splits_gives_only_the_one_requested(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-00000-of-00001.parquet", ROWS[:1])
    write_rows(tmp_path / "test.jsonl", ROWS[1:2])
    write_rows(tmp_path / "more.jsonl", ROWS[2:])
    assert [row["n"] for _, row in load_rows(str(tmp_path))] == [1]
    assert [row["n"] for _, row in load_rows(str(tmp_path), "test")] == [2]
    with pytest.raises(UserError, match="no file of the split 'validation' among"):
        list(load_rows(str(tmp_path), "validation"))


def test_an_empty_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no .* file in {tmp_path}"):
        list(load_rows(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "reported"),
    [
        ("cut.jsonl", b'{"a": 1}\n{"a": 2', r"cut\.jsonl:2: not JSON .*ends in the middle of this line"),
        ("broken.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}\n', r"broken\.jsonl:2: not JSON"),
        ("list.jsonl", b"[1]\n", r"list\.jsonl:1: a row must be a JSON object, this is a list"),
        ("bytes.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("cut.json", b'[{"a": 1}', r"cut\.json: not JSON .*call it \.jsonl"),
        ("object.json", b'{"a": 1}', r"object\.json: a \.json data file holds a list of objects, this holds an object"),
        ("numbers.json", b"[1]", r"numbers\.json, row 1: a row must be a JSON object, this is a number"),
        ("text.parquet", b"no parquet at all", r"text\.parquet: not a complete Parquet file"),
        ("empty.parquet", b"", r"empty\.parquet: not a complete Parquet file"),
    ],
)
def test_a_damaged_file_is_reported_with_its_place(tmp_path: Path, name: str, content: bytes, reported: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reported):
        list(load_rows(str(tmp_path / name)))


def test_a_parquet_file_that_is_cut_or_damaged_inside_is_reported(tmp_path: Path) -> None:
    content = write_rows(tmp_path / "whole.parquet", ROWS * 500).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        list(load_rows(str(tmp_path / "cut.parquet")))
    (tmp_path / "damaged.parquet").write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    with pytest.raises(UserError, match="not a complete Parquet file"):
        list(load_rows(str(tmp_path / "damaged.parquet")))


def test_a_device_is_no_data_file() -> None:
    with pytest.raises(UserError, match=r"/dev/null: a data file ends in .* not in nothing"):
        list(load_rows("/dev/null"))


def test_a_hub_data_set_that_cannot_be_had_is_reported_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"there is no local file or folder .*split 'train', subset None.*cannot be loaded"):
        list(load_rows("nobody-at-all/no-such-data"))
