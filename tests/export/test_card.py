import ast
import re

import pytest
import torch
from huggingface_hub import ModelCard

from lt_train.export.card import is_hub_id, model_card
from lt_train.export.verify import Check
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from tests.support.families import base_of
from tests.support.tiny_exports import metadata, tiny_hybrid

CHECK = Check("HybridQwen3ForCausalLM", "float32", 2e-7, 12.5, 1e-5, 48, 0)


def card(*, w_sink=3, **changed):
    return model_card(metadata(**changed), tiny_hybrid(w_sink=w_sink).config, torch.float32, CHECK, own_code=w_sink > 0)


def test_the_hub_reads_the_front_matter():
    data = ModelCard(card()).data
    assert data.base_model == "maker/tiny-base"
    assert data.base_model_relation == "finetune"
    assert data.datasets == ["maker/traces"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert "custom_code" in data.tags
    assert data.license is None


def test_the_card_names_layers_sizes_data_training_scores_and_versions():
    text = card()
    for expected in (
        "- streaming: 1, 3 (of 0 to 3; chosen by: reach)",
        "first `w_sink` = 3 tokens",
        "latest `w_recent` = 7 tokens",
        "- trained on: 1,000",
        "| learning_rate | 0.0001 |",
        "| aime24 | base | avg@16 | 0.5331 | ± 0.071 | 0.39 to 0.67 | 30 |",
        "| heldout_loss | trained | loss | 1.5 | – | – | 1 |",
        "- torch 2.13.0",
        "Beam search",
    ):
        assert expected in text


def test_the_card_states_what_its_check_found_and_what_it_would_have_found():
    found = Check("HybridQwen3ForCausalLM", "bfloat16", 2e-7, 12.5, 1e-5, 48, 3, 4e-6, {"sinks off": 0.5, "other KV heads": 0.75})
    checked = model_card(metadata(), tiny_hybrid().config, torch.bfloat16, found, own_code=True)
    assert (
        "(class `HybridQwen3ForCausalLM`, bfloat16). Its model was compared with the model in memory, both computing in fp32: "
        "logits differ by at most 2.0e-07 (allowed 1.0e-05; largest logit 12.5; rounding changes one by 4.0e-06, sinks off by "
        "5.0e-01, other KV heads by 7.5e-01); 48 tokens generated greedily are the same, except 3 rows that differ from a token "
        "on which is equally likely."
    ) in checked


def test_the_card_of_split_layers_names_their_heads_sizes_and_what_serves_them():
    config = tiny_hybrid(w_sink=0, lazy=(1,), split=((0, (1,)), (3, (0,)))).config
    text = model_card(metadata(), config, torch.float32, CHECK, own_code=True)
    for expected in (
        "4 of its 8 key/value heads (with their query heads), in 3 of its 4 layers, use streaming attention",
        "- streaming: 1 (of 0 to 3; chosen by: reach)\n- KV heads that stream in other layers (of 0 to 1): 0: 1; 3: 0\n",
        "| 32 MiB | 16 MiB | 50.0% |",
        "`lt-train serve FOLDER --vllm PYTHON`",
        "and `--max-num-batched-tokens 1024`, holds 1.94 times as many sequences of this length as without streaming KV heads. It "
        "groups KV heads and fills groups up: 1.31 with 3 and 2.51 with 5 streaming KV heads.",
        "through the full-attention heads:",
    ):
        assert expected in text
    assert "vllm serve" not in text


def test_the_card_states_which_server_loads_the_export():
    by_plugin, on_cpus = "`lt-train serve FOLDER --vllm PYTHON`", "over sink tokens was run on CPUs alone"
    other = "in this architecture and do not load it. `lt-train serve` serves it."
    tokens, learned, olmo = (
        model_card(metadata(), build_hybrid(base_of(family), spec).config, torch.float32, CHECK, own_code=True)
        for family, spec in (
            ("qwen3", HybridSpec(4, (1,), 3, 7)),
            ("qwen3", HybridSpec(4, (1,), 0, 7, learned_sinks=True)),
            ("olmo2", HybridSpec(4, (1,), 3, 7)),
        )
    )
    assert by_plugin in tokens and on_cpus in tokens
    assert by_plugin in learned and on_cpus not in learned
    assert other in olmo and by_plugin not in olmo and "vLLM, with blocks" not in olmo


def test_the_card_of_granite_swa_states_how_vllm_and_transformers_load_it_without_our_code():
    config = build_hybrid(base_of("qwen2"), HybridSpec(4, (1,), 0, 7, learned_sinks=True)).config
    text = model_card(metadata(), config, torch.float32, CHECK, own_code=False)
    assert "An ordinary checkpoint of GraniteSWA" in text and "`vllm serve FOLDER --max-num-batched-tokens 1024`" in text
    assert "trust_remote_code" not in text and "custom_code" not in text and "--model-impl" not in text
    assert "vLLM, with blocks of 16 tokens" in text


def test_local_folders_are_named_without_their_path_and_not_as_hub_ids(tmp_path):
    base, data = tmp_path / "bases/mine", tmp_path / "data/traces.jsonl"
    base.mkdir(parents=True)
    text = card(base=str(base), data=str(data))
    assert str(tmp_path) not in text
    assert "`mine` as a hybrid" in text and "`traces.jsonl`" in text
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None


def test_a_relative_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("data/tiny-reasoner")
    (tmp_path / "data/tiny-reasoner").mkdir(parents=True)
    assert not is_hub_id("data/tiny-reasoner")


def test_kv_cache_sizes_are_those_of_the_layers():
    # 2 KV heads of 16, keys and values, 4 bytes: 256 bytes a token and layer
    assert "in float32" in card() and "| 32 MiB | 16 MiB | 50.0% |" in card()
    half = model_card(metadata(), tiny_hybrid().config, torch.bfloat16, CHECK, own_code=True)
    assert "in bfloat16" in half and "| 16 MiB | 8 MiB | 50.0% |" in half


def test_without_training_the_card_states_it():
    text = card(training=None, scores=())
    assert "without any training" in text and "Not evaluated." in text
    assert "base_model_relation" not in ModelCard(text).data.to_dict()


def test_the_card_names_the_system_turn_of_the_prompts_or_the_one_that_they_lacked():
    assert "## Prompts" not in card()
    assert "Pass it as the first message:\n\n```text\nThink long.\n```" in card(system="Think long.")
    lacked = card(default_system_turn="<|im_start|>system\nBe kind.<|im_end|>\n")
    assert "remove it from `chat_template.jinja`:\n\n```text\n<|im_start|>system\nBe kind.<|im_end|>\n```" in lacked


def test_without_sinks_the_card_needs_no_trust():
    text = card(w_sink=0)
    assert "trust_remote_code" not in text and "custom_code" not in text
    assert "--model-impl transformers" in text


@pytest.mark.parametrize("w_sink", [0, 3])
def test_the_example_is_python(w_sink):
    (code,) = re.findall(r"```python\n(.*?)```", card(w_sink=w_sink), re.DOTALL)
    assert "CODE" not in code
    ast.parse(code)
