"""Imported by the server of processes.py: what a library works out at its first use and keeps."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from tests.support.installed_packages import remember_packages

get_checkpoint_conversion_mapping("qwen3")
remember_packages()
