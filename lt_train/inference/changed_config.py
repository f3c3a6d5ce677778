"""A model that computes by other settings for a while: its forward pass reads the config each time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig


@contextmanager
def changed(config: PreTrainedConfig, **settings: Any) -> Iterator[None]:
    """While the block runs, a config has other values."""
    before = {name: getattr(config, name) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
