"""Forbidden tokens: completions decoded from where a token was chosen equal those decoded from scratch."""

import pytest
import torch

from trl_opd.studies.knockout import Job, Sampling, baseline_jobs, decode, gumbel, knockout_jobs

from tests.helpers.tiny import PROMPTS, make_model, make_tokenizer

EOS, PAD = 2, 0
GREEDY = Sampling(max_new_tokens=14, batch_size=5)
SAMPLED = Sampling(max_new_tokens=14, greedy=False, temperature=0.8, seed=3, batch_size=5)


def prompts() -> list[list[int]]:
    return [tuple(make_tokenizer()(prompt).input_ids) for prompt in PROMPTS]  # of unlike lengths


def student(family: str) -> torch.nn.Module:
    model = make_model(family, seed=0).eval()
    with torch.no_grad():  # some completions end, and others are cut
        model.get_output_embeddings().weight[EOS] *= 2.5
    return model


def complete(model, jobs, sampling) -> dict:
    return {
        (job.arm, job.problem): ids
        for batch in decode(model, jobs, sampling, pad_id=PAD, eos_ids=[EOS])
        for job, ids in batch
    }


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


def baseline_of(model, sampling) -> list[list[int]]:
    found = complete(model, baseline_jobs(prompts(), sampling), sampling)
    return [found["baseline", problem] for problem in range(len(PROMPTS))]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "llama"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.slow
def test_suffixes_are_those_of_decoding_from_scratch(family, sampling):
    model = student(family)
    baseline = baseline_of(model, sampling)
    for problem, prompt in enumerate(prompts()):
        assert baseline[problem] == naive(model, prompt, problem, (), sampling)
    assert {len(ids) for ids in baseline} > {14}  # some end before, some are cut
    chosen = sorted({id for ids in baseline for id in ids})
    absent = next(id for id in range(3, 300) if id not in chosen)
    in_prompt = prompts()[0][0]
    arms = {f"token {id}": frozenset([id]) for id in [*chosen[::4], EOS, absent, in_prompt]}
    arms["together"] = frozenset(chosen[:6])
    jobs = knockout_jobs(prompts(), baseline, arms, sampling)
    found = complete(model, jobs, sampling)
    for arm, forbidden in arms.items():
        for problem, prompt in enumerate(prompts()):
            expected = naive(model, prompt, problem, forbidden, sampling)
            assert found.get((arm, problem), baseline[problem]) == expected, (arm, problem)
            assert not forbidden & set(expected)
    assert not any(arm == f"token {absent}" for arm, _ in found)
    assert any(arm == f"token {EOS}" for arm, _ in found)
    decoded = sum(len(ids) - len(job.prefix) for job, ids in ((job, found[job.arm, job.problem]) for job in jobs))
    whole = {**{(arm, p): ids for arm in arms for p, ids in enumerate(baseline)}, **found}
    assert decoded < sum(map(len, whole.values())) / 2


def test_a_problem_is_decoded_again_only_from_its_first_forbidden_token():
    jobs = knockout_jobs([(1,), (1,)], [[5, 6, 7, 6], [8]], {"six": frozenset([6]), "seven": frozenset([7, 6])}, GREEDY)
    assert [(job.arm, job.problem, job.prefix) for job in jobs] == [("six", 0, (5,)), ("seven", 0, (5,))]


@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}])
def test_where_a_cut_depends_on_the_others_everything_is_decoded_again(cut):
    sampling = Sampling(max_new_tokens=6, greedy=False, seed=1, **cut)
    assert not sampling.reuses
    model = student("qwen3")
    baseline = baseline_of(model, sampling)
    arms = {"late": frozenset([baseline[0][-1]]), "absent": frozenset([299])}
    jobs = knockout_jobs(prompts(), baseline, arms, sampling)
    assert [job.prefix for job in jobs] == [()] * 2 * len(PROMPTS)
    for (arm, _), ids in complete(model, jobs, sampling).items():
        assert not arms[arm] & set(ids)


def test_sampled_completions_follow_the_students_distribution():
    model, prompt = student("qwen3"), prompts()[0]
    sampling = Sampling(max_new_tokens=1, greedy=False, temperature=0.7, seed=0, batch_size=500)
    jobs = [Job("baseline", problem, prompt, (), frozenset(), 1) for problem in range(4000)]
    drawn = torch.tensor([ids[0] for ids in complete(model, jobs, sampling).values()])
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(0)
    shares = torch.bincount(drawn, minlength=300) / len(drawn)
    top = expected.topk(5).indices
    error = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((shares - expected)[top].abs() < 4 * error[top]).all()


def test_noise_is_of_seed_problem_position_and_token_alone():
    problems, places = torch.tensor([4, 9]), torch.tensor([2, 2])
    both = gumbel(1, problems, places, 50)
    assert torch.equal(gumbel(1, problems[1:], places[1:], 50), both[1:])
    assert torch.equal(gumbel(1, problems, places, 30), both[:, :30])
    for other in ((2, problems, places), (1, problems + 1, places), (1, problems, places + 1)):
        assert not torch.isclose(gumbel(*other, 50), both).any()
    many = gumbel(0, torch.arange(200), torch.zeros(200, dtype=torch.long), 500).double()
    assert many.isfinite().all()
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(1.6449, abs=0.05)


def test_a_step_without_a_token_left_is_named():
    jobs = [Job("all", 3, prompts()[0], (), frozenset(range(300)), 4)]
    with pytest.raises(ValueError, match="Problem 3, arm 'all': no token is left to choose"):
        complete(student("qwen3"), jobs, GREEDY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(value):
    model = student("qwen3")
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(ValueError, match="Problem 0, arm 'baseline': the student's logits are not finite"):
        complete(model, baseline_jobs(prompts()[:1], GREEDY), GREEDY)


def test_a_logit_that_is_infinite_is_named():
    model = make_model("phi", seed=0).eval()
    with torch.no_grad():
        model.lm_head.bias[7] = float("inf")
    with pytest.raises(ValueError, match="the student's logits are not finite"):
        complete(model, baseline_jobs(prompts()[:1], GREEDY), GREEDY)


def test_the_students_own_suppressed_tokens_stay_suppressed():
    model = student("qwen3")
    before = baseline_of(model, GREEDY)
    model.generation_config.suppress_tokens = [before[0][0]]
    assert before[0][0] not in {id for ids in baseline_of(model, GREEDY) for id in ids}


def test_the_longest_come_first_and_a_batch_is_no_larger_than_asked():
    sizes = []
    expected = (1, 9, 4, 9, 2, 7, 3)
    jobs = [Job("a", problem, (5,) * 3, (), frozenset(), length) for problem, length in enumerate(expected)]
    for batch in decode(student("qwen3"), jobs, GREEDY, pad_id=PAD, eos_ids=[EOS]):
        sizes.append([job.expected for job, _ in batch])
    assert sizes == [[9, 9, 7, 4, 3], [2, 1]]
