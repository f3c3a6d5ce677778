"""The built-in engine: a model, its tokenizer and a KV budget, for hybrids and full models, on any device."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from lt_train.hybrid.context_length import context_length
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.inference.continuous_batch import ContinuousBatch, limit
from lt_train.inference.draft import Acceptance, Draft, rows_of_step
from lt_train.inference.kv_store import KVSizes, KVStore, kv_sizes
from lt_train.inference.packed_weights import obstacle_to_packing, packed_bytes
from lt_train.inference.per_prompt import PerPrompt
from lt_train.inference.per_prompt_store import PerPromptSizes, PerPromptStore, check_one_device
from lt_train.inference.requests import Answer, Request, Sampling, Watch
from lt_train.inference.text import stop_tokens
from lt_train.runtime.devices import free_memory
from lt_train.runtime.errors import UserError

FRACTION_OF_FREE_MEMORY = 0.8
"""What of the free memory the KV cache may take where no budget is given; activations need the rest."""


class Engine:
    """A model that answers many requests at once.

    Args:
        kv_budget: bytes for the KV cache; None: most of what is free on the model's device.
        max_slots: sequences at a time, at most.
        prefill_chunk: prompt tokens in one forward pass.
        per_prompt: each prompt decides which layers stream in its answer (LightTransfer-Test); None: the model's own layers.
        draft: what proposes tokens for speculative decoding, of this model (`Draft.of`); None: nothing does.

    Attributes:
        acceptance: what came of the draft's tokens, in all answers so far.

    Raises:
        UserError: `per_prompt` does not fit the model.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        kv_budget: int | None = None,
        max_slots: int = 64,
        prefill_chunk: int = 2048,
        per_prompt: PerPrompt | None = None,
        draft: Draft | None = None,
    ) -> None:
        if per_prompt is not None:
            per_prompt.check(model)
            check_one_device(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.kv_budget = kv_budget
        self.max_slots = max_slots
        self.prefill_chunk = prefill_chunk
        self.per_prompt = per_prompt
        self.draft = draft
        self.acceptance = Acceptance()
        self.stop_ids = stop_tokens(model, tokenizer)

    def answers(self, requests: Sequence[Request], sampling: Sampling, watch: Watch = lambda tokens: None) -> Iterator[Answer]:
        """Answer every request, each as soon as it is done.

        Raises:
            UserError: the budget does not hold the longest sequence that may come; see also `ContinuousBatch.add`.
        """
        if requests:
            longest = max(len(request.prompt_ids) + limit(request, sampling) for request in requests)
            batch = self.batch(self.lay_out(len(requests), longest))
            for request in requests:
                batch.add(request, sampling)
            while not batch.is_empty:
                tokens = batch.step()
                watch(len(tokens))
                yield from (token.answer for token in tokens if token.answer is not None)

    def batch(self, store: KVStore | PerPromptStore) -> ContinuousBatch:
        """An empty batch in a store of this model: requests may be added and cancelled between its steps."""
        return ContinuousBatch(self.model, self.tokenizer, store, self.prefill_chunk, self.stop_ids, self.acceptance)

    @property
    def budget(self) -> int:
        """Bytes for the KV cache."""
        return self.kv_budget if self.kv_budget is not None else default_budget(self.model, self.max_slots, self.draft)

    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and answer, that the model's context and the budget allow; 0: not one page."""
        context = context_length(self.model.config.to_dict())
        return bisect_right(range(1, context + 1), self.budget, key=self.sizes.sequence)

    @property
    def sizes(self) -> KVSizes | PerPromptSizes:
        return kv_sizes(self.model, self.draft) if self.per_prompt is None else PerPromptSizes.of(self.model, self.per_prompt)

    def lay_out(self, requests: int, longest: int, usual: int | None = None) -> KVStore | PerPromptStore:
        """Divide the budget: as many slots as hold sequences of the usual length, all else pages.

        Sequences seldom reach the limit together; where they do, the youngest waits.

        Args:
            longest: tokens of the longest sequence that may come. usual: of a usual one; None: three quarters of the longest.
        """
        budget, sizes = self.budget, self.sizes
        needed = sizes.sequence(longest)
        if budget < needed:
            rings, fix = ("", "") if self.draft is None else (" with the rings of its draft", ", or remove draft")
            raise UserError(
                f"kv_budget: {budget:,} bytes do not hold one sequence of {longest:,} tokens (prompt and max_new_tokens){rings}, "
                f"which takes {needed:,}. Fix: raise kv_budget to at least that, or lower max_new_tokens{fix}"
            )
        slots = min(self.max_slots, requests, budget // max(sizes.sequence(usual or 3 * longest // 4), 1))
        if isinstance(sizes, PerPromptSizes):
            assert self.per_prompt is not None
            slots = max(1, slots)
            pages = min(sizes.pages(longest) * slots, budget // sizes.page)
            return PerPromptStore(self.model, self.per_prompt, slots, pages)
        if sizes.slot:  # all slots leave pages for the longest sequence
            slots = min(slots, (budget - sizes.pages(longest) * sizes.page) // sizes.slot)
        slots = max(1, slots)
        pages = sizes.pages(longest) * slots
        if sizes.page:
            pages = min(pages, (budget - slots * sizes.slot) // sizes.page)
        return KVStore(self.model, slots, pages, self.draft)


def default_budget(model: HybridForCausalLM, max_slots: int, draft: Draft | None = None) -> int:
    """Bytes for the KV cache where none are given: most of what is free beside packed weights."""
    rows = rows_of_step(max_slots, draft)
    packed = 0 if obstacle_to_packing(model, rows) is not None else packed_bytes(model)
    return int(FRACTION_OF_FREE_MEMORY * (free_memory(model.device) - packed))
