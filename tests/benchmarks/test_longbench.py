"""LongBench: its tasks as published, its real rows, their prompts, how these are cut, and how answers score."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lt_train.benchmarks import BENCHMARKS, Benchmark, Problem, load_problems
from lt_train.benchmarks.longbench import LONGBENCH
from lt_train.evaluation.grading.scoring import score_answer
from lt_train.evaluation.prompting import prompt_ids, room_for_text, truncate_middle
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from tests.support.chat_templates import byte_tokenizer, family_tokenizer

# config/dataset2maxlen.json, eval.py (dataset2metric), task.md (samples) of https://github.com/THUDM/LongBench
PUBLISHED = {
    "narrativeqa": (128, "qa_f1", 200),
    "qasper": (128, "qa_f1", 200),
    "multifieldqa_en": (64, "qa_f1", 150),
    "multifieldqa_zh": (64, "qa_f1_zh", 200),
    "hotpotqa": (32, "qa_f1", 200),
    "2wikimqa": (32, "qa_f1", 200),
    "musique": (32, "qa_f1", 200),
    "dureader": (128, "rouge_zh", 200),
    "gov_report": (512, "rouge", 200),
    "qmsum": (512, "rouge", 200),
    "multi_news": (512, "rouge", 200),
    "vcsum": (512, "rouge_zh", 200),
    "trec": (64, "classification", 200),
    "triviaqa": (32, "qa_f1", 200),
    "samsum": (128, "rouge", 200),
    "lsht": (64, "classification", 200),
    "passage_count": (32, "count", 200),
    "passage_retrieval_en": (32, "retrieval", 200),
    "passage_retrieval_zh": (32, "retrieval", 200),
    "lcc": (64, "code_similarity", 500),
    "repobench-p": (64, "code_similarity", 500),
}
# pred.py: "chat models are better off without build prompts on these tasks"
WITHOUT_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
REAL = {"multi_news": "longbench_multi_news.jsonl", "passage_retrieval_zh": "longbench_passage_retrieval_zh.jsonl"}
PROMPT = Prompt(system=None, user="Think.\n{question}\nBox it.")


def task(name: str) -> Benchmark:
    return BENCHMARKS[f"longbench_{name}"]


def row(**fields: object) -> dict[str, object]:
    """A row of the published schema."""
    usual = {"input": "Who?", "context": "Some text.", "answers": ["Ada", "Lovelace"], "length": 3, "dataset": "hotpotqa"}
    return {**usual, "language": "en", "all_classes": None, "_id": "f0", **fields}


def write_rows(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def real(shared_data: Path) -> Callable[[str], tuple[Benchmark, tuple[Problem, ...]]]:
    """A task with real rows; the files hold the first 100 of 200."""

    def load(name: str) -> tuple[Benchmark, tuple[Problem, ...]]:
        half = replace(task(name), count=100)
        return half, load_problems(half, str(shared_data / REAL[name]), limit=None).problems

    return load


def test_the_tasks_are_the_published_21() -> None:
    declared = {
        benchmark.name.removeprefix("longbench_"): (benchmark.max_new_tokens, benchmark.grader, benchmark.count)
        for benchmark in LONGBENCH
    }
    assert declared == PUBLISHED
    assert {name for name in PUBLISHED if task(name).prompt_style == "without_chat"} == WITHOUT_CHAT
    assert all(task(name).prompt_style == "as_is" for name in PUBLISHED.keys() - WITHOUT_CHAT)


def test_the_prompts_are_letter_by_letter_the_published_ones() -> None:
    prompts = {name: task(name).template for name in PUBLISHED}
    # of the 21 prompts in LongBench/config/dataset2prompt.json, read as JSON
    published = "bb89f011861ff65f8534f366632b99cc9d5681ae983c50f2537230faae16613f"
    assert hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest() == published


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_template_takes_the_context_and_where_there_is_one_the_question(name: str) -> None:
    text = task(name).template.format(context="<CONTEXT {x}>", input="<INPUT>")
    assert text.count("<CONTEXT {x}>") == 1
    summaries_and_code = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc"}
    assert text.count("<INPUT>") == (0 if name in summaries_and_code else 1)


def test_half_of_a_task_is_not_the_task(shared_data: Path) -> None:
    with pytest.raises(UserError, match="100 problems, but longbench_multi_news has 200"):
        load_problems(task("multi_news"), str(shared_data / REAL["multi_news"]), limit=10)


def test_real_rows_load_and_are_put_in_the_published_words(real: Callable) -> None:
    _, news = real("multi_news")
    assert len(news) == 100
    assert news[0].text.startswith(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\nPassage 1:\n"
    )
    assert news[0].text.endswith("\n\nNow, write a one-page summary of all the news.\n\nSummary:")
    _, passages = real("passage_retrieval_zh")
    assert passages[0].answers == ("段落27",)
    assert passages[0].text.startswith("以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n段落1：")
    assert passages[0].text.endswith('\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：')
    assert "iOS是苹果公司开发的专有移动操作系统" in passages[0].text.rpartition("下面是一个摘要")[2]


def test_real_answers_score_1_and_others_less(real: Callable) -> None:
    news, problems = real("multi_news")
    scores = [score_answer(news, problem, problem.answer) for problem in problems[:5]]
    assert [round(score.score, 6) for score in scores] == [1.0] * 5  # the formula has a 1e-8 in its denominator
    assert 0 < score_answer(news, problems[0], problems[1].answer).score < 0.4
    passages, problems = real("passage_retrieval_zh")
    assert all(score_answer(passages, problem, problem.answer).correct for problem in problems)
    assert score_answer(passages, problems[0], "答案是段落27或段落3").score == 0.5
    assert score_answer(passages, problems[0], "段落2").score == 0
    assert score_answer(passages, problems[0], "不知道").score == 0


def test_several_correct_answers_count_by_the_best_match(tmp_path: Path) -> None:
    hotpot = replace(task("hotpotqa"), count=1)
    problem = load_problems(hotpot, write_rows(tmp_path / "hotpotqa.jsonl", [row()]), limit=None).problems[0]
    assert problem == Problem("0", task("hotpotqa").template.format(context="Some text.", input="Who?"), ("Ada", "Lovelace"))
    assert score_answer(hotpot, problem, "Lovelace.").correct
    assert score_answer(hotpot, problem, "<think>Byron?</think>\nAda").correct
    assert score_answer(hotpot, problem, "").score == 0
    assert score_answer(hotpot, problem, " ").extracted is None


def test_few_shot_answers_end_with_their_first_line() -> None:
    problem = Problem("0", "…", ("Number of something",), classes=("Number of something", "Date"))
    assert score_answer(task("trec"), problem, "\nNumber of something\nQuestion: When?\nType: Date").correct
    assert score_answer(task("trec"), problem, "\nDate\nNumber of something").score == 0
    assert score_answer(task("triviaqa"), Problem("0", "…", ("Ada",)), "Ada\nPassage: another one").correct


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("hotpotqa", {"answers": "Ada"}, r"field 'answers' is 'Ada'\. Fix: give longbench_hotpotqa rows with"),
        ("hotpotqa", {"answers": []}, r"field 'answers' is \[\]"),
        ("hotpotqa", {"context": None}, "field 'context' is None"),
        ("hotpotqa", {"input": 3}, "field 'input' is 3"),
        ("trec", {}, "field 'all_classes' is None"),
    ],
)
def test_a_row_without_its_fields_is_named_by_file_and_line(
    tmp_path: Path, name: str, change: dict[str, object], said: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row(all_classes=["Date"]), row(**change)])
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: {said}"):
        load_problems(replace(task(name), count=2), path, limit=None)


def test_a_folder_of_all_tasks_gives_each_its_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "hotpotqa.jsonl", [row()] * 200)
    write_rows(tmp_path / "musique.jsonl", [row(answers=["Bob"])] * 200)
    assert load_problems(task("musique"), str(tmp_path), limit=1).problems[0].answer == "Bob"


def test_without_a_path_the_rows_come_out_of_the_hub_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", "".join(json.dumps(row(all_classes=["Date"])) + "\n" for _ in range(200)))

    def download(repository: str, name: str, repo_type: str) -> str:
        requested.append((repository, name, repo_type))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_problems(task("trec"), None, limit=1).problems[0].classes == ("Date",)
    assert requested == [("THUDM/LongBench", "data.zip", "dataset")]
    with pytest.raises(
        UserError, match=r"THUDM/LongBench/data.zip/data/lcc.jsonl: cannot be read: KeyError.*set `path` to the folder"
    ):
        load_problems(task("lcc"), None, limit=1)


def test_a_damaged_line_in_the_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data/trec.jsonl", json.dumps(row(all_classes=["Date"])) + '\n{"input": ')
    (tmp_path / "data.zip").write_bytes(content.getvalue())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "data.zip"))
    with pytest.raises(UserError, match=r"data/trec\.jsonl:2: not JSON"):
        load_problems(task("trec"), None, limit=1)


def test_too_long_a_text_loses_its_middle() -> None:
    tokenizer = byte_tokenizer(None, None, "<|im_end|>")
    assert truncate_middle(tokenizer, "abcdefghij", 10) == "abcdefghij"
    assert truncate_middle(tokenizer, "abcdefghij", 6) == "abchij"
    assert truncate_middle(tokenizer, "abcdefghij", 7) == "abchij"  # int(7 / 2) from each end


def test_chat_tasks_use_the_template_but_not_the_recipe_s_own_words() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    ids = prompt_ids(tokenizer, PROMPT, task("hotpotqa"), Problem("0", "Who?", ("Ada",)), max_prompt_tokens=100)
    assert tokenizer.decode(ids) == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    aime = prompt_ids(tokenizer, PROMPT, BENCHMARKS["aime24"], Problem("0", "Who?", ("Ada",)), max_prompt_tokens=2)
    assert tokenizer.decode(aime) == "<|im_start|>user\nThink.\nWho?\nBox it.<|im_end|>\n<|im_start|>assistant\n"


def test_maths_benchmarks_ask_for_a_box_unless_the_recipe_has_a_user_turn_of_its_own() -> None:
    tokenizer, problem = family_tokenizer("qwen2.5"), Problem("0", "Who?", ("Ada",))
    boxing = "Please reason step by step, and put your final answer within \\boxed{}."

    def rendered(name: str, prompt: Prompt, instruction: str | None = None) -> str:
        return tokenizer.decode(prompt_ids(tokenizer, prompt, BENCHMARKS[name], problem, 100, instruction))

    for name in ("aime24", "aime25", "amc23", "math500", "gsm8k"):
        assert rendered(name, Prompt()) == f"<|im_start|>user\nWho?\n\n{boxing}<|im_end|>\n<|im_start|>assistant\n"
        assert boxing not in rendered(name, Prompt(user="Think. {question}"))
        assert "user\nWho?<|im_end|>" in rendered(name, Prompt(), instruction="")
        assert "user\nWho?\n\nBe brief.<|im_end|>" in rendered(name, Prompt(), instruction="Be brief.")
    for name in ("ledger", "custom", "gpqa_diamond", "longbench_hotpotqa", "needle"):
        assert "user\nWho?<|im_end|>" in rendered(name, Prompt())


def test_few_shot_and_code_go_without_a_chat_template() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    ids = prompt_ids(tokenizer, PROMPT, task("lcc"), Problem("0", "def f():", ("return",)), max_prompt_tokens=100)
    assert tokenizer.decode(ids) == "def f():"


@pytest.mark.parametrize("name", ["multi_news", "lcc"])
@pytest.mark.parametrize("family", ["qwen2.5", "llama3.1", "r1"])
def test_a_cut_prompt_and_its_answer_fill_the_context_and_do_not_pass_it(name: str, family: str) -> None:
    tokenizer = family_tokenizer(family)
    context, answer = 1000, 512
    room = room_for_text(tokenizer, PROMPT, task(name), context, answer)
    ids = prompt_ids(tokenizer, PROMPT, task(name), Problem("0", "北京é" * 500, ("…",)), room)
    assert context - answer - 24 <= len(ids) <= context - answer


def test_a_context_without_room_for_a_text_is_an_error() -> None:
    with pytest.raises(UserError, match="a context of 540 tokens has no room"):
        room_for_text(family_tokenizer("qwen2.5"), PROMPT, task("multi_news"), 540, 512)
