import pytest
import torch

from lt_train.selection.nll import nll_rise
from lt_train.selection.token_losses import TokenLosses


def test_nll_is_the_mean_rise_over_all_answer_tokens():
    full_A = torch.tensor([1.0, 2.0, 3.0, 4.0])
    one_streaming_LA = torch.stack([full_A, full_A + torch.tensor([0.0, 0.0, 0.0, 2.0])])
    rise_L, all_streaming = nll_rise(TokenLosses(full_A, full_A + 1.5, one_streaming_LA))
    assert rise_L == pytest.approx([0.0, 0.5])
    assert all_streaming == pytest.approx(1.5)
