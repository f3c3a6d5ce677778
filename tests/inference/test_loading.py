import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from lt_train.export.bare_process import observe
from lt_train.export.configs import exported_config, exported_generation_config
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.generation_config import SAMPLING
from lt_train.inference.loading import (
    attention_choice,
    eos_ids,
    load_base_config,
    load_for_inference,
    load_weights,
)
from lt_train.inference.text import stop_tokens
from lt_train.inference.tokenizer import check_vocabulary, load_checked_tokenizer, load_tokenizer
from lt_train.recipe.schema import Model, Prompt, RopeScaling
from lt_train.runtime.errors import UserError
from tests.support.families import BASES, SIZES

TINY_REASONER = Path(__file__).parents[2] / "data/tiny-reasoner"
SPEC = HybridSpec(4, (1,), w_sink=2, w_recent=6)
LOADS = {"config": load_base_config, "tokenizer": load_tokenizer, "weights": lambda model: load_weights(model, SPEC, torch.float32)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    AutoModelForCausalLM.from_config(BASES["qwen3"]).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_REASONER / name, folder)
    return folder


@pytest.fixture
def base(whole, tmp_path) -> Path:
    """A whole base model, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


def change(path: Path, **settings) -> None:
    """Settings of a JSON file; None takes one out."""
    values = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def refused(load: Callable[[Model], object], model: Model) -> str:
    """The message, which is one line that names the setting."""
    with pytest.raises(UserError) as error:
        load(model)
    message = str(error.value)
    assert message.startswith(f"model.base: {model.base}") and "\n" not in message
    return message


def test_the_base_itself_is_a_hybrid_in_which_nothing_streams(base):
    ids = torch.randint(2, 96, (1, 30))
    model = load_for_inference(Model(base=str(base)), HybridSpec(4, ()), torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(base).to(model.device)
    with torch.no_grad():
        torch.testing.assert_close(model(ids.to(model.device)).logits, stock(ids.to(model.device)).logits)


def test_the_recipes_kernel_is_set(base):
    for kernel in ("reference", "blocked"):
        assert load_weights(Model(base=str(base), attention=kernel), SPEC, torch.float32).model.attention_kernel == kernel


def test_the_recipes_kernel_is_for_the_recipes_dtype(base):
    """Adapters are merged, and exports made, in fp32, whatever the kernel of a run in bf16 can do."""
    model = Model(base=str(base), dtype="bf16", attention="blocked")
    assert load_for_inference(model, SPEC, torch.bfloat16).model.attention_kernel == "blocked"
    assert load_for_inference(model, SPEC, torch.float32).model.attention_kernel == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU flash attention can do this")
def test_a_kernel_that_cannot_compute_the_recipe_is_refused_with_the_fix(base):
    config = load_base_config(Model(base=str(base)))

    def chosen(attention):
        return attention_choice(Model(base=str(base), attention=attention), config, trains=True)

    assert chosen("auto").name == "blocked"
    with pytest.raises(UserError, match=r"^model\.attention: flash: flash attention needs an NVIDIA GPU.*cpu\. Fix: set auto$"):
        chosen("flash")


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_missing_folder_is_reported_with_its_full_path(load, tmp_path):
    with pytest.raises(UserError, match=rf"there is no folder {tmp_path}/nowhere"):
        load(Model(base=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_hub_model_out_of_reach_is_reported_with_the_folder_that_was_looked_for_first(load):
    assert f"there is no folder {Path('nobody/nothing').absolute()}, and of the hub model" in refused(
        load, Model(base="nobody/nothing")
    )
    assert "at revision v2" in refused(load, Model(base="nobody/nothing", revision="v2"))


@pytest.mark.parametrize("text", ["", "{garbage", "[]", "3", "\x00", '{"model_type": "wombat"}', "{}"])
def test_a_config_that_is_none_is_refused(base, text):
    (base / "config.json").write_text(text)
    assert "its config cannot be loaded" in refused(load_base_config, Model(base=str(base)))


@pytest.mark.parametrize("text", ['{"model_type": "gpt2"}', '{"model_type": "t5"}', '{"model_type": "clip"}'])
def test_an_architecture_without_a_hybrid_class_is_refused_with_the_known_ones(base, text):
    (base / "config.json").write_text(text)
    message = refused(load_base_config, Model(base=str(base)))
    assert all(family in message for family in ("no hybrid class", "llama", "mistral", "qwen2", "qwen3"))


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"dtype": "float99"}, "float99"),
    ],
)
def test_a_config_with_a_wrong_value_is_refused_by_its_name(base, settings, reported):
    change(base / "config.json", **settings)
    assert reported in refused(load_base_config, Model(base=str(base)))


@pytest.mark.parametrize(
    ("config", "reported"),
    [
        (MistralConfig(**SIZES, sliding_window=64), "sliding_window: 64: every layer of the base"),
        (LlamaConfig(**SIZES, attention_bias=True), "attention_bias: Llama and Mistral models become `ministral`"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias: Llama and Mistral models become `ministral`"),
    ],
)
def test_a_base_that_cannot_become_a_hybrid_is_refused_before_its_weights_are_looked_at(config, reported, tmp_path):
    config.save_pretrained(tmp_path)
    for load in (load_base_config, LOADS["weights"]):
        message = refused(load, Model(base=str(tmp_path)))
        assert reported in message and "cannot be loaded" not in message


def test_a_folder_without_weights_is_refused(base):
    (base / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refused(LOADS["weights"], Model(base=str(base)))


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_cut_weights_are_refused(base, length):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "its weights cannot be loaded" in refused(LOADS["weights"], Model(base=str(base)))


@pytest.mark.parametrize("index", ["{", "{}", '{"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}}'])
def test_a_damaged_index_of_shards_is_refused(base, index):
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(index)
    assert "its weights cannot be loaded" in refused(LOADS["weights"], Model(base=str(base)))


def test_weights_of_another_shape_or_number_are_refused(base):
    change(base / "config.json", num_hidden_layers=5, layer_types=None)
    with pytest.raises(UserError, match=r"model\.base: .*missing keys: model\.layers\.4"):
        load_weights(Model(base=str(base)), HybridSpec(5, (1,)), torch.float32)
    change(base / "config.json", num_hidden_layers=4, intermediate_size=65)
    assert "mismatched keys: " in refused(LOADS["weights"], Model(base=str(base)))


def test_a_damaged_pickle_is_refused(base):
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"garbage")
    assert "its weights cannot be loaded" in refused(LOADS["weights"], Model(base=str(base)))


def test_a_bug_in_the_hybrid_classes_is_not_taken_for_faulty_weights(base):
    with pytest.raises(TypeError):
        load_weights(Model(base=str(base)), SPEC, torch.float32, no_such_argument=1)


def test_a_tokenizer_pads_on_the_left(base):
    tokenizer = load_tokenizer(Model(base=str(base)))
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|pad|>")
    assert tokenizer(["1234", "1"], padding=True).input_ids[1][0] == tokenizer.pad_token_id


def test_the_eos_stands_in_for_a_missing_padding_token(base):
    change(base / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(Model(base=str(base)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 3


def test_a_tokenizer_with_neither_padding_nor_eos_is_refused(base):
    change(base / "tokenizer_config.json", pad_token=None, eos_token=None)
    assert "neither a padding nor an eos token" in refused(load_tokenizer, Model(base=str(base)))


@pytest.mark.parametrize("family", BASES)
def test_a_base_without_a_tokenizer_is_refused(family, tmp_path):
    BASES[family].save_pretrained(tmp_path)  # for a Qwen, transformers makes up a tokenizer of one token
    assert "tokenizer" in refused(load_tokenizer, Model(base=str(tmp_path)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "{garbage", "[]", "\x00"])
def test_a_damaged_tokenizer_is_refused(base, name, text):
    (base / name).write_text(text)
    assert "its tokenizer cannot be loaded" in refused(load_tokenizer, Model(base=str(base)))


@pytest.mark.parametrize(("found", "ids"), [(3, [3]), ([3, 4], [3, 4]), (None, [])])
def test_answers_end_where_the_bases_generation_config_says(base, found, ids):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    assert eos_ids(Model(base=str(base))) == ids


def test_a_base_need_not_have_a_generation_config(base):
    (base / "generation_config.json").unlink()
    assert eos_ids(Model(base=str(base))) == []


@pytest.mark.parametrize("text", ["", "{garbage", "[]", "3", "\x00", '{"eos_token_id": "<eos>"}', '{"eos_token_id": [3, null]}'])
def test_a_generation_config_that_is_there_and_unreadable_is_refused_not_passed_over(base, text):
    (base / "generation_config.json").write_text(text)
    assert "its generation config cannot be loaded" in refused(eos_ids, Model(base=str(base)))


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0: below 1"),
        ({"head_dim": 0}, "head_dim: 0: below 1"),
        ({"vocab_size": 0}, "vocab_size: 0: below 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3: no divisor of 4 query heads"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type spiral: unknown to this transformers"),
    ],
)
def test_a_config_of_which_no_model_can_be_made_is_refused(base, settings, reported):
    change(base / "config.json", **settings)
    assert reported in refused(load_base_config, Model(base=str(base)))


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused_unless_only_programs_write_them() -> None:
    model = Model(base="data/tiny-reasoner")
    config, tokenizer = load_base_config(model), load_tokenizer(model)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)  # of Gemma 3, whose text models do not embed it
    check_vocabulary(model, config, tokenizer)
    for template, added, named in (
        ("{{ '<image_soft_token>' }}", [], "<image_soft_token>"),
        (None, ["<think>"], "<think>"),
    ):
        tokenizer.add_tokens(added, special_tokens=True)
        with pytest.raises(UserError, match=rf"its tokenizer needs \d+ embeddings, and the model has 268, none for {named} "):
            check_vocabulary(model, config, tokenizer, template)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["pineapple"])
    with pytest.raises(UserError, match=r"needs 269 embeddings, and the model has 268, none for pineapple \(token 268\)"):
        check_vocabulary(model, config, tokenizer)


def test_a_recipes_own_chat_template_writes_tokens_that_the_model_must_embed_and_it_alone(base, tmp_path):
    tokenizer = load_tokenizer(Model(base=str(base)))
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.chat_template = "{{ '<tool>' }}"
    tokenizer.save_pretrained(base)
    model = Model(base=str(base))
    config, own = load_base_config(model), tmp_path / "own.jinja"
    config.vocab_size = len(tokenizer) - 1
    assert "none for <tool>" in refused(lambda model: load_checked_tokenizer(model, config), model)
    own.write_text("{{ messages[0].content }}")
    assert load_checked_tokenizer(model, config, Prompt(chat_template=str(own))).convert_tokens_to_ids("<tool>") > 0
    own.write_text("{{ '<tool>' }}")
    assert "none for <tool>" in refused(lambda model: load_checked_tokenizer(model, config, Prompt(chat_template=str(own))), model)


@pytest.mark.parametrize(
    ("local_rank", "others_wait", "placed"),
    [(None, False, "auto"), ("3", False, {"": torch.device("cuda:3")}), ("0", True, "auto")],
)
def test_alone_a_process_spreads_the_layers_over_all_accelerators_and_beside_others_it_takes_its_own(
    monkeypatch, local_rank, others_wait, placed
):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda", 0))
    monkeypatch.setattr("lt_train.inference.loading.load_weights", lambda *_, sinks, device_map: device_map)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    found = load_for_inference(Model(base="anything"), HybridSpec(4, (1,)), torch.float32, others_wait=others_wait)
    assert found == placed


# Faults of a base, each an error of one line


def test_an_eos_id_that_is_no_token_is_refused(base):
    change(base / "generation_config.json", eos_token_id=[3, 4000])
    model = Model(base=str(base))
    tokenizer = load_tokenizer(model)
    reported = rf"model\.base: {base}: eos_token_id 4000 of its generation_config\.json is no token"
    with pytest.raises(UserError, match=reported):
        check_vocabulary(model, load_base_config(model), tokenizer)
    with pytest.raises(UserError, match="eos_token_id 4000"):
        stop_tokens(load_weights(model, SPEC, torch.float32), tokenizer)


def test_half_a_download_is_refused(base):
    """A shard of two, as a download that was stopped leaves them."""
    weights = load_file(base / "model.safetensors")
    first = dict(list(weights.items())[: len(weights) // 2])
    save_file(first, base / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (base / "model.safetensors").unlink()
    assert "no file named" in refused(LOADS["weights"], Model(base=str(base)))
    shards = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in weights}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert "its weights cannot be loaded" in refused(LOADS["weights"], Model(base=str(base)))


def test_a_folder_without_tokenizer_json_is_refused_with_the_fix(base):
    (base / "tokenizer.json").unlink()
    assert "there is no tokenizer.json. Fix: download" in refused(load_tokenizer, Model(base=str(base)))


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_mistyped_folder_is_reported_at_once_with_the_nearest_name(load, tmp_path, monkeypatch):
    """A name with one slash may be a hub model's: the hub is queried once, not five times for each file."""
    (tmp_path / "models/tiny-reasoner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    queries = []

    def unreachable(url, **_):
        queries.append(url)
        raise ConnectionError("no network")

    monkeypatch.setattr("lt_train.inference.loading.get_hf_file_metadata", unreachable)
    message = refused(load, Model(base="models/tiny-reasonr"))
    assert f"there is no folder {tmp_path}/models/tiny-reasonr (did you mean models/tiny-reasoner?)" in message
    assert "no network" in message and len(queries) == 1


def test_a_base_that_slides_already_is_refused_with_the_fix(tmp_path):
    MistralConfig(**SIZES, sliding_window=64).save_pretrained(tmp_path)
    assert "Fix: choose a base with full layers" in refused(load_base_config, Model(base=str(tmp_path)))


# What a recipe may change about a base


YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


def test_rope_scaling_of_the_recipe_reaches_the_weights_and_the_saved_config(base, tmp_path):
    model = Model(base=str(base), rope_scaling=YARN)
    hybrid = load_weights(model, SPEC, torch.float32)
    plain = load_weights(Model(base=str(base)), SPEC, torch.float32)
    assert not torch.equal(hybrid.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    hybrid.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())["rope_parameters"]
    assert (saved["rope_type"], saved["factor"], saved["original_max_position_embeddings"]) == ("yarn", 4.0, 32)
    assert saved["rope_theta"] == plain.config.rope_parameters["rope_theta"]
    assert exported_config(hybrid, torch.float32).rope_parameters == hybrid.config.rope_parameters


def test_rope_scaling_is_that_of_the_stock_class(base, tmp_path):
    change(base / "config.json", rope_parameters={"rope_theta": 10_000.0, **YARN.model_dump()})
    stock = AutoModelForCausalLM.from_pretrained(base).eval()
    change(base / "config.json", rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"})
    hybrid = load_weights(Model(base=str(base), rope_scaling=YARN), HybridSpec(4, ()), torch.float32)
    ids = torch.randint(2, 96, (1, 100))
    with torch.no_grad():
        torch.testing.assert_close(hybrid(ids).logits, stock(ids).logits)


def test_the_stop_token_of_the_recipe_ends_answers(base):
    tokenizer = load_tokenizer(Model(base=str(base)), stop_token="<|pad|>")
    assert tokenizer.eos_token == "<|pad|>"
    model = load_weights(Model(base=str(base)), SPEC, torch.float32)
    model.generation_config.eos_token_id = 3
    assert set(stop_tokens(model, tokenizer)) == {3, tokenizer.convert_tokens_to_ids("<|pad|>")}
    assert exported_generation_config(model, tokenizer).eos_token_id == [tokenizer.eos_token_id, 3]
    with pytest.raises(UserError, match=r"prompt\.stop_token: <nowhere>: the tokenizer of .* has no such token\. Fix"):
        load_tokenizer(Model(base=str(base)), stop_token="<nowhere>")


@pytest.mark.parametrize(
    ("settings", "exported"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_k": 20}, {"do_sample": False}),
        ({"temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
        ({"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ({"temperature": 1.0}, {}),
    ],
)
def test_sampling_of_the_base_is_exported_as_it_is_meant_and_without_a_warning(base, settings, exported, capfd):
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, **settings}))
    model = Model(base=str(base))
    hybrid, tokenizer = load_weights(model, SPEC, torch.float32), load_tokenizer(model)
    assert eos_ids(model) == [3]
    generation = exported_generation_config(hybrid, tokenizer)
    observe(hybrid, torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long), generation)
    written = generation.to_diff_dict()
    sampling = {name: written[name] for name, neutral in SAMPLING.items() if written.get(name) not in (None, neutral)}
    assert sampling | ({"do_sample": written["do_sample"]} if "do_sample" in written else {}) == exported
    assert "generation flags" not in capfd.readouterr().err
