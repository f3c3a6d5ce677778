r"""One spelling for what people write in several: "1 234", "1 1/2", "－5", "0{,}5", "√2", "1.5e-7", "2 \pm 1"."""

import re

CHARACTERS = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u2013": "-",  # en dash
        "\uff0d": "-",  # full-width minus
        "\uff0b": "+",
        "\uff0c": ",",
        "\uff0e": ".",
        "\uff1d": "=",
        "\uff08": "(",
        "\uff09": ")",
        "\uff05": "%",
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},  # full-width digits
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f", " "),  # hard and thin spaces
        "\u2248": r"\approx ",
        "\u2205": r"\emptyset ",
        "\u221e": r"\infty ",
        "\u00b1": r"\pm ",
        "\u2213": r"\mp ",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u00b0": r"^\circ ",
    }
)

ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[a-z])|\(([^()]*)\))")
GROUPED_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|~| )+\d{3})+(?!\d)")
BRACED_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:\{,\}\d{3})+(?!\d)")
EMPTY_SET = re.compile(r"\\varnothing\b|\\\{\s*\\\}|\\O\b")
ABOUT = re.compile(r"^\s*(?:\\(?:approx|simeq|sim|thickapprox)\b|=)\s*")
MIXED_NUMBER = re.compile(r"(?<![\d.,/])(\d+) +(\d+)/(\d+)(?![\d.,/])")
SCIENTIFIC = re.compile(r"^\s*([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)\s*$")
ONLY_TEXT = re.compile(r"\s*\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}\s*")
SIGN = re.compile(r"\\(pm|mp)\b\s*")
LEADING_PLUS = re.compile(r"^\+\s*|(?<=[=({])\+\s*")
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def one_spelling(answer: str) -> str:
    """The answer with the characters, number groups and signs that math-verify reads."""
    plain = answer.translate(CHARACTERS).strip()
    if text := ONLY_TEXT.fullmatch(plain):
        plain = text[1].strip()
    plain = ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", plain)
    plain = GROUPED_DIGITS.sub(lambda number: re.sub(r"\D", "", number[0]), plain)
    plain = MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", plain)
    plain = THOUSANDS.sub(lambda number: number[0].replace("{,}", ""), plain)
    plain = BRACED_COMMA.sub(".", plain)  # what does not group thousands is a decimal comma
    plain = EMPTY_SET.sub(lambda _: r"\emptyset", plain)
    plain = ABOUT.sub("", plain)
    plain = SCIENTIFIC.sub(lambda number: rf"{number[1]} \times 10^{{{number[2]}}}", plain)
    return both_signs(plain)


def both_signs(answer: str) -> str:
    r"""Every element with \pm as two, one with each sign: math-verify reads \pm only at the top of an expression."""
    if not SIGN.search(answer):
        return answer
    set_of = re.fullmatch(r"\\(?:left\\)?\{(.*?)\\(?:right\\)?\}", answer, re.DOTALL)
    if set_of:
        return rf"\{{{both_signs(set_of[1])}\}}"
    elements: list[str] = []
    for element in split_at_commas(answer):
        elements += dict.fromkeys((with_signs(element, pm="+", mp="-"), with_signs(element, pm="-", mp="+")))
    return ", ".join(elements)


def with_signs(element: str, **signs: str) -> str:
    return LEADING_PLUS.sub("", SIGN.sub(lambda found: signs[found[1]], element.strip()))


def split_at_commas(text: str) -> list[str]:
    """The parts between the commas that are outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += BRACKETS.get(character, 0)
        if character == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]
