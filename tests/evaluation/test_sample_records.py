import errno
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.evaluation import records
from lt_train.evaluation.records import RecordFolder, SampleRecord, shard_of
from lt_train.inference.requests import Request
from lt_train.runtime.errors import UserError
from tests.support.full_disk import files_of_at_most

FINGERPRINT = {"model": "abc", "temperature": 0.6, "seed": None}
RECORD = SampleRecord(
    problem="60",
    sample=0,
    seed=17,
    prompt_hash="f00",
    text="so \\boxed{5}",
    tokens=8,
    thinking_tokens=5,
    finish_reason="stop",
    extracted="5",
    extracted_from="boxed",
    score=1.0,
    correct=True,
    grading_error=None,
    seconds=0.5,
)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    other = replace(RECORD, sample=1, extracted=None, correct=False)
    for record in (RECORD, other):
        RecordFolder(tmp_path, FINGERPRINT).append(record)
    assert RecordFolder(tmp_path, FINGERPRINT).read() == {("60", 0): RECORD, ("60", 1): other}


def test_a_last_line_truncated_anywhere_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
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


def test_samples_of_another_model_are_not_touched_and_the_difference_is_listed(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"cut')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"\(there, here\):\n  model: 'abc', 'xyz'") as raised:
        RecordFolder(tmp_path, {**FINGERPRINT, "model": "xyz"})
    assert "temperature" not in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_samples_without_their_fingerprint_are_refused(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match=r"without the meta\.json"):
        RecordFolder(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("content", ['{"fingerprint": {"mod', "[]", '{"other": 1}', ""])
def test_a_corrupt_meta_file_is_a_clear_error(tmp_path: Path, content: str) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(RECORD)
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta\.json: .*[Dd]elete"):
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
    with pytest.raises(UserError, match="model: 'xyz', 'abc'"):
        RecordFolder(tmp_path, FINGERPRINT)


def test_each_rank_appends_to_its_own_file_and_reads_all(tmp_path: Path) -> None:
    ranks = [RecordFolder(tmp_path, FINGERPRINT, rank, 3) for rank in range(3)]
    for number, rank in enumerate(ranks):
        rank.append(replace(RECORD, sample=number))
    assert sorted(path.name for path in tmp_path.glob("samples*")) == ["samples-0.jsonl", "samples-1.jsonl", "samples-2.jsonl"]
    assert [len(path.read_text().splitlines()) for path in tmp_path.glob("samples*")] == [1, 1, 1]
    expected = {("60", number): replace(RECORD, sample=number) for number in range(3)}
    assert all(rank.read() == expected for rank in ranks)
    alone = RecordFolder(tmp_path, FINGERPRINT)
    alone.append(replace(RECORD, sample=3))
    assert alone.read() == ranks[0].read() == {**expected, ("60", 3): replace(RECORD, sample=3)}


def test_a_sample_that_two_ranks_drew_counts_once_if_they_agree(tmp_path: Path) -> None:
    first, second = (RecordFolder(tmp_path, FINGERPRINT, rank, 2) for rank in range(2))
    first.append(RECORD)
    second.append(replace(RECORD, seconds=0.7))
    assert first.read() == {("60", 0): RECORD}
    second.append(replace(RECORD, sample=1))
    first.append(replace(RECORD, sample=1, text="other"))
    with pytest.raises(UserError, match=r"samples-1\.jsonl:2: a second, different sample 1 .* first is .*samples-0\.jsonl:2"):
        second.read()


def test_a_line_that_another_rank_has_not_ended_is_passed_over_and_left_to_it(tmp_path: Path) -> None:
    writer, reader = (RecordFolder(tmp_path, FINGERPRINT, rank, 2) for rank in range(2))
    writer.append(RECORD)
    line = json.dumps(asdict(replace(RECORD, sample=1, text="ä")), ensure_ascii=False).encode()
    for cut in (1, line.index("ä".encode()) + 1, len(line)):
        with open(writer.samples_path, "rb+") as file:
            file.truncate(len(writer.samples_path.read_bytes().split(b"\n")[0]) + 1)
            file.seek(0, 2)
            file.write(line[:cut])
        before = writer.samples_path.read_bytes()
        assert RecordFolder(tmp_path, FINGERPRINT, 1, 2).read() == reader.read() == {("60", 0): RECORD}
        assert writer.samples_path.read_bytes() == before
    assert RecordFolder(tmp_path, FINGERPRINT, 0, 2).read() == {("60", 0): RECORD}
    assert writer.samples_path.read_bytes().endswith(b"}\n")


def test_a_folder_with_samples_of_any_rank_is_not_taken_for_other_settings(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT, 5, 8).append(RECORD)
    with pytest.raises(UserError, match="model: 'abc', 'xyz'"):
        RecordFolder(tmp_path, {**FINGERPRINT, "model": "xyz"})
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match=r"samples-5\.jsonl: samples without the meta\.json"):
        RecordFolder(tmp_path, FINGERPRINT, 5, 8)


def test_a_folder_taken_by_another_model_before_the_first_sample_is_noticed(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path, FINGERPRINT, 0, 2)
    RecordFolder(tmp_path, {**FINGERPRINT, "model": "xyz"}, 1, 2)
    folder.append(RECORD)
    with pytest.raises(UserError, match="model: 'xyz', 'abc'"):
        folder.read()


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_disk_that_is_full_leaves_no_part_of_a_sample_and_what_was_there(tmp_path: Path, room: int) -> None:
    folder = RecordFolder(tmp_path, FINGERPRINT)
    folder.append(RECORD)
    before = folder.samples_path.read_bytes()
    with (
        files_of_at_most(len(before) + room),
        pytest.raises(UserError, match=r"sample 1 of problem 60: File too large\. .*safe") as raised,
    ):
        folder.append(replace(RECORD, sample=1))
    assert isinstance(raised.value.__cause__, OSError)
    assert folder.samples_path.read_bytes() == before
    folder.append(replace(RECORD, sample=1))
    assert set(folder.read()) == {("60", 0), ("60", 1)}


def test_no_space_is_reported_in_one_line_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "append_whole_line", full)
    with pytest.raises(UserError, match=r"samples\.jsonl: cannot take sample 0 .*No space left on device.*make room"):
        RecordFolder(tmp_path, FINGERPRINT).append(RECORD)


REQUESTS = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(0, 20)), unique=True, max_size=60)


@given(REQUESTS, st.integers(1, 9), st.randoms())
def test_every_sample_belongs_to_one_rank_and_the_shards_are_equal(keys: list[tuple[str, int]], world_size: int, random) -> None:
    requests = [Request(problem, sample, 0, ()) for problem, sample in keys]
    shards = [shard_of(requests, rank, world_size) for rank in range(world_size)]
    assert sorted(request for shard in shards for request in map(requests.index, shard)) == list(range(len(requests)))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    shuffled = random.sample(requests, len(requests))
    assert [set(shard_of(shuffled, rank, world_size)) for rank in range(world_size)] == [set(shard) for shard in shards]
    assert all(list(shard) == sorted(shard, key=requests.index) for shard in shards)


def test_a_problems_samples_go_to_different_ranks() -> None:
    requests = [Request(problem, sample, 0, ()) for problem in "abc" for sample in range(4)]
    for rank in range(4):
        assert [request.problem for request in shard_of(requests, rank, 4)] == ["a", "b", "c"]


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_there_is_not_has_no_shard(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {world_size}"):
        shard_of([], rank, world_size)


def test_a_sample_requested_twice_has_no_place_in_any_shard() -> None:
    with pytest.raises(ValueError, match="requested twice"):
        shard_of([Request("a", 0, 0, ()), Request("a", 0, 1, ())], 0, 2)


def test_half_a_character_that_a_model_wrote_does_not_stop_an_evaluation(tmp_path: Path) -> None:
    RecordFolder(tmp_path, FINGERPRINT).append(replace(RECORD, text="so \ud83d"))
    assert RecordFolder(tmp_path, FINGERPRINT).read()["60", 0].text == "so ?"
