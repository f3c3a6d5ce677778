import re

import pytest

from lt_train.recipe.batch_size import accumulation_steps, batch_samples
from lt_train.recipe.schema import Data, Train
from lt_train.runtime.errors import UserError


def train(micro: int = 1, **settings: int) -> Train:
    deepspeed = "launch/zero3.json" if "sequence_parallel" in settings else None
    return Train(method="full", learning_rate=1e-5, epochs=1, micro_batch_size=micro, deepspeed=deepspeed, **settings)


DATA = Data(source="a/b", format="still", max_length=1000, packing=True)


@pytest.mark.parametrize("world_size", [1, 2, 8, 48])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_processes_together_run_the_batch_of_the_recipe(micro: int, world_size: int) -> None:
    assert accumulation_steps(train(micro, batch_size=96), DATA, world_size) * micro * world_size == 96


def test_a_batch_in_tokens_is_a_number_of_full_rows() -> None:
    assert batch_samples(train(batch_tokens=96_000), DATA) == 96
    assert accumulation_steps(train(2, batch_tokens=96_000), DATA, 8) == 6


def test_processes_that_share_a_sequence_count_as_one() -> None:
    assert accumulation_steps(train(batch_size=96, sequence_parallel=4), DATA, 16) == 24
    with pytest.raises(UserError, match=r"sequence_parallel: 4: 7 processes do not form complete groups.*start 4 or 8 processes"):
        accumulation_steps(train(batch_size=96, sequence_parallel=4), DATA, 7)
    with pytest.raises(UserError, match=r"of the 5 that 20 processes .*Fix: set it to 95 or 100, or start 16 or 24 processes"):
        accumulation_steps(train(batch_size=96, sequence_parallel=4), DATA, 20)


@pytest.mark.parametrize(
    ("micro", "batch", "world_size", "message"),
    [
        (1, {"batch_size": 96}, 7, "train.batch_size: 96: not a multiple of the 7 that 7 processes with train.micro_batch_size 1"),
        (1, {"batch_size": 96}, 7, "Fix: set it to 91 or 98, or start 6 or 8 processes"),
        (2, {"batch_size": 96}, 64, "Fix: set it to 128, or start 48 processes"),
        (64, {"batch_size": 64}, 2, "or start 1 process, or set train.micro_batch_size to 32"),
        (6, {"batch_size": 12}, 4, "Fix: set it to 24, or start 2 processes, or set train.micro_batch_size to 3"),
        (2, {"batch_tokens": 96_000}, 5, "train.batch_tokens: 96,000: not a multiple of the 10,000"),
        (2, {"batch_tokens": 96_000}, 5, "Fix: set it to 90,000 or 100,000, or start 4 or 6 processes"),
        (1, {"batch_size": 10**12}, 7, "or start 5 or 8 processes"),
    ],
)
def test_a_batch_that_the_processes_do_not_divide_is_reported_with_what_fits(
    micro: int, batch: dict[str, int], world_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        accumulation_steps(train(micro, **batch), DATA, world_size)
