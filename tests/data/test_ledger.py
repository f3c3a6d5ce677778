"""The ledger problems, the tokenizer and the shipped model are what data/README.md says."""

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from data.ledger import (
    KEYS,
    Ledger,
    draw_ledger,
    draw_split,
    look_backs,
    rows,
    solve,
    split_of,
    symbols,
    write_chain,
    write_question,
    write_response,
)
from data.tiny_tokenizer import build_tokenizer

DATA = Path(__file__).parents[2] / "data"
SHIPPED_WINDOW = 16
"""No lazy window that data/README.md recommends for the tiny reasoner is longer."""


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train_rows() -> list[dict[str, str]]:
    return read_jsonl(DATA / "ledger/train.jsonl")


@pytest.fixture(scope="module")
def test_rows() -> list[dict[str, str]]:
    return read_jsonl(DATA / "ledger/test.jsonl")


@pytest.fixture(scope="module")
def shipped_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DATA / "tiny-reasoner")


@st.composite
def ledgers(draw: st.DrawFn) -> Ledger:
    entries = draw(st.integers(2, len(KEYS)))
    return draw_ledger(draw(st.randoms(use_true_random=False)), entries, draw(st.integers(1, entries)))


def boxed(text: str) -> str:
    return text.split("\\boxed{")[1].split("}")[0]


def test_shipped_training_answers_are_those_of_a_fresh_solution(train_rows: list[dict[str, str]]) -> None:
    assert len(train_rows) == 4000
    assert all(set(row) == {"question", "combined_text", "domain"} for row in train_rows)
    assert [boxed(row["combined_text"]) for row in train_rows] == [solve(row["question"]) for row in train_rows]


def test_shipped_test_answers_are_those_of_a_fresh_solution(test_rows: list[dict[str, str]]) -> None:
    assert len(test_rows) == 2000
    assert [row["answer"] for row in test_rows] == [solve(row["problem"]) for row in test_rows]


def test_test_ids_are_unique_and_in_order(test_rows: list[dict[str, str]]) -> None:
    assert [row["id"] for row in test_rows] == [f"ledger-{index:05d}" for index in range(2000)]


def test_no_shipped_problem_appears_twice_in_whatever_order(
    train_rows: list[dict[str, str]], test_rows: list[dict[str, str]]
) -> None:
    questions = [row["question"] for row in train_rows] + [row["problem"] for row in test_rows]
    assert len({"\n".join(sorted(question.splitlines())) for question in questions}) == 6000


@given(ledgers(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_split_is_a_property_of_the_problem_not_of_its_listing(ledger: Ledger, rng) -> None:
    listed = list(ledger.entries)
    rng.shuffle(listed)
    assert split_of(Ledger(tuple(listed), ledger.start, ledger.steps)) == split_of(ledger)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_holds_only_its_own_problems(split) -> None:
    drawn = islice(draw_split(split, seed=3, entries=5, steps=4), 200)
    assert {split_of(ledger) for ledger in drawn} == {split}


@pytest.mark.parametrize(("split", "file"), [("train", "train.jsonl"), ("test", "test.jsonl")])
def test_the_generator_writes_the_shipped_bytes(split, file: str) -> None:
    regenerated = [json.dumps(row) for row in rows(split, 50, seed=0, entries=16, steps=10, reach=0)]
    assert (DATA / "ledger" / file).read_bytes().startswith(("\n".join(regenerated) + "\n").encode())


def test_another_seed_draws_other_problems() -> None:
    first, second = (next(draw_split("test", seed, entries=16, steps=10)) for seed in (0, 1))
    assert first != second


@given(ledgers(), st.integers(0, 60))
@settings(deadline=None)
def test_the_answer_of_the_chain_is_that_of_the_question(ledger: Ledger, reach: int) -> None:
    response = write_response(ledger)
    assert boxed(response) == solve(write_question(ledger, reach))
    assert write_chain(ledger).splitlines()[-1].endswith(f"={boxed(response)}")
    assert response.startswith("<|begin_of_thought|>1. ")
    assert response.endswith("<|end_of_solution|>")


@given(ledgers(), st.integers(0, 60))
@settings(deadline=None)
def test_every_key_is_marked_once_in_the_question_and_at_most_once_in_the_chain(ledger: Ledger, reach: int) -> None:
    question, chain = symbols(write_question(ledger, reach)), symbols(write_chain(ledger))
    for entry in ledger.entries:
        assert question.count(f"{entry.source}>") == 1
        assert chain.count(f"{entry.source}>") <= 1
    assert sum(symbol.endswith(">") for symbol in chain) == ledger.steps


@given(ledgers(), st.integers(0, 80))
@settings(deadline=None)
def test_each_step_looks_back_further_than_reach_and_than_the_window(ledger: Ledger, reach: int) -> None:
    assert min(look_backs(ledger, reach)) > max(reach, SHIPPED_WINDOW)


def test_each_step_of_the_shipped_problems_looks_back_further_than_the_window_in_tokens(
    train_rows: list[dict[str, str]], shipped_tokenizer: PreTrainedTokenizerBase
) -> None:
    for row in train_rows[:50]:
        prompt = shipped_tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], add_generation_prompt=True, tokenize=False
        )
        tokens = shipped_tokenizer.tokenize(prompt + row["combined_text"])
        marked = {token: [at for at, other in enumerate(tokens) if other == token] for token in tokens if token.endswith(">")}
        distances = [places[1] - places[0] for token, places in marked.items() if len(token) == 2 and len(places) == 2]
        assert len(distances) == 10
        assert min(distances) > SHIPPED_WINDOW


@pytest.mark.parametrize(("entries", "steps"), [(4, 5), (27, 10), (4, 0)])
def test_impossible_ledgers_are_refused_with_the_reason(entries: int, steps: int) -> None:
    with pytest.raises(ValueError, match="need 1 <= steps <= entries <= 26"):
        next(draw_split("train", 0, entries, steps))


def test_text_that_is_no_ledger_is_refused() -> None:
    with pytest.raises(ValueError, match="not a ledger problem"):
        solve("What is 1 + 1?")


def test_shipped_rows_survive_the_tokenizer(
    train_rows: list[dict[str, str]], test_rows: list[dict[str, str]], shipped_tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = (
        [row["question"] for row in train_rows]
        + [row["combined_text"] for row in train_rows]
        + [row["problem"] for row in test_rows]
    )
    encoded = shipped_tokenizer(texts)["input_ids"]
    assert shipped_tokenizer.batch_decode(encoded) == texts
    assert shipped_tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts
    assert not any(shipped_tokenizer.unk_token_id in ids for ids in encoded)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.just("\n"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_ascii_text_survives_the_tokenizer(shipped_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert shipped_tokenizer.decode(shipped_tokenizer(text)["input_ids"]) == text


def test_a_symbol_is_a_token(train_rows: list[dict[str, str]], shipped_tokenizer: PreTrainedTokenizerBase) -> None:
    for row in train_rows[:200]:
        assert shipped_tokenizer.tokenize(row["question"]) == symbols(row["question"])


def test_the_shipped_tokenizer_is_the_one_the_script_builds(shipped_tokenizer: PreTrainedTokenizerBase) -> None:
    built = build_tokenizer()
    assert shipped_tokenizer.get_vocab() == built.get_vocab()
    assert shipped_tokenizer.chat_template == built.chat_template


def test_the_chat_template_has_system_user_and_assistant_turns_and_no_default_system_turn(
    shipped_tokenizer: PreTrainedTokenizerBase,
) -> None:
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert shipped_tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert shipped_tokenizer.apply_chat_template(turns[1:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


def test_padding_is_not_the_end_of_a_turn(shipped_tokenizer: PreTrainedTokenizerBase) -> None:
    assert shipped_tokenizer.eos_token == "<|im_end|>"
    assert shipped_tokenizer.pad_token_id != shipped_tokenizer.eos_token_id


def test_the_shipped_model_is_small_and_loads_with_its_stop_token() -> None:
    weights = DATA / "tiny-reasoner/model.safetensors"
    assert weights.stat().st_size < 8_000_000
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny-reasoner")
    tokenizer = build_tokenizer()
    assert model.config.layer_types == ["full_attention"] * 8
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_recorded_accuracy_is_that_of_two_thousand_unseen_problems() -> None:
    accuracy = json.loads((DATA / "tiny-reasoner/training.json").read_text())["accuracy"]
    assert accuracy["n"] == 2000
    assert accuracy["value"] - 3 * accuracy["standard_error"] > 0.97


def test_the_shipped_model_solves_unseen_problems_and_stops(
    test_rows: list[dict[str, str]], shipped_tokenizer: PreTrainedTokenizerBase
) -> None:
    from data.train_tiny_reasoner import solve_all

    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny-reasoner")
    assert sum(solve_all(model, shipped_tokenizer, test_rows[:24])) >= 23
