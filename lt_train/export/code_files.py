"""Which files of lt_train/hybrid go into an export: what its modelling code imports, directly or not."""

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

import lt_train.hybrid.auto_family as auto_family
import lt_train.hybrid.families as families
from lt_train.hybrid.configuration import HybridConfig
from lt_train.hybrid.loading import is_declared
from lt_train.runtime.errors import UserError

MADE = "made_family"
"""Name of the module that an export has in the place of families.py if its family was made from transformers' own classes."""

_MADE_FAMILY = """\
\"\"\"The classes of this checkpoint: those of transformers' {base_type}, with the hybrid's mixed in.\"\"\"

from .auto_family import auto_family

_family = auto_family("{base_type}")
{config} = _family.config_class
{model} = _family.model_class
"""


def hybrid_code(config: HybridConfig) -> dict[str, str]:
    """Name and text of each file that the code of a hybrid needs, sorted by name."""
    entry = Path(str((families if is_declared(config) else auto_family).__file__))
    # found by the function with which transformers fetches them on loading
    files = {file.name: file.read_text(encoding="utf-8") for file in {entry, *map(Path, get_relative_import_files(entry))}}
    if not is_declared(config):
        family = auto_family.auto_family(_base_type(config))
        names = {"config": family.config_class.__name__, "model": family.model_class.__name__}
        files[f"{MADE}.py"] = _MADE_FAMILY.format(base_type=_base_type(config), **names)
    return dict(sorted(files.items()))


def entry_module(config: HybridConfig) -> str:
    """The module of an export that has its classes."""
    return families.__name__.rpartition(".")[2] if is_declared(config) else MADE


def check_exportable(base_config: PreTrainedConfig) -> None:
    """
    Raises:
        UserError: the classes of the base are not transformers' own, so an export would need code that it does not carry.
    """
    if is_declared(base_config):
        return
    stock_class = auto_family.stock_classes(base_config.model_type)[1]
    if not stock_class.__module__.startswith("transformers."):
        problem = f"its code is in {stock_class.__module__}, which no export carries, and without it an export loads nowhere"
        fix = "train and measure without an export, with lt-train train and lt-train eval"
        raise UserError(f"model.family: auto: {stock_class.__name__}: {problem}. Fix: {fix}")


def _base_type(config: HybridConfig) -> str:
    return config.model_type.removeprefix(auto_family.PREFIX)
