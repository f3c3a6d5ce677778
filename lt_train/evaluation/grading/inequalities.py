r"""Inequalities joined by "or" as the union of intervals that they are: "x \le 1 or x > 3" as "(-\infty, 1] \cup (3, \infty)".

math-verify compares one inequality with one interval, but reads several as a list, whether "or" or "and" joins them.
"""

import re

END = r"(?![a-zA-Z])"  # of a command of LaTeX
SPACE = re.compile(rf"\\[,;:! ]|\\q?quad{END}|~|\$")
OR = re.compile(rf"\\(?:text|textbf|mathrm|mbox)\{{\s*or\s*\}}|\bor\b|\\(?:lor|vee){END}|∨")
RELATION = re.compile(rf"\\(?:leqslant|geqslant|leqq?|geqq?|le|ge|lt|gt){END}|<=|>=|[<>≤≥⩽⩾=]")
SET_BUILDER = re.compile(
    rf"\\?\{{\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\{{?R\}}?\s*)?(?:\\(?:mid|vert){END}|\||:)(?P<condition>.*?)\\?\}}"
)
INTERVAL = re.compile(r"[(\[].*,.*[)\]]")
TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "="}


def as_union(answer: str, *, commas: bool = False) -> str | None:
    r"""The answer as intervals with \cup between them; None where it is not inequalities of one variable, or intervals, with "or".

    Args:
        commas: read a comma between inequalities as "or", too.
    """
    spaced = SPACE.sub(" ", answer).strip()
    condition = found["condition"] if (found := SET_BUILDER.fullmatch(spaced)) else spaced
    parts = OR.split(condition)
    if commas and len(parts) == 1:
        parts = condition.split(",")
    parts = [part.strip() for part in parts]
    if len(parts) < 2:
        return None
    if r"\infty" in condition and all(map(INTERVAL.fullmatch, parts)):
        return r" \cup ".join(parts)
    read = [_interval(part) for part in parts]
    variables, intervals = {each[0] for each in read if each}, [each[1] for each in read if each]
    if None in read or len(variables) > 1 or all(interval.startswith(r"\{") for interval in intervals):
        return None  # "x = 2 or x = 3" is a list of solutions
    return r" \cup ".join(intervals)


def _interval(part: str) -> tuple[str, str] | None:
    """The variable and the interval of one inequality, or of two as in 1 < x < 3."""
    signs = [_plain(sign) for sign in RELATION.findall(part)]
    sides = [side.strip() for side in RELATION.split(part)]
    variables = [at for at, side in enumerate(sides) if re.fullmatch("[a-zA-Z]", side)]
    if not signs or len(signs) > 2 or not all(sides) or len(variables) != 1:
        return None
    (at,) = variables
    if len(signs) == 2:
        return (sides[at], between) if at == 1 and (between := _between(sides, signs)) else None
    bound, sign = sides[1 - at], signs[0] if at == 0 else TURNED[signs[0]]
    intervals = {
        "<": rf"(-\infty, {bound})",
        "≤": rf"(-\infty, {bound}]",
        ">": rf"({bound}, \infty)",
        "≥": rf"[{bound}, \infty)",
        "=": rf"\{{{bound}\}}",
    }
    return sides[at], intervals[sign]


def _between(sides: list[str], signs: list[str]) -> str | None:
    """1 < x ≤ 3, or 3 ≥ x > 1; None where the signs point apart."""
    low, high = sides[0], sides[2]
    if set(signs) <= {">", "≥"}:
        low, high, signs = high, low, [TURNED[sign] for sign in reversed(signs)]
    if not set(signs) <= {"<", "≤"}:
        return None
    return f"{'(' if signs[0] == '<' else '['}{low}, {high}{')' if signs[1] == '<' else ']'}"


def _plain(sign: str) -> str:
    if sign in ("<", r"\lt", ">", r"\gt", "="):
        return {r"\lt": "<", r"\gt": ">"}.get(sign, sign)
    return "≤" if sign in ("<=", "≤", "⩽") or sign.startswith(r"\le") else "≥"
