"""Whether a model in memory computes what its config and weights say: a hybrid is made of these alone.

A config that was edited after loading, a replaced activation or a hook changes the model, and not the hybrid of it.

Shapes: T tokens, V vocab_size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.runtime.errors import UserError

TOKENS = 16
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
IN_16_BITS = 0.15
"""Relative difference of logits that kernels of attention may cause. In bf16 those of SmolLM2-135M are 0.07 from those in fp32."""


def check_same_logits(model: PreTrainedModel, hybrid: HybridForCausalLM) -> None:
    """Compare the logits of random tokens, as the median over the tokens of |difference| / |logits - their mean|.

    Args:
        hybrid: of the model; while they are compared, nothing streams in it. Neither is compared on the device meta.

    Raises:
        UserError: they differ by more than rounding.
    """
    if any(weight.is_meta for weight in model.parameters()):
        return
    ids_1T = torch.randint(model.config.get_text_config().vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with hybrid.full_attention():
        logits_TV, found_TV = (_logits(each, ids_1T.to(each.device)) for each in (model, hybrid))
    spread_T = (logits_TV - logits_TV.mean(-1, keepdim=True)).norm(dim=-1)
    difference = ((found_TV - logits_TV).norm(dim=-1) / spread_T.clamp_min(1e-12)).median().item()
    if not difference <= TOLERANCE.get(model.dtype, IN_16_BITS):  # also true of a NaN
        raise UserError(
            f"model: {type(model).__name__}: its logits differ by {difference:.1%} from what its config and weights compute, "
            "and the hybrid is made of these alone. Fix: pass the model as from_pretrained returns it, without hooks or replaced "
            "modules, and change settings of its config before loading"
        )


def _logits(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    with torch.no_grad(), _evaluated(model):
        return model(ids_1T, use_cache=False).logits[0].float()


@contextmanager
def _evaluated(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
