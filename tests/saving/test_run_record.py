"""opd_run.json and what else a run leaves: true, complete, without secrets, and never in the way of the student."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig

from trl_opd import OPDTrainer, RockSet, TokenStats
from trl_opd.artefacts.run_files import read_run

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_config, make_dataset, make_model

SECRET = "hf_" + "abcDEF123" * 4
LORA = LoraConfig(r=4, target_modules="all-linear")


def build(tokenizer, path, *, peft_config=None, **changes) -> OPDTrainer:
    return OPDTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(path, **changes),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def test_the_record_tells_models_settings_and_log(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path, peft_config=LORA, num_generations=2)
    trainer.train()
    record = read_run(tmp_path / "opd_run.json")
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert record["student"]["adapter"] == "LORA of rank 4"
    assert record["student"]["trainable_parameters"] == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )
    assert record["student"]["parameters"] == whole
    assert record["teacher"]["parameters"] == sum(p.numel() for p in make_model().parameters())
    assert record["teacher"]["quantization"] is None
    assert record["arguments"]["num_generations"] == 2
    assert record["arguments"]["seed"] == 7
    assert "beta" not in record["arguments"], "an argument at its default is not told"
    assert record["dataset"]["rows"] == 8
    assert (record["steps"], record["max_steps"]) == (2, 2)
    assert record["measure"]["tokenizer"]["fingerprint"].startswith("sha256:")
    assert record["versions"]["torch"] == torch.__version__
    kept = [{k: v for k, v in line.items() if not isinstance(v, str)} for line in trainer.state.log_history]
    assert record["log"] == json.loads(json.dumps(kept))


@pytest.mark.parametrize("placement", ["resident", "parked"])
def test_a_teacher_in_four_bits_is_told_with_its_whole_size(tokenizer, tmp_path, placement):
    make_model(seed=1, width=64).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    trainer = OPDTrainer(
        model=make_model(seed=0),
        args=make_config(
            tmp_path / "run",
            teacher_model_name_or_path=str(tmp_path / "teacher"),
            teacher_quantization="4bit",
            teacher_placement=placement,
        ),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
    )
    teacher = trainer.run_record.describe(trainer.state)["teacher"]
    assert teacher["quantization"] == "4-bit nf4"
    assert teacher["parameters"] == sum(p.numel() for p in make_model(width=64).parameters())


def test_a_figure_that_is_not_finite_is_null_in_the_record(tokenizer, tmp_path):
    trainer = build(tokenizer, tmp_path)
    trainer.state.log_history.append({"step": 1, "grad_norm": float("nan"), "loss": float("inf"), "kl/mean": 0.5})
    trainer.run_record.write(trainer.state)
    assert json.loads((tmp_path / "opd_run.json").read_text())["log"] == [
        {"step": 1, "grad_norm": None, "loss": None, "kl/mean": 0.5}
    ]
    assert read_run(tmp_path / "opd_run.json")["log"] == [{"step": 1, "kl/mean": 0.5}]


def test_statistics_and_rocks_of_the_run_lie_beside_the_student(tokenizer, tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", list(range(60, 100)))
    trainer = build(tokenizer, tmp_path / "run", token_weighting="rock", rock_set=rocks)
    trainer.train()
    stats = TokenStats.load(tmp_path / "run" / "token_stats.safetensors")
    assert torch.equal(stats.seen, trainer.token_stats.seen)
    assert torch.equal(stats.kl_sum, trainer.token_stats.kl_sum)
    assert RockSet.load(tmp_path / "run") == trainer.rock_set


def test_the_card_of_a_checkpoint_knows_the_rocks(tokenizer, tmp_path):
    from tests.helpers.trainers import Stop

    rocks = rock_file(tmp_path / "rocks.json", list(range(60, 100)))
    changes = {"token_weighting": "rock", "rock_set": rocks, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = build(tokenizer, tmp_path / "run", **changes)
    trainer.add_callback(Stop(2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "40 were chosen" in (tmp_path / "run" / "README.md").read_text()


def test_another_rock_set_in_the_folder_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    rock_file(tmp_path / "run" / "rock_set.json", [5, 6])
    rocks = rock_file(tmp_path / "rocks.json", list(range(60, 100)))
    trainer = build(tokenizer, tmp_path / "run", token_weighting="rock", rock_set=rocks)
    with pytest.warns(UserWarning, match="is another rock set than this run's, and is left as it is"):
        trainer.train()
    assert [rock.id for rock in RockSet.load(tmp_path / "run").rocks] == [5, 6]


def test_a_broken_rock_set_in_the_folder_does_not_cost_the_run(tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rock_set.json").write_text("{")
    rocks = rock_file(tmp_path / "rocks.json", list(range(60, 100)))
    trainer = build(tokenizer, tmp_path / "run", token_weighting="rock", rock_set=rocks)
    with pytest.warns(UserWarning, match="not a rock set"):
        assert trainer.train().global_step == 2
    assert (tmp_path / "run" / "rock_set.json").read_text() == "{"


def test_a_record_that_cannot_be_written_does_not_cost_the_run(tokenizer, tmp_path):
    (tmp_path / "opd_run.json").mkdir()
    trainer = build(tokenizer, tmp_path, save_strategy="steps", save_steps=1)
    with pytest.warns(UserWarning, match="The record of the run cannot be written"):
        assert trainer.train().global_step == 2


def test_no_secret_is_in_the_record(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form-0123")
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--hub_token", "my-own-secret", "--key", SECRET, "--x=not-of-the-usual-form-0123"]
    )
    trainer = build(
        tokenizer, tmp_path, hub_token="my-own-secret", generation_kwargs={"do_sample": True, "token": "plain-secret"}
    )
    trainer.train()
    text = (tmp_path / "opd_run.json").read_text()
    for secret in (SECRET, "my-own-secret", "not-of-the-usual-form", "plain-secret"):
        assert secret not in text
    assert "<TOKEN>" in json.loads(text)["command"]
    assert json.loads(text)["arguments"]["generation_kwargs"] == {"do_sample": True, "token": "<TOKEN>"}


@pytest.mark.slow
def test_the_record_of_a_run_that_broke_off_is_that_of_its_last_checkpoint(tokenizer, tmp_path):
    from tests.helpers.trainers import Stop

    trainer = build(tokenizer, tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    trainer.add_callback(Stop(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    record = read_run(tmp_path / "opd_run.json")
    assert (record["steps"], record["log"][-1]["step"]) == (4, 4)
    resumed = build(tokenizer, tmp_path, save_strategy="steps", save_steps=2, max_steps=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.train(resume_from_checkpoint=True)
    record = read_run(tmp_path / "opd_run.json")
    assert [line["step"] for line in record["log"] if "loss" in line] == [1, 2, 3, 4, 5, 6]
