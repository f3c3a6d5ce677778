"""What the fast tier may cost: `pytest -m fast` imports its own files alone."""

import subprocess
import sys

import pytest

from tests.support.repository import ENVIRONMENT, REPOSITORY

HEAVY = ("transformers.modeling_utils", "trl", "peft", "deepspeed", "matplotlib", "wandb")  # datasets reads rows
COLLECT = f"""
import sys
import pytest

code = pytest.main(["-m", "fast", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", "--assert=plain"])
print([name for name in {HEAVY} if name in sys.modules], int(code))
"""


@pytest.mark.slow
def test_the_fast_tier_is_collected_without_models_and_without_what_trains_them() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout[-2000:] + done.stderr[-2000:]
    assert "tests/recipe/test_recipe.py::" in done.stdout and "tests/training/" not in done.stdout
