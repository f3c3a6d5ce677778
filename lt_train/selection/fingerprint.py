"""The fingerprint of a layer profile: model, data, sizes, versions. Scores of different fingerprints are never mixed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from lt_train import __version__
from lt_train.runtime.fingerprints import hash_of_json, hash_of_weights

if TYPE_CHECKING:
    from lt_train.dataset.examples import Example
    from lt_train.hybrid.modeling import HybridForCausalLM

_LIBRARIES = ("torch", "transformers")
# Config fields that differ between equal models: the source, the version of transformers, the dtype, and what streams, of which
# `layer_types` and `sliding_window` are part where they are not the base's own.
_IGNORED_FIELDS = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "layer_types",
    "lazy_layers",
    "streaming_kv_heads",
    "w_recent",
    "w_sink",
    "sliding_window",
}


@dataclass(frozen=True)
class Sizes:
    """The settings of the recipe's hybrid part that scores depend on; sizes in tokens."""

    w_sink: int
    w_recent: int
    w_last: int
    long_reach_share: float


@dataclass(frozen=True)
class Fingerprint:
    """Two profiles with equal fingerprints hold the same scores."""

    model: str
    """Folder or hub id of the base."""
    config: str
    """Hash of the model's configuration."""
    weights: str
    """Hash of name, shape and 64 values of each weight: it differs for a base of the same name with other weights."""
    dtype: str
    data: str
    """Hash of the ids and tokens of the calibration samples, in order."""
    sizes: Sizes
    strategies: tuple[str, ...]
    versions: dict[str, str]


def fingerprint(model: "HybridForCausalLM", examples: Sequence["Example"], sizes: Sizes, strategies: Sequence[str]) -> Fingerprint:
    from lt_train.dataset.examples import samples_fingerprint
    from lt_train.runtime.devices import dtype_name  # loads torch, which readers of a profile do without

    spec, config = model.config.spec, {name: x for name, x in model.config.to_dict().items() if name not in _IGNORED_FIELDS}
    if spec.sliding_layers:
        config |= {"sliding_layers": spec.sliding_layers, "sliding_window": spec.sliding_window}
    return Fingerprint(
        model=str(model.config.name_or_path),
        config=hash_of_json(config, sort_keys=True),
        weights=hash_of_weights(model.state_dict()),
        dtype=dtype_name(model.dtype),
        data=samples_fingerprint(examples),
        sizes=sizes,
        strategies=tuple(strategies),
        versions={"lt_train": __version__, **{library: version(library) for library in _LIBRARIES}},
    )
