"""What a hybrid model is: spec, mask, attention, cache, model classes.

This package imports torch, transformers and itself only: its files are copied into every exported checkpoint and run there alone.
"""

from .cache import CACHE_ARGUMENT, HybridCache
from .configuration import is_hybrid
from .kernels import AUTO, Choice, Use, choose
from .loading import build_hybrid, family_of, hybrid_config, load_hybrid, load_hybrid_checkpoint
from .modeling import HybridForCausalLM
from .sequence_parallel import attend_gathered
from .spec import HYBRID_VERSION, HybridError, HybridSpec
from .views import AttentionView, FullView, StreamingView, Views

__all__ = [
    "AUTO",
    "CACHE_ARGUMENT",
    "HYBRID_VERSION",
    "AttentionView",
    "Choice",
    "FullView",
    "HybridCache",
    "HybridError",
    "HybridForCausalLM",
    "HybridSpec",
    "StreamingView",
    "Use",
    "Views",
    "attend_gathered",
    "build_hybrid",
    "choose",
    "family_of",
    "hybrid_config",
    "is_hybrid",
    "load_hybrid",
    "load_hybrid_checkpoint",
]
