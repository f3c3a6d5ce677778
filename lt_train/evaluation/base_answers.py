"""The base's final hidden states on held-out answers, kept on disk between the models that are compared with it: at 32 B
parameters the states of 64 answers of 20K tokens are 13 GB in bf16.

Legend: H hidden size, A answer tokens, V vocabulary.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lt_train.dataset.examples import Example
from lt_train.inference.answer_hidden_states import answer_states


class BaseAnswers:
    """The final hidden states that predict the answer tokens of some examples, and the language-model head that reads them; the
    base's weights need not stay in memory.

    The states are in a file without a name: the system frees its space when it is closed, or when this process dies, however it
    does.

    Attributes:
        head_VH: weights of the head, on the CPU.
    """

    def __init__(self, head_VH: torch.Tensor, folder: Path) -> None:
        """`folder`: on the disk to write to."""
        folder.mkdir(parents=True, exist_ok=True)
        self.head_VH = head_VH
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this)
        self._places: dict[str, tuple[int, torch.Size]] = {}

    def add(self, example: Example, states_AH: torch.Tensor) -> None:
        self._places[example.id] = self._file.tell(), states_AH.shape
        self._file.write(_bytes_of(states_AH.to("cpu", self.head_VH.dtype).contiguous()))

    def states(self, example: Example) -> torch.Tensor:
        """(A, H), on the CPU."""
        place, shape = self._places[example.id]
        states_AH = torch.empty(shape, dtype=self.head_VH.dtype)
        self._file.seek(place)
        self._file.readinto(_bytes_of(states_AH))
        return states_AH

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()


@torch.inference_mode()
def base_answers(base: PreTrainedModel, examples: Sequence[Example], batch_size: int, folder: Path) -> BaseAnswers:
    """Run the base on all examples, a batch in memory at a time; its states are written to a file without a name in `folder`.

    Raises:
        UserError: an example exceeds the model's context.
        OSError: the disk is full.
    """
    answers = BaseAnswers(base.lm_head.weight.detach().to("cpu", copy=True), folder)
    for batch, hidden_AH in answer_states(base, examples, batch_size):
        for example, states_AH in zip(batch, hidden_AH.split([len(example.answer_ids) for example in batch]), strict=True):
            answers.add(example, states_AH)
    return answers


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
