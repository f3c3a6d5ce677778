"""The origin of an export: plain values that its model card shows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportedScore:
    """One score of an evaluation.

    Attributes:
        variant: "base", "converted" or "trained". evaluation: name of the evaluation, such as "aime24".
        metric: "avg@16", "loss", "KL to base". n: problems or samples that `value` is the mean of.
        standard_error: over those n; None where n is 1, as is interval, the 95 % one.
    """

    variant: str
    evaluation: str
    metric: str
    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class ExportMetadata:
    """The origin of a hybrid. Equal metadata give an equal card, so there is no date or duration among them.

    Attributes:
        recipe: the recipe's name.
        base: hub id or local folder of the base model. base_revision: as in the recipe.
        selection: how the layers or KV heads that stream were chosen: a strategy's name, or "given in the recipe".
        data: source of the examples (hub id, file or folder), which calibrate the choice of layers even without training, or of the
            texts that do; None: no data were needed.
        data_format: as in the recipe. data_counts: examples read, dropped, trained on, …
        training: settings that shape a training, by name; None for a hybrid that was not trained.
        scores: of all variants that were evaluated.
        versions: of the packages that made it.
        system: the system turn of its prompts, as in the recipe. default_system_turn: what the chat template writes where there is
            none, and its prompts did not have.
    """

    recipe: str
    base: str
    base_revision: str | None
    selection: str
    data: str | None
    data_format: str
    data_counts: dict[str, int]
    training: dict[str, str | int | float | bool | None] | None
    scores: tuple[ReportedScore, ...]
    versions: dict[str, str]
    system: str | None = None
    default_system_turn: str = ""
