"""Logits and gradients of sequences that two processes share, and those of one process."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from lt_train.dataset.examples import IGNORED
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.training.launch import start_deepspeed
from lt_train.training.sequence_parallel import shard_of, shard_sequences

SPEC = HybridSpec(num_layers=2, lazy_layers=(1,), w_sink=2, w_recent=5)
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
QWEN3 = Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
QWEN2_ONE_KEY_HEAD = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=1)
QWEN3_FOUR_KEY_HEADS = Qwen3Config(**SIZES, num_attention_heads=8, num_key_value_heads=4, head_dim=8)

SPLIT = HybridSpec.from_streaming_heads([(0,), (1,)], kv_heads=2, w_sink=2, w_recent=5)
"""Of each layer one process computes the full head, the other the head that streams."""
SPLIT_IN_A_PROCESS = HybridSpec.from_streaming_heads([(0, 1, 3), (2,)], kv_heads=4, w_sink=2, w_recent=5)
"""Heads that stream of the first process, of the second, and of both."""

# name -> model, what streams, lengths of the documents in one row, gradient checkpointing. Slices begin at half of the sum.
CASES: dict[str, tuple[PretrainedConfig, HybridSpec, list[int], bool]] = {
    "one document": (QWEN3, SPEC, [32], False),
    "packed": (QWEN3, SPEC, [11, 1, 13, 3, 4], False),
    "packed, checkpointed": (QWEN3, SPEC, [11, 1, 13, 3, 4], True),
    "packed and padded": (QWEN3, SPEC, [13, 14, 1, 1, 1], False),
    "one key/value head for both": (QWEN2_ONE_KEY_HEAD, SPEC, [11, 13, 8], False),
    "a KV head of each kind in a process": (QWEN3, SPLIT, [11, 1, 13, 3, 4], False),
    "KV heads of both kinds in a process": (QWEN3_FOUR_KEY_HEADS, SPLIT_IN_A_PROCESS, [11, 1, 13, 3, 4], True),
}


def model_of(case: str) -> HybridForCausalLM:
    config, spec, _, checkpointing = CASES[case]
    torch.manual_seed(0)
    model = build_hybrid(config, spec).double().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def batch_of(case: str) -> dict[str, Tensor]:
    lengths = CASES[case][2]
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, 40, (1, sum(lengths)), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = input_ids.masked_fill(position_ids < 3, IGNORED)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def logits_and_gradients(model: HybridForCausalLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the summed loss over `shift_labels`."""
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), ignore_index=IGNORED, reduction="sum").backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach()} | gradients


def compute_together(out: Path) -> None:
    """The work of each process of a launch of two: `out` holds the results by case."""
    torch.set_num_threads(1)
    start_deepspeed()
    results = {}
    for case in CASES:
        model = model_of(case)
        shard_sequences(model, degree=2)
        result = logits_and_gradients(model, shard_of(batch_of(case), dist.get_rank(), 2))
        slices = [torch.empty_like(result["logits"]) for _ in range(2)]
        dist.all_gather(slices, result["logits"])
        for name, gradient in result.items():
            if name != "logits":
                dist.all_reduce(gradient)
        results[case] = result | {"logits": torch.cat(slices, dim=1)}
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()
