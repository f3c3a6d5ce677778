"""What a benchmark is: where its problems are, how a row becomes a problem, and how an answer is graded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from lt_train.runtime.errors import UserError

Grader = Literal[
    "math",
    "choice",
    "qa_f1",
    "qa_f1_zh",
    "rouge",
    "rouge_zh",
    "classification",
    "retrieval",
    "count",
    "code_similarity",
    "needle",
    "copying",
]


GSM8K_MARKER = "####"
"""What precedes the final answer in GSM8K's answers, and in those of many data sets after it."""


@dataclass(frozen=True)
class Problem:
    """One question with its reference answers.

    Attributes:
        id: unique in its benchmark. Of generated problems: "length/depth/repeat".
        text: the user's turn; where the benchmark has no chat template, all of the prompt.
        answers: reference answers; the best match counts.
        classes: all labels, where the answer is one of them.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class ProblemSet:
    """`problems` are the ones to evaluate, the first `limit` of the `available` ones; `all_problems` identify the benchmark."""

    all_problems: tuple[Problem, ...]
    problems: tuple[Problem, ...]

    @property
    def available(self) -> int:
        return len(self.all_problems)


@dataclass(frozen=True)
class RecallSettings:
    """The problems that lt_train generates to measure recall: `repeats` of them for each length and depth.

    Attributes:
        lengths: of the user's turn, in tokens of the model's tokenizer; a problem lacks less than a sentence to this.
        depths: where what must be found is, as fractions of the text before it: 0 at its start, 1 at its end.
        keys: needles in the text. One is queried; the others, elsewhere, must not be mistaken for it.
        span: tokens to copy.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 2
    keys: int = 1
    span: int = 128

    def __post_init__(self) -> None:
        for name, values, lowest, highest in (
            ("lengths", self.lengths, 1, None),
            ("depths", self.depths, 0, 1),
            ("repeats", (self.repeats,), 1, None),
            ("keys", (self.keys,), 1, MOST_KEYS),
            ("span", (self.span,), 1, None),
        ):
            limits = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            if not values or len(set(values)) < len(values):
                raise UserError(
                    f"{name}: {list(values)}: empty or with repeated values. Fix: give at least one value, and each once"
                )
            for value in values:
                if value < lowest or (highest is not None and value > highest):
                    raise UserError(f"{name}: {value} is not {limits}. Fix: give a value in this range")


MOST_KEYS = 64
"""More needles than this are a text of needles, and would need more names than there are."""


@dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        source: a file or hub id, with `subset` and `split`; None where the user names one, or the problems are generated.
        archive: file of the hub data set that holds the problems, where the data set cannot be loaded as such, and their
            place inside it.
        count: number of problems that must be there; None where the user's own file, or a setting, decides.
        id_fields: fields that may name a row, in the order of preference. A row with none is named by its number, from 0, unless
            `id_required`.
        rows: how a row becomes a problem.
        fields: what a row needs, in the order in which its reader takes them.
        template: the prompt with {context} and {input}, of benchmarks with a prompt of their own.
        answer_after: the marker that every answer field has in front of the answer; None: an answer field holds the answer alone,
            or behind GSM8K's marker.
        prompt_style: how the text becomes a prompt. as_recipe: in the recipe's user turn and the chat template; as_is: as the user
            turn alone; without_chat: no chat template.
        truncate_middle: too long a text loses its middle; False: too long a text is an error.
        max_new_tokens: how long an answer may be, where the benchmark sets it.
        instruction: what follows each question where the recipe's user turn is the bare question; empty: nothing.
        recall_settings: which of RecallSettings decide the problems; empty where they are read.
    """

    name: str
    grader: Grader
    source: str | None = None
    split: str = "test"
    subset: str | None = None
    archive: tuple[str, str] | None = None
    count: int | None = None
    id_fields: tuple[str, ...] = ("id", "unique_id")
    id_required: bool = False
    rows: Literal["short_answer", "choice", "longbench"] = "short_answer"
    fields: tuple[str, ...] = ("problem", "answer")
    answer_after: str | None = None
    template: str = ""
    prompt_style: Literal["as_recipe", "as_is", "without_chat"] = "as_recipe"
    truncate_middle: bool = False
    max_new_tokens: int | None = None
    instruction: str = ""
    recall_settings: tuple[str, ...] = ()

    @property
    def generated(self) -> bool:
        return bool(self.recall_settings)

    @property
    def reads_own_rows(self) -> bool:
        """Whether its problems are the user's own."""
        return self.source is None and not self.generated

    def with_columns(self, columns: Mapping[str, str | None]) -> Self:
        """This benchmark of the user's own rows, which hold `question`, `answer` and `id` in the columns that are given."""
        fields = tuple(columns.get(name) or own for name, own in zip(("question", "answer"), self.fields, strict=True))
        named = columns.get("id")
        return replace(self, fields=fields) if named is None else replace(self, fields=fields, id_fields=(named,), id_required=True)

    @property
    def truncated_is_incorrect(self) -> bool:
        """Whether an answer that reaches max_new_tokens is by default incorrect; not where the benchmark sets the limit."""
        return self.grader in ("math", "choice")

    @property
    def votes(self) -> bool:
        """Whether answers are so short that a majority of equal ones means something."""
        return self.grader in ("math", "choice", "needle")
