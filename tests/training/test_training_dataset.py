import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lt_train.dataset.examples import IGNORED, Example, examples_fingerprint
from lt_train.runtime.errors import UserError
from lt_train.training.dataset import training_dataset
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
