from pathlib import Path

import pytest
import torch

from lt_train.export.bare_process import NEW_TOKENS, Observation
from lt_train.export.verify import check_batches, compare, tolerance
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError

MASK = torch.tensor([[0, 0, 1], [1, 1, 1]])


def observation():
    torch.manual_seed(1)
    scores = torch.randn(2, NEW_TOKENS, 5)
    return Observation(torch.randn(2, 3, 5), scores.argmax(dim=-1), scores)


def compared(found, dtype=torch.float32):
    return compare(Path("out"), [(MASK, MASK)], [observation()], [found], dtype, "Class", own_code=True)


def test_equal_observations_pass():
    check = compared(observation())
    assert (check.logits_difference, check.tokens, check.ties) == (0.0, 2 * NEW_TOKENS, 0)


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


def test_a_tie_is_told_from_another_token():
    wanted, found = observation(), observation()
    mine = int(wanted.sequences_BN[1, 4])
    theirs = (mine + 1) % 5
    wanted.scores_BNV[1, 4, theirs] = wanted.scores_BNV[1, 4, mine] - 1e-6
    found.sequences_BN[1, 4:] = theirs
    check = compare(Path("out"), [(MASK, MASK)], [wanted], [found], torch.float32, "Class", own_code=True)
    assert (check.tokens, check.ties) == (NEW_TOKENS + 4, 1)


def test_the_project_s_own_code_is_held_to_1e_5_in_fp32():
    assert tolerance(torch.float32, 40.0, own_code=True) == 1e-5
    assert tolerance(torch.float32, 40.0, own_code=False) == pytest.approx(4e-4)


@pytest.mark.parametrize(("w_sink", "w_recent"), [(0, 1), (4, 7), (4, 124), (4, 1020)])
def test_batches_hold_rows_shorter_than_the_sinks_and_longer_than_the_window(w_sink, w_recent):
    batches = check_batches(HybridSpec(4, (1,), w_sink, w_recent), 96, 4096)
    lengths = [length for _, mask in batches for length in mask.sum(dim=1).tolist()]
    assert min(lengths) == 1 and max(lengths) > w_sink + w_recent
    assert all(bool(mask[:, -1].all()) for _, mask in batches), "padded on the left"
    assert max(mask.numel() for _, mask in batches) < 2048, "a wide vocabulary must not make the check's logits huge"


def test_a_short_context_bounds_the_batches():
    (_, mask), (_, alone) = check_batches(HybridSpec(4, (1,), 4, 1020), 96, 64)
    assert mask.shape[1] == alone.shape[1] == 64 - NEW_TOKENS
