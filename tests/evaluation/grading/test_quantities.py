from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_train.evaluation.grading.quantities import plain_number, same_number

NUMBERS = st.decimals(min_value=-(10**9), max_value=10**9, places=2, allow_nan=False)


@pytest.mark.parametrize(
    ("plain", "written"),
    [
        ("5", r"\$5"),
        ("5", "$5"),
        ("-5", r"-\$5"),
        ("5", "$5$"),
        ("5", "€5"),
        ("30", r"30\%"),
        ("30", "30%"),
        ("30", "30 percent"),
        ("12", "12 cm"),
        ("12", "12cm"),
        ("12", r"12\text{ cm}"),
        ("12", r"12 \mathrm{~cm}"),
        ("12", r"12\ \text{cm}^2"),
        ("12", "12 cm^{2}"),
        ("12", "12 cm²"),
        ("12", "12 km/h"),
        ("12", "12 miles per hour"),
        ("12", "12 square feet."),
        ("12", "12 m"),
        ("18", "18 dollars"),
        ("1234", "1,234"),
        ("1,234", "1234"),
        ("1234", "1{,}234"),
        ("1234567", r"1\,234\,567"),
        ("1234567", "1 234 567"),
        ("0.5", "0{,}5"),
        ("90", r"90^\circ"),
        ("90", r"90^{\circ}"),
        ("-5", "-5 °C"),
        ("033", "33"),
        ("5", "5.0"),
        ("0.5", ".5"),
        ("-5", "−5"),
        ("5000000", "5 million"),
        ("5", "5 million dollars"),
    ],
)
def test_a_number_with_a_unit_is_the_plain_number(plain: str, written: str) -> None:
    assert same_number(plain, written)
    assert same_number(written, plain)


@pytest.mark.parametrize(
    ("plain", "written"),
    [
        ("5", "5x"),
        ("5", "5 x"),
        ("5", "5xy"),
        ("5", "5 or 6"),
        ("5", "5 and 6"),
        ("5", "5, 6"),
        ("5", r"5\text{ or }6"),
        ("5", r"5\pi"),
        ("5", r"5 \times 10^3"),
        ("5", "5^2"),
        ("5", "5 squared"),
        ("5", "5!"),
        ("5", "5/2"),
        ("5", "5 hours 30 minutes"),
        ("5", "(5)"),
        ("5", "x = 5"),
        ("12", "1,2"),
        ("1234", "12,34"),
        ("125", "0,125"),
        ("1234", "12 34"),
        ("5", ""),
        ("", ""),
        (".", "."),
        ("5 cm", "5 m"),
        ("5", "5" + " cm" * 200),
        ("5", "9" * 5000),  # Python makes no integer of so many digits
    ],
)
def test_what_is_not_the_plain_number_is_left_to_others(plain: str, written: str) -> None:
    assert not same_number(plain, written)


@given(NUMBERS, NUMBERS)
def test_two_spellings_are_the_same_number_exactly_if_their_values_are(first, second) -> None:
    for written in (f"{second:,}", f"{second} cm", rf"\text{{{second}}}", f"${second}$", rf"{second}\%"):
        assert same_number(str(first), written) == (first == second)
        assert same_number(str(second), written)


@given(st.text(alphabet="0123456789.,-+ $%\\{}^acm", max_size=30))
def test_a_plain_number_is_read_as_python_reads_it(text: str) -> None:
    number = plain_number(text)
    if number is not None:
        plain = text.strip().replace(",", "").replace("{}", "").replace(" ", "")
        assert "\\" in text or "{,}" in text or number == Fraction(plain.strip("$").rstrip("."))
