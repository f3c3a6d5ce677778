"""The base's generation_config.json: its defaults for sampling, and the tokens that end an answer."""

from collections.abc import Mapping
from typing import Any

SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings that only sampling reads, with the values at which transformers does not warn of them where do_sample is off."""


def consistent(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a generation config without contradictions.

    Greedy decoding stays greedy: `do_sample: false` drops the settings of sampling. Settings of sampling without a do_sample
    mean to sample.
    """
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("do_sample") is False:
        return {name: value for name, value in given.items() if name not in SAMPLING}
    samples = any(given.get(name, neutral) != neutral for name, neutral in SAMPLING.items())
    return given | {"do_sample": True} if samples else given


def listed(eos_token_id: object) -> list[int]:
    """
    Raises:
        ValueError: neither a token id nor a list of them.
    """
    ids: list[Any] = eos_token_id if isinstance(eos_token_id, list) else [] if eos_token_id is None else [eos_token_id]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"eos_token_id is {eos_token_id!r}, neither a token id nor a list of them")
    return ids
