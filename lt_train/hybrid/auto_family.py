"""The family of a base that families.py does not declare, made from the classes of the base that transformers knows.

It is what a declaration would be. Whether it computes streaming attention is for family_proof.py to find.
"""

from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration import HybridConfig
from .modeling import Family, HybridBody, HybridForCausalLM
from .spec import HybridError

PREFIX = "lt_hybrid_"
"""Of the `model_type` of every hybrid; the rest is the base's."""


class AutoHybridForCausalLM(HybridForCausalLM):
    """A stock class as it makes itself, with the hybrid's decoder stack in the place of its own."""

    stock_class: type[PreTrainedModel]

    def __init__(self, config: HybridConfig) -> None:
        self.stock_class.__init__(self, config)
        stack = getattr(self, "model", None)
        if not isinstance(stack, PreTrainedModel):
            raise HybridError(f"{self.stock_class.__name__}: it has no decoder stack named `model`. Fix: choose another base")
        classes: tuple[Any, Any] = (type(stack), type(config))
        self.model = _hybrid_body(*classes)(config)
        self.post_init()


@cache
def auto_family(model_type: str) -> Family:
    """The family of the bases with this `model_type`.

    Raises:
        HybridError: transformers has no language model of this type.
    """
    stock_config, stock_class = stock_classes(model_type)
    name = stock_class.__name__
    values: dict[str, Any] = {"model_type": PREFIX + model_type}
    if hasattr(stock_config, "use_sliding_window"):
        values |= {"use_sliding_window": True, "__annotations__": {"use_sliding_window": bool}}
    config_class = strict(_subclass(f"Hybrid{stock_config.__name__}", (HybridConfig, stock_config), values))
    model_class = _subclass(
        f"Hybrid{name}", (AutoHybridForCausalLM, stock_class), {"config_class": config_class, "stock_class": stock_class}
    )
    mapping = get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(PREFIX + model_type, mapping, overwrite=True)
    return Family(config_class, model_class)


def stock_classes(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The config and the language model of this type that transformers knows, its own or registered ones.

    Raises:
        HybridError: it knows none.
    """
    try:
        config_class = CONFIG_MAPPING[model_type]
        return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except KeyError as error:
        problem = "transformers has no causal language model of it"
        raise HybridError(f"model_type: {model_type!r}: {problem}. Fix: choose another base") from error


@cache
def _hybrid_body(stock_body: Any, config_class: Any) -> Any:
    """A `HybridBody` with the stock stack under it."""
    return _subclass(f"Hybrid{stock_body.__name__}", (HybridBody, stock_body), {"config_class": config_class})


def _subclass(name: str, bases: tuple[type, ...], values: dict[str, Any]) -> Any:
    return type(name, bases, {"__module__": __name__, **values})
