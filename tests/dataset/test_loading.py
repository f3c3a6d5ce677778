"""Rows are counted and refused or dropped by kind; examples are tokenized once, and read from disk ever after."""

import json
import multiprocessing
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from lt_train.dataset import loading, row_tokenizer
from lt_train.dataset.examples import Example, ExampleSet, StoredExamples, examples_fingerprint, longest_first, token_rows
from lt_train.dataset.loading import load_examples
from lt_train.dataset.tally import ENOUGH
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from lt_train.runtime.interruption import raising_interrupted
from tests.support.chat_templates import family_tokenizer

GOOD = {"prompt": "6 x 7?", "response": "42"}


def rows(count: int, length: int = 20) -> list[dict[str, str]]:
    return [{"prompt": f"question {number}", "response": f"{number} " + "x" * (length + number % 7)} for number in range(count)]


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path, folder: Path | None, family: str = "qwen2.5", **settings: Any) -> ExampleSet:
    keywords = {name: settings.pop(name) for name in ("workers", "seed", "eos_ids") if name in settings}
    prompt = settings.pop("prompt", Prompt())
    data = Data.model_validate({"source": str(path), "max_length": 4096, **settings})
    return load_examples(data, prompt, family_tokenizer(family), model_max_length=4096, folder=folder, **{"seed": 0, **keywords})


FAULTY = ["{", '{"prompt": "6 x 7?", "response": ""}', {"prompt": "6 x 7?"}, "{", '{"prompt": "?", "response": " "}', "{", "{", "{"]


def test_faulty_rows_are_counted_by_kind_with_the_first_three_places_of_each(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, *FAULTY, *rows(10)])
    with pytest.raises(UserError) as error:
        load(path, None)
    reported = str(error.value)
    assert f"data.source: {path}: 8 of 19 rows cannot be trained on" in reported
    assert f"{path}:2, {path}:5, {path}:7 and 2 others: not JSON" in reported
    assert f"{path}:3, {path}:6: the answer is empty" in reported
    assert f"{path}:4: no field 'response'" in reported
    assert "data.faulty: drop" in reported


def test_faulty_rows_are_dropped_where_the_recipe_requests_it_and_reported(tmp_path: Path) -> None:
    examples = load(write(tmp_path, [GOOD, *FAULTY, *rows(10)]), None, faulty="drop")
    assert examples.counts["faulty"] == 8 and examples.counts["rows"] == 19 and len(examples.train) == 11
    assert any("data.faulty: drop" in line and "and 2 others: not JSON" in line for line in examples.warnings)


def test_a_format_that_no_row_has_stops_after_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path, rows(ENOUGH + 50))
    with pytest.raises(UserError, match=rf"{ENOUGH} of the first {ENOUGH} rows"):
        load(path, None, format="still")


def test_nothing_but_damaged_lines_is_an_error_with_their_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 2 rows .*(?s:.*)rows\.jsonl:1, .*rows\.jsonl:2: not JSON"):
        load(write(tmp_path, ["{", "["]), None)


@pytest.mark.parametrize(
    ("long", "faulty", "fix"),
    [
        (2, 0, None),
        (
            3,
            0,
            r"3 of 10 rows were dropped: 3 too long, 0 faulty\. Fix: raise data\.max_length \(the longest sample has \d",
        ),
        (0, 3, r"3 of 10 rows were dropped: 0 too long, 3 faulty\. Fix: correct the faulty rows"),
        (2, 1, r"3 of 10 rows were dropped: 2 too long, 1 faulty\. Fix: raise data\.max_length .*, and correct the faulty rows"),
    ],
)
def test_more_than_a_fifth_of_the_rows_dropped_is_a_warning_that_names_the_fix(
    tmp_path: Path, long: int, faulty: int, fix: str | None
) -> None:
    given = [*rows(10 - long - faulty), *rows(long, length=500), *["{"] * faulty]
    warnings = [line for line in load(write(tmp_path, given), None, max_length=200, faulty="drop").warnings if "dropped:" in line]
    assert bool(warnings) is (fix is not None)
    assert fix is None or re.search(fix, warnings[0])


def counted_encodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows that are tokenized from now on, in this process."""
    seen: list[str] = []
    original = row_tokenizer.RowTokenizer.__call__

    def counting(self: row_tokenizer.RowTokenizer, where: str, row: Any) -> row_tokenizer.TokenizedRow:
        seen.append(where)
        return original(self, where, row)

    monkeypatch.setattr(row_tokenizer.RowTokenizer, "__call__", counting)
    return seen


def test_the_second_start_tokenizes_nothing_and_has_the_same_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, [*rows(30), *rows(3)])
    first = load(path, tmp_path / "kept", heldout=5)
    seen = counted_encodes(monkeypatch)
    again, in_memory = load(path, tmp_path / "kept", heldout=5), load(path, None, heldout=5)
    assert len(seen) == 33  # of the one that is held in memory
    for other in (again, in_memory):
        assert list(first.train) == list(other.train) and list(first.heldout) == list(other.heldout)
        assert (first.counts, first.format, first.warnings) == (other.counts, other.format, other.warnings)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"format": "prompt_response"},
        {"limit": 20},
        {"heldout": 3},
        {"seed": 1},
        {"eos_ids": [7]},
        {"family": "smollm2"},
        {"prompt": Prompt(system="Think.")},
        {"prompt": Prompt(user="Q: {question}")},
    ],
)
def test_other_settings_are_tokenized_again_and_the_former_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    path = write(tmp_path, rows(30))
    load(path, tmp_path / "kept")
    seen = counted_encodes(monkeypatch)
    load(path, tmp_path / "kept", **change)
    assert seen
    assert len([folder for folder in (tmp_path / "kept").iterdir() if folder.is_dir()]) == 1


def test_changed_data_are_tokenized_again_and_packing_alone_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, rows(30))
    load(path, tmp_path / "kept")
    seen = counted_encodes(monkeypatch)
    load(path, tmp_path / "kept", packing=True)
    assert not seen
    write(tmp_path, rows(29))
    assert len(load(path, tmp_path / "kept").train) == len(seen) == 29


def test_what_was_left_half_written_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, rows(30))
    with monkeypatch.context() as broken:
        broken.setattr("lt_train.dataset.store.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(path, tmp_path / "kept")
    partial = tmp_path / "kept/.partial"
    partial.mkdir()
    (partial / "examples.arrow").write_bytes(b"cut")  # as kill -9 leaves it
    assert len(load(path, tmp_path / "kept").train) == 30


def test_workers_make_the_same_examples_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tokenizer, "ROWS_WITHOUT_WORKERS", 8)
    monkeypatch.setattr(row_tokenizer, "ROWS_AT_ONCE", 4)
    path = write(tmp_path, [*rows(50), "{", *rows(3)])
    alone, shared = (load(path, None, faulty="drop", workers=workers, heldout=7) for workers in (1, 3))
    assert list(alone.train) == list(shared.train) and list(alone.heldout) == list(shared.heldout)
    assert alone.counts == shared.counts and alone.warnings == shared.warnings


def test_a_worker_ends_when_its_parent_ends_it_however_late_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with the command's own handler lost the signal while it began, and the command waited for it for ever."""
    monkeypatch.setattr(row_tokenizer, "ROWS_WITHOUT_WORKERS", 1)
    monkeypatch.setattr(row_tokenizer, "ROWS_AT_ONCE", 1)
    placed = [(str(number), {}) for number in range(9)]
    with raising_interrupted():
        handlers = list(row_tokenizer.tokenized_rows(placed, _handler_of_sigterm, workers=2))
        assert handlers[0] not in (signal.SIG_DFL, signal.SIG_IGN), "the command's own"
        assert handlers[1:] == [signal.SIG_DFL] * 8


def _handler_of_sigterm(where: str, row: Any) -> Any:
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, signal.Handlers) else "raises"


def test_a_damaged_file_stops_the_workers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr(row_tokenizer, "ROWS_WITHOUT_WORKERS", 8)
    content = gzip.compress(write(tmp_path, rows(2_000)).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot be read"):
        load(tmp_path / "cut.jsonl.gz", None, workers=2)


def _load_into(path: Path, folder: Path, results: Any) -> None:
    seen: list[int] = []
    original = loading.write_examples
    loading.write_examples = lambda *given: (seen.append(1), original(*given))[1]  # type: ignore[assignment]
    results.put((len(seen), [example.id for example in load(path, folder).train], len(seen)))


def test_of_processes_that_start_together_one_tokenizes_and_the_others_wait(tmp_path: Path) -> None:
    path, context = write(tmp_path, rows(400)), multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_load_into, args=(path, tmp_path / "kept", results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sum(written for _, _, written in found) == 1
    assert len({tuple(ids) for _, ids, _ in found}) == 1


def stored_and_listed(tmp_path: Path, count: int = 40) -> tuple[StoredExamples, list[Example]]:
    stored = load(write(tmp_path, rows(count)), tmp_path / "kept").train
    assert isinstance(stored, StoredExamples)
    return stored, list(stored)


def test_stored_examples_are_a_sequence_like_any_other(tmp_path: Path) -> None:
    stored, listed = stored_and_listed(tmp_path)
    assert len(stored) == len(listed) and stored[3] == listed[3] and stored[-1] == listed[-1]
    assert list(stored[5:9]) == listed[5:9] and list(stored[::-3]) == listed[::-3] and list(stored[3:3]) == []
    assert list(longest_first(stored)) == list(longest_first(listed)) == sorted(listed, key=lambda example: -len(example))
    assert examples_fingerprint(stored) == examples_fingerprint(listed) == examples_fingerprint(stored[:])
    with pytest.raises(IndexError):
        stored[len(listed)]


def test_stored_examples_lie_in_a_mapped_file_and_not_in_memory(tmp_path: Path) -> None:
    stored, _ = stored_and_listed(tmp_path)
    assert [Path(file["filename"]).name for file in stored.table.cache_files] == ["examples.arrow"]
    assert [Path(file["filename"]).name for file in token_rows(stored).cache_files] == ["examples.arrow"]


def test_the_fingerprint_of_old_runs_stays_the_same(tmp_path: Path) -> None:
    """The digest of commit d27557d: over the repr of token ids and labels."""
    import hashlib

    _, listed = stored_and_listed(tmp_path, 3)
    digest = hashlib.sha256()
    for example in listed:
        digest.update(repr((example.input_ids, example.labels)).encode())
    assert examples_fingerprint(listed) == digest.hexdigest()
