r"""Numbers as people write them: "1,234", "\$5", "30\%", "12 cm", "5 million"."""

import re
from fractions import Fraction

from lt_train.evaluation.grading.spelling import one_spelling

NUMBER = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?")

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

SHORT_UNITS = frozenset(
    word
    for line in (
        "m g s L l h N J W V A K C F cm mm km dm nm kg mg ml mL cl cL dl dL kL ft in yd mi lb lbs oz gal pt qt hr hrs min sec ms",
        "mph kph rad deg Hz kHz MHz eV mol Pa kPa kJ kN kW MW Wh mA atm USD EUR GBP sq cu day cup way am pm",
    )
    for word in line.split()
)
"""Units of up to three letters. Other short words are no units: "5 xy" is a product."""

NO_UNITS = {
    "and",
    "or",
    "to",
    "if",
    "is",
    "not",
    "for",
    "when",
    "then",
    "where",
    "mod",
    "base",
    "choose",
    "plus",
    "minus",
    "times",
} | {*("over", "sqrt", "squared", "cubed", "dozen", "half", "third", "quarter")}
"""Words after a number that make another number of it, or name a second one."""

UNIT = re.compile(r"(?:/|per\b)?\s*(?P<word>[^\W\d_²³]+)\.?(?:\s*\^?\s*\{?[23²³]\}?)?\s*")

WORDS_OF_A_UNIT = 5

LONGEST = 200


def same_number(first: str, second: str) -> bool:
    """Whether one of the two is a plain number and the other the same number, with or without a unit."""
    if len(first) > LONGEST or len(second) > LONGEST:
        return False
    for plain, other in ((first, second), (second, first)):
        number = plain_number(plain)
        if number is not None and number in values(other):
            return True
    return False


def plain_number(text: str) -> Fraction | None:
    """The number that a text consists of; None: it is something else."""
    return to_number(without_spacing(text))


def values(text: str) -> set[Fraction]:
    """The numbers that a quantity may mean: empty where it is none, two for "5 million" (whose unit may be the million)."""
    plain = without_spacing(text)
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textrm|mbox)\s*\{([^{}]*)\}", r" \1 ", plain)
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°", plain).strip()
    plain = re.sub(r"^([-+]?)\s*(?:\\?[$]|[€£¥])\s*([-+]?)", r"\1\2", plain)
    found = NUMBER.match(plain)
    number = to_number(found.group()) if found else None
    if found is None or number is None:
        return set()
    unit = plain[found.end() :].strip()
    scale = re.match(r"([a-z]+)\b", unit, re.IGNORECASE)
    if scale and scale[1].lower() in SCALES and is_unit(unit[scale.end() :]):
        return {number, number * SCALES[scale[1].lower()]}
    return {number} if is_unit(unit) else set()


def is_unit(text: str) -> bool:
    rest = text.strip().removeprefix(r"\%").removeprefix("%").removeprefix("°").strip().rstrip(".").strip()
    for _ in range(WORDS_OF_A_UNIT):
        if not rest:
            return True
        found = UNIT.match(rest)
        if found is None:
            return False
        word = found["word"]
        if word.lower() in NO_UNITS or word.lower() in SCALES or (len(word) <= 3 and word not in SHORT_UNITS):
            return False
        rest = rest[found.end() :]
    return not rest


def without_spacing(text: str) -> str:
    """The text in one spelling, without mathematics' dollars around it and LaTeX spaces."""
    plain = text.strip().rstrip(".")
    if len(plain) > 1 and plain[0] == plain[-1] == "$":
        plain = plain.strip("$")
    return re.sub(r"\\[,;!: ]|~", " ", one_spelling(plain)).strip()


def to_number(text: str) -> Fraction | None:
    if not NUMBER.fullmatch(text) or not any(character.isdigit() for character in text):
        return None
    return Fraction(text.replace(",", ""))
