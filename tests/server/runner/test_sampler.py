"""The sampler against transformers' logits processors, plain Python, and the distributions that it must draw from."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from quire_server.engine.step import NewRequestData
from quire_server.runner.logits_processors import AllowedTokens, LogitBias, LogitsProcessor, MinTokens, Penalties
from quire_server.runner.sampler import SampledTokens, Sampler, derive_seed, uniforms
from quire_server.shared.sampling_params import SamplingParams

VOCAB_SIZE = 50
PROMPT = (3, 3, 7, 11, 3)
OUTPUT = (7, 20, 20, 31)


def build_request(
    params: SamplingParams,
    *,
    request_id: str = "a",
    prompt: Sequence[int] = PROMPT,
    output: Sequence[int] = (),
    eos_token_ids: tuple[int, ...] = (),
) -> NewRequestData:
    return NewRequestData(
        request_id=request_id,
        token_ids=[*prompt, *output],
        num_prompt_tokens=len(prompt),
        sampling_params=params,
        eos_token_ids=eos_token_ids,
    )


def random_logits(num_rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def processed(processor: LogitsProcessor, request: NewRequestData, logits: torch.Tensor) -> torch.Tensor:
    """Logits of a batch of three in which the middle row alone uses the processor."""
    processor.add(5, request)
    batch = logits.repeat(3, 1)
    processor.apply(batch, [0, 5, 2])
    assert torch.equal(batch[0], logits[0])
    assert torch.equal(batch[2], logits[0])
    return batch[1:2]


def run(sampler: Sampler, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> SampledTokens:
    return sampler.sample(logits.clone(), np.array(rows, dtype=np.int64), np.array(positions, dtype=np.int64))


# Processors


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    logits = random_logits()
    request = build_request(SamplingParams(repetition_penalty=penalty), output=OUTPUT)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*PROMPT, *OUTPUT]]), logits.clone())
    assert torch.allclose(processed(Penalties(), request, logits), expected)


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 0.9), (-1.5, 0.4)])
def test_frequency_and_presence_penalties_count_output_alone(frequency: float, presence: float) -> None:
    logits = random_logits()
    expected = logits.clone()
    for token_id, count in Counter(OUTPUT).items():
        expected[0, token_id] -= frequency * count + presence
    request = build_request(SamplingParams(frequency_penalty=frequency, presence_penalty=presence), output=OUTPUT)
    assert torch.allclose(processed(Penalties(), request, logits), expected)


def test_penalties_updated_token_by_token_are_penalties_computed_at_once() -> None:
    params = SamplingParams(frequency_penalty=0.6, presence_penalty=0.3, repetition_penalty=1.4)
    output = [int(each) for each in np.random.default_rng(0).integers(0, VOCAB_SIZE, 300)]
    step_by_step, at_once = Penalties(), Penalties()
    step_by_step.add(5, build_request(params))
    for token_id in output:
        step_by_step.append(5, token_id)
    at_once.add(5, build_request(params, output=output))
    logits, expected = random_logits(), random_logits()
    step_by_step.apply(logits, [5])
    at_once.apply(expected, [5])
    assert torch.allclose(logits, expected)
    assert not torch.allclose(logits, random_logits())


def test_seen_tokens_grow_beyond_their_first_room() -> None:
    penalties = Penalties()
    penalties.add(0, build_request(SamplingParams(presence_penalty=1.0), prompt=[0]))
    logits = torch.zeros(1, 1000)
    for token_id in range(1000):
        penalties.append(0, token_id)
    penalties.apply(logits, [0])
    assert torch.equal(logits, torch.full((1, 1000), -1.0))


@pytest.mark.parametrize("num_output_tokens", [0, 2, 3, 4])
def test_min_tokens_is_transformers(num_output_tokens: int) -> None:
    eos_token_ids, stop_token_ids = (2,), (9, 4)
    logits = random_logits()
    request = build_request(
        SamplingParams(min_tokens=3, stop_token_ids=stop_token_ids),
        output=OUTPUT[:num_output_tokens],
        eos_token_ids=eos_token_ids,
    )
    oracle = hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [*eos_token_ids, *stop_token_ids])
    expected = oracle(torch.tensor([[*PROMPT, *OUTPUT[:num_output_tokens]]]), logits.clone())
    assert torch.equal(processed(MinTokens(), request, logits), expected)


def test_min_tokens_ends_when_they_are_reached() -> None:
    processor = MinTokens()
    processor.add(0, build_request(SamplingParams(min_tokens=2, stop_token_ids=(9,))))
    processor.append(0, 1)
    assert processor.is_used_by(0)
    processor.append(0, 1)
    assert not processor.is_used_by(0)


def test_min_tokens_leaves_an_ignored_end_of_sequence() -> None:
    processor = MinTokens()
    processor.add(0, build_request(SamplingParams(min_tokens=2, ignore_eos=True), eos_token_ids=(2,)))
    assert not processor.is_used_by(0)


def test_logit_bias_is_transformers() -> None:
    logits, bias = random_logits(), {4: 5.0, 17: -100.0, 30: 0.25}
    oracle = hf.SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in bias.items()})
    expected = oracle(torch.tensor([PROMPT]), logits.clone())
    request = build_request(SamplingParams(logit_bias=bias))
    assert torch.allclose(processed(LogitBias(), request, logits), expected)


def test_allowed_tokens() -> None:
    logits = random_logits()
    expected = torch.full_like(logits, -torch.inf)
    expected[0, [4, 17]] = logits[0, [4, 17]]
    request = build_request(SamplingParams(allowed_token_ids=(17, 4, 17)))
    assert torch.equal(processed(AllowedTokens(), request, logits), expected)


@pytest.mark.parametrize("processor", [AllowedTokens(), MinTokens(), LogitBias(), Penalties()])
def test_a_removed_row_is_forgotten(processor: LogitsProcessor) -> None:
    params = SamplingParams(
        allowed_token_ids=(1,), min_tokens=2, stop_token_ids=(3,), logit_bias={1: 1.0}, repetition_penalty=2.0
    )
    processor.add(0, build_request(params))
    assert processor.is_used_by(0)
    processor.remove(0)
    assert not processor.is_used_by(0)
    logits = random_logits()
    processor.apply(logits, [0])
    assert torch.equal(logits, random_logits())


def test_processors_run_in_vllms_order() -> None:
    """A banned token stays banned under a bias, and a repetition penalty scales the biased logit."""
    sampler = Sampler(max_num_seqs=1, seed=0)
    params = SamplingParams(
        temperature=0.0, logit_bias={5: 100.0, 6: 3.0}, allowed_token_ids=(6, 7), repetition_penalty=2.0
    )
    sampler.add(0, build_request(params, prompt=[6]))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7] = 1.4  # token 6: (0 + 3) / 2 = 1.5; penalty before bias would make it 3
    assert run(sampler, logits, [0], [0]).token_ids.tolist() == [6]
    logits[0, 7] = 1.6
    assert run(sampler, logits, [0], [0]).token_ids.tolist() == [7]


# Choosing


def test_greedy_rows_and_random_rows_share_a_batch() -> None:
    sampler = Sampler(max_num_seqs=4, seed=0)
    logits = random_logits(4)
    for row, temperature in enumerate([0.0, 1.0, 0.0, 5.0]):
        sampler.add(row, build_request(SamplingParams(temperature=temperature, seed=row), request_id=str(row)))
    sampled = run(sampler, logits, [0, 1, 2, 3], [0, 0, 0, 0]).token_ids
    assert sampled[0] == logits[0].argmax()
    assert sampled[2] == logits[2].argmax()


def warp(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities as transformers' warpers make them."""
    warpers: list[Any] = [hf.TemperatureLogitsWarper(params.temperature)]
    if params.min_p > 0:
        warpers.append(hf.MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        warpers.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(hf.TopPLogitsWarper(params.top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=2.0),
        SamplingParams(temperature=0.5, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1.5, min_p=0.1),
        SamplingParams(temperature=2.5, min_p=0.02, top_k=20, top_p=0.9),
    ],
    ids=repr,
)
def test_what_is_drawn_follows_the_distribution(params: SamplingParams) -> None:
    """Chi-square over fixed draws: one request, its output positions 0 to 3999."""
    num_draws, batch_size = 4000, 500
    logits = random_logits(seed=3) / 2
    expected = warp(logits.clone(), params)[0].double().numpy() * num_draws
    sampler = Sampler(max_num_seqs=1, seed=7)
    sampler.add(0, build_request(params))
    counts = np.zeros(VOCAB_SIZE)
    for start in range(0, num_draws, batch_size):
        batch = logits.repeat(batch_size, 1)
        drawn = run(sampler, batch, [0] * batch_size, range(start, start + batch_size)).token_ids
        counts += np.bincount(drawn, minlength=VOCAB_SIZE)
    assert counts[expected == 0].sum() == 0
    is_common = expected >= 5
    rest = expected[~is_common].sum()
    chi_square = ((counts[is_common] - expected[is_common]) ** 2 / expected[is_common]).sum()
    if rest > 0:
        chi_square += (counts[~is_common].sum() - rest) ** 2 / rest
    num_bins = int(is_common.sum())
    assert num_bins >= 4
    assert chi_square < num_bins + 4 * (2 * num_bins) ** 0.5  # mean and four standard deviations


def test_an_answer_does_not_depend_on_the_batch_or_the_row() -> None:
    logits = random_logits(6, seed=1)
    requests = [build_request(SamplingParams(), request_id=str(index)) for index in range(6)]
    alone = []
    for index, request in enumerate(requests):
        sampler = Sampler(max_num_seqs=6, seed=0)
        sampler.add(0, request)
        alone.append(int(run(sampler, logits[index : index + 1], [0], [index]).token_ids[0]))
    sampler = Sampler(max_num_seqs=6, seed=0)
    for index, request in enumerate(requests):
        sampler.add(5 - index, request)
    together = run(sampler, logits, [5, 4, 3, 2, 1, 0], range(6)).token_ids
    assert together.tolist() == alone


def test_seeds() -> None:
    flat = torch.zeros(1, VOCAB_SIZE)

    def draw(params: SamplingParams, request_id: str, engine_seed: int) -> list[int]:
        sampler = Sampler(max_num_seqs=1, seed=engine_seed)
        sampler.add(0, build_request(params, request_id=request_id))
        return [int(run(sampler, flat, [0], [position]).token_ids[0]) for position in range(20)]

    seeded = draw(SamplingParams(seed=5), "a", 0)
    assert seeded == draw(SamplingParams(seed=5), "b", 1)
    assert seeded != draw(SamplingParams(seed=6), "a", 0)
    assert seeded != draw(SamplingParams(seed=-5), "a", 0)
    unseeded = draw(SamplingParams(), "a", 0)
    assert unseeded == draw(SamplingParams(), "a", 0)
    assert unseeded != draw(SamplingParams(), "b", 0)
    assert unseeded != draw(SamplingParams(), "a", 1)


def test_derived_seeds_are_stable() -> None:
    """Across releases and machines: the same --seed and request ids give the same answers."""
    assert derive_seed(0, "request") == 8277300723915357064
    assert derive_seed(0, "request") != derive_seed(1, "request")


def test_uniforms_are_uniform_and_below_one() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200, dtype=np.uint64), 200)
    drawn = uniforms(seeds, positions)
    assert drawn.dtype == np.float64
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts, _ = np.histogram(drawn, bins=100, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 99 + 4 * 198**0.5
    table = drawn.reshape(200, 200)
    for other in (np.roll(table, 1, axis=0), np.roll(table, 1, axis=1), np.roll(table, (1, 1), axis=(0, 1))):
        assert abs(np.corrcoef(table.ravel(), other.ravel())[0, 1]) < 0.02


# Log-probabilities


def test_logprobs_are_of_the_raw_distribution() -> None:
    sampler = Sampler(max_num_seqs=3, seed=0)
    logits = random_logits(3, seed=2)
    sampler.add(0, build_request(SamplingParams(temperature=0.0), request_id="0"))
    params = SamplingParams(temperature=3.0, logprobs=4, logit_bias={13: 1000.0}, top_k=3)
    sampler.add(1, build_request(params, request_id="1"))
    sampler.add(2, build_request(SamplingParams(temperature=0.0, logprobs=0), request_id="2"))
    sampled = run(sampler, logits, [0, 1, 2], [0, 0, 0])
    reference = logits.log_softmax(-1)
    assert sorted(sampled.logprobs) == [1, 2]
    biased = sampled.logprobs[1]
    assert biased.token_id == 13 == sampled.token_ids[1]
    assert biased.logprob == pytest.approx(reference[1, 13].item(), abs=1e-5)
    assert biased.rank == int((logits[1] > logits[1, 13]).sum()) + 1
    values, ids = reference[1].topk(4)
    assert [token_id for token_id, _ in biased.top] == ids.tolist()
    assert [value for _, value in biased.top] == pytest.approx(values.tolist(), abs=1e-5)
    greedy = sampled.logprobs[2]
    assert (greedy.token_id, greedy.rank, greedy.top) == (int(logits[2].argmax()), 1, [])
    assert greedy.logprob == pytest.approx(reference[2].max().item(), abs=1e-5)


def test_a_row_that_is_used_again_starts_clean() -> None:
    sampler = Sampler(max_num_seqs=1, seed=0)
    params = SamplingParams(temperature=2.0, logprobs=2, allowed_token_ids=(1,), repetition_penalty=1.5)
    sampler.add(0, build_request(params, request_id="old"))
    sampler.remove(0)
    sampler.add(0, build_request(SamplingParams(temperature=0.0), request_id="new"))
    logits = random_logits()
    sampled = run(sampler, logits, [0], [0])
    assert sampled.token_ids.tolist() == [int(logits.argmax())]
    assert not sampled.logprobs
