from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_train.dataset.chat_template import ChatTemplate
from lt_train.dataset.prompts import prompt_ids, render_messages, render_prompt, turn_end
from lt_train.dataset.special_tokens import encode
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import CHATML_TURNS, FAMILIES, GLM, LLAMA2_DEFAULT, byte_tokenizer, family_tokenizer

QUESTION = {"question": "What is 2 + 2?"}

WITHOUT_SYSTEM_TURN = {
    "qwen2.5": "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "smollm2": "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.1": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] What is 2 + 2? [/INST]",
    "qwen3": "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "r1": "<｜begin▁of▁sentence｜><｜User｜>What is 2 + 2?<｜Assistant｜><think>\n",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_system_turn_means_none_even_where_the_template_puts_one_in(family: str) -> None:
    assert render_prompt(family_tokenizer(family), Prompt(), QUESTION) == WITHOUT_SYSTEM_TURN[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_system_turn_is_what_such_a_prompt_lacks(family: str) -> None:
    tokenizer = family_tokenizer(family)
    turns = [{"role": "user", "content": QUESTION["question"]}]
    by_template = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    left_out = ChatTemplate(tokenizer, Prompt()).default_system_turn
    assert bool(left_out) == (family in ("qwen2.5", "smollm2", "llama3.1"))
    assert by_template.replace(left_out, "", 1) == WITHOUT_SYSTEM_TURN[family]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mistral"])
def test_the_recipes_system_turn_stands_in_the_prompt_and_the_templates_does_not(family: str) -> None:
    rendered = render_prompt(family_tokenizer(family), Prompt(system="Think long."), QUESTION)
    assert rendered.count("Think long.") == 1
    assert "helpful assistant" not in rendered


def test_a_template_that_refuses_a_system_turn_is_reported() -> None:
    with pytest.raises(UserError, match=r"refuses a conversation of system, user: only user and assistant.*prompt\.chat_template"):
        render_prompt(family_tokenizer("mistral"), Prompt(system="Think long."), QUESTION)


def test_a_template_that_drops_the_system_turn_in_silence_is_reported() -> None:
    template = CHATML_TURNS.replace("in messages", "in messages if m.role != 'system'")
    with pytest.raises(UserError, match=r"drops or changes the system turn 'Think long\.'"):
        render_prompt(byte_tokenizer(template, None, "<|im_end|>"), Prompt(system="Think long."), QUESTION)


def test_special_tokens_that_open_every_conversation_are_no_system_turn() -> None:
    tokenizer = byte_tokenizer(GLM, None, "<|endoftext|>")
    assert render_prompt(tokenizer, Prompt(), QUESTION).startswith("[gMASK]<sop><|user|>\nWhat")


def test_a_default_system_text_inside_the_first_user_turn_is_an_error() -> None:
    tokenizer = byte_tokenizer(LLAMA2_DEFAULT, "<s>", "</s>")
    with pytest.raises(UserError, match=r"prompt\.system is null.*first user turn begins otherwise.*prompt\.chat_template"):
        render_prompt(tokenizer, Prompt(), QUESTION)


def test_a_tokenizer_without_chat_template_is_an_error() -> None:
    with pytest.raises(UserError, match=r"has no chat template.*prompt\.chat_template"):
        render_prompt(byte_tokenizer(None, None, "</s>"), Prompt(), QUESTION)


def test_a_template_of_the_recipes_own_is_used_instead(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("Q: {{ messages[0].content }}\nA:")
    prompt = Prompt(chat_template=str(path))
    assert render_prompt(family_tokenizer("qwen2.5"), prompt, QUESTION) == "Q: What is 2 + 2?\nA:"
    assert render_prompt(byte_tokenizer(None, None, "</s>"), prompt, QUESTION) == "Q: What is 2 + 2?\nA:"
    path.unlink()
    with pytest.raises(UserError, match=r"prompt\.chat_template: .*own\.jinja cannot be read"):
        render_prompt(family_tokenizer("qwen2.5"), prompt, QUESTION)


def test_a_template_that_writes_the_date_makes_one_prompt_every_day() -> None:
    tokenizer = family_tokenizer("smollm3")
    assert "Today Date: 26 July 2024\n\nBe brief." in render_prompt(tokenizer, Prompt(system="Be brief."), QUESTION)
    assert "Date" not in render_prompt(tokenizer, Prompt(), QUESTION)


def test_a_template_with_a_mistake_is_reported(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="refuses a conversation of user"):
        render_prompt(family_tokenizer("qwen2.5"), Prompt(chat_template=str(tmp_path / "own.jinja")), QUESTION)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="{}question \\boxed%$0<>|\n'\"", min_size=1, max_size=30).filter(str.strip))
def test_braces_in_questions_and_in_the_user_template_are_left_alone(question: str) -> None:
    prompt = Prompt(user="{{x}} {question} in \\boxed{} {0} {answer}")
    rendered = render_prompt(family_tokenizer("qwen3"), prompt, {"question": question})
    assert rendered == f"<|im_start|>user\n{{{{x}}}} {question} in \\boxed{{}} {{0}} {{answer}}<|im_end|>\n<|im_start|>assistant\n"


def test_the_data_s_own_system_turn_goes_before_the_recipe_s() -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    rendered = render_messages(family_tokenizer("qwen2.5"), Prompt(system="Think long."), messages)
    assert rendered == "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_user_template_wraps_every_user_turn_of_a_conversation() -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    rendered = render_messages(family_tokenizer("qwen2.5"), Prompt(user="Q: {question}"), messages)
    assert "user\nQ: 1<" in rendered and "user\nQ: 3<" in rendered and "assistant\n2<" in rendered


def test_the_prompt_s_ids_hold_the_bos_of_the_template_and_no_second_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = family_tokenizer("llama3")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    assert tokenizer("x")["input_ids"][0] == bos, "this tokenizer adds a bos by itself, as Llama's do"
    ids = prompt_ids(tokenizer, Prompt(), QUESTION)
    assert ids[0] == bos and ids.count(bos) == 1
    assert tokenizer.decode(ids) == WITHOUT_SYSTEM_TURN["llama3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_with_the_eos_that_the_template_writes(family: str) -> None:
    tokenizer = family_tokenizer(family)
    end = turn_end(tokenizer, Prompt())
    assert end.text == tokenizer.eos_token
    assert encode(tokenizer, end.text) == [end.eos_id] == [tokenizer.eos_token_id]


def test_what_stands_between_an_answer_and_its_eos_is_part_of_the_answer() -> None:
    assert turn_end(byte_tokenizer(LLAMA2_DEFAULT, "<s>", "</s>"), Prompt()).text == " </s>"


def test_a_turn_that_ends_without_eos_is_an_error_unless_generation_stops_there_too() -> None:
    tokenizer = byte_tokenizer(CHATML_TURNS, None, "<|endoftext|>")
    with pytest.raises(UserError, match=r"the final eos would get no label.*<.im_end.>.*<.endoftext.>"):
        turn_end(tokenizer, Prompt())
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end(tokenizer, Prompt(), eos_ids=[im_end]).eos_id == im_end
    with pytest.raises(UserError, match="no eos token"):
        turn_end(byte_tokenizer(CHATML_TURNS, None, None), Prompt())
    with pytest.raises(UserError, match=r"ends an assistant turn with ' \(end\)<.im_end.>"):
        turn_end(byte_tokenizer(CHATML_TURNS.replace("'<|im_end|>", "' (end)<|im_end|>"), None, "<|im_end|>"), Prompt())
