import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.text import cut_at_stop_string, stop_tokens, thinking_tokens
from lt_train.runtime.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained("data/tiny-reasoner")


@pytest.fixture
def model() -> HybridForCausalLM:
    config = Qwen3Config(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return build_hybrid(config, HybridSpec(2, (1,)))


def test_answers_stop_at_the_eos_of_the_tokenizer_and_of_the_checkpoint(
    model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.generation_config.eos_token_id = [4, 9]
    assert stop_tokens(model, tokenizer) == tuple(sorted({4, 9, tokenizer.eos_token_id}))


def test_a_model_that_could_never_stop_is_refused(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.generation_config.eos_token_id = None
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="end-of-sequence token"):
        stop_tokens(model, endless)


@pytest.mark.parametrize("end", ["</think>", "<|end_of_thought|>"])
def test_thinking_tokens_are_those_up_to_the_end_of_the_thought(tokenizer: PreTrainedTokenizerBase, end: str) -> None:
    thought = tokenizer(f"1. a>b=3{end}", add_special_tokens=False)["input_ids"]
    answer = tokenizer("The last digit", add_special_tokens=False)["input_ids"]
    assert thinking_tokens(tokenizer, [*thought, *answer]) == len(thought)
    assert thinking_tokens(tokenizer, thought) == len(thought)
    assert thinking_tokens(tokenizer, answer) is None
    assert thinking_tokens(tokenizer, []) is None


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [("one. two", (". ",), "one"), ("one. two", ("two", "on"), ""), ("one", ("x",), None), ("one", (), None)],
)
def test_a_text_is_cut_before_its_first_stop_string(text: str, stop: tuple[str, ...], before: str | None) -> None:
    assert cut_at_stop_string(text, stop) == before
