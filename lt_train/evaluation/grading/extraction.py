r"""Which answer a text gives: its last `\boxed{}`, else what it calls the answer, else its last formula or number.

What follows the reasoning counts before what is in it. Every search is one pass over the text or over its short end, except for
the last formula, which math-verify finds; `Grader` therefore extracts in the process that it can kill.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lt_train.evaluation.grading.quantities import values
from lt_train.recipe.reasoning_tags import REASONING_ENDS, REASONING_TAGS

Kind = Literal["math", "choice"]
"""math: numbers, expressions, words. choice: one letter from A to J names the answer."""

ExtractedFrom = Literal["boxed", "phrase", "last"]
"""boxed: a box. phrase: words or marks that name the answer. last: nothing names it; the last formula or number was taken."""


@dataclass(frozen=True)
class Extracted:
    answer: str
    extracted_from: ExtractedFrom


REASONING_STARTS = tuple(tags.opening for tags in REASONING_TAGS)

END_CHARACTERS = 2000
"""Phrases and formulas are searched in the last characters: further up, "the answer is" opens a line of reasoning more often than
it ends one."""

BOX = r"\\(?:boxed|fbox)"

BRACES = re.compile(
    rf"(?P<box>{BOX}\s*\{{) | {BOX}[ \t]+(?P<unbraced>[^\s${{}}\\]+) | \\. | (?P<open>\{{) | (?P<close>\}})", re.DOTALL | re.VERBOSE
)
r"""Whatever matters for balance. `\\.` consumes escaped characters, so that `\{` and `\}` do not count."""

AROUND_MATHEMATICS = re.compile(r"\s|\$|~|\\[()\[\],;:! ]|\\q?quad\b|[A-Za-z](?:_\{?\w\}?)?\s*=")
CONJUNCTION = re.compile(r"[,;]?(?:and|or|\\text\{,?(?:and|or)\}|[,;\u548c\u6216\u3001])")
"""What joins two boxes to one answer. The numbers are Chinese: and, or, enumeration comma."""

EMPHASIS = r"[*_`]{0,3}"
COLON = r"[:\uff1a]"
REST_OF_LINE = rf"{EMPHASIS} \s* {EMPHASIS} [ \t]* (?= (?P<answer> \\\[ .*? \\\] | \$\$ .*? \$\$ | [^\n]+ ) )"
"""A displayed formula, or the line. Looked at, not consumed: a line may hold a second phrase, and the last one counts."""

PHRASE = re.compile(
    rf"""(?: \b answers? (?: \s+ (?:to|for) \b [^.\n:]{{1,80}}? )? {EMPHASIS} \s*
             (?: \b (?:is|are|equals) \b (?: \s+ (?:therefore|thus|hence|indeed|simply|just|then) \b )* \s* {COLON}? | {COLON} | = )
           | 答案 \s* (?: 应该 | 应 )? \s* (?: [是为选选] \s* {COLON}? | {COLON} )
           | 答え \s* (?: は | {COLON} )
         )
         {REST_OF_LINE}""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""The usual ways to name an answer, and the rest of the line. A line break may precede the answer."""

MARK = re.compile(
    rf"""(?: <answer> \s* (?= (?P<tagged> .*? ) \s* </answer> )
           | \#\#\#\# [ \t]* (?= (?P<hashed> [^\n]+ ) )
           | ^ [ \t]* {EMPHASIS} A {EMPHASIS} {COLON}
             {REST_OF_LINE}
           | ^ [ \t>#*_]* (?: the \s+ )? (?: final \s+ )? (?: answer | result ) [ \t*_]* \n
             \s* (?= (?P<below> \\\[ .*? \\\] | \$\$ .*? \$\$ | [^\n]+ ) )
         )""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL | re.MULTILINE,
)
"""Marks of an answer: <answer>…</answer>, GSM8K's "#### 18", a line "A: 33", a heading "Final Answer" and the line below it."""

DENIAL = re.compile(r"\banswers?\s+(?:is|are)\s+not\b[^.\n]*", re.IGNORECASE)

OPTION_PHRASE = re.compile(
    rf"""(?: \b (?:option|choice) \b (?: \s+ is \b )? \s* {COLON}?
           | \b answer \b (?= \s+ {EMPHASIS} [(\[]? [A-J] \b )
           | 选项? \s* [是为择]?
         )
         {REST_OF_LINE}""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)

REFUTED = re.compile(
    r"\W*[A-J]\W+(?:is|are|was)\s+(?:also\s+|therefore\s+)?(?:wrong|incorrect|false|not|ruled|impossible)\b", re.IGNORECASE
)
"""An option that is named to be put aside."""

DELIMITED = re.compile(
    r"\$\$(.+?)\$\$ | \$((?:\\.|[^$\\])+)\$ | \\\((.+?)\\\) | \\\[(.+?)\\\] | \*\*(.+?)\*\* | `(.+?)`", re.DOTALL | re.VERBOSE
)

BOLD = re.compile(r"\*\*(?!\s)((?:\\.|[^*\n$\\]|\*(?!\*))+)(?<!\s)\*\*")

SENTENCE_END = re.compile(
    r"(?<!\\)[.!?](?=\s|$)|[\u3002\uff0c\uff1b\uff01\uff1f]|\s*(?:です|である|となります|になります)"
    r"|,?\s+(?=(?:because|since|which|where|so|but|not)\b)|,\s+(?=(?:as|and)\b)"
)
"""The numbers are Chinese punctuation: full stop, comma, semicolon, exclamation and question mark. The words end Japanese ones."""

WORD = re.compile(r"(?<![\\\w])[A-Za-z]{2,}")
WORDS_OF_A_SENTENCE = 3

LETTER = r"[(\[\uff08]? \s* (?P<letter>[A-J]) \s* [)\]\uff09]?"

CHOICE = re.compile(
    rf"(?: (?:option|choice|answer|选项) \s* {COLON}? \s* )? {LETTER} (?: [.:)\u3001\uff09\uff1a] .* | \s* )",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
"""A letter alone, or with a mark and the option's own text: "B", "(B)", "option B", "B) 12 cm"."""

LEADING_CHOICE = re.compile(r"[(\[]?(?P<letter>[A-J])[)\]]?(?=[\s,;.\u3002\uff0c])(?!\s*(?:,|and\b|or\b|&|/)\s*[(\[]?[A-J]\b)")
"""A capital that opens a sentence on it: "B because …", and not "A and B"."""

ARTICLE_OR_PRONOUN = re.compile(
    r"[AI]\s+(?!(?:is|was|because|since|as|for|due|given|which|so|but|not|if|when|where|by|from)\b)[a-z]"
)
"""Words, not options: "A cat", "I think"."""

STYLED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|textit|mathit|mathsf|boxed|bf|rm)\b\s*|[{}$*`~]|\\[,;!() ]")

SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>")


def extract(text: str, kind: Kind = "math", ended: bool = True) -> Extracted | None:
    """The answer that a generated text gives; None: it gives none.

    A box counts before any phrase, wherever it is after the reasoning. For a choice the answer is the letter, where what was
    found names one.

    Args:
        ended: False: the text was truncated, so that its last formula is no answer.
    """
    reasoning, answer = split_reasoning(text)
    found = named_answer(answer, kind)
    if found is None and kind == "math" and ended and (reasoning or not text.lstrip().startswith(REASONING_STARTS)):
        last = last_formula(DENIAL.sub("", answer[-END_CHARACTERS:]))
        found = None if last is None else Extracted(last, "last")
    return found or boxed(reasoning, kind)


def named_answer(text: str, kind: Kind) -> Extracted | None:
    """The content of a box, or what is called the answer."""
    if found := boxed(text, kind):
        return found
    end = text[-END_CHARACTERS:]
    phrased = last_phrased(end) if kind == "math" else phrased_choice(end)
    return None if phrased is None else Extracted(phrased, "phrase")


def split_reasoning(text: str) -> tuple[str, str]:
    """The text up to the end of its reasoning, which is empty where no reasoning was ended, and the text after it without special
    tokens.
    """
    end = end_of_reasoning(text)
    return text[:end], SPECIAL_TOKEN.sub("", text[end:])


def end_of_reasoning(text: str) -> int:
    """The place where the text after the reasoning begins; 0 where no reasoning was ended."""
    return max((at + len(mark) for mark in REASONING_ENDS if (at := text.rfind(mark)) >= 0), default=0)


def boxed(text: str, kind: Kind) -> Extracted | None:
    content = last_boxed(text)
    if content is None:
        return None
    return Extracted(content if kind == "math" else choice_letter(content) or content, "boxed")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` or `\fbox{}` whose braces balance, stripped; None where there is none, or nothing in it.

    Boxes that "and", "or" or a comma joins are one answer. Of nested boxes the outer one counts. One pass over the text, whatever
    it holds.
    """
    boxes = balanced_boxes(text)
    contents = [text[boxes[-1][1] : boxes[-1][2]].strip()] if boxes else []
    for (_, _, end_of_content), (start, _, _) in zip(reversed(boxes[:-1]), reversed(boxes), strict=False):
        between = AROUND_MATHEMATICS.sub("", text[end_of_content:start].removeprefix("}")) if start - end_of_content < 60 else ""
        if not CONJUNCTION.fullmatch(between):
            break
        contents.append(text[boxes[-1 - len(contents)][1] : end_of_content].strip())
    return ", ".join(dict.fromkeys(reversed(contents))) or None


def balanced_boxes(text: str) -> list[tuple[int, int, int]]:
    """The outermost boxes of a text, in order: where each starts, and where its content starts and ends."""
    opened: list[tuple[int, int] | None] = []  # for each open brace: where the box and its content start, if it opens one
    boxes: list[tuple[int, int, int]] = []
    for token in BRACES.finditer(text):
        if token["box"]:
            opened.append((token.start(), token.end()))
        elif token["unbraced"]:
            content = token["unbraced"].rstrip(".,;:")
            boxes.append((token.start(), token.start("unbraced"), token.start("unbraced") + len(content)))
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            box = opened.pop()
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:
                    boxes.pop()
                boxes.append((*box, token.start()))
    return boxes


def last_phrased(end: str) -> str | None:
    """The text after the last phrase such as "the answer is", or the last mark of an answer; None: there is none."""
    for found in sorted([*PHRASE.finditer(end), *MARK.finditer(end)], key=lambda match: match.start(), reverse=True):
        answer = marked_answer(found)
        if answer is not None:
            return answer
    return None


def marked_answer(found: re.Match[str]) -> str | None:
    groups = found.groupdict()
    if tagged := groups.get("tagged"):
        return tagged.strip().strip("$").strip() or None
    if hashed := groups.get("hashed"):  # elsewhere than at the end "#### 1. Sum up" is a heading
        is_last = not found.string[found.end("hashed") :].strip()
        return bare_answer(hashed) if is_last or values(hashed) else None
    name = "answer" if groups.get("answer") else "below"
    line, following = found[name] or "", found.string[found.end(name) :]
    if line.rstrip(" *_").endswith((":", "\uff1a")) and following.strip():
        return last_formula(following)  # the line announces the formula below it
    return bare_answer(line)


def phrased_choice(end: str) -> str | None:
    """The letter that the end of a text names, by a phrase or alone on the last line."""
    for phrase in (PHRASE, OPTION_PHRASE):
        for found in reversed(list(phrase.finditer(end))):
            letter = choice_letter(found["answer"]) or leading_letter(found["answer"])
            if letter is not None and not REFUTED.match(found["answer"]):
                return letter
    lines = end.strip().splitlines()
    return choice_letter(lines[-1]) if lines else None


def bare_answer(rest_of_line: str) -> str | None:
    r"""The answer without what surrounds it: mathematics' dollars, emphasis, the rest of the sentence. Of a sentence that holds a
    formula the formula.

    None for what is no answer: nothing, a denial, or a box (its braces do not balance, or the box would have been taken).
    """
    rest = re.sub(r"^[-*\u2022]\s+(?=\*\*|\$|\\)", "", rest_of_line.strip())  # of a list's item the text
    if r"\boxed" in rest or re.match(r"not\b", rest, re.IGNORECASE):
        return None
    delimited = DELIMITED.match(rest)
    if delimited:
        rest = next(group for group in delimited.groups() if group is not None)
    else:
        sentence_end = SENTENCE_END.search(rest)
        rest = rest[: sentence_end.start()] if sentence_end else rest
    answer = rest.strip().strip("*_`").rstrip(" .,;:").strip()
    if len(WORD.findall(answer)) >= WORDS_OF_A_SENTENCE and not values(answer):
        answer = last_formula(rest_of_line) or answer
    return answer or None


def last_formula(text: str) -> str | None:
    """The last formula or number, of the last paragraph that holds one; None: there is none."""
    return next((formula for paragraph in reversed(re.split(r"\n\s*\n", text)) for formula in formulas(paragraph)), None)


def formulas(paragraph: str) -> Iterator[str]:
    """The formulas that math-verify takes for the answer of a paragraph, if it holds any."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if not re.search(r"\d|\$|\\[(\[]|\*\*", paragraph):
        return  # spares the search
    found = parse(
        BOLD.sub(lambda bold: f"${bold[1]}$" if is_value(bold[1]) else bold[0], paragraph),
        [LatexExtractionConfig(boxed_match_priority=-1), ExprExtractionConfig()],
        extraction_mode="first_match",
        parsing_timeout=None,
        raise_on_error=True,
    )
    yield from (each.strip() for each in found if isinstance(each, str) and each.strip())


def is_value(text: str) -> bool:
    """Whether a text is a formula or a number, with a unit perhaps, rather than words."""
    return bool(values(text)) or text.startswith("\\") or not WORD.search(text)


def choice_letter(answer: str) -> str | None:
    """The letter (a capital) that an answer consists of or opens with; None: it is no choice."""
    plain = STYLED.sub(" ", answer).strip().rstrip(".,;\u3002\uff0c ")
    found = CHOICE.fullmatch(plain)
    return found["letter"].upper() if found else None


def leading_letter(sentence: str) -> str | None:
    plain = STYLED.sub(" ", sentence).strip()
    found = LEADING_CHOICE.match(plain)
    return None if found is None or ARTICLE_OR_PRONOUN.match(plain) else found["letter"]
