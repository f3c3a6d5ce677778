"""Small models, a small tokenizer and made-up metadata to export."""

import string
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from lt_train.export.metadata import ExportMetadata, ReportedScore
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from tests.support.families import base_of, on_base

END, PAD = "<|end|>", "<|pad|>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    symbols = [PAD, END, "<|unk|>", *string.ascii_letters, *string.digits, " "]
    backend = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|unk|>", pad_token=PAD, eos_token=END, chat_template=TEMPLATE, padding_side="right"
    )


def tiny_hybrid(
    family: str = "qwen3",
    *,
    w_sink: int = 3,
    w_recent: int = 7,
    lazy: tuple[int, ...] = (1, 3),
    split: tuple[tuple[int, tuple[int, ...]], ...] = (),
) -> HybridForCausalLM:
    """Random weights, made large enough that a token more or less in sight changes what is generated."""
    spec = on_base(base_of(family), HybridSpec(4, lazy, w_sink, w_recent, split_layers=split))
    return _enlarged(build_hybrid(base_of(family), spec))


def tiny_hybrid_with_learned_sinks(base: PreTrainedConfig) -> HybridForCausalLM:
    """The same with learned sinks; they and all biases are random."""
    model = _enlarged(build_hybrid(base, HybridSpec(4, (1, 3), 0, 7, learned_sinks=True)))
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", ".sinks.weight")):
            nn.init.normal_(parameter)
    return model


@torch.no_grad()
def _enlarged(model: HybridForCausalLM) -> HybridForCausalLM:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)
    return model.eval()


def metadata(**changed) -> ExportMetadata:
    values = dict(
        recipe="tiny",
        base="maker/tiny-base",
        base_revision=None,
        selection="reach",
        data="maker/traces",
        data_format="still",
        data_counts={"rows_read": 1200, "trained_on": 1000},
        training={"method": "lora", "learning_rate": 1e-4},
        scores=(
            ReportedScore("base", "aime24", "avg@16", 0.5331, 0.0712, (0.39, 0.67), 30),
            ReportedScore("trained", "heldout_loss", "loss", 1.5, None, None, 1),
        ),
        versions={"lt_train": "0.1.0", "torch": "2.13.0"},
    )
    return ExportMetadata(**values | changed)


@contextmanager
def exports_are_not_checked() -> Iterator[None]:
    """As where memory has no room for the check: for tests that use an export. What checks find is tested in tests/export/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt_train.export.checkpoint.lacking_room", lambda *_: "a test uses it")
        yield
