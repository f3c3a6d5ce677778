import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lt_train.dataset.examples import Example
from lt_train.training.dataset import training_dataset
from lt_train.training.samples import SHORTEST_PIECE, samples_in
from tests.support.tiny_training import PAD, tiny_examples, tiny_tokenizer

EXAMPLES = tiny_examples().train


def wheres(*numbers: int) -> list[str]:
    return [EXAMPLES[number].where for number in numbers]


def test_rows_of_a_padded_batch_are_found_in_their_order() -> None:
    rows = training_dataset(EXAMPLES, max_length=24, packing=False)
    batch = DataCollatorForLanguageModeling(tiny_tokenizer().pad_token_id)([rows[5], rows[0], rows[9]])
    assert samples_in([batch], EXAMPLES) == wheres(5, 0, 9)
    assert samples_in([batch, DataCollatorForLanguageModeling(PAD)([rows[1]])], EXAMPLES) == wheres(5, 0, 9, 1)


def test_every_document_of_a_pack_is_reported() -> None:
    packs = training_dataset(EXAMPLES, max_length=48, packing=True)
    pack = max(packs, key=lambda row: len(row["seq_lengths"]))
    batch = DataCollatorForLanguageModeling(PAD, padding_free=True)([pack])
    found = samples_in([batch], EXAMPLES)
    assert len(found) == len(pack["seq_lengths"]) > 2
    by_origin = {e.where: e for e in EXAMPLES}
    assert [token for where in found for token in by_origin[where].input_ids] == pack["input_ids"]


def test_a_slice_that_begins_in_mid_sample_is_found_if_it_is_long_enough() -> None:
    long = Example(id="long", where="long:1", prompt_ids=tuple(range(2, 30)), answer_ids=(3, 5, 7))
    ids = torch.tensor([[*long.input_ids[8:], *EXAMPLES[0].input_ids]])
    positions = torch.tensor([[*range(8, len(long)), *range(len(EXAMPLES[0]))]])
    examples = [*EXAMPLES, long]
    assert samples_in([{"input_ids": ids, "position_ids": positions}], examples) == ["long:1", *wheres(0)]
    short = {"input_ids": ids[:, : SHORTEST_PIECE - 1], "position_ids": positions[:, : SHORTEST_PIECE - 1]}
    assert samples_in([short], examples) == []


def test_samples_of_equal_tokens_are_all_named() -> None:
    duplicate = Example(id="duplicate", where="duplicate:1", prompt_ids=EXAMPLES[3].prompt_ids, answer_ids=EXAMPLES[3].answer_ids)
    ids = torch.tensor([EXAMPLES[3].input_ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert samples_in([batch], [*EXAMPLES, duplicate]) == [*wheres(3), "duplicate:1"]
