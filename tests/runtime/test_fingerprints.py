"""Hashes that run folders and exports keep, and the error where two fingerprints differ."""

from pathlib import Path

import pytest
import torch

from lt_train.runtime.errors import UserError
from lt_train.runtime.fingerprints import (
    BLOCK,
    BLOCKS_READ,
    check_same,
    data_fingerprint,
    file_hash,
    hash_of,
    hash_of_json,
    hash_of_text,
    hash_of_weights,
    model_fingerprint,
    sampled_file_hash,
)


def test_hashes_are_those_of_earlier_runs(tmp_path: Path) -> None:
    """Computed by commit c7e4c87: with others, the stages of its runs would count as unfinished."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"x" * 200_000)
    assert hash_of(1, "ü", [2]) == "b2f865941b37a5ec"
    assert hash_of_json([["ü", 1, [2.5]]]) == "ec01997abb896a3b"
    assert hash_of_text("aü\ud800") == "4d137ce03a621427"
    weights = {"b": torch.arange(300.0).view(3, 100), "a": torch.ones(2, dtype=torch.bfloat16)}
    assert hash_of_weights(weights) == "e64e6a3820b4c461"
    assert model_fingerprint(str(base), None) == "1b7ede02f5f6f2ca47910a22966f7d58d83f9598f9fc08a5fa96b1e7ca991514"
    assert data_fingerprint(str(base)) == "5822f545d80df2f1ce487cd3ef620ebebcfcce5aca380843f6535d8e9f45d2b0"


def test_keys_are_sorted_where_their_order_has_no_meaning() -> None:
    assert hash_of_json({"a": 1, "b": 2}, sort_keys=True) == hash_of_json({"b": 2, "a": 1}, sort_keys=True)


def test_a_large_file_is_hashed_by_evenly_spaced_blocks(tmp_path: Path) -> None:
    path, stride = tmp_path / "large", 2 * BLOCK
    with open(path, "wb") as file:
        file.truncate(BLOCKS_READ * stride)  # sparse
    before = sampled_file_hash(path)
    for at, is_read in ((0, True), (BLOCK, False), (3 * stride, True), ((BLOCKS_READ - 1) * stride, True)):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"x")
        after = sampled_file_hash(path)
        assert (after != before) == is_read
        before = after


def test_a_small_file_is_hashed_whole(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"abc")
    assert sampled_file_hash(tmp_path / "small") == file_hash(tmp_path / "small")


def test_equal_fingerprints_pass() -> None:
    check_same({"a": {"b": [1]}, "c": None}, {"a": {"b": [1]}}, "problem", "fix")


def test_every_setting_that_differs_is_named_with_both_values() -> None:
    there = {"model": {"base": "x", "dtype": "auto"}, "train": None, "seed": 1, "old": 2}
    here = {"model": {"base": "y", "dtype": "auto"}, "train": {"steps": 3}, "seed": 1}
    with pytest.raises(UserError) as raised:
        check_same(there, here, "runs/a: begun with another recipe", "take another name")
    assert str(raised.value).splitlines() == [
        "runs/a: begun with another recipe (there, here):",
        "  model.base: 'x', 'y'",
        "  train: None, {'steps': 3}",
        "  old: 2, None",
        "Fix: take another name",
    ]


def test_settings_that_may_differ_are_not_compared() -> None:
    there, here = {"train": {"lr": 1, "trl": {"a": 1}}, "eval": [1]}, {"train": {"lr": 1, "trl": {"a": 2}}, "eval": [2]}
    check_same(there, here, "problem", "fix", may_differ={"train.trl", "eval"})
    check_same(there, here, "problem", "fix", may_differ={"train.trl.a", "eval"})
    with pytest.raises(UserError, match=r"train\.trl\.a: 1, 2"):
        check_same(there, here, "problem", "fix", may_differ={"eval", "trl", "train.tr"})
