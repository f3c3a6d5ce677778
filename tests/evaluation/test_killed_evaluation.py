"""An evaluation killed at any moment ends with the records of one that was never disturbed."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lt_train.evaluation.plan import EvaluationPlan, make_plan
from lt_train.evaluation.run import evaluate
from lt_train.hybrid.spec import HybridSpec
from lt_train.inference.engine import Engine
from lt_train.inference.loading import load_for_inference
from lt_train.inference.tokenizer import load_tokenizer
from lt_train.recipe.schema import Eval, Model, Prompt

KILLS = 6
TINY = Model(base="data/tiny-reasoner", dtype="fp32")


@pytest.fixture
def engine() -> Engine:
    return Engine(load_for_inference(TINY, HybridSpec(8, (2, 3, 4, 7), 4, 12), torch.float32), load_tokenizer(TINY), max_slots=8)


@pytest.fixture
def plan(engine: Engine) -> EvaluationPlan:
    entry = Eval(benchmark="ledger", limit=12, max_new_tokens=60)
    return make_plan(entry, Prompt(), engine.tokenizer, context=4096, seed=0).for_model("tiny", engine.stop_ids)


def rows(out: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(found) == len({row["problem"] for row in found}) == 12
    return {row.pop("problem"): {name: value for name, value in row.items() if name != "seconds"} for row in found}


def test_a_killed_evaluation_resumes_to_the_same_records(engine: Engine, plan: EvaluationPlan, tmp_path: Path) -> None:
    started = time.perf_counter()
    undisturbed = evaluate(plan, engine, tmp_path / "whole", progress=False)
    duration = time.perf_counter() - started
    moments = random.Random(KILLS)
    for _ in range(KILLS):
        # forked, so that a kill does not only interrupt the import of torch
        process = multiprocessing.get_context("fork").Process(target=evaluate, args=(plan, engine, tmp_path / "killed"))
        process.start()
        time.sleep(moments.uniform(0, duration * 1.5 / KILLS))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    scores = evaluate(plan, engine, tmp_path / "killed", progress=False)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert (scores.accuracy, scores.by_problem) == (undisturbed.accuracy, undisturbed.by_problem)
