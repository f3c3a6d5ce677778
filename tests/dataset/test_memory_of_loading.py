"""What is held in memory while data are tokenized and read does not grow with their number of rows."""

import json
from itertools import cycle, islice
from pathlib import Path

import pytest

from lt_train.dataset.examples import lengths
from lt_train.dataset.loading import load_examples
from lt_train.recipe.schema import Data, Model, Prompt
from tests.support.peak_memory import anonymous_peak_of
from tests.support.processes import exit_code, start
from tests.support.repository import REPOSITORY

MIB = 2**20
FEW, MANY = 600, 1_800
TRACES_IN_A_ROW = 8  # of the ledger's, about 140 tokens each


@pytest.mark.slow
def test_three_times_as_many_rows_take_no_more_memory(tmp_path: Path) -> None:
    (few, tokens_of_few), (many, tokens_of_many) = (peak_and_tokens(tmp_path / str(rows), rows) for rows in (FEW, MANY))
    print(f"bytes: {few:,} of {tokens_of_few:,} tokens, {many:,} of {tokens_of_many:,}")
    assert tokens_of_many > 2_000_000
    assert many - few < 5 * MIB  # ids and labels in int32 would be 11


def peak_and_tokens(folder: Path, rows: int) -> tuple[int, int]:
    """Measured in a process of its own, in which nothing was freed before."""
    folder.mkdir()
    write_rows(folder / "rows.jsonl", rows)
    measuring = start(measure, folder, output=folder / "output.txt")
    assert exit_code(measuring) == 0, (folder / "output.txt").read_text()
    peak, tokens = json.loads((folder / "measured.json").read_text())
    return peak, tokens


def write_rows(path: Path, rows: int) -> None:
    with open(REPOSITORY / "data/ledger/train.jsonl", encoding="utf-8") as file, open(path, "w", encoding="utf-8") as written:
        traces = cycle([json.loads(line)["combined_text"].replace("<|", "<").replace("|>", ">") for line in islice(file, 1000)])
        for number in range(rows):
            row = {"prompt": f"question {number}", "response": "\n".join(islice(traces, TRACES_IN_A_ROW))}
            written.write(json.dumps(row) + "\n")


def measure(folder: Path) -> None:
    from lt_train.inference.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Model(base=str(REPOSITORY / "data/tiny-reasoner"), dtype="fp32"), None)

    def read(source: Path) -> int:
        data = Data(source=str(source), format="prompt_response", max_length=4096, reasoning_tags="keep")
        kept = source.with_suffix("")
        found = load_examples(data, Prompt(), tokenizer, model_max_length=4096, seed=0, folder=kept, workers=2)
        return int(lengths(found.train).sum())

    write_rows(folder / "first.jsonl", 50)
    read(folder / "first.jsonl")  # what a first run imports does not count
    tokens: list[int] = []
    peak = anonymous_peak_of(lambda: tokens.append(read(folder / "rows.jsonl")))
    (folder / "measured.json").write_text(json.dumps([peak, *tokens]))
