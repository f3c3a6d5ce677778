"""How a layer profile is computed: every layer on every calibration sample by every strategy that scores the model.

samples.jsonl    a header, then one row for each scored sample: a killed run resumes at the next sample
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lt_train.hybrid.modeling import HybridForCausalLM
from lt_train.recipe.schema import Hybrid
from lt_train.runtime.errors import UserError
from lt_train.runtime.files import append_json_line, drop_cut_line, read_json_lines
from lt_train.runtime.fingerprints import check_same
from lt_train.runtime.progress import show_progress
from lt_train.runtime.run_paths import LAYER_PROFILE
from lt_train.selection.calibration import samples_beyond_window
from lt_train.selection.fingerprint import Fingerprint, Sizes, fingerprint
from lt_train.selection.gates import check_sum_of_shares, gate_shares
from lt_train.selection.kl import mean_divergence
from lt_train.selection.lazy_ratio import lazy_ratios
from lt_train.selection.nll import nll_rise
from lt_train.selection.profile import SCORED, LayerProfile, SampleScores, check_sample, validated
from lt_train.selection.quadrature import POINTS
from lt_train.selection.reach import reach_rise
from lt_train.selection.token_losses import Variants

if TYPE_CHECKING:
    from lt_train.dataset.examples import Example


@dataclass(frozen=True)
class Header:
    """The first row of `samples.jsonl`."""

    fingerprint: Fingerprint
    num_layers: int
    fitting: tuple[str, ...]
    started: str
    sliding_layers: tuple[int, ...] = ()


def profile_layers(
    model: HybridForCausalLM,
    examples: Sequence["Example"],
    hybrid: Hybrid,
    strategies: Sequence[str],
    *,
    out: Path | None = None,
    progress: bool = True,
) -> LayerProfile:
    """Score every layer of `model` on every calibration example by every strategy that scores the model.

    Args:
        model: a hybrid with the recipe's `scored_w_sink` and `w_recent` and any lazy layers. It is set to evaluation mode, and its
            weights require no gradients afterwards.
        hybrid: the recipe's hybrid part.
        strategies: names; `periodic` and `random` need no scores and are skipped.
        out: folder for `profile.json` and `samples.jsonl`, in which an interrupted run resumes.
        progress: show samples done, rate and time left on stderr.

    Raises:
        UserError: too many samples fit inside the window, a score is not finite, the shares of `gates` do not add up to the
            measured rise, or `out` holds another model's or data's scores.
    """
    sizes = Sizes(hybrid.scored_w_sink, hybrid.w_recent, hybrid.calibration.w_last, hybrid.calibration.long_reach_fraction)
    scored = tuple(strategy for strategy in SCORED if strategy in strategies)
    if (model.spec.w_sink, model.spec.w_recent) != (sizes.w_sink, sizes.w_recent):
        raise ValueError(f"the model's spec {model.spec} does not have the recipe's sizes {sizes}")
    usable, fitting = samples_beyond_window(examples, sizes.w_sink, sizes.w_recent)
    model.eval().requires_grad_(False)
    header = Header(
        fingerprint=fingerprint(model, examples, sizes, scored),
        num_layers=model.config.num_hidden_layers,
        fitting=tuple(example.id for example in fitting),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        sliding_layers=model.spec.sliding_layers,
    )
    samples: list[SampleScores] = []
    if out is not None:
        header, samples = _begin_or_resume(out / "samples.jsonl", header)
    with show_progress("scoring layers", done=len(samples), total=len(usable), shown=progress) as bar:
        for example in usable[len(samples) :]:
            samples.append(_score_sample(model, example, sizes, scored))
            if out is not None:
                append_json_line(out / "samples.jsonl", dataclasses.asdict(samples[-1]))
            bar.advance()
    profile = LayerProfile(
        header.fingerprint, header.num_layers, tuple(samples), header.fitting, header.started, header.sliding_layers
    )
    if "gates" in scored:
        check_sum_of_shares(profile.mean_sum_of_shares, profile.mean_all_streaming("gates"), len(samples))
    if out is not None:
        profile.save(out / LAYER_PROFILE)
    return profile


def _score_sample(model: HybridForCausalLM, example: "Example", sizes: Sizes, strategies: Sequence[str]) -> SampleScores:
    scores: dict[str, list[float]] = {}
    all_streaming: dict[str, float] = {}
    shares = None
    if "gates" in strategies:
        shares = gate_shares(model, example.prompt_ids, example.answer_ids, sizes.long_reach_share)
        scores["gates"], all_streaming["gates"] = shares.layers, shares.measured_rise
    if {"reach", "nll", "kl"} & set(strategies):
        variants = Variants(model, example.prompt_ids, example.answer_ids)
        if "reach" in strategies or "nll" in strategies:
            losses = variants.losses()
        if "reach" in strategies:
            scores["reach"], all_streaming["reach"] = reach_rise(losses, sizes.long_reach_share)
        if "nll" in strategies:
            scores["nll"], all_streaming["nll"] = nll_rise(losses)
        if "kl" in strategies:
            scores["kl"], all_streaming["kl"] = mean_divergence(variants.divergences())
    if "lazy_ratio" in strategies:
        scores["lazy_ratio"] = lazy_ratios(model, example.input_ids, sizes)
    for strategy in scores.keys() - {"gates"}:
        of_full = dict(zip(model.spec.full_in_base, scores[strategy], strict=True))
        scores[strategy] = [of_full.get(layer, 0.0) for layer in range(model.spec.num_layers)]
    for strategy, score_L in scores.items():
        if not all(map(math.isfinite, score_L)):
            raise UserError(
                f"model.base: {strategy} of sample {example.id} is not finite in {model.dtype}, so layers cannot be ranked. "
                "Fix: set model.dtype to fp32; if that does not help, the base's weights are damaged"
            )
    return SampleScores(
        id=example.id,
        tokens=len(example),
        scores={name: tuple(score_L) for name, score_L in scores.items()},
        all_streaming=all_streaming,
        head_shares=() if shares is None else shares.heads,
        sum_of_shares=None if shares is None else math.fsum(shares.layers),
        gate_points=len(POINTS) if shares is None else shares.points,
    )


def _begin_or_resume(path: Path, header: Header) -> tuple[Header, list[SampleScores]]:
    """Write the header to a new file, or read header and rows of an existing one.

    Raises:
        UserError: the file is of another model, other data or other settings, or has a damaged row.
    """
    drop_cut_line(path)
    rows = list(read_json_lines(path)) if path.exists() else []
    if not rows:
        append_json_line(path, dataclasses.asdict(header))
        return header, []
    where, first = rows[0]
    begun = validated(Header, first, where)
    check_same(
        dataclasses.asdict(begun.fingerprint),
        dataclasses.asdict(header.fingerprint),
        f"{path}: these scores have another fingerprint",
        "give this run another name, or delete that folder to score again",
    )
    samples = [validated(SampleScores, row, where) for where, row in rows[1:]]
    for (where, _), sample in zip(rows[1:], samples, strict=True):
        check_sample(sample, header.fingerprint.strategies, header.num_layers, where)
    return begun, samples
