import re

import pytest

from lt_train.recipe.batch_size import accumulation_steps, batch_samples
from lt_train.recipe.schema import Data, Train
from lt_train.runtime.errors import UserError


def train(micro: int = 1, **batch: int) -> Train:
    return Train(method="full", learning_rate=1e-5, epochs=1, micro_batch_size=micro, **batch)


DATA = Data(source="a/b", format="still", max_length=1000, packing=True)


@pytest.mark.parametrize("processes", [1, 2, 8, 48])
@pytest.mark.parametrize("micro", [1, 2])
def test_the_processes_together_run_the_batch_that_the_recipe_says(micro: int, processes: int) -> None:
    assert accumulation_steps(train(micro, batch_size=96), DATA, processes) * micro * processes == 96


def test_a_batch_in_tokens_is_so_many_full_packs() -> None:
    assert batch_samples(train(batch_tokens=96_000), DATA) == 96
    assert accumulation_steps(train(2, batch_tokens=96_000), DATA, 8) == 6


def test_processes_that_share_a_sequence_take_one_part_of_the_batch() -> None:
    assert accumulation_steps(train(batch_size=96, sequence_parallel=4), DATA, 16) == 24
    with pytest.raises(UserError, match=r"7 processes cannot be put into groups of 4.*Start 4 or 8 processes"):
        accumulation_steps(train(batch_size=96, sequence_parallel=4), DATA, 7)
    with pytest.raises(UserError, match=r"20 processes .* take 5 at a time.*95 or 100. Or start 16 or 24 processes"):
        accumulation_steps(train(batch_size=96, sequence_parallel=4), DATA, 20)


@pytest.mark.parametrize(
    ("micro", "batch", "processes", "told"),
    [
        (1, {"batch_size": 96}, 7, "train.batch_size: 96 cannot be shared out: 7 processes with train.micro_batch_size 1 take 7"),
        (1, {"batch_size": 96}, 7, "The nearest that can: 91 or 98. Or start 6 or 8 processes"),
        (2, {"batch_size": 96}, 64, "The nearest that can: 128. Or start 48 processes"),
        (64, {"batch_size": 64}, 2, "Or start 1 process, or set train.micro_batch_size to 32"),
        (6, {"batch_size": 9}, 1, "The nearest that can: 6 or 12. Or set train.micro_batch_size to 3"),
        (2, {"batch_tokens": 96_000}, 5, "train.batch_tokens: 96,000 cannot be shared out"),
        (2, {"batch_tokens": 96_000}, 5, "The nearest that can: 90,000 or 100,000. Or start 4 or 6 processes"),
    ],
)
def test_processes_that_cannot_share_a_batch_are_told_what_fits(
    micro: int, batch: dict[str, int], processes: int, told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        accumulation_steps(train(micro, **batch), DATA, processes)
