"""Needles, passkeys and passages to copy: their length and place, the same for the same seed; and their scores."""

import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lt_train.benchmarks import BENCHMARKS, Problem, RecallSettings, answer_tokens, load_problems
from lt_train.benchmarks.haystack import NOISE, endless, essay_sentences
from lt_train.evaluation.grading.scoring import score_answer
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import family_tokenizer

NEEDLE, PASSKEY, COPYING = (BENCHMARKS[name] for name in ("needle", "passkey", "copying"))
SMALL = RecallSettings(lengths=(300, 700), depths=(0.0, 0.5, 1.0), repeats=2, span=40)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the generated text: tokens of several letters that join what stands beside them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(islice(endless(None, Random(1)), 500), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("benchmark", [NEEDLE, PASSKEY, COPYING], ids=lambda benchmark: benchmark.name)
def test_problems_have_the_lengths_requested(benchmark, tokenizer: PreTrainedTokenizerFast) -> None:
    problems = load_problems(benchmark, None, None, recall=SMALL, tokenizer=tokenizer, seed=3).problems
    assert [problem.id for problem in problems][:5] == ["300/0.0/0", "300/0.0/1", "300/0.5/0", "300/0.5/1", "300/1.0/0"]
    assert len(problems) == 12
    for problem in problems:
        length = int(problem.id.split("/")[0])
        assert length - 30 < tokens(tokenizer, problem.text) <= length


@pytest.mark.parametrize("benchmark", [NEEDLE, PASSKEY, COPYING], ids=lambda benchmark: benchmark.name)
def test_the_same_seed_gives_the_same_problems_and_another_seed_others(benchmark, tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (
        load_problems(benchmark, None, None, recall=SMALL, tokenizer=tokenizer, seed=seed).problems for seed in (3, 3, 4)
    )
    assert first == again
    assert not {problem.answer for problem in first} & {problem.answer for problem in other}
    assert len({problem.answer for problem in first}) == len(first)


def test_a_problem_does_not_depend_on_which_others_are_made(tokenizer: PreTrainedTokenizerFast) -> None:
    alone = RecallSettings(lengths=(700,), depths=(0.5,), repeats=1)
    made = load_problems(NEEDLE, None, None, recall=alone, tokenizer=tokenizer, seed=3).problems[0]
    assert made in load_problems(NEEDLE, None, None, recall=SMALL, tokenizer=tokenizer, seed=3).problems


@pytest.mark.parametrize("benchmark", [NEEDLE, PASSKEY, COPYING], ids=lambda benchmark: benchmark.name)
def test_what_must_be_found_stands_once_at_its_depth(benchmark, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = RecallSettings(lengths=(1500,), depths=(0.0, 0.3, 1.0), repeats=2, span=40)
    for problem in load_problems(benchmark, None, None, recall=settings, tokenizer=tokenizer).problems:
        assert problem.text.count(problem.answer) == (2 if benchmark is PASSKEY else 1)
        body = problem.text.split("\n")[1]
        around = [sentence for sentence in re.split(r"(?<=\.) ", body) if sentence]
        place = next(number for number, sentence in enumerate(around) if problem.answer in sentence)
        assert place / len(around) == pytest.approx(float(problem.id.split("/")[1]), abs=0.05)


def test_of_many_needles_one_is_requested(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = RecallSettings(lengths=(2000,), depths=(0.5,), repeats=3, keys=8)
    for problem in load_problems(NEEDLE, None, None, recall=settings, tokenizer=tokenizer).problems:
        needles = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", problem.text))
        assert len(needles) == len(set(needles.values())) == 8
        requested = re.search(r"What is the special magic number for (\S+) mentioned", problem.text)[1]
        assert needles[requested] == problem.answer


def test_needles_are_hidden_in_real_essays(shared_data: Path) -> None:
    settings = RecallSettings(lengths=(6000,), depths=(0.5,), repeats=2)
    byte = family_tokenizer("qwen2.5")
    problems = load_problems(NEEDLE, str(shared_data / "essays"), None, recall=settings, tokenizer=byte).problems
    essays = " ".join(essay_sentences(str(shared_data / "essays")))
    for problem in problems:
        assert len(problem.text.encode()) <= 6000
        before, after = re.split(r"One of the special magic numbers for \S+ is: \d{7}\. ", problem.text.split("\n")[1])
        assert before.strip() in essays and after in essays
        assert len(before) == pytest.approx(len(after), abs=1200)
    firsts = [problem.text.split("\n")[1][:40] for problem in problems]
    assert firsts[0] != firsts[1]  # each begins somewhere else in the essays


def test_essays_lose_nothing_but_their_line_breaks(shared_data: Path) -> None:
    folder = shared_data / "essays"
    words = [word for file in sorted(folder.glob("*.txt")) for word in file.read_text(encoding="utf-8").split()]
    assert " ".join(essay_sentences(str(folder))).split() == words


def test_the_passkey_stands_in_the_published_irrelevant_text(tokenizer: PreTrainedTokenizerFast) -> None:
    problem = load_problems(PASSKEY, None, 1, recall=SMALL, tokenizer=tokenizer).problems[0]
    key = problem.answer
    assert problem.text.startswith("There is an important info hidden inside a lot of irrelevant text.")
    assert f"The pass key is {key}. Remember it. {key} is the pass key." in problem.text
    assert problem.text.endswith("\nWhat is the pass key? The pass key is")
    assert all(sentence in problem.text for sentence in NOISE)


def test_the_passage_to_copy_has_the_tokens_requested(tokenizer: PreTrainedTokenizerFast) -> None:
    problem = load_problems(COPYING, None, 1, recall=SMALL, tokenizer=tokenizer).problems[0]
    assert f" The secret phrase is: {problem.answer}. " in f" {problem.text} ".replace("\n", " ")
    assert 40 <= tokens(tokenizer, problem.answer) < 50
    assert answer_tokens(COPYING, SMALL) >= 50


def test_answers_to_needles_and_passkeys_are_the_first_number_of_that_many_digits() -> None:
    problem = Problem("2048/0.5/0", "…", ("1234567",))
    assert score_answer(NEEDLE, problem, "The special magic number for a-b is 1234567.").correct
    assert score_answer(NEEDLE, problem, "It is 1,234,567.").correct
    assert score_answer(NEEDLE, problem, "<think>7654321?</think> 1234567").correct
    wrong = score_answer(NEEDLE, problem, "7654321, 1234567")
    assert (wrong.extracted, wrong.score, wrong.correct) == ("7654321", 0.0, False)
    assert score_answer(NEEDLE, problem, "12345678").extracted is None
    assert score_answer(PASSKEY, Problem("1/0/0", "…", ("40213",)), " 40213. Remember it.").correct


def test_a_copy_scores_the_longest_run_of_its_words() -> None:
    problem = Problem("2048/0.5/0", "…", ("silver anchor brave teapot",))
    assert score_answer(COPYING, problem, "The phrase is: **silver anchor\nbrave teapot**.").correct
    assert score_answer(COPYING, problem, "Here it is: silver anchor brave. Teapot, too?").score == 0.75
    assert score_answer(COPYING, problem, "silver anchor proud teapot").score == 0.5
    assert score_answer(COPYING, problem, "Silver Anchor").score == 0
    assert score_answer(COPYING, problem, "").extracted is None
    long = Problem("2048/0.5/0", "…", ("one two " * 200,))  # words so frequent that difflib would by itself pass over them
    assert score_answer(COPYING, long, long.answer).correct


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.lists(st.sampled_from("abcd"), max_size=12))
def test_a_copy_is_correct_only_where_the_whole_passage_stands_in_it(passage: list[str], answer: list[str]) -> None:
    score = score_answer(COPYING, Problem("1/0/0", "…", (" ".join(passage),)), " ".join(answer)).score
    runs = [
        n
        for n in range(len(passage) + 1)
        for i in range(len(passage) - n + 1)
        if f" {' '.join(passage[i : i + n])} " in f" {' '.join(answer)} "
    ]
    assert score == max(runs, default=0) / len(passage)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lengths": ()}, r"lengths: \[\]: .*give at least one value"),
        ({"lengths": (512, 512)}, "each once"),
        ({"lengths": (0,)}, "lengths: 0 is not at least 1"),
        ({"depths": (0.5, 1.5)}, "depths: 1.5 is not between 0 and 1"),
        ({"repeats": 0}, "repeats: 0"),
        ({"keys": 65}, "keys: 65 is not between 1 and 64"),
        ({"span": 0}, "span: 0"),
    ],
)
def test_settings_that_make_no_problems_are_errors(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RecallSettings(**settings)


def test_a_length_without_room_for_the_question_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"copying: lengths: 60 tokens have no room for the question, which takes \d+ of its own"):
        load_problems(COPYING, None, None, recall=RecallSettings(lengths=(60,)), tokenizer=tokenizer)


def test_a_folder_without_texts_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"there is no \.txt file in"):
        load_problems(NEEDLE, str(tmp_path), None, tokenizer=tokenizer)
    (tmp_path / "latin.txt").write_bytes("Café.".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: cannot be read as UTF-8"):
        load_problems(NEEDLE, str(tmp_path), None, tokenizer=tokenizer)
    (tmp_path / "latin.txt").write_text(" \n")
    with pytest.raises(UserError, match="are empty"):
        load_problems(NEEDLE, str(tmp_path), None, tokenizer=tokenizer)


def test_recall_cannot_be_measured_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load_problems(NEEDLE, None, None)
