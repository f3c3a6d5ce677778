"""Experts under ZeRO-3: DeepSpeed gathers the weights of all experts of a layer at once.

It gathers a module's weights when the module runs, in all processes together. Where the tokens of two processes go to different
experts, modules of single experts would run in one of them alone, and the gathering would wait for the other forever.
"""

from torch import nn


def gather_experts_at_once(model: nn.Module) -> None:
    """Make each module that has experts a leaf to ZeRO-3 (`deepspeed.utils.set_z3_leaf_modules`). DeepSpeed's own list of such
    classes has three; to other stages this changes nothing."""
    from deepspeed.utils import set_z3_leaf_modules

    blocks = {type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)}
    if blocks:
        set_z3_leaf_modules(model, list(blocks))
