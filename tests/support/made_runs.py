"""Run folders made without a model: every file that a report reads, with known content."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from math import fsum
from pathlib import Path

from lt_train.benchmarks import BENCHMARKS, load_problems
from lt_train.evaluation.records import SampleRecord
from lt_train.evaluation.scores import AnswerScores, LossScores, answer_scores, write_scores
from lt_train.evaluation.statistics import TokenLoss, mean_loss
from lt_train.hybrid.loading import hybrid_config
from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.loading import load_recipe, resolved_yaml
from lt_train.runtime.files import append_json_line, write_json, write_text
from lt_train.runtime.fingerprints import hash_of_json
from lt_train.selection.fingerprint import Fingerprint, Sizes
from lt_train.selection.profile import LayerProfile, SampleScores
from tests.support.families import BASES

RECIPE = """
name: NAME
model: {base: nobody/nothing}
hybrid: {lazy_layer_ratio: 0.5, strategy: reach, w_sink: 2, w_recent: 6}
data: {source: nobody/traces, format: still, max_length: 64, heldout: 4}
train: {method: full, learning_rate: 1.0e-3, max_steps: 3, batch_size: 1}
eval:
  - {benchmark: ledger, path: PROBLEMS, max_new_tokens: 512, variants: [base, converted, trained]}
  - {benchmark: heldout_loss, variants: [base, trained]}
"""
LAYERS = {"converted": [0, 2], "converted-by-lazy_ratio": [0, 1]}
PROBLEMS = [("p0", "What is 1+1?", "2"), ("p1", "What is 2+2?", "4"), ("p2", "What is 3+3?", "6"), ("p3", "What is 4+4?", "8")]
REACH = ((0.1, 0.9, 0.2, 0.8), (0.3, 0.7, 0.0, 1.0))
LAZY_RATIO = ((0.9, 0.8, 0.2, 0.1), (0.7, 0.8, 0.4, 0.1))
LOG = (
    {"step": 1, "loss": 2.0, "grad_norm": 4.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 1.5, "grad_norm": 3.0, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 1.75, "eval_tokens": 40},
    {"step": 3, "loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.0},
)


def record(problem: str, *, sample: int = 0, correct: bool = True, tokens: int = 100, cut: bool = False, text: str | None = None):
    answer = dict((key, answer) for key, _, answer in PROBLEMS).get(problem, "0") if correct else "9"
    return SampleRecord(
        problem=problem,
        sample=sample,
        seed=None,
        prompt_hash="0123456789abcdef",
        text=f"<think>Let me see.</think>It is \\boxed{{{answer}}}" if text is None else text,
        tokens=tokens,
        thinking_tokens=tokens // 2,
        finish_reason="length" if cut else "stop",
        extracted=None if cut else answer,
        extracted_from=None if cut else "boxed",
        score=float(correct and not cut),
        correct=correct and not cut,
        grading_error=None,
        seconds=tokens / 50,
    )


ANSWERS: Mapping[str, Sequence[SampleRecord]] = {
    "base": [record("p0", tokens=64), record("p1", tokens=100), record("p2", tokens=200), record("p3", tokens=90, correct=False)],
    "converted": [
        record("p0", tokens=70),
        record("p1", tokens=512, cut=True),
        record("p2", tokens=300, correct=False),
        record("p3", tokens=80, correct=False),
    ],
    "trained": [
        record("p0", tokens=60),
        record("p1", tokens=110),
        record("p2", tokens=210, correct=False),
        record("p3", tokens=95),
    ],
}


def made_run(
    runs: Path,
    name: str = "tiny",
    answers: Mapping[str, Sequence[SampleRecord]] = ANSWERS,
    problems: Sequence[tuple[str, str, str]] = PROBLEMS,
) -> Path:
    """A finished run: scores, samples, a layer profile of four layers, a training log, and the markers of its stages."""
    folder, source = runs / name, runs / f"{name}-problems.jsonl"
    runs.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"id": key, "problem": text, "answer": answer}) + "\n" for key, text, answer in problems))
    recipe = runs / f"{name}.yaml"
    recipe.write_text(RECIPE.replace("NAME", name).replace("PROBLEMS", str(source)))
    write_text(folder / "recipe.yaml", resolved_yaml(load_recipe(recipe)))
    write_json(folder / "hybrid/layers.json", LAYERS)
    hybrid_config(BASES["qwen3"], HybridSpec(4, (0, 2), w_sink=2, w_recent=6)).save_pretrained(folder / "hybrid")
    for variant, records in answers.items():
        measured(folder, variant, records, source)
    for variant, losses in (("base", (10.0, 12.0, 14.0)), ("trained", (9.0, 11.5, 13.0))):
        write_scores(folder / "eval" / variant / "heldout_loss/scores.json", loss_scores(losses))
    profile().save(folder / "profile/profile.json")
    for row in LOG:
        append_json_line(folder / "train/log.jsonl", row)
    write_json(folder / "export/config.json", {})
    for stage, seconds in (("profile", 40.0), ("hybrid", 0.5), ("train", 5400.0), ("eval", 90.0), ("export", 8.0)):
        notes = {"samples": COUNTS} if stage in ("profile", "train") else {}
        finish_stage(folder, stage, seconds, **notes)
    return folder


def measured(folder: Path, variant: str, records: Sequence[SampleRecord], source: Path, evaluation: str = "ledger") -> None:
    """Samples and scores of one variant."""
    requested = load_problems(BENCHMARKS["ledger"], str(source), None)
    fingerprint = {
        "model": variant,
        "problems": hash_of_json([astuple(problem) for problem in requested.all_problems]),
        "max_new_tokens": 512,
        "temperature": 0.0,
    }
    place = folder / "eval" / variant / evaluation
    write_json(place / "meta.json", {"fingerprint": fingerprint})
    (place / "samples.jsonl").write_text("".join(json.dumps(asdict(each)) + "\n" for each in records))
    write_scores(place / "scores.json", scores_of_answers(records, fingerprint, requested.available))


def scores_of_answers(records: Sequence[SampleRecord], fingerprint: Mapping[str, object], available: int) -> AnswerScores:
    return answer_scores(
        {each.key: each for each in records},
        list(dict.fromkeys(each.problem for each in records)),
        1 + max(each.sample for each in records),
        benchmark="ledger",
        available=available,
        fingerprint=dict(fingerprint),
        equivalent=str.__eq__,
    )


def loss_scores(nll: Sequence[float], tokens: int = 10) -> LossScores:
    by_sample = {f"s{number}": TokenLoss(value, tokens) for number, value in enumerate(nll)}
    mean = mean_loss(list(by_sample.values()))
    return LossScores("heldout_loss", len(nll), tokens * len(nll), mean.value, mean.standard_error, {}, by_sample)


def profile() -> LayerProfile:
    samples = tuple(
        SampleScores(f"s{number}", 64, {"reach": reach, "lazy_ratio": lazy}, {"reach": 3.0 + number})
        for number, (reach, lazy) in enumerate(zip(REACH, LAZY_RATIO, strict=True))
    )
    sizes = Sizes(w_sink=2, w_recent=6, w_last=64, long_reach_share=0.1)
    made_from = Fingerprint("nobody/nothing", "c", "w", "float32", "d", sizes, ("reach", "lazy_ratio"), {})
    return LayerProfile(made_from, 4, samples, (), "2026-01-01T00:00:00+00:00")


TWO_KV_HEADS = type(BASES["qwen3"])(**BASES["qwen3"].to_dict() | {"num_key_value_heads": 2})
"""A base whose layers can be split."""

HEAD_SHARES = ((0.9, 0.1), (0.02, 0.03), (0.3, 0.2), (0.0, 0.01))
"""By layer and KV head, in every sample: layers 0 and 2 together have 1.5 nats of 1.56."""


def gates_profile() -> LayerProfile:
    """Scores by gates of two samples, whose measured rise is 1.6 nats."""
    scores = {"gates": tuple(map(fsum, HEAD_SHARES))}
    samples = tuple(SampleScores(f"s{number}", 64, scores, {"gates": 1.6}, HEAD_SHARES) for number in range(2))
    return replace(profile(), fingerprint=replace(profile().fingerprint, strategies=("gates",)), samples=samples)


VERSIONS = {"lt-train": "0.1.0", "torch": "2.13.0"}
COUNTS = {"rows": 12, "too_long": 3, "dropped": 3, "truncated": 0, "train": 5, "heldout": 4}


def finish_stage(folder: Path, stage: str, seconds: float, **notes: object) -> None:
    """A stage's marker, as the pipeline writes it: all files of the stage's folder are what it left."""
    files = sorted(str(path.relative_to(folder)) for path in (folder / stage).rglob("*") if path.is_file())
    marker = {"format": 2, "stage": stage, "key": "", **notes, "files": files, "seconds": seconds}
    marker |= {"finished": "2026-01-02T03:04:05+00:00", "machine": "x86_64, 2 cores", "versions": VERSIONS}
    write_json(folder / "stages" / f"{stage}.json", marker)
