"""Which fields of a row hold what, for every format of data that is known by name or by its columns."""

from collections.abc import Mapping
from typing import Any

from lt_train.dataset.faults import RowFault
from lt_train.recipe.columns import Columns
from lt_train.recipe.schema import Data

FORMATS = {
    "messages": Columns(messages="messages"),
    "sharegpt": Columns(messages="conversations"),
    "prompt_completion": Columns(question="prompt", answer="completion"),
    "prompt_response": Columns(question="prompt", answer="response"),
    "alpaca": Columns(question="instruction", input="input", answer="output"),
    "still": Columns(question="question", answer="combined_text"),
}
"""The formats of data.format."""

PUBLISHED = {
    "OpenThoughts (metadata)": Columns(question="problem", reasoning="deepseek_reasoning", answer="deepseek_solution"),
    "s1K": Columns(question="question", reasoning="thinking_trajectories.0", answer="attempt"),
    "s1K-1.1": Columns(question="question", reasoning="deepseek_thinking_trajectory", answer="deepseek_attempt"),
    "OpenR1-Math": Columns(question="problem", answer="generations", verified=["correctness_math_verify", "is_reasoning_complete"]),
}
"""Data sets with columns of their own, recognised by them."""

PLAIN = {
    "LIMO": Columns(question="question", answer="solution"),
    "GSM8K": Columns(question="question", answer="answer"),
}
"""Data sets with common column names, recognised where a row has no others."""

PLAIN_FIELDS = {"LIMO": {"question", "solution", "answer"}, "GSM8K": {"question", "answer"}}


def chosen_format(data: Data, row: Mapping[str, Any]) -> tuple[str, Columns]:
    """The fields of a row, as the recipe names them or its first row shows them.

    Returns:
        The format in words, and its fields.

    Raises:
        RowFault: auto, and no format or more than one fits.
    """
    if data.columns is not None:
        return "data.columns", data.columns
    if data.format != "auto":
        return f"data.format {data.format}", FORMATS[data.format]
    fitting = fitting_formats(row)
    if len(fitting) == 1:
        (name,) = fitting
        return f"data.format {name} (recognised by {', '.join(_needed(FORMATS[name]))})", FORMATS[name]
    if not fitting:
        for name, columns in PUBLISHED.items():
            if _fits(columns, row):
                return f"the columns of {name} ({_in_words(columns)})", columns
        for name, columns in PLAIN.items():
            if PLAIN_FIELDS[name] == row.keys():
                return f"the columns of {name} ({_in_words(columns)})", columns
    has = ", ".join(map(str, row)) or "no fields"
    problem = f"data.format: auto: several formats fit: {', '.join(fitting)}" if fitting else "data.format: auto: no known format"
    raise RowFault(
        f"{problem}; the row has {has}",
        kind="no format",
        fix="name the fields with data.columns: {question: …, answer: …}" + (", or set data.format" if fitting else ""),
    )


def fitting_formats(row: Mapping[str, Any]) -> list[str]:
    return [name for name, columns in FORMATS.items() if _fits(columns, row)]


def _fits(columns: Columns, row: Mapping[str, Any]) -> bool:
    return all(row.get(field.partition(".")[0]) is not None for field in _needed(columns))


def _needed(columns: Columns) -> list[str]:
    names = (columns.messages, columns.question, columns.reasoning, columns.answer, *columns.verified)
    return [name for name in names if name is not None]


def _in_words(columns: Columns) -> str:
    return ", ".join(f"{name}: {value}" for name, value in columns.model_dump().items() if value)
