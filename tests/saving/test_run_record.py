"""The record of a run and the files beside it: correct, complete, without secrets, and never the reason a run fails."""

import json
import math

import pytest
import torch
from peft import LoraConfig

from trl_opd import RockSet, TokenStats
from trl_opd.artefacts.run_files import read_run

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_model, save
from tests.helpers.trainers import Stop, build

SECRET = "hf_" + "abcDEF123" * 4
ROCKS = list(range(60, 100))


def size_of(model, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def test_run_leaves_a_record_of_models_settings_and_log_and_its_statistics_and_rocks(tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS)
    adapter = LoraConfig(r=4, target_modules="all-linear")
    out = tmp_path / "run"
    trainer = build(out, peft_config=adapter, num_generations=2, token_weighting="rock", rock_set=rocks)
    trainer.train()
    record = read_run(out / "opd_run.json")
    assert record["student"]["adapter"] == "LORA of rank 4"
    assert record["student"]["trainable_parameters"] == size_of(trainer.model, trainable=True)
    assert record["student"]["parameters"] == size_of(trainer.model)
    assert record["teacher"]["parameters"] == size_of(make_model())
    assert record["teacher"]["quantization"] is None
    assert record["arguments"]["num_generations"] == 2
    assert record["arguments"]["seed"] == 7
    assert "beta" not in record["arguments"], "arguments at their default are left out"
    assert record["dataset"]["rows"] == 8
    assert record["steps"] == record["max_steps"] == 2
    assert record["rocks"] == ROCKS
    assert record["measure"]["tokenizer"]["fingerprint"].startswith("sha256:")
    assert record["versions"]["torch"] == torch.__version__
    log = [{k: v for k, v in line.items() if not isinstance(v, str)} for line in trainer.state.log_history]
    assert record["log"] == json.loads(json.dumps(log))

    stats = TokenStats.load(out / "token_stats.safetensors")
    assert torch.equal(stats.seen, trainer.token_stats.seen)
    assert torch.equal(stats.kl_sum, trainer.token_stats.kl_sum)
    assert RockSet.load(out) == trainer.rock_set


@pytest.mark.parametrize("placement", ["resident", "parked"])
def test_record_has_the_size_of_a_4_bit_teacher_before_quantisation(tmp_path, placement):
    teacher = save(tmp_path / "teacher", seed=1)
    trainer = build(tmp_path / "run", teacher=teacher, teacher_quantization="4bit", teacher_placement=placement)
    found = trainer.run_record.describe(trainer.state)["teacher"]
    assert found["quantization"] == "4-bit nf4"
    assert found["parameters"] == size_of(make_model(width=64))


def test_record_has_null_for_numbers_that_are_not_finite(tmp_path):
    trainer = build(tmp_path)
    trainer.state.log_history.append({"step": 1, "grad_norm": math.nan, "loss": math.inf, "kl/mean": 0.5})
    trainer.run_record.write(trainer.state)
    written = json.loads((tmp_path / "opd_run.json").read_text())
    assert written["log"] == [{"step": 1, "grad_norm": None, "loss": None, "kl/mean": 0.5}]
    assert read_run(tmp_path / "opd_run.json")["log"] == [{"step": 1, "kl/mean": 0.5}]


@pytest.mark.parametrize("broken", [False, True])
def test_other_or_broken_rock_set_in_the_folder_is_kept_with_a_warning(tmp_path, broken):
    out = tmp_path / "run"
    out.mkdir()
    path = out / "rock_set.json"
    rock_file(path, [5, 6])
    if broken:
        path.write_text("{")
    before = path.read_bytes()
    trainer = build(out, token_weighting="rock", rock_set=rock_file(tmp_path / "rocks.json", ROCKS), max_steps=1)
    with pytest.warns(
        UserWarning, match="not a rock set" if broken else "is not the rock set of this run, and is kept"
    ):
        assert trainer.train().global_step == 1
    assert path.read_bytes() == before


def test_record_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "opd_run.json").mkdir()
    trainer = build(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.warns(UserWarning, match="The record of the run cannot be written"):
        assert trainer.train().global_step == 2


def test_record_contains_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form-0123")
    command = ["train.py", "--hub_token", "my-own-secret", "--key", SECRET, "--x=not-of-the-usual-form-0123"]
    monkeypatch.setattr("sys.argv", command)
    settings = {"do_sample": True, "token": "plain-secret"}
    trainer = build(tmp_path, hub_token="my-own-secret", generation_kwargs=settings)
    trainer.run_record.write(trainer.state)
    text = (tmp_path / "opd_run.json").read_text()
    for secret in (SECRET, "my-own-secret", "not-of-the-usual-form", "plain-secret"):
        assert secret not in text
    written = json.loads(text)
    assert written["command"] == "python train.py --hub_token <TOKEN> --key <TOKEN> --x=<TOKEN>"
    assert written["arguments"]["generation_kwargs"] == {"do_sample": True, "token": "<TOKEN>"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_interrupted_run_leaves_record_and_card_of_its_last_checkpoint_and_a_resumed_one_the_whole_log(tmp_path):
    rocks = rock_file(tmp_path / "rocks.json", ROCKS)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "token_weighting": "rock", "rock_set": rocks}
    out = tmp_path / "run"
    trainer = build(out, **settings)
    trainer.add_callback(Stop(3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    record = read_run(out / "opd_run.json")
    assert record["steps"] == record["log"][-1]["step"] == 2
    assert "40 were chosen" in (out / "README.md").read_text()
    build(out, **settings).train(resume_from_checkpoint=True)
    record = read_run(out / "opd_run.json")
    assert [line["step"] for line in record["log"] if "loss" in line] == [1, 2, 3, 4]
