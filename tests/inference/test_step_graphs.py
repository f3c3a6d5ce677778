"""Steps that repeat a captured computation give what steps that Python runs give. A GPU's graphs are in test_engine_on_gpu.py."""

from collections.abc import Callable

import pytest
from torch import Tensor

from lt_train.hybrid.spec import HybridSpec
from lt_train.inference import step_graphs
from lt_train.inference.draft import Draft
from lt_train.inference.engine import Engine
from lt_train.inference.kv_store import KVStore
from lt_train.inference.runner import ModelRunner
from lt_train.inference.step_graphs import StepGraphs, until_captured
from tests.support.tiny_engine import GREEDY, MANY, answered, letter_tokenizer, requests, texts, tiny_model

SPECS = {
    "full": HybridSpec(3, (), 2, 6),
    "layers": HybridSpec(3, (1, 2), 2, 6),
    "all streaming, no sinks": HybridSpec(3, (0, 1, 2), 0, 6),
    "single heads": HybridSpec.from_streaming_heads([(1,), (0,), (0, 1)], kv_heads=2, w_sink=2, w_recent=6),
    "learned sinks": HybridSpec(3, (0, 2), 0, 6, learned_sinks=True),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 24 tokens then fill several pages, and most of their steps are captured ones."""
    monkeypatch.setattr(step_graphs, "STEPS_BEFORE_CAPTURE", 4)
    for module in ("kv_store", "key_blocks", "views"):
        monkeypatch.setattr(f"lt_train.inference.{module}.PAGE", 8)


class Repeats:
    """In place of a GPU's graphs: the computation itself, which like a graph's kernels sees nothing of the store but tensors."""

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self.captured = self.runs = 0

    def capture(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captured += 1

        def run() -> Tensor:
            self.runs += 1
            kept = self.store.lengths, self.store.pages
            self.store.lengths = self.store.pages = None
            result = compute()
            self.store.lengths, self.store.pages = kept
            return result

        return run


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> list[Repeats]:
    """Those of each runner that is made from now on."""
    made = []

    class Runner(ModelRunner):
        def __init__(self, model, store, prefill_chunk) -> None:
            super().__init__(model, store, prefill_chunk)
            made.append(Repeats(store))
            self.graphs = StepGraphs(store, self._forward, made[-1].capture)

    monkeypatch.setattr("lt_train.inference.continuous_batch.ModelRunner", Runner)
    return made


@pytest.mark.parametrize(("kind", "drafted"), [*((kind, None) for kind in SPECS), ("full", 3), ("layers", 3), ("single heads", 2)])
def test_answers_are_those_of_steps_that_python_runs(kind: str, drafted: int | None, request) -> None:
    """Sequences come and go, so there are graphs of several numbers of rows."""
    spec = SPECS[kind]
    model, tokenizer = tiny_model(spec), letter_tokenizer()
    draft = None if drafted is None else Draft.of(spec, None, drafted)

    def answers() -> dict:
        return texts(answered(Engine(model, tokenizer, max_slots=3, prefill_chunk=16, draft=draft), requests(MANY), GREEDY))

    expected = answers()
    repeats = request.getfixturevalue("repeats")
    assert answers() == expected
    assert repeats[0].captured > 1 and repeats[0].runs > 20


def repeating_runner() -> tuple[ModelRunner, Repeats]:
    """With one sequence of three tokens."""
    model = tiny_model(SPECS["layers"])
    store = KVStore(model, slots=1, pages=8)
    repeats, runner = Repeats(store), ModelRunner(model, store, 8)
    runner.graphs = StepGraphs(store, runner._forward, repeats.capture)
    store.admit(30)
    runner.prefill([(0, [1, 2, 3])])
    return runner, repeats


def test_a_kind_of_step_is_captured_once_and_after_several_steps() -> None:
    runner, repeats = repeating_runner()
    for _ in range(step_graphs.STEPS_BEFORE_CAPTURE):
        runner.step([4])
    assert repeats.captured == 0
    for _ in range(3):
        runner.step([4])
    assert (repeats.captured, repeats.runs) == (1, 3)


def test_what_is_timed_is_captured_before() -> None:
    runner, repeats = repeating_runner()
    until_captured(runner.graphs, lambda: runner.step([4]))
    assert (repeats.captured, repeats.runs) == (1, 1)
    until_captured(None, pytest.fail)


def test_what_was_prepared_for_the_next_step_is_not_used_after_pages_changed() -> None:
    """A sequence ends, and another one comes to its slot with as many tokens, on other pages."""
    model, prompt = tiny_model(SPECS["layers"]), [5, 6, 7]

    def logits(captures: bool) -> Tensor:
        store = KVStore(model, slots=2, pages=12)
        runner = ModelRunner(model, store, 8)
        if captures:
            runner.graphs = StepGraphs(store, runner._forward, Repeats(store).capture)
        store.admit(30)
        runner.prefill([(0, prompt)])
        for _ in range(step_graphs.STEPS_BEFORE_CAPTURE + 2):
            runner.step([4])
        length = store.lengths[0]
        store.release(0)
        for _ in range(2):
            store.admit(30)
        runner.prefill([(0, [8] * 9), (1, [*prompt, *range(length - 3)])])
        store.release(0)
        assert store.lengths == [length]
        return runner.step([4])

    assert logits(True).equal(logits(False))


def test_graphs_not_used_for_long_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(step_graphs, "STEPS_BEFORE_CAPTURE", 0)
    runner, repeats = repeating_runner()
    captured = []
    for tokens in (1, 2, 1, 3, 1, 2):
        runner.verify([[4] * tokens])
        captured.append(repeats.captured)
    assert captured == [1, 2, 2, 3, 3, 4]


def test_where_a_step_cannot_be_captured_python_runs_it() -> None:
    model = tiny_model(SPECS["layers"])

    def logits(fails: bool) -> Tensor:
        store = KVStore(model, slots=1, pages=8)
        runner = ModelRunner(model, store, 8)
        if fails:
            runner.graphs = StepGraphs(store, runner._forward, refuse)
        store.admit(30)
        runner.prefill([(0, [1, 2, 3])])
        for _ in range(step_graphs.STEPS_BEFORE_CAPTURE + 2):
            last = runner.step([4])
        assert not fails or runner.graphs.failure == "operation not permitted when stream is capturing"
        return last

    def refuse(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert logits(True).equal(logits(False))


def test_without_a_gpu_python_runs_the_steps() -> None:
    model = tiny_model(SPECS["layers"])
    assert step_graphs.obstacle_to_graphs(model) == "the model is not on a GPU"
    assert ModelRunner(model, KVStore(model, slots=1, pages=8), 8).graphs is None
