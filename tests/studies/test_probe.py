"""`trl-opd probe`: arms, rewards, roles and a journal to resume from, and one-line errors."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_opd import OPDConfig, Rock, RockSet
from trl_opd.cli import main
from trl_opd.cli import probe as command
from trl_opd.rocks.rock_set import Controls
from trl_opd.studies.effects import evaluate_arms, make_arms
from trl_opd.studies.knockout import Sampling
from trl_opd.studies.probe import Probe, tokenize
from trl_opd.training.position_weights import load_rock_set

from tests.helpers.tiny import PROMPTS, config_kwargs, make_tokenizer, save

GREEDY = Sampling(max_new_tokens=10, batch_size=7)


def even(completions, answer, **_):
    """A reward that looks at every letter: 1 for a text of an even sum."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def raises_on_two(prompts, completions, **_):
    if any("eggs" in prompt for prompt in prompts):
        raise KeyError("eggs")
    return [0.0] * len(completions)


def too_few(completions, **_):
    return [1.0]


def not_a_number(completions, **_):
    return [float("nan")] * len(completions)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student, problems, and a rock set of the types that it writes most."""
    folder = tmp_path_factory.mktemp("world")
    save(folder / "student", seed=0, width=32)
    rows = [{"prompt": prompt, "answer": str(place)} for place, prompt in enumerate(PROMPTS)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = make_probe(folder, folder / "journal", even)
    counts = torch.bincount(torch.tensor([id for ids in probe.baseline for id in ids]), minlength=300)
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


def make_probe(world, journal, reward, sampling=GREEDY, settings=None) -> Probe:
    rows = [{"prompt": prompt, "answer": str(place)} for place, prompt in enumerate(PROMPTS)]
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    return Probe(model, make_tokenizer(), rows, reward, sampling, journal=journal, settings=settings or {})


def arguments(world, tmp_path, *more) -> list[str]:
    given = ["--model_name_or_path", world / "student", "--dataset_name", world / "problems.jsonl", "--use_cpu"]
    given += ["--rock_set", world / "rock_set.json", "--max_completion_length", 10, "--greedy"]
    given += ["--output", tmp_path / "k.json", "--reward", "tests.studies.test_probe.even"]
    return ["probe", *map(str, [*given, *more])]


# What it writes


@pytest.mark.slow
def test_the_result_is_that_of_decoding_every_arm_from_scratch(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--candidates", "all")) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "k.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    tokenizer = make_tokenizer()

    def reward_of(forbidden) -> list[float]:
        texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt).input_ids])
            suppressed = {"suppress_tokens": list(forbidden)} if forbidden else {}
            with torch.no_grad():
                found = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, **suppressed
                )
            texts.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        return even(texts, None)

    base = reward_of(())
    assert result["problems"] == len(PROMPTS)
    assert result["baseline"]["reward"] == pytest.approx(sum(base) / len(base))
    assert len(result["arms"]) > 12
    for arm in result["arms"]:
        own = reward_of(arm["ids"])
        assert arm["effect"] == pytest.approx((sum(own) - sum(base)) / len(base)), arm["arm"]
        pairs = list(zip(own, base, strict=True))
        assert (arm["better"], arm["worse"]) == (sum(x > y for x, y in pairs), sum(x < y for x, y in pairs))
    assert {arm["kind"] for arm in result["arms"]} == {"rock", "control", "other", "rocks", "controls"}
    effects = [arm["effect"] for arm in result["arms"]]
    assert effects == sorted(effects)
    assert result["decoded_tokens"] < result["naive_tokens"]
    single = [arm for arm in result["arms"] if len(arm["ids"]) == 1]
    assert result["correlations"]["log_count"]["n"] == len(single)
    assert result["correlations"]["mean_kl"] is None  # all rocks of this set have one
    assert (tmp_path / "k.png").read_bytes().startswith(b"\x89PNG")
    assert printed.startswith("Rocks (4) against mass-matched controls (5): their effects differ with p = ")
    assert "there are too few problems: 8, and about" in printed
    assert not list(tmp_path.glob(".*journal*"))


def test_every_label_stands_beside_the_uncorrected_one_and_roles_are_written(world, tmp_path):
    assert main(arguments(world, tmp_path)) == 0
    result = json.loads((tmp_path / "k.json").read_text())
    single = [arm for arm in result["arms"] if len(arm["ids"]) == 1]
    assert len(single) == 9
    assert all(
        arm["label"] and arm["label_as_published"] and arm["p_holm"] >= arm["p_bh"] >= arm["p"] for arm in single
    )
    roles = RockSet.load(tmp_path / "k_roles.json")
    labels = {arm["ids"][0]: (arm["label"], arm["label_as_published"]) for arm in single}
    assert [(rock.role, rock.role_uncorrected) for rock in roles.rocks] == [labels[rock.id] for rock in roles.rocks]
    assert RockSet.load(world / "rock_set.json").rocks[0].role is None


def test_a_label_is_that_of_the_corrected_p():
    baseline = [1.0] * 100
    worse = [0.0] * 6 + [1.0] * 94  # p = 0.03 alone
    arms = {f"token {id}": ("other", frozenset([id])) for id in range(40)}
    rewards = {"baseline": baseline, "token 0": worse} | {f"token {id}": baseline for id in range(1, 40)}
    found = evaluate_arms(arms, rewards, {}, seed=0)
    first = found["arms"][0]
    assert (first["arm"], first["p"]) == ("token 0", 0.03125)
    assert first["p_bh"] == first["p_holm"] == 1.0
    assert (first["label"], first["label_as_published"]) == ("neutral", "pillar")
    alone = evaluate_arms({"token 0": arms["token 0"]}, rewards, {}, seed=0)["arms"][0]
    assert (alone["p_bh"], alone["label"]) == (0.03125, "pillar")
    assert found["discordance"] == pytest.approx(0.06 / 40)


def test_pillars_may_be_left_alone_in_training(world, tmp_path):
    rock_set = RockSet.load(world / "rock_set.json")
    given = {"rock_set": str(world / "rock_set.json"), "token_weighting": "rock", "rock_exclude_pillars": True}
    with pytest.raises(ValueError, match="needs the roles of a probe"):
        load_rock_set(OPDConfig(**config_kwargs(tmp_path, **given)))
    roles = ("pillar", "neutral", "stumbling", "pillar")
    rocks = [dataclasses.replace(rock, role=role) for rock, role in zip(rock_set.rocks, roles, strict=True)]
    dataclasses.replace(rock_set, rocks=rocks).save(tmp_path / "roles.json")
    given["rock_set"] = str(tmp_path / "roles.json")
    found = load_rock_set(OPDConfig(**config_kwargs(tmp_path, **given)))
    assert [rock.id for rock in found.rocks] == [rock_set.rocks[1].id, rock_set.rocks[2].id]


@pytest.mark.parametrize("more", [[], ["--temperature", "0.7", "--seed", "4"]])
def test_an_interrupted_probe_goes_on_and_ends_alike(world, tmp_path, monkeypatch, capsys, more):
    run = [word for word in arguments(world, tmp_path, "--batch_size", 5) if word != "--greedy" or not more] + more
    assert main(run) == 0
    whole = json.loads((tmp_path / "k.json").read_text())
    (tmp_path / "k.json").unlink()
    original, batches = Probe._reward_all, []

    def break_off(self, completions):
        batches.append(1)
        if len(batches) == 1:
            raise KeyboardInterrupt
        return original(self, completions)

    monkeypatch.setattr(Probe, "_reward_all", break_off)
    assert main(run) == 130
    journal = next(tmp_path.glob(".*journal*"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]) + '["token 5", 0, [1, ')  # cut while a line was written
    content = json.loads((world / "rock_set.json").read_text())
    content["rocks"] = content["rocks"][:3]
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    kept = journal.read_text()
    given = [str(tmp_path / "fewer.json") if word == str(world / "rock_set.json") else word for word in run]
    journal.write_text(
        kept.replace(str(world / "rock_set.json"), str(tmp_path / "fewer.json"))
    )  # another file's content
    assert main(given) == 1
    assert "belongs to an interrupted probe with other settings" in capsys.readouterr().err
    journal.write_text(kept)
    assert main([*run, "--seed", "9"] if not more else [*run[:-1], "9"]) == 1
    assert "belongs to an interrupted probe with other settings" in capsys.readouterr().err
    assert main(run) == 0
    assert json.loads((tmp_path / "k.json").read_text()) == whole


def test_in_half_precision_the_share_that_a_batch_changes_is_told(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--dtype", "bfloat16")) == 0
    share = json.loads((tmp_path / "k.json").read_text())["unstable_share"]
    assert 0.0 <= share <= 1.0
    assert f"In this precision {share:.0%} of up to 64 completions change" in capsys.readouterr().out
    probe = make_probe(world, tmp_path / "journal", even)
    assert probe.unstable_share() == 0.0  # float32
    probe.baseline[3] = [1]
    assert probe.unstable_share() == 1 / len(PROMPTS)


def test_the_entropy_of_a_token_is_that_of_the_distributions_that_chose_it(world, tmp_path):
    probe = make_probe(world, tmp_path / "journal", even)
    model, expected = AutoModelForCausalLM.from_pretrained(world / "student").double().eval(), {}
    for prompt, completion in zip(PROMPTS, probe.baseline, strict=True):
        prefix = make_tokenizer()(prompt).input_ids
        for id in completion:
            with torch.no_grad():
                p = model(input_ids=torch.tensor([prefix])).logits[0, -1].softmax(-1)
            expected.setdefault(id, []).append(-(p * p.log()).sum().item())
            prefix = [*prefix, id]
    assert probe.entropies() == pytest.approx({id: sum(v) / len(v) for id, v in expected.items()}, rel=1e-4)


def test_arms_are_single_tokens_and_all_together():
    found = make_arms([1, 2], [3, 4], [1, 2, 3, 4, 5])
    assert [(arm, kind) for arm, (kind, _) in found.items()] == [
        ("token 1", "rock"),
        ("token 2", "rock"),
        ("token 3", "control"),
        ("token 4", "control"),
        ("token 5", "other"),
        ("rocks", "rocks"),
        ("controls", "controls"),
    ]
    assert found["rocks"][1] == {1, 2}


def test_prompts_are_tokenised_as_trl_does():
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "How many eggs?"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(tokenize(chat, tokenizer)) == expected
    assert list(tokenize("How many eggs?", tokenizer)) == tokenizer("How many eggs?").input_ids


# What cannot be


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reward", "tests.studies.test_probe.raises_on_two"], "The reward raised for problem 1: KeyError: 'eggs'"),
        (["--reward", "tests.studies.test_probe.too_few"], "The reward returned 1 numbers for 8 completions"),
        (["--reward", "tests.studies.test_probe.not_a_number"], "The reward of problem 0 is nan, not a finite number"),
        (["--reward", "nothing"], "There is no reward 'nothing': take exact_match, last_number, math_verify"),
        (["--reward", "tests.studies.test_probe.nowhere"], "cannot be imported"),
        (["--reward", "tests.studies.test_probe.PROMPTS"], "is not a function"),
        (["--candidates", "some"], "--candidates must be rocks or all"),
        (["--top_n", "0"], "--top_n must be a whole number of at least 1"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--top_p", "1.5"], "--top_p must lie in (0, 1]"),
        (["--effect", "0"], "--effect must lie in (0, 1]"),
        (["--dtype", "int8"], "--dtype must be float32, bfloat16 or float16"),
        (["--output", "/nowhere/k.json"], "There is no folder /nowhere"),
        (["--rock_set", "/nowhere.json"], "/nowhere.json"),
        (["--model_name_or_path", "/nowhere"], "There is no student in /nowhere"),
        (["--num_prompts", "9"], "--num_prompts 9 is more than the 8 rows"),
        (["--num_prompts", "0"], "--num_prompts must be a whole number of at least 1"),
        (["--max_completion_length", "1000"], "more than the 256 positions of the models"),
    ],
)
def test_a_value_that_cannot_be_is_a_sentence(more, message, world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, *more)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd probe: error: ")
    assert message in error
    assert not (tmp_path / "k.json").exists()


def test_problems_without_answers_and_candidates_that_nobody_wrote_are_sentences(world, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "So 1"}) + "\n")
    given = arguments(world, tmp_path, "--dataset_name", tmp_path / "p.jsonl")
    assert main([*given, "--reward", "exact_match"]) == 1
    assert "The problems have no column 'answer' (they have prompt)" in capsys.readouterr().err
    for prompt, message in (("", "row 0 of the dataset of problems is empty"), (5, "is neither a text nor a list")):
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "1"}) + "\n")
        assert main(given) == 1
        assert message in capsys.readouterr().err
    content = json.loads((world / "rock_set.json").read_text())
    chosen = {id for ids in make_probe(world, tmp_path / "journal", even).baseline for id in ids}
    absent = next(id for id in range(3, 300) if id not in chosen)
    content["rocks"], content["controls"] = [{**content["rocks"][0], "id": absent}], None
    (tmp_path / "r.json").write_text(json.dumps(content))
    assert main(arguments(world, tmp_path, "--rock_set", tmp_path / "r.json")) == 1
    assert "None of the candidates occurs in the baseline's completions" in capsys.readouterr().err


def test_bad_usage_and_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["probe", "--dataset_name", "d"])
    assert caught.value.code == 2
    for option in dataclasses.fields(command.ProbeArguments):
        required = option.name in ("model_name_or_path", "dataset_name")
        default = "required" if required else option.default
        default = "none" if default is None else "false" if default is False else default
        row = next(line for line in command.HELP.splitlines() if line.startswith(f"  --{option.name} "))
        assert f" {default} " in f"{row} ", option.name
