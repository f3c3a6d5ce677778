from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lt_train.recipe.reasoning_tags import REASONING_TAGS
from lt_train.serving.reasoning_stream import ReasoningStream


def parts(pieces: list[str], prompt: str = "<user>") -> list[tuple[str, bool]]:
    """Neighbours of a kind joined."""
    stream = ReasoningStream(prompt)
    joined: list[tuple[str, bool]] = []
    for text, is_reasoning in [*(part for piece in pieces for part in stream.add(piece)), stream.finish()]:
        if joined and joined[-1][1] == is_reasoning:
            joined[-1] = (joined[-1][0] + text, is_reasoning)
        elif text:
            joined.append((text, is_reasoning))
    return joined


@given(cuts=st.lists(st.integers(0, 60), max_size=12), tags=st.sampled_from(REASONING_TAGS))
@settings(deadline=None)
def test_reasoning_is_distinguished_from_the_answer_wherever_the_text_is_cut(cuts: list[int], tags) -> None:
    text = f"{tags.opening}a < b{tags.closing}\nThe <answer"
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert parts(pieces) == [(f"{tags.opening}a < b{tags.closing}", True), ("\nThe <answer", False)]


def test_reasoning_that_the_prompt_opens_continues_until_its_tag() -> None:
    assert parts(["so ", "7</th", "ink>7"], "<|assistant|><think>\n") == [("so 7</think>", True), ("7", False)]


def test_another_familys_tag_inside_reasoning_ends_nothing() -> None:
    assert parts(["<think>a</thought>b"]) == [("<think>a</thought>b", True)]


def test_an_answer_without_reasoning_is_an_answer() -> None:
    assert parts(["a </think", "> b"]) == [("a </think> b", False)]
