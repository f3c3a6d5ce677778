import pytest

from lt_train.runtime.units import format_bytes, format_duration, format_tokens


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (999 * 2**10, "999 KiB"),
        (1000 * 2**20, "1,000 MiB"),  # never 1e+03
        (1020 * 2**20, "1,020 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (3 * 2**40, "3 TiB"),
        (5000 * 2**40, "5,000 TiB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.354, "0.35 seconds"),
        (90, "90 seconds"),
        (720, "12 minutes"),
        (1800, "30 minutes"),
        (9000, "2.5 hours"),
        (4e5, "4.63 days"),
    ],
)
def test_durations_are_written_in_the_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("tokens", "text"), [(0, "0"), (512, "512"), (1000, "1000"), (1024, "1K"), (1536, "1.5K"), (131072, "128K")]
)
def test_lengths_are_written_in_k_of_1024(tokens, text):
    assert format_tokens(tokens) == text
