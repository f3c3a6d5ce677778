"""What the recipes for models that think train on, in the chat templates of those models."""

import json
from pathlib import Path

import pytest

from lt_train.dataset.loading import load_examples
from lt_train.recipe.loading import load_recipe
from tests.support.chat_templates import family_tokenizer

THOUGHT = "I multiply.\n</think>\n\nThe answer is \\boxed{42}."


@pytest.mark.parametrize(
    ("recipe", "family", "opened_by_prompt"),
    [
        ("qwen3-8b", "qwen3", False),
        ("deepseek-r1-distill-llama-8b", "r1", True),
        ("mistral-7b", "mistral", False),
    ],
)
def test_the_whole_trace_is_trained_on_and_the_end_that_stops_it(recipe, family, opened_by_prompt, tmp_path):
    """Two of these templates drop the thought of an answer, and one opens it in the prompt."""
    checked, tokenizer = load_recipe(Path(f"recipes/{recipe}.yaml")), family_tokenizer(family)
    trace = f"<think>\n{THOUGHT}"
    row = {
        "still": {"question": "6 x 7?", "combined_text": trace},
        "messages": {"messages": [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": trace}]},
    }[checked.data.format]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    data = checked.data.model_copy(update={"source": str(rows), "heldout": 0, "subset": None})
    (example,) = load_examples(data, checked.prompt, tokenizer, model_max_length=40960, seed=0).train
    trained = tokenizer.decode(example.answer_ids)
    assert THOUGHT in trained
    assert trained.lstrip(" ").startswith("<think>") is not opened_by_prompt  # Mistral's template writes a space before an answer
    assert tokenizer.decode(example.prompt_ids).endswith("<think>\n") is opened_by_prompt
    assert example.answer_ids[-1] == tokenizer.eos_token_id
    assert [label for label in example.labels if label >= 0] == list(example.answer_ids)
