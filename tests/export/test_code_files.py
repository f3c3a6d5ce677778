import ast
import sys

import pytest

from lt_train.export.code_files import check_exportable, entry_module, hybrid_code
from lt_train.hybrid.loading import hybrid_config, prove_auto_family
from lt_train.hybrid.spec import HybridSpec
from lt_train.runtime.errors import UserError
from tests.support.families import BASES, HELIUM
from tests.support.toy_family import toy_config

SPEC = HybridSpec(4, (1, 3))


@pytest.fixture(params=["declared", "made"])
def config(request):
    if request.param == "declared":
        return hybrid_config(BASES["qwen3"], SPEC)
    prove_auto_family(HELIUM)
    return hybrid_config(HELIUM, SPEC)


def imports(text):
    """(module names imported from outside, names imported relatively)."""
    outside, relative = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            outside |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            (relative if node.level else outside).add(node.module.partition(".")[0])
    return outside, relative


def test_every_relative_import_is_among_the_files(config):
    files = hybrid_code(config)
    names = {name.removesuffix(".py") for name in files}
    assert set().union(*(imports(text)[1] for text in files.values())) | {entry_module(config)} == names
    assert {"configuration", "cache", "mask", "spec"} <= names
    assert "loading" not in names and "__init__" not in names
    assert ("families" in names) is (entry_module(config) == "families"), "a made family needs no declared one"


def test_the_files_need_torch_and_transformers_alone(config):
    outside = set().union(*(imports(text)[0] for text in hybrid_code(config).values()))
    assert outside - set(sys.stdlib_module_names) <= {
        "torch",
        "transformers",
        "huggingface_hub",
    }  # the last comes with transformers


def test_a_base_whose_classes_are_not_transformers_own_is_not_exported_and_the_message_names_their_module():
    check_exportable(BASES["qwen3"])
    check_exportable(HELIUM)
    with pytest.raises(UserError, match=r"ToyForCausalLM: its code is in tests\.support\.toy_family, .* Fix: train"):
        check_exportable(toy_config())
