"""Rows of every format that people have, and of the data sets that docs/data.md names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from tests.support.loaded_rows import load_file, load_rows, texts
from tests.support.repository import REPOSITORY

STILL_TRACE = "<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n42\n\n<|end_of_solution|>"
TRACE = "<think>\nHm.\n</think>\n\n42"
CHAT = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": "42"}]
SHAREGPT = [{"from": "human", "value": "6 x 7?"}, {"from": "gpt", "value": "42"}]
PARTS = [{"type": "text", "text": "6 x "}, {"type": "text", "text": "7?"}]

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("still", {"question": "6 x 7?", "combined_text": "42"}),
    ("prompt_response", {"prompt": "6 x 7?", "response": "42"}),
    ("prompt_completion", {"prompt": "6 x 7?", "completion": "42"}),
    ("prompt_completion", {"prompt": CHAT[:1], "completion": CHAT[1:]}),
    ("prompt_completion", {"prompt": json.dumps(CHAT[:1]), "completion": "42"}),
    ("alpaca", {"instruction": "6 x 7?", "input": "", "output": "42"}),
    ("alpaca", {"instruction": "6 x 7?", "output": "42"}),
    ("messages", {"messages": CHAT}),
    ("messages", {"messages": json.dumps(CHAT)}),
    ("messages", {"messages": str(CHAT)}),
    ("messages", {"messages": [{"role": "user", "content": PARTS}, CHAT[1]]}),
    ("messages", {"messages": SHAREGPT}),
    ("sharegpt", {"conversations": SHAREGPT}),
    ("sharegpt", {"conversations": CHAT}),
    ("sharegpt", {"conversations": [{"from": "user", "value": "6 x 7?"}, {"from": "assistant", "value": "42"}]}),
]


@pytest.mark.parametrize(("name", "row"), FORMS)
def test_every_format_gives_the_same_example_named_or_recognised(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    for chosen in (name, "auto"):
        examples = load_rows(tmp_path, [row], format=chosen)
        assert texts(examples.train[0], "qwen2.5") == (
            "<|im_start|>user\n6 x 7?<|im_end|>\n<|im_start|>assistant\n",
            "42<|im_end|>",
        )
        assert examples.format.startswith(f"data.format {name}")


def test_alpaca_s_input_belongs_to_the_question(tmp_path: Path) -> None:
    (example,) = load_rows(tmp_path, [{"instruction": "Add.", "input": "6, 7", "output": "13"}]).train
    assert "user\nAdd.\n\n6, 7<" in texts(example, "qwen2.5")[0]


def test_the_shared_case_of_sharegpt_has_its_system_turn_and_its_trace(shared_cases: Path) -> None:
    examples = load_file(shared_cases / "rows/from_value.jsonl")
    prompt, answer = texts(examples.train[0], "qwen2.5")
    assert prompt.startswith("<|im_start|>system\nThink first.<|im_end|>\n<|im_start|>user\n6 x 7?") and "Six sevens." in answer
    assert "sharegpt" in examples.format


def published(source: str, subset: str | None = None) -> dict[str, Any]:
    """The settings that docs/data.md shows for a data set."""
    text = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
    lines = [yaml.safe_load(line)["data"] for line in re.findall(r"^data: \{.*\}$", text, re.MULTILINE)]
    (found,) = [line for line in lines if line["source"] == source and line.get("subset") == subset]
    Data.model_validate(found)
    return {name: value for name, value in found.items() if name not in ("source", "subset", "max_length")}


TURNS = [{"from": "user", "value": "6 x 7?"}, {"from": "assistant", "value": STILL_TRACE}]
CONVERSATION = {"system": "Think first.", "conversations": TURNS}
OPEN_R1 = {
    "problem": "6 x 7?",
    "solution": "By hand.",
    "answer": "42",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "source": "olympiads",
    "uuid": "0",
    "is_reasoning_complete": [True, True, False, True],
    "generations": [TRACE, TRACE.replace("42", "41"), "<think>\nHm.", TRACE.replace("Hm", "Well")],
    "correctness_math_verify": [True, False, True, True],
    "correctness_llama": None,
    "finish_reasons": None,
    "correctness_count": 2,
    "messages": [CHAT[0], {"role": "assistant", "content": TRACE}],
}
S1K = {"solution": "42", "question": "6 x 7?", "cot_type": "math", "source_type": "qq8933/AIME_1983_2024", "metadata": "{}"}
PUBLISHED: list[tuple[tuple[str, str | None], dict[str, Any], list[str]]] = [
    (("RUC-AIBOX/long_form_thought_data_5k", None), {"question": "6 x 7?", "combined_text": TRACE, "domain": "math"}, [TRACE]),
    (("open-thoughts/OpenThoughts-114k", None), CONVERSATION, [TRACE]),
    (("bespokelabs/Bespoke-Stratos-17k", None), CONVERSATION, [TRACE]),
    (("NovaSky-AI/Sky-T1_data_17k", None), CONVERSATION, [TRACE]),
    (
        ("open-thoughts/OpenThoughts-114k", "metadata"),
        {
            "problem": "6 x 7?",
            "deepseek_reasoning": "Hm.",
            "deepseek_solution": "42",
            "ground_truth_solution": "42",
            "domain": "math",
            "source": "numina_math",
            "test_cases": None,
            "starter_code": None,
        },
        [TRACE],
    ),
    (("GAIR/LIMO", None), {"question": "6 x 7?", "solution": "Hm. **Final Answer** \\boxed{42}", "answer": "42"}, ["\\boxed{42}"]),
    (("simplescaling/s1K", None), {**S1K, "cot": None, "thinking_trajectories": ["Hm."], "attempt": "42"}, [TRACE]),
    (
        ("simplescaling/s1K-1.1", None),
        {
            **S1K,
            "gemini_thinking_trajectory": "Well.",
            "gemini_attempt": "41",
            "deepseek_thinking_trajectory": "Hm.",
            "deepseek_attempt": "42",
        },
        [TRACE],
    ),
    (("open-r1/OpenR1-Math-220k", None), OPEN_R1, [TRACE, TRACE.replace("Hm", "Well")]),
    (("openai/gsm8k", "main"), {"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"}, ["#### 42"]),
]


@pytest.mark.parametrize(("name", "row", "answers"), PUBLISHED, ids=[f"{source}-{subset}" for (source, subset), _, _ in PUBLISHED])
def test_a_published_data_set_is_read_by_the_line_that_the_docs_show(
    tmp_path: Path, name: tuple[str, str | None], row: dict[str, Any], answers: list[str]
) -> None:
    examples = load_rows(tmp_path, [row, row], "qwen3", **published(*name)).train
    found = [texts(example, "qwen3") for example in examples]
    assert len(found) == 2 * len(answers)
    for (prompt, answer), wanted in zip(found, answers * 2, strict=True):
        assert "6 x 7?" in prompt and answer.endswith(wanted + "<|im_end|>")


AUTO = {"OpenR1-Math": "messages", "s1K-1.1": "s1K-1.1", "LIMO": "LIMO", "gsm8k": "GSM8K", "metadata": "OpenThoughts (metadata)"}


@pytest.mark.parametrize(("name", "row", "answers"), PUBLISHED, ids=[f"{source}-{subset}" for (source, subset), _, _ in PUBLISHED])
def test_auto_recognises_a_published_data_set_and_reports_what_it_took(
    tmp_path: Path, name: tuple[str, str | None], row: dict[str, Any], answers: list[str]
) -> None:
    examples = load_rows(tmp_path, [row], "qwen3", reasoning_tags="convert")
    assert texts(examples.train[0], "qwen3")[1].endswith(answers[0] + "<|im_end|>")
    for part, taken in AUTO.items():
        if part in f"{name[0]} {name[1]}":
            assert taken in examples.format


@pytest.mark.parametrize(
    ("row", "reported"),
    [
        ({"text": "6 x 7? 42"}, r"rows\.jsonl:1: data\.format: auto: no known format; the row has text\. Fix: .*data\.columns"),
        ({"messages": CHAT, "conversations": SHAREGPT}, "several formats fit: messages, sharegpt.*set data.format"),
        ({"question": "6 x 7?", "context": "Multiply.", "answer": "42"}, "no known format; the row has question, context, answer"),
    ],
)
def test_a_format_that_is_not_certain_is_never_guessed(tmp_path: Path, row: dict[str, Any], reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        load_rows(tmp_path, [row])


def test_columns_lead_into_lists_and_mappings(tmp_path: Path) -> None:
    row = {"meta": json.dumps({"task": [{"text": "6 x 7?"}]}), "out": {"final": "42"}, "turn": "Be short."}
    columns = {"question": "meta.task.0.text", "answer": "out.final", "system": "turn"}
    (example,) = load_rows(tmp_path, [row], columns=columns).train
    prompt, answer = texts(example, "qwen2.5")
    assert prompt.startswith("<|im_start|>system\nBe short.<") and "6 x 7?" in prompt and answer == "42<|im_end|>"


@pytest.mark.parametrize(
    ("columns", "reported"),
    [
        ({"question": "q", "answer": "b"}, "no field 'b', which data.columns needs; the row has q, a"),
        ({"question": "q", "answer": "a.3"}, r"no field 'a\.3'.*no item 3: 'a' holds a list of 2"),
        ({"question": "q", "answer": "a"}, "'a' must be text, this is a list"),
        ({"question": "q", "answer": "a", "verified": ["q"]}, "'q' must hold one true or false for each of 'a'"),
        ({"messages": "q"}, "'q' must be a list of {role, content}"),
    ],
)
def test_columns_that_do_not_fit_the_rows_are_an_error(tmp_path: Path, columns: dict[str, Any], reported: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{reported}"):
        load_rows(tmp_path, [{"q": "6 x 7?", "a": ["42", "41"]}], columns=columns)


def test_reasoning_that_columns_leave_out_is_a_warning(tmp_path: Path) -> None:
    row = {"question": "6 x 7?", "solution": "42", "thinking": "Six sevens."}
    (warning,) = load_rows(tmp_path, [row], columns={"question": "question", "answer": "solution"}).warnings
    assert "data.columns: the rows hold reasoning in thinking, which is left out" in warning


def test_a_row_without_a_verified_answer_gives_none_and_is_counted(tmp_path: Path) -> None:
    columns = {"question": "q", "answer": "a", "verified": ["v"]}
    rows = [{"q": "6 x 7?", "a": ["42", "41"], "v": flags} for flags in ([True, False], [False, False])]
    examples = load_rows(tmp_path, rows, columns=columns)
    assert len(examples.train) == 1 and examples.counts["unverified"] == 1


SYSTEM_ROWS = [
    {"system": "In French.", "messages": CHAT},
    {"system_prompt": "In French.", "prompt": "6 x 7?", "response": "42"},
    {"messages": [{"role": "system", "content": "In French."}, *CHAT]},
    {"messages": [{"role": "developer", "content": "In French."}, *CHAT]},
    {"system": "In French.", "messages": [{"role": "system", "content": "In French."}, *CHAT]},
]


@pytest.mark.parametrize("row", SYSTEM_ROWS)
def test_a_row_s_own_system_turn_is_used_instead_of_the_recipe_s(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = load_rows(tmp_path, [row], prompt=Prompt(system="Not this.")).train
    assert texts(example, "qwen2.5")[0].startswith("<|im_start|>system\nIn French.<|im_end|>\n<|im_start|>user\n6 x 7?")


def test_the_shared_case_of_a_row_s_system_turn_is_used(shared_cases: Path) -> None:
    assert "Answer in French." in texts(load_file(shared_cases / "rows/row_system.jsonl").train[0], "qwen2.5")[0]


@pytest.mark.parametrize(
    ("row", "reported"),
    [
        ({"system": "In French.", "messages": [{"role": "system", "content": "Otherwise."}, *CHAT]}, "another one in its messages"),
        ({"system": ["In French."], "messages": CHAT}, "'system' must be text"),
        ({"tools": [{"name": "multiply"}], "messages": CHAT}, "'tools' is not trained on, and would be lost"),
        ({"tools": json.dumps([{"name": "multiply"}]), "messages": CHAT}, "'tools' is not trained on"),
        (
            {"chat_template_kwargs": {"custom_instructions": "Be brief."}, "messages": CHAT},
            "'chat_template_kwargs' is not trained on",
        ),
        ({"chat_template_kwargs": {"enable_thinking": False}, "messages": CHAT}, "'chat_template_kwargs' is not trained on"),
        (
            {"instruction": "And 6 x 8?", "input": "", "output": "48", "history": [["6 x 7?", "42"]]},
            "'history' holds the turns before the question",
        ),
    ],
)
def test_what_a_row_has_for_its_prompt_is_never_ignored(tmp_path: Path, row: dict[str, Any], reported: str) -> None:
    with pytest.raises(UserError, match=reported):
        load_rows(tmp_path, [row])


@pytest.mark.parametrize(
    ("row", "reported"),
    [
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, r"messages\[1\]: 'weight' is 0, so this answer is not to be trained on"),
        ({"prompt": "6 x 7?", "completion": [CHAT[1] | {"train": False}]}, r"completion\[0\]: 'train' is False"),
        ({"prompt": "6 x 7?", "completion": "41", "label": False}, "'label' is false: .* an undesired one"),
        ({"prompt": "6 x 7?", "completion": [CHAT[1], *CHAT]}, "'completion' holds 2 answers, of which the last alone"),
    ],
)
def test_answers_that_are_not_to_be_trained_on_or_would_be_left_out_are_errors(
    tmp_path: Path, row: dict[str, Any], reported: str
) -> None:
    with pytest.raises(UserError, match=reported):
        load_rows(tmp_path, [row])


def test_an_answer_that_its_data_weigh_is_trained_on_and_an_earlier_one_without_weight_is_not(tmp_path: Path) -> None:
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[0], CHAT[1] | {"weight": 1}]
    assert len(load_rows(tmp_path, [{"messages": messages}]).train) == 1
    assert len(load_rows(tmp_path, [{"prompt": "6 x 7?", "completion": "42", "label": True}]).train) == 1


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_system_turn_is_none_and_the_recipe_s_is_used(tmp_path: Path, empty: str | None) -> None:
    (example,) = load_rows(
        tmp_path, [{"messages": [{"role": "system", "content": empty}, *CHAT]}], prompt=Prompt(system="Think.")
    ).train
    assert texts(example, "qwen2.5")[0].startswith("<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n6 x 7?")


def test_a_history_that_is_empty_or_a_subject_is_no_fault(tmp_path: Path) -> None:
    rows = [{"instruction": "6 x 7?", "input": "", "output": "42", "history": history} for history in ([], None, "", "Of numbers.")]
    assert len(load_rows(tmp_path, rows).train) == 4


@pytest.mark.parametrize("empty", [None, [], "", "[]", {}])
def test_tools_that_are_none_are_no_fault(tmp_path: Path, empty: object) -> None:
    assert len(load_rows(tmp_path, [{"tools": empty, "system": empty or None, "messages": CHAT}]).train) == 1


def test_a_row_s_system_turn_that_the_template_refuses_is_a_faulty_row(tmp_path: Path) -> None:
    rows = [{"system": "In French.", "messages": CHAT}, {"system": None, "messages": CHAT}]
    with pytest.raises(UserError, match=r"(?s)1 of 2 rows .*rows\.jsonl:1: the chat template refuses a conversation of system"):
        load_rows(tmp_path, rows, "mistral")
    assert load_rows(tmp_path, rows, "mistral", faulty="drop").counts["faulty"] == 1
