"""How many logits are in memory at a time: all of 20,000 tokens would be 20,000 x 152,000."""

from lt_train.hybrid.modeling import HybridForCausalLM

LOGITS_PER_CALL = 2**24
"""Positions x vocab_size: 64 MiB in fp32."""


def tokens_per_part(model: HybridForCausalLM) -> int:
    """The number of tokens whose logits are at most `LOGITS_PER_CALL` numbers."""
    return max(1, LOGITS_PER_CALL // model.config.vocab_size)
