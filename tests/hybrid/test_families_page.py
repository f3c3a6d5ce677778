"""docs/families.md says of each family what the code has."""

import inspect
from dataclasses import replace

import pytest

from lt_train.export.configs import STOCK
from lt_train.export.granite_swa import is_granite_swa
from lt_train.hybrid import configuration, families
from lt_train.hybrid.families import BASES
from lt_train.hybrid.loading import build_hybrid, hybrid_config
from lt_train.hybrid.spec import HybridError, HybridSpec
from lt_train.inference.loading import with_rope_scaling
from lt_train.inference.trained_weights import check_restorable
from lt_train.recipe.schema import RopeScaling
from lt_train.runtime.errors import UserError
from lt_train.vllm_plugin.checks import FAMILIES as PLUGIN_FAMILIES
from tests.support.families import BASES as CONFIGS
from tests.support.families import SPLIT, on_base
from tests.support.repository import REPOSITORY

PAGE = (REPOSITORY / "docs/families.md").read_text(encoding="utf-8")
COLUMNS = {
    "Qwen2, Qwen3": ["qwen2", "qwen3"],
    "Llama, Mistral": ["llama", "mistral"],
    "SmolLM3": ["smollm3"],
    "OLMo 2, Seed-OSS, Granite, GLM-4": ["olmo2", "seed_oss", "granite", "glm4"],
    "Phi-4 (phi3)": ["phi3"],
    "Qwen3-MoE": ["qwen3_moe"],
    "gpt-oss": ["gpt_oss"],
}
"""OLMo 3 is below the table: as OLMo 2, without `model.rope_scaling`."""


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, row by row, without the line under its head."""
    rows = PAGE.split(heading, 1)[1].split("\n|", 1)[1].split("\n\n", 1)[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return [row for row in cells if set(row[0]) != {"-"}]


def works(family: str, feature: str) -> bool:
    base = CONFIGS[family]
    spec = on_base(base, HybridSpec(4, (1, 3), 0, 7))
    try:
        if feature == "single KV heads that stream":
            build_hybrid(base, on_base(base, SPLIT))
        elif feature == "learned sinks":
            build_hybrid(base, HybridSpec(4, (1, 3), 0, 7, learned_sinks=True).on(spec))
        elif feature == "`train.restore_query_key`":
            check_restorable(build_hybrid(base, spec))
        elif feature == "`model.rope_scaling`":
            with_rope_scaling(base, RopeScaling(rope_type="yarn", factor=2.0))
        elif feature == "export without sinks: stock class":
            return BASES[family].config_class in STOCK
        elif feature == "vLLM plugin, by layers or KV heads":
            return family in PLUGIN_FAMILIES
    except (HybridError, UserError):
        return False
    return True


@pytest.mark.parametrize(
    "feature",
    [
        "single KV heads that stream",
        "learned sinks",
        "`train.restore_query_key`",
        "`model.rope_scaling`",
        "export without sinks: stock class",
        "vLLM plugin, by layers or KV heads",
    ],
)
def test_the_table_of_features_has_a_dash_where_a_family_lacks_one(feature):
    head, *rows = table("## Features by family")
    (row,) = (row for row in rows if row[0] == feature)
    assert head[1:-1] == list(COLUMNS)
    for said, family_names in zip(row[1:-1], COLUMNS.values(), strict=True):
        for family in family_names:
            assert works(family, feature) == (said not in ("–", "the base's")), family


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - {"gpt_oss"}))
def test_the_first_table_names_what_an_export_with_learned_sinks_is(family):
    config, (row,) = CONFIGS[family], (row for row in table("# Families of base models") if f"`{family}`" in row[0])
    spec = replace(on_base(config, HybridSpec(4, (1, 3), 0, 7)), learned_sinks=True)
    assert ("`granite_swa`" in row[3]) == is_granite_swa(hybrid_config(config, spec))


def test_every_family_is_in_the_first_table_and_in_a_column():
    named = [name.strip("` ") for row in table("# Families of base models")[1:] for name in row[0].split(",")]
    assert sorted(named) == sorted(BASES)
    assert {name for names in COLUMNS.values() for name in names} == set(BASES) - {"ministral", "olmo3"}


def test_a_new_family_takes_30_lines_and_those_shown_are_a_familys():
    shown = PAGE.split("## A new family in 30 lines", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    declared = inspect.getsource(configuration) + inspect.getsource(families)
    for block in shown.strip().split("\n\n\n"):
        assert block in declared
    assert len(shown.splitlines()) + 2 <= 30
