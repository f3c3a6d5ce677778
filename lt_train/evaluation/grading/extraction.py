r"""Which answer a text gives: its last balanced `\boxed{}`, else what its last lines call the answer.

Every search here is one pass over the text or over its short end, so no text takes long.
"""

import re
from dataclasses import dataclass
from typing import Literal

from lt_train.recipe.reasoning_tags import REASONING_ENDS

Kind = Literal["math", "choice"]
"""math: numbers, expressions, words. choice: one letter from A to J names the answer."""

ExtractedFrom = Literal["boxed", "phrase"]


@dataclass(frozen=True)
class Extracted:
    answer: str
    extracted_from: ExtractedFrom


END_CHARACTERS = 2000
"""Phrases are looked for in so many last characters: further up, "the answer is" opens a thought more often than it ends one."""

BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
r"""Whatever matters for balance. `\\.` consumes escaped characters, so that `\{` and `\}` do not count."""

EMPHASIS = r"[*_`]{0,3}"
COLON = r"[:\uff1a]"
REST_OF_LINE = rf"{EMPHASIS} \s* {EMPHASIS} [ \t]* (?= (?P<answer> [^\n]+ ) )"
"""Looked at, not consumed: a line may hold a second phrase, and the last one counts."""

PHRASE = re.compile(
    rf"""(?: \b answers? (?: \s+ (?:to|for) \b [^.\n:]{{1,80}}? )? {EMPHASIS} \s*
             (?: \b (?:is|are|equals) \b (?: \s+ (?:therefore|thus|hence|indeed|simply|just|then) \b )* \s* {COLON}? | {COLON} | = )
           | 答案 \s* (?: 应该 | 应 )? \s* (?: [是为選选] \s* {COLON}? | {COLON} )
         )
         {REST_OF_LINE}""",
    re.IGNORECASE | re.VERBOSE,
)
"""The usual ways to name an answer, and the rest of the line. A line break may stand before the answer."""

OPTION_PHRASE = re.compile(
    rf"""(?: \b (?:option|choice) \b (?: \s+ is \b )? \s* {COLON}?
           | \b answer \b (?= \s+ {EMPHASIS} [(\[]? [A-J] \b )
           | 选项? \s* [是为择]?
         )
         {REST_OF_LINE}""",
    re.IGNORECASE | re.VERBOSE,
)

REFUTED = re.compile(
    r"\W*[A-J]\W+(?:is|are|was)\s+(?:also\s+|therefore\s+)?(?:wrong|incorrect|false|not|ruled|impossible)\b", re.IGNORECASE
)
"""An option that is named to be put aside."""

DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*(.+?)\*\*|`(.+?)`")

SENTENCE_END = re.compile(
    r"[.!?](?=\s|$)|[\u3002\uff0c\uff1b\uff01\uff1f]|,?\s+(?=(?:because|since|which|where|so|but|not)\b)|,\s+(?=(?:as|and)\b)"
)
"""The numbers are Chinese punctuation: full stop, comma, semicolon, exclamation and question mark."""

LETTER = r"[(\[\uff08]? \s* (?P<letter>[A-J]) \s* [)\]\uff09]?"

CHOICE = re.compile(
    rf"(?: (?:option|choice|answer|选项) \s* {COLON}? \s* )? {LETTER} (?: [.:)\u3001\uff09\uff1a] .* | \s* )",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""A letter alone, or with a mark and the option's own text: "B", "(B)", "option B", "B) 12 cm"."""

LEADING_CHOICE = re.compile(r"[(\[]?(?P<letter>[A-J])[)\]]?(?=[\s,;.\u3002\uff0c])(?!\s*(?:,|and\b|or\b|&|/)\s*[(\[]?[A-J]\b)")
"""A capital that opens a sentence on it: "B because …", and not "A and B"."""

STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|textit|mathit|mathsf|boxed|bf|rm)\b\s*|[{}$*`~]|\\[,;!() ]")


def extract(text: str, kind: Kind = "math") -> Extracted | None:
    """The answer that a generated text gives; None: it gives none.

    A box counts before any phrase, wherever it stands. For a choice the answer is the letter, where what was found names one.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return Extracted(boxed if kind == "math" else choice_letter(boxed) or boxed, "boxed")
    phrased = last_phrased(text) if kind == "math" else phrased_choice(text)
    return None if phrased is None else Extracted(phrased, "phrase")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` whose braces balance, stripped; None where there is none, or nothing in it.

    Of nested boxes the outer one counts. One pass over the text, whatever it holds.
    """
    opened: list[int | None] = []  # for each open brace: where its content starts if it opens a box
    content: str | None = None
    for token in BRACES.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None:
                content = text[start : token.start()]
    return (content or "").strip() or None


def last_phrased(text: str) -> str | None:
    """What the last phrase such as "the answer is" at the end of a text is followed by; None: there is none."""
    for found in reversed(list(PHRASE.finditer(end_of(text)))):
        answer = bare_answer(found["answer"])
        if answer is not None:
            return answer
    return None


def phrased_choice(text: str) -> str | None:
    """The letter that the end of a text names, by a phrase or alone on the last line."""
    end = end_of(text)
    for phrase in (PHRASE, OPTION_PHRASE):
        for found in reversed(list(phrase.finditer(end))):
            letter = choice_letter(found["answer"]) or leading_letter(found["answer"])
            if letter is not None and not REFUTED.match(found["answer"]):
                return letter
    lines = end.strip().splitlines()
    return choice_letter(lines[-1]) if lines else None


def end_of(text: str) -> str:
    """Where a final answer is named: the last characters, after the thought if it was closed."""
    for end in REASONING_ENDS:
        text = text.rpartition(end)[2]
    return text[-END_CHARACTERS:]


def bare_answer(rest_of_line: str) -> str | None:
    r"""The answer without what surrounds it: mathematics' dollars, emphasis, the rest of the sentence.

    None for what is no answer: nothing, a denial, or a box (its braces do not balance, or the box would have been taken).
    """
    rest = rest_of_line.strip()
    if r"\boxed" in rest or re.match(r"not\b", rest, re.IGNORECASE):
        return None
    delimited = DELIMITED.match(rest)
    if delimited:
        rest = next(group for group in delimited.groups() if group is not None)
    else:
        sentence_end = SENTENCE_END.search(rest)
        rest = rest[: sentence_end.start()] if sentence_end else rest
    return rest.strip().strip("*_`").rstrip(" .,;:").strip() or None


def choice_letter(answer: str) -> str | None:
    """The letter (a capital) that an answer consists of or opens with; None: it is no choice."""
    plain = STYLED.sub(" ", answer).strip().rstrip(".,;\u3002\uff0c ")
    found = CHOICE.fullmatch(plain)
    return found["letter"].upper() if found else None


def leading_letter(sentence: str) -> str | None:
    plain = STYLED.sub(" ", sentence).strip()
    found = LEADING_CHOICE.match(plain)
    # "A" and "I" are words too: they count only where no small letter follows.
    if found is None or (found["letter"] in "AI" and re.match(r"[AI]\s+[a-z]", plain)):
        return None
    return found["letter"]
