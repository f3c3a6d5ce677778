"""Which files of lt_train/hybrid go into an export: what its modelling code imports, directly or not."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import lt_train.hybrid.families as families


def hybrid_code_files() -> list[Path]:
    """families.py and the files that it needs, sorted. Found by the function with which transformers fetches them on loading."""
    entry = Path(families.__file__)
    return sorted({entry, *map(Path, get_relative_import_files(entry))})
