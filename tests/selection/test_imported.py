"""Published hybrids as the `hybrid` part of a recipe, from files in their authors' formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridError, HybridSpec
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection.imported import GATES, import_hybrid
from tests.support.families import BASES

CODE = """
import flash_attention_that_is_not_installed

def sliding_window_causal_with_stream(b, h, q_idx, kv_idx):
    causal_mask = q_idx >= kv_idx
    window_mask = (q_idx - kv_idx) <= 1024
    stream_mask = (q_idx >= 128) & (kv_idx <= 128)
    return (causal_mask & window_mask) | stream_mask

class Attention:
    def __init__(self, layer_idx):
        # self.lazy_list = [1, 2]
        self.lazy_list = [38, 51, 5, 24]
"""


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def gates(folder: Path, rows: list[list[float]], **config: Any) -> Path:
    """As numpy.savetxt writes them, beside the arguments of the training."""
    written(folder / GATES, "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in rows))
    written(folder / "config.json", {"model_name": "models/any", "sink_size": 128, "recent_size": 256, "threshold": 0.5} | config)
    return folder


def as_part(text: str) -> Hybrid:
    return Hybrid.model_validate(yaml.safe_load(text)["hybrid"])


def test_a_checkpoint_with_native_layer_types_gives_its_layers_and_window(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = written(tmp_path / "config.json", {"model_type": "qwen3", "layer_types": kinds, "sliding_window": 512})
    for source in (tmp_path, config):
        found = import_hybrid(source)
        assert (found.layers, found.w_sink, found.w_recent) == ((0, 2), 0, 512)
    assert as_part(found.as_recipe()).layers == [0, 2]
    assert "# model.base: a copy of the checkpoint" in found.as_recipe()


def test_a_hybrid_of_ours_gives_its_sinks_too(tmp_path: Path) -> None:
    ours = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 12, "w_sink": 4}
    written(tmp_path / "config.json", ours)
    assert as_part(import_hybrid(tmp_path).as_recipe()).w_sink == 4
    granite_swa = {"model_type": "granite_swa", "layer_types": ours["layer_types"], "sliding_window": 12}
    for learned in (ours | {"w_sink": 0, "learned_sinks": True}, granite_swa):
        written(tmp_path / "config.json", learned)
        part = as_part(import_hybrid(tmp_path).as_recipe())
        assert (part.sink, part.w_sink, part.w_recent) == ("learned", 0, 12)
    assert "a checkpoint of GraniteSWA is no base" in import_hybrid(tmp_path).as_recipe()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_checkpoint_that_slides_natively_computes_the_same_as_a_hybrid_of_its_copy_with_full_attention(
    family: str, tmp_path: Path
) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = type(BASES[family])(
        **BASES[family].to_dict() | {"layer_types": kinds, "sliding_window": 5, "use_sliding_window": True}
    )
    native = AutoModelForCausalLM.from_config(config).eval()
    native.save_pretrained(tmp_path / "native")
    found = import_hybrid(tmp_path / "native")
    spec = HybridSpec(4, found.layers, found.w_sink or 0, found.w_recent or 0)
    with pytest.raises(HybridError, match=r"in the base layers .* see 5 tokens from the start"):
        load_hybrid(tmp_path / "native", spec)
    settings = json.loads((tmp_path / "native/config.json").read_text())
    settings |= {"layer_types": ["full_attention"] * 4, "sliding_window": None, "use_sliding_window": False}
    written(tmp_path / "native/config.json", settings)
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        there, here = (model(ids, use_cache=False).logits for model in (native, load_hybrid(tmp_path / "native", spec)))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


def test_swaa_settings_give_the_layers_that_slide_and_report_what_is_not_taken_over(tmp_path: Path) -> None:
    swaa = {"sliding_window_size": 2048, "keep_first": 100, "force_fa_decode": True, "non_sliding_layers": [1, 3]}
    found = import_hybrid(written(tmp_path / "swaa.json", swaa), num_layers=6)
    assert (found.layers, found.w_sink, found.w_recent) == ((0, 2, 4, 5), 100, 2048)
    assert "# not taken over: force_fa_decode" in found.as_recipe()
    config = written(tmp_path / "config.json", {"model_type": "qwen3", "num_hidden_layers": 4, "swaa_config": swaa})
    assert import_hybrid(config).layers == (0, 2)


def test_duo_attentions_gates_give_the_layers_with_the_lowest_means(tmp_path: Path) -> None:
    rows = [[1.0, 1.0, 0.9], [-5e-5, 1.0, 0.1], [2.7, 0.3, 0.8], [0.0, 0.02, 0.2]]  # 2.7 counts as 1
    found = import_hybrid(gates(tmp_path / "pattern", rows), ratio=0.5)
    assert (found.layers, found.w_sink, found.w_recent) == ((1, 3), 128, 256)
    assert "1 KV heads of these layers have full attention" in found.as_recipe()
    assert "1 KV heads of the other layers stream there" in found.as_recipe()
    assert import_hybrid(tmp_path / "pattern" / GATES, ratio=0.25).layers == (3,)
    assert import_hybrid(tmp_path / "pattern", ratio=0.75).layers == (1, 2, 3)
    assert as_part(found.as_recipe()).w_recent == 256


def test_duo_attentions_gates_give_single_heads_by_their_threshold_or_by_a_ratio(tmp_path: Path) -> None:
    rows = [[1.0, 1.0, 0.9], [-5e-5, 1.0, 0.1], [2.7, 0.3, 0.8], [0.0, 0.02, 0.2]]
    folder = gates(tmp_path / "pattern", rows)
    found = import_hybrid(folder, by_head=True)
    assert found.heads == ((), (0, 2), (1,), (0, 1, 2)) and (found.w_sink, found.w_recent) == (128, 256)
    part = as_part(found.as_recipe())
    assert (part.granularity, part.streaming_kv_heads) == ("kv_head", [[], [0, 2], [1], [0, 1, 2]])
    assert "# from DuoAttention, the 6 of 12 KV heads of a gate below 0.5" in found.as_recipe()
    assert import_hybrid(folder, ratio=0.25, by_head=True).heads == ((), (0,), (), (0, 1))  # gates of 0 go by layer and head


def test_a_hybrid_of_ours_with_split_layers_gives_their_heads(tmp_path: Path) -> None:
    heads = [[1], [0, 1]]
    ours = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 12, "w_sink": 4, "num_key_value_heads": 2}
    written(tmp_path / "config.json", ours | {"streaming_kv_heads": heads})
    assert as_part(import_hybrid(tmp_path).as_recipe()).streaming_kv_heads == heads
    written(tmp_path / "config.json", ours | {"streaming_kv_heads": [[2], [0, 1]]})
    refused(tmp_path, "KV head 2 is not in this model")


def test_a_hybrid_of_ours_whose_base_has_sliding_layers_gives_what_streams_and_not_those(tmp_path: Path) -> None:
    ours = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4096, "w_sink": 4}
    ours |= {"num_key_value_heads": 2, "num_hidden_layers": 3, "w_recent": 12, "hybrid_version": "4"}
    written(tmp_path / "config.json", ours | {"streaming_kv_heads": [[], [0, 1], []]})
    part = as_part(import_hybrid(tmp_path).as_recipe())
    assert (part.layers, part.w_recent, part.streaming_kv_heads) == ([1], 12, None)
    written(tmp_path / "config.json", ours | {"streaming_kv_heads": [[], [1], []]})
    assert as_part(import_hybrid(tmp_path).as_recipe()).streaming_kv_heads == [[], [1], []]
    written(tmp_path / "config.json", ours)
    refused(tmp_path, "streaming_kv_heads: missing beside w_recent")


def test_the_authors_code_is_parsed_and_gives_the_sizes_of_its_mask(tmp_path: Path) -> None:
    found = import_hybrid(written(tmp_path / "modeling_lazy.py", CODE))
    assert (found.layers, found.w_sink, found.w_recent) == ((5, 24, 38, 51), 129, 1025)
    written(tmp_path / "config.json", {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False})
    assert import_hybrid(tmp_path).layers == found.layers
    bare = import_hybrid(written(tmp_path / "bare.py", CODE.replace("kv_idx <= 128", "kv_idx < 128")))
    assert bare.w_sink is None and bare.w_recent is None and "names no sizes" in bare.as_recipe()


def refused(path: Path, reported: str, **arguments: Any) -> None:
    with pytest.raises(UserError, match=reported):
        import_hybrid(path, **arguments)


def test_unknown_formats_are_refused_with_what_is_known(tmp_path: Path) -> None:
    for name, content in (("a.json", {"window": 3}), ("b.py", "x = 1"), ("c.txt", "lazy"), ("d.json", {"layer_types": None})):
        refused(written(tmp_path / name, content), r"none of the formats that are known. Fix: name a config.json with layer_types")
    refused(tmp_path / "nowhere", "no such file or folder")
    refused(written(tmp_path / "list.json", [1]), "holds a list, not one mapping")
    refused(written(tmp_path / "cut.json", "{"), "no JSON that can be read")
    refused(written(tmp_path / "deep.json", "[" * 10**5), "no JSON that can be read")


def test_values_that_are_none_are_refused(tmp_path: Path) -> None:
    def config(**settings: Any) -> Path:
        return written(tmp_path / "x.json", settings)

    swaa = {"sliding_window_size": 8, "non_sliding_layers": [1]}
    refused(config(layer_types=["linear_attention"], sliding_window=8), "layer_types: linear_attention")
    refused(config(layer_types=["full_attention"], sliding_window=8), "no layer streams")
    refused(config(layer_types=["sliding_attention"]), "sliding_window: None: not a number of tokens")
    refused(config(**swaa), "add --num-layers")
    refused(config(**swaa), "non_sliding_layers: 1: not a layer of 1", num_layers=1)
    refused(config(**swaa | {"sliding_window_size": None}), "sliding_window_size: None", num_layers=2)
    refused(config(**swaa | {"non_sliding_layers": "all"}), "'all': not a layer of 2", num_layers=2)
    refused(config(layer_types=["sliding_attention"], sliding_window=8), "has 1 layers", num_layers=2)
    refused(written(tmp_path / "code.py", CODE), "names layer 51", num_layers=48)
    refused(written(tmp_path / "twice.py", "self.lazy_list = [1, 1]"), "named twice")
    refused(written(tmp_path / "computed.py", "self.lazy_list = list(range(3))"), "write hybrid.layers by hand")


def test_gates_need_a_ratio_and_nothing_else_takes_one(tmp_path: Path) -> None:
    folder = gates(tmp_path / "pattern", [[0.1, 0.2], [1.0, 0.9]])
    refused(folder, "add --lazy-layer-ratio")
    refused(folder, "every layer", ratio=0.9)
    refused(folder, "every KV head", ratio=0.9, by_head=True)
    refused(gates(tmp_path / "full", [[1.0, 0.9], [0.6, 0.5]]), "nothing would stream", by_head=True)
    refused(written(tmp_path / "heads.py", CODE), "not a gate for each KV head. Fix: name DuoAttention's", by_head=True)
    refused(written(tmp_path / "code.py", CODE), "names the layers itself", ratio=0.5)
    refused(gates(tmp_path / "ragged", [[0.1, 0.2], [1.0]]), "not a gate for each layer and KV head", ratio=0.5)
    refused(gates(tmp_path / "nan", [[0.1], [float("nan")]]), "not a gate for each", ratio=0.5)
    refused(gates(tmp_path / "sizes", [[0.1], [1.0]], sink_size=None), "sink_size: None", ratio=0.5)
    refused(written(tmp_path / "text" / GATES, "a\tb\n"), "config.json: no JSON", ratio=0.5)


def test_the_command_prints_a_part_for_a_recipe(lt_train: Any, tmp_path: Path) -> None:
    code, out, _ = lt_train("import-layers", gates(tmp_path, [[0.1, 0.2], [1.0, 0.9]]), "--lazy-layer-ratio", "0.5")
    assert code == 0 and yaml.safe_load(out) == {"hybrid": {"layers": [0], "w_sink": 128, "w_recent": 256}}
    code, out, _ = lt_train("import-layers", tmp_path, "--granularity", "kv_head")
    heads = {"granularity": "kv_head", "streaming_kv_heads": [[0, 1], []], "w_sink": 128, "w_recent": 256}
    assert code == 0 and yaml.safe_load(out) == {"hybrid": heads}
    code, out, err = lt_train("import-layers", tmp_path / "nowhere")
    assert code == 2 and "Traceback" not in out + err
