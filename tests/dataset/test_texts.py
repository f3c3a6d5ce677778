from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lt_train.dataset.texts import text_examples
from lt_train.runtime.errors import UserError
from tests.support.repository import REPOSITORY

SAMPLE = {"samples": 64, "max_length": 32, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REPOSITORY / "data/tiny-reasoner")


@pytest.fixture
def essays(tmp_path: Path) -> Path:
    (tmp_path / "long.txt").write_text("a>b1\n" * 25)
    (tmp_path / "short.txt").write_text("c>d2\n" * 2)
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("e>f3\n" * 20)
    return tmp_path


def test_a_long_text_is_cut_into_samples_and_a_short_one_is_a_sample_of_its_own(essays, tokenizer) -> None:
    long, short = (tokenizer((essays / name).read_text())["input_ids"] for name in ("long.txt", "short.txt"))
    assert len(long) == 100 and len(short) == 8
    found = {example.id: example for example in text_examples(str(essays), tokenizer, **SAMPLE)}
    assert sorted(found) == ["long.txt:0", "long.txt:32", "long.txt:64", "short.txt:0"]
    assert found["long.txt:32"].input_ids == long[32:64]
    assert found["short.txt:0"].input_ids == short


def test_every_token_of_a_text_but_the_first_is_scored(essays, tokenizer) -> None:
    assert {len(example.prompt_ids) for example in text_examples(str(essays), tokenizer, **SAMPLE)} == {1}


def test_every_sample_begins_with_the_token_that_begins_a_sequence(essays, tokenizer) -> None:
    class WithBos:
        def __call__(self, text: str, add_special_tokens: bool = True, **settings: bool) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    found = text_examples(str(essays), WithBos(), **SAMPLE)
    assert len(found) == 4 and {example.input_ids[0] for example in found} == {1}
    assert max(map(len, found)) == 32


def test_the_seed_draws_the_samples(essays, tokenizer) -> None:
    def drawn(seed: int) -> list[str]:
        return [example.id for example in text_examples(str(essays), tokenizer, samples=2, max_length=16, seed=seed)]

    assert len(drawn(0)) == 2 and drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 1


def test_a_single_file_is_read_alone(essays, tokenizer) -> None:
    found = text_examples(str(essays / "short.txt"), tokenizer, **SAMPLE)
    assert [example.id for example in found] == ["short.txt:0"]


def test_texts_that_cannot_be_used_are_refused_by_the_setting_that_names_them(tmp_path, tokenizer) -> None:
    with pytest.raises(UserError, match=r"hybrid\.calibration\.source: .*: there is no \.txt file in .*Fix: name a folder"):
        text_examples(str(tmp_path), tokenizer, **SAMPLE)
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(UserError, match=r"hybrid\.calibration\.source: .*: its 1 \.txt files are empty"):
        text_examples(str(tmp_path), tokenizer, **SAMPLE)
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: cannot be read as UTF-8 text"):
        text_examples(str(tmp_path), tokenizer, **SAMPLE)
