from pathlib import Path

import pytest
import torch

from lt_train.export.bare_process import NEW_TOKENS, Observation
from lt_train.export.tolerance import LogitChanges
from lt_train.export.verify import compare
from lt_train.runtime.errors import UserError

MASK = torch.tensor([[0, 0, 1], [1, 1, 1]])


def observation():
    torch.manual_seed(1)
    scores = torch.randn(2, NEW_TOKENS, 5)
    return Observation(torch.randn(2, 3, 5), scores.argmax(dim=-1), scores)


METADATA = {"model_class": "Class", "dtype": "float32"}
MEASURED = LogitChanges(rounding=1e-6, faults={"no sinks": 0.5})


def compared(found, wanted=None):
    return compare(Path("out"), [(MASK, MASK)], [wanted or observation()], [found], MEASURED, METADATA)


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_other_logits_are_an_error(wrong):
    found = observation()
    found.logits_BKV[1, 0, 2] += wrong
    with pytest.raises(UserError, match="other logits"):
        compared(found)


def test_logits_of_padding_do_not_count():
    found = observation()
    found.logits_BKV[0, :2] += 1
    assert compared(found).logits_difference == 0.0


def test_another_token_is_an_error():
    found = observation()
    found.sequences_BN[1, 4] = (found.sequences_BN[1, 4] + 1) % 5
    with pytest.raises(UserError, match="other tokens"):
        compared(found)


def test_a_tie_is_distinguished_from_another_token():
    wanted, found = observation(), observation()
    mine = int(wanted.sequences_BN[1, 4])
    theirs = (mine + 1) % 5
    wanted.scores_BNV[1, 4, theirs] = wanted.scores_BNV[1, 4, mine] - 1e-6
    found.sequences_BN[1, 4:] = theirs
    check = compared(found, wanted)
    assert (check.tokens, check.ties) == (NEW_TOKENS + 4, 1)
