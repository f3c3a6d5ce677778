"""The stages of a run: what each finished one recorded, and what is missing of an unfinished run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lt_train.recipe.evaluations import CONVERTED
from lt_train.recipe.schema import PER_PROMPT, converted_by
from lt_train.report.results import Result
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json
from lt_train.runtime.run_paths import RunPaths
from lt_train.selection.profile import SCORED

COMMANDS = {"profile": "profile", "hybrid": "convert", "teacher": "teacher", "train": "train", "eval": "eval", "export": "export"}
"""Stage, as its folder and marker are called -> the command that runs it; in the order of a run."""


@dataclass(frozen=True)
class FinishedStage:
    """The content of a stage's marker.

    Attributes:
        stage: a key of COMMANDS.
        seconds: of the process that finished it; a resumed stage took longer.
        files: paths in the run folder.
        finished: UTC, ISO 8601.
        samples: what became of the rows of the data, by outcome; None where the stage read none, or did not record it.
    """

    stage: str
    seconds: float
    finished: str
    machine: str
    versions: Mapping[str, str]
    files: tuple[str, ...]
    samples: Mapping[str, int] | None = None

    @property
    def command(self) -> str:
        return COMMANDS[self.stage]


def finished_stages(paths: RunPaths) -> tuple[FinishedStage, ...]:
    """The stages that are done and whose files are all there, in the order of a run.

    Raises:
        UserError: a marker is damaged.
    """
    markers = [read_marker(path) for stage in COMMANDS if (path := paths.marker(stage)).is_file()]
    return tuple(marker for marker in markers if all((paths.root / file).exists() for file in marker.files))


def read_marker(path: Path) -> FinishedStage:
    try:
        return TypeAdapter(FinishedStage).validate_python(read_json(path, "stage marker"))
    except ValidationError as error:
        fault = error.errors()[0]
        reason = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise UserError(f"{path}: not a valid stage marker ({reason}). Fix: delete it and run again") from error


def missing(
    settings: Mapping[str, Any], finished: Iterable[FinishedStage], results: Sequence[Result], logged_steps: int
) -> tuple[str, ...]:
    """The stages that the recipe requests and that are not done, in the order of a run; of a begun one, how far it is.

    Whether an evaluation is done follows from its scores: a recipe may have further ones since the stage was finished.
    """
    done = {stage.stage for stage in finished}
    hybrid, found = settings["hybrid"], []
    if "profile" not in done and any(name in SCORED for name in (hybrid["strategy"], *hybrid.get("compare", ()))):
        found.append("profile")
    if "hybrid" not in done:
        found.append("convert")
    if "train" not in done and settings.get("train") is not None:
        found.append(f"train (logged up to step {logged_steps:,})" if logged_steps else "train")
    unscored = without_scores(settings, results)
    if unscored:
        found.append(f"eval ({', '.join(unscored)})")
    if "export" not in done and settings["hybrid"].get("select") != PER_PROMPT:
        found.append("export")
    return tuple(found)


def without_scores(settings: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    """The evaluations of variants that have no scores: "ledger of trained" and the like."""
    scored = {(result.evaluation, result.variant) for result in results}
    compared = [converted_by(strategy) for strategy in settings["hybrid"].get("compare", ())]
    return [
        f"{eval_config['name']} of {variant}"
        for eval_config in settings["eval"]
        for variant in (*eval_config["variants"], *(compared if CONVERTED in eval_config["variants"] else ()))
        if (eval_config["name"], variant) not in scored
    ]


def described(folder: Path, finished: Sequence[FinishedStage], missing_stages: Sequence[str]) -> str:
    """One sentence about an unfinished run: what is done, what is missing, and the command that resumes it."""
    done = ", ".join(stage.command for stage in finished) or "nothing"
    root = "" if folder.parent == Path("runs") else f" --runs {folder.parent}"
    return f"not finished. Done: {done}. Missing: {', '.join(missing_stages)}. Resume: lt-train run {RunPaths(folder).recipe}{root}"
