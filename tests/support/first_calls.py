"""Imported by the server of processes.py: what a library works out at its first use and keeps."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen3")
