"""The calibration samples that distinguish lazy layers from others: those longer than the window."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lt_train.runtime.errors import UserError

if TYPE_CHECKING:
    from lt_train.dataset.examples import Example

USABLE_FRACTION = 0.5
"""With a smaller fraction of usable samples the ranking would rest on far fewer than the recipe requests: an error."""


def samples_beyond_window(examples: Sequence["Example"], w_sink: int, w_recent: int) -> tuple[list["Example"], list["Example"]]:
    """Split into (usable, fitting): a sample that fits inside the window sees the same whether layers stream or not.

    A query at position q (from 0) misses a key from `q = w_sink + w_recent` on, and the last token of a sample predicts
    nothing; so a sample is usable from `w_sink + w_recent + 2` tokens on.

    Raises:
        UserError: there is no sample, or more than half of them fit inside the window.
    """
    if not examples:
        raise UserError(
            "hybrid.calibration: no training sample is left to score layers on. Fix: raise data.limit or data.max_length "
            "(data.overlong: drop leaves out longer samples)"
        )
    shortest_usable = w_sink + w_recent + 2
    usable = [example for example in examples if len(example) >= shortest_usable]
    fitting = [example for example in examples if len(example) < shortest_usable]
    if len(usable) < USABLE_FRACTION * len(examples):
        raise UserError(_window_too_large(sorted(map(len, examples)), len(fitting), w_sink, w_recent))
    return usable, fitting


def _window_too_large(lengths: list[int], fitting: int, w_sink: int, w_recent: int) -> str:
    median = lengths[len(lengths) // 2]
    window = w_sink + w_recent
    return (
        f"hybrid.w_recent: {w_recent}: {fitting} of {len(lengths)} calibration samples fit inside the window of {window} tokens "
        f"(w_sink {w_sink} + w_recent {w_recent}), where every layer looks lazy. "
        f"Prompt and answer together have {lengths[0]} to {lengths[-1]} tokens, median {median}.\n"
        f"  Fix: {_smaller_window(lengths, median, w_sink)}.\n"
        f"  Or score on samples of at least {window + 2} tokens: raise data.max_length or "
        "hybrid.calibration.max_length where they truncate, or choose other data"
    )


def _smaller_window(lengths: list[int], median: int, w_sink: int) -> str:
    half, all_of_them = median - w_sink - 2, lengths[0] - w_sink - 2
    if half < 1:
        return f"no hybrid.w_recent is small enough: the samples are hardly longer than w_sink {w_sink}"
    if all_of_them < 1:
        return f"lower hybrid.w_recent to at most {half} (half of the samples are longer)"
    return f"lower hybrid.w_recent to at most {all_of_them} (all samples are longer), or to at most {half} (half of them)"
