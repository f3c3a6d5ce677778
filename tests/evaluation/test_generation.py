from collections import Counter

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from lt_train.errors import UserError
from lt_train.evaluation.generation import (
    DrawTokens,
    Generation,
    Request,
    Sampling,
    SpecialTokens,
    check_fits_context,
    generate,
    keep_nucleus,
    sample_seed,
    special_tokens,
)
from lt_train.hybrid import HybridForCausalLM

TOKENS = SpecialTokens(stop_ids=(1,), pad_id=0)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=16)
SAMPLED = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=16)


def requests_of_many_lengths(samples: int = 1) -> list[Request]:
    """Prompts shorter and longer than w_sink and than the window."""
    return [
        Request(f"p{n}", sample, sample_seed(7, f"p{n}", sample), tuple(6 + (n * 5 + i * i) % 30 for i in range(n)))
        for n in (1, 2, 3, 5, 9, 14)
        for sample in range(samples)
    ]


def answers(
    model: HybridForCausalLM, requests: list[Request], sampling: Sampling, batch_size: int
) -> dict[tuple[str, int], Generation]:
    found = generate(model, requests, sampling, TOKENS, batch_size)
    return {(generation.request.problem, generation.request.sample): generation for generation in found}


def token_ids(generations: dict[tuple[str, int], Generation]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {key: generation.token_ids for key, generation in generations.items()}


def greedy_without_cache(model: HybridForCausalLM, prompt_ids: tuple[int, ...], new: int) -> tuple[int, ...]:
    ids = list(prompt_ids)
    for _ in range(new):
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in TOKENS.stop_ids:
            break
    return tuple(ids[len(prompt_ids) :])


def test_greedy_batches_give_what_recomputing_each_prompt_alone_gives(model: HybridForCausalLM) -> None:
    requests = requests_of_many_lengths()
    expected = {(r.problem, 0): greedy_without_cache(model, r.prompt_ids, 16) for r in requests}
    assert token_ids(answers(model, requests, GREEDY, batch_size=6)) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_sample_does_not_depend_on_what_shares_its_batch(model: HybridForCausalLM, sampling: Sampling) -> None:
    requests = requests_of_many_lengths(samples=2)
    alone = token_ids(answers(model, requests, sampling, batch_size=1))
    assert token_ids(answers(model, requests, sampling, batch_size=7)) == alone
    assert token_ids(answers(model, requests[::-1], sampling, batch_size=4)) == alone


def test_samples_of_one_problem_differ_and_so_do_seeds(model: HybridForCausalLM) -> None:
    drawn = token_ids(answers(model, requests_of_many_lengths(samples=4), SAMPLED, batch_size=24))
    assert len(set(drawn.values())) == len(drawn)
    assert len({sample_seed(seed, "p", sample) for seed in range(3) for sample in range(3)}) == 9


def test_sampling_leaves_the_global_random_numbers_alone(model: HybridForCausalLM) -> None:
    before = torch.get_rng_state()
    answers(model, requests_of_many_lengths(), SAMPLED, batch_size=6)
    assert torch.equal(before, torch.get_rng_state())


def test_an_answer_ends_at_its_first_stop_token_and_says_so(model: HybridForCausalLM) -> None:
    drawn = answers(model, requests_of_many_lengths(samples=8), Sampling(1.5, 1.0, 24), batch_size=48)
    assert {generation.finish_reason for generation in drawn.values()} == {"stop", "length"}
    for generation in drawn.values():
        ends = [token in TOKENS.stop_ids for token in generation.token_ids]
        if generation.finish_reason == "stop":
            assert ends.index(True) == len(ends) - 1
            assert TOKENS.content(generation.token_ids) == generation.token_ids[:-1]
        else:
            assert not any(ends) and len(ends) == 24
            assert TOKENS.content(generation.token_ids) == generation.token_ids


def test_the_checkpoints_own_generation_settings_have_no_say(model: HybridForCausalLM) -> None:
    requests = requests_of_many_lengths()
    expected = {s: token_ids(answers(model, requests, s, batch_size=6)) for s in (GREEDY, SAMPLED)}
    own = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.2,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=20,
        suppress_tokens=list(range(10, 30)),
        eos_token_id=[5, 6, 7, 8],
    )
    model.generation_config = own
    assert {s: token_ids(answers(model, requests, s, batch_size=6)) for s in (GREEDY, SAMPLED)} == expected
    assert model.generation_config is own


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    seeds = [sample_seed(0, "p", sample) for sample in range(4000)]
    chosen = DrawTokens(Sampling(1.0, 1.0, 1), seeds)(torch.empty(0), probabilities.log().expand(4000, -1)).argmax(-1)
    counts = Counter(chosen.tolist())
    assert counts[1] == 0
    for token, probability in enumerate(probabilities.tolist()):
        assert abs(counts[token] / 4000 - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5 + 1e-9


def test_temperature_sharpens_the_distribution() -> None:
    probabilities = torch.tensor([0.6, 0.4])
    seeds = [sample_seed(0, "p", sample) for sample in range(4000)]
    chosen = DrawTokens(Sampling(0.5, 1.0, 1), seeds)(torch.empty(0), probabilities.log().expand(4000, -1)).argmax(-1)
    assert abs((chosen == 0).float().mean().item() - 0.36 / (0.36 + 0.16)) < 0.03


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.3, [False, True, False, False]),
        (0.5, [False, True, False, False]),
        (0.51, [True, True, False, False]),
        (0.99, [True] * 4),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: list[bool]) -> None:
    probabilities = torch.tensor([[0.25, 0.5, 0.125, 0.125]])
    assert (keep_nucleus(probabilities, top_p) > 0).tolist() == [kept]


def test_generation_stops_at_the_eos_of_the_tokenizer_and_of_the_checkpoint(
    model: HybridForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.generation_config.eos_token_id = [4, 9]
    assert special_tokens(model, tokenizer) == SpecialTokens(stop_ids=(1, 4, 9), pad_id=0)


def test_a_model_that_could_never_stop_is_refused(model: HybridForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.generation_config.eos_token_id = None
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="end-of-sequence token"):
        special_tokens(model, endless)


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused(model: HybridForCausalLM) -> None:
    requests = requests_of_many_lengths()  # the longest prompt has 14 tokens, the context 128
    check_fits_context(model.config.max_position_embeddings, requests, max_new_tokens=114)
    with pytest.raises(UserError, match="set max_new_tokens to at most 114"):
        check_fits_context(model.config.max_position_embeddings, requests, max_new_tokens=115)
