"""The best weights of a training by one metric, kept in train/best-<step>/ even after their checkpoint is deleted.

Only the weights, without the optimizer: for evaluation and publishing, not for resuming.
"""

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from lt_train.recipe.schema import EVAL_LOSS, Train
from lt_train.runtime.files import read_json
from lt_train.runtime.run_paths import MEASURED
from lt_train.training.checkpoints import Checkpoint, fault_of, publish_weights, read_checkpoint


@dataclass(frozen=True)
class MeasuredMetric:
    """A measured metric: eval_loss (nats per held-out answer token, lower is better) or a probe's accuracy (higher is better)."""

    metric: str
    value: float
    step: int

    def is_better_than(self, other: "MeasuredMetric") -> bool:
        return self.value < other.value if self.metric == EVAL_LOSS else self.value > other.value


class Best:
    def __init__(self, out: Path, metric: str) -> None:
        """
        Args:
            out: the folder of the checkpoints. metric: EVAL_LOSS or a probe's name.
        """
        self.out = out
        self.metric = metric

    def offer(self, checkpoint: Checkpoint, value: float) -> None:
        """Keep the checkpoint's weights if they are better than the best so far; of equally good ones the first are kept."""
        offered, before = MeasuredMetric(self.metric, value, checkpoint.step), self.found()
        if math.isnan(value) or (before is not None and not offered.is_better_than(before[1])):
            return
        new = self.out / f"best-{checkpoint.step}"
        shutil.rmtree(new, ignore_errors=True)  # damaged, or of another metric
        publish_weights(checkpoint, new, {MEASURED: asdict(offered)})
        for old in self._folders():
            if old != new:
                shutil.rmtree(old)

    def found(self) -> tuple[Checkpoint, MeasuredMetric] | None:
        """The best weights so far. After a kill there may be two folders: the new one, and the old one not yet deleted."""
        best: tuple[Checkpoint, MeasuredMetric] | None = None
        for folder in self._folders():
            if fault_of(folder) is None:
                measured = MeasuredMetric(**read_json(folder / MEASURED, "record of the metric"))
                if measured.metric == self.metric and (best is None or measured.is_better_than(best[1])):
                    best = read_checkpoint(folder), measured
        return best

    def _folders(self) -> list[Path]:
        return [path for path in self.out.glob("best-*") if path.name.removeprefix("best-").isdecimal()]


def is_published(final: Path, train: Train) -> bool:
    """Whether the weights in `final` are those of train.final_weights: the last, or the best by train.keep_best."""
    measured = final / MEASURED
    if not measured.is_file():
        return train.final_weights == "last"
    metric = read_json(measured, "record of the metric")["metric"]
    return train.final_weights == "best" and metric == train.keep_best
