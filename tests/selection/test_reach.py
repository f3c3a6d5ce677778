import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lt_train.selection.reach import long_reach_tokens, reach_rise
from lt_train.selection.token_losses import TokenLosses


def losses_with(all_streaming_rise: list[float], *layer_rises: list[float]) -> TokenLosses:
    full_A = torch.linspace(0.5, 2.0, len(all_streaming_rise))
    one_streaming_LA = full_A + torch.tensor(layer_rises or [all_streaming_rise])
    return TokenLosses(full_A, full_A + torch.tensor(all_streaming_rise), one_streaming_LA)


def test_reach_looks_at_the_tokens_that_suffer_most_when_every_layer_streams():
    all_streaming = [0.0] * 18 + [5.0, 4.0]
    harmless = [0.5] * 18 + [0.0, 0.0]
    look_up = [0.0] * 18 + [3.0, 1.0]
    rise_L, rise_of_all = reach_rise(losses_with(all_streaming, harmless, look_up), fraction=0.1)
    assert rise_L == pytest.approx([0.0, 2.0], abs=1e-6)
    assert rise_of_all == pytest.approx(4.5)


@pytest.mark.parametrize(("tokens", "share", "count"), [(30, 0.1, 3), (31, 0.1, 4), (3, 0.1, 1), (7, 1.0, 7)])
def test_a_share_of_the_tokens_is_rounded_up(tokens, share, count):
    assert len(long_reach_tokens(losses_with([0.0] * tokens), share)) == count


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_no_token_left_out_rises_more_than_one_taken(rises, share):
    losses = losses_with(rises)
    rise_A = losses.all_streaming_A - losses.full_A
    taken = set(long_reach_tokens(losses, share).tolist())
    left_out = [rise_A[token].item() for token in range(len(rises)) if token not in taken]
    assert min(rise_A[token].item() for token in taken) >= max(left_out, default=float("-inf"))
