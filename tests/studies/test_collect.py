"""`trl-opd collect`: rows equal to the slow twin's, a reference student, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.artefacts.occurrences import Occurrences
from trl_opd.cli import main
from trl_opd.studies.collect import Collector

from tests.helpers import reference
from tests.helpers.paths import SHARED_DATA
from tests.helpers.tiny import PROMPTS, make_model, make_tokenizer, save

GSM8K = SHARED_DATA / "gsm8k" / "test.jsonl"
CPU = ["--use_cpu", "--bf16", "false", "--max_completion_length", "10", "--report_to", "none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a student, a teacher of other width, the student before, and prompts."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("student", 0), ("teacher", 1), ("before", 2)):
        save(folder / name, seed=seed, width=64 if name == "teacher" else 32)
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def arguments(world, output, *more, student="student") -> list[str]:
    models = ["--model_name_or_path", str(world / student), "--teacher_model_name_or_path", str(world / "teacher")]
    data = ["--dataset_name", str(world / "prompts.jsonl"), "--output_dir", str(output)]
    return ["collect", *models, *data, *CPU, *map(str, more)]


def collect(world, output, *more, **changes) -> tuple[dict, dict]:
    """Run the command and return the columns of its rows and of its prompts."""
    assert main(arguments(world, output, *more, **changes)) == 0
    return read(output)


def read(output) -> tuple[dict, dict]:
    return tuple(pq.read_table(output / name).to_pydict() for name in ("occurrences.parquet", "prompts.parquet"))


def divergences(student, teacher, rows: dict, prompts: dict, *, per_prompt: int, temperature=1.0) -> list[float]:
    """Return the divergence of every row by the slow twin, in float64, each rollout alone."""
    found = []
    for rollout in sorted(set(rows["rollout"])):
        completion = [id for id, row in zip(rows["token_id"], rows["rollout"], strict=True) if row == rollout]
        prompt = prompts["token_ids"][rollout // per_prompt]
        inputs = {
            f"{name}_{kind}": torch.tensor([ids if kind == "ids" else [1] * len(ids)])
            for name, ids in (("prompt", prompt), ("completion", completion))
            for kind in ("ids", "mask")
        }
        with torch.no_grad():
            values = reference.token_divergences(student, teacher, inputs, beta=1.0, temperature=temperature, vocab=300)
        found += [value.item() for value in values[0]]
    return found


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).double().eval()


# What the rows say


def test_rows_are_those_of_the_slow_twin_before_and_after(world, tmp_path, capsys):
    more = ["--num_generations", 2, "--num_prompts", 6, "--reference_model_name_or_path", world / "before"]
    rows, prompts = collect(world, tmp_path / "o", *more)
    printed = capsys.readouterr().out
    assert prompts["row"] == prompts["prompt"] == list(range(6))
    tokenizer = make_tokenizer()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:6]]
    assert prompts["token_ids"] == [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats
    ]
    assert sorted(set(rows["rollout"])) == list(range(12))
    assert rows["prompt"] == [rollout // 2 for rollout in rows["rollout"]]
    for rollout in range(12):
        places = [place for place, row in zip(rows["position"], rows["rollout"], strict=True) if row == rollout]
        assert places == list(range(len(places)))
    for name, student in (("kl", "student"), ("kl_pre", "before")):
        expected = divergences(load(world / student), load(world / "teacher"), rows, prompts, per_prompt=2)
        np.testing.assert_allclose(rows[name], expected, rtol=2e-4, atol=1e-5)
    mean = np.mean(np.array(rows["kl"], dtype=float))
    assert f"Collected 12 rollouts of 6 prompts, {len(rows['kl'])} tokens; mean divergence {mean:.4f} nats" in printed


def test_sampled_rollouts_of_a_prompt_differ_and_greedy_ones_are_generate(world, tmp_path):
    rows, _ = collect(world, tmp_path / "sampled", "--num_generations", 4, "--num_prompts", 2)
    texts = {tuple(id for id, row in zip(rows["token_id"], rows["rollout"], strict=True) if row == k) for k in range(4)}
    assert len(texts) > 1
    other, _ = collect(world, tmp_path / "other", "--num_generations", 4, "--num_prompts", 2, "--seed", 7)
    assert other["token_id"] != rows["token_id"]
    rows, prompts = collect(world, tmp_path / "greedy", "--greedy", "--num_prompts", 3)
    student = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    for rollout, prompt in enumerate(prompts["token_ids"]):
        ids = torch.tensor([prompt])
        found = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        own = [id for id, row in zip(rows["token_id"], rows["rollout"], strict=True) if row == rollout]
        assert own == found[0, len(prompt) :].tolist()


def test_the_metadata_tells_models_tokenizer_and_numbers(world, tmp_path):
    rows, prompts = collect(world, tmp_path / "o", "--num_prompts", 3, "--temperature", "0.7", "--seed", 5)
    expected = divergences(
        load(world / "student"), load(world / "teacher"), rows, prompts, per_prompt=1, temperature=0.7
    )
    np.testing.assert_allclose(rows["kl"], expected, rtol=2e-4, atol=1e-5)
    metadata = Occurrences(tmp_path / "o" / "occurrences.parquet").metadata
    tokenizer = metadata["tokenizer"]
    assert tokenizer["fingerprint"] == fingerprint(make_tokenizer())
    assert tokenizer["vocab_size"] == 300
    assert (metadata["version"], metadata["vocab_size"], metadata["num_rollouts"], metadata["beta"]) == (1, 300, 3, 1.0)
    assert (metadata["temperature"], metadata["reference"]) == (0.7, None)
    assert metadata["student"] == str(world / "student")
    assert metadata["teacher"] == str(world / "teacher")


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapter_off_is_the_base_of_a_lora_student(world, tmp_path, four_bit):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(world / "before"), adapter).save_pretrained(world / "adapter")
    more = ["--num_prompts", 3, *(["--load_in_4bit"] if four_bit else [])]
    off = [*more, "--reference_model_name_or_path", "adapter_off"]
    rows, prompts = collect(world, tmp_path / "off", *off, student="adapter")
    base, _ = collect(
        world, tmp_path / "base", *more, "--reference_model_name_or_path", world / "before", student="adapter"
    )
    for name in ("token_id", "kl", "kl_pre"):
        np.testing.assert_allclose(rows[name], base[name], rtol=1e-4, atol=1e-6)
    assert np.abs(np.array(rows["kl"]) - np.array(rows["kl_pre"])).max() > 0.01
    if not four_bit:
        student = PeftModel.from_pretrained(load(world / "before"), world / "adapter").double().eval()
        expected = divergences(student, load(world / "teacher"), rows, prompts, per_prompt=1)
        np.testing.assert_allclose(rows["kl"], expected, rtol=2e-4, atol=1e-5)


def test_the_batch_size_changes_no_greedy_row(world, tmp_path):
    found = [
        collect(world, tmp_path / str(size), "--greedy", "--num_generations", 2, "--per_device_eval_batch_size", size)[
            0
        ]
        for size in (2, 16)
    ]
    assert found[0]["token_id"] == found[1]["token_id"]
    np.testing.assert_allclose(found[0]["kl"], found[1]["kl"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_rollouts_may_come_from_continuous_batching(world, tmp_path):
    plain, _ = collect(world, tmp_path / "plain", "--greedy", "--num_prompts", 3)
    engine, _ = collect(
        world, tmp_path / "cb", "--greedy", "--num_prompts", 3, "--use_transformers_continuous_batching"
    )
    assert plain["token_id"] == engine["token_id"]


def test_what_is_collected_can_be_detected(world, tmp_path, capsys):
    collect(world, tmp_path / "o", "--reference_model_name_or_path", world / "before", "--num_generations", 4)
    output = tmp_path / "rock_set.json"
    found = str(tmp_path / "o" / "occurrences.parquet")  # random models: nothing recurs
    assert main(["detect", found, "--output", str(output), "--score", "aggregate"]) == 0
    content = json.loads(output.read_text())
    assert content["rocks"][0]["text"] is not None  # the tokenizer is found by its name
    assert content["measure"]["student"] == str(world / "student")


# Killed and continued


def test_a_run_that_broke_off_goes_on_and_ends_with_equal_rows(world, tmp_path, monkeypatch, capsys):
    more = ["--num_generations", 2, "--per_device_eval_batch_size", 4]
    whole = collect(world, tmp_path / "whole", *more)
    original, batches = Collector._collect_batch, []

    def break_off(self, start):
        batches.append(start)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return original(self, start)

    monkeypatch.setattr(Collector, "_collect_batch", break_off)
    assert main(arguments(world, tmp_path / "broken", *more)) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not (tmp_path / "broken" / "occurrences.parquet").exists()
    assert collect(world, tmp_path / "broken", *more) == whole
    assert batches == [0, 2, 4, 4, 6]  # none twice but the one that broke off
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == ["occurrences.parquet", "prompts.parquet"]
    assert main(arguments(world, tmp_path / "broken", *more)) == 0
    assert "is complete already" in capsys.readouterr().out


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K problems are not beside the checkout")
@pytest.mark.slow
@pytest.mark.processes
def test_collecting_on_gsm8k_is_killed_and_continued(world, tmp_path):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:40]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["question"]}) for row in rows) + "\n")
    models = ["--model_name_or_path", str(world / "long"), "--teacher_model_name_or_path", str(world / "long_teacher")]
    for name, seed in (("long", 0), ("long_teacher", 1)):
        save(world / name, seed=seed, max_position_embeddings=2048)
    command = [
        sys.executable,
        "-m",
        "trl_opd",
        "collect",
        *models,
        *CPU,
        "--dataset_name",
        str(tmp_path / "prompts.jsonl"),
    ]
    command += ["--per_device_eval_batch_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    killed = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while len(list((tmp_path / "killed" / "parts").glob("rows-*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "occurrences.parquet").exists()
    for name in ("killed", "whole"):
        subprocess.run(
            [*command, "--output_dir", str(tmp_path / name)], env=environment, check=True, capture_output=True
        )
    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    assert len(read(tmp_path / "whole")[1]["prompt"]) == 40


# What cannot be


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_prompts", "9"], "--num_prompts 9 is more than the 8 rows of the dataset"),
        (["--num_prompts", "0"], "--num_prompts must be a whole number of at least 1"),
        (["--reference_model_name_or_path", "adapter_off"], "adapter_off is for a student with a LoRA adapter"),
        (["--reference_model_name_or_path", "/nowhere"], "There is no student in /nowhere: no such folder."),
        (["--model_name_or_path", "/nowhere"], "There is no student in /nowhere: no such folder."),
        (["--teacher_model_name_or_path", "/nowhere"], "There is no teacher in /nowhere: no such folder."),
        (["--dataset_name", "/nowhere.jsonl"], "There is no dataset file /nowhere.jsonl"),
        (["--greedy", "--temperature", "0.5"], "--greedy does not use a temperature"),
        (["--use_peft"], "--use_peft would create a new adapter"),
        (["--num_generations", "0"], "num_generations must be a whole number of at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_a_sentence(more, message, world, tmp_path, capsys):
    assert main(arguments(world, tmp_path / "o", *more)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd collect: error: ")
    assert message in error
    assert not (tmp_path / "o" / "occurrences.parquet").exists()


def test_a_folder_of_another_collection_is_refused_and_left_as_it_is(world, tmp_path, capsys):
    collect(world, tmp_path / "o", "--num_prompts", 2)
    before = (tmp_path / "o" / "occurrences.parquet").read_bytes()
    assert main(arguments(world, tmp_path / "o", "--num_prompts", 2, "--seed", 3)) == 1
    assert "holds a collection with seed 42, and this is 3: choose another --output_dir" in capsys.readouterr().err
    assert (tmp_path / "o" / "occurrences.parquet").read_bytes() == before


def test_a_reference_student_of_another_vocabulary_is_refused(world, tmp_path, capsys):
    save(tmp_path / "other", seed=0, rows=310)
    assert main(arguments(world, tmp_path / "o", "--reference_model_name_or_path", tmp_path / "other")) == 1
    assert "has 310 vocabulary entries, the student 300" in capsys.readouterr().err


def test_logits_that_are_not_finite_are_named(world, tmp_path, capsys):
    model = make_model(seed=2)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(world / "student").save_pretrained(tmp_path / "broken")
    assert main(arguments(world, tmp_path / "o", "--reference_model_name_or_path", tmp_path / "broken")) == 1
    assert "The logits of reference student or teacher are not finite" in capsys.readouterr().err


def test_the_help_lists_every_option_with_its_default():
    import dataclasses

    from trl_opd.cli.collect import HELP, CollectArguments

    for option in dataclasses.fields(CollectArguments):
        row = next(line for line in HELP.splitlines() if line.startswith(f"  --{option.name} "))
        default = {None: "none", False: "false"}[option.default]
        assert f" {default} " in row
