"""The command that starts vLLM for an export."""

import json
from pathlib import Path

import pytest

from lt_train.vllm_plugin.command import server_command


def checkpoint(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("lt_hybrid_qwen3", "HybridQwen3ForCausalLM"),
        ("qwen2", "HybridQwen2ForCausalLM"),
        ("ministral", "HybridMinistralForCausalLM"),
    ],
)
def test_every_export_is_computed_by_our_class_and_options_of_the_user_come_last(tmp_path, model_type: str, name: str) -> None:
    command = server_command(checkpoint(tmp_path, model_type=model_type), ["--port", "1", "--max-num-batched-tokens", "32"])
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {"architectures": [name]}
    assert command[-2:] == ["--max-num-batched-tokens", "32"] and command.index("1024") < command.index("32")


def test_an_export_that_vllm_computes_as_it_is_keeps_vllms_own_class(tmp_path) -> None:
    command = server_command(checkpoint(tmp_path, model_type="granite_swa"), ["--port", "1"])
    assert "--hf-overrides" not in command and command[command.index("--max-num-batched-tokens") + 1] == "1024"


def test_another_family_and_what_is_no_checkpoint_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no checkpoint: No such file"):
        server_command(tmp_path, [])
    with pytest.raises(ValueError, match="model_type: lt_hybrid_glm4: "):
        server_command(checkpoint(tmp_path, model_type="lt_hybrid_glm4", w_sink=4), [])
