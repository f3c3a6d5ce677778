"""A teacher on disk: for each answer token of the training data its k most likely tokens, and the probability of all others.

The files are written before training, a batch of examples at a time; `progress.json` counts the complete examples, so a killed
writer resumes there. Training finds a document by its tokens, in any pack and any order.

Legend: A answer tokens, H hidden size, V vocab_size, K tokens kept.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from lt_train.dataset.examples import IGNORED, Example, lengths, longest_first, prompt_lengths
from lt_train.hybrid.documents import find_documents
from lt_train.inference.answer_hidden_states import answer_states
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import read_json, write_json
from lt_train.runtime.fingerprints import check_same
from lt_train.runtime.progress import show_progress

LOGITS_AT_ONCE = 2**26
"""Logits in memory at a time: 256 MB in fp32."""

TeacherFingerprint = dict[str, str | int | float]
"""What the content of the files depends on, by name."""

TopK = tuple[Tensor, Tensor, Tensor]
"""For A answer tokens: indices (A, K), their log-probabilities (A, K), the log-probability of all other tokens together (A)."""


class TopKDivergence(torch.autograd.Function):
    """KL(teacher || student) in nats, summed over answer tokens, where all tokens that the teacher did not keep are one outcome.

    It is a lower bound of the full divergence (log-sum inequality), and equal to it for K = V. It is 0 only if the student agrees
    on the probability of every kept token. Logits and gradients are computed a chunk of tokens at a time, as in Liger's fused
    losses (arXiv 2410.10989): the backward pass needs no tensor of size A x V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_AH: Tensor,
        weight_VH: Tensor,
        indices_AK: Tensor,
        log_probs_AK: Tensor,
        rest_A: Tensor,
        temperature: float,
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with torch.no_grad(), maybe_gather_lm_head_ctx(weight_VH):
            total = torch.zeros((), dtype=torch.float32, device=hidden_AH.device)
            grad_hidden = torch.zeros_like(hidden_AH, dtype=torch.float32) if needs_hidden else None
            grad_weight = torch.zeros(weight_VH.shape, dtype=torch.float32, device=hidden_AH.device) if needs_weight else None
            chunk = max(1, LOGITS_AT_ONCE // len(weight_VH))
            for start in range(0, len(hidden_AH), chunk):
                part = slice(start, start + chunk)
                log_q_AV = logits(hidden_AH[part], weight_VH).div_(temperature).log_softmax(-1)
                nats, grad_AV = _divergence(log_q_AV, indices_AK[part], log_probs_AK[part], rest_A[part])
                total += nats
                grad_AV /= temperature
                if grad_hidden is not None:
                    grad_hidden[part] = grad_AV @ weight_VH.float()
                if grad_weight is not None:
                    grad_weight += grad_AV.t() @ hidden_AH[part].float()
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.to(hidden_AH.dtype),
            None if grad_weight is None else grad_weight.to(weight_VH.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if gradient is None else gradient * grad_output.to(gradient.dtype) for gradient in ctx.saved_tensors]
        return (*scaled, None, None, None, None)


def _divergence(log_q_AV: Tensor, indices_AK: Tensor, log_p_AK: Tensor, log_rest_A: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of KL over all rows, and its gradient (A, V) by the student's softened logits: q - p, where the teacher's rest is
    distributed over the other tokens in the student's proportions.
    """
    log_q_AK = log_q_AV.gather(1, indices_AK)
    others_AV = log_q_AV.scatter(1, indices_AK, -torch.inf)
    log_q_rest_A = others_AV.logsumexp(-1)
    kept_AK, rest_A = log_p_AK.exp() * (log_p_AK - log_q_AK), log_rest_A.exp() * (log_rest_A - log_q_rest_A)
    has_rest_A = log_rest_A > -torch.inf  # else every token was kept
    total = kept_AK.sum() + rest_A[has_rest_A].sum()
    scale_A = torch.where(has_rest_A, log_rest_A - log_q_rest_A, -torch.inf)
    target_AV = (others_AV + scale_A[:, None]).exp().scatter(1, indices_AK, log_p_AK.exp())
    return total, log_q_AV.exp() - target_AV


def logits(hidden_AH: Tensor, weight_VH: Tensor) -> Tensor:
    """Logits (A, V) in fp32: rounded to bf16, large ones would be off by a hundredth."""
    with torch.autocast(hidden_AH.device.type, enabled=False):
        if hidden_AH.is_cuda and weight_VH.dtype == torch.bfloat16:
            return torch.mm(hidden_AH.to(weight_VH.dtype), weight_VH.t(), out_dtype=torch.float32)
        return linear(hidden_AH.float(), weight_VH.float())


@torch.inference_mode()
def top_k_of(hidden_AH: Tensor, weight_VH: Tensor, k: int, temperature: float) -> TopK:
    """The k most likely tokens of each row, on the CPU."""
    chunk = max(1, LOGITS_AT_ONCE // len(weight_VH))
    parts = []
    for hidden in hidden_AH.split(chunk):
        log_p_AV = logits(hidden, weight_VH).div_(temperature).log_softmax(-1)
        kept_AK, indices_AK = log_p_AV.topk(k)
        rest_A = log_p_AV.scatter_(1, indices_AK, -torch.inf).logsumexp(-1)
        parts.append((indices_AK.cpu(), kept_AK.cpu(), rest_A.cpu()))
    indices, kept, rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return indices, kept, rest


@dataclass(frozen=True)
class StoredTopK:
    """The files of one teacher, opened for reading by `open_top_k`."""

    temperature: float
    indices_AK: np.ndarray
    log_probs_AK: np.ndarray
    rest_A: np.ndarray
    rows: dict[bytes, slice]  # a document's digest → its answer tokens

    def of_batch(self, inputs: dict[str, Any]) -> TopK:
        """The answer tokens of a batch as TRL's collator makes it, padded or packed, in reading order; on the CPU.

        Raises:
            UserError: the files have no targets for a document of the batch.
        """
        ids_BT, labels_BT = inputs["input_ids"].cpu(), inputs["labels"].cpu()
        mask_BT, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
        found = []
        rows, columns = ids_BT.shape
        for row, first, length in find_documents(rows, columns, ids_BT.device, mask_BT, position_ids).spans:
            span = slice(first, first + length)
            key = _digest(ids_BT[row, span].numpy(), labels_BT[row, span].numpy())
            if key not in self.rows:
                raise UserError(
                    "train.distill.teacher: top_k: a document of the batch is not in the teacher's files. "
                    "Fix: delete the teacher's folder and run lt-train teacher RECIPE"
                )
            found.append(self.rows[key])
        parts = [[torch.from_numpy(np.array(table[rows])) for rows in found] for table in self._tables]
        indices, kept, rest = (torch.cat(part) for part in parts)
        return indices.long(), kept, rest

    @property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.indices_AK, self.log_probs_AK, self.rest_A


def write_top_k(
    teacher: PreTrainedModel,
    examples: Sequence[Example],
    folder: Path,
    *,
    k: int,
    temperature: float,
    fingerprint: TeacherFingerprint,
    batch_size: int,
    progress: bool = True,
) -> None:
    """Write a teacher's files, or the missing part of them.

    Args:
        teacher: the base with full attention in every layer.
        fingerprint: what the log-probabilities depend on besides k and temperature: the model and the data.

    Raises:
        UserError: `folder` holds another teacher's files, k is larger than vocab_size, or an example exceeds the model's context.
    """
    weight_VH = teacher.lm_head.weight
    if k > len(weight_VH):
        raise UserError(f"train.distill.top_k: {k}: above the model's vocab_size. Fix: set at most {len(weight_VH)}")
    fingerprint = {**fingerprint, "k": k, "temperature": temperature}
    done = _examples_done(folder, fingerprint)
    longest = longest_first(examples)
    if done == len(examples):
        return
    tables = _tables(folder, _rows(longest), k, new=done == 0)
    at = _rows(longest[:done])
    with show_progress("teacher", total=len(examples), done=done, shown=progress) as bar:
        for batch, hidden_AH in answer_states(teacher, longest[done:], batch_size):
            for table, values in zip(tables, top_k_of(hidden_AH, weight_VH, k, temperature), strict=True):
                table[at : at + len(hidden_AH)] = values.numpy()
                table.flush()
            at, done = at + len(hidden_AH), done + len(batch)
            write_json(folder / "progress.json", {"examples": done, **fingerprint})
            bar.update(done)


def open_top_k(
    folder: Path, examples: Sequence[Example], k: int, temperature: float, fingerprint: TeacherFingerprint
) -> StoredTopK:
    """
    Raises:
        UserError: the files are missing, incomplete, or of another model, other data or settings.
    """
    done = _examples_done(folder, {**fingerprint, "k": k, "temperature": temperature})
    if done < len(examples):
        raise UserError(
            f"{folder}: the teacher's log-probabilities are written for {done:,} of {len(examples):,} examples. "
            "Fix: write the others with lt-train teacher RECIPE, which resumes"
        )
    longest = longest_first(examples)
    rows, at = {}, 0
    for example in longest:
        end = at + len(example.answer_ids)
        rows[_digest(np.array(example.input_ids), np.array(example.labels))] = slice(at, end)
        at = end
    return StoredTopK(temperature, *_tables(folder, at, k, new=False), rows)


def _examples_done(folder: Path, fingerprint: TeacherFingerprint) -> int:
    path = folder / "progress.json"
    if not path.exists():
        return 0
    found = read_json(path, "progress of a teacher")
    done = found.pop("examples", 0)
    recorded = {name: found.get(name) for name in fingerprint}
    check_same(recorded, fingerprint, f"{folder}: written with another teacher", "delete the folder to write it again")
    return done


def _tables(folder: Path, rows: int, k: int, new: bool) -> tuple[np.memmap, np.memmap, np.memmap]:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"indices": (np.int32, (rows, k)), "log_probs": (np.float32, (rows, k)), "rest": (np.float32, (rows,))}
    opened = []
    for name, (dtype, shape) in shapes.items():
        path = folder / f"{name}.npy"
        if new:
            opened.append(np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape))
            continue
        try:
            table = np.lib.format.open_memmap(path, mode="r+")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}). Fix: delete the folder to write it again") from error
        if table.shape != shape:
            raise UserError(f"{path}: shape {table.shape}, not {shape}. Fix: delete the folder to write it again")
        opened.append(table)
    indices, log_probs, rest = opened
    return indices, log_probs, rest


def _rows(examples: Sequence[Example]) -> int:
    return int((lengths(examples) - prompt_lengths(examples)).sum())


def _digest(ids_T: np.ndarray, labels_T: np.ndarray) -> bytes:
    """A hash of a document's tokens and of which tokens are the answer."""
    answer_T = labels_T != IGNORED
    return hashlib.blake2b(ids_T.astype(np.int64).tobytes() + answer_T.tobytes(), digest_size=16).digest()
