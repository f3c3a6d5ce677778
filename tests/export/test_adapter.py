"""`lt-train export RUN --adapter OUT`: a folder that PEFT loads on the converted base."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from lt_train.export.adapter import adapter_card
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.serving.checkpoint import load_checkpoint
from tests.support.repository import REPOSITORY
from tests.support.tiny_exports import metadata

FIXTURE = REPOSITORY / "tests/fixtures/run_before_the_folders"
LtTrain = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished training with LoRA."""
    monkeypatch.chdir(shutil.copytree(FIXTURE, tmp_path / "old"))
    return Path("finished/old")


def loaded_by_its_card(folder: Path) -> HybridForCausalLM:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code.replace('"."', repr(str(folder))), names)
    return names["model"].eval()


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids_1T = torch.arange(5, 60)[None]
    return model(input_ids=ids_1T, use_cache=False).logits


def test_the_code_of_its_card_loads_what_was_trained(lt_train: LtTrain, run: Path) -> None:
    assert lt_train("export", run, "--adapter", "adapter")[:2] == (0, "adapter: adapter\n")
    assert {path.name for path in Path("adapter").iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    adapted = loaded_by_its_card(Path("adapter"))
    trained = logits(load_checkpoint(run).model)
    torch.testing.assert_close(logits(adapted), trained, atol=1e-4, rtol=0)
    with adapted.disable_adapter():
        assert (logits(adapted) - trained).abs().max() > 1e-3


@pytest.mark.parametrize("command", [("export", "--adapter", "adapter"), ("chat",)])
def test_a_run_whose_base_is_another_model_now_is_not_read(command: tuple[str, ...], lt_train: LtTrain, run: Path) -> None:
    weights = Path("base/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = lt_train(command[0], run, *command[1:])
    assert code == 2 and "model.base: base: another model than the one that this run was begun with" in err


def test_its_card_names_base_and_spec(lt_train: LtTrain, run: Path) -> None:
    lt_train("export", run, "--adapter", "adapter")
    card = Path("adapter/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "A PEFT adapter for `base`" in card and re.search(r"streaming layers: \d(, \d)* \(of 0 to \d; chosen by: reach\)", card)
    assert "sinks: `w_sink`: 4 tokens; `w_recent`: 12 tokens" in card and "| lora_rank |" in card
    assert '"base_model_name_or_path": "base"' in Path("adapter/adapter_config.json").read_text()


def test_its_card_states_where_learned_sinks_are() -> None:
    card = adapter_card(HybridSpec(4, (1, 2), 0, 12, learned_sinks=True), metadata())
    assert "sinks: learned, in this adapter; `w_recent`: 12 tokens" in card and "w_recent=12, learned_sinks=True)" in card


def test_its_card_names_the_heads_of_split_layers() -> None:
    spec = HybridSpec(4, (1,), 4, 12, split_layers=((0, (1,)), (3, (0, 2))))
    card = adapter_card(spec, metadata())
    assert "1 of its 4 layers and single KV heads of 2 others used streaming" in card
    assert "- KV heads that stream in other layers: 0: 1; 3: 0, 2\n" in card
    (made,) = re.findall(r"^spec = (.*)$", card, re.MULTILINE)
    assert eval(made) == spec


def test_queries_and_keys_that_the_recipe_restores_have_no_adapter(lt_train: LtTrain, run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["train"]["restore_query_key"] = True
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert lt_train("export", run, "--adapter", "adapter")[0] == 0
    trained, exported = names(run / "train/final"), names(Path("adapter"))
    full = [layer for layer in range(4) if layer not in load_checkpoint(run).model.spec.lazy_layers]
    left_out = {name for name in trained if re.search(rf"layers\.({'|'.join(map(str, full))})\.self_attn\.[qk]_proj", name)}
    assert left_out and exported == trained - left_out
    torch.testing.assert_close(logits(loaded_by_its_card(Path("adapter"))), logits(load_checkpoint(run).model), atol=1e-4, rtol=0)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: Path("adapter").mkdir() or Path("adapter/notes").touch(), "--adapter: adapter: exists already"),
        (lambda run: Path("adapter").touch(), "--adapter: adapter: exists already"),
        (lambda run: (run / "recipe.yaml").unlink(), "no run: there is no recipe.yaml"),
        (lambda run: (run / "recipe.yaml").write_text("name: [1"), "not the record of a run"),
        (lambda run: shutil.rmtree(run), "no such folder"),
        (lambda run: (run / "stages/train.json").unlink(), "its training is not finished"),
        (lambda run: (run / "train/final/adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    lt_train: LtTrain, run: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(run)
    code, out, err = lt_train("export", run, "--adapter", "adapter")
    assert (code, out, message in err, err.count("\n")) == (2, "", True, 1), err
    assert not list(Path().glob(".adapter*"))


def test_a_run_without_adapters_reports_it(lt_train: LtTrain, run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"lora": None, "train": recipe["train"] | {"method": "full"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = lt_train("export", run, "--adapter", "adapter")
    assert code == 2 and "this run trains no adapter" in err


@pytest.mark.parametrize("arguments", [[], ["--verify", "a", "b"], ["--adapter", "a"], ["--verify", "a", "--adapter", "b"]])
def test_export_wants_one_thing_to_do(lt_train: LtTrain, arguments: list[str]) -> None:
    code, _, err = lt_train("export", *arguments)
    assert code == 2 and "export: name a recipe, or RUN --adapter OUT, or --verify EXPORT" in err
