"""The tokenizer of a base or of an export, and whether its model has an embedding for every token that texts may have."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lt_train.dataset.chat_template import own_template
from lt_train.inference.loading import eos_ids, failures_named
from lt_train.inference.text import check_stop_tokens
from lt_train.recipe.reasoning_tags import REASONING_TAGS
from lt_train.recipe.schema import Model, Prompt
from lt_train.runtime.errors import UserError, shortened
from lt_train.runtime.sources import resolve_model

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def has_local_tokenizer(model: Model) -> bool:
    """Whether the base's tokenizer is in its folder, or in the cache of the hub: `load_tokenizer` then downloads nothing."""
    name = resolve_model(model.base)
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in _FILES)
    return any(isinstance(try_to_load_from_cache(name, file, revision=model.revision), str) for file in _FILES)


def load_tokenizer(model: Model, stop_token: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padding on the left as generation needs it.

    Args:
        stop_token: the recipe's prompt.stop_token, which becomes the tokenizer's eos token.

    Raises:
        UserError: none there, or one without any text, without the stop token, or without a padding or eos token.
    """
    with failures_named(model, "tokenizer"):
        folder = Path(resolve_model(model.base))
        if folder.is_dir() and not model.trust_remote_code and not any((folder / name).is_file() for name in _FILES):
            raise FileNotFoundError("there is no tokenizer.json. Fix: download the base again, with all its files")
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(model.base), revision=model.revision, trust_remote_code=model.trust_remote_code, padding_side="left"
        )
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):  # what transformers makes of a Qwen without the files
        raise UserError(
            f"model.base: {model.base}: its tokenizer has no tokens of text: tokenizer.json is missing or empty. Fix: download the "
            "base again, with all its files"
        )
    if stop_token is not None:
        if stop_token not in tokenizer.get_vocab():
            raise UserError(
                f"prompt.stop_token: {stop_token}: the tokenizer of {model.base} has no such token. Fix: set it to the token that "
                "ends a turn in the chat template"
            )
        tokenizer.eos_token = stop_token
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"model.base: {model.base}: its tokenizer has neither a padding nor an eos token. Fix: set eos_token in its "
                "tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_checked_tokenizer(model: Model, config: PreTrainedConfig, prompt: Prompt | None = None) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`, checked against the config of the model.

    Args:
        prompt: of the recipe, which may have a stop token and a chat template of its own.

    Raises:
        UserError: see `load_tokenizer` and `check_vocabulary`; or the recipe's chat template cannot be read.
    """
    tokenizer = load_tokenizer(model, None if prompt is None else prompt.stop_token)
    check_vocabulary(model, config, tokenizer, None if prompt is None else own_template(prompt))
    return tokenizer


def check_vocabulary(
    model: Model, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> None:
    """
    Args:
        chat_template: the recipe's own; None: it uses the tokenizer's.

    Raises:
        UserError: the tokenizer has tokens that the model has no embedding for, or lacks one that ends answers. The model may have
            more embeddings than there are tokens, as many bases do whose number is rounded up.
    """
    check_stop_tokens(eos_ids(model), tokenizer, model.base)
    missing = _without_embedding(config.vocab_size, tokenizer, str(chat_template or tokenizer.chat_template))
    if missing:
        count, (token, token_id) = max(missing.values()) + 1, min(missing.items(), key=lambda token: token[1])
        raise UserError(
            f"model.base: {model.base}: its tokenizer needs {count:,} embeddings, and the model has {config.vocab_size:,}, none "
            f"for {shortened(token)} (token {token_id}). Fix: remove the tokens that were added to the tokenizer, or save the "
            f"base with embeddings for them: model.resize_token_embeddings({count}) in transformers"
        )


def _without_embedding(vocab_size: int, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> dict[str, int]:
    """The tokens that texts may have and the model does not embed.

    Special tokens that only programs write are passed over: Gemma 3's tokenizer has one for images, which its text models lack.
    """
    beyond = {token: token_id for token, token_id in tokenizer.get_vocab().items() if token_id >= vocab_size}
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    tags = {tag for each in REASONING_TAGS for tag in (each.opening, each.closing)}
    unwritten = {token for token in special - ends - tags if token not in chat_template}
    return {token: token_id for token, token_id in beyond.items() if token not in unwritten}
