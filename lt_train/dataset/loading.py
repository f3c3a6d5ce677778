"""The examples of the recipe's data: tokenized once, kept in a folder, and memory-mapped from there by every process."""

import fcntl
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lt_train import __version__
from lt_train.dataset.examples import ExampleSet, lengths
from lt_train.dataset.store import Inputs, read_examples, write_examples
from lt_train.recipe.schema import Data, Prompt
from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import data_fingerprint, hash_of


def load_examples(
    data: Data,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int,
    seed: int,
    eos_ids: Collection[int] = (),
    folder: Path | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> ExampleSet:
    """Read, render, tokenize, treat what is too long, and set the held-out part aside.

    Args:
        model_max_length: tokens that the model can take (its config's max_position_embeddings).
        eos_ids: tokens besides the tokenizer's eos at which the model stops (generation_config.eos_token_id).
        folder: where the examples are kept. The first process that needs them writes them; all others wait, and read them.
            None: they are held in memory.
        workers: processes that tokenize; None: one for each core.
        progress: show on stderr how many rows are done.

    Raises:
        UserError: faulty rows, counted by kind, with file and line; nothing left, with the counts.
    """
    inputs = _checked(Inputs(data, prompt, tokenizer, tuple(sorted(eos_ids)), seed), model_max_length)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            write_examples(inputs, Path(temporary), workers, progress)
            return read_examples(Path(temporary), in_memory=True)
    kept = folder / fingerprint(inputs)
    with _locked(folder):
        if not kept.is_dir():
            _write_whole(inputs, kept, workers, progress)
    return read_examples(kept)


def training_lengths(
    data: Data,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int,
    seed: int,
    eos_ids: Collection[int],
    folder: Path,
) -> np.ndarray:
    """Tokens of each training example, prompt and answer. Tokenized only where `load_examples` keeps none in `folder`; not kept.

    Raises:
        UserError: see `load_examples`.
    """
    inputs = _checked(Inputs(data, prompt, tokenizer, tuple(sorted(eos_ids)), seed), model_max_length)
    kept = folder / fingerprint(inputs)
    if kept.is_dir():
        return lengths(read_examples(kept).train)
    with tempfile.TemporaryDirectory() as temporary:
        write_examples(inputs, Path(temporary), workers=None, progress=False)
        return lengths(read_examples(Path(temporary)).train)


def _checked(inputs: Inputs, model_max_length: int) -> Inputs:
    check_context(inputs.data, model_max_length)
    return inputs


def check_context(data: Data, model_max_length: int) -> None:
    """
    Raises:
        UserError: samples may be longer than the model's context.
    """
    if data.max_length > model_max_length:
        raise UserError(
            f"data.max_length: {data.max_length} tokens are more than the model's context of {model_max_length}; "
            f"set it to at most {model_max_length}"
        )


def fingerprint(inputs: Inputs) -> str:
    """Equal where the examples are."""
    template, tokenizer = inputs.prompt.chat_template, inputs.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return hash_of(
        __version__,
        inputs.data.model_dump(exclude={"packing"}),
        data_fingerprint(inputs.data.traces),
        inputs.prompt.model_dump(),
        Path(template).read_bytes() if template else tokenizer.chat_template,
        sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str(),
        tokenizer.special_tokens_map,
        inputs.eos_ids,
        inputs.seed,
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_whole(inputs: Inputs, kept: Path, workers: int | None, progress: bool) -> None:
    """Write under another name, and rename: a folder of this name is never half-written. Examples of other settings go."""
    partial = kept.with_name(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_examples(inputs, partial, workers, progress)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for other in kept.parent.iterdir():
        if other.is_dir() and other != partial:
            shutil.rmtree(other)
    partial.rename(kept)
