"""Imported by the server of processes.py: what a library works out at its first use and keeps."""

import inspect
import sys

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen3")
inspect.getmodule(sys._getframe())  # where each module's file lies; pydantic asks, to read the docstrings of settings
