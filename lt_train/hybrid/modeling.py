"""The part that all hybrid model classes share: transformers' own classes, with masks, cache and attention kernels replaced.

Each family (families.py) is its stock class with `HybridBody` / `HybridForCausalLM` mixed in. transformers' `AttentionInterface`
calls `hybrid_attention` under a name that is unique to this copy of the code, so exports of different versions can be loaded in one
process, and no process-wide setting can switch the sinks off.

A stock forward pass makes no mask for a name without a mask function, neither one for all layers nor one for each layer type, and
hands other keyword arguments through to the attention of every layer: `views`, which know what each layer sees, reach it in every
family.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_kernels import AUTO, KERNELS, unknown_kernel
from .cache import CACHE_ARGUMENT, HybridCache
from .configuration import HybridConfig
from .documents import Documents, find_documents
from .learned_sinks import LearnedSinks
from .sequence_parallel import ShardedView, Shards, sharded_view
from .spec import HybridError, HybridSpec
from .views import (
    AttentionView,
    CachedFullView,
    CachedStreamingView,
    FullView,
    LayerViews,
    StreamingView,
    Views,
)

PositionEmbeddings = tuple[Tensor, Tensor]
"""Cosines and sines [B, T, D] of the rotary embedding."""

ATTENTION_NAME = f"lt_hybrid.{__name__}"


def hybrid_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionView | None,
    scaling: float,
    dropout: float = 0.0,
    views: AttentionView | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention layers call: query [B, H, T, D], key and value [B, G, K, D] -> [B, T, H, D].

    A forward pass of the model gives one object for all layers, `views`; a layer that is called alone takes its view as its mask.
    """
    at = attention_at(getattr(module, "layer_idx", None), module)
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise HybridError(f"{name}: {at} has it, and no kernel of a hybrid computes it. Fix: choose another base")
    if s_aux is not None and s_aux is not module.sinks:
        raise HybridError(f"s_aux: {at} has sinks that are no weights named `sinks`. Fix: choose another base")
    view = attention_mask if views is None else views
    if not isinstance(view, AttentionView):
        raise HybridError(f"attention_mask: {at} got no view of what it sees. Fix: call the hybrid's forward, not its layers alone")
    return view.attend(module, query, key, value, scaling, dropout), None


AttentionInterface.register(ATTENTION_NAME, hybrid_attention)


def attention_at(index: int | None, attention: nn.Module) -> str:
    """How a message names the attention of a layer."""
    return f"model.layers.{index}.self_attn ({type(attention).__name__})"


class HybridPreTrainedModel(PreTrainedModel):
    """Base of both mixins: the attention implementation is the hybrid's, and setting another is an error; experts are computed as
    in the stock class."""

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        if attn_implementation not in (None, ATTENTION_NAME):
            raise HybridError(
                f"attn_implementation: {attn_implementation!r}: transformers' kernels ignore sinks. "
                "Fix: leave it out; set_attention_kernel selects a hybrid's kernel"
            )
        return ATTENTION_NAME

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """The stock class's answer. transformers reads the code of the module in which a class is declared and keeps the answer for
        its subclasses too: a hybrid's would be True after a stock model was made in the process, and False before."""
        stock_class: Any = next(base for base in cls.__mro__ if not issubclass(base, HybridPreTrainedModel))
        return bool(stock_class._can_set_experts_implementation())

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LearnedSinks):
            init.zeros_(module.weight)


class HybridBody(HybridPreTrainedModel):
    """The decoder stack: finds the documents, builds the cache, and passes each layer the view of its kind."""

    # Modules of the family's stock class
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module
    tp_plan: dict[str, str]

    def __init__(self, config: HybridConfig) -> None:
        self.attention_kernel = AUTO
        self.attends_fully = False
        self.shards: Shards | None = None
        self.cache_of_prompts: Callable[[], HybridCache] | None = None
        super().__init__(config)
        self.rotates_by_layer_type = "layer_type" in inspect.signature(self.rotary_emb.forward).parameters
        if config.learned_sinks:
            for layer in config.spec.lazy_layers:
                self.layers[layer].self_attn.sinks = LearnedSinks(config.num_attention_heads)
        if config.learned_sinks or config.spec.split_layers:  # they name heads, and each process would compute a part of these
            self.tp_plan = {name: style for name, style in self.tp_plan.items() if ".self_attn." not in name}

    @property
    def spec(self) -> HybridSpec:
        """The config's spec; inside `full_attention()` one in which nothing streams."""
        return self.config.spec.all_full if self.attends_fully else self.config.spec

    @property
    def prompts_choose(self) -> bool:
        """Whether each prompt chooses what streams in its answer."""
        return self.cache_of_prompts is not None and not self.attends_fully

    def new_cache(self) -> HybridCache:
        """An empty cache for one batch."""
        if self.attends_fully or self.cache_of_prompts is None:
            return HybridCache(self.spec)
        return self.cache_of_prompts()

    @contextmanager
    def full_attention(self) -> Iterator[None]:
        """While the block runs, every layer keeps full attention: with the base's weights, the model is the base."""
        before, self.attends_fully = self.attends_fully, True
        try:
            yield
        finally:
            self.attends_fully = before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HybridBody":
        """Keeps rotary frequencies in fp32: casting a module casts its buffers, and bf16 ones are off by 2π after 32K tokens."""
        exact = {name: buffer for name, buffer in self.rotary_emb.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            cast = self.rotary_emb.get_buffer(name)
            if cast.dtype != buffer.dtype:
                setattr(self.rotary_emb, name, buffer.to(cast.device))
        return self

    def position_embeddings(self, hidden_BTD: Tensor, position_ids: Tensor) -> list[PositionEmbeddings]:
        """The `position_embeddings` of each layer: some families have rotary embeddings for each type of layer."""
        if not self.rotates_by_layer_type:
            return [self.rotary_emb(hidden_BTD, position_ids)] * len(self.layers)
        kinds = self.config.layer_types
        assert kinds is not None, "__post_init__ sets them"
        by_type = {kind: self.rotary_emb(hidden_BTD, position_ids, kind) for kind in set(kinds)}
        return [by_type[kind] for kind in kinds]

    def attention_views(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: HybridCache | None = None,
    ) -> Views:
        """The views of full, streaming and sliding layers for this batch. Advances `cache`, if given, by its columns.

        Args:
            input_ids: [B, T] (or `inputs_embeds`: [B, T, hidden size]), the new tokens.
            attention_mask: [B, T], or with a cache [B, cached + T]; 0 on padding.
            position_ids: [B, T], restarting at 0 with each packed document.

        Raises:
            HybridError: see `find_documents`; packed documents or right padding with a cache.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise HybridError("input_ids: missing. Fix: pass input_ids or inputs_embeds")
        batch, new, device = given.shape[0], given.shape[1], given.device
        if cache is not None and cache.rows.columns > 0:
            return self._views_after_cache(cache, batch, new, device, attention_mask, position_ids)
        documents = find_documents(batch, new, device, attention_mask, position_ids)
        if cache is not None:
            if documents.are_packed:
                raise HybridError(
                    "use_cache: a KV cache holds one document per row, and these rows pack several. "
                    "Fix: pass use_cache=False, or one document per row"
                )
            cache.rows.advance(_padding(attention_mask), batch, new, device)
        return self._views_of(documents, cache)

    def _views_of(self, documents: Documents, cache: HybridCache | None = None) -> Views:
        full = FullView(documents, self.attention_kernel)
        streaming = full if self.attends_fully else StreamingView(documents, self.spec, self.attention_kernel)
        sliding = StreamingView(documents, self.spec.sliding, self.attention_kernel) if self.spec.sliding_layers else None
        return Views(full, streaming, documents.position_ids, cache, sliding)

    def _sharded_view(self, shards: Shards, attention_mask: Tensor | None, position_ids: Tensor | None) -> ShardedView:
        if self.spec.learned_sinks or self.config.base_has_sinks:
            raise HybridError(
                "learned_sinks: a process that holds a shard of a sequence computes some heads only, and learned sinks are not "
                "divided among processes. Fix: train without sequence parallelism, or, if the base has none, with sink tokens"
            )
        spec = shards.spec_of_process(self.spec, self.config.kv_heads)

        def find_views(position_ids: Tensor) -> LayerViews:
            batch, length = position_ids.shape
            return LayerViews(self._views_of(find_documents(batch, length, position_ids.device, None, position_ids)), spec)

        return sharded_view(shards.exchange, find_views, attention_mask, position_ids)

    def _views_after_cache(
        self,
        cache: HybridCache,
        batch: int,
        new: int,
        device: torch.device,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Views:
        columns = cache.rows.columns + new
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, columns):
            raise HybridError(
                f"attention_mask: shape {list(attention_mask.shape)}: there are {cache.rows.columns} cached columns and {new} new "
                f"ones. Fix: pass one of shape [{batch}, {columns}]"
            )
        if attention_mask is not None:
            cache.rows.check_same_columns(attention_mask[:, :-new].bool())
        cache.rows.advance(None if attention_mask is None else _padding(attention_mask[:, -new:]), batch, new, device)
        positions = cache.rows.new_positions_BT
        real = positions >= 0
        if position_ids is not None and not torch.equal(positions[real], position_ids.expand(batch, new)[real]):
            raise _position_error(cache, positions, position_ids.to(device).expand(batch, new))
        full = CachedFullView(cache)
        streaming = full if self.attends_fully else CachedStreamingView(cache, self.spec)
        sliding = CachedStreamingView(cache, self.spec.sliding) if self.spec.sliding_layers else None
        return Views(full, streaming, positions.clamp(min=0), cache, sliding)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The stock model's forward, for padded (`attention_mask` [B, T]) and packed (`position_ids` [B, T]) input.

        `cache` and `past_key_values` are two names of one argument (see CACHE_ARGUMENT).
        `cu_seq_lens_*`, which some collators add to packed input, repeat the content of `position_ids` and are not read.

        Raises:
            HybridError: the result would not be that of streaming attention: another cache class or attention implementation,
                masks of other shapes, packing without position_ids or with a cache.
        """
        if self.config._attn_implementation != ATTENTION_NAME:
            raise HybridError(
                f"attn_implementation: {self.config._attn_implementation!r}: set on a hybrid, and it ignores sinks. "
                "Fix: load the model again and do not set it"
            )
        if cu_seq_lens_q is not None and position_ids is None:
            raise HybridError(
                "cu_seq_lens: given without position_ids. Fix: pass position_ids that restart at 0 with each packed document"
            )
        if self.cache_of_prompts is not None and self.training:
            raise HybridError(
                "select: per_prompt: this model is in training mode, and a layer that streams in one answer is full in another. "
                "Fix: call eval(), or train a hybrid whose layers are chosen (convert with layers)"
            )
        refuse_unsupported_arguments(kwargs)
        if isinstance(attention_mask, dict):
            raise HybridError(
                "attention_mask: a dict of masks: a hybrid makes its own. Fix: pass a padding mask [batch, tokens], or none"
            )
        given = past_key_values if cache is None else cache
        cache = self._cache_for(given, use_cache, attention_mask, position_ids)
        view: AttentionView
        if self.shards is not None and self.training:
            view = self._sharded_view(self.shards, attention_mask, position_ids)
        else:
            views = self.attention_views(input_ids, attention_mask, position_ids, inputs_embeds, cache)
            view, position_ids = LayerViews(views, self.spec), views.position_ids
            if cache is not None:
                view = cache.view_of_pass(view)
        return super().forward(
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=cache is not None,
            views=view,
            **{CACHE_ARGUMENT: cache},
            **{name: value for name, value in kwargs.items() if name not in _PACKING_HINTS},
        )

    def _cache_for(
        self,
        given: HybridCache | None,
        use_cache: bool | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> HybridCache | None:
        if given is not None:
            if not isinstance(given, HybridCache):
                raise HybridError(
                    f"cache: {type(given).__name__}: it drops the sinks. Fix: pass HybridCache(model.config.spec), or none"
                )
            if given.spec != self.spec:
                raise HybridError("cache: it was made for a hybrid with other layers or sizes. Fix: make it from model.config.spec")
            if self.prompts_choose and type(given) is HybridCache:
                raise HybridError(
                    "cache: HybridCache: no layer of it would be cut to a window. Fix: make it with model.model.new_cache(), or "
                    "leave it out"
                )
            return given
        if use_cache is None:  # the config's default is for generation, not for training, packed or right-padded batches
            ends_in_padding = attention_mask is not None and not bool(attention_mask[:, -1].all())
            use_cache = self.config.use_cache and not self.training and position_ids is None and not ends_in_padding
        return self.new_cache() if use_cache else None


class HybridForCausalLM(HybridPreTrainedModel):
    """The decoder stack with its language-model head: generation with the hybrid cache, by greedy search or sampling."""

    body_class: type[HybridBody]

    def __init__(self, config: HybridConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.body_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def spec(self) -> HybridSpec:
        return self.model.spec

    def full_attention(self) -> AbstractContextManager[None]:
        """While the block runs, every layer keeps full attention: with the base's weights, the model is the base."""
        return self.model.full_attention()

    def set_attention_kernel(self, name: str) -> None:
        """Select the attention kernel: `auto` or one of KERNELS. The result is the same, the cost is not.

        The first forward pass checks whether the kernel supports the device and the dtype (attention_kernels.py, `choose`).
        """
        if name not in (AUTO, *KERNELS):
            raise HybridError(unknown_kernel(name))
        self.model.attention_kernel = name

    def shard_sequences(self, shards: Shards) -> None:
        """Train on shards: from now on a forward pass in training mode takes this process's shard of each sequence.

        `input_ids` and `position_ids` are the shard's; positions count in the entire sequence. In eval mode each process still
        takes entire sequences of its own.
        """
        self.model.shards = shards

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, generation_mode_kwargs: dict[str, Any]
    ) -> None:
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise HybridError(
                f"generation mode: {generation_mode.value}: a hybrid generates by greedy search or sampling only, because its ring "
                "of recent keys cannot be reordered or rolled back. "
                "Fix: set num_beams=1 and pass no assistant_model or prompt_lookup_num_tokens"
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise HybridError(
                f"cache_implementation: {generation_config.cache_implementation!r}: a hybrid has its own cache. Fix: leave it out"
            )
        if generation_config.use_cache is False and self.model.prompts_choose:
            raise HybridError(
                "use_cache: False: the layers that stream are cut in the cache, and without it none would. Fix: leave use_cache out"
            )
        if model_kwargs.get(CACHE_ARGUMENT) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE_ARGUMENT] = self.model.new_cache()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        if self.model.cache_of_prompts is not None:
            raise HybridError(
                "select: per_prompt: a checkpoint names the layers that stream, and here each prompt chooses them. Fix: save the "
                "base, or a hybrid whose layers are chosen (convert with layers)"
            )
        if self._auto_class is None:  # not of the code beside a checkpoint, so transformers writes none beside this one
            self.config.__dict__.pop("auto_map", None)
        super().save_pretrained(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise HybridError(
            "continuous batching: transformers implements it for full and sliding layers, without sinks. Fix: use generate()"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch


@dataclass(frozen=True)
class Family:
    """The classes that a base architecture becomes."""

    config_class: type[HybridConfig]
    model_class: type[HybridForCausalLM]


_PACKING_HINTS = {"cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def _padding(attention_mask: Tensor | None) -> Tensor | None:
    """The mask as booleans where it hides anything, else None."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def refuse_unsupported_arguments(given: Mapping[str, Any]) -> None:
    """Raises HybridError for arguments of a forward pass that transformers' models use and a hybrid would silently ignore."""
    lacks = {"output_attentions": "holds attention probabilities", "head_mask": "masks single heads"}
    for name, ability in lacks.items():
        if given.get(name) is not None and given[name] is not False:
            raise HybridError(f"{name}: no kernel of a hybrid {ability}. Fix: leave it out")
    if given.get("is_causal") is False:
        raise HybridError("is_causal: False: a hybrid's attention is causal. Fix: leave it out")


def _position_error(cache: HybridCache, positions_BT: Tensor, given_BT: Tensor) -> HybridError:
    """The error for positions that do not continue the cache, or for the mask from which generate() made them."""
    row, column = ((positions_BT >= 0) & (positions_BT != given_BT)).nonzero()[0].tolist()
    if int(cache.rows.before_B[row]) == 0:
        return HybridError(f"attention_mask: it hides every token of row {row}. Fix: leave the row out, or show its tokens")
    return HybridError(
        f"position_ids: row {row} continues at {int(given_BT[row, column])}, and its cache ends before "
        f"{int(positions_BT[row, column])}; positions count from each row's first real token. "
        "Fix: leave position_ids out; to generate(), pass the attention_mask of "
        "the earlier passes with ones for the new tokens"
    )
