import pytest

from lt_train.runtime.columns import value_at

ROW = {"answer": "42", "deep": {"list": [{"x": 1}, "two"]}, "a.b": "dotted", "json": '{"x": ["y"]}', "none": None}


@pytest.mark.parametrize(
    ("path", "value"),
    [("answer", "42"), ("deep.list.0.x", 1), ("deep.list.1", "two"), ("a.b", "dotted"), ("json.x.0", "y"), ("none", None)],
)
def test_a_path_leads_through_names_and_numbers(path: str, value: object) -> None:
    assert value_at(ROW, path) == value


@pytest.mark.parametrize(
    ("path", "reported"),
    [
        ("other", "no field 'other': the row has answer, deep"),
        ("deep.other", "no field 'other': 'deep' holds list"),
        ("deep.list.7", r"no item 7: 'deep.list' holds a list of 2, counted from 0"),
        ("answer.x", "no field 'x': 'answer' holds a number"),
        ("none.x", "no field 'x': 'none' holds nothing"),
    ],
)
def test_a_path_that_leads_nowhere_is_reported_with_where_it_ends(path: str, reported: str) -> None:
    with pytest.raises(LookupError, match=reported):
        value_at(ROW, path)
