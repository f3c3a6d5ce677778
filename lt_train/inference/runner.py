"""Forward passes of the engine, with keys and values in its store: prefill in chunks, then one step for all running sequences.

Shapes: B running sequences, N sequences in prefill, T tokens of each, D hidden size, V vocab_size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.views import AttentionView, FullView, LayerViews
from lt_train.inference.draft import rows_of_step
from lt_train.inference.kv_store import KVStore
from lt_train.inference.packed_weights import packed_for
from lt_train.inference.per_prompt_store import PerPromptStore
from lt_train.inference.per_prompt_views import PerPromptStepView, PromptsView
from lt_train.inference.step_graphs import StepGraphs, obstacle_to_graphs
from lt_train.inference.views import FirstChunksView, LaterChunkView, StepView

Prompt = tuple[int, Sequence[int]]
"""(slot, token ids) of a sequence without cached tokens."""


class ModelRunner:
    """Runs one model on one store; a forward pass of prefill has at most `prefill_chunk` tokens.

    With a `PerPromptStore` a prompt is never longer than that: its last queries decide which layers stream, and later chunks
    would need every layer's cache until then.
    """

    def __init__(self, model: HybridForCausalLM, store: KVStore | PerPromptStore, prefill_chunk: int) -> None:
        self.model = packed_for(model, rows_of_step(store.slots, store.draft if isinstance(store, KVStore) else None))
        self.store = store
        self.prefill_chunk = prefill_chunk
        self.graphs: StepGraphs | None = None
        if isinstance(store, KVStore) and obstacle_to_graphs(model) is None:
            self.graphs = StepGraphs(store, self._forward)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        """Prefill new sequences; returns the logits [N, V] of the next token of each."""
        logits: list[Tensor] = []
        for group in self._groups(prompts):
            logits += self._prefill_group(group)
        return torch.stack(logits)

    @torch.inference_mode()
    def step(self, ids_B: Sequence[int]) -> Tensor:
        """Add one token to every running sequence, by slot; returns the logits [B, V] of the next token of each."""
        if isinstance(self.store, PerPromptStore):
            ids_B1, positions_B1 = (self._tensor([[number] for number in numbers]) for numbers in (ids_B, self.store.lengths))
            logits_BV = self._logits(self._forward(ids_B1, PerPromptStepView(self.store), positions_B1)[:, 0])
        else:
            logits_BV = self.verify([[token] for token in ids_B])[:, 0]
        self.store.lengths = [length + 1 for length in self.store.lengths]
        return logits_BV

    @torch.inference_mode()
    def draft(self, ids_B: Sequence[int], drafted: int) -> Tensor:
        """The draft's logits [B, V] of the next token of every running sequence, by slot, after `drafted` tokens of its own."""
        assert isinstance(self.store, KVStore), "a prompt that decides on its layers has no draft"
        return self._logits(self._after_cached(self.store, [[token] for token in ids_B], drafted)[:, 0])

    @torch.inference_mode()
    def verify(self, ids_BT: Sequence[Sequence[int]]) -> Tensor:
        """The logits [B, T, V] of the token after each of T new ones of every running sequence, by slot.

        Their keys and values are cached; `store.lengths` then has how many of them stay.
        """
        assert isinstance(self.store, KVStore), "a prompt that decides on its layers has no draft"
        return self._logits(self._after_cached(self.store, ids_BT))

    def _after_cached(self, store: KVStore, ids_BT: Sequence[Sequence[int]], drafted: int | None = None) -> Tensor:
        """Hidden states [B, T, D] of new tokens of every running sequence.

        Args:
            drafted: the draft computes them, after this number of tokens of its own; None: the model itself does.
        """
        drafts, first = drafted is not None, [length + (drafted or 0) for length in store.lengths]
        if self.graphs is not None and (hidden_BTD := self.graphs.hidden(ids_BT, first, drafts)) is not None:
            return hidden_BTD
        positions = [range(at, at + len(ids)) for at, ids in zip(first, ids_BT, strict=True)]
        view = StepView.after(store, first, len(ids_BT[0]), drafts)
        return self._forward(self._tensor(ids_BT), view, self._tensor(positions))

    def _groups(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Groups of prompts whose first chunks fit in one chunk together."""
        groups: list[list[Prompt]] = []
        room = 0
        for slot, ids in prompts:
            tokens = min(len(ids), self.prefill_chunk)
            if tokens > room:
                groups.append([])
                room = self.prefill_chunk
            groups[-1].append((slot, ids))
            room -= tokens
        return groups

    def _prefill_group(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Prefill the first chunks in one packed row, then the rest of each. Returns the logits [V] of the next token of each."""
        spans: list[tuple[int, int, int]] = []
        ids: list[int] = []
        positions: list[int] = []
        for slot, prompt in prompts:
            tokens = min(len(prompt), self.prefill_chunk)
            spans.append((slot, len(ids), tokens))
            ids += prompt[:tokens]
            positions += range(tokens)
        ids_1T, positions_1T = self._tensor([ids]), self._tensor([positions])
        inner = self.model.model.attention_views(input_ids=ids_1T, position_ids=positions_1T)
        view: AttentionView
        if isinstance(self.store, PerPromptStore):
            assert isinstance(inner.full, FullView), "without a cache every layer sees the documents of the input"
            view = PromptsView(self.store, inner.full, spans)
        else:
            view = FirstChunksView(self.store, LayerViews(inner, self.store.spec), spans)
        hidden_1TD = self._forward(ids_1T, view, positions_1T)
        for slot, _, tokens in spans:
            self.store.lengths[slot] = tokens
        last_N = [first + tokens - 1 for _, first, tokens in spans]
        logits_NV = list(self._logits(hidden_1TD[0, last_N]))
        for number, (slot, prompt) in enumerate(prompts):
            if len(prompt) > self.prefill_chunk:
                logits_NV[number] = self._prefill_rest(slot, prompt)
        return logits_NV

    def _prefill_rest(self, slot: int, prompt: Sequence[int]) -> Tensor:
        assert isinstance(self.store, KVStore), "a prompt that decides on its layers is read in one pass"
        for start in range(self.prefill_chunk, len(prompt), self.prefill_chunk):
            ids = prompt[start : start + self.prefill_chunk]
            view = LaterChunkView(self.store, slot, len(ids))
            positions_1T = self._tensor([list(range(start, start + len(ids)))])
            hidden_1TD = self._forward(self._tensor([ids]), view, positions_1T)
            self.store.lengths[slot] += len(ids)
        return self._logits(hidden_1TD[0, -1])

    def _forward(self, ids_BT: Tensor, view: AttentionView, positions_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D] after the last layer."""
        body = self.model.model
        hidden_BTD = body.embed_tokens(ids_BT)
        for layer, embeddings in zip(body.layers, body.position_embeddings(hidden_BTD, positions_BT), strict=True):
            hidden_BTD = layer(hidden_BTD, attention_mask=view, position_ids=positions_BT, position_embeddings=embeddings)
        return body.norm(hidden_BTD)

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        logits_NV = self.model.lm_head(hidden_ND)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def _tensor(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, device=self.model.device)
