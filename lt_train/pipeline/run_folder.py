"""The folder of a run: what it was begun with, which stages are done, and that one process at a time works in it."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path

import yaml

from lt_train.recipe.loading import resolved_yaml
from lt_train.recipe.schema import FREE_IN_TRAINING, Recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json, write_text
from lt_train.runtime.fingerprints import data_fingerprint, differences, model_fingerprint

FREE_TO_CHANGE = {"eval", "sample", "track", "export"}
"""Parts of a recipe that may change in a begun run; their results are told apart by the stages themselves."""

PACKAGES = ("lt-train", "torch", "transformers", "trl", "peft", "datasets", "accelerate")


class RunFolder:
    """runs/<name>/. Open it with `begin` (the process that works in it) or `wait_for` (its fellow ranks)."""

    def __init__(self, recipe: Recipe, root: Path = Path("runs")) -> None:
        self.recipe = recipe
        self.path = root / recipe.name

    def stage(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Claim the folder for this recipe and this process.

        Raises:
            UserError: another process works in it, or a stage has left something made with another recipe, model or data.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path}: another lt-train is working in this folder. Wait for it, or stop it") from error
            inputs = self._inputs_now()
            if self._is_begun():
                self._check_recipe()
                self._check_inputs(inputs)
            write_json(self._inputs, inputs)
            write_text(self.path / "recipe.yaml", resolved_yaml(self.recipe))
            yield

    def is_done(self, stage: str, key: str = "") -> bool:
        """Whether the stage was finished, for this `key` (a hash of what else it depends on), and all that it left is there.

        So what an error asks to delete is made anew.
        """
        marker = self._marker(stage)
        if not marker.exists():
            return False
        facts = read_json(marker, "stage marker")
        return facts.get("key") == key and all((self.path / name).exists() for name in facts.get("files", []))

    def is_marked(self, stage: str) -> bool:
        """Whether the stage was finished once, for whatever key, and something of it is there."""
        return self._marker(stage).exists() and self.stage(stage).exists()

    @contextmanager
    def doing(self, stage: str, key: str = "") -> Iterator[None]:
        """Mark the stage as done when the block ends without an error."""
        started = time.monotonic()
        yield
        facts = {
            "stage": stage,
            "key": key,
            "files": self._files(stage),
            "seconds": round(time.monotonic() - started, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {package: version(package) for package in PACKAGES},
        }
        write_json(self._marker(stage), facts)

    def wait_for(self, stage: str, seconds_between_looks: float = 1.0) -> None:
        """Wait until the main process has finished a stage. If it fails, the launcher ends this process."""
        while not self.is_done(stage):
            time.sleep(seconds_between_looks)

    def _files(self, stage: str) -> list[str]:
        """What the stage left, but for hidden files: those are other processes' half-written ones."""
        found = [path for path in self.stage(stage).rglob("*") if path.is_file() and not path.name.startswith(".")]
        return sorted(str(path.relative_to(self.path)) for path in found)

    def _marker(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _is_begun(self) -> bool:
        """Whether a stage has left anything. A run that was refused before that may start again with a mended recipe."""
        made = [path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return bool({str(path) for path in made} - {"recipe.yaml", "inputs.json"})

    def _check_recipe(self) -> None:
        path = self.path / "recipe.yaml"
        if not path.exists():
            return
        try:
            begun = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable ({error}). Move {self.path} away, or give this run another name") from error
        now = yaml.safe_load(resolved_yaml(self.recipe))
        changed = [line for line in differences(begun, now) if not _is_free(line)]
        if changed:
            listed = "\n  ".join(changed)
            raise UserError(
                f"{self.path}: this run was begun with another recipe (there, now):\n  {listed}\n"
                "Give this recipe another name (--set name=…), or delete that folder"
            )

    def _check_inputs(self, now: dict[str, str]) -> None:
        if not self._inputs.exists():
            return
        begun = read_json(self._inputs, "record of a run's inputs")
        changed = [name for name in now if begun.get(name) != now[name]]
        if changed:
            raise UserError(
                f"{self.path}: {' and '.join(changed)} changed since this run was begun, so its results would mix two. "
                "Give this recipe another name (--set name=…), or delete that folder"
            )

    @property
    def _inputs(self) -> Path:
        return self.path / "inputs.json"

    def _inputs_now(self) -> dict[str, str]:
        return {
            "model.base": model_fingerprint(self.recipe.model.base, self.recipe.model.revision),
            "data.source": data_fingerprint(self.recipe.data.source),
        }


def set_aside(folder: Path) -> Path:
    """Rename a folder to its name with the first free number; returns that."""
    free = next(path for number in count(1) if not (path := folder.with_name(f"{folder.name}-{number}")).exists())
    return folder.rename(free)


def _is_free(difference: str) -> bool:
    """Whether a difference is of a setting that may change in a begun run."""
    setting, *inner = difference.partition(": ")[0].split(".")
    return setting in FREE_TO_CHANGE or (setting == "train" and bool(inner) and inner[0] in FREE_IN_TRAINING)
