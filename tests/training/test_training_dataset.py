from pathlib import Path

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lt_train.dataset.examples import IGNORED, Example, StoredExamples, examples_fingerprint
from lt_train.dataset.loading import load_examples
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from lt_train.training.dataset import training_dataset
from tests.support.chat_templates import family_tokenizer
from tests.support.tiny_training import EOS, PAD, tiny_examples


def example(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Example:
    return Example(id="0", where="file.jsonl:1", prompt_ids=prompt, answer_ids=answer)


def documents_of(row: dict) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(tuple(row["input_ids"][s:e]), tuple(row["labels"][s:e])) for s, e in zip(starts, ends, strict=True)]


def test_packs_hold_every_document_whole_with_its_labels() -> None:
    examples = tiny_examples().train
    packs = training_dataset(examples, max_length=24, packing=True)
    assert len(packs) < len(examples)
    assert all(len(row["input_ids"]) <= 24 for row in packs)
    packed = sorted(document for row in packs for document in documents_of(row))
    assert packed == sorted((tuple(e.input_ids), tuple(e.labels)) for e in examples)


def test_a_packed_batch_restarts_positions_and_no_document_predicts_the_next_ones_start() -> None:
    examples = tiny_examples().train
    packs = training_dataset(examples, max_length=24, packing=True)
    collate = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    batch = collate([packs[0], packs[1]])
    lengths = packs[0]["seq_lengths"] + packs[1]["seq_lengths"]
    assert batch["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]
    assert "attention_mask" not in batch
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORED).all()


def test_packing_keeps_every_label_that_training_can_use() -> None:
    examples = tiny_examples().train
    packs = training_dataset(examples, max_length=24, packing=True)
    collate = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    labels = collate(list(packs))["labels"]
    assert (labels != IGNORED).sum() == sum(len(e.answer_ids) for e in examples)


def test_unpacked_rows_are_padded_on_the_right_and_the_final_eos_is_learned() -> None:
    rows = training_dataset([example((5, 6), (7, EOS)), example((5,), (EOS,))], max_length=8, packing=False)
    batch = DataCollatorForLanguageModeling(pad_token_id=PAD)(list(rows))
    assert batch["input_ids"].tolist() == [[5, 6, 7, EOS], [5, EOS, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, EOS], [IGNORED, EOS, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_a_pad_token_that_is_the_eos_still_teaches_to_stop() -> None:
    rows = training_dataset([example((5, 6), (7, EOS)), example((5,), (EOS,))], max_length=8, packing=False)
    batch = DataCollatorForLanguageModeling(pad_token_id=EOS)(list(rows))
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, EOS], [IGNORED, EOS, IGNORED, IGNORED]]


def test_a_sample_longer_than_max_length_is_an_error_and_not_cut_in_silence() -> None:
    with pytest.raises(UserError, match=r"data\.max_length.*file\.jsonl:1, has 4"):
        training_dataset([example((5, 6), (7, EOS))], max_length=3, packing=True)


def test_an_example_that_teaches_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no answer token.*file\.jsonl:1"):
        training_dataset([example((5, 6), ())], max_length=8, packing=False)
    with pytest.raises(UserError, match="no answer token"):  # the first token of a sequence is never predicted
        training_dataset([example((), (EOS,))], max_length=8, packing=False)


def test_no_examples_is_an_error() -> None:
    with pytest.raises(UserError, match="no example"):
        training_dataset([], max_length=8, packing=False)


def test_the_fingerprint_sees_tokens_labels_and_order() -> None:
    one, other = example((5, 6), (7, EOS)), example((5, 6, 7), (EOS,))
    assert one.input_ids == other.input_ids
    prints = {examples_fingerprint(e) for e in ([one], [other], [one, other], [other, one])}
    assert len(prints) == 4
    assert examples_fingerprint([one]) == examples_fingerprint([example((5, 6), (7, EOS))])


@pytest.mark.parametrize("packing", [False, True])
def test_stored_examples_are_trained_on_as_listed_ones_are(tmp_path: Path, packing: bool) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "question {at}", "response": "{"x" * (20 + at % 7)}"}}\n' for at in range(40)))
    data, tokenizer = Data(source=str(rows), max_length=4096), family_tokenizer("qwen2.5")
    stored = load_examples(data, Prompt(), tokenizer, model_max_length=4096, seed=0, folder=tmp_path / "kept").train
    assert isinstance(stored, StoredExamples)
    one, other = (training_dataset(examples, max_length=256, packing=packing) for examples in (stored, list(stored)))
    assert one.column_names == other.column_names and one.to_list() == other.to_list()
