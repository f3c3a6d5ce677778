import pytest

from lt_train.runtime.errors import UserError
from lt_train.selection.calibration import samples_beyond_window


def test_samples_that_fit_inside_the_window_are_separated_from_longer_ones(example_of):
    examples = [example_of(seed, tokens) for seed, tokens in enumerate([30, 9, 10, 50])]
    usable, fitting = samples_beyond_window(examples, w_sink=2, w_recent=6)
    # Of 10 tokens the last predicts nothing; the one before, at position 8, is the first that misses a key (2 + 6 = 8).
    assert [len(example) for example in usable] == [30, 10, 50]
    assert [len(example) for example in fitting] == [9]


def test_a_window_larger_than_most_samples_is_refused_with_sizes_that_work(example_of):
    examples = [example_of(seed, tokens) for seed, tokens in enumerate([40, 50, 60, 200])]
    with pytest.raises(UserError) as refused:
        samples_beyond_window(examples, w_sink=4, w_recent=60)
    message = str(refused.value)
    assert "3 of 4 calibration samples fit inside the window of 64 tokens" in message
    assert "40 to 200 tokens, median 60" in message
    assert "lower hybrid.w_recent to at most 34 (all samples are longer), or to at most 54 (half of them)" in message
    assert "at least 66 tokens: raise data.max_length" in message


@pytest.mark.parametrize("w_recent", [34, 54])
def test_the_sizes_that_an_error_offers_work(example_of, w_recent):
    examples = [example_of(seed, tokens) for seed, tokens in enumerate([40, 50, 60, 200])]
    usable, _ = samples_beyond_window(examples, w_sink=4, w_recent=w_recent)
    assert len(usable) == {34: 4, 54: 2}[w_recent]


def test_samples_hardly_longer_than_the_sinks_have_no_size_that_works(example_of):
    with pytest.raises(UserError, match=r"no hybrid\.w_recent is small enough"):
        samples_beyond_window([example_of(0, tokens=6)], w_sink=8, w_recent=6)


def test_no_sample_at_all_is_an_error():
    with pytest.raises(UserError, match=r"hybrid\.calibration: no training sample"):
        samples_beyond_window([], w_sink=4, w_recent=60)
