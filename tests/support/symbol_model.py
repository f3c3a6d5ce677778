"""A model of two layers and a tokenizer of 40 symbols, one of which is a whole boxed answer: random text then holds answers."""

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config

from lt_train.hybrid.loading import build_hybrid
from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.hybrid.spec import HybridSpec

SYMBOLS = ["<pad>", "<eos>", *(rf"\boxed{{{digit}}}" for digit in range(4)), *"0123456789abcdefghijklmnopqrst \n?:+"]

CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def symbol_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({symbol: index for index, symbol in enumerate(SYMBOLS)}, unk_token="?"))
    words.pre_tokenizer = Split(Regex(r"\\boxed\{\d\}|<pad>|<eos>|[\s\S]"), "isolated")
    words.decoder = Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="?")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def symbol_hybrid() -> HybridForCausalLM:
    """A hybrid whose second layer streams, with weights so large that its text is neither uniform nor stuck."""
    config = Qwen3Config(
        vocab_size=len(SYMBOLS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return build_hybrid(config, HybridSpec(num_layers=2, lazy_layers=(1,), w_sink=2, w_recent=6)).eval()
