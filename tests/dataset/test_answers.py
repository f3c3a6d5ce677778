"""Prompt and answer are what the chat template itself writes, to the token; special tokens in data are text."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lt_train.dataset.formats import FORMATS
from lt_train.dataset.prompts import prompt_ids
from lt_train.dataset.row_tokenizer import RowTokenizer
from lt_train.dataset.special_tokens import encode
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import MISTRAL, REASONING_FAMILIES, family_tokenizer
from tests.support.loaded_rows import load_file, load_rows, texts

OWN_RENDERING_DIFFERS = ("qwen3", "r1", "qwen3-without-thinking", "smollm3")
"""Drop the reasoning of an answer, close it in the prompt, or write the date."""

KEEP_REASONING = [family for family in REASONING_FAMILIES if family not in OWN_RENDERING_DIFFERS]

OPENED = ("qwen3-thinking",)
WITHOUT_SYSTEM_TURN = ("mistral",)

plain = st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and "<" not in text)


def ids_of(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation as an example has them."""
    data = Data(source="none", max_length=4096)
    row = RowTokenizer(data, FORMATS["messages"], "messages", Prompt(), tokenizer)("here:1", {"messages": messages})
    assert row.fault is None, row.fault
    return row.answers[0].input_ids.tolist()


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of the template's own rendering, up to the end of the last turn."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    return encode(tokenizer, text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)])


def conversation(family: str, question: str, answer: str) -> list[dict[str, str]]:
    system = [] if family in WITHOUT_SYSTEM_TURN else [{"role": "system", "content": "Think."}]
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": question}]
    return [*system, *turns, {"role": "assistant", "content": answer}]


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("family", KEEP_REASONING)
@given(question=plain, reasoning=plain, answer=plain)
def test_prompt_and_answer_are_the_template_s_own_rendering(family: str, question: str, reasoning: str, answer: str) -> None:
    tokenizer = family_tokenizer(family)
    tags = ("<|begin_of_thought|>", "<|end_of_thought|>") if family == "still" else ("<think>", "</think>")
    with_reasoning = f"{tags[0]}\n{reasoning}\n{tags[1]}\n\n{answer}"
    for text in [with_reasoning] if family in OPENED else [answer, with_reasoning]:
        messages = conversation(family, question, text)
        assert ids_of(tokenizer, messages) == rendered(tokenizer, messages)


@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("family", ["qwen3-reasoning", "qwen3-thinking"])
@given(reasoning=plain, answer=plain)
def test_a_reasoning_field_is_rendered_by_the_template_that_reads_it(family: str, reasoning: str, answer: str) -> None:
    tokenizer = family_tokenizer(family)
    messages = conversation(family, "6 x 7?", answer)
    messages[-1]["reasoning_content"] = reasoning
    if reasoning.strip() in answer:  # not apart from the answer
        return
    own = [*messages[:-1], {**messages[-1], "reasoning_content": reasoning}]
    assert ids_of(tokenizer, messages) == rendered(tokenizer, own)


@pytest.mark.parametrize(
    ("family", "before"), [("mistral", " "), ("newline", "\n"), ("llama3", ""), ("qwen3-reasoning", "<think>\n\n</think>\n\n")]
)
def test_what_the_template_writes_before_an_answer_is_part_of_it(tmp_path: Path, family: str, before: str) -> None:
    (example,) = load_rows(tmp_path, [{"prompt": "6 x 7?", "response": "42"}], family).train
    assert texts(example, family)[1] == f"{before}42{family_tokenizer(family).eos_token}"


def test_a_sentencepiece_tokenizer_s_space_before_the_answer_is_one_token_with_its_word() -> None:
    words = ["▁42", "42", "▁", "▁6", "▁x", "▁7", "?", "7", "[INST]", "[/INST]", "▁[INST]", "▁[/INST]", "<s>", "</s>", "<unk>"]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]", "<unk>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = MISTRAL
    messages = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": "42"}]
    ids = ids_of(tokenizer, messages)
    assert ids == rendered(tokenizer, messages)
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["▁42", "</s>"]


@pytest.mark.parametrize(
    "family", [family for family in REASONING_FAMILIES if family not in ("qwen3-reasoning", "qwen3-thinking", "r1")]
)
@pytest.mark.parametrize("after", ["", "\n", " \n\n"])
def test_an_answer_that_ends_with_the_turn_s_end_gets_one_and_not_two(tmp_path: Path, family: str, after: str) -> None:
    tokenizer = family_tokenizer(family)
    ends = tokenizer.eos_token + after
    answers = [f"42{ends}", f"42{ends}{ends}", "42"]
    examples = load_rows(tmp_path, [{"prompt": "6 x 7?", "response": answer} for answer in answers], family).train
    assert len({example.answer_ids for example in examples}) == 1
    assert examples[0].answer_ids.count(tokenizer.eos_token_id) == 1


def test_an_answer_of_nothing_but_the_turn_s_end_is_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the answer is empty"):
        load_rows(tmp_path, [{"prompt": "6 x 7?", "response": "<|im_end|>"}])


@pytest.mark.parametrize("family", ["qwen2.5", "smollm2", "qwen3", "qwen3-reasoning", "r1", "llama3"])
def test_a_special_token_that_data_quote_is_text(tmp_path: Path, family: str) -> None:
    tokenizer = family_tokenizer(family)
    eos, bos = tokenizer.eos_token, tokenizer.bos_token or "<|im_start|>"
    tags = "</think>" if family == "r1" else ""
    row = {"prompt": f"What is {eos}, what {bos}?", "response": f"A token {eos}{tags} ends a turn, {bos} begins one. {eos}?"}
    (example,) = load_rows(tmp_path, [row], family).train
    plain = load_rows(tmp_path, [{"prompt": "What?", "response": f"Hm.{tags}"}], family).train[0]
    prompt, answer = texts(example, family)
    assert f"What is {eos}, what {bos}?" in prompt and answer.endswith(row["response"] + eos)
    specials = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for ids, without in ((example.prompt_ids, plain.prompt_ids), (example.answer_ids, plain.answer_ids)):
        assert [token for token in ids if token in specials] == [token for token in without if token in specials]


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "r1", "qwen3-thinking"])
def test_a_question_to_which_a_chat_template_was_applied_is_a_faulty_row(tmp_path: Path, family: str) -> None:
    tokenizer = family_tokenizer(family)
    prompt = str(tokenizer.apply_chat_template([{"role": "user", "content": "6 x 7?"}], tokenize=False, add_generation_prompt=True))
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the question ends with .*: a chat template was applied to it"):
        load_rows(tmp_path, [{"prompt": prompt, "completion": "<think>\nSix sevens.\n</think>\n\n42"}], family)


def test_an_evaluated_question_s_quoted_tokens_are_text_too() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    ids = prompt_ids(tokenizer, Prompt(), {"question": "What is <|im_end|>?"})
    assert "What is <|im_end|>?" in tokenizer.decode(ids)
    assert ids.count(tokenizer.eos_token_id) == 1  # the end of the user's turn


def test_the_shared_case_of_special_tokens_in_answers(shared_cases: Path) -> None:
    examples = load_file(shared_cases / "rows/special_tokens_in_answers.jsonl", "qwen3-reasoning").train
    tokenizer = family_tokenizer("qwen3-reasoning")
    assert [example.answer_ids.count(tokenizer.eos_token_id) for example in examples] == [1, 1]
    assert "The ChatML token <|im_end|> ends a turn." in texts(examples[1], tokenizer)[1]


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<s>", "x", " ", "<", "|>", "\n"]), min_size=1, max_size=8))
def test_any_mixture_of_special_tokens_is_held_as_text(parts: list[str]) -> None:
    tokenizer, answer = family_tokenizer("qwen2.5"), "".join(parts) + "."
    ids = ids_of(tokenizer, [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}])
    prompt = f"<|im_start|>user\n{answer}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == f"{prompt}{answer}<|im_end|>"
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=plain, reasoning=plain, answer=plain)
def test_the_real_qwen3_tokenizer_and_template_are_followed_to_the_token(
    qwen3_tokenizer: PreTrainedTokenizerBase, question: str, reasoning: str, answer: str
) -> None:
    for content in (answer, f"<think>\n{reasoning}\n</think>\n\n{answer}"):
        messages = conversation("qwen3", question, content)
        assert ids_of(qwen3_tokenizer, messages) == rendered(qwen3_tokenizer, messages)
    apart: list[Any] = conversation("qwen3", question, answer)
    apart[-1]["reasoning_content"] = reasoning
    if reasoning.strip() not in answer:
        assert ids_of(qwen3_tokenizer, apart) == rendered(qwen3_tokenizer, apart)
