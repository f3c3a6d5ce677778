"""A recipe in the making: settings, and the reason for each value, for a comment."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lt_train.recipe.commented_yaml import commented_yaml
from lt_train.recipe.part import parts_in
from lt_train.recipe.schema import Recipe
from lt_train.recipe.shipped import locate_files


@dataclass
class Draft:
    """
    Attributes:
        values: by part, as in a recipe.
        reasons: dotted path of a setting -> why it has its value.
    """

    values: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, setting: str, value: Any, reason: str | None = None) -> None:
        part, _, name = setting.rpartition(".")
        (self.values.setdefault(part, {}) if part else self.values)[name] = value
        if reason is None:
            self.reasons.pop(setting, None)
        else:
            self.reasons[setting] = reason

    def recipe(self, out: Path) -> Recipe:
        """The recipe so far, in the place of `out`."""
        return Recipe.model_validate(locate_files(self.values, out))

    def text(self) -> str:
        """Parts, and settings in them, in the order of the schema, without empty parts."""
        ordered = {}
        for name, declared in Recipe.model_fields.items():
            value = self.values.get(name)
            part = next(iter(parts_in(declared.annotation)), None)
            if isinstance(value, dict) and part is not None:
                value = {setting: value[setting] for setting in part.model_fields if setting in value}
            if value not in (None, {}):
                ordered[name] = value
        return commented_yaml(ordered, self.reasons)
