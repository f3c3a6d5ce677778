"""From a YAML file and `--set` overrides to a checked recipe, and back to YAML.

yaml_text.py reads the text, schema.py says what may stand in it, messages.py words pydantic's complaints, checks.py compares
settings across parts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lt_train.recipe.checks import conflicts
from lt_train.recipe.messages import validate_all
from lt_train.recipe.schema import Recipe
from lt_train.recipe.yaml_text import RecipeText, dotted, read_recipe_text
from lt_train.runtime.errors import UserError


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and lay `--set` overrides ("hybrid.w_recent=252") over it.

    Raises:
        UserError: one error that lists every fault of the file and of the overrides.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read: {error.strerror} (looked at {path.absolute()})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 text ({error})") from error
    return _check(read_recipe_text(text, overrides), path)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every default written out; load_recipe reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=120)


_STAND_INS = {
    "name": "unnamed",
    "model": {"base": "unknown"},
    "model.base": "unknown",
    "hybrid": {},
    "data": {"source": "unknown", "format": "still", "max_length": 2},
    "data.source": "unknown",
    "data.format": "still",
    "data.max_length": 2,
    "train.method": "full",
    "train.probes.steps": 1,
    "train.probes.evals": [{"benchmark": "needle"}],
    "train.probes.evals.*": {"benchmark": "needle"},
    "train.probes.evals.*.benchmark": "needle",
    "train.probes.evals.*.max_new_tokens": 1,
    "train.learning_rate": 1.0,
    "eval.*": {"benchmark": "heldout_loss"},
    "eval.*.max_new_tokens": 1,
}
"""What stands for a faulty setting that has no default, so that the rest can be checked; no such recipe is returned."""

_ADVICE = {
    "data.max_length": "TRL would cut every sample to 1024 tokens. Set it to the longest trace you want to train on",
    "model.base": "Name the full-attention model: a hub id or a local folder",
    "data.source": "Name the training data: a hub id, a file or a folder",
    "data.format": "The fields of a row: question, combined_text | prompt, response | messages",
    "train.batch_size": "It counts samples (packs) per optimizer step over all processes",
    "train.probes.evals": "It says what to ask of a checkpoint, such as [{benchmark: needle, recall: {lengths: [2048]}}]",
    "train.learning_rate": "1e-5 is usual for full fine-tuning, 1e-4 for LoRA",
    "hybrid.lazy_layer_ratio": "It is the share of layers that stream: 0 is the base, 1 has no layer that sees far",
    "hybrid.w_recent": "A window counts the query itself",
}
"""What to add to a complaint about one setting."""


def _check(text: RecipeText, path: Path) -> Recipe:
    found = [((), dotted(fault.path), fault.message) for fault in text.faults]  # these say by themselves where they are
    if isinstance(text.values, dict):
        recipe, faults = validate_all(Recipe, _with_defaults_that_depend(text.values), _STAND_INS)
        for fault in faults:
            advice = _ADVICE.get(dotted(fault.path))
            message = f"{fault.message}{'' if fault.message.endswith('?') else '.'} {advice}" if advice else fault.message
            found.append((fault.path, dotted(fault.path), message))
        faulty = {dotted(fault.path) for fault in faults}
        for conflict in conflicts(recipe):
            if not any(_overlap(setting, bad) for setting in conflict.settings for bad in faulty):
                found.append((tuple(conflict.settings[0].split(".")), " + ".join(conflict.settings), conflict.message))
    if found:
        lines = [f"  {name + ': ' if name else ''}{message}{_origin(text, at)}" for at, name, message in found]
        raise UserError("\n".join([f"{path} is no valid recipe:", *lines]))
    return recipe


def _with_defaults_that_depend(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in what depends on another part: a lora part where the method is lora, and what each evaluation looks at."""
    train, entries = values.get("train"), values.get("eval")
    filled = dict(values)
    if isinstance(train, dict) and train.get("method") == "lora" and values.get("lora") is None:
        filled["lora"] = {}
    if isinstance(entries, list):
        default = ["converted"] if train is None else ["trained"]
        filled["eval"] = [
            {**entry, "of": default} if isinstance(entry, dict) and entry.get("of") is None else entry for entry in entries
        ]
    return filled


def _overlap(setting: str, other: str) -> bool:
    """Whether one of two settings is the other or lies inside it."""
    shorter, longer = sorted((setting, other), key=len)
    return longer == shorter or longer.startswith(f"{shorter}.")


def _origin(text: RecipeText, path: tuple[str | int, ...]) -> str:
    origin = text.origin(tuple(int(part) if str(part).isdecimal() else part for part in path))
    return f" ({origin})" if origin else ""
