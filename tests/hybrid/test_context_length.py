"""How many tokens a model supports, as its config says."""

import re
from pathlib import Path

import pytest

import lt_train
from lt_train.hybrid.context_length import context_length


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        (None, 40_960),
        ({"rope_type": "default"}, 40_960),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),  # Qwen's model cards
        ({"rope_type": "yarn", "factor": 4.0}, 163_840),
        ({"rope_type": "linear", "factor": 2.0}, 81_920),
        ({"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32_768}, 40_960),
    ],
)
def test_scaled_rotary_embeddings_reach_beyond_max_position_embeddings(rope, tokens):
    for name in ("rope_parameters", "rope_scaling"):
        assert context_length({"max_position_embeddings": 40_960, name: rope}) == tokens


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_config_that_names_the_scaled_context_keeps_it(factor):
    """Llama 3.1, and Llama 3.2 with a factor by which 8,192 tokens would be 262,144."""
    rope = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192}
    assert context_length({"max_position_embeddings": 131_072, "rope_parameters": rope}) == 131_072


def test_no_other_place_reads_the_context_of_a_config():
    """Training, evaluation, plan, export and report all go through `context_length`; loading.py writes it (model.rope_scaling)."""
    package = Path(lt_train.__file__).parent
    reads = re.compile(r"\.max_position_embeddings\b")
    readers = {str(path.relative_to(package)) for path in package.rglob("*.py") if reads.search(path.read_text(encoding="utf-8"))}
    assert readers == {"inference/loading.py"}
