import pytest
import torch

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.draft import Draft
from lt_train.inference.kv_store import PAGE, KVStore, PagedLayer, kv_sizes
from lt_train.inference.loading import load_base_config
from lt_train.inference.packed_weights import obstacle_here, packed_bytes
from lt_train.planning.evaluation import kv_cache
from lt_train.planning.setup import Machine
from lt_train.planning.shape import model_shape
from lt_train.runtime.units import GIB
from tests.support.families import BASES, on_base
from tests.support.public_models import public_recipe

AIME = [{"benchmark": "aime24", "max_new_tokens": 32_768}]


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize(("dtype", "number"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_planned_kv_cache_is_what_the_engine_allocates_for_one_sequence(family, dtype, number, tmp_path):
    BASES[family].save_pretrained(tmp_path)
    recipe = public_recipe(
        "qwen3-8b",
        model={"base": str(tmp_path), "dtype": dtype},
        hybrid={"lazy_layer_ratio": 0.5, "w_sink": 2, "w_recent": 30},
        eval=[{"benchmark": "aime24", "max_new_tokens": 3 * PAGE}],
    )
    config = load_base_config(recipe.model)
    planned = kv_cache(recipe, config, model_shape(recipe, config), Machine(1, 80 * GIB))
    for lazy, size in (((1, 2), planned.hybrid), ((), planned.full)):
        model = build_hybrid(config, on_base(config, HybridSpec(4, lazy, w_sink=2, w_recent=30))).to(number)
        store = KVStore(model, slots=1, pages=3)
        assert any(isinstance(held, PagedLayer) for held in store.held)
        assert bytes_held(store) == size


def test_the_planned_kv_cache_holds_the_rings_of_sliding_layers_beside_those_of_a_draft(tmp_path):
    BASES["olmo3"].save_pretrained(tmp_path)
    recipe = public_recipe(
        "qwen3-8b",
        model={"base": str(tmp_path), "dtype": "fp32"},
        hybrid={"lazy_layer_ratio": 0.5, "w_sink": 2, "w_recent": 30},
        eval=[{"benchmark": "aime24", "max_new_tokens": 3 * PAGE, "draft": "streaming", "draft_length": 3}],
    )
    config = load_base_config(recipe.model)
    planned = kv_cache(recipe, config, model_shape(recipe, config), Machine(1, 80 * GIB))
    for lazy, size in (((1, 2), planned.hybrid), ((), planned.full)):
        model = build_hybrid(config, on_base(config, HybridSpec(4, lazy, w_sink=2, w_recent=30)))
        store = KVStore(model, slots=1, pages=3, draft=Draft.of(model.spec, None, 3))
        assert bytes_held(store) == size


@pytest.mark.parametrize(
    "settings", [{}, {"draft_layers": [1, 2]}, {"draft_length": 3}], ids=["all layers", "two layers", "a length"]
)
def test_the_planned_kv_cache_holds_the_rings_of_a_draft(settings, tmp_path):
    BASES["qwen3"].save_pretrained(tmp_path)
    recipe = public_recipe(
        "qwen3-8b",
        model={"base": str(tmp_path), "dtype": "fp32"},
        hybrid={"lazy_layer_ratio": 0.5, "w_sink": 2, "w_recent": 30},
        eval=[{"benchmark": "aime24", "max_new_tokens": 3 * PAGE, "draft": "streaming", **settings}],
    )
    config = load_base_config(recipe.model)
    shape = model_shape(recipe, config)
    planned = kv_cache(recipe, config, shape, Machine(1, 80 * GIB))
    for spec, size in ((shape.spec, planned.hybrid), (shape.spec.all_full, planned.full)):
        model = build_hybrid(config, spec)
        draft = Draft.of(model.spec, settings.get("draft_layers"), settings.get("draft_length"))
        store = KVStore(model, slots=1, pages=3, draft=draft)
        assert bytes_held(store) == size


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft": "streaming"},
        {"draft": "streaming", "draft_layers": [0, 1], "draft_length": 3},
        {"draft": "hybrid", "draft_length": 2, "variants": ["base"]},
    ],
    ids=["no draft", "all layers", "two layers", "the hybrid for the base"],
)
def test_the_planned_kv_cache_of_split_layers_and_its_rings_are_the_engines(settings, tmp_path):
    base = type(BASES["qwen3"])(**BASES["qwen3"].to_dict() | {"num_key_value_heads": 2})
    base.save_pretrained(tmp_path)
    hybrid = {"streaming_kv_heads": [[1], [], [0, 1], [0]], "lazy_layer_ratio": None, "w_sink": 2, "w_recent": 30}
    recipe = public_recipe(
        "qwen3-8b",
        model={"base": str(tmp_path), "dtype": "fp32"},
        hybrid=hybrid,
        eval=[{"benchmark": "aime24", "max_new_tokens": 3 * PAGE, **settings}],
    )
    shape = model_shape(recipe, base)
    planned = kv_cache(recipe, base, shape, Machine(1, 80 * GIB))
    for spec, size in ((shape.spec, planned.hybrid), (shape.spec.all_full, planned.full)):
        if settings.get("draft") == "hybrid" and spec.streams:
            continue  # the hybrid drafts for the base alone
        draft = None
        if "draft" in settings:
            streaming = shape.spec if settings["draft"] == "hybrid" else settings.get("draft_layers")
            draft = Draft.of(spec, streaming, settings.get("draft_length"))
        model = build_hybrid(base, spec)
        assert bytes_held(KVStore(model, slots=1, pages=3, draft=draft)) == size
        sizes = kv_sizes(model, draft)
        assert sizes.slot + 3 * sizes.page == size


@pytest.mark.skipif(obstacle_here() is not None, reason="no weights are packed on this CPU")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_on_a_cpu_fewer_sequences_fit_beside_the_engines_packed_weights(family, tmp_path, monkeypatch):
    monkeypatch.setattr("lt_train.inference.packed_weights.SMALLEST", 0)
    BASES[family].save_pretrained(tmp_path)
    recipe = public_recipe(
        "qwen3-8b",
        model={"base": str(tmp_path), "dtype": "fp32"},
        hybrid={"w_sink": 2, "w_recent": 30},
        eval=[{"benchmark": "aime24", "max_new_tokens": 16}],
    )
    config = load_base_config(recipe.model)
    shape = model_shape(recipe, config)
    model = build_hybrid(config, HybridSpec(4, (), w_sink=2, w_recent=30))
    weights, packed = (sum(p.nbytes for p in model.parameters()), packed_bytes(model))
    one = kv_cache(recipe, config, shape, Machine(1, GIB)).full
    assert packed > one
    for left, packs in ((3 * packed, True), (2 * packed - 1, False)):
        planned = kv_cache(recipe, config, shape, Machine(1, weights + left, cpu=True))
        assert planned.sequences[1] == pytest.approx((left - packed if packs else left) // one, abs=1)  # biases count in the plan


def bytes_held(store: KVStore) -> int:
    return sum(value.nbytes for held in store.held for value in vars(held).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("hybrid", "counts"),
    [
        ({"w_sink": 0}, [18, 17, 19, 0]),
        ({"sink": "learned"}, [18, 17, 19, 0]),
        ({"w_sink": 4}, [18, 17, 19, 0]),
    ],
)
def test_sequences_in_vllm_are_planned(hybrid, counts):
    recipe = public_recipe("qwen3-8b", hybrid={"lazy_layer_ratio": 0.5, "w_recent": 1020, **hybrid}, eval=AIME)
    config = load_base_config(recipe.model)
    planned = kv_cache(recipe, config, model_shape(recipe, config), Machine(1, 80 * GIB))
    assert list(planned.vllm) == counts
    half, fewer, *_ = counts
    assert 1.9 * planned.vllm[0] < planned.vllm[half] <= 2 * planned.vllm[0] + 1 and planned.vllm[fewer] < planned.vllm[half]
    assert planned.vllm[0] == pytest.approx(planned.sequences[1], abs=1)


def test_sequences_in_vllm_are_planned_by_kv_heads_where_these_stream():
    recipe = public_recipe("qwen3-8b", hybrid={"lazy_layer_ratio": 0.5, "granularity": "kv_head", "w_recent": 1020}, eval=AIME)
    config = load_base_config(recipe.model)
    planned = kv_cache(recipe, config, model_shape(recipe, config), Machine(1, 80 * GIB))
    assert list(planned.vllm) == [144, 143, 145, 0]  # of 36 layers of 8
    assert 1.9 * planned.vllm[0] < planned.vllm[144] <= 2 * planned.vllm[0] + 1
