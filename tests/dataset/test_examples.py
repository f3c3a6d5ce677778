import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lt_train.dataset.examples import IGNORED, Example, ExampleSet, calibration_examples
from lt_train.dataset.loading import load_examples
from lt_train.recipe.schema import Calibration, Data, Prompt
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import FAMILIES, byte_tokenizer, family_tokenizer

TRACE = "<|begin_of_thought|>\n\nHm. 2 + 2 = 4.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\\boxed{4}<|end_of_solution|>"
STILL = {"question": "2 + 2?", "combined_text": TRACE, "domain": "math"}

Load = Callable[..., ExampleSet]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_rows_as_examples(
        rows: list[Any],
        family: str = "qwen2.5",
        *,
        prompt: Prompt | None = None,
        model_max_length: int = 4096,
        seed: int = 0,
        **data: Any,
    ) -> ExampleSet:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        part = Data(**{"source": str(path), "format": "still", "max_length": 4096, **data})
        return load_examples(part, prompt or Prompt(), family_tokenizer(family), model_max_length=model_max_length, seed=seed)

    return load_rows_as_examples


def numbered(count: int, length: int = 20) -> list[dict[str, str]]:
    return [{"question": f"question {number}", "combined_text": f"{number} " + "x" * length} for number in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_trace_and_the_final_eos_are_trained_on_and_nothing_else(load: Load, family: str) -> None:
    """Reasoning in tags that are not all of these bases' own, so it is kept as it is. Mistral's template writes a space first."""
    tokenizer, before = family_tokenizer(family), " " if family == "mistral" else ""
    example = load([STILL], family, reasoning_tags="keep").train[0]
    trained = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    assert trained == [label for label in example.labels if label != IGNORED] == list(example.answer_ids)
    assert tokenizer.decode(trained) == before + TRACE + tokenizer.eos_token
    assert trained[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.prompt_ids).endswith(("assistant\n", "[/INST]", "<think>\n", "<|end_header_id|>\n\n"))
    assert len(example) == len(example.input_ids) == len(example.labels)


def test_reasoning_that_the_template_would_drop_is_trained_on_all_the_same(load: Load) -> None:
    answer = "<think>\nHm. 2 + 2 = 4.\n</think>\n\n4"
    for family in ("qwen3", "r1"):
        example = load([{"prompt": "2 + 2?", "response": answer}], family, format="prompt_response").train[0]
        text = family_tokenizer(family).decode(example.input_ids)
        assert text.count("<think>") == 1 and answer in text


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        ("<think>\nHm.\n</think>4", "Hm.\n</think>4"),
        ("<think>Hm.</think>4", "Hm.</think>4"),
        ("\n<think>\n\nHm.", "\nHm."),
        ("Hm.", "Hm."),
    ],
)
def test_a_thought_that_the_prompt_has_opened_is_not_opened_twice(load: Load, answer: str, trained: str) -> None:
    example = load([{"prompt": "2 + 2?", "response": answer}], "r1", format="prompt_response", reasoning_tags="keep").train[0]
    tokenizer = family_tokenizer("r1")
    assert tokenizer.decode(example.prompt_ids).endswith("<think>\n")
    assert tokenizer.decode(example.answer_ids) == trained + tokenizer.eos_token


def test_all_three_formats_give_the_same_example(load: Load) -> None:
    still = load([STILL]).train[0]
    response = load([{"prompt": "2 + 2?", "response": TRACE}], format="prompt_response").train[0]
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": TRACE}]
    messages = load([{"messages": chat}], format="messages").train[0]
    assert still == response == messages


def test_of_a_conversation_only_the_last_answer_is_trained_on(load: Load) -> None:
    turns = ["system", "user", "assistant", "user", "assistant"]
    chat = [{"role": role, "content": f"{role} says {at}"} for at, role in enumerate(turns)]
    example = load([{"messages": chat}], format="messages", prompt=Prompt(system="not this one")).train[0]
    tokenizer = family_tokenizer("qwen2.5")
    assert tokenizer.decode(example.answer_ids) == "assistant says 4<|im_end|>"
    requested = tokenizer.decode(example.prompt_ids)
    assert all(f"{role} says {at}" in requested for at, role in enumerate(turns[:-1])) and "not this one" not in requested


def test_no_space_is_put_before_an_answer_by_a_tokenizer_that_begins_every_text_with_one(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("mistral")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    template = tokenizer.chat_template.replace("' ' + m.content", "m.content")
    assert tokenizer.decode(tokenizer("Hm.")["input_ids"]) == " Hm."
    example = examples_of(tmp_path, {"question": "x", "combined_text": "Hm."}, tokenizer, template)
    assert tokenizer.decode(example.prompt_ids).endswith("[/INST]")
    assert tokenizer.decode(example.answer_ids) == "Hm.</s>"


def test_tokens_that_would_merge_across_the_seam_stay_apart_as_in_generation(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(*FAMILIES["qwen2.5"], merges=[("Ċ", "Ċ")])
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    example = examples_of(tmp_path, {"question": "x", "combined_text": "\nHm."}, tokenizer, tokenizer.chat_template)
    assert tokenizer.decode(example.prompt_ids).endswith("assistant\n")
    assert tokenizer.decode(example.answer_ids) == "\nHm.<|im_end|>"


def examples_of(tmp_path: Path, row: dict[str, str], tokenizer: PreTrainedTokenizerFast, template: str) -> Example:
    tokenizer.chat_template = template
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    data = Data(source=str(path), format="still", max_length=64)
    return load_examples(data, Prompt(), tokenizer, model_max_length=64, seed=0).train[0]


@settings(max_examples=40, deadline=None)
@given(answer=st.text(min_size=1, max_size=40).filter(str.strip))
def test_any_text_is_held_whole_by_the_answer_s_ids(answer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    path.write_text(json.dumps({"question": "x", "combined_text": answer}) + "\n")
    data = Data(source=str(path), format="still", max_length=4096, reasoning_tags="keep")  # hypothesis knows the tags from the code
    example = load_examples(data, Prompt(), family_tokenizer("qwen3"), model_max_length=4096, seed=0).train[0]
    assert family_tokenizer("qwen3").decode(example.answer_ids) == unicodedata.normalize("NFC", answer) + "<|im_end|>"


def test_an_answer_that_the_tokenizer_cannot_write_stops_with_counts(tmp_path: Path) -> None:
    letters = {character: at for at, character in enumerate("abc </s>?")} | {"<unk>": 90, "</s>": 91}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "combined_text": "abc"}\n{"question": "b", "combined_text": "abÄ"}\n')
    data = Data(source=str(path), format="still", max_length=64)
    with pytest.raises(UserError, match=r"(?s)1 of 2 rows .*rows\.jsonl:2: the answer cannot be written"):
        load_examples(data, Prompt(), tokenizer, model_max_length=64, seed=0)


@pytest.mark.parametrize(
    ("data_format", "row", "reported"),
    [
        ("still", {"question": "x"}, "no field 'combined_text', which data.format still needs; the row has question"),
        (
            "still",
            {"prompt": "x", "response": "y"},
            "no field 'question'.*the row has prompt, response; data.format: prompt_response would",
        ),
        ("prompt_response", STILL, "no field 'prompt'.*data.format: still would fit"),
        ("messages", {}, "no field 'messages'.*the row has no fields"),
        ("still", {"question": 5, "combined_text": "y"}, "'question' must be text, this is a number"),
        ("still", {"question": "x", "combined_text": None}, "'combined_text' must be text, this is empty"),
        ("still", {"question": "x", "combined_text": " \n"}, "the answer is empty"),
        ("still", {"question": " ", "combined_text": "y"}, "the question is empty"),
        ("still", {"question": "x", "combined_text": "a \ud800"}, "there is half a character"),
        ("messages", {"messages": []}, "'messages' must be a list of {role, content}, this is empty"),
        ("messages", {"messages": "x"}, "'messages' must be a list of {role, content}, this is text"),
        ("messages", {"messages": [{"role": "user"}]}, r"messages\[0\] must have a role and a content"),
        ("messages", {"messages": [{"role": "user", "content": ["x"]}]}, r"messages\[0\] must have a role and a content"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\] has the role 'tool'"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "the last two messages must be of user and assistant"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]},
            r"messages\[1\] has the role 'system'; .*system only at the start",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
            "the answer is empty",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]},
            "the question is empty",
        ),
    ],
)
def test_a_faulty_row_is_reported_with_its_file_and_line(load: Load, data_format: str, row: dict, reported: str) -> None:
    good = {**STILL, "prompt": "x", "response": "y", "messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{reported}"):
        load([good, row], format=data_format)


def test_no_rows_at_all_is_reported(load: Load) -> None:
    with pytest.raises(UserError, match="there are no rows in it"):
        load([])


def test_too_long_samples_are_dropped_cut_or_refused_and_counted(load: Load) -> None:
    rows = [*numbered(3), *numbered(2, length=500), {"question": "q" * 500, "combined_text": "short"}]
    dropped = load(rows, max_length=200)
    assert [len(example) <= 200 for example in dropped.train] == [True] * 3
    assert dropped.counts == {"rows": 6, "too_long": 3, "dropped": 3, "truncated": 0, "train": 3, "heldout": 0}

    cut = load(rows, max_length=200, overlong="truncate")
    assert cut.counts == {"rows": 6, "too_long": 3, "dropped": 1, "truncated": 2, "train": 5, "heldout": 0}
    assert [len(example) for example in cut.train if example.truncated] == [200, 200]

    with pytest.raises(
        UserError, match=r"3 of 6 samples are longer than data\.max_length 200 \(longest: \d+ tokens, .*rows\.jsonl:[456]\)"
    ):
        load(rows, max_length=200, overlong="error")
    assert len(load(rows[:3], max_length=200, overlong="error").train) == 3


def test_a_cut_trace_does_not_teach_to_stop(load: Load) -> None:
    tokenizer = family_tokenizer("qwen2.5")
    whole, cut = load([*numbered(1), *numbered(1, length=500)], max_length=200, overlong="truncate").train
    assert whole.answer_ids[-1] == tokenizer.eos_token_id and not whole.truncated
    assert tokenizer.eos_token_id not in cut.answer_ids and cut.truncated


def test_a_sample_of_exactly_the_longest_length_is_kept_whole(load: Load) -> None:
    length = len(load(numbered(1)).train[0])
    assert load(numbered(1), max_length=length).counts["too_long"] == 0
    assert not load(numbered(1), max_length=length, overlong="truncate").train[0].truncated
    assert load(numbered(1), max_length=length - 1, overlong="truncate").train[0].truncated


def test_nothing_left_is_an_error_with_the_counts(load: Load) -> None:
    with pytest.raises(UserError, match=r"no sample is left .*rows 3, too_long 3, dropped 3.*raise data\.max_length, now 20"):
        load(numbered(3), max_length=20)


def test_a_longer_max_length_than_the_models_context_is_an_error(load: Load) -> None:
    with pytest.raises(UserError, match=r"data\.max_length: 4096 tokens are more than the model's context of 1024"):
        load(numbered(1), model_max_length=1024)


def test_held_out_questions_are_never_trained_on(load: Load) -> None:
    rows = [{"question": f" question {n % 7}" + " " * (n % 2), "combined_text": f"answer {n}"} for n in range(20)]
    for seed in range(5):
        examples = load(rows, heldout=5, seed=seed)
        assert len(examples.heldout) == 5 and len(examples.train) == 15
        assert not {e.question_id for e in examples.train} & {e.question_id for e in examples.heldout}
        assert {e.where for e in examples.train} | {e.where for e in examples.heldout} == {e.where for e in load(rows).train}


def test_the_held_out_part_depends_on_the_seed_alone(load: Load) -> None:
    first, again, other = (list(load(numbered(40), heldout=10, seed=seed).heldout) for seed in (1, 1, 2))
    assert first == again != other


def test_more_held_out_samples_than_there_are_is_an_error(load: Load) -> None:
    for heldout in (4, 5):
        with pytest.raises(UserError, match=rf"data\.heldout: {heldout} samples cannot be set aside from 4"):
            load(numbered(4), heldout=heldout)
    with pytest.raises(UserError, match="from 3 with 1 different questions"):
        load([{"question": "x", "combined_text": str(n)} for n in range(3)], heldout=1)


def test_ids_follow_from_the_content_and_differ_even_for_equal_rows(load: Load) -> None:
    rows = numbered(3)
    forward, backward = load(rows).train, load(rows[::-1]).train
    assert {e.id for e in forward} == {e.id for e in backward} and len({e.id for e in forward}) == 3
    assert len({e.id for e in load([rows[0]] * 3).train}) == 3


def example(number: int, prompt: int, answer: int) -> Example:
    return Example(str(number), f"rows:{number}", tuple(range(prompt)), tuple(range(answer)))


def test_calibration_takes_the_first_of_a_seeded_shuffle_of_the_training_part() -> None:
    examples = ExampleSet([example(n, 4, 10) for n in range(30)], [example(n, 4, 10) for n in range(30, 40)], {})
    few, more = (calibration_examples(examples, Calibration(samples=samples), seed=3) for samples in (4, 12))
    assert len(few) == 4 and more[:4] == few
    assert few != calibration_examples(examples, Calibration(samples=4), seed=4)
    assert {e.id for e in calibration_examples(examples, Calibration(samples=99), seed=3)} == {e.id for e in examples.train}


def test_calibration_cuts_samples_and_passes_over_prompts_that_leave_no_answer() -> None:
    examples = ExampleSet([example(0, 20, 10), example(1, 4, 30), example(2, 4, 3)], [], {})
    chosen = {e.id: e for e in calibration_examples(examples, Calibration(max_length=10), seed=0)}
    assert {name: (len(e), e.truncated) for name, e in chosen.items()} == {"1": (10, True), "2": (7, False)}
    with pytest.raises(UserError, match=r"hybrid\.calibration\.max_length: every prompt has 3 tokens or more"):
        calibration_examples(examples, Calibration(max_length=3), seed=0)


def test_real_traces_become_examples(shared_data: Path) -> None:
    data = Data(source=str(shared_data / "reasoning_traces_still.jsonl"), format="still", max_length=20000, limit=20)
    tokenizer = byte_tokenizer(*FAMILIES["smollm2"])
    examples = load_examples(data, Prompt(), tokenizer, model_max_length=20000, seed=0)
    rows = [json.loads(line) for line in (shared_data / "reasoning_traces_still.jsonl").read_text().splitlines()[:20]]
    assert [tokenizer.decode(e.answer_ids) for e in examples.train] == [row["combined_text"] + "<|im_end|>" for row in rows]
