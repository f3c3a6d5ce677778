"""`import lt_train`: each of its names as a user calls it."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)

import lt_train
from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from tests.support.families import BASES, CORE, MINIMAX, WITH_SINKS, on_base
from tests.support.made_runs import made_run
from tests.support.processes import checks_of_exports_are_forked
from tests.support.repository import REPOSITORY
from tests.support.tiny_run import write_inputs
from tests.support.toy_family import toy_config

REASONER = REPOSITORY / "data/tiny-reasoner"
SIZES = {"w_sink": 2, "w_recent": 6}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    """With weights so large that a token more or less in sight changes the logits, and tied embeddings."""
    torch.manual_seed(0)
    config = type(BASES[request.param])(**BASES[request.param].to_dict() | {"tie_word_embeddings": True})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model


def test_the_names_are_listed_and_importing_them_loads_neither_torch_nor_pydantic() -> None:
    assert lt_train.__all__ == ["convert", "load_recipe", "read_results", "run", "score_layers"]
    assert set(lt_train.__all__) <= set(dir(lt_train))
    code = "import sys, lt_train as lt; [getattr(lt, name) for name in lt.__all__]; print({'torch', 'pydantic'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        lt_train.convrt  # noqa: B018


def test_reading_a_recipe_loads_no_torch() -> None:
    code = "import sys, lt_train; print(lt_train.load_recipe('quickstart').hybrid.w_recent, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "12 False\n", done.stderr


def test_a_recipe_comes_by_name_or_path_with_overrides() -> None:
    recipe = lt_train.load_recipe("quickstart", ["hybrid.w_recent=8"])
    assert recipe.name == "quickstart" and recipe.hybrid.w_recent == 8
    assert lt_train.load_recipe(REPOSITORY / "recipes/quickstart.yaml") == lt_train.load_recipe("quickstart")
    with pytest.raises(UserError, match=r"hybrid\.w_sink: -1: (.|\n)*hybrid\.w_recnt: unknown setting; did you mean w_recent"):
        lt_train.load_recipe("quickstart", ["hybrid.w_recnt=8", "hybrid.w_sink=-1"])


@torch.no_grad()
def test_a_converted_model_shares_its_weights_with_the_base_and_is_the_base_with_full_attention(base: PreTrainedModel) -> None:
    hybrid = lt_train.convert(base, layers=[3, 1], **SIZES)
    stock = dict(base.named_parameters(remove_duplicate=False))
    assert {name: weight.data_ptr() for name, weight in hybrid.named_parameters(remove_duplicate=False)} == {
        name: weight.data_ptr() for name, weight in stock.items()
    }
    assert hybrid.spec == on_base(base.config, HybridSpec(4, (1, 3), **SIZES))
    assert hybrid.lm_head.weight is hybrid.model.embed_tokens.weight
    ids = torch.randint(2, 96, (2, 40))
    with hybrid.full_attention():
        is_the_base(hybrid, base, ids)
    assert not torch.allclose(hybrid(ids).logits, base(ids).logits, atol=1e-3)
    assert hybrid.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 44)


def is_the_base(hybrid: PreTrainedModel, base: PreTrainedModel, ids: torch.Tensor) -> None:
    """To the last bit; of a base with sliding layers, in rows within their window; of one with sinks, by the reference kernel."""
    hybrid.set_attention_kernel("reference" if hybrid.config.base_has_sinks else "auto")
    within = ids[:, : hybrid.spec.sliding_window - 1] if hybrid.spec.sliding_layers else ids
    assert torch.equal(hybrid(within).logits, base(within).logits)
    hybrid.set_attention_kernel("auto")
    torch.testing.assert_close(hybrid(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [*CORE, *WITH_SINKS], indirect=True)
@torch.no_grad()
def test_a_model_in_memory_becomes_the_hybrid_that_its_folder_becomes(base: PreTrainedModel, tmp_path) -> None:
    base.save_pretrained(tmp_path)
    ids = torch.randint(2, 96, (1, 40))
    expected = load_hybrid(tmp_path, on_base(base.config, HybridSpec(4, (1, 2), **SIZES)))(ids).logits
    assert torch.equal(lt_train.convert(base, layers=[1, 2], **SIZES)(ids).logits, expected)
    assert torch.equal(lt_train.convert(tmp_path, layers=[1, 2], **SIZES)(ids).logits, expected)
    assert torch.equal(lt_train.convert(str(tmp_path), layers=[1, 2], **SIZES)(ids).logits, expected)


@pytest.mark.parametrize("base", [*CORE, *WITH_SINKS, "phi3"], indirect=True)  # phi3: one projection for queries, keys and values
@torch.no_grad()
def test_single_kv_heads_stream_where_heads_are_named(base: PreTrainedModel) -> None:
    if base.config.model_type in WITH_SINKS:
        with pytest.raises(UserError, match=r"split_layers: each query head of the base has a learned sink"):
            lt_train.convert(base, heads={1: [0]}, **SIZES)
        return
    hybrid, ids = lt_train.convert(base, heads={1: [0], 2: (1, 0)}, **SIZES), torch.randint(2, 96, (1, 40))
    assert hybrid.spec == on_base(base.config, HybridSpec.from_streaming_heads([(), (0,), (0, 1), ()], kv_heads=2, **SIZES))
    others = [lt_train.convert(base, heads=heads, **SIZES)(ids).logits for heads in ({1: [1], 2: [0, 1]}, {2: [0, 1]})]
    assert all((other - hybrid(ids).logits).abs().max() > 1e-3 for other in others)
    with hybrid.full_attention():
        is_the_base(hybrid, base, ids)


@pytest.mark.parametrize("config", [toy_config(), MINIMAX], ids=["of one's own", "with a buffer in its router"])
def test_a_model_of_any_family_becomes_a_hybrid_with_auto_and_is_refused_without(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(3, 96, (1, 40))
    with pytest.raises(UserError, match=r"no hybrid class\. Fix: set model\.family to auto"):
        lt_train.convert(model, layers=[1, 3], w_sink=2, w_recent=6)
    hybrid = lt_train.convert(model, layers=[1, 3], w_sink=2, w_recent=6, family="auto")
    with torch.no_grad():
        assert (hybrid(ids).logits - model(ids).logits).abs().max() > 1e-4
        with hybrid.full_attention():
            assert torch.equal(hybrid(ids).logits, model(ids).logits)
    profile = lt_train.score_layers(model, [ids[0].tolist()], strategy="nll", w_sink=2, w_recent=6, family="auto")
    assert len(profile.scores["nll"][0]) == 4


def test_each_prompt_chooses_its_layers_where_that_is_requested() -> None:
    base = AutoModelForCausalLM.from_pretrained(REASONER)
    hybrid = lt_train.convert(base, select="per_prompt", lazy_layer_ratio=0.75, w_last=4, **SIZES)
    given = {"input_ids": torch.randint(2, 60, (2, 40)), "attention_mask": torch.ones(2, 40).long()}
    given["attention_mask"][1, :25] = 0
    out = hybrid.generate(**given, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.shape == (2, 44)
    assert [len(queue.streaming) for queue in out.past_key_values.queues] == [6, 6]
    assert hybrid.model.layers[0].self_attn.q_proj.weight.data_ptr() == base.model.layers[0].self_attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lazy_layer_ratio": None}, r"lazy_layer_ratio: missing: the fraction of layers.*Fix: pass it"),
        ({"lazy_layer_ratio": 0.01}, r"lazy_layer_ratio: 0\.01: of 8 layers 0 would stream"),
        ({"layers": [1]}, r"select: per_prompt: each prompt chooses entire layers.*Fix: remove layers, heads and learned_sinks"),
        ({"heads": {1: [0]}}, "select: per_prompt: each prompt chooses entire layers"),
        ({"learned_sinks": True}, "select: per_prompt: each prompt chooses entire layers, and sinks are tokens"),
        ({"w_last": 0}, r"calibration\.w_last: 0"),
        ({"select": "static"}, r"select: 'static', lazy_layer_ratio: 0\.5: without prompts that choose.*Fix: remove both"),
    ],
)
def test_settings_that_do_not_go_with_prompts_that_choose_are_refused(changed, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lt_train.convert(REASONER, **{"select": "per_prompt", "lazy_layer_ratio": 0.5, **SIZES, **changed})


def test_the_hybrid_is_trained_and_the_base_keeps_its_gradients_flags_and_mode() -> None:
    base = AutoModelForCausalLM.from_pretrained(REASONER).train()
    hybrid = lt_train.convert(base, layers=[0], **SIZES)
    assert hybrid.training
    hybrid.eval().requires_grad_(False)
    assert base.training and all(weight.requires_grad for weight in base.parameters())
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    hybrid.requires_grad_(True)
    ids = torch.randint(2, 60, (1, 20))
    hybrid(ids, labels=ids).loss.backward()
    assert all(weight.grad is None for weight in base.parameters())
    torch.optim.SGD(hybrid.parameters(), lr=0.1).step()
    assert not torch.equal(base.model.layers[0].self_attn.q_proj.weight, before)


def test_what_is_frozen_in_the_model_is_frozen_in_the_hybrid_and_learned_sinks_are_not() -> None:
    base = AutoModelForCausalLM.from_pretrained(REASONER)
    base.requires_grad_(False)
    base.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    hybrid = lt_train.convert(base, layers=[1], w_sink=0, w_recent=6, learned_sinks=True)
    assert [name for name, weight in hybrid.named_parameters() if weight.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.sinks.weight",
    ]


@pytest.mark.parametrize("numbers", [np.array, torch.tensor])
def test_layers_and_heads_of_an_array_or_a_tensor_stream(numbers: Callable) -> None:
    base = AutoModelForCausalLM.from_pretrained(REASONER)
    layers, heads = (
        lt_train.convert(base, layers=numbers([3, 1]), **SIZES),
        lt_train.convert(base, heads={1: numbers([0])}, **SIZES),
    )
    ids = torch.randint(2, 60, (1, 20))
    for hybrid, same in ((layers, {"layers": [1, 3]}), (heads, {"heads": {1: [0]}})):
        assert hybrid.spec == lt_train.convert(base, **same, **SIZES).spec
        assert not torch.allclose(hybrid(ids).logits, base(ids).logits, atol=1e-3)


@torch.no_grad()
def test_learned_sinks_start_at_zero_in_the_streaming_layers(tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(REASONER)
    hybrid = lt_train.convert(base, layers=[1], w_sink=0, w_recent=6, learned_sinks=True)
    sinks = {name: weight for name, weight in hybrid.named_parameters() if "sinks" in name}
    assert list(sinks) == ["model.layers.1.self_attn.sinks.weight"] and not sinks.popitem()[1].any()
    hybrid.save_pretrained(tmp_path)
    ids = torch.randint(2, 60, (1, 20))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, hybrid(ids).logits)
    assert torch.equal(
        lt_train.convert(REASONER, layers=[1], w_sink=0, w_recent=6, learned_sinks=True)(ids).logits, hybrid(ids).logits
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"layers": [9]}, "layer 9 not in this model"),
        ({"layers": []}, "nothing would stream"),
        ({"layers": range(8)}, "every layer would stream"),
        ({"layers": None}, "layers, heads: both or neither"),
        ({"heads": {0: [0]}}, "layers, heads: both or neither"),
        ({"layers": None, "heads": {0: [7]}}, r"KV heads \[7\] of layer 0: not in the model"),
        ({"layers": None, "heads": {9: [0]}}, r"heads: layers \[9\]: not in the model"),
        ({"layers": None, "heads": {}}, "heads: none or all of them would stream"),
        ({"layers": None, "heads": {0: [0]}, "w_sink": 0, "learned_sinks": True}, "learned_sinks: layers of which some KV heads"),
        ({"layers": ["0"]}, r"layers: \['0'\]: not whole numbers"),
        ({"layers": 0}, "layers: 0: not whole numbers"),
        ({"layers": None, "heads": [[0], []]}, r"heads: \[\[0\], \[\]\]: no mapping"),
        ({"layers": None, "heads": {0: 1}}, "heads of layer 0: 1: not whole numbers"),
        ({"w_recent": 0}, "w_recent: 0: below 1"),
        ({"w_recent": 6.0}, r"w_sink, w_recent: \(2, 6.0\): not whole numbers"),
        ({"learned_sinks": True}, "w_sink: 2: learned sinks take the place"),
        ({"model": "nobody/nothing-at-all"}, "model.base: nobody/nothing-at-all"),
        ({"model": ""}, "base"),
        ({"model": torch.nn.Linear(1, 1)}, "model: Linear: neither a transformers model nor a path"),
        ({"model": GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=9))}, "no hybrid class"),
        ({"model": AutoModelForCausalLM.from_config(BASES["qwen3"]).model, "layers": [0]}, "missing keys.*without adapters"),
    ],
    ids=str,
)
def test_a_hybrid_that_cannot_be_made_is_a_user_error(changed: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        lt_train.convert(**{"model": REASONER, "layers": [0], **SIZES, **changed})


def other_activation(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()


def other_scaling(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def config_edited_after_loading(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, output: 2 * output)


@pytest.mark.parametrize("change", [other_activation, other_scaling, config_edited_after_loading, hook])
def test_a_model_that_does_not_compute_what_its_config_says_is_refused(change: Callable[[PreTrainedModel], None]) -> None:
    base = AutoModelForCausalLM.from_pretrained(REASONER).train()
    base.lm_head.eval()
    lt_train.convert(base, layers=[0], **SIZES)
    assert base.training and base.model.layers[3].training and not base.lm_head.training
    change(base)
    with pytest.raises(
        UserError, match=r"model: Qwen3ForCausalLM: its logits differ by \d.*% from what its config and weights compute"
    ):
        lt_train.convert(base, layers=[0], **SIZES)


def test_a_model_without_its_weights_becomes_a_hybrid_without_them() -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(BASES["qwen3"])
    assert {weight.device.type for weight in lt_train.convert(base, layers=[0], **SIZES).parameters()} == {"meta"}


def texts(count: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    words = [token for token in sorted(tokenizer.get_vocab()) if token.isalnum()]
    return [" ".join(words[(number + 7 * place) % len(words)] for place in range(40)) for number in range(count)]


def test_layers_of_a_model_in_memory_are_scored_and_the_model_stays_as_it_is() -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(REASONER).train(), AutoTokenizer.from_pretrained(REASONER)
    profile = lt_train.score_layers(base, texts(3), tokenizer=tokenizer, strategy=["reach", "lazy_ratio"], **SIZES)
    assert profile.num_layers == 8 and len(profile.samples) == 3
    assert {strategy: [len(row) for row in scores] for strategy, scores in profile.scores.items()} == {
        "reach": [8] * 3,
        "lazy_ratio": [8] * 3,
    }
    assert base.training and all(weight.requires_grad for weight in base.parameters())
    chosen = profile.choose("reach", 4)
    assert lt_train.convert(base, layers=chosen, **SIZES).spec.lazy_layers == chosen


def test_a_path_brings_its_tokenizer_and_token_ids_need_none() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    by_path = lt_train.score_layers(str(REASONER), texts(2), **SIZES)
    ids = [tokenizer(text)["input_ids"] for text in texts(2)]
    with torch.inference_mode():  # as models are often used
        base = AutoModelForCausalLM.from_pretrained(REASONER)
        by_ids = lt_train.score_layers(base, ids, **SIZES)
    assert by_path.scores == by_ids.scores


def test_gates_scores_layers_where_no_gradients_are_wanted() -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(REASONER), AutoTokenizer.from_pretrained(REASONER)
    steady = {"strategy": "gates", "w_sink": 4, "w_recent": 12, "long_reach_fraction": 0.5}
    with torch.inference_mode():
        within = lt_train.score_layers(base, texts(1), tokenizer=tokenizer, **steady)
    assert within.scores == lt_train.score_layers(base, texts(1), tokenizer=tokenizer, **steady).scores


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"texts": "one text"}, "texts: a single text"),
        ({"strategy": "periodic"}, "strategy: periodic: scores no layers"),
        ({"w_recent": 0}, "w_recent: 0: less than 1"),
        ({"long_reach_fraction": 2.0}, "calibration.long_reach_fraction: 2.0: more than 1"),
        ({"w_recent": 1020}, "fit inside the window"),
        ({"texts": []}, "texts: none, so no layer can be scored"),
        ({"texts": [[5, 10**6] * 20]}, r"texts\[0\]: token 1000000: the model embeds"),
        ({"texts": [{"text": "one text"}]}, r"texts\[0\]: .*: not whole numbers"),
        ({"model": AutoModelForCausalLM.from_config(BASES["qwen3"])}, "tokenizer: missing"),
    ],
    ids=str,
)
def test_layers_that_cannot_be_scored_are_a_user_error(changed: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        lt_train.score_layers(**{"model": REASONER, "texts": texts(1), **SIZES, **changed})


def test_results_are_plain_data(tmp_path) -> None:
    results = lt_train.read_results(made_run(tmp_path, "tiny"))
    by_place = {(each["variant"], each["evaluation"]): each for each in results.scores}
    assert by_place["base", "ledger"]["scores"]["accuracy"] == 0.75
    assert by_place["base", "ledger"]["scores"]["interval"]["low"] < 0.75
    assert by_place["trained", "heldout_loss"]["kind"] == "loss" and by_place["trained", "heldout_loss"]["layers"] == (0, 2)
    assert results.curves["train/loss"] == ((1, 2.0), (2, 1.5), (3, 1.0))
    assert results.curves["train/eval_loss"] == ((2, 1.75),)
    assert results.layers == {"converted": (0, 2), "converted-by-lazy_ratio": (0, 1)}
    assert results.profile is not None and results.profile.choose("reach", 2) == (0, 2)
    with pytest.raises(UserError, match="no run"):
        lt_train.read_results(tmp_path / "nowhere")


def test_a_run_goes_up_to_a_stage_resumes_and_leaves_what_is_read(tmp_path, monkeypatch, capsys) -> None:
    write_inputs(tmp_path)
    recipe = lt_train.load_recipe(tmp_path / "recipe.yaml", ["train=null", "eval=[{benchmark: heldout_loss, batch_size: 4}]"])
    folder = lt_train.run(recipe, tmp_path / "runs", up_to="convert")
    assert folder == tmp_path / "runs/tiny" and not (folder / "export").exists()
    unfinished = lt_train.read_results(folder)
    assert unfinished.scores == () and unfinished.profile is not None and len(unfinished.layers["converted"]) == 4
    scored = (folder / "profile/profile.json").stat().st_mtime_ns
    with checks_of_exports_are_forked():
        assert lt_train.run(recipe, str(tmp_path / "runs")) == folder
    assert (folder / "profile/profile.json").stat().st_mtime_ns == scored
    assert (folder / "export/config.json").exists()
    assert [each["label"] for each in lt_train.read_results(folder).scores] == ["reach, untrained"]
    with pytest.raises(UserError, match=r"up_to: 'exprt': no stage\. Fix: use one of profile, convert"):
        lt_train.run(recipe, tmp_path / "runs", up_to="exprt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="begun with another recipe"):
        lt_train.run(recipe.model_copy(update={"seed": 1}), tmp_path / "runs")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process, not in 2"):
        lt_train.run(recipe, tmp_path / "runs")
