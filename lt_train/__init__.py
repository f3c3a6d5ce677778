"""Turn a full-attention reasoning model into a hybrid one: find lazy layers, stream them, fine-tune, measure, export.

From Python: `load_recipe`, `run`, `score_layers`, `convert` and `read_results` (api.py). Importing lt_train loads nothing; each of
them loads what it needs when it is called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lt_train.api import convert, load_recipe, read_results, run, score_layers

__version__ = "0.1.0"
__all__ = ["convert", "load_recipe", "read_results", "run", "score_layers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lt_train' has no attribute {name!r}")
    import lt_train.api as api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
