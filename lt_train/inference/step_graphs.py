"""Decoding steps as CUDA graphs: a GPU starts the kernels of a whole step by itself, where Python is slower than most of them.

A graph reads its inputs from tensors that stay, and computes for one number of sequences, one number of new tokens of each, and
the model or its draft.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import AttentionView
from lt_train.inference.block_attention import obstacle
from lt_train.inference.key_blocks import KeyBlocks, most_blocks
from lt_train.inference.kv_store import KVStore, PagedLayer, RingLayer
from lt_train.inference.views import Kind, StepIndices, StepView, kind_of

Forward = Callable[[Tensor, AttentionView, Tensor], Tensor]
"""Token ids [B, T], a view and positions [B, T] to hidden states [B, T, D]."""
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""From a computation what repeats it."""

STEPS_BEFORE_CAPTURE = 32
"""Steps of a kind that Python runs first: as capturing takes as long as some ten of a large model, and more of a small one, answers
that are short do not pay for what they hardly use."""
MOST_GRAPHS = 64


def obstacle_to_graphs(model: HybridForCausalLM) -> str | None:
    """Why Python runs each step; None where graphs may."""
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type != "cuda" for device in devices):
        return "the model is not on a GPU"
    if len(devices) > 1:
        return "the model is spread over several GPUs"
    return obstacle(*devices, model.dtype)


class StepGraphs:
    """The graphs of one store.

    Attributes:
        captured: by sequences, tokens of each, and whether the draft computes; the latest used is the last.
        failure: why steps of this model cannot be captured, in torch's words; None where none failed.
    """

    def __init__(self, store: KVStore, forward: Forward, capture: Capture | None = None) -> None:
        self.store = store
        self.forward = forward
        self.capture = capture or in_one_pool(store.layers[0][0].model.device)
        self.failure: str | None = None
        self._steps: Counter[tuple[int, int, bool]] = Counter()
        self.captured: dict[tuple[int, int, bool], CapturedStep] = {}

    def hidden(self, ids_BT: Sequence[Sequence[int]], first: Sequence[int], drafts: bool) -> Tensor | None:
        """Hidden states [B, T, D] of new tokens, which stay until the next step; None where Python must run this step.

        Args:
            first: the position of the first new token of each sequence.
        """
        kind = len(ids_BT), len(ids_BT[0]), drafts
        self._steps[kind] += 1
        if self.failure is not None or self._steps[kind] <= STEPS_BEFORE_CAPTURE:
            return None
        step = self.captured.pop(kind, None)
        if step is None:
            if len(self.captured) >= MOST_GRAPHS:
                del self.captured[next(iter(self.captured))]
            try:
                step = CapturedStep(self.store, self.forward, self.capture, ids_BT, first, drafts)
            except RuntimeError as error:
                self.failure = str(error)
                return None
        self.captured[kind] = step
        return step.run(ids_BT, first)


def until_captured(graphs: StepGraphs | None, step: Callable[[], object]) -> None:
    """Run a kind of step until a graph runs it; where there are no graphs, not once."""
    for _ in range(0 if graphs is None else STEPS_BEFORE_CAPTURE + 1):
        step()


class CapturedStep:
    """One kind of step. What differs from run to run lies in one tensor, so that one copy brings it to the GPU."""

    def __init__(
        self,
        store: KVStore,
        forward: Forward,
        capture: Capture,
        ids_BT: Sequence[Sequence[int]],
        first: Sequence[int],
        drafts: bool,
    ) -> None:
        self.store = store
        self.tokens = len(ids_BT[0])
        attending = [group.draft if drafts else group.model for groups in store.layers for group in groups]
        self.layers = {kind_of(layer): layer for layer in attending}
        new_tokens, kinds = self._places(first)
        inputs = [torch.tensor(ids_BT), *_tensors(new_tokens, kinds)]
        self.flat = _flat(inputs).to(attending[0].device)
        parts = self.flat.split([x.numel() for x in inputs])
        kept = [part.view(x.shape) for part, x in zip(parts, inputs, strict=True)]
        self._expected: Expected | None = None

        def compute() -> Tensor:
            ids, positions, pages, *rest = kept
            tensors = iter(rest)
            blocks = {kind: sizes.holding(next(tensors) for _ in sizes.tensors()) for kind, sizes in kinds.items()}
            places = FilledIndices(positions, pages, blocks)
            return forward(ids, StepView(store, lambda device: places, self.tokens, drafts), positions)

        self._run = capture(compute)

    def run(self, ids_BT: Sequence[Sequence[int]], first: Sequence[int]) -> Tensor:
        expected = self._expected
        if expected is None or (expected.first, expected.pages) != (list(first), self.store.pages):
            expected = self._expect(first)
        self.flat.copy_(_flat([torch.tensor(ids_BT), expected.flat]))
        hidden_BTD = self._run()
        following = [at + self.tokens for at in first]
        has_room = not any(self.store.missing_pages(row, at + self.tokens) for row, at in enumerate(following))
        self._expected = self._expect(following) if has_room else None  # made while the GPU computes
        return hidden_BTD

    def _expect(self, first: Sequence[int]) -> "Expected":
        pages = [list(held) for held in self.store.pages]
        return Expected(list(first), pages, _flat(_tensors(*self._places(first))))

    def _places(self, first: Sequence[int]) -> tuple[list[Tensor], dict[Kind, KeyBlocks]]:
        """On the CPU: positions and pages [B, T] of the new tokens, and the blocks of each kind of layers, padded to one size."""
        step = StepIndices(self.store, first, self.tokens, torch.device("cpu"))
        kinds = {kind: step.blocks_of(layer).padded(most_blocks(layer, len(first))) for kind, layer in self.layers.items()}
        return [step.position_BT, step.page_BT], kinds


@dataclass
class Expected:
    """The places of a step whose tokens begin at the positions `first`, with these pages of each sequence."""

    first: list[int]
    pages: list[list[int]]
    flat: Tensor


def _tensors(new_tokens: list[Tensor], kinds: dict[Kind, KeyBlocks]) -> list[Tensor]:
    return [*new_tokens, *(x for blocks in kinds.values() for x in blocks.tensors())]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


class FilledIndices(StepIndices):
    """The places of a step's tokens, from tensors that hold them."""

    def __init__(self, position_BT: Tensor, page_BT: Tensor, blocks: dict[Kind, KeyBlocks]) -> None:
        self.position_BT = position_BT
        self.page_BT = page_BT
        self._blocks = blocks
        self._rings = {}
        self.first = []

    def blocks(self, layer: PagedLayer | RingLayer) -> KeyBlocks:
        return self._blocks[kind_of(layer)]


def in_one_pool(device: torch.device) -> Capture:
    """Graphs of one GPU that share their memory: what one leaves behind, the next overwrites."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.device(device), torch.cuda.stream(stream):  # torch alone would stay on the stream of a capture that fails
            compute()  # compiles kernels and creates handles, which a graph cannot hold
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                result = compute()
        current.wait_stream(stream)

        def run() -> Tensor:
            graph.replay()
            return result

        return run

    return capture
