"""Pieces of a streamed answer: final as soon as they can be, and together the answer's text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lt_train.inference.streamed_text import StreamedText
from lt_train.inference.text import cut_at_stop_string, decode, unfinished

EOS = "<|end|>"


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate([EOS, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def sentencepiece() -> PreTrainedTokenizerFast:
    """Words with a marked space before them, which is dropped at the beginning of a text; bytes for all else."""
    words = ["▁a", "▁bc", "a", "b", "c", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = [("<unk>", 0.0), (EOS, 0.0), *((word, -float(len(words) - len(word))) for word in words)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token="<unk>")


TOKENIZERS = {"byte level": byte_level(), "sentencepiece": sentencepiece()}


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    streamed = StreamedText(tokenizer, stop, [tokenizer.eos_token_id])
    come, whole = [], ""
    for count, token_id in enumerate(ids, start=1):
        come.append(streamed.add(token_id))
        whole = decode(tokenizer, ids[:count])
        before_stop = cut_at_stop_string(whole, stop)
        if before_stop is not None:
            whole = before_stop
            break
    return [*come, streamed.finish(whole)]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(alphabet="abc é€🙂\n", max_size=30))
@settings(max_examples=60, deadline=None)
def test_the_pieces_together_are_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


@given(text=st.text(alphabet="ab\n", max_size=30), stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
@settings(max_examples=120, deadline=None)
def test_no_piece_holds_a_stop_string_or_its_beginning_where_it_follows(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    before_stop = cut_at_stop_string(text, stop)
    sent = "".join(pieces(tokenizer, ids, tuple(stop)))
    assert sent == (text if before_stop is None else text[: len(sent)])
    assert not any(string in sent for string in stop)


def test_a_piece_comes_as_soon_as_its_character_is_whole() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    assert pieces(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_the_token_that_ends_an_answer_is_no_text() -> None:
    tokenizer = TOKENIZERS["byte level"]
    streamed = StreamedText(tokenizer, (), [tokenizer.eos_token_id])
    assert (streamed.add(tokenizer("a")["input_ids"][0]), streamed.add(tokenizer.eos_token_id), streamed.finish("a")) == (
        "a",
        "",
        "",
    )


def test_an_answer_that_ends_within_a_character_ends_as_the_whole_text_does() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:3]
    assert pieces(tokenizer, ids) == ["a", "", "", decode(tokenizer, ids)[1:]]


def test_only_what_a_string_may_still_complete_is_unfinished() -> None:
    assert [unfinished(text, ("</think>", "abab")) for text in ("x<", "x</th", "</think>", "xaba", "ab", "b", "")] == [
        1,
        4,
        0,
        3,
        2,
        0,
        0,
    ]
