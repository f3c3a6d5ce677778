"""No reasoning is lost in silence: in a field of its own, and between the tags of another family than the base's."""

from pathlib import Path
from typing import Any

import pytest

from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import byte_tokenizer, family_tokenizer
from tests.support.loaded_rows import load_file, load_rows, texts

QUESTION = {"role": "user", "content": "6 x 7?"}
REASONING = "Six sevens are forty-two."
ANSWER = "\\boxed{42}"
STILL = f"<|begin_of_thought|>\n\n{REASONING}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{ANSWER}\n\n<|end_of_solution|>"
THINK = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"

BY_FAMILY = {
    "qwen3-reasoning": THINK,  # read by the template
    "qwen3-thinking": THINK.removeprefix("<think>\n"),  # and opened by the prompt
    "qwen3": THINK,  # between the tags that the template knows
    "r1": THINK.removeprefix("<think>\n"),
    "still": STILL,
}
"""What a base of each family is trained on."""


def row(answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [QUESTION, {"role": "assistant", **answer}]}


def answer_of(folder: Path, answer: str | dict[str, Any], family: str, **data: Any) -> str:
    message = {"content": answer} if isinstance(answer, str) else answer
    _, text = texts(load_rows(folder, [row(message)], family, **data).train[0], family)
    return text.removesuffix(family_tokenizer(family).eos_token)


@pytest.mark.parametrize("family", BY_FAMILY)
@pytest.mark.parametrize(
    "key", ["reasoning_content", "reasoning", "thinking", "thought", "thoughts", "reasoning_text", "reasoningContent"]
)
def test_reasoning_in_a_field_of_its_own_is_laid_as_the_base_lays_it(tmp_path: Path, family: str, key: str) -> None:
    assert answer_of(tmp_path, {key: REASONING, "content": ANSWER}, family) == BY_FAMILY[family]


@pytest.mark.parametrize("family", BY_FAMILY)
def test_the_shared_case_of_a_reasoning_field_is_trained_on_with_it(shared_cases: Path, family: str) -> None:
    _, text = texts(load_file(shared_cases / "rows/reasoning_content.jsonl", family).train[0], family)
    assert text == BY_FAMILY[family] + family_tokenizer(family).eos_token


@pytest.mark.parametrize(
    "answer",
    [
        {"content": [{"type": "thinking", "thinking": REASONING}, {"type": "text", "text": ANSWER}]},
        {"reasoning": [REASONING], "content": ANSWER},
        {"reasoning": REASONING, "reasoning_content": REASONING, "content": ANSWER},
        {"reasoning": REASONING, "reasoning_details": [{"text": REASONING}], "content": ANSWER},
        {"thinking": THINK.partition("\n\n")[0], "content": ANSWER},
        {"thinking": REASONING, "content": THINK},
        {"thinking": None, "tool_calls": [], "name": "", "weight": 1, "content": THINK},
    ],
)
def test_reasoning_is_taken_once_however_a_message_holds_it(tmp_path: Path, answer: dict[str, Any]) -> None:
    assert answer_of(tmp_path, answer, "qwen3-reasoning") == THINK


def test_reasoning_where_the_base_shows_no_tags_is_an_error_with_the_fix(tmp_path: Path) -> None:
    answer = {"reasoning_content": REASONING, "content": ANSWER}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: reasoning in a field of its own.*Fix: .*data\.reasoning_tag_pair"):
        answer_of(tmp_path, answer, "mistral")
    named = answer_of(tmp_path, answer, "mistral", reasoning_tag_pair=["<r>", "</r>"])
    assert named == f" <r>\n{REASONING}\n</r>\n\n{ANSWER}"


def test_tags_among_the_tokens_of_a_base_are_its_tags(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("qwen2.5")
    tokenizer.add_tokens(["<think>", "</think>"])
    (example,) = load_rows(tmp_path, [row({"reasoning_content": REASONING, "content": ANSWER})], tokenizer).train
    assert texts(example, tokenizer)[1] == THINK + "<|im_end|>"


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ({"note": "Mind the units.", "content": ANSWER}, "'note'"),
        ({"tool_calls": [{"function": {"name": "multiply"}}], "content": ANSWER}, "'tool_calls'"),
        ({"name": "Ann", "content": ANSWER}, "'name'"),
        ({"reasoning_details": [{"text": REASONING}, {"text": "More."}], "content": ANSWER}, "'reasoning_details'"),
    ],
)
def test_a_key_of_a_message_whose_text_would_be_lost_is_named(tmp_path: Path, answer: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: messages\[1\]: the key {key} holds text that would be lost"):
        answer_of(tmp_path, answer, "qwen3-reasoning")


@pytest.mark.parametrize(
    ("answer", "reported"),
    [
        ({"reasoning": REASONING, "thinking": "Otherwise.", "content": ANSWER}, "reasoning, thinking hold different reasoning"),
        ({"reasoning": "Otherwise.", "content": THINK}, "reasoning of its own beside"),
    ],
)
def test_two_kinds_of_reasoning_in_one_answer_are_an_error(tmp_path: Path, answer: dict[str, Any], reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        answer_of(tmp_path, answer, "qwen3-reasoning")


def test_reasoning_of_an_earlier_answer_is_laid_as_the_base_lays_it(tmp_path: Path) -> None:
    turns = [
        QUESTION,
        {"role": "assistant", "reasoning": REASONING, "content": ANSWER},
        QUESTION,
        {"role": "assistant", "content": STILL},
    ]
    (example,) = load_rows(tmp_path, [{"messages": turns}], "still").train
    assert STILL in texts(example, "still")[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "6 x 7?", "response": ANSWER, "reasoning": REASONING},
        {"prompt": "6 x 7?", "completion": ANSWER, "thinking_trajectories": [REASONING]},
        {"instruction": "6 x 7?", "output": ANSWER, "deepseek_reasoning": REASONING},
        {**row({"content": ANSWER}), "reasoning_content": REASONING},
        {**row({"content": THINK}), "reasoning_content": REASONING},
    ],
)
def test_reasoning_in_a_column_beside_the_answer_is_laid_before_it(tmp_path: Path, fields: dict[str, Any]) -> None:
    (example,) = load_rows(tmp_path, [fields], "qwen3").train
    assert texts(example, "qwen3")[1] == THINK + "<|im_end|>"


def test_two_columns_of_different_reasoning_are_named(tmp_path: Path) -> None:
    fields = {"prompt": "6 x 7?", "response": ANSWER, "gemini_thinking": "Six, seven.", "deepseek_thinking": REASONING}
    with pytest.raises(UserError, match=r"the columns gemini_thinking, deepseek_thinking hold .*lost\. Fix: .*data\.columns"):
        load_rows(tmp_path, [fields], "qwen3")


def test_a_label_is_no_reasoning(tmp_path: Path) -> None:
    (example,) = load_rows(tmp_path, [{"prompt": "6 x 7?", "response": ANSWER, "reasoning": "on"}], "qwen2.5").train
    assert texts(example, "qwen2.5")[1] == ANSWER + "<|im_end|>"


FAULTS = {
    "another family": ("qwen3-thinking", STILL, "between <|begin_of_thought|> and <|end_of_thought|>, the base's between <think>"),
    "another family, unopened": ("qwen3", STILL, "between <|begin_of_thought|> and <|end_of_thought|>, the base's between <think>"),
    "the mirror of it": ("still", THINK, "between <think> and </think>, the base's between <|begin_of_thought|>"),
    "begins inside": ("qwen3", f"{REASONING}\n</think>\n\n{ANSWER}", "begins inside the reasoning (</think> without <think>)"),
    "begins inside, no tags": ("qwen2.5", f"{REASONING}\n</think>\n\n{ANSWER}", "begins inside the reasoning"),
    "several": ("qwen3", f"<think>a</think>b{THINK}", "several <think> in one answer"),
    "several, opened": ("r1", f"<think>a<think>b</think>{ANSWER}", "several <think> in one answer"),
    "several, no tags": ("mistral", f"<think>a<think>b</think>{ANSWER}", "several <think> in one answer"),
    "several ends": ("qwen3", f"{THINK}</think>", "several </think> in one answer"),
    "never closed": ("qwen3", f"<think>{REASONING}", "opened with <think> and never closed"),
    "never closed, no tags": ("smollm2", f"<|begin_of_thought|>{REASONING}", "opened with <|begin_of_thought|> and never closed"),
    "no reasoning": ("r1", ANSWER, "the answer has no </think>, and the base's prompt opens <think>"),
    "no reasoning, template closes": ("qwen3-thinking", ANSWER, "the answer has no </think>, and the base's prompt opens <think>"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_reasoning_that_a_trained_model_would_not_close_is_an_error_with_counts(tmp_path: Path, name: str) -> None:
    family, answer, problem = FAULTS[name]
    good = {"r1": THINK, "still": STILL, "qwen3-thinking": THINK}.get(family, "None.")
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, [row({"content": text}) for text in (good, answer, answer)], family)
    assert "2 of 3 rows cannot be trained on" in str(error.value)
    assert f"rows.jsonl:2, {tmp_path}/rows.jsonl:3: data.reasoning_tags: null: " in str(error.value)
    assert problem in str(error.value) and "data.reasoning_tags: keep" in str(error.value)
    kept = load_rows(tmp_path, [row({"content": answer})], family, reasoning_tags="keep").train[0]
    assert answer.removeprefix("<think>") in texts(kept, family)[1]


def test_the_shared_case_of_another_family_is_refused_kept_or_converted(shared_cases: Path) -> None:
    case = shared_cases / "rows/still_tags.jsonl"
    for family in ("r1", "qwen3-thinking"):
        with pytest.raises(UserError, match=r"1 of 1 rows .*(?s:.*)never close its reasoning.*data\.reasoning_tags: convert"):
            load_file(case, family)
        converted = texts(load_file(case, family, reasoning_tags="convert").train[0], family)[1]
        assert converted.removesuffix(family_tokenizer(family).eos_token) == f"Six sevens.\n</think>\n\n{ANSWER}"


@pytest.mark.parametrize("family", BY_FAMILY)
@pytest.mark.parametrize(
    "answer",
    [
        STILL,
        THINK,
        f"  {STILL}\n",
        f"{REASONING}\n</think>\n\n{ANSWER}",
        f"{REASONING}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>{ANSWER}<|end_of_solution|>",
        f"<thinking>{REASONING}</thinking>{ANSWER}",
        f"[THINK]{REASONING}[/THINK]{ANSWER}",
        f"<reflect>{REASONING}</reflect> {ANSWER}",
    ],
)
def test_the_tags_of_data_are_converted_into_the_base_s(tmp_path: Path, family: str, answer: str) -> None:
    converted = answer_of(tmp_path, answer, family, reasoning_tags="convert", reasoning_tag_pair=["<reflect>", "</reflect>"])
    assert converted.strip() == BY_FAMILY[family]


@pytest.mark.parametrize("answer", [f"<think>a</think>b{THINK}", f"<think>{REASONING}"])
def test_what_cannot_be_converted_stays_an_error_and_can_be_dropped(tmp_path: Path, answer: str) -> None:
    rows = [row({"content": answer}), row({"content": STILL})]
    with pytest.raises(UserError, match="1 of 2 rows"):
        load_rows(tmp_path, rows, "qwen3", reasoning_tags="convert")
    examples = load_rows(tmp_path, rows, "qwen3", reasoning_tags="convert", faulty="drop")
    assert examples.counts["faulty"] == 1 and [texts(example, "qwen3")[1] for example in examples.train] == [THINK + "<|im_end|>"]


def test_converting_for_a_base_without_tags_is_an_error_unless_they_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.reasoning_tags: convert: neither .*Fix: .*data\.reasoning_tag_pair"):
        answer_of(tmp_path, STILL, "mistral", reasoning_tags="convert")
    assert (
        answer_of(tmp_path, STILL, "mistral", reasoning_tags="convert", reasoning_tag_pair=["<think>", "</think>"]) == " " + THINK
    )


def test_an_answer_that_mentions_tags_is_no_reasoning(tmp_path: Path) -> None:
    text = "Put the note into <reasoning> and close it with </reasoning>."
    assert answer_of(tmp_path, text, "qwen2.5") == text
    quoting = f"<think>\nA <thinking> tag? {REASONING}\n</think>\n\n{ANSWER}"
    assert answer_of(tmp_path, quoting, "qwen3-reasoning") == quoting


def test_an_unknown_tag_that_the_prompt_opens_must_be_closed_too(tmp_path: Path) -> None:
    template = family_tokenizer("r1").chat_template.replace("<think>", "<ponder>").replace("</think>", "</ponder>")
    tokenizer = byte_tokenizer(template, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    (example,) = load_rows(tmp_path, [row({"content": "<ponder>\nHm.</ponder>4"})], tokenizer).train
    assert texts(example, tokenizer)[1] == "Hm.</ponder>4<｜end▁of▁sentence｜>"
    with pytest.raises(UserError, match="the answer has no </ponder>"):
        load_rows(tmp_path, [row({"content": "4"})], tokenizer)


NOT_THINKING = [("qwen3-without-thinking", Prompt()), ("smollm3", Prompt(system="/no_think"))]


@pytest.mark.parametrize(("family", "prompt"), NOT_THINKING)
@pytest.mark.parametrize("answer", [ANSWER, f"<think>\n\n</think>\n\n{ANSWER}"])
def test_after_a_prompt_that_closes_the_reasoning_the_answer_alone_is_trained_on(
    tmp_path: Path, family: str, prompt: Prompt, answer: str
) -> None:
    (example,) = load_rows(tmp_path, [row({"content": answer})], family, prompt).train
    before, trained = texts(example, family)
    assert before.rstrip().endswith("</think>") and trained == f"{ANSWER}<|im_end|>"


@pytest.mark.parametrize(("family", "prompt"), NOT_THINKING)
@pytest.mark.parametrize("answer", [{"content": THINK}, {"content": ANSWER, "reasoning": REASONING}, {"content": STILL}])
def test_reasoning_after_a_prompt_that_closes_it_is_an_error(
    tmp_path: Path, family: str, prompt: Prompt, answer: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"the prompt has closed it with </think> already(?s:.*)reasoning_tags: keep"):
        load_rows(tmp_path, [row(answer)], family, prompt, reasoning_tags="convert" if answer["content"] == STILL else None)
    (kept,) = load_rows(tmp_path, [row({"content": THINK})], family, prompt, reasoning_tags="keep").train
    assert texts(kept, family)[1] == f"{THINK}<|im_end|>"


def test_the_real_traces_of_still_are_well_formed(shared_data: Path) -> None:
    examples = load_file(shared_data / "reasoning_traces_still.jsonl", "smollm2", max_length=4096, overlong="truncate")
    assert "faulty" not in examples.counts
