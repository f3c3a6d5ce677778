"""Two real processes share sequences: they compute and train what one process does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Qwen3ForCausalLM

from lt_train.dataset.examples import IGNORED
from lt_train.hybrid.sequence_parallel import Shards
from lt_train.hybrid.spec import HybridError
from lt_train.runtime.errors import UserError
from lt_train.training.sequence_parallel import ShardedSequences, shard_of, shard_sequences
from tests.support import shared_sequence, tiny_training
from tests.support.launched_training import train_in_ranks
from tests.support.processes import call_in_ranks
from tests.support.repository import REPOSITORY
from tests.support.training_log import assert_same_course, evaluations, steps

EXAMPLES = 12
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # fp64


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """case -> logits and gradients that two processes computed together."""
    folder = tmp_path_factory.mktemp("shared")
    ended = call_in_ranks(shared_sequence.compute_together, folder / "results.pt", outputs=folder)
    assert [code for code, _ in ended] == [0, 0], ended
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", shared_sequence.CASES)
def test_two_processes_that_shard_a_sequence_compute_the_logits_and_gradients_of_one(shared, case: str) -> None:
    alone = shared_sequence.logits_and_gradients(
        shared_sequence.model_of(case), shard_of(shared_sequence.batch_of(case), index=0, degree=1)
    )
    assert shared[case].keys() == alone.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(shared[case][name], expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    Qwen3ForCausalLM(tiny_training.tiny_config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def on_one_process(folder: Path, settings: dict[str, Any], base: Path) -> None:
    tiny_training.train_in(folder, settings, tiny_training.NoTracker(), EXAMPLES, tiny_training.hybrid_from(base))


def sharing(settings: dict[str, Any], config: str) -> dict[str, Any]:
    shared = {"sequence_parallel": 2, "deepspeed": str(REPOSITORY / "launch" / config)}
    return settings | {"train": settings["train"] | shared}


def assert_same_training(two: Path, one: Path) -> None:
    # rows are filled up to an even number of tokens
    assert_same_course(two, one, tolerance=1e-3, but=["tokens", "num_tokens"])
    assert evaluations(two) == pytest.approx(evaluations(one), abs=1e-4)


@pytest.mark.slow
def test_packs_that_two_processes_shard_train_as_on_one_and_a_killed_training_resumes(tmp_path: Path, base: Path) -> None:
    """Over two epochs, with accumulation, checkpointing, held-out samples, and packs of an odd number of tokens."""
    train = {"max_steps": None, "epochs": 2, "batch_size": 2, "gradient_checkpointing": True, "save_steps": 2, "eval_steps": 3}
    settings: dict[str, Any] = {
        "train": {**train, "micro_batch_size": 1, "keep_checkpoints": 99},
        "data": {"heldout": 5, "packing": True, "max_length": 29},
    }
    one, two = tmp_path / "one", tmp_path / "two"
    on_one_process(one, settings, base)
    train_in_ranks({two: sharing(settings, "zero3.json")}, base, tmp_path / "printed", EXAMPLES)
    assert_same_training(two, one)

    assert len(steps(one)) == 6
    for later in ("final", "checkpoint-6"):
        shutil.rmtree(two / later)
    printed = train_in_ranks({two: sharing(settings, "zero3.json")}, base, tmp_path / "printed", EXAMPLES)
    assert "resumed from checkpoint-4" in printed
    assert_same_training(two, one)


@pytest.mark.slow
def test_samples_that_two_processes_shard_train_an_adapter_as_on_one(tmp_path: Path, base: Path) -> None:
    train = {"method": "lora", "max_steps": 3, "batch_size": 2, "micro_batch_size": 1}
    settings: dict[str, Any] = {"train": train, "lora": {"rank": 4}, "data": {"heldout": 3}}
    on_one_process(tmp_path / "one", settings, base)
    train_in_ranks({tmp_path / "two": sharing(settings, "zero3.json")}, base, tmp_path / "printed", EXAMPLES)
    assert_same_training(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("count", [8, 9])
def test_processes_that_shard_a_sequence_read_the_same_rows_and_others_read_others(count: int) -> None:
    rows: list[list[int]] = []
    for rank in range(4):
        sampler = BatchSamplerShard(BatchSampler(SequentialSampler(range(count)), 1, drop_last=False), 4, rank)
        loader = DataLoaderShard(range(count), batch_sampler=sampler)
        ShardedSequences(degree=2, rank=rank, world_size=4).assign_rows(loader)
        rows.append([int(row) for batch in loader for row in batch])
    assert rows[0] == rows[1] and rows[2] == rows[3]
    dealt = [row for pair in zip(rows[0], rows[2], strict=True) for row in pair]
    assert dealt[:count] == list(range(count)) and len(dealt) in (count, count + 1)


def test_rows_that_are_dealt_in_another_order_are_refused() -> None:
    sampler = BatchSamplerShard(BatchSampler(SequentialSampler(range(8)), 4, drop_last=False), 4, 0, split_batches=True)
    with pytest.raises(UserError, match="Fix: remove accelerator_config and train_sampling_strategy"):
        ShardedSequences(degree=2, rank=0, world_size=4).assign_rows(DataLoaderShard(range(8), batch_sampler=sampler))


@pytest.mark.parametrize("with_positions", [True, False])
def test_slices_keep_each_tokens_label_and_position_in_its_document(with_positions: bool) -> None:
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 1]]), "labels": torch.tensor([[IGNORED, 6, 7, 8, 9, IGNORED]])}
    places = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0]])}
    mask = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}
    first, second = (shard_of(batch | (places if with_positions else mask), index, 2) for index in (0, 1))
    assert first["shift_labels"].tolist() == [[6, 7, 8]] and second["shift_labels"].tolist() == [[9, IGNORED, IGNORED]]
    assert first["position_ids"].tolist() == [[0, 1, 2]] and second["position_ids"].tolist() == [[3, 4, 0]]
    assert second["input_ids"].tolist() == [[8, 9, 1]]


def test_heads_that_do_not_divide_are_reported_before_training() -> None:
    with pytest.raises(
        UserError, match=r"6: 4 query heads and 2 key/value heads do not divide among 6 processes\. Fix: set one of 1, 2, 4"
    ):
        shard_sequences(tiny_training.load_tiny(torch.float32), degree=6)


def test_a_slice_without_positions_or_with_a_mask_is_refused() -> None:
    model = tiny_training.load_tiny(torch.float32).train()
    model.shard_sequences(Shards(lambda *args, **kwargs: pytest.fail("no attention is computed"), index=0, degree=2))
    input_ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(HybridError, match="position_ids: missing"):
        model(input_ids)
    with pytest.raises(HybridError, match="attention_mask: a shard of a sequence takes none"):
        model(input_ids, attention_mask=torch.ones_like(input_ids), position_ids=torch.arange(4)[None])
    assert model.eval()(input_ids).logits.shape == (1, 4, tiny_training.VOCABULARY)


@pytest.mark.parametrize(
    ("index", "degree", "heads"), [(0, 2, [(0, 1), ()]), (1, 2, [(1,), (0,)]), (2, 4, [(), (0,)]), (6, 8, [(0,), ()])]
)
def test_each_process_knows_which_of_its_heads_stream(index: int, degree: int, heads: list[tuple[int, ...]]) -> None:
    spec = Shards(lambda *args: None, index, degree).spec_of_process(shared_sequence.SPLIT_IN_A_PROCESS, kv_heads=4)
    assert spec.streaming_heads(max(1, 4 // degree)) == heads
