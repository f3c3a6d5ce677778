"""What distillation and the protection of recall need of the rest of a recipe; part of recipe_checks.py."""

from collections.abc import Iterator
from pathlib import Path

from lt_train.recipe.deepspeed_file import read_deepspeed_file
from lt_train.recipe.schema import Distill, Recipe, Train
from lt_train.runtime.errors import UserError

Fault = tuple[tuple[str, ...], str]
"""Settings (dotted paths) that do not go together, and the way out."""

BASE_STAYS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's init_lora_weights that leave the base's weights as they are; the others move a part of them into the adapter."""


def distill_faults(recipe: Recipe, train: Train) -> Iterator[Fault]:
    given = train.distill
    if given.weight == 0:
        yield from _unused(given)
        return
    if given.teacher == "top_k" and given.hidden_weight > 0:
        yield (
            ("train.distill.hidden_weight", "train.distill.teacher"),
            "files of teacher top_k hold no hidden states; set hidden_weight to 0, or teacher to auto",
        )
    if train.trl.get("label_smoothing_factor"):
        yield (
            ("train.distill.weight", "train.trl.label_smoothing_factor"),
            "a teacher says already how sure to be; take label_smoothing_factor out",
        )
    if given.teacher == "auto" and recipe.lora is not None:
        yield from _adapters_that_cannot_be_switched_off(recipe)
    elif given.teacher != "top_k" and _zero_stage(train) == 3:
        yield (
            ("train.distill.teacher", "train.deepspeed"),
            "ZeRO-3 does not shard a frozen copy of the base: it would lie whole on each device. Set teacher to top_k, whose "
            "files are written before training, or train.method to lora, whose base is its own teacher",
        )


def _unused(given: Distill) -> Iterator[Fault]:
    defaults = type(given)()
    for name in ("temperature", "hidden_weight", "teacher", "top_k"):
        if getattr(given, name) != getattr(defaults, name):
            yield (
                (f"train.distill.{name}", "train.distill.weight"),
                f"with weight 0 no teacher is asked; set weight above 0, or take {name} out",
            )
            return


def _adapters_that_cannot_be_switched_off(recipe: Recipe) -> Iterator[Fault]:
    peft = recipe.lora.peft if recipe.lora is not None else {}
    bias, start, saved = peft.get("bias", "none"), peft.get("init_lora_weights", True), peft.get("modules_to_save")
    for name, moves_the_base in (
        ("bias", bias != "none"),
        ("init_lora_weights", start not in BASE_STAYS),
        ("modules_to_save", bool(saved)),
    ):
        if moves_the_base:
            yield (
                ("train.distill.teacher", f"lora.peft.{name}"),
                f"with {name}: {peft[name]} the model with its adapters off is not the base; set teacher to copy",
            )


def parameter_faults(recipe: Recipe, train: Train) -> Iterator[Fault]:
    if train.parameters == "lazy_projections" and train.method == "lora":
        yield (
            ("train.parameters", "train.method"),
            "with LoRA lora.layers and lora.targets say what is trained; take parameters out, or set method to full",
        )


def restore_faults(recipe: Recipe, train: Train) -> Iterator[Fault]:
    """Where nothing of a full layer's queries and keys is trained there is nothing to put back."""
    if not train.restore_query_key:
        return
    setting, fix = "train.restore_query_key", "set it to false, or train"
    if train.method == "full" and train.parameters == "lazy_projections":
        yield ((setting, "train.parameters"), f"the full-attention layers are not trained, so nothing is restored; {fix} all")
    if recipe.lora is not None and recipe.lora.layers == "lazy":
        yield (
            (setting, "lora.layers"),
            f"the full-attention layers have no adapters, so nothing is restored; {fix} lora.layers: all",
        )
    elif recipe.lora is not None and not any(_is_query_or_key(target) for target in recipe.lora.targets):
        yield (
            (setting, "lora.targets"),
            f"no query or key projection has an adapter, so nothing is restored; {fix} q_proj or k_proj",
        )


def _is_query_or_key(target: str) -> bool:
    return target.rsplit(".", 1)[-1] in ("q_proj", "k_proj")


def _zero_stage(train: Train) -> int | None:
    """Of the DeepSpeed configuration; None without a readable one, of which others complain."""
    if train.deepspeed is None:
        return None
    try:
        return read_deepspeed_file(Path(train.deepspeed))["zero_optimization"]["stage"]
    except (UserError, KeyError, TypeError):
        return None
