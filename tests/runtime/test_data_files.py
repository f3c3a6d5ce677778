"""Rows of every kind of data file, each with its place; what is damaged is one row's fault where the others can still be read."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from lt_train.runtime.data_files import file_rows
from lt_train.runtime.errors import UserError
from lt_train.runtime.sources import load_rows, resolve_data

ROWS = [{"question": "6 x 7?", "answer": "forty-two"}, {"question": 'ü, "quoted"\nand\u2028two lines', "answer": "x" * 200_000}]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows: list[dict], delimiter: str, tmp_path: Path) -> bytes:
    with open(tmp_path / "written", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return (tmp_path / "written").read_bytes()


def arrow(rows: list[dict], tmp_path: Path) -> bytes:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    return (tmp_path / "saved/data-00000-of-00001.arrow").read_bytes()


def parquet(rows: list[dict], tmp_path: Path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "written")
    return (tmp_path / "written").read_bytes()


NAMES = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow", "lines.json"]


def content(name: str, tmp_path: Path) -> bytes:
    kind = name.removesuffix(".gz").rpartition(".")[2]
    if kind in ("csv", "tsv"):
        return delimited(ROWS, "," if kind == "csv" else "\t", tmp_path)
    if kind in ("parquet", "arrow"):
        return {"parquet": parquet, "arrow": arrow}[kind](ROWS, tmp_path)
    return json.dumps(ROWS).encode() if name == "a.json" else jsonl(ROWS)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in NAMES
        for form in ("plain", "upper case", "gz", "BOM")
        if form in ("plain", "upper case") or not name.endswith(("parquet", "arrow"))  # these compress by themselves
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, form: str) -> None:
    raw = content(name, tmp_path)
    path = tmp_path / {"plain": name, "gz": f"{name}.gz", "BOM": name, "upper case": name.upper()}[form]
    path.write_bytes(gzip.compress(raw) if form == "gz" else b"\xef\xbb\xbf" + raw if form == "BOM" else raw)
    assert resolve_data(str(path)) == path
    assert [row for _, row in load_rows(str(path))] == ROWS


def test_a_row_of_a_csv_file_has_the_line_that_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"two\nlines",a\n\nb,c\n')
    assert [where.rpartition(":")[2] for where, _ in file_rows(path)] == ["2", "5"]


def test_the_shared_case_with_a_bom_is_read(shared_cases: Path) -> None:
    assert [row["question"] for _, row in load_rows(str(shared_cases / "rows/bom.jsonl"))] == ["6 x 7?"]


@pytest.mark.parametrize(
    ("name", "lines", "problems"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": \n[1]\n{"a": 4}\n{"a": "\xff"}\n',
            {2: "not JSON", 3: "must be a JSON object", 5: "not UTF-8"},
        ),
        ("a.csv", b"a,b\n1,2\n1,2,3\n4\n", {3: "3 fields, the header 2", 4: "1 fields, the header 2"}),
        ("a.jsonl", b'{"a": ' + b"[" * 200_000 + b"\n{}\n", {1: "not JSON"}),
    ],
)
def test_damaged_rows_are_one_fault_each_and_the_others_are_read(
    tmp_path: Path, name: str, lines: bytes, problems: dict[int, str]
) -> None:
    path = tmp_path / name
    path.write_bytes(lines)
    found = {int(where.rpartition(":")[2]): row for where, row in file_rows(path)}
    assert {line for line, row in found.items() if isinstance(row, str)} == set(problems)
    assert all(problems[line] in row for line, row in found.items() if isinstance(row, str))


@pytest.mark.parametrize(
    ("name", "raw", "reported"),
    [
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-20], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.csv", b'a,b\n"1,2\n', r"a\.csv:2: not CSV"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv: two columns have one name: a, a"),
        ("a.csv", b"a,b\n\xff,2\n", r"a\.csv:\d: not CSV in UTF-8"),
        ("a.arrow", b"no arrow", r"a\.arrow: not a complete Arrow file"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            r"a\.parquet: a Git LFS pointer.*git lfs pull",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_with_its_place(tmp_path: Path, name: str, raw: bytes, reported: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=reported):
        list(load_rows(str(tmp_path / name)))
