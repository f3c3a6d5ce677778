"""The engine's C code as processors with AVX2 and without AVX-512 compile it; those with it run that, too."""

import platform
from ctypes import CDLL
from functools import cache
from unittest.mock import patch

import torch

from lt_train.inference import compiled_c

RUNS_AVX2 = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")


@cache
def compiled_for_avx2(source: str, *flags: str) -> CDLL:
    """As `compiled_c.compiled`."""
    assert "-march=native" in compiled_c._FLAGS
    for_avx2 = [flag.replace("native", "x86-64-v3") for flag in compiled_c._FLAGS]
    with patch.object(compiled_c, "_FLAGS", for_avx2):
        return compiled_c.compiled.__wrapped__(source, *flags)
