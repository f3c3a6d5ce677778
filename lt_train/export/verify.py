"""Does an export compute what the model in memory computes? Asked of a fresh process that cannot import lt_train.

The process loads a copy of its own, so an export needs room for the weights twice in host memory. A model on an accelerator waits
in host memory meanwhile, so that the accelerator holds one copy at a time.

Shapes: B rows, T columns, N new tokens, V vocabulary.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lt_train.export import bare_process
from lt_train.export.bare_process import KEPT_COLUMNS, NEW_TOKENS, Observation, Request, observe, probe_ids
from lt_train.export.configs import needs_own_code
from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError

BEYOND_WINDOW = 64  # columns
LARGEST_WINDOW_IN_A_BATCH = 192  # tokens; a longer prompt goes alone, for its logits' sake
STDERR_LINES = 12

Batch = tuple[Tensor, Tensor]
"""(input_ids, attention_mask), both [B, T]."""


@dataclass(frozen=True)
class Check:
    """How far the loaded export is from the model in memory.

    Attributes:
        logits_difference: largest absolute difference of a logit; largest_logit: for scale. tolerance: what was allowed.
        tokens: generated greedily and compared. ties: rows that part where the model in memory has two next tokens within the
            tolerance of each other; what follows such a parting is not compared.
    """

    model_class: str
    dtype: str
    logits_difference: float
    largest_logit: float
    tolerance: float
    tokens: int
    ties: int


def check_export(
    folder: Path, model: HybridForCausalLM, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, dtype: torch.dtype
) -> Check:
    """Load `folder` in a bare process, and compare logits, greedily generated tokens and tokenizer with those in memory.

    Args:
        model: in `dtype`, as exported. generation: as exported.

    Raises:
        UserError: it does not load there, or gives something else.
    """
    batches = check_batches(model.spec, model.config.vocab_size, context_length(model.config.to_dict()))
    wanted = [observe(model, *batch, generation) for batch in batches]
    device = model.device
    model.to("cpu")
    try:
        found, facts = _observe_in_a_bare_process(folder, batches, device, needs_own_code(model.config))
    finally:
        model.to(device)
    if facts["dtype"] != str(dtype).removeprefix("torch."):
        raise UserError(f"{folder}: the export loads in {facts['dtype']}, not in {dtype}")
    if json.loads(facts["probe_ids"]) != probe_ids(tokenizer):
        raise UserError(
            f"{folder}: the exported tokenizer, loaded as {facts['tokenizer_class']}, reads a text otherwise than the "
            f"{type(tokenizer).__name__} in memory. AutoTokenizer overrules the saved class for some model types (qwen2). Nothing "
            "was exported. Use the tokenizer that AutoTokenizer loads from the base"
        )
    return compare(folder, batches, wanted, found, dtype, facts["model_class"], needs_own_code(model.config))


def check_batches(spec: HybridSpec, vocab_size: int, max_positions: int) -> list[Batch]:
    """Seeded random tokens: rows padded on the left, shorter than the sinks, than the window, and longer than both if it can be."""
    longest = max(min(spec.window + BEYOND_WINDOW, max_positions - NEW_TOKENS), 1)
    if spec.window <= LARGEST_WINDOW_IN_A_BATCH:
        lengths = [[1, min(spec.window, longest), longest]]
    else:
        lengths = [[1, 17, min(64, longest)], [longest]]
    generator = torch.Generator().manual_seed(0)
    return [_left_padded(rows, vocab_size, generator) for rows in lengths]


def tolerance(dtype: torch.dtype, largest_logit: float, own_code: bool) -> float:
    """Largest difference of a logit that rounding explains.

    The hybrid's code computes the same twice: 1e-5 in fp32, one rounding step of the largest logit in bf16. A stock class computes
    the same by other kernels, so that the error grows with the logits: 1e-5 of the largest in fp32, 2^-5 in bf16 (its step is
    2^-8, and every layer rounds).
    """
    if dtype == torch.float32:
        return 1e-5 if own_code else 1e-5 * max(1.0, largest_logit)
    return (2**-8 if own_code else 2**-5) * largest_logit


def compare(
    folder: Path,
    batches: list[Batch],
    wanted: list[Observation],
    found: list[Observation],
    dtype: torch.dtype,
    model_class: str,
    own_code: bool,
) -> Check:
    """
    Raises:
        UserError: the logits differ by more than the tolerance, or a token differs that is no tie.
    """
    real = [mask[:, -KEPT_COLUMNS:].bool() for _, mask in batches]
    largest = max(seen.logits_BKV[mask].abs().max().item() for seen, mask in zip(wanted, real, strict=True))
    allowed = tolerance(dtype, largest, own_code)
    difference = max(
        (there.logits_BKV - here.logits_BKV)[mask].abs().max().item() for here, there, mask in zip(wanted, found, real, strict=True)
    )
    if not difference <= allowed:  # a NaN fails as well
        raise UserError(
            f"{folder}: loaded by itself, the export gives other logits than the model in memory: they differ by {difference:.2e}, "
            f"rounding explains {allowed:.2e} (largest logit {largest:.1f}). Nothing was exported. See whether the model was "
            "changed in memory after loading in a way that its config does not say"
        )
    partings = [_partings(folder, here, there, allowed) for here, there in zip(wanted, found, strict=True)]
    return Check(
        model_class=model_class,
        dtype=str(dtype).removeprefix("torch."),
        logits_difference=difference,
        largest_logit=largest,
        tolerance=allowed,
        tokens=sum(step for rows in partings for step in rows),
        ties=sum(step < NEW_TOKENS for rows in partings for step in rows),
    )


def _partings(folder: Path, wanted: Observation, found: Observation, allowed: float) -> list[int]:
    """For each row how many tokens agree; NEW_TOKENS where all do."""
    agreed = []
    for row, differs_N in enumerate(wanted.sequences_BN != found.sequences_BN):
        step = int(differs_N.nonzero()[0]) if differs_N.any() else NEW_TOKENS
        if step < NEW_TOKENS:
            mine, theirs = int(wanted.sequences_BN[row, step]), int(found.sequences_BN[row, step])
            scores_V = wanted.scores_BNV[row, step]
            gap = (scores_V[mine] - scores_V[theirs]).item()
            if not gap <= 2 * allowed:  # each of the two may be off by what is allowed
                raise UserError(
                    f"{folder}: loaded by itself, the export generates other tokens than the model in memory: token {step} "
                    f"of row {row} is {theirs}, not {mine}, whose logit is higher by {gap:.2e}. Nothing was exported"
                )
        agreed.append(step)
    return agreed


def _left_padded(lengths: list[int], vocab_size: int, generator: torch.Generator) -> Batch:
    columns = torch.arange(max(lengths))
    mask = (columns[None] >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return torch.randint(vocab_size, mask.shape, generator=generator) * mask, mask


def _observe_in_a_bare_process(
    folder: Path, batches: list[Batch], device: torch.device, own_code: bool
) -> tuple[list[Observation], dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="lt_train_export_check_") as name:
        scratch = Path(name)
        request = Request(
            folder=str(folder.absolute()),
            prompts=str(scratch / "prompts.safetensors"),
            answers=str(scratch / "answers.safetensors"),
            device=str(device),
            threads=torch.get_num_threads(),
            own_code=own_code,
        )
        tensors = {f"input_ids.{number}": ids for number, (ids, _) in enumerate(batches)}
        tensors |= {f"attention_mask.{number}": mask for number, (_, mask) in enumerate(batches)}
        save_file(tensors, request.prompts)
        (scratch / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        _run_bare(scratch, folder)
        return _read_answers(Path(request.answers), len(batches))


def _run_bare(scratch: Path, folder: Path) -> None:
    """-P and the scratch folder as working directory keep source trees off sys.path; the script itself bars lt_train."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    script = Path(bare_process.__file__).absolute()
    run = subprocess.run(
        [sys.executable, "-P", str(script), str(scratch / "request.json")],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if run.returncode != 0:
        last = "\n  ".join(run.stderr.strip().splitlines()[-STDERR_LINES:])
        ended = f"killed by signal {-run.returncode}; is there memory for the weights twice?" if run.returncode < 0 else "it said"
        raise UserError(
            f"{folder}: the export does not load in a process without lt_train, so nothing was exported. {ended}:\n  {last}"
        )


def _read_answers(path: Path, batches: int) -> tuple[list[Observation], dict[str, str]]:
    with safe_open(path, "pt") as file:
        names = Observation.__dataclass_fields__
        seen = [Observation(**{name: file.get_tensor(f"{name}.{number}") for name in names}) for number in range(batches)]
        return seen, file.metadata()
