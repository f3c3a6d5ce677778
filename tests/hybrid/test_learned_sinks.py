"""A sink logit for each query head in the softmax's denominator: every kernel, the cache, the classes and their checkpoints."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from lt_train.hybrid.attention_kernels import KERNELS
from lt_train.hybrid.cache import CACHE_ARGUMENT, HybridCache
from lt_train.hybrid.loading import build_hybrid, load_hybrid, load_hybrid_checkpoint
from lt_train.hybrid.mask import streaming_visible
from lt_train.hybrid.reference import reference_streaming_attention
from lt_train.hybrid.sequence_parallel import Shards
from lt_train.hybrid.spec import HybridError, HybridSpec
from tests.support.dense_flash import DenseFlash
from tests.support.families import BASES, SPLIT, on_base
from tests.support.streaming_cases import CASES, Case, documents_of, tensors_of

SPEC = HybridSpec(4, (0, 1, 3), w_sink=0, w_recent=6, learned_sinks=True)
WITHOUT_TOKENS = {
    name: dataclasses.replace(case, w_sink=0)
    for name, case in CASES.items()
    if name not in ("no sinks", "no sinks, window of one", "sinks longer than the input", "more sinks than window")
}


def sinks_for(case: Case, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linspace(-2, 3, case.heads[0], dtype=dtype)


def hybrid(base_config, spec=SPEC):
    """With logits that matter: an ordinary query's scores are about 0."""
    model = build_hybrid(base_config, on_base(base_config, spec)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks.weight"):
            torch.nn.init.uniform_(parameter, -1, 3)
    return model


def test_the_reference_is_the_attention_of_gpt_oss():
    q, k, v, _ = tensors_of(Case(((50,),)), torch.float64)
    sinks = torch.linspace(-2, 3, 4, dtype=torch.float64)
    position = torch.arange(50)
    hidden = ~streaming_visible(position[:, None], position, 0, 20)
    mask = torch.zeros(1, 1, 50, 50, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks, module.training = 2, sinks, False
    theirs, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    ours = reference_streaming_attention(q, k, v, w_sink=0, w_recent=20, scaling=0.3, sinks_H=sinks)
    torch.testing.assert_close(ours.transpose(1, 2), theirs)


@pytest.mark.parametrize("case", WITHOUT_TOKENS.values(), ids=WITHOUT_TOKENS)
@pytest.mark.parametrize("name", ["blocked", "flash"])
def test_outputs_and_gradients_of_a_kernel_are_the_references(name, case, monkeypatch):
    monkeypatch.setattr("lt_train.hybrid.attention_kernels._flash_on", lambda device: DenseFlash())
    documents = documents_of(case)
    *qkv, dout = tensors_of(case, torch.float64)

    def with_gradients(kernel):
        leaves = [x.detach().clone().requires_grad_() for x in (*qkv, sinks_for(case))]
        out = kernel.streaming(documents, *leaves[:3], **case.sizes, sinks_H=leaves[3])
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    torch.testing.assert_close(with_gradients(KERNELS[name]), with_gradients(KERNELS["reference"]), atol=1e-10, rtol=1e-8)


def test_the_references_gradient_of_the_logits_is_that_of_finite_differences():
    q, k, v, _ = tensors_of(Case(((9,),), w_recent=4), torch.float64)

    def attend(sinks):
        return reference_streaming_attention(q, k, v, w_sink=0, w_recent=4, scaling=0.3, sinks_H=sinks)

    assert torch.autograd.gradcheck(attend, (torch.linspace(-2, 3, 4, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("name", ["reference", "blocked", "flash"])
def test_bf16_is_as_near_as_its_rounding(name, monkeypatch):
    monkeypatch.setattr("lt_train.hybrid.attention_kernels._flash_on", lambda device: DenseFlash())
    case = WITHOUT_TOKENS["packed"]
    documents, (q, k, v, _) = documents_of(case), tensors_of(case, torch.bfloat16)
    sinks = sinks_for(case, torch.float32)
    found = KERNELS[name].streaming(documents, q, k, v, **case.sizes, sinks_H=sinks)
    exact = KERNELS["reference"].streaming(documents, q.double(), k.double(), v.double(), **case.sizes, sinks_H=sinks.double())
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() / exact.norm() < 0.01


def left_padded(lengths):
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return torch.randint(2, 96, (len(lengths), width)) * mask, mask


def test_left_padded_decoding_equals_recomputation_token_for_token(core_config):
    model = hybrid(core_config)
    ids, mask = left_padded([1, 2, 3, 12, 20])
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    cached = model.generate(ids, **settings)
    assert torch.equal(cached, model.generate(ids, **settings, use_cache=False))


@torch.no_grad()
def test_chunks_through_the_cache_have_the_logits_of_one_pass():
    model = hybrid(BASES["qwen3"])
    ids, mask = left_padded([9, 30])
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache, parts = HybridCache(model.spec), []
    for start, end in [(0, 4), (4, 17), (17, 18), (18, 30)]:
        parts.append(model(ids[:, start:end], attention_mask=mask[:, :end], **{CACHE_ARGUMENT: cache}).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_are_computed_as_if_alone():
    model = hybrid(BASES["llama"])
    ids = torch.randint(2, 96, (1, 40))
    packed = model(ids, position_ids=torch.cat([torch.arange(25), torch.arange(15)])[None], use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in ids.split([25, 15], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_minus_infinity_are_a_plain_window_and_others_are_not():
    model, plain = hybrid(BASES["qwen2"]), build_hybrid(BASES["qwen2"], dataclasses.replace(SPEC, learned_sinks=False)).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "sinks" not in name})
    ids = torch.randint(2, 96, (2, 30))
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-3
    for layer in SPEC.lazy_layers:
        model.model.layers[layer].self_attn.sinks.weight.fill_(float("-inf"))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_full_attention_switched_on_it_is_the_base_to_the_last_bit(core_config, tmp_path):
    stock = AutoModelForCausalLM.from_config(core_config).eval()
    stock.save_pretrained(tmp_path)
    spec = on_base(core_config, SPEC)
    model = load_hybrid(tmp_path, spec)
    ids = torch.randint(2, 96, (2, spec.sliding_window - 1 if spec.sliding_layers else 40))
    with model.full_attention():
        assert torch.equal(model(ids, use_cache=False).logits, stock(ids).logits)
    logits = [model.model.layers[layer].self_attn.sinks.weight for layer in spec.lazy_layers]
    assert all(torch.equal(logit, torch.zeros(4)) for logit in logits), "a base has none: they start at 0"


@torch.no_grad()
def test_a_checkpoint_holds_the_logits_and_one_without_them_is_refused(tmp_path):
    model = hybrid(BASES["qwen3"])
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, 96, (1, 30))
    assert torch.equal(load_hybrid_checkpoint(tmp_path)(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).spec == SPEC
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("1.self_attn.sinks.weight")}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(HybridError, match=r"missing keys: model.layers.1.self_attn.sinks.weight"):
        load_hybrid_checkpoint(tmp_path)


def test_code_that_knows_no_learned_sinks_would_stop_at_the_version():
    config = build_hybrid(BASES["qwen3"], SPEC).config.to_dict()
    assert config["hybrid_version"] == "2"
    with pytest.raises(HybridError, match=r"for learned_sinks False this code computes version '1'"):
        AutoConfig.for_model(**config | {"learned_sinks": False})


def test_two_kinds_of_sinks_are_refused():
    with pytest.raises(HybridError, match=r"w_sink: 4: learned sinks take the place of sink tokens. Fix: set w_sink to 0"):
        HybridSpec(4, (1,), w_sink=4, learned_sinks=True)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (SPEC, r"learned_sinks: each layer of the base has some, which stay\. Fix: set hybrid\.sink to tokens"),
        (SPLIT, r"split_layers: each query head of the base has a learned sink, .* Fix: let entire layers stream"),
    ],
)
def test_a_base_with_learned_sinks_has_no_others_and_no_split_layers(spec, reason):
    with pytest.raises(HybridError, match=reason):
        build_hybrid(BASES["gpt_oss"], on_base(BASES["gpt_oss"], spec))


@torch.no_grad()
def test_the_sinks_of_a_base_are_seen_by_layers_that_are_full_stream_and_slide():
    model, ids = hybrid(BASES["gpt_oss"], dataclasses.replace(SPEC, learned_sinks=False, w_sink=2)), torch.randint(2, 96, (1, 30))
    before = model(ids, use_cache=False).logits
    kinds = [(0, model.spec.sliding_layers), (1, model.spec.lazy_layers), (2, model.spec.full_in_base)]
    for layer, of_its_kind in kinds:
        sinks, kept = model.model.layers[layer].self_attn.sinks, model.model.layers[layer].self_attn.sinks.clone()
        assert layer in of_its_kind
        sinks.fill_(9.0)
        assert (model(ids, use_cache=False).logits - before).abs().max() > 1e-3
        sinks.copy_(kept)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_shards_of_a_sequence_are_refused(family):
    spec = SPEC if family == "qwen3" else dataclasses.replace(SPEC, learned_sinks=False)
    model = hybrid(BASES[family], spec).train()
    model.shard_sequences(Shards(lambda *args, **kwargs: None, index=0, degree=2))
    with pytest.raises(HybridError, match=r"learned_sinks: .* Fix: train without sequence parallelism"):
        model(torch.ones(1, 8, dtype=torch.long), position_ids=torch.arange(8)[None])
