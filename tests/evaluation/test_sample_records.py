import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lt_train.errors import UserError
from lt_train.evaluation.records import RecordFolder, SampleRecord

FINGERPRINT = {"model": "abc", "temperature": 0.6, "seed": None}
RECORD = SampleRecord(
    problem="60",
    sample=0,
    seed=17,
    prompt_hash="f00",
    text="so \\boxed{5}",
    tokens=8,
    finish_reason="stop",
    extracted="5",
    correct=True,
    grading_error=None,
    seconds=0.5,
)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    other = replace(RECORD, sample=1, extracted=None, correct=False)
    for record in (RECORD, other):
        RecordFolder(tmp_path, FINGERPRINT).append(record)
    assert RecordFolder(tmp_path, FINGERPRINT).read() == {("60", 0): RECORD, ("60", 1): other}


def test_a_last_line_cut_off_anywhere_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    whole = (tmp_path / "samples.jsonl").read_text()
    line = json.dumps(asdict(replace(RECORD, sample=1)))
    for cut in (1, len(line) // 2, len(line)):
        (tmp_path / "samples.jsonl").write_text(whole + line[:cut])
        assert RecordFolder(tmp_path, FINGERPRINT).read() == {("60", 0): RECORD}
        assert (tmp_path / "samples.jsonl").read_text() == whole


def test_a_sample_written_twice_counts_once(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, FINGERPRINT)
    folder.append(RECORD)
    folder.append(replace(RECORD, seconds=0.7))
    assert folder.read() == {("60", 0): RECORD}


def test_two_different_answers_for_one_sample_are_an_error(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, FINGERPRINT)
    folder.append(RECORD)
    folder.append(replace(RECORD, text="so \\boxed{6}", extracted="6", correct=False))
    with pytest.raises(UserError, match=r"samples\.jsonl:2: a second, different sample 0 of problem 60"):
        folder.read()


def test_samples_of_another_model_are_not_touched_and_the_difference_is_said(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"cut')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"model: 'abc' there, 'xyz' now") as raised:
        RecordFolder(tmp_path, {**FINGERPRINT, "model": "xyz"})
    assert "temperature" not in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_samples_without_a_word_on_their_origin_are_refused(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match=r"without the meta\.json"):
        RecordFolder(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("content", ['{"fingerprint": {"mod', "[]", '{"other": 1}', ""])
def test_a_corrupt_meta_file_is_a_clear_error(tmp_path: Path, content: str) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json: .*Delete"):
        RecordFolder(tmp_path, FINGERPRINT)


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"problem": "60"', "not JSON"), ('{"problem": "60"}', "missing or unknown"), ("[1]", "must be a JSON object")],
)
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: str, said: str) -> None:
    folder = RecordFolder(tmp_path, FINGERPRINT)
    folder.append(RECORD)
    with open(folder.samples_path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=rf"samples\.jsonl:2: .*{said}"):
        folder.read()


def test_a_folder_without_samples_can_be_taken_for_other_settings(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT)
    RecordFolder(tmp_path, {**FINGERPRINT, "model": "xyz"}).append(RECORD)
    with pytest.raises(UserError, match="model: 'xyz' there, 'abc' now"):
        RecordFolder(tmp_path, FINGERPRINT)
