"""Valid checkpoints: their manifest, the one a run resumes from, and the rotation of the others.

Trainer writes a checkpoint file by file, so a killed process leaves a folder that looks like a checkpoint. `manifest.json` is
written last and atomically, after all other files are on disk: a checkpoint is valid only if its manifest matches its files. The
manifest also records the settings and data of the training, so that a run with others never resumes from the checkpoint.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, set_aside, write_json
from lt_train.runtime.fingerprints import check_same, sampled_file_hash
from lt_train.runtime.run_paths import MANIFEST

Settings = dict[str, Any]  # flat: dotted name of a setting → its value, as JSON represents it


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    step: int
    settings: Settings  # of the training


def last_valid_checkpoint(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, or None. Newer invalid ones are reported and renamed, not deleted."""
    for candidate in reversed(_checkpoint_folders(folder)):
        fault = fault_of(candidate)
        if fault is None:
            return read_checkpoint(candidate)
        aside = _set_aside(candidate)
        report(f"{candidate}: not a valid checkpoint ({fault}): skipped and renamed to {aside.name}")
    return None


def valid_final(final: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The finished training in `final`, or None if there is none; an invalid one is reported and renamed."""
    if not final.exists():
        return None
    fault = fault_of(final)
    if fault is None:
        return read_checkpoint(final)
    report(f"{final}: not a valid checkpoint ({fault}): renamed to {_set_aside(final).name} and written again")
    return None


def fault_of(folder: Path) -> str | None:
    """Why `folder` is not a valid checkpoint, or None if it is one."""
    if not (folder / MANIFEST).is_file():
        return f"no {MANIFEST}: the process that wrote it was killed"
    try:
        files = read_json(folder / MANIFEST, "checkpoint manifest")["files"]
    except UserError as error:
        return str(error)
    for name, recorded in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != recorded["size"]:
            return f"{name} has {size} bytes instead of {recorded['size']}"
        if sampled_file_hash(folder / name) != recorded["sha256_of_blocks"]:
            return f"the content of {name} changed after it was saved"
    return None


def finished_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` with a manifest, oldest first; their files are not checked."""
    return [found for found in _checkpoint_folders(folder) if (found / MANIFEST).is_file()]


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(finished_checkpoints(folder)), None)


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def read_checkpoint(folder: Path) -> Checkpoint:
    manifest = read_json(folder / MANIFEST, "checkpoint manifest")
    return Checkpoint(folder, manifest["step"], manifest["settings"])


def write_manifest(folder: Path, step: int, settings: Settings) -> None:
    """Mark `folder` as valid. Call it after every process has written its files."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())  # before a power failure, no file may be less durable than the manifest
        files[name] = {"size": (folder / name).stat().st_size, "sha256_of_blocks": sampled_file_hash(folder / name)}
    write_json(folder / MANIFEST, {"step": step, "settings": settings, "files": files})


@contextmanager
def reporting_write_errors(out: Path, what: str, step: int | None = None) -> Iterator[None]:
    """Turn a failure to write `what` in the block, such as on a full disk, into an error that names the checkpoint to resume from.

    Args:
        out: the folder of the checkpoints. step: of the checkpoint that the block writes; after a failure its files are deleted,
            because they are useless and use disk space.

    Raises:
        UserError: the operating system, safetensors or torch cannot write.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_torch_writing(error):
            raise
        if step is not None:
            shutil.rmtree(checkpoint_folder(out, step), ignore_errors=True)
        kept = newest_checkpoint(out)
        resumes = f"resumes from {kept}, which is valid" if kept else "starts from the beginning"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise UserError(
            f"{out}: {what} could not be written: {reason} ({shutil.disk_usage(out).free / 2**20:,.0f} MiB are free now). "
            f"Fix: free disk space and run the same command again; it {resumes}. "
            "train.keep_checkpoints, train.keep_best and train.probes set how much a training keeps"
        ) from error


def _is_torch_writing(error: RuntimeError) -> bool:
    """torch.save has no exception class of its own: a full disk is a failed check in caffe2/serialize/inline_container.cc."""
    return any(text in str(error) for text in ("inline_container", "PytorchStreamWriter", "iostream error"))


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. Call it after the newest one has its manifest."""
    for old in _checkpoint_folders(folder)[:-keep]:
        (old / MANIFEST).unlink(missing_ok=True)  # first: a partly deleted checkpoint must not be valid
        shutil.rmtree(old)


def check_same_settings(found: Checkpoint, settings: Settings) -> None:
    """Raise a UserError that names every setting in which `found` differs from what is requested now."""
    check_same(
        found.settings,
        settings,
        f"{found.folder}: trained with other settings, so resuming would mix two trainings",
        "restore the old settings, or train into another run folder (another name)",
    )


def publish_weights(checkpoint: Checkpoint, final: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write the weights, configs and tokenizer of `checkpoint`, without the trainer's state, to the folder `final`.

    `notes` are JSON files to write with them, by name. The folder appears atomically, with its manifest. Files are hard links where
    the file system supports them, so that a large model is not stored twice.
    """
    unfinished = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in sorted(checkpoint.folder.iterdir()):
        if file.is_file() and not _belongs_to_the_trainer(file.name):
            _link_or_copy(file, unfinished / file.name)
    for name, content in (notes or {}).items():
        write_json(unfinished / name, content)
    write_manifest(unfinished, checkpoint.step, checkpoint.settings)
    former = final.with_name(f".{final.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        os.replace(final, former)  # after a kill before the next line, the same command publishes again
    os.replace(unfinished, final)
    shutil.rmtree(former, ignore_errors=True)


def _belongs_to_the_trainer(name: str) -> bool:
    """Whether a file of a Trainer checkpoint (transformers/trainer.py, deepspeed's engine) is useless after training."""
    exact = {"optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin", "latest"}
    return name in exact | {MANIFEST, "zero_to_fp32.py", "zero_to_torch.py", "README.md"} or name.startswith("rng_state")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _checkpoint_folders(folder: Path) -> list[Path]:
    """All checkpoint-<step> folders, oldest step first."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir() and _step_of(p) is not None]
    return sorted(found, key=lambda p: _step_of(p) or 0)


def _step_of(folder: Path) -> int | None:
    step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdecimal() else None


def _set_aside(broken: Path) -> Path:
    """Rename an invalid checkpoint, because training will save one at the same step.

    An unfinished one is useless and replaces an earlier one, so that a run that is killed often does not fill the disk. One that
    was valid before is always kept.
    """
    if (broken / MANIFEST).exists():
        return set_aside(broken, broken.with_name(f"damaged-{broken.name}"))
    aside = broken.with_name(f"unfinished-{broken.name.split('-')[0]}")
    shutil.rmtree(aside, ignore_errors=True)
    return broken.rename(aside)
