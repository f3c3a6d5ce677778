"""The hybrid classes against transformers' own."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MinistralConfig, MinistralForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache
from lt_train.hybrid.loading import build_hybrid, hybrid_config
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support.families import BASES, SPLIT, on_base, over_families

SPEC = HybridSpec(4, (1, 3), w_sink=3, w_recent=7)
SPECS = pytest.mark.parametrize("spec", [SPEC, SPLIT], ids=["layers", "KV heads"])
OVER_FAMILIES = over_families(SPEC)


def stock_and_hybrid(base_config, spec):
    stock = AutoModelForCausalLM.from_config(base_config).eval()
    hybrid = build_hybrid(base_config, on_base(base_config, spec)).eval()
    hybrid.load_state_dict(stock.state_dict())
    return stock, hybrid


def tokens(rows, length):
    return torch.randint(2, 96, (rows, length))


@torch.no_grad()
def test_with_all_layers_full_it_is_the_base_to_the_last_bit(base_config):
    stock, hybrid = stock_and_hybrid(base_config, HybridSpec(4, (), w_sink=3, w_recent=7))
    ids = tokens(2, 40)
    same_logits(hybrid, stock, ids)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_computed_as_in_the_base_whether_or_not_a_base_was_made_before(family, monkeypatch):
    config = deepcopy(BASES[family])
    stock_class = type(AutoModelForCausalLM.from_config(config))
    monkeypatch.delattr(stock_class, "_can_set_experts_implementation_cached_value")  # what transformers found out of it
    assert build_hybrid(config, on_base(config, SPEC)).config._experts_implementation == "grouped_mm"


def same_logits(hybrid, stock, ids):
    """To the last bit; of a base with sliding layers, in rows within their window: beyond it kernels round differently. With
    learned sinks of its own, for which transformers has eager attention alone, the reference kernel is the base in all rows."""
    if hybrid.config.base_has_sinks:
        torch.testing.assert_close(hybrid(ids, use_cache=False).logits, stock(ids).logits, atol=1e-6, rtol=1e-5)
        hybrid.set_attention_kernel("reference")
    elif window := hybrid.spec.sliding_window:
        torch.testing.assert_close(hybrid(ids, use_cache=False).logits, stock(ids).logits, atol=1e-6, rtol=1e-5)
        ids = ids[:, : window - 1]
    assert torch.equal(hybrid(ids, use_cache=False).logits, stock(ids).logits)
    hybrid.set_attention_kernel("auto")


@OVER_FAMILIES
@torch.no_grad()
def test_streaming_layers_change_the_result(base_config, spec):
    stock, hybrid = stock_and_hybrid(base_config, spec)
    ids = tokens(2, 40)
    torch.testing.assert_close(hybrid(ids).logits[:, :10], stock(ids).logits[:, :10], atol=1e-5, rtol=1e-5)
    assert (hybrid(ids).logits[:, 11:] - stock(ids).logits[:, 11:]).abs().max() > 1e-3


@OVER_FAMILIES
@torch.no_grad()
def test_with_full_attention_switched_on_it_is_the_base_and_afterwards_the_hybrid_again(base_config, spec):
    stock, hybrid = stock_and_hybrid(base_config, spec)
    ids = tokens(2, 40)
    before = hybrid(ids, use_cache=False).logits
    with hybrid.full_attention():
        same_logits(hybrid, stock, ids)
        assert not hybrid.spec.streams
    assert torch.equal(hybrid(ids, use_cache=False).logits, before)
    with pytest.raises(RuntimeError), hybrid.full_attention():
        raise RuntimeError
    assert hybrid.spec == on_base(base_config, spec)


def stock_model(base_config):
    """The base's class without a layer that slides: no code of ours in it."""
    if base_config.model_type in ("llama", "mistral"):
        known = set(MinistralConfig().to_dict())
        values = {name: value for name, value in base_config.to_dict().items() if name in known - {"model_type", "sliding_window"}}
        return MinistralForCausalLM(MinistralConfig(**values, layer_types=["full_attention"] * 4)).eval()
    return AutoModelForCausalLM.from_config(base_config).eval()


def stock_logits(model, spec, ids, position_ids, sinks=None):
    """Logits of a stock model, each of whose layers gets transformers' own mask for its kind in `spec`, with `sinks` or-ed in."""
    config, sliding = deepcopy(model.config), None
    made_for = dict(config=config, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=None)
    made_for |= {CACHE_ARGUMENT: None, "position_ids": position_ids}
    full = create_causal_mask(**made_for)
    if spec.sliding_layers:
        sliding = create_sliding_window_causal_mask(**made_for)
    config.sliding_window = spec.w_recent
    streaming = create_sliding_window_causal_mask(**made_for, or_mask_function=sinks)
    masks = [streaming if spec.is_lazy(layer) else full for layer in range(spec.num_layers)]
    masks = [sliding if layer in spec.sliding_layers else mask for layer, mask in enumerate(masks)]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, given, mask=mask: (args, given | {"attention_mask": mask}), with_kwargs=True
        )
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    logits = model(ids, position_ids=position_ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
def test_without_sinks_it_is_the_stock_class_with_a_window_in_its_streaming_layers(base_config):
    spec = on_base(base_config, HybridSpec(4, (1, 3), w_sink=0, w_recent=7))
    hybrid = build_hybrid(base_config, spec).eval()
    duplicate = stock_model(base_config)
    duplicate.load_state_dict(hybrid.state_dict())
    ids = tokens(2, 40)
    expected = stock_logits(duplicate, spec, ids, torch.arange(40)[None].expand(2, -1))
    torch.testing.assert_close(hybrid(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_sinks_it_is_the_stock_class_under_a_mask_that_adds_them(base_config):
    hybrid = build_hybrid(base_config, on_base(base_config, SPEC)).eval()
    duplicate = stock_model(base_config)
    duplicate.load_state_dict(hybrid.state_dict())
    ids = tokens(1, 40)
    position_ids = torch.cat([torch.arange(25), torch.arange(15)])[None]

    def sinks_of_own_document(batch, head, query, key):
        return (position_ids[0][key] < 3) & (key <= query) & (query - key <= position_ids[0][query])

    expected = stock_logits(duplicate, on_base(base_config, SPEC), ids, position_ids, sinks_of_own_document)
    torch.testing.assert_close(hybrid(ids, position_ids=position_ids).logits, expected, atol=1e-5, rtol=1e-5)


@OVER_FAMILIES
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(base_config, spec):
    hybrid = build_hybrid(base_config, on_base(base_config, spec)).eval()
    first, second = tokens(1, 23), tokens(1, 2)
    packed = hybrid(torch.cat([first, second], dim=1), position_ids=torch.cat([torch.arange(23), torch.arange(2)])[None]).logits
    separate = torch.cat([hybrid(first).logits, hybrid(second).logits], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)


@OVER_FAMILIES
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_is_never_a_sink(base_config, spec, side):
    hybrid = build_hybrid(base_config, on_base(base_config, spec)).eval()
    short, long = tokens(1, 17), tokens(1, 30)
    padding = torch.zeros(1, 13, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = torch.cat([(row != 0).long(), torch.ones(1, 30, dtype=torch.long)])
    logits = hybrid(torch.cat([row, long]), attention_mask=mask).logits
    torch.testing.assert_close(logits[0][row[0] != 0], hybrid(short).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], hybrid(long).logits[0], atol=1e-5, rtol=1e-5)


@SPECS
def test_kernels_agree_on_loss_and_gradients(qwen3_config, spec):
    hybrid = build_hybrid(qwen3_config, spec)
    ids = tokens(2, 60)

    def gradients(kernel):
        hybrid.set_attention_kernel(kernel)
        hybrid.zero_grad()
        hybrid(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in hybrid.parameters()]

    torch.testing.assert_close(gradients("blocked"), gradients("reference"), atol=1e-5, rtol=1e-4)


@SPECS
def test_gradient_checkpointing_changes_no_gradient(qwen3_config, spec):
    hybrid = build_hybrid(qwen3_config, spec).train()
    ids = tokens(1, 40)
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]

    def gradients():
        hybrid.zero_grad()
        hybrid(ids, labels=ids, position_ids=positions).loss.backward()
        return [parameter.grad.clone() for parameter in hybrid.parameters()]

    plain = gradients()
    hybrid.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain, atol=0, rtol=0)


def test_a_foreign_attention_implementation_is_refused(qwen3_config):
    config = hybrid_config(qwen3_config, SPEC)
    for name in ("sdpa", "eager"):
        with pytest.raises(HybridError, match="ignore sinks"):
            AutoModelForCausalLM.from_config(config, attn_implementation=name)
    hybrid = build_hybrid(qwen3_config, SPEC)
    with pytest.raises(HybridError, match="ignore sinks"):
        hybrid.set_attn_implementation("eager")
    hybrid.config._attn_implementation = "sdpa"
    with pytest.raises(HybridError, match="ignores sinks"):
        hybrid(tokens(1, 4))


def test_a_foreign_cache_is_refused(qwen3_config):
    hybrid = build_hybrid(qwen3_config, SPEC)
    with pytest.raises(HybridError, match="drops the sinks"):
        hybrid(tokens(1, 4), **{CACHE_ARGUMENT: DynamicCache(config=hybrid.config)})
    with pytest.raises(HybridError, match="other layers or sizes"):
        hybrid(tokens(1, 4), **{CACHE_ARGUMENT: HybridCache(HybridSpec(4, (1, 3), w_sink=4, w_recent=7))})


def test_masks_and_packing_that_cannot_be_valid_are_refused(qwen3_config):
    hybrid = build_hybrid(qwen3_config, SPEC).eval()
    ids = tokens(1, 4)
    with pytest.raises(HybridError, match="dict of masks"):
        hybrid(ids, attention_mask={"full_attention": None, "sliding_attention": None})
    with pytest.raises(HybridError, match="use_cache: a KV cache holds one document per row"):
        hybrid(ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=True)
    with pytest.raises(HybridError, match="without position_ids"):
        hybrid(ids, cu_seq_lens_q=torch.tensor([0, 2, 4]))


@pytest.mark.parametrize(("name", "value"), [("output_attentions", True), ("head_mask", torch.ones(4, 4)), ("is_causal", False)])
def test_what_no_kernel_gives_is_refused(qwen3_config, name, value):
    hybrid = build_hybrid(qwen3_config, SPEC).eval()
    for model in (hybrid, hybrid.model):
        with pytest.raises(HybridError, match=f"{name}: .* Fix: leave it out"):
            model(tokens(1, 4), **{name: value})


def test_generation_with_attention_probabilities_is_refused(qwen3_config):
    hybrid = build_hybrid(qwen3_config, SPEC).eval()
    with pytest.raises(HybridError, match="output_attentions"):
        hybrid.generate(tokens(1, 4), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_a_base_that_requests_attention_probabilities_becomes_a_hybrid_that_does_not(qwen3_config):
    asks = type(qwen3_config)(**{**qwen3_config.to_dict(), "output_attentions": True})
    assert hybrid_config(asks, SPEC).output_attentions is False


def test_layers_run_past_the_hybrids_forward_are_refused(qwen3_config):
    hybrid = build_hybrid(qwen3_config, SPEC)
    hidden, positions = torch.zeros(1, 4, 48), torch.arange(4)[None]
    with pytest.raises(HybridError, match="call the hybrid's forward"):
        hybrid.model.layers[0](hidden, position_embeddings=hybrid.model.rotary_emb(hidden, positions))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(w_sink="x"),
        dict(w_sink=-1),
        dict(layer_types=["sliding_attention"]),
        dict(layer_types=["lazy"] * 4),
        dict(sliding_window=0),
    ],
)
def test_a_config_with_wrong_fields_is_refused_at_construction(qwen3_config, wrong):
    config = hybrid_config(qwen3_config, SPEC)
    with pytest.raises(Exception, match=r"w_sink|layer_types|w_recent|layer"):
        type(config)(**{**config.to_dict(), **wrong})


def test_a_model_loaded_for_another_version_of_the_mathematics_is_refused(qwen3_config):
    config = hybrid_config(qwen3_config, SPEC)
    with pytest.raises(HybridError, match="hybrid_version"):
        type(config)(**{**config.to_dict(), "hybrid_version": "0"})


def test_qwen2_with_biases_keeps_them():
    assert "model.layers.0.self_attn.q_proj.bias" in build_hybrid(BASES["qwen2"], SPEC).state_dict()
