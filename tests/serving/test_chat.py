"""`lt-train chat`, with piped input, and as on a terminal."""

import copy
import fcntl
import io
import json
import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from lt_train.hybrid.loading import load_hybrid
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.continuous_batch import ContinuousBatch
from lt_train.recipe.schema import Prompt
from lt_train.runtime.errors import UserError
from lt_train.serving.chat import Conversation
from lt_train.serving.checkpoint import Checkpoint
from lt_train.serving.draft_options import DraftOptions
from tests.support import processes
from tests.support.repository import REPOSITORY
from tests.support.runs import call_lt_train
from tests.support.served import checkpoint_of
from tests.support.symbol_model import symbol_hybrid, symbol_tokenizer
from tests.support.tiny_engine import tiny_model

OLD = REPOSITORY / "tests/fixtures/run_before_the_folders"
EXPORT = OLD / "finished/old/export"
BASE = REPOSITORY / "data/tiny-reasoner"
PROBLEM = json.loads((REPOSITORY / "data/ledger/test.jsonl").read_text().partition("\n")[0])
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@pytest.fixture(scope="module")
def reasoner() -> Checkpoint:
    """The tiny reasoner with some layers streaming that it does not need."""
    return checkpoint_of(load_hybrid(BASE, HybridSpec(8, (2,), 4, 12)), AutoTokenizer.from_pretrained(BASE))


@pytest.fixture(scope="module")
def symbols() -> Checkpoint:
    return checkpoint_of(symbol_hybrid(), symbol_tokenizer())


def conversation(
    checkpoint: Checkpoint, *, folded: bool = False, terminal: bool = False, draft: DraftOptions | None = None
) -> tuple[Conversation, io.StringIO]:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=80, color_system="standard" if terminal else None)
    return Conversation(checkpoint, console, folded, 2**26, draft), shown


def answer_of(shown: io.StringIO) -> tuple[str, str]:
    """The answer, and the line below it."""
    text = shown.getvalue().rstrip("\n")
    answer, _, report = text.rpartition("\n")
    return answer, report


def test_the_reasoning_is_dimmed_and_the_answer_is_not(reasoner: Checkpoint) -> None:
    talk, shown = conversation(reasoner, terminal=True)
    talk.ask(PROBLEM["problem"])
    answer, _ = answer_of(shown)
    assert f"{DIM}<|begin_of_thought|>{PLAIN}" in answer and f"{DIM}<|end_of_thought|>{PLAIN}" in answer
    solution = answer[answer.index("<|begin_of_solution|>") :]
    assert f"\\boxed{{{PROBLEM['answer']}}}" in solution and DIM not in solution


def test_folded_reasoning_is_not_shown_and_stays_in_the_conversation(reasoner: Checkpoint) -> None:
    talk, shown = conversation(reasoner, folded=True)
    talk.ask(PROBLEM["problem"])
    answer, _ = answer_of(shown)
    assert answer.startswith("<|begin_of_solution|>") and "thought" not in answer
    assert talk.turns[-1]["content"].startswith("<|begin_of_thought|>1. ")
    talk.fold()
    assert not talk.folded


def test_the_line_below_an_answer_reports_its_rate_and_its_kv_cache(reasoner: Checkpoint) -> None:
    talk, shown = conversation(reasoner)
    talk.ask(PROBLEM["problem"])
    _, report = answer_of(shown)
    assert report.startswith("82 tokens, ") and " tokens/s; KV " in report
    assert report.endswith(f" of {93 + 82} tokens (full attention: 700 KiB)")
    assert "KV 620 KiB" in report  # one of eight layers holds 16 tokens


def test_a_draft_changes_no_answer_and_is_shown_at_the_beginning(symbols: Checkpoint) -> None:
    precise, shown = replace(symbols, model=copy.deepcopy(symbols.model).double()), []
    for draft in (None, DraftOptions(length=3)):
        talk, out = conversation(precise, draft=draft)
        for question in ("12", "34+5"):
            talk.ask(question)
        shown.append([turn["content"] for turn in talk.turns])
        talk.introduce(Path("runs/mine"))
    assert shown[0] == shown[1] and talk.batch.acceptance.accepted > 0
    assert "\ndraft: all layers stream; it proposes 3 tokens in a round\n" in out.getvalue()


def test_the_beginning_reports_what_streams(symbols: Checkpoint) -> None:
    assert symbols.streaming == "1 of 2 layers stream"
    split = HybridSpec.from_streaming_heads([(1,), (0, 1), ()], kv_heads=2, w_sink=2, w_recent=6)
    assert replace(symbols, model=tiny_model(split)).streaming == "3 of 6 KV heads stream"


def test_each_turn_follows_the_earlier_ones_in_the_models_template(symbols: Checkpoint, monkeypatch) -> None:
    prompts = prompts_of(monkeypatch)
    talk, _ = conversation(replace(symbols, prompt=Prompt(system="be brief")))
    talk.ask("12")
    first = talk.turns[-1]["content"]
    talk.ask("34")
    assert prompts == ["be brief\n12\n:", f"be brief\n12\n{first}\n34\n:"]
    talk.forget()
    talk.ask("5")
    assert prompts[-1] == "be brief\n5\n:"


@pytest.mark.parametrize("prompt", [None, Prompt()])
def test_a_run_is_talked_to_without_the_system_turn_that_it_was_trained_without(
    symbols: Checkpoint, monkeypatch, prompt: Prompt | None
) -> None:
    tokenizer = symbol_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}be kind\n{% endif %}" + tokenizer.chat_template
    prompts = prompts_of(monkeypatch)
    talk, _ = conversation(replace(symbols, tokenizer=tokenizer, prompt=prompt))
    talk.ask("12")
    assert prompts == ["be kind\n12\n:" if prompt is None else "12\n:"]


def prompts_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that conversations make from now on."""
    prompts: list[str] = []
    render = Checkpoint.conversation
    monkeypatch.setattr(Checkpoint, "conversation", lambda self, turns: prompts.append(render(self, turns)) or prompts[-1])
    return prompts


def test_ctrl_c_stops_the_answer_and_the_conversation_continues(symbols: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, shown = conversation(symbols)
    before, step, steps = signal.getsignal(signal.SIGINT), ContinuousBatch.step, []

    def interrupted_step(batch: ContinuousBatch) -> list:
        steps.append(batch)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(batch)

    monkeypatch.setattr(ContinuousBatch, "step", interrupted_step)
    talk.ask("12")
    assert len(steps) == 4 and "5 tokens" in shown.getvalue() and "(stopped)" in shown.getvalue()
    assert talk.batch.is_empty and signal.getsignal(signal.SIGINT) == before
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    talk.ask("34")
    assert talk.turns[-1]["content"]


def test_a_question_without_room_is_refused_and_forgotten(symbols: Checkpoint) -> None:
    talk, shown = conversation(symbols)
    talk.ask("1" * 200)
    assert shown.getvalue() == "202 tokens so far, and there is room for 128. Fix: /new\n"
    assert talk.turns == []


def test_a_question_that_is_no_text_is_refused_and_forgotten(symbols: Checkpoint) -> None:
    talk, shown = conversation(symbols)
    talk.ask("1\udcff")  # as a pipe gives a byte that is no UTF-8
    assert shown.getvalue().startswith("this turn cannot be read: it holds bytes that are no UTF-8") and talk.turns == []


def test_a_models_text_does_not_steer_the_terminal(symbols: Checkpoint) -> None:
    from lt_train.serving.chat import _Shown
    from lt_train.serving.reasoning_stream import ReasoningStream

    shown = io.StringIO()
    with _Shown(Console(file=shown), ReasoningStream(""), folded=False) as answer:
        answer.add("a\x1b[2Jb [red]c[/red]")
    assert shown.getvalue() == "a␛[2Jb [red]c[/red]\n"


def test_a_model_without_chat_template_is_refused(symbols: Checkpoint) -> None:
    tokenizer = symbol_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        conversation(replace(symbols, tokenizer=tokenizer))


def test_piped_questions_are_answered_a_line_each(lt_train: Callable[..., tuple[int, str, str]], monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+34\n\n  \n/fold\n56\n/exit\n78\n"))
    code, out, err = lt_train("chat", EXPORT, "--kv-budget", "1MiB")
    assert (code, err) == (0, "")
    assert out.count(" tokens/s") == 2 and out.count("the reasoning is hidden") == 1


def test_a_line_that_ends_in_a_backslash_continues_in_the_next_one(lt_train, monkeypatch) -> None:
    requested = []
    monkeypatch.setattr(Conversation, "ask", lambda talk, question: requested.append(question))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo \\\n three\\\nfour\nfive\\\n"))
    assert lt_train("chat", EXPORT, "--kv-budget", "1MiB")[0] == 0
    assert requested == ["one", "two \n three\nfour", "five"]


def test_a_run_is_talked_to_as_its_trained_hybrid(lt_train: Callable[..., tuple[int, str, str]], monkeypatch) -> None:
    monkeypatch.chdir(OLD)
    answers = []
    for folder in ("finished/old", "finished/old/export"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("12+34\n"))
        code, out, err = lt_train("chat", folder, "--kv-budget", "1MiB")
        assert code == 0, err
        answers.append(out.rpartition(" tokens, ")[0])
    assert answers[0] == answers[1] and answers[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder. Fix: name a run's folder, runs/<name>, or an export, runs/<name>/export"),
        ([EXPORT, "--kv-budget", "100"], "--kv-budget: 100 bytes do not hold one sequence"),
    ],
)
def test_what_cannot_be_talked_to_is_one_sentence(lt_train, arguments, message) -> None:
    code, out, err = lt_train("chat", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1, out + err


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_an_answer_or_drops_a_line_and_ctrl_d_leaves(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = processes.start(_chat_on, os.ttyname(theirs), output=tmp_path / "output", TERM="xterm", COLUMNS="80")
    terminal = _Terminal(ours)
    try:
        terminal.read_until("> ", 120)
        terminal.type_until("half a line\x03", "Ctrl-D leaves", 60)
        terminal.type("12+34\r")
        terminal.read_until("tokens/s", 120)
        terminal.read_until("> ", 20)
        terminal.type("\x04")
        assert processes.exit_code(process, 30) == 0
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)
    assert "Traceback" not in terminal.seen + (tmp_path / "output").read_text()


def _chat_on(terminal: str) -> None:
    """`lt-train chat` on a terminal of its own, so that Ctrl-C reaches it."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    for n in range(3):
        os.dup2(descriptor, n)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, "rw"[n > 0], 1, closefd=False) for n in range(3))
    call_lt_train(["chat", str(EXPORT), "--kv-budget", "64MiB"])


class _Terminal:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.seen = ""
        self._read = 0

    def type(self, text: str) -> None:
        time.sleep(0.2)
        os.write(self.descriptor, text.encode())

    def type_until(self, text: str, answer: str, seconds: float) -> None:
        """What is typed before the prompt is ready is lost."""
        while True:
            self.type(text)
            try:
                return self.read_until(answer, 5)
            except AssertionError:
                seconds -= 5
                if seconds <= 0:
                    raise

    def read_until(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.seen[self._read :]:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.descriptor], [], [], 0.2)[0]:
                self.seen += os.read(self.descriptor, 4096).decode(errors="replace")
        self._read = self.seen.index(text, self._read) + len(text)
