import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from lt_train.hybrid.spec import HybridSpec
from lt_train.recipe.schema import Calibration, Hybrid
from lt_train.runtime.errors import UserError
from lt_train.selection import gates
from lt_train.selection import scoring as module
from lt_train.selection.choose import choose_layers
from lt_train.selection.gates import LARGEST_GAP
from lt_train.selection.profile import LayerProfile
from lt_train.selection.scoring import profile_layers

STRATEGIES = ("gates", "reach", "nll", "kl", "lazy_ratio")


@pytest.fixture
def examples(example_of):
    return [example_of(seed, tokens=30 + 5 * seed) for seed in range(5)]


@pytest.fixture
def make(hybrid_of, examples, hybrid_part):
    """make(out): the profile of one model on the same examples."""
    model = hybrid_of()

    def run(out=None, examples=examples, strategies=STRATEGIES, hybrid=hybrid_part, model=model) -> LayerProfile:
        return profile_layers(model, examples, hybrid, strategies, out=out, progress=False)

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture
def made(make, folders, tmp_path):
    """made(*strategies): tmp_path with the profile by these; each is made once in this file."""

    def copied(*strategies) -> Path:
        folder = folders / "-".join(strategies)
        if not folder.exists():
            make(folder, strategies=strategies)
        return Path(shutil.copytree(folder, tmp_path, dirs_exist_ok=True))

    return copied


@pytest.fixture
def profile(made) -> LayerProfile:
    """By all of STRATEGIES."""
    return LayerProfile.load(made(*STRATEGIES) / "profile.json")


def answer_of(model, prompt_ids) -> tuple[int, ...]:
    ids = model.generate(torch.tensor([prompt_ids]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    return tuple(ids[0, len(prompt_ids) :].tolist())


def without_date(profile: LayerProfile) -> LayerProfile:
    return dataclasses.replace(profile, started="")


def test_scores_are_one_number_per_strategy_sample_and_layer(profile, examples):
    assert profile.strategies == STRATEGIES
    for strategy in STRATEGIES:
        assert torch.tensor(profile.scores[strategy]).shape == (len(examples), profile.num_layers)


def test_scores_do_not_depend_on_order_or_company(make, profile, examples):
    backwards, alone = make(examples=examples[::-1]), make(examples=examples[2:3])
    assert profile.samples == backwards.samples[::-1]
    assert alone.samples == profile.samples[2:3]
    for strategy in STRATEGIES:
        for n_layers in (1, 2, 3):
            assert profile.choose(strategy, n_layers) == backwards.choose(strategy, n_layers)


def test_a_strategy_scores_alike_alone_and_beside_others(make, profile):
    for strategy in STRATEGIES:
        assert make(strategies=[strategy]).scores[strategy] == profile.scores[strategy]


def test_scores_that_are_added_later_are_those_of_scoring_together(make, profile):
    later = make(strategies=["reach", "lazy_ratio"]).joined(make(strategies=["nll"]), "profile.json")
    later = later.joined(make(strategies=["kl", "gates"]), "profile.json")
    assert without_date(later) == without_date(profile)


def test_scores_of_other_samples_are_not_added(make, profile, examples):
    with pytest.raises(UserError, match=r"profile\.json: these scores have another fingerprint .*\n.*data: "):
        profile.joined(make(examples=examples[:-1], strategies=["nll"]), "profile.json")


def test_layers_without_attention_output_are_the_first_to_stream(make, hybrid_of, examples):
    model = hybrid_of()
    with torch.no_grad():
        for layer in (1, 3):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
    # Answers that the model itself gives: whatever changes it makes them less likely.
    own = [dataclasses.replace(example, answer_ids=answer_of(model, example.prompt_ids)) for example in examples]
    profile = make(model=model, examples=own)
    assert profile.choose("gates", 2) == (1, 3)
    assert profile.choose("kl", 2) == (1, 3)
    assert profile.choose("nll", 2) == (1, 3)
    assert profile.choose("reach", 2) == (1, 3)


def test_the_recipes_ratio_and_strategy_choose_from_the_profile(profile):
    for strategy in STRATEGIES:
        hybrid = Hybrid(lazy_layer_ratio=0.5, strategy=strategy)
        assert choose_layers(hybrid, HybridSpec(profile.num_layers, ()), seed=0, profile=profile) == profile.choose(strategy, 2)


def test_a_profile_by_gates_keeps_the_share_of_every_head_their_sum_and_the_measured_rise(make, tmp_path):
    profile = make(tmp_path, strategies=["gates", "reach"])
    for sample in json.loads((tmp_path / "profile.json").read_text())["samples"]:
        share_LG = torch.tensor(sample["head_shares"], dtype=torch.float64)
        assert share_LG.shape == (profile.num_layers, 2)
        torch.testing.assert_close(share_LG.sum(dim=1).tolist(), sample["scores"]["gates"])
        assert sample["sum_of_shares"] == pytest.approx(share_LG.sum().item())
        assert sample["all_streaming"]["gates"] == pytest.approx(sample["all_streaming"]["reach"], abs=1e-5)
    assert profile.mean_sum_of_shares == pytest.approx(profile.mean_all_streaming("gates"), rel=LARGEST_GAP)


def test_a_profile_by_gates_keeps_at_how_many_points_gradients_were_taken(make, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "ACCEPTED_GAP", -1)
    make(tmp_path, examples[:2], ["gates"])
    assert [sample.gate_points for sample in LayerProfile.load(tmp_path / "profile.json").samples] == [11] * 2


def test_shares_that_do_not_add_up_to_the_measured_rise_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "LARGEST_GAP", 1e-4)
    with pytest.raises(UserError, match=r"hybrid\.strategy: gates: over 5 samples the shares .* use reach instead of gates"):
        make(tmp_path)
    assert not (tmp_path / "profile.json").exists()


def test_periodic_needs_no_scores(make):
    assert make(strategies=["nll", "periodic"]).choose("periodic", 2) == (0, 2)


def test_a_strategy_that_was_not_scored_cannot_choose(made):
    with pytest.raises(UserError, match="lazy_ratio: not in this layer profile, which has nll"):
        LayerProfile.load(made("nll") / "profile.json").choose("lazy_ratio", 2)


def test_samples_within_the_window_are_counted_and_skipped(make, examples, example_of):
    profile = make(examples=[example_of(9, tokens=8), *examples], strategies=["nll"])
    assert profile.fitting == ("sample-9",)
    assert len(profile.samples) == len(examples)


def test_a_profile_read_back_is_the_one_that_was_saved(make, tmp_path):
    profile = make(tmp_path)
    assert LayerProfile.load(tmp_path / "profile.json") == profile


def test_a_profile_has_its_fingerprint(made):
    made_from = json.loads((made(*STRATEGIES) / "profile.json").read_text())["fingerprint"]
    assert made_from["sizes"] == {"w_sink": 2, "w_recent": 6, "w_last": 8, "long_reach_share": 0.1}
    assert made_from["dtype"] == "float32"
    assert made_from["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("samples_done", [0, 3])
def test_an_interrupted_run_resumes_and_ends_equal_to_an_uninterrupted_one(make, profile, tmp_path, monkeypatch, samples_done):
    interrupted, scored, score = tmp_path / "interrupted", [], module._score_sample

    def score_until_interrupted(model, example, sizes, strategies):
        if len(scored) == samples_done:
            raise KeyboardInterrupt
        scored.append(example.id)
        return score(model, example, sizes, strategies)

    monkeypatch.setattr(module, "_score_sample", score_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(interrupted)
    assert not (interrupted / "profile.json").exists()
    with open(interrupted / "samples.jsonl", "a") as file:
        file.write('{"id": "sample-3", "tok')

    samples_done = -1
    resumed = make(interrupted)
    assert scored == [f"sample-{index}" for index in range(5)]
    assert without_date(resumed) == without_date(profile)
    assert LayerProfile.load(interrupted / "profile.json") == resumed


def test_a_finished_profile_is_read_back_not_made_again(make, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_score_sample", None)
    assert make(tmp_path) == profile


def test_scores_of_another_model_data_or_window_are_not_mixed_in(make, made, tmp_path, examples, hybrid_of):
    made(*STRATEGIES)
    before = (tmp_path / "samples.jsonl").read_bytes()
    trained = hybrid_of()
    with torch.no_grad():
        trained.lm_head.weight.mul_(1.01)
    with pytest.raises(UserError, match="weights: "):
        make(tmp_path, model=trained)
    with pytest.raises(UserError, match="data: "):
        make(tmp_path, examples=examples[:-1])
    wider = Hybrid(lazy_layer_ratio=0.5, w_sink=2, w_recent=7, calibration=Calibration(w_last=8))
    with pytest.raises(UserError, match=r"sizes\.w_recent: 6, 7"):
        make(tmp_path, hybrid=wider, model=hybrid_of((), 2, 7))
    with pytest.raises(UserError, match="strategies: "):
        make(tmp_path, strategies=["nll"])
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_a_model_of_another_window_than_the_recipes_is_a_bug(make, hybrid_of):
    with pytest.raises(ValueError, match="does not have the recipe's sizes"):
        make(model=hybrid_of((), 2, 7))


@pytest.mark.parametrize("strategy", ["gates", "reach", "nll", "kl"])
def test_a_score_that_is_not_finite_is_refused(make, hybrid_of, strategy):
    model = hybrid_of()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=rf"{strategy} of sample sample-0 is not finite in torch\.float32"):
        make(model=model, strategies=[strategy, "lazy_ratio"])


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_profile_is_refused(made, seed):
    path = made("nll") / "profile.json"
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(seed).randrange(len(content) - 2)])
    with pytest.raises(UserError, match=r"profile\.json: not a complete layer profile"):
        LayerProfile.load(path)


def damaged(values: dict, how: str) -> object:
    if how == "no fingerprint":
        del values["fingerprint"]
    if how == "a layer less":
        values["samples"][1]["scores"]["nll"].pop()
    if how == "a score that is no number":
        values["samples"][1]["scores"]["nll"][0] = "much"
    if how == "a score that is NaN":
        values["samples"][1]["scores"]["nll"][0] = float("nan")
    if how == "a strategy missing":
        del values["samples"][0]["scores"]["nll"]
    if how == "no samples":
        values["samples"] = []
    return [values] if how == "a list" else values


@pytest.mark.parametrize(
    "how",
    [
        "no fingerprint",
        "a layer less",
        "a score that is no number",
        "a score that is NaN",
        "a strategy missing",
        "no samples",
        "a list",
    ],
)
def test_a_profile_with_wrong_content_is_refused(made, how):
    path = made("nll") / "profile.json"
    path.write_text(json.dumps(damaged(json.loads(path.read_text()), how)))
    with pytest.raises(UserError, match=r"profile\.json: not a valid layer profile"):
        LayerProfile.load(path)


def test_shares_of_heads_that_do_not_add_up_to_their_layers_scores_are_refused(made):
    path = made("gates") / "profile.json"
    values = json.loads(path.read_text())
    values["samples"][1]["head_shares"][2][0] += 0.1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"profile\.json: not a valid layer profile \(sample sample-1: the head_shares"):
        LayerProfile.load(path)


def test_a_damaged_row_in_the_middle_stops_a_resumed_run(make, made, tmp_path):
    path = made("nll") / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], '{"id": "sample-1"}\n', *lines[3:]]))
    with pytest.raises(UserError, match=r"samples\.jsonl:3: not a valid layer profile"):
        make(tmp_path, strategies=["nll"])


def test_a_profile_compares_the_layers_that_halves_of_its_samples_choose(profile):
    for strategy in STRATEGIES:
        halves = [dataclasses.replace(profile, samples=profile.samples[start::2]) for start in (0, 1)]
        alike = set.intersection(*(set(half.choose(strategy, 2)) for half in halves))
        assert profile.stability(strategy, 2).same == len(alike)
    assert dataclasses.replace(profile, samples=profile.samples[:1]).stability("reach", 2) is None
