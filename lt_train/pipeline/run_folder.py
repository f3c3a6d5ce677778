"""The folder of a run: which recipe it was begun with, which stages are done, and that one process at a time works in it."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from lt_train.pipeline.keys import compared_when_trained
from lt_train.pipeline.old_markers import MARKER_FORMAT, bring_up_to_date
from lt_train.recipe.loading import recorded_recipe, resolved_yaml
from lt_train.recipe.schema import Recipe, settings_that_may_change
from lt_train.runtime.errors import UserError, more, shortened
from lt_train.runtime.files import read_json, remove_abandoned, write_json, write_text
from lt_train.runtime.fingerprints import check_same, data_fingerprint, file_hash, hash_of, model_fingerprint, weights_fingerprint
from lt_train.runtime.processes import wait_until
from lt_train.runtime.run_paths import RunPaths
from lt_train.runtime.text_files import text_files

_AUTO_DTYPE = "model.dtype: auto"
"""In the record of a run's inputs: what it means on the machines where the run computes. Runs of earlier versions lack it."""

_WEIGHTS = "model.base: weights"
"""In the record of a run's inputs. Runs of earlier versions lack it."""

SECONDS_TO_BEGIN = 300.0
"""In which the first process of a launch begins the folder, after another one has read the same inputs."""

SECONDS_TO_AGREE = 60.0
"""In which what the first process has written reaches the other machines; an earlier launch may have left something else."""

PACKAGES = ("lt-train", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


class RunFolder:
    """runs/<name>/. The process that works in it calls `begin`; the other ranks `join`, and only read it."""

    def __init__(self, recipe: Recipe, root: Path = Path("runs")) -> None:
        self.recipe = recipe
        self.paths = RunPaths(root / recipe.name)

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Claim the folder for this recipe and this process.

        Raises:
            UserError: the folder cannot be made or written to, another process works in it, or a stage has left something made
                with another recipe, model or data.
        """
        with self._opened_lock() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.paths.root}: another lt-train is working in this folder. Fix: wait for it, or stop it"
                ) from error
            remove_abandoned(self.paths.root)
            inputs = self._inputs_now()
            if self._is_begun():
                self._check_recipe()
                inputs = self._checked_inputs(inputs)
            write_json(self.paths.inputs, inputs)
            write_text(self.paths.recipe, resolved_yaml(self.recipe))
            yield

    def announce(self) -> None:
        """Let the other processes of this launch begin; call it in the first one, inside `begin`."""
        write_json(self.paths.launch, package_versions())

    def join(self) -> None:
        """Wait until the first process of this launch has begun the folder. Call it in the other ones.

        Raises:
            UserError: it does not within SECONDS_TO_BEGIN, because the folder is not that of the first process, or recipe, base,
                data or packages of this machine are not those of the first process.
        """
        inputs, packages = self._inputs_now(), package_versions()
        if not wait_until(self.paths.launch.exists, SECONDS_TO_BEGIN):
            raise UserError(
                f"{self.paths.root.absolute()}: the first process does not work in this folder. "
                "Fix: let --runs name a folder that all machines share"
            )

        def agrees() -> bool:
            with suppress(UserError):
                self._check_agreement(inputs, packages)
                return True
            return False

        if not wait_until(agrees, SECONDS_TO_AGREE):
            self._check_agreement(inputs, packages)

    def _check_agreement(self, inputs: Mapping[str, str], packages: Mapping[str, str]) -> None:
        of_first = read_json(self.paths.launch, "record of a launch")
        begun = read_json(self.paths.inputs, "record of a run's inputs")
        compared = {
            "packages": (of_first, packages),
            "recipe": (self._begun_recipe().model_dump(), self.recipe.model_dump()),
            "base or data": ({name: begun.get(name) for name in inputs}, inputs),
        }
        for what, (there, here) in compared.items():
            check_same(
                there,
                here,
                f"{what}: this machine has others than that of the first process",
                "let all machines of a launch have the same, under the names in the recipe",
            )

    def _opened_lock(self) -> TextIO:
        try:
            self.paths.root.mkdir(parents=True, exist_ok=True)
            return open(self.paths.lock, "w")
        except OSError as error:
            raise UserError(
                f"--runs: {shortened(str(error.filename), 300)}: {error.strerror}, so the run's folder "
                f"{shortened(self.paths.root.name)} cannot be made or written to. Fix: name a folder that this user may write to"
            ) from error

    def check_auto_dtype(self, dtype: str) -> None:
        """Record `dtype`, which `model.dtype: auto` means on this machine, when the run computes for the first time.

        Raises:
            UserError: the run has computed in another dtype, on another machine.
        """
        inputs = read_json(self.paths.inputs, "record of a run's inputs")
        before = inputs.get(_AUTO_DTYPE)
        if before is None:
            write_json(self.paths.inputs, inputs | {_AUTO_DTYPE: dtype})
        elif before != dtype:
            raise UserError(
                f"{self.paths.root}: model.dtype: auto: it is {dtype} on this machine and was {before} when this run was begun, so "
                f"results of both dtypes would be in one table. Fix: resume on a machine where it is {before}, or give this "
                "recipe another name (--set name=…)"
            )

    def is_done(self, stage: str, key: str = "") -> bool:
        """Whether the stage was finished, for this `key` (a hash of what else it depends on), and all that it left is there.

        So a file that was deleted, as an error requests, is made again.
        """
        if not self.paths.marker(stage).exists():
            return False
        marker = self.marker(stage)
        return marker.get("key") == key and all((self.paths.root / name).exists() for name in marker.get("files", []))

    def is_marked(self, stage: str) -> bool:
        """Whether the stage was finished once, for whatever key, and something of it is there."""
        return self.paths.marker(stage).exists() and self.paths.stage(stage).exists()

    def marker(self, stage: str) -> dict[str, Any]:
        return read_json(self.paths.marker(stage), "stage marker")

    @contextmanager
    def doing(self, stage: str, key: str = "", **notes: Any) -> Iterator[None]:
        """Mark the stage as done when the block ends without an error; the marker has the `notes`."""
        started = time.monotonic()
        yield
        marker = {
            "format": MARKER_FORMAT,
            "stage": stage,
            "key": key,
            **notes,
            "files": self._files(stage),
            "seconds": round(time.monotonic() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": package_versions(),
        }
        write_json(self.paths.marker(stage), marker)

    def note(self, stage: str, **notes: Any) -> None:
        """Add to the marker of a finished stage what was done with its result."""
        write_json(self.paths.marker(stage), self.marker(stage) | notes)

    def _files(self, stage: str) -> list[str]:
        """The files that the stage left, without hidden ones, which other processes have not finished."""
        found = [path for path in self.paths.stage(stage).rglob("*") if path.is_file() and not path.name.startswith(".")]
        return sorted(str(path.relative_to(self.paths.root)) for path in found)

    def _is_begun(self) -> bool:
        """Whether a stage has left anything. A run that was refused before that may start again with a corrected recipe."""
        root = self.paths.root
        made = {path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")}
        before_any_stage = {self.paths.recipe, self.paths.inputs, *self.paths.data.rglob("*")}
        return bool(made - before_any_stage)

    def _check_recipe(self) -> None:
        if not self.paths.recipe.exists():
            return
        begun = self._begun_recipe()
        if begun.name != self.recipe.name:  # "give it another name" is what somebody has just done
            raise UserError(
                f"{self.paths.root}: it is the run {begun.name!r}, whose folder was renamed or copied. Fix: resume it as "
                f"{begun.name!r}, in the folder {self.paths.root.with_name(begun.name)}; begin a new run under a name that has no "
                "folder yet"
            )
        check_same(
            begun.model_dump(),
            self.recipe.model_dump(),
            f"{self.paths.root}: this run was begun with another recipe",
            "give this recipe another name (--set name=…), or delete that folder"
            + more("the-runs-folder-belongs-to-another-recipe"),
            may_differ=settings_that_may_change(),
        )
        bring_up_to_date(self.paths, begun)
        if begun.hybrid.compare != self.recipe.hybrid.compare and self.is_marked("train"):
            self.note("train", compare=list(compared_when_trained(self.paths, begun)))

    def _begun_recipe(self) -> Recipe:
        path = self.paths.recipe
        try:
            return recorded_recipe(path.read_text(encoding="utf-8"))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path}: not the record of a run ({reason}). Fix: move {self.paths.root} away, or give this run another name"
            ) from error

    def _checked_inputs(self, now: dict[str, str]) -> dict[str, str]:
        """The run's record of its inputs, which are the present ones."""
        if not self.paths.inputs.exists():
            return now
        begun = read_json(self.paths.inputs, "record of a run's inputs")
        changed = [name for name in now if begun.get(name) != now[name] and (name in begun or name != _WEIGHTS)]
        if changed:
            settings = dict.fromkeys(name.partition(":")[0] for name in changed)
            raise UserError(
                f"{self.paths.root}: {' and '.join(settings)} changed since this run was begun, so its results would mix two. "
                "Fix: give this recipe another name (--set name=…), or delete that folder"
            )
        return begun | now

    def _inputs_now(self) -> dict[str, str]:
        inputs = _base_now(self.recipe)
        if self.recipe.data.source is not None:
            inputs["data.source"] = data_fingerprint(self.recipe.data.source)
        if (texts := self.recipe.hybrid.calibration.source) is not None:
            inputs["hybrid.calibration.source"] = hash_of(*map(file_hash, text_files(texts)))
        return inputs


def _base_now(recipe: Recipe) -> dict[str, str]:
    base = {"model.base": model_fingerprint(recipe.model.base, recipe.model.revision)}
    weights = weights_fingerprint(recipe.model.base)
    return base if weights is None else {**base, _WEIGHTS: weights}


def check_same_base(paths: RunPaths, recipe: Recipe) -> None:
    """Of a run that is read without `begin`.

    Raises:
        UserError: another model is now where the base of the run was.
    """
    begun = read_json(paths.inputs, "record of a run's inputs") if paths.inputs.exists() else {}
    if any(begun.get(name, value) != value for name, value in _base_now(recipe).items()):
        raise UserError(
            f"{paths.root}: model.base: {recipe.model.base}: another model than the one that this run was begun with. "
            "Fix: put that back, or name the run's export, which needs no base"
        )


@cache
def package_versions() -> Mapping[str, str]:
    """Versions of PACKAGES. What a process has imported stays as it is."""
    return {package: version(package) for package in PACKAGES}


def recipe_of(paths: RunPaths) -> Recipe:
    """The recipe that a run was begun with.

    Raises:
        UserError: the folder is no run.
    """
    if not paths.recipe.is_file():
        what = f"no run: there is no {paths.recipe.name}" if paths.root.is_dir() else "no such folder"
        raise UserError(f"{paths.root}: {what}. Fix: name the folder of a run, runs/<name>")
    try:
        return recorded_recipe(paths.recipe.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{paths.recipe}: not the record of a run ({reason}). Fix: name the folder of a run, runs/<name>"
        ) from error
