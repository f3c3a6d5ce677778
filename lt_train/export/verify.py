"""Whether an export computes what the model in memory computes, found by a fresh process that runs the model card's own code.

Both compute in fp32, whatever the export's dtype, so that a window that is off by one shows.

The process loads a copy of its own, so the check needs room for the weights twice in host memory (see room.py). A model on an
accelerator waits in host memory meanwhile, so that the accelerator holds one copy at a time.

Shapes: B rows, T columns, N new tokens, V vocab_size.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lt_train.export import bare_process
from lt_train.export.bare_process import (
    COMPUTED_IN,
    KEPT_COLUMNS,
    NEW_TOKENS,
    CheckRequest,
    Observation,
    computing_in,
    observe,
    probe_ids,
)
from lt_train.export.tolerance import Batch, LogitChanges, any_kernel, check_batches, measure
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.devices import dtype_name
from lt_train.runtime.errors import UserError

STDERR_LINES = 12


@dataclass(frozen=True)
class Check:
    """How far the loaded export is from the model in memory. Manifests of earlier versions lack what has a default.

    Attributes:
        logits_difference: largest absolute difference of a logit; largest_logit: for scale. tolerance: what was allowed.
        tokens: generated greedily and compared. ties: rows that part where the model in memory has two next tokens within the
            tolerance of each other; what follows such a token is not compared.
        rounding, faults: see LogitChanges; only faults that would have been noticed.
    """

    model_class: str
    dtype: str
    logits_difference: float
    largest_logit: float
    tolerance: float
    tokens: int
    ties: int
    rounding: float | None = None
    faults: dict[str, float] = field(default_factory=dict)


def check_export(
    folder: Path,
    code: str,
    model: HybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    dtype: torch.dtype,
    scratch: Path,
) -> Check:
    """Run the model card's code in a bare process, and compare what it computes with the model in memory.

    Args:
        code: Python that loads the files of its working directory, and leaves a `model` and a `tokenizer`.
        model: in `dtype`, as exported. generation: as exported.
        scratch: an empty folder for the files that the two processes exchange.

    Raises:
        UserError: it does not load there, or gives something else.
    """
    batches = check_batches(model.spec, model.config.vocab_size, context_length(model.config.to_dict()))
    with any_kernel(model):
        with computing_in(COMPUTED_IN, model):
            wanted = [observe(model, *batch, generation) for batch in batches]
        measured = measure(model, batches[-1], wanted[-1].logits_BKV)
    device = model.device
    model.to("cpu")
    try:
        found, metadata = _observe_in_a_bare_process(folder, code, batches, device, scratch)
    finally:
        model.to(device)
    if metadata["dtype"] != dtype_name(dtype):
        raise UserError(f"{folder}: {metadata['dtype']}: the export loads in this dtype, not in {dtype}")
    if json.loads(metadata["probe_ids"]) != probe_ids(tokenizer):
        raise UserError(
            f"{folder}: the exported tokenizer, loaded as {metadata['tokenizer_class']}, gives other tokens than the "
            f"{type(tokenizer).__name__} in memory. AutoTokenizer overrules the saved class for some model types (qwen2). "
            "Fix: use the tokenizer that AutoTokenizer loads from the base"
        )
    return compare(folder, batches, wanted, found, measured, metadata)


def compare(
    folder: Path,
    batches: list[Batch],
    wanted: list[Observation],
    found: list[Observation],
    measured: LogitChanges,
    metadata: dict[str, str],
) -> Check:
    """
    Raises:
        UserError: the logits differ by more than the tolerance, or a token differs that is no tie.
    """
    real = [mask[:, -KEPT_COLUMNS:].bool() for _, mask in batches]
    largest = max(seen.logits_BKV[mask].abs().max().item() for seen, mask in zip(wanted, real, strict=True))
    allowed = measured.tolerance
    difference = max(
        (there.logits_BKV - here.logits_BKV)[mask].abs().max().item() for here, there, mask in zip(wanted, found, real, strict=True)
    )
    if not difference <= allowed:  # a NaN fails as well
        faults = "".join(f", {fault} {change:.1e}" for fault, change in measured.faults.items())
        raise UserError(
            f"{folder}: loaded by itself, the export gives other logits than the model in memory: they differ by up to "
            f"{difference:.1e}, allowed are {allowed:.1e} (largest logit {largest:.1f}; rounding makes {measured.rounding:.1e}"
            f"{faults}). Fix: see whether the model was changed in memory after loading, and its config was not"
        )
    agreements = [_agreeing_tokens(folder, here, there, allowed) for here, there in zip(wanted, found, strict=True)]
    return Check(
        model_class=metadata["model_class"],
        dtype=metadata["dtype"],
        logits_difference=difference,
        largest_logit=largest,
        tolerance=allowed,
        tokens=sum(step for rows in agreements for step in rows),
        ties=sum(step < NEW_TOKENS for rows in agreements for step in rows),
        rounding=measured.rounding,
        faults=measured.noticed,
    )


def _agreeing_tokens(folder: Path, wanted: Observation, found: Observation, allowed: float) -> list[int]:
    """The number of equal tokens of each row; NEW_TOKENS where all are."""
    equal = []
    for row, differs_N in enumerate(wanted.sequences_BN != found.sequences_BN):
        step = int(differs_N.nonzero()[0]) if differs_N.any() else NEW_TOKENS
        if step < NEW_TOKENS:
            mine, theirs = int(wanted.sequences_BN[row, step]), int(found.sequences_BN[row, step])
            scores_V = wanted.scores_BNV[row, step]
            gap = (scores_V[mine] - scores_V[theirs]).item()
            if not gap <= 2 * allowed:  # each of the two may be off by what is allowed
                raise UserError(
                    f"{folder}: loaded by itself, the export generates other tokens than the model in memory: token {step} "
                    f"of row {row} is {theirs}, not {mine}, whose logit is higher by {gap:.2e}. Fix: compare its code and config "
                    "with those in memory"
                )
        equal.append(step)
    return equal


def _observe_in_a_bare_process(
    folder: Path, code: str, batches: list[Batch], device: torch.device, scratch: Path
) -> tuple[list[Observation], dict[str, str]]:
    scratch = scratch.absolute()
    request = CheckRequest(
        code=code,
        prompts=str(scratch / "prompts.safetensors"),
        answers=str(scratch / "answers.safetensors"),
        device=str(device),
        threads=torch.get_num_threads(),
        parent=os.getpid(),
    )
    tensors = {f"input_ids.{number}": ids for number, (ids, _) in enumerate(batches)}
    tensors |= {f"attention_mask.{number}": mask for number, (_, mask) in enumerate(batches)}
    save_file(tensors, request.prompts)
    (scratch / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
    _run_bare(scratch, folder)
    return _read_answers(Path(request.answers), len(batches))


def _run_bare(scratch: Path, folder: Path) -> None:
    """Run the script in `folder`, as in its model card; -P keeps the script's own folder off sys.path."""
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    script = Path(bare_process.__file__).absolute()
    run = subprocess.run(
        [sys.executable, "-P", str(script), str(scratch / "request.json")],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if run.returncode != 0:
        last = "\n  ".join(run.stderr.strip().splitlines()[-STDERR_LINES:])
        fix = "see its output" if run.returncode > 0 else f"signal {-run.returncode} ended it; give it memory for the weights twice"
        raise UserError(f"{folder}: the code of its model card fails without lt_train. Fix: {fix}:\n  {last}")


def _read_answers(path: Path, batches: int) -> tuple[list[Observation], dict[str, str]]:
    with safe_open(path, "pt") as file:
        names = Observation.__dataclass_fields__
        seen = [Observation(**{name: file.get_tensor(f"{name}.{number}") for name in names}) for number in range(batches)]
        return seen, file.metadata()
