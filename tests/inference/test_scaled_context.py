"""A base whose rotary embeddings are scaled has the longer context everywhere: on reading data, in evaluation and in a plan."""

from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lt_train.dataset.examples import Example
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.answer_hidden_states import check_fits_context
from lt_train.inference.loading import load_base_config, load_weights, with_rope_scaling
from lt_train.recipe.schema import Model, RopeScaling
from lt_train.runtime.errors import UserError
from tests.support.families import BASES

SCALED = RopeScaling(rope_type="yarn", factor=4.0)


@pytest.fixture(params=sorted(BASES.keys() - {"phi3", "olmo3", "gpt_oss"}))
def base(request, tmp_path):
    config = deepcopy(BASES[request.param])
    config.max_position_embeddings = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return str(tmp_path)


def sample(tokens: int) -> Example:
    return Example(id="a", where="here", prompt_ids=(1,), answer_ids=(2,) * (tokens - 1), truncated=False, question_id="a")


def test_a_sample_within_the_scaled_context_fits_and_a_longer_one_does_not(base):
    model = Model(base=base, rope_scaling=SCALED)
    assert context_length(load_base_config(model).to_dict()) == 256
    hybrid = load_weights(model, HybridSpec(4, (1,)), torch.float32)
    check_fits_context(hybrid, sample(256))
    with pytest.raises(UserError, match="context of 256 tokens"):
        check_fits_context(hybrid, sample(257))
    with pytest.raises(UserError, match="context of 64 tokens"):
        check_fits_context(load_weights(Model(base=base), HybridSpec(4, (1,)), torch.float32), sample(65))


def test_a_recipes_scaling_warns_of_nothing(base, capfd):
    load_weights(Model(base=base, rope_scaling=SCALED), HybridSpec(4, (1,)), torch.float32)
    assert "factor" not in capfd.readouterr().err


def test_scaling_keeps_the_part_of_a_head_that_rotates():
    config = type(BASES["glm4"])(
        **BASES["glm4"].to_dict() | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}
    )
    scaled = with_rope_scaling(config, SCALED)
    assert scaled.rope_parameters["partial_rotary_factor"] == 0.25
    assert build_hybrid(scaled, HybridSpec(4, (1,))).model.rotary_emb.inv_freq.shape == (2,)  # a quarter of 16, in pairs


def test_a_family_that_knows_no_such_scaling_is_refused():
    with pytest.raises(UserError, match=r"model\.rope_scaling: yarn: transformers' phi3 .* Fix: leave rope_scaling out"):
        with_rope_scaling(BASES["phi3"], SCALED)
    with pytest.raises(UserError, match=r"model\.rope_scaling: yarn: olmo3 has rotary embeddings for each type of layer"):
        with_rope_scaling(BASES["olmo3"], SCALED)
    with pytest.raises(UserError, match=r"model\.rope_scaling: yarn: gpt_oss is scaled by yarn already, to 8,192 tokens"):
        with_rope_scaling(BASES["gpt_oss"], SCALED)
