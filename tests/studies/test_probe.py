"""`trl-opd probe`: arms, effects, labels and roles, resuming from the journal, and one-line errors."""

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_opd import Rock, RockSet
from trl_opd.cli import main
from trl_opd.rocks.rock_set import Controls
from trl_opd.studies.effects import evaluate_arms, make_arms
from trl_opd.studies.knockout import Sampling
from trl_opd.studies.probe import Probe, tokenize
from trl_opd.training.position_weights import load_rock_set

from tests.helpers import reference
from tests.helpers.families import make_family
from tests.helpers.tiny import PROMPTS, make_config, make_tokenizer, save

GREEDY = Sampling(max_new_tokens=10, batch_size=7)


def even(completions, **_):
    """Reward that depends on every letter: 1 if the code points have an even sum."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def raises_on_eggs(prompts, completions, **_):
    if any("eggs" in prompt for prompt in prompts):
        raise KeyError("eggs")
    return [0.0] * len(completions)


ROWS = [{"prompt": prompt, "answer": str(place)} for place, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a student, problems, and a rock set of the types that the student writes most often."""
    folder = tmp_path_factory.mktemp("world")
    save(folder / "student", seed=0, width=32)
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    probe = make_probe(folder, folder)
    counts = torch.bincount(torch.tensor([*chain.from_iterable(probe.baseline)]), minlength=300)
    order = counts.argsort(descending=True, stable=True).tolist()
    RockSet(
        rocks=[Rock(id, None, int(counts[id]), 1.0, float(counts[id])) for id in order[:4]],
        tokenizer={"name": None, "vocab_size": 300, "fingerprint": None},
        measure={"divergence": "reverse_kl", "temperature": 1.0},
        method={"score": "aggregate", "top_k": 4},
        corpus={"tokens": 80, "kl_sum": 80.0},
        controls=Controls(order[4:9], 1.0, True),
    ).save(folder / "rock_set.json")
    return folder


def make_probe(world, folder) -> Probe:
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    return Probe(model, make_tokenizer(), ROWS, even, GREEDY, journal=folder / "journal", settings={})


def arguments(world, tmp_path, *more, decoding=("--greedy",)) -> list[str]:
    given = ["--model_name_or_path", world / "student", "--dataset_name", world / "problems.jsonl", "--use_cpu"]
    given += ["--rock_set", world / "rock_set.json", "--max_completion_length", 10, "--output", tmp_path / "k.json"]
    return ["probe", *map(str, [*given, "--reward", "tests.studies.test_probe.even", *decoding, *more])]


# Results


@pytest.mark.slow
def test_result_equals_that_of_decoding_every_arm_from_scratch(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--candidates", "all")) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "k.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    tokenizer = make_tokenizer()
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)

    def rewards_without(ids) -> list[float]:
        output = model.generate(**inputs, max_new_tokens=10, do_sample=False, suppress_tokens=ids)
        return even(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    base = rewards_without(None)
    assert result["problems"] == len(PROMPTS)
    assert result["baseline"]["reward"] == pytest.approx(sum(base) / len(base))
    assert len(result["arms"]) > 12
    for arm in result["arms"]:
        pairs = list(zip(rewards_without(arm["ids"]), base, strict=True))
        assert arm["effect"] == pytest.approx(sum(x - y for x, y in pairs) / len(base)), arm["arm"]
        assert (arm["better"], arm["worse"]) == (sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))
    assert {arm["kind"] for arm in result["arms"]} == {"rock", "control", "other", "rocks", "controls"}
    effects = [arm["effect"] for arm in result["arms"]]
    assert effects == sorted(effects)
    assert result["decoded_tokens"] < result["naive_tokens"]
    assert result["correlations"]["log_count"]["n"] == len(effects) - 2
    assert result["correlations"]["mean_kl"] is None  # all rocks of this set have the same mean_kl
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert printed.startswith("Rocks (4) against mass-matched controls (5): their effects differ with p = ")
    assert "there are too few problems: 8, and about" in printed
    assert not list(tmp_path.glob(".*journal*"))


def test_every_token_has_a_corrected_and_a_published_label_and_rocks_get_roles(world, tmp_path):
    assert main(arguments(world, tmp_path)) == 0
    result = json.loads((tmp_path / "k.json").read_text())
    labels = {}
    for arm in result["arms"]:
        if len(arm["ids"]) == 1:
            labels[arm["ids"][0]] = (arm["label"], arm["label_as_published"])
            assert all(labels[arm["ids"][0]])
            assert arm["p_holm"] >= arm["p_bh"] >= arm["p"]
    assert len(labels) == 9
    roles = RockSet.load(tmp_path / "k_roles.json").rocks
    assert [(rock.role, rock.role_uncorrected) for rock in roles] == [labels[rock.id] for rock in roles]
    assert RockSet.load(world / "rock_set.json").rocks[0].role is None


def test_label_is_that_of_the_corrected_p():
    arms = {f"token {id}": ("other", frozenset([id])) for id in range(40)}
    rewards = dict.fromkeys(["baseline", *arms], [1.0] * 100)
    rewards["token 0"] = [0.0] * 6 + [1.0] * 94  # p = 0.03 without correction
    found = evaluate_arms(arms, rewards, {}, seed=0)
    first = found["arms"][0]
    assert (first["arm"], first["p"]) == ("token 0", 0.03125)
    assert first["p_bh"] == first["p_holm"] == 1.0
    assert (first["label"], first["label_as_published"]) == ("neutral", "pillar")
    alone = evaluate_arms({"token 0": arms["token 0"]}, rewards, {}, seed=0)["arms"][0]
    assert (alone["p_bh"], alone["label"]) == (0.03125, "pillar")
    assert found["discordance"] == pytest.approx(0.06 / 40)


def test_pillars_can_be_excluded_from_freezing(world, tmp_path):
    given = {"token_weighting": "rock", "rock_exclude_pillars": True}
    with pytest.raises(ValueError, match="needs the roles of a probe"):
        load_rock_set(make_config(tmp_path, **given, rock_set=str(world / "rock_set.json")))
    content = json.loads((world / "rock_set.json").read_text())
    for rock, role in zip(content["rocks"], ("pillar", "neutral", "stumbling", "pillar"), strict=True):
        rock["role"] = role
    (tmp_path / "roles.json").write_text(json.dumps(content))
    found = load_rock_set(make_config(tmp_path, **given, rock_set=str(tmp_path / "roles.json")))
    assert found.ids.tolist() == [rock["id"] for rock in content["rocks"][1:3]]


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [["--greedy"], ["--temperature", "0.7", "--seed", "4"]])
def test_interrupted_probe_resumes_with_the_same_result(world, tmp_path, monkeypatch, capsys, decoding):
    given = arguments(world, tmp_path, "--batch_size", 5, decoding=decoding)
    assert main(given) == 0
    whole = (tmp_path / "k.json").read_bytes()
    (tmp_path / "k.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Probe, "_reward_all", interrupt)
        assert main(given) == 130
    journal = next(tmp_path.glob(".*journal*"))
    lines = journal.read_text().splitlines(keepends=True)
    kept = "".join(lines[: len(lines) // 2]) + '["token 5", 0, [1, '  # interrupted while a line was written

    fewer = tmp_path / "fewer.json"  # a file whose name is in the journal, with other rocks
    content = json.loads((world / "rock_set.json").read_text())
    content["rocks"].pop()
    fewer.write_text(json.dumps(content))
    for more, text in (
        (["--rock_set", str(fewer)], kept.replace(str(world / "rock_set.json"), str(fewer))),
        (["--seed", "9"], kept),
    ):
        journal.write_text(text)
        assert main([*given, *more]) == 1
        assert "belongs to an interrupted probe with other settings" in capsys.readouterr().err
    assert main(given) == 0
    assert (tmp_path / "k.json").read_bytes() == whole


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_share_of_completions_that_depend_on_the_batch_is_measured_in_half_precision(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--dtype", "bfloat16")) == 0
    share = json.loads((tmp_path / "k.json").read_text())["unstable_share"]
    assert 0.0 <= share <= 1.0
    assert f"In this precision {share:.0%} of up to 64 completions change" in capsys.readouterr().out
    probe = make_probe(world, tmp_path)
    assert probe.unstable_share() == 0.0  # float32
    probe.baseline[3] = [1]
    assert probe.unstable_share() == 1 / len(PROMPTS)


@torch.no_grad()
def test_entropy_of_a_token_is_that_of_the_distributions_that_chose_it(world, tmp_path):
    probe = make_probe(world, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(world / "student").double().eval()
    entropies = {}
    for prompt, completion in zip(PROMPTS, probe.baseline, strict=True):
        ids = make_tokenizer()(prompt).input_ids
        for id in completion:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            entropies.setdefault(id, []).append(reference.entropy(logits).item())
            ids.append(id)
    assert probe.entropies() == pytest.approx({id: np.mean(values) for id, values in entropies.items()}, rel=1e-4)


def test_arms_forbid_single_tokens_and_all_rocks_or_controls_together():
    assert make_arms([1, 2], [3, 4], [1, 2, 3, 4, 5]) == {
        "token 1": ("rock", {1}),
        "token 2": ("rock", {2}),
        "token 3": ("control", {3}),
        "token 4": ("control", {4}),
        "token 5": ("other", {5}),
        "rocks": ("rocks", {1, 2}),
        "controls": ("controls", {3, 4}),
    }


def test_prompts_are_tokenized_as_in_trl():
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "How many eggs?"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(tokenize(chat, tokenizer)) == expected
    assert list(tokenize("How many eggs?", tokenizer)) == tokenizer("How many eggs?").input_ids


# Wrong input


def require_error(given: list[str], message: str, tmp_path, capsys) -> None:
    assert main(given) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd probe: error: ")
    assert message in error
    assert not (tmp_path / "k.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--reward tests.studies.test_probe.raises_on_eggs", "raised KeyError for problem 1: 'eggs'"),
        ("--reward nothing", "There is no reward 'nothing': take exact_match, last_number, math_verify"),
        ("--reward tests.studies.test_probe.nowhere", "cannot be imported"),
        ("--reward tests.studies.test_probe.PROMPTS", "is not a function"),
        ("--candidates some", "--candidates must be rocks or all"),
        ("--top_n 0", "--top_n must be a whole number of at least 1"),
        ("--temperature 0", "--temperature must be above 0"),
        ("--top_p 1.5", "--top_p must lie in (0, 1]"),
        ("--effect 0", "--effect must lie in (0, 1]"),
        ("--dtype int8", "--dtype must be float32, bfloat16 or float16"),
        ("--output /nowhere/k.json", "There is no folder /nowhere"),
        ("--rock_set /nowhere.json", "/nowhere.json"),
        ("--model_name_or_path /nowhere", "There is no student in /nowhere"),
        ("--num_prompts 9", "--num_prompts 9 is more than the 8 rows"),
        ("--num_prompts 0", "--num_prompts must be a whole number of at least 1"),
        ("--max_completion_length 1000", "more than the 256 positions of the models"),
    ],
)
def test_invalid_value_is_a_one_line_error(more, message, world, tmp_path, capsys):
    require_error(arguments(world, tmp_path, *more.split()), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("row", "more", "message"),
    [
        ({"prompt": "So 1"}, ["--reward", "exact_match"], "The problems have no column 'answer' (they have prompt)"),
        ({"prompt": "", "answer": "1"}, [], "row 0 of the dataset of problems is empty"),
        ({"prompt": 5, "answer": "1"}, [], "is neither a text nor a list"),
    ],
)
def test_invalid_problem_is_a_one_line_error(row, more, message, world, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(row) + "\n")
    require_error(arguments(world, tmp_path, "--dataset_name", path, *more), message, tmp_path, capsys)


def test_candidates_that_no_completion_contains_are_a_one_line_error(world, tmp_path, capsys):
    content = json.loads((world / "rock_set.json").read_text())
    absent = min(set(range(3, 300)).difference(*make_probe(world, tmp_path).baseline))
    content["rocks"] = [{**content["rocks"][0], "id": absent}]
    content["controls"] = None
    path = tmp_path / "rock_set.json"
    path.write_text(json.dumps(content))
    message = "None of the candidates occurs in the baseline's completions"
    require_error(arguments(world, tmp_path, "--rock_set", path), message, tmp_path, capsys)


def test_missing_model_is_bad_usage():
    with pytest.raises(SystemExit) as caught:
        main(["probe", "--dataset_name", "d"])
    assert caught.value.code == 2


def test_student_that_padding_changes_is_decoded_one_prompt_at_a_time(tmp_path):
    baselines = []
    for batch_size in (1, 8):
        sampling = replace(GREEDY, batch_size=batch_size)
        journal = tmp_path / f"journal-{batch_size}"
        student = make_family("rwkv").eval()
        probe = Probe(student, make_tokenizer(), ROWS, even, sampling, journal=journal, settings={})
        baselines.append(probe.baseline)
    assert baselines[0] == baselines[1]
