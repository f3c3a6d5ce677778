import pytest
import torch

from lt_train.export.bare_process import COMPUTED_IN, NEW_TOKENS, computing_in, logits_of
from lt_train.export.tolerance import LogitChanges, check_batches, measure
from lt_train.hybrid.spec import HybridSpec
from tests.support.tiny_exports import tiny_hybrid


def test_the_tolerance_is_a_multiple_of_rounding_that_lies_below_every_fault_that_is_noticed():
    assert LogitChanges(1e-6, {"no sinks": 1.0}).tolerance == pytest.approx(16e-6)
    near = LogitChanges(1e-4, {"a window longer by one": 4e-3, "no sinks": 1.0})
    assert near.tolerance == pytest.approx(6.3e-4, rel=0.01) and set(near.noticed) == set(near.faults)


def test_a_fault_that_changes_no_more_than_rounding_is_not_reported_as_noticed():
    measured = LogitChanges(1e-3, {"a window longer by one": 2e-3, "no sinks": 1.0})
    assert set(measured.noticed) == {"no sinks"} and measured.tolerance == pytest.approx(16e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_sink", [0, 3])
def test_a_window_off_by_one_and_missing_sinks_stand_out_from_rounding_in_every_dtype(dtype, w_sink):
    model = tiny_hybrid(w_sink=w_sink).to(dtype)
    batch = check_batches(model.spec, model.config.vocab_size, model.config.max_position_embeddings)[-1]
    with computing_in(COMPUTED_IN, model):
        logits = logits_of(model, *batch)
    measured = measure(model, batch, logits)
    assert set(measured.noticed) == {"a window longer by one", "a window shorter by one", *(["no sinks"] if w_sink else [])}
    assert 0 < measured.rounding < 1e-3 and min(measured.faults.values()) > 1e-2
    assert model.spec == tiny_hybrid(w_sink=w_sink).spec, "the model is as before"


def test_other_heads_of_split_layers_stand_out_from_rounding():
    model = tiny_hybrid(lazy=(), split=((1, (0,)), (3, (1,))))
    batch = check_batches(model.spec, model.config.vocab_size, model.config.max_position_embeddings)[-1]
    assert "other KV heads" in measure(model, batch, logits_of(model, *batch)).noticed


def test_a_bf16_model_computes_in_fp32_from_its_own_weights_and_is_bf16_again_afterwards():
    model = tiny_hybrid()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batch = check_batches(model.spec, model.config.vocab_size, model.config.max_position_embeddings)[-1]
    with computing_in(torch.float32, model):
        found = logits_of(model, *batch)
    assert all(
        torch.equal(weight, before[name]) and weight.dtype == before[name].dtype for name, weight in model.state_dict().items()
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert found.dtype == torch.float32 and torch.equal(found, logits_of(model.float(), *batch))


@pytest.mark.parametrize(("w_sink", "w_recent"), [(0, 1), (4, 7), (4, 124), (4, 1020)])
def test_batches_hold_rows_shorter_than_the_sinks_and_longer_than_the_window(w_sink, w_recent):
    batches = check_batches(HybridSpec(4, (1,), w_sink, w_recent), 96, 4096)
    lengths = [length for _, mask in batches for length in mask.sum(dim=1).tolist()]
    assert min(lengths) == 1 and max(lengths) > w_sink + w_recent
    assert all(bool(mask[:, -1].all()) for _, mask in batches), "padded on the left"
    assert max(mask.numel() for _, mask in batches) < 2048, "a wide vocabulary must not make the check's logits huge"


def test_a_short_context_bounds_the_batches():
    (_, mask), (_, alone) = check_batches(HybridSpec(4, (1,), 4, 1020), 96, 64)
    assert mask.shape[1] == alone.shape[1] == 64 - NEW_TOKENS


def test_experts_are_measured_in_fp64_too_whose_fast_kernel_has_none():
    model = tiny_hybrid("qwen3_moe")
    model.config._experts_implementation = "grouped_mm"  # as from_pretrained sets it
    batch = check_batches(model.spec, model.config.vocab_size, model.config.max_position_embeddings)[-1]
    assert 0 < measure(model, batch, logits_of(model, *batch)).rounding < 1e-3
    assert model.config._experts_implementation == "grouped_mm"
