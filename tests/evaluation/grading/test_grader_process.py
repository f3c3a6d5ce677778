import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lt_train.evaluation.grading import grader_process
from lt_train.evaluation.grading.grader_process import CallFailed, Grader
from lt_train.evaluation.grading.math_answers import Grade, grade


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


@pytest.fixture(scope="module")
def hasty() -> Iterator[Grader]:
    """A grader that gives an answer one second."""
    with Grader(seconds=1) as grader:
        yield grader


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends_within(process: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(process)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"so \boxed{\frac{2}{4}}", "0.5", Grade(r"\frac{2}{4}", True, None, "boxed")),
        (r"so \boxed{\frac{2}{3}}", "0.5", Grade(r"\frac{2}{3}", False, None, "boxed")),
        ("The answer is 1/2.", r"\frac{1}{2}", Grade("1/2", True, None, "phrase")),
        ("The answer is 12 cm.", "12", Grade("12 cm", True, None, "phrase")),
        ("It is 12 cm.", "12", Grade("12", True, None, "last")),
        ("It cannot be known.", "12", Grade(None, False, None, None)),
    ],
)
def test_an_answer_is_judged_and_where_it_stood_is_reported(grader: Grader, text: str, answer: str, expected: Grade) -> None:
    assert grader.grade(text, answer) == expected


def test_a_choice_is_correct_by_its_letter(grader: Grader) -> None:
    assert grader.grade(r"\boxed{\text{(b)}}", "B", "choice") == Grade("B", True, None, "boxed")
    assert grader.grade("The answer is C.", "B", "choice") == Grade("C", False, None, "phrase")
    with pytest.raises(ValueError, match="must be a letter from A to J, not '42'"):
        grader.grade(r"\boxed{B}", "42", "choice")


def test_verdicts_are_those_of_grading_in_this_process(grader: Grader) -> None:
    pairs = [
        ("0.5", r"\frac12"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3, \pi/2)"),
        (r"\{1, 2\}", r"\{2,1\}"),
        ("x + 1", "1 + x"),
        ("5", "6"),
    ]
    for first, second in [*pairs, *((pair[1], pairs[0][0]) for pair in pairs[1:]), (r"\frac{", "5")]:
        assert grader.grade(rf"\boxed{{{first}}}", second).correct == grade(rf"\boxed{{{first}}}", second).correct


def test_equivalent_answers_are_seen_as_one(grader: Grader) -> None:
    assert grader.equivalent("0.5", r"\frac12")
    assert grader.equivalent(r"\frac{", r"\frac{")
    assert not grader.equivalent("0.5", "0.6")
    assert not grader.equivalent("0.5", r"\frac{")


NESTED = r"\sqrt{2+" * 300 + "1" + "}" * 300


@pytest.mark.slow
@pytest.mark.parametrize("answer", [r"10^{10^{10}}", NESTED], ids=["is computed for ever", "is parsed for ever"])
def test_an_answer_that_takes_too_long_is_incorrect_with_the_reason_and_the_next_is_judged(hasty: Grader, answer: str) -> None:
    hasty.call(int)  # up and running
    verdict = hasty.grade(rf"\boxed{{{answer}}}", "5")
    # on a machine that is busy with something else the clock may end it first
    assert re.fullmatch(r"Timeout: no verdict within (1 seconds of computing|6 seconds)", verdict.error)
    assert verdict == Grade(answer, False, verdict.error, "boxed")
    assert hasty.call(abs, -5) == 5


def test_a_hundred_kilobytes_of_latex_are_not_looked_into_unless_they_are_the_true_answer(grader: Grader) -> None:
    answer = r"\frac{1}{2}+" * 8500 + "1"
    verdict = grader.grade(rf"\boxed{{{answer}}}", "5")
    assert not verdict.correct
    assert "102,001 characters" in verdict.error
    assert grader.grade(rf"\boxed{{{answer}}}", answer).correct


@pytest.mark.slow
def test_what_ignores_every_signal_but_the_last_is_killed(hasty: Grader) -> None:
    child = hasty.call(os.getpid)
    with pytest.raises(CallFailed, match=r"within (1 seconds of computing|6 seconds)"):
        hasty.call(eval, "[__import__('signal').signal(n, 1) for n in (2, 14, 15)] and 10 ** 10 ** 10")
    assert not is_alive(child)
    assert hasty.call(os.getpid) != child


@pytest.mark.slow
def test_what_does_not_even_compute_is_killed_by_the_clock() -> None:
    with Grader(seconds=1, patience=1) as hasty:
        child = hasty.call(os.getpid)
        with pytest.raises(CallFailed, match=r"no verdict within 1 seconds$"):
            hasty.call(time.sleep, 600)
        assert not is_alive(child)
        assert hasty.call(abs, -5) == 5


@pytest.mark.slow
def test_the_limit_is_for_each_answer_and_not_for_all(hasty: Grader) -> None:
    child = hasty.call(os.getpid)
    for _ in range(2):
        hasty.call(exec, "from time import process_time as now\nend = now() + 0.7\nwhile now() < end: pass", {})
    assert hasty.call(os.getpid) == child


def test_an_exception_is_the_reason_and_the_process_stays(grader: Grader) -> None:
    child = grader.call(os.getpid)
    with pytest.raises(CallFailed, match="ZeroDivisionError: integer division or modulo by zero"):
        grader.call(divmod, 1, 0)
    with pytest.raises(CallFailed, match="pickle"):
        grader.call(eval, "lambda: 0")
    with pytest.raises(CallFailed, match="RecursionError"):
        grader.call(exec, "f = lambda: g()\ng = lambda: f()\nf()", {})
    assert grader.call(os.getpid) == child


def test_an_answer_that_fills_the_memory_fails_in_the_child(grader: Grader) -> None:
    with pytest.raises(CallFailed, match="MemoryError"):
        grader.call(bytearray, 3 * 2**30)


@pytest.mark.slow
def test_an_answer_that_its_process_dies_of_is_incorrect_with_the_reason(grader: Grader) -> None:
    with pytest.raises(CallFailed, match=r"died of this answer, twice \(exit status 3\)"):
        grader.call(os._exit, 3)
    with pytest.raises(CallFailed, match=r"died of this answer, twice \(signal 9\)"):
        grader.call(eval, "__import__('os').kill(__import__('os').getpid(), 9)")
    assert grader.call(abs, -5) == 5


@pytest.mark.slow
def test_a_child_killed_from_outside_costs_no_answer(grader: Grader, tmp_path: Path) -> None:
    os.kill(grader.call(os.getpid), signal.SIGKILL)
    assert grader.grade(r"\boxed{5}", "5") == Grade("5", True, None, "boxed")
    child, begun = grader.call(os.getpid), tmp_path / "begun"

    def kill_in_the_call() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_the_call)
    killer.start()
    waits_once = f"(path := __import__('pathlib').Path({str(begun)!r})).exists() or path.touch() or __import__('time').sleep(20)"
    assert grader.call(eval, waits_once) is True
    killer.join()
    assert grader.call(os.getpid) != child


@pytest.mark.slow
def test_answers_from_many_threads_get_their_own_verdicts() -> None:
    with Grader(seconds=1) as grader, ThreadPoolExecutor(8) as threads:
        hanging = threads.submit(grader.grade, r"\boxed{10^{10^{10}}}", "5")
        verdicts = list(threads.map(lambda n: grader.grade(rf"\boxed{{{n}}}", str(n - n % 2)), range(200)))
        assert "Timeout" in hanging.result().error
    assert [int(verdict.extracted) for verdict in verdicts] == list(range(200))
    assert [verdict.correct for verdict in verdicts] == [n % 2 == 0 for n in range(200)]


@pytest.mark.slow
def test_an_interrupted_call_does_not_leave_its_reply_to_the_next() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        interrupt_a_call()
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_a_call() -> None:
    with Grader() as grader:
        grader.call(int)
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            grader.call(eval, "__import__('time').sleep(1) or 'old'")
        assert grader.call(eval, "'new'") == "new"


def test_the_child_has_no_torch_and_no_modules_of_the_model(grader: Grader) -> None:
    loaded = grader.call(eval, "sorted(__import__('sys').modules)")
    assert {"math_verify", "lt_train.evaluation.grading.math_answers"} <= set(loaded)
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(loaded)


@pytest.mark.slow
def test_a_daemonic_process_can_grade() -> None:
    """Such as a worker of multiprocessing.Pool, which may have no children by multiprocessing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its workers are daemonic
        assert pool.apply(grade_in_this_process, (r"so \boxed{\frac{2}{4}}", "0.5")) == (True, True)


def grade_in_this_process(text: str, reference: str) -> tuple[bool, bool]:
    with Grader() as grader:
        return multiprocessing.current_process().daemon, grader.grade(text, reference).correct


def test_a_text_that_cannot_be_searched_is_an_error_of_its_own(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader_process, "extract", divmod)  # fails in the child
    verdict = grader.grade("It is 12 cm.", "12")
    assert (verdict.extracted, verdict.correct) == (None, False) and "TypeError" in verdict.error


@pytest.mark.slow
def test_the_child_ends_with_its_grader() -> None:
    with Grader() as grader:
        child = grader.call(os.getpid)
        assert is_alive(child)
    assert not is_alive(child)
    with contextlib.closing(grader):
        assert grader.call(abs, -5) == 5


@pytest.mark.slow
def test_a_child_that_cannot_start_is_an_error_and_no_verdict(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grader_process, "PROGRAM", "import no_such_module")
    with Grader() as grader, pytest.raises(RuntimeError, match="did not start"):
        grader.grade(r"\boxed{5}", "5")
    assert "no_such_module" in capfd.readouterr().err


PARENT = """
import os, sys
from lt_train.evaluation.grading.grader_process import Grader
grader = Grader(seconds=1)
print(grader.call(os.getpid), flush=True)
if sys.argv[1] == "busy":
    grader.call(eval, "10 ** 10 ** 10")
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_script_without_a_main_guard_can_grade_and_its_child_does_not_outlive_it(tmp_path: Path, state: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        time.sleep(0.1)  # less than the second after which the parent would kill it
        assert is_alive(child)
    finally:
        parent.kill()
        parent.communicate()
    assert ends_within(child, 10)
