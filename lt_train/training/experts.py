"""Mixtures of experts: their router's loss as the base's config has it, and under ZeRO-3 all experts of a layer at once.

DeepSpeed gathers a module's weights when the module runs, in all processes together. Where the tokens of two processes go to
different experts, modules of single experts would run in one of them alone, and the gathering would wait for the other forever.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig


def gather_experts_at_once(model: nn.Module) -> None:
    """Make each module that has experts a leaf to ZeRO-3 (`deepspeed.utils.set_z3_leaf_modules`). DeepSpeed's own list of such
    classes has three; to other stages this changes nothing."""
    from deepspeed.utils import set_z3_leaf_modules

    blocks = {type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))


@contextmanager
def router_loss_of_base(model: PreTrainedModel, config: SFTConfig) -> Iterator[None]:
    """While TRL's trainer is made: it is to add the router's loss where the base's config sets it (`output_router_logits`).

    TRL adds it wherever a config has a coefficient, and writes both into the model's config, from which an export has them.
    train.trl may set a coefficient of its own.
    """
    settings = {name: value for name, value in model.config.to_dict().items() if name in ("output_router_logits", COEFFICIENT)}
    if config.router_aux_loss_coef is None and not settings.get("output_router_logits"):
        config.router_aux_loss_coef = 0.0
    yield
    for name, value in settings.items():
        setattr(model.config, name, value)


COEFFICIENT = "router_aux_loss_coef"
