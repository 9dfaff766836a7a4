"""`trl-opd collect`: rows equal to the reference implementation, a reference student, resuming, one-line errors."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.artefacts.occurrences import Occurrences
from trl_opd.cli import main
from trl_opd.studies.collect import Collector

from tests.helpers import reference
from tests.helpers.families import make_family
from tests.helpers.paths import SHARED_DATA
from tests.helpers.tiny import PROMPTS, make_tokenizer, save
from tests.helpers.trainers import build

GSM8K = SHARED_DATA / "gsm8k" / "test.jsonl"
CPU = ["--use_cpu", "--bf16", "false", "--max_completion_length", "10", "--report_to", "none"]
BEFORE = "--reference_model_name_or_path"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a student, a teacher of another width, the student before distillation, and prompts."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("student", 0), ("teacher", 1), ("before", 2)):
        save(folder / name, seed=seed, width=64 if name == "teacher" else 32)
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def arguments(world, output, *more, student="student", teacher="teacher") -> list[str]:
    models = ["--model_name_or_path", world / student, "--teacher_model_name_or_path", world / teacher]
    given = [*models, "--dataset_name", world / "prompts.jsonl", "--output_dir", output, *CPU, *more]
    return ["collect", *map(str, given)]


def collect(world, output, *more, **changes) -> tuple[dict, dict]:
    """Run the command and return the columns of its rows and of its prompts."""
    assert main(arguments(world, output, *more, **changes)) == 0
    return read(output)


def read(output) -> tuple[dict, dict]:
    return tuple(pq.read_table(output / name).to_pydict() for name in ("occurrences.parquet", "prompts.parquet"))


def completions_of(rows: dict) -> list[list[int]]:
    """Return the token ids of each rollout, after a check that rollouts and positions count up from 0."""
    completions = [[] for _ in range(max(rows["rollout"]) + 1)]
    for rollout, position, id in zip(rows["rollout"], rows["position"], rows["token_id"], strict=True):
        assert position == len(completions[rollout])
        completions[rollout].append(id)
    assert rows["rollout"] == sorted(rows["rollout"])
    return completions


def require_divergences(values, student, teacher, rows: dict, prompts: dict, *, temperature=1.0) -> None:
    """Assert that values are the divergences of the reference implementation: float64, each rollout alone."""
    completions = completions_of(rows)
    per_prompt = len(completions) // len(prompts["prompt"])
    expected = []
    for rollout, completion in enumerate(completions):
        prompt = prompts["token_ids"][rollout // per_prompt]
        inputs = {"prompt_ids": torch.tensor([prompt]), "completion_ids": torch.tensor([completion])}
        for name in ("prompt", "completion"):
            inputs[f"{name}_mask"] = torch.ones_like(inputs[f"{name}_ids"])
        with torch.no_grad():
            found = reference.token_divergences(student, teacher, inputs, beta=1.0, temperature=temperature, vocab=300)
        expected += [value.item() for value in found[0]]
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=1e-5)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).double().eval()


# Rows and metadata


def test_rows_equal_the_reference_implementation_and_metadata_names_the_models(world, tmp_path, capsys):
    more = ["--num_generations", 2, "--num_prompts", 6, "--temperature", "0.7", "--seed", 5, BEFORE, world / "before"]
    rows, prompts = collect(world, tmp_path, *more)
    mean = np.mean(np.array(rows["kl"], dtype=float))
    expected = f"Collected 12 rollouts of 6 prompts, {len(rows['kl'])} tokens; mean divergence {mean:.4f} nats"
    assert expected in capsys.readouterr().out
    assert prompts["row"] == prompts["prompt"] == list(range(6))
    tokenizer = make_tokenizer()
    for prompt, ids in zip(PROMPTS, prompts["token_ids"], strict=False):
        chat = [{"role": "user", "content": prompt}]
        assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert len(completions_of(rows)) == 12
    assert rows["prompt"] == [rollout // 2 for rollout in rows["rollout"]]
    for name, student in (("kl", "student"), ("kl_pre", "before")):
        models = load(world / student), load(world / "teacher")
        require_divergences(rows[name], *models, rows, prompts, temperature=0.7)
    metadata = Occurrences(tmp_path / "occurrences.parquet").metadata
    assert metadata.pop("settings")
    assert metadata.pop("tokenizer").items() >= {"vocab_size": 300, "fingerprint": fingerprint(tokenizer)}.items()
    names = {"student": str(world / "student"), "teacher": str(world / "teacher"), "reference": str(world / "before")}
    numbers = {"version": 1, "vocab_size": 300, "num_rollouts": 12, "num_generations": 2, "beta": 1.0}
    assert metadata == {**names, **numbers, "temperature": 0.7}


def test_sampled_rollouts_differ_within_a_prompt_and_between_seeds(world, tmp_path):
    more = ["--num_generations", 4, "--num_prompts", 2]
    completions = completions_of(collect(world, tmp_path / "one", *more)[0])
    assert len({tuple(ids) for ids in completions[:4]}) > 1
    assert completions_of(collect(world, tmp_path / "other", *more, "--seed", 7)[0]) != completions


@pytest.mark.slow
def test_greedy_rollouts_are_those_of_generate_in_every_batch_size_and_engine(world, tmp_path):
    rows, prompts = collect(world, tmp_path / "plain", "--greedy")
    student = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    for prompt, completion in zip(prompts["token_ids"], completions_of(rows), strict=True):
        ids = torch.tensor([prompt])
        found = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert completion == found[0, len(prompt) :].tolist()
    for more in (["--per_device_eval_batch_size", 2], ["--use_transformers_continuous_batching"]):
        others, _ = collect(world, tmp_path / more[0], "--greedy", *more)
        assert others["token_id"] == rows["token_id"]
        np.testing.assert_allclose(others["kl"], rows["kl"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.slow
def test_adapter_off_is_the_base_of_a_lora_student(world, tmp_path, four_bit):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(world / "before"), adapter).save_pretrained(world / "adapter")
    more = ["--num_prompts", 3, *(["--load_in_4bit"] if four_bit else [])]
    rows, prompts = collect(world, tmp_path / "off", *more, BEFORE, "adapter_off", student="adapter")
    base, _ = collect(world, tmp_path / "base", *more, BEFORE, world / "before", student="adapter")
    for name in ("token_id", "kl", "kl_pre"):
        np.testing.assert_allclose(rows[name], base[name], rtol=1e-4, atol=1e-6)
    assert np.abs(np.array(rows["kl"]) - np.array(rows["kl_pre"])).max() > 0.01
    if not four_bit:
        student = PeftModel.from_pretrained(load(world / "before"), world / "adapter").double().eval()
        require_divergences(rows["kl"], student, load(world / "teacher"), rows, prompts)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_changed_its_base_has_no_student_before_it(world, tmp_path, capsys, init):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init)
    get_peft_model(AutoModelForCausalLM.from_pretrained(world / "before"), adapter).save_pretrained(
        tmp_path / "adapter"
    )
    given = arguments(world, tmp_path / "out", BEFORE, "adapter_off", student=tmp_path / "adapter")
    assert main(given) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "has changed the weights of its base" in error
    assert f"Pass --reference_model_name_or_path {world / 'before'}" in error


@pytest.mark.parametrize("family", ["bert", "modernbert-decoder"])
def test_reference_student_with_other_logits_is_an_error(world, tmp_path, capsys, family):
    make_family(family).save_pretrained(tmp_path / "reference")
    make_tokenizer().save_pretrained(tmp_path / "reference")
    assert main(arguments(world, tmp_path / "out", BEFORE, tmp_path / "reference")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The reference student (" in error
    assert "do not give its own distribution" in error


def test_adapter_of_a_run_that_continued_another_has_no_student_before_it(world, tmp_path, capsys):
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(world / "before"), adapter)
    trainer = build(tmp_path / "run", student=student, max_steps=1)
    trainer.train()
    trainer.save_model()
    make_tokenizer().save_pretrained(tmp_path / "run")
    assert main(arguments(world, tmp_path / "out", BEFORE, "adapter_off", student=tmp_path / "run")) == 1
    assert "continued another adapter" in capsys.readouterr().err


def test_batches_of_the_same_prompt_have_noise_of_their_own(world, tmp_path):
    (tmp_path / "same").mkdir()
    line = json.dumps({"prompt": PROMPTS[0]}) + "\n"
    (tmp_path / "same" / "prompts.jsonl").write_text(2 * line)
    for name in ("student", "teacher"):
        (tmp_path / "same" / name).symlink_to(world / name)
    rows, _ = collect(tmp_path / "same", tmp_path / "out", "--per_device_eval_batch_size", 1)
    first, second = completions_of(rows)
    assert first != second


# Resuming


@pytest.mark.slow
def test_interrupted_collection_resumes_with_equal_rows(world, tmp_path, monkeypatch, capsys):
    more = ["--num_generations", 2, "--per_device_eval_batch_size", 4]
    whole = collect(world, tmp_path / "whole", *more)
    original = Collector._collect_batch
    batches = []

    def interrupt(self, start):
        batches.append(start)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return original(self, start)

    monkeypatch.setattr(Collector, "_collect_batch", interrupt)
    output = tmp_path / "interrupted"
    assert main(arguments(world, output, *more)) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert not (output / "occurrences.parquet").exists()
    assert collect(world, output, *more) == whole
    assert batches == [0, 2, 4, 4, 6]  # only the interrupted batch is collected twice
    assert sorted(path.name for path in output.iterdir()) == ["occurrences.parquet", "prompts.parquet"]
    assert main(arguments(world, output, *more)) == 0
    assert "is complete already" in capsys.readouterr().out


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K problems are not beside the checkout")
@pytest.mark.slow
@pytest.mark.processes
def test_collection_on_gsm8k_resumes_after_sigkill_with_equal_rows(tmp_path):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:40]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": row["question"]}) for row in rows) + "\n")
    for seed, name in enumerate(("student", "teacher")):
        save(tmp_path / name, seed=seed, max_position_embeddings=2048)
    more = ["--per_device_eval_batch_size", 1]
    command = [sys.executable, "-m", "trl_opd", *arguments(tmp_path, tmp_path / "killed", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    parts = tmp_path / "killed" / "parts"
    until = time.monotonic() + 120
    while len(list(parts.glob("rows-*.parquet"))) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0
    assert 3 <= len(list(parts.glob("rows-*.parquet"))) < 40
    assert not (tmp_path / "killed" / "occurrences.parquet").exists()
    whole = collect(tmp_path, tmp_path / "whole", *more)
    assert collect(tmp_path, tmp_path / "killed", *more) == whole
    assert len(whole[1]["prompt"]) == 40


# Wrong input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_prompts", "9"], "--num_prompts 9 is more than the 8 rows of the dataset"),
        (["--num_prompts", "0"], "--num_prompts must be a whole number of at least 1"),
        ([BEFORE, "adapter_off"], "adapter_off is for a student with a LoRA adapter"),
        ([BEFORE, "/nowhere"], "There is no student in /nowhere: no such folder."),
        (["--model_name_or_path", "/nowhere"], "There is no student in /nowhere: no such folder."),
        (["--teacher_model_name_or_path", "/nowhere"], "There is no teacher in /nowhere: no such folder."),
        (["--dataset_name", "/nowhere.jsonl"], "There is no dataset file /nowhere.jsonl"),
        (["--greedy", "--temperature", "0.5"], "--greedy does not use a temperature"),
        (["--use_peft"], "--use_peft would create a new adapter"),
        (["--num_generations", "0"], "num_generations must be a whole number of at least 1"),
    ],
)
def test_invalid_value_is_a_one_line_error(more, message, world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, *more)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd collect: error: ")
    assert message in error
    assert not (tmp_path / "occurrences.parquet").exists()


def test_folder_of_another_collection_is_an_error_and_stays_unchanged(world, tmp_path, capsys):
    collect(world, tmp_path, "--num_prompts", 2)
    before = (tmp_path / "occurrences.parquet").read_bytes()
    assert main(arguments(world, tmp_path, "--num_prompts", 2, "--seed", 3)) == 1
    error = capsys.readouterr().err
    assert "holds a collection with seed 42, and this one has 3: choose another --output_dir" in error
    assert (tmp_path / "occurrences.parquet").read_bytes() == before


def test_reference_student_with_another_vocabulary_is_an_error(world, tmp_path, capsys):
    save(tmp_path / "other", seed=0, rows=310)
    assert main(arguments(world, tmp_path / "out", BEFORE, tmp_path / "other")) == 1
    assert "has 310 vocabulary entries, the student 300" in capsys.readouterr().err
