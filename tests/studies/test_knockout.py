"""Completions with forbidden tokens: a suffix decoded from a prefix equals a completion decoded from scratch."""

import pytest
import torch

from trl_opd.studies.knockout import Job, Sampling, baseline_jobs, decode, gumbel, knockout_jobs

from tests.helpers.tiny import PROMPTS, make_model, make_tokenizer

EOS, PAD = 2, 0
GREEDY = Sampling(max_new_tokens=14, batch_size=5)
SAMPLED = Sampling(max_new_tokens=14, greedy=False, temperature=0.8, seed=3, batch_size=5)


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in make_tokenizer()(PROMPTS).input_ids]  # of different lengths


def student(family: str = "qwen3") -> torch.nn.Module:
    model = make_model(family, seed=0).eval()
    with torch.no_grad():  # some completions end, and others are cut
        model.get_output_embeddings().weight[EOS] *= 2.5
    return model


def complete(model, jobs, sampling) -> dict:
    batches = decode(model, jobs, sampling, pad_id=PAD, eos_ids=[EOS])
    return {(job.arm, job.problem): ids for batch in batches for job, ids in batch}


@torch.no_grad()
def naive(model, prompt, problem: int, forbidden, sampling: Sampling) -> list[int]:
    """Decode one completion alone, without a cache, by the definition."""
    found = []
    while len(found) < sampling.max_new_tokens:
        ids = torch.tensor([[*prompt, *found]])
        logits = model(input_ids=ids).logits[0, -1].clone()
        logits[list(forbidden)] = -torch.inf
        if not sampling.greedy:
            noise = gumbel(sampling.seed, torch.tensor([problem]), torch.tensor([len(found)]), len(logits))[0]
            logits = logits / sampling.temperature + noise
        found.append(int(logits.argmax()))
        if found[-1] == EOS:
            break
    return found


def baseline_of(model, prompts, sampling) -> list[list[int]]:
    found = complete(model, baseline_jobs(prompts, sampling), sampling)
    return [found["baseline", problem] for problem in range(len(prompts))]


@pytest.mark.parametrize(("family", "sampling"), [("qwen3", SAMPLED), ("gpt2", GREEDY), ("llama", SAMPLED)])
@pytest.mark.slow
def test_suffixes_equal_those_of_decoding_from_scratch(prompts, family, sampling):
    model = student(family)
    baseline = baseline_of(model, prompts, sampling)
    for problem, prompt in enumerate(prompts):
        assert baseline[problem] == naive(model, prompt, problem, (), sampling)
    assert {len(ids) for ids in baseline} > {14}  # some end earlier, some are cut
    chosen = sorted({id for ids in baseline for id in ids})
    absent = next(id for id in range(3, 300) if id not in chosen)
    in_prompt = prompts[0][0]
    arms = {f"token {id}": frozenset([id]) for id in [*chosen[::6], EOS, absent, in_prompt]}
    arms["together"] = frozenset(chosen[:6])
    jobs = knockout_jobs(prompts, baseline, arms, sampling)
    found = complete(model, jobs, sampling)
    whole = 0
    for arm, forbidden in arms.items():
        for problem, prompt in enumerate(prompts):
            expected = naive(model, prompt, problem, forbidden, sampling)
            assert found.get((arm, problem), baseline[problem]) == expected, (arm, problem)
            assert not forbidden & set(expected)
            whole += len(expected)
    decoded_arms = {arm for arm, _ in found}
    assert f"token {absent}" not in decoded_arms
    assert f"token {EOS}" in decoded_arms
    assert sum(len(found[job.arm, job.problem]) - len(job.prefix) for job in jobs) < whole / 2


def test_problem_is_decoded_again_only_from_its_first_forbidden_token():
    jobs = knockout_jobs([(1,), (1,)], [[5, 6, 7, 6], [8]], {"six": frozenset([6]), "seven": frozenset([7, 6])}, GREEDY)
    assert [(job.arm, job.problem, job.prefix) for job in jobs] == [("six", 0, (5,)), ("seven", 0, (5,))]


@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}])
def test_sampling_that_excludes_tokens_decodes_everything_again(prompts, cut):
    sampling = Sampling(max_new_tokens=6, greedy=False, seed=1, **cut)
    assert not sampling.reuses
    model = student()
    baseline = baseline_of(model, prompts, sampling)
    arms = {"late": frozenset([baseline[0][-1]]), "absent": frozenset([299])}
    jobs = knockout_jobs(prompts, baseline, arms, sampling)
    assert [job.prefix for job in jobs] == [()] * 2 * len(prompts)
    for (arm, _), ids in complete(model, jobs, sampling).items():
        assert not arms[arm] & set(ids)


def test_sampled_completions_follow_the_students_distribution(prompts):
    model = student()
    prompt = prompts[0]
    sampling = Sampling(max_new_tokens=1, greedy=False, temperature=0.7, seed=0, batch_size=500)
    jobs = [Job("baseline", problem, prompt, (), frozenset(), 1) for problem in range(4000)]
    drawn = torch.tensor([ids[0] for ids in complete(model, jobs, sampling).values()])
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(0)
    shares = torch.bincount(drawn, minlength=300) / len(drawn)
    top = expected.topk(5).indices
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((shares - expected)[top].abs() < 4 * error[top]).all()


def test_noise_depends_on_seed_problem_position_and_token_only():
    problems = torch.tensor([4, 9])
    places = torch.tensor([2, 2])
    both = gumbel(1, problems, places, 50)
    assert torch.equal(gumbel(1, problems[1:], places[1:], 50), both[1:])
    assert torch.equal(gumbel(1, problems, places, 30), both[:, :30])
    for other in ((2, problems, places), (1, problems + 1, places), (1, problems, places + 1)):
        assert not torch.isclose(gumbel(*other, 50), both).any()
    many = gumbel(0, torch.arange(200), torch.zeros(200, dtype=torch.long), 500).double()
    assert many.isfinite().all()
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(1.6449, abs=0.05)


def test_arm_that_forbids_every_token_is_an_error(prompts):
    jobs = [Job("all", 3, prompts[0], (), frozenset(range(300)), 4)]
    with pytest.raises(ValueError, match="Problem 3, arm 'all': no token is left to choose"):
        complete(student(), jobs, GREEDY)


@pytest.mark.parametrize(("parameter", "value"), [("weight", "nan"), ("weight", "inf"), ("bias", "inf")])
def test_logits_that_are_not_finite_are_an_error(prompts, parameter, value):
    model = make_model("phi").eval()
    with torch.no_grad():
        getattr(model.lm_head, parameter)[7] = float(value)
    with pytest.raises(ValueError, match="Problem 0, arm 'baseline': the student's logits are not finite"):
        baseline_of(model, prompts[:1], GREEDY)


def test_tokens_that_the_generation_config_suppresses_stay_suppressed(prompts):
    model = student()
    first = baseline_of(model, prompts, GREEDY)[0][0]
    model.generation_config.suppress_tokens = [first]
    assert first not in {id for ids in baseline_of(model, prompts, GREEDY) for id in ids}


def test_longest_jobs_come_first_and_batches_have_at_most_the_given_size():
    lengths = (1, 9, 4, 9, 2, 7, 3)
    jobs = [Job("a", problem, (5,) * 3, (), frozenset(), length) for problem, length in enumerate(lengths)]
    batches = decode(student(), jobs, GREEDY, pad_id=PAD, eos_ids=[EOS])
    assert [[job.expected for job, _ in batch] for batch in batches] == [[9, 9, 7, 4, 3], [2, 1]]
