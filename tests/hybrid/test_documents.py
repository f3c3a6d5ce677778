import pytest
import torch

from lt_train.hybrid.documents import find_documents
from lt_train.hybrid.spec import HybridError

CPU = torch.device("cpu")


def test_rows_without_mask_or_positions_are_one_document_each():
    documents = find_documents(2, 5, CPU, None, None)
    assert documents.spans == ((0, 0, 5), (1, 0, 5))
    assert documents.fill_rows and not documents.are_packed


def test_padding_on_either_side_belongs_to_no_document():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    documents = find_documents(2, 4, CPU, mask, None)
    assert documents.spans == ((0, 2, 2), (1, 0, 3))
    assert documents.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]


def test_positions_that_restart_start_a_document_even_under_a_mask_of_ones():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    documents = find_documents(1, 5, CPU, torch.ones(1, 5, dtype=torch.long), positions)
    assert documents.spans == ((0, 0, 3), (0, 3, 2))
    assert documents.are_packed


@pytest.mark.parametrize(
    ("mask", "positions", "reason"),
    [
        (torch.tensor([[1, 0, 1]]), None, "hole"),
        (torch.ones(1, 1, 3, 3), None, "padding mask"),
        (torch.ones(1, 4), None, "padding mask"),
        (None, torch.tensor([[3, 4, 5]]), "count 0, 1, 2"),
        (None, torch.tensor([[0, 2, 3]]), "count 0, 1, 2"),
        (torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 2]]), "count 0, 1, 2"),
    ],
)
def test_what_would_move_the_sinks_is_an_error(mask, positions, reason):
    with pytest.raises(HybridError, match=reason):
        find_documents(1, 3, CPU, mask, positions)
