"""A training whose probes are made by a stand-in for the probing process."""

import sys
from pathlib import Path
from typing import Any

from lt_train.runtime.tracking import NoTracker, Tracker
from lt_train.training.probes.results import probe_folder
from lt_train.training.trainer import TrainResult, train
from tests.support.tiny_training import SPEC, load_tiny, tiny_examples, tiny_recipe, tiny_tokenizer

NEEDLE = {"benchmark": "needle", "limit": 1}
SETTINGS: dict[str, Any] = {"max_steps": 5, "save_steps": 100, "keep_checkpoints": 1, "probes": {"steps": 2, "evals": [NEEDLE]}}
# It takes its time, so that checkpoints are rotated meanwhile, and copies the weights' manifest to show what it could read.
PROGRAM = """
import json, os, pathlib, sys, time
place, step, score, seconds = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
time.sleep(seconds)
while not all(map(os.path.exists, sys.argv[5:])):
    time.sleep(0.01)
assert (place / "weights/model.safetensors").stat().st_size > 100_000
(place / "seen.json").write_bytes((place / "weights/manifest.json").read_bytes())
if score < 0:
    sys.exit("error the needle got lost")
sample = {"probe": "needle", "problem": "a", "answer": f"of step {step}", "extracted": "7", "score": score}
made = {"probe": "needle", "accuracy": score, "standard_error": 0.1, "problems": 1, "truncated": 0.0}
(place / "result.tmp").write_text(json.dumps({"step": step, "scores": [made], "samples": [sample]}))
(place / "result.tmp").rename(place / "result.json")
"""


class Training:
    """Trains in a folder with stand-in probes.

    Attributes:
        scores: what they find by step; below 0 they fail.
        seconds: how long one takes, and with `outlasts_training` until the training waits for one.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.scores: dict[int, float] = {}
        self.seconds = 0.1
        self.outlasts_training = False
        self.printed: list[str] = []
        self.started: list[int] = []

    def __call__(self, tracker: Tracker | None = None, heldout: int = 0, **settings: Any) -> TrainResult:
        recipe = tiny_recipe({"train": {**SETTINGS, **settings}, "data": {"heldout": heldout}})
        examples = tiny_examples(heldout)
        given = (recipe, load_tiny, tiny_tokenizer(), examples, SPEC, self.out, tracker or NoTracker(), self.report)
        return train(*given, probe_command=self.command)

    def report(self, line: str) -> None:
        self.printed.append(line)
        if line == "waiting for the running probe":
            self.waited_for.touch()

    @property
    def waited_for(self) -> Path:
        return self.out.with_name("waited_for")

    def command(self, step: int) -> list[str]:
        self.started.append(step)
        figures = [str(step), str(self.scores.get(step, 0.5)), str(self.seconds)]
        ends = [str(self.waited_for)] if self.outlasts_training else []
        return [sys.executable, "-S", "-c", PROGRAM, str(probe_folder(self.out, step)), *figures, *ends]

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir() if path.is_dir())
