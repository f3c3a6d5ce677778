"""Samples of 10K to 32K tokens on one device: what they must never hold, and what they held."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lt_train.dataset.examples import Example, ExampleSet
from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.tracking import NoTracker
from lt_train.training import trainer as training
from tests.support import long_training
from tests.support.peak_memory import LiveBytes
from tests.support.processes import exit_code, start
from tests.support.tiny_training import SPEC, load_tiny, tiny_config, tiny_recipe, tiny_tokenizer, train_in

QWEN_VOCABULARY = 151_936


def bytes_of_loss(tokens: int, folder: Path) -> LiveBytes:
    """What the loss of one sample takes in our trainer, forward and backward, with Qwen's vocabulary.

    The body runs for real; from its last hidden states on, tensors have sizes but no data: real ones take minutes to compute.
    """
    config = tiny_config()
    config.vocab_size = QWEN_VOCABULARY
    recipe = tiny_recipe({"data": {"max_length": tokens, "packing": True}})
    row = tuple(range(2, tokens + 2))
    trainer = training._build_trainer(
        recipe,
        training.sft_config(recipe, recipe.train, folder),
        lambda dtype: build_hybrid(config, SPEC).to(dtype),
        tiny_tokenizer(),
        ExampleSet([Example("0", "made up:0", row[:3], row[3:])], [], {}),
        SPEC,
    )
    without_data, counted = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with ExitStack() as modes:

        def leave_out_the_data(module: Any, args: Any, output: Any) -> None:
            modes.enter_context(without_data)
            modes.enter_context(counted)
            output.last_hidden_state = without_data.from_tensor(output.last_hidden_state.detach()).requires_grad_()

        trainer.model.model.register_forward_hook(leave_out_the_data)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        trainer.model(**batch, use_cache=False, fused_lm_head=True).loss.backward()
    assert trainer.model.lm_head.weight.grad.shape == (QWEN_VOCABULARY, config.hidden_size)
    return counted


def test_the_loss_of_16k_tokens_and_152k_words_never_holds_their_logits(tmp_path: Path) -> None:
    """TRL computes tiles of 4,096 tokens and 32,768 words. Without Triton's kernels, as here, it holds about eight at a time."""
    half, full = (bytes_of_loss(tokens, tmp_path / str(tokens)) for tokens in (8_192, 16_384))
    logits = 16_384 * QWEN_VOCABULARY * 4
    assert full.largest < 0.06 * logits
    assert half.peak < full.peak < 1.01 * half.peak < 0.5 * logits


def test_neither_training_nor_the_held_out_loss_runs_the_head_over_a_sequence(tmp_path: Path) -> None:
    """All logits come from the tiles of TRL's loss, which takes the head's weights and not the head."""

    def load(dtype: torch.dtype) -> HybridForCausalLM:
        model = load_tiny(dtype)
        model.lm_head.register_forward_hook(lambda *args: pytest.fail("the head ran over an entire sequence"))
        return model

    for packing in (False, True):
        settings = {"data": {"heldout": 3, "packing": packing}, "train": {"max_steps": 1}}
        if packing:
            settings["train"] |= {"batch_size": 2, "micro_batch_size": 1}
        result = train_in(tmp_path / str(packing), settings, NoTracker(), load=load)
        assert result.eval_loss is not None and result.train_loss is not None


def test_the_documents_of_a_32k_pack_are_found_in_no_time() -> None:
    """Once in a forward pass of many seconds: 162 documents took 2 ms, 1,260 took 8 ms (one thread, CPU)."""
    position_ids = torch.arange(26).repeat(1_260)[None]
    started = time.process_time()
    documents = find_documents(1, position_ids.shape[1], position_ids.device, None, position_ids)
    assert time.process_time() - started < 0.5
    assert len(documents.spans) == 1_260


@pytest.mark.slow
def test_a_pack_of_10k_tokens_takes_memory_linear_in_its_length_and_checkpointing_cuts_it(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    assert exit_code(start(long_training.measure, tmp_path, output=output)) == 0, output.read_text()
    peaks = json.loads((tmp_path / "peaks.json").read_text())
    assert peaks["a pack"] < 5 * peaks["a quarter of a pack"]  # 4 where memory is linear, 16 where it is quadratic
    assert peaks["a pack"] < 0.6 * peaks["a pack, every activation kept"]
