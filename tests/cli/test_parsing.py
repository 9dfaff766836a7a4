"""Files of options: YAML that is read, YAML that is a one-line error, and the recipes of examples/."""

import os

import pytest

from trl_opd.cli.models import make_parser
from trl_opd.cli.parsing import parse

from tests.helpers.paths import ROOT

RECIPES = ROOT / "examples" / "recipes"


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("a: [", "is not YAML"), ("- a", "mapping")])
def test_wrong_config_file_is_a_one_line_error(tmp_path, error_of, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    assert message in error_of("train", "--config", path)


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 9)}]\n" for before, one in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{one}: &{one} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, one in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "with its anchors expanded it has more than 16384 values"),
        (MERGES, "with its anchors expanded it has more than 16384 values"),
        ("output_dir: &a [*a]", "with its anchors expanded it has more than"),
        ("output_dir: " + "[" * 500, "nested too deeply"),
        ("a: '" + "x" * 70_000 + "'", "it has more than 65536 bytes"),
        ("seed: !!python/object/apply:os.system ['touch ran']", "is not YAML: could not determine a constructor"),
        ("learning_rate: !!float ''", "is not YAML"),
        ("bf16: !!bool perhaps", "is not YAML: 'perhaps'"),
        ("1: 2", "1 is not the name of an option"),
        ("self: 2", "'self' is not the name of an option"),
        ("env: [A]", "env must be a mapping of names to values"),
        ("learning_rate: [1]", "learning_rate is [1], and must be float"),
        ("max_steps: 1.5", "max_steps is 1.5, and must be int"),
        ("output_dir: {a: 1}", "output_dir is {'a': 1}, and must be str"),
        ("output_dir: true", "output_dir is True, and must be str"),
        ("lora_target_modules: {a: 1}", "lora_target_modules is {'a': 1}, and must be list"),
        ("generation_kwargs: greedy", "generation_kwargs takes a dictionary such as {'do_sample': False}"),
    ],
)
def test_invalid_recipe_is_a_one_line_error(tmp_path, monkeypatch, error_of, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(content)
    assert message in error_of("train", "--config", "recipe.yaml", "--use_cpu", "--bf16", "false")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_anchors_merges_and_numbers_of_a_recipe_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEST", "before")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("env: {OPD_TEST: 3}\noutput_dir: &name 2026\nrun_name: *name\nlearning_rate: 1\nlora_r: 4\n")
    on_this_machine = ["--use_cpu", "--bf16", "false", "--lora_r", "8"]
    _, training_args, model_args, _ = parse(make_parser(), ["--config", str(recipe), *on_this_machine])
    assert (training_args.output_dir, training_args.run_name, training_args.learning_rate) == ("2026", "2026", 1)
    assert model_args.lora_r == 8, "a flag comes before the file"
    assert os.environ["OPD_TEST"] == "3"
    recipe.write_text("no_such_option: 1")
    with pytest.raises(SystemExit):
        parse(make_parser(), ["--config", str(recipe), *on_this_machine])


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("resume_from_checkpoint: false", "resume_from_checkpoint", False),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("max_steps: 100.0", "max_steps", 100),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("run_name: 2026-11-24", "run_name", "2026-11-24"),
        ("run_name: 7", "run_name", "7"),
    ],
)
def test_value_of_a_file_gets_the_type_of_its_option(tmp_path, line, name, value):
    (tmp_path / "recipe.yaml").write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\n{line}\n")
    _, config, *_ = parse(make_parser(), ["--config", str(tmp_path / "recipe.yaml")])
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "--seed", "7"], "true"),
        (["--resume-from-checkpoint"], "true"),
        (["--resume_from_checkpoint", "checkpoint-3"], "checkpoint-3"),
        (["--resume_from_checkpoint=checkpoint-3"], "checkpoint-3"),
        (["--resume_from_checkpoint=true"], "true"),
        (["--resume_from", "--seed", "7"], "true"),  # argparse takes a unique beginning
    ],
)
def test_resume_flag_may_have_no_value(tmp_path, words, value):
    given = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"]
    for argv in ([*given, *words], [*words, *given]):
        _, config, *_ = parse(make_parser(), argv)
        assert config.resume_from_checkpoint == value
        assert config.output_dir == str(tmp_path)


def test_word_that_yaml_reads_as_a_boolean_is_explained(tmp_path, error_of):
    (tmp_path / "recipe.yaml").write_text("save_strategy: no\n")
    error = error_of("train", "--config", tmp_path / "recipe.yaml")
    assert "YAML reads yes, no, on and off as booleans: put them in quotes" in error


def test_config_may_follow_an_equals_sign(tmp_path, error_of):
    assert "nowhere.yaml" in error_of("train", f"--config={tmp_path / 'nowhere.yaml'}")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses_into_the_options_it_names(recipe, tmp_path):
    on_this_machine = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
    script_args, training_args, model_args, _ = parse(make_parser(), ["--config", str(recipe), *on_this_machine])
    assert training_args.num_generations == 4
    assert script_args.dataset_name
    assert model_args.lora_dropout == 0.0 or not model_args.use_peft
