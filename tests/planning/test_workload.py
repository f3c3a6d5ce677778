import json
from pathlib import Path

import pytest

from lt_train.dataset import loading
from lt_train.dataset.loading import load_examples
from lt_train.hybrid.context_length import context_length
from lt_train.inference.loading import eos_ids, load_base_config
from lt_train.inference.tokenizer import load_tokenizer
from lt_train.planning.workload import Samples, training_samples, training_work
from lt_train.recipe.loading import load_recipe
from lt_train.runtime.errors import UserError
from lt_train.runtime.run_paths import RunPaths
from tests.support.public_models import CONFIGS, public_recipe


def samples_of(recipe, count=None, mean=None) -> Samples | None:
    return training_samples(recipe, load_base_config(recipe.model), count, mean)


def work_of(lengths: list[int], **settings):
    recipe = public_recipe("qwen3-8b", **settings)
    return training_work(recipe, recipe.train, Samples(lengths, "made up"))


def test_an_epoch_ends_with_a_smaller_step():
    work = work_of([1000] * 50, train={"epochs": 3.0})
    assert (work.steps, work.tokens) == (3 * 4, 150_000)  # 16 samples a step


def test_steps_that_are_set_determine_how_often_the_data_are_seen():
    work = work_of([1000] * 50, train={"epochs": None, "max_steps": 10})
    assert (work.steps, work.epochs, work.tokens) == (10, 3.2, 160_000)


def test_packs_are_counted_where_packing():
    work = work_of([1024] * 256, data={"packing": True}, train={"epochs": 1.0, "batch_size": None, "batch_tokens": 4 * 4096})
    assert work.steps == 16  # 64 packs of 4 samples, 4 packs a step


def test_data_and_tokenizer_at_hand_are_counted():
    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["data.limit=200"])
    samples = samples_of(recipe)
    assert len(samples.lengths) == 200 - 64
    assert max(samples.lengths) <= 256 < sum(samples.lengths)
    assert samples.source == "counted in data/ledger/train.jsonl"


def test_data_that_the_run_has_tokenized_are_not_tokenized_again(tmp_path, monkeypatch):
    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["data.limit=200"])
    counted = samples_of(recipe)
    tokenizer, base_config = load_tokenizer(recipe.model, recipe.prompt.stop_token), load_base_config(recipe.model)
    load_examples(
        recipe.data,
        recipe.prompt,
        tokenizer,
        model_max_length=context_length(base_config.to_dict()),
        seed=recipe.seed,
        eos_ids=eos_ids(recipe.model),
        folder=RunPaths(tmp_path / recipe.name).data,
    )
    monkeypatch.setattr(loading, "write_examples", lambda *_, **__: pytest.fail("tokenized again"))
    assert training_samples(recipe, base_config, None, None, runs=tmp_path) == counted


def test_counting_data_keeps_nothing(tmp_path):
    recipe = load_recipe(Path("recipes/quickstart.yaml"), ["data.limit=200"])
    training_samples(recipe, load_base_config(recipe.model), None, None, runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_go_before_the_data_at_hand():
    samples = samples_of(load_recipe(Path("recipes/quickstart.yaml")), count=1000, mean=100)
    assert (len(samples.lengths), samples.mean, samples.source) == (936, 100, "from --samples and --mean-tokens")


def test_without_data_the_limit_gives_how_many_and_the_length_how_long_at_most():
    samples = samples_of(public_recipe("qwen3-8b", data={"limit": 500, "heldout": 20}))
    assert (len(samples.lengths), samples.mean) == (480, 4096)
    assert "data.limit" in samples.source and "upper bound" in samples.source


def test_of_local_data_without_a_tokenizer_the_rows_are_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(3 * (json.dumps({"question": "q", "combined_text": "a"}) + "\n"))
    assert not (CONFIGS / "qwen3-8b/tokenizer.json").exists()
    recipe = public_recipe("qwen3-8b", data={"source": str(rows)})
    assert list(samples_of(recipe).lengths) == 3 * [4096]
    assert list(samples_of(recipe, mean=500).lengths) == 3 * [500]
    assert samples_of(recipe).source.startswith(f"from the rows of {rows}, each of data.max_length tokens")


def test_nothing_known_is_unknown():
    assert samples_of(public_recipe("qwen3-8b")) is None


@pytest.mark.parametrize(
    ("count", "mean", "reason"),
    [(0, 5, "--samples: 0"), (5, 0, "--mean-tokens: 0"), (5, 5000, "more than data.max_length"), (5, None, "none is left")],
)
def test_figures_that_make_no_sense_are_refused(count, mean, reason):
    with pytest.raises(UserError, match=reason):
        samples_of(public_recipe("qwen3-8b", data={"heldout": 5}), count, mean)
