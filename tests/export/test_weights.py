"""Weights for an export, read from their files one at a time: they are those of the model in memory, to the bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lt_train.export.weights import ExportedHybrid, MergedWeights, NotOnDisk, WeightFiles, base_files, files_by_name, in_memory
from lt_train.hybrid.loading import build_hybrid, load_hybrid, prove_auto_family
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from tests.support.families import BASES, MINIMAX

SPEC = HybridSpec(4, (1, 3), 3, 7)
FAMILIES = ["qwen2", "llama", "qwen3_moe"]  # with biases and without, and with files that hold each expert apart


def base_in(folder: Path, family: str, **config: Any) -> Path:
    torch.manual_seed(0)
    settings = copy.deepcopy(BASES[family])
    for name, value in config.items():
        setattr(settings, name, value)
    AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40kB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def empty(base: Path) -> HybridForCausalLM:
    from transformers import AutoConfig

    with torch.device("meta"):
        return build_hybrid(AutoConfig.from_pretrained(base), SPEC)


def adapter_in(folder: Path, base: Path, **settings: Any) -> Path:
    """A LoRA adapter with random weights, as a training leaves it."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings)
    model = get_peft_model(load_hybrid(base, SPEC), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def weights_of(base: Path) -> WeightFiles:
    weights = WeightFiles(files_by_name(base_files(str(base), None)))
    weights.check_fits(empty(base))
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_sharded_base_are_those_that_it_loads_with(family: str, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", family)
    weights = weights_of(base)
    for name, parameter in load_hybrid(base, SPEC).named_parameters():
        assert torch.equal(weights.read(name).float(), parameter)


def test_the_correction_of_a_router_is_exported_with_the_weights(tmp_path: Path) -> None:
    prove_auto_family(MINIMAX)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MINIMAX)
    for layer in model.model.layers:
        layer.mlp.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    files, loaded = weights_of(tmp_path), load_hybrid(tmp_path, SPEC)
    exported = in_memory(loaded)
    assert "model.layers.3.mlp.e_score_correction_bias" in exported.parameters
    for name, weight in exported.parameters.items():
        assert torch.equal(files.read(name), weight) and torch.equal(exported.read(name), weight), name


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {}),
        ("llama", {}),
        ("qwen2", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
        (
            "qwen2",
            {
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 3},
                "layers_to_transform": [1, 3],
                "layers_pattern": "layers",
            },
        ),
        ("llama", {"modules_to_save": ["norm"]}),
        ("qwen2", {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
        ("qwen3_moe", {"target_modules": ["q_proj", "v_proj"]}),
    ],
    ids=str,
)
def test_an_adapter_merged_by_module_gives_the_weights_of_the_merged_model(family: str, settings: Any, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", family)
    adapter = adapter_in(tmp_path / "adapter", base, **settings)
    of_base = weights_of(base)
    merged = MergedWeights(of_base, empty(base), adapter, None)
    wanted = PeftModel.from_pretrained(load_hybrid(base, SPEC), adapter).merge_and_unload()
    moved = 0
    for name, parameter in wanted.named_parameters():
        assert torch.equal(merged.read(name).float(), parameter), name
        assert torch.equal(merged.read(name).float(), parameter), f"{name}, read again"
        moved += not torch.equal(parameter, of_base.read(name).float())
    assert moved >= 4


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ],
)
def test_an_adapter_that_reaches_beyond_its_modules_is_left_to_the_model_in_memory(
    settings: Any, reported: str, tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base", "llama")
    adapter = adapter_in(tmp_path / "adapter", base, **settings)
    with pytest.raises(NotOnDisk, match=reported):
        MergedWeights(weights_of(base), empty(base), adapter, None)


def test_an_adapter_of_another_hybrid_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama")
    adapter = adapter_in(tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(name for name in tensors if "layers.3." in name)]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lacks 1 weights of this hybrid, such as .*layers\.3\."):
        MergedWeights(weights_of(base), empty(base), adapter, None)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, other = base_in(tmp_path / "base", "llama"), base_in(tmp_path / "other", "llama", intermediate_size=32)
    with pytest.raises(UserError, match=r"does not fit this hybrid: .*size mismatch for .*down_proj"):
        MergedWeights(weights_of(base), empty(base), adapter_in(tmp_path / "adapter", other), None)


def test_a_module_that_does_not_merge_to_what_was_trained_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_in(tmp_path / "base", "llama")
    merged = MergedWeights(weights_of(base), empty(base), adapter_in(tmp_path / "adapter", base), None)
    monkeypatch.setattr(
        "peft.tuners.lora.layer.Linear.merge", lambda self, **given: self.merged_adapters.append("default"), raising=True
    )
    with pytest.raises(UserError, match="not the trained one"):
        merged.read("model.layers.1.self_attn.q_proj.weight")


def test_files_of_another_model_are_left_to_the_model_in_memory(tmp_path: Path) -> None:
    base, other = base_in(tmp_path / "base", "llama"), base_in(tmp_path / "other", "llama", intermediate_size=32)
    with pytest.raises(NotOnDisk, match="down_proj"):
        WeightFiles(files_by_name(base_files(str(other), None))).check_fits(empty(base))


def test_tied_weights_that_differ_in_the_files_are_left_to_the_model_in_memory(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", "llama", tie_word_embeddings=True)
    weights_of(base)
    head = tmp_path / "head.safetensors"
    tied = WeightFiles(files_by_name(base_files(str(base), None))).read("model.embed_tokens.weight")
    for change, refused in ((0, False), (1, True)):
        save_file({"lm_head.weight": tied + change}, head)
        weights = WeightFiles(files_by_name([*base_files(str(base), None), head]))
        if refused:
            with pytest.raises(NotOnDisk, match="tied"):
                weights.check_fits(empty(base))
        else:
            weights.check_fits(empty(base))


def test_a_base_without_safetensors_is_left_to_the_model_in_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotOnDisk, match="no safetensors"):
        base_files(str(tmp_path), None)


def test_a_value_beyond_fp16_is_refused_in_that_dtype_alone() -> None:
    model = build_hybrid(BASES["qwen3"], SPEC)
    with torch.no_grad():
        model.model.norm.weight[3] = 7e4
    hybrid: ExportedHybrid = in_memory(model)
    assert hybrid.weight("model.norm.weight", torch.bfloat16).isfinite().all()
    assert hybrid.weight("lm_head.weight", torch.float16).dtype == torch.float16
    with pytest.raises(UserError, match=r"export.dtype: fp16: model.norm.weight holds 7e\+04"):
        hybrid.weight("model.norm.weight", torch.float16)
