"""Pushes students to the Hub and loads them again: the real client and TRL's trainer, with a server on loopback.

The client reads its address when it is imported, and pytest's process is offline. So one other process,
`python -m tests.saving.test_student FOLDER`, runs all cases and prints the results as JSON.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from tests.helpers.hub_server import TOKEN, WRONG, HubServer
from tests.helpers.paths import ROOT


def work(folder: Path) -> dict:
    """Push different students, also over a broken connection, and return what was observed."""
    with HubServer() as hub:
        os.environ |= hub.environment | {"HF_HOME": str(folder / "home")}
        os.chdir(folder)
        from tests.helpers.push_cases import Cases  # imports the client

        return Cases(hub, folder).run()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("push")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"  # the models are too small for more threads
    command = [sys.executable, "-W", "ignore", "-m", "tests.saving.test_student", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout + done.stderr}


@pytest.mark.parametrize(
    ("kind", "weights", "relation", "library", "loader"),
    [
        ("full", "model", "finetune", "transformers", "AutoModelForCausalLM"),
        ("lora", "adapter_model", "adapter", "peft", "AutoPeftModelForCausalLM"),
        ("qlora", "adapter_model", "adapter", "peft", "AutoPeftModelForCausalLM"),
        ("merged", "model", "finetune", "transformers", "AutoModelForCausalLM"),
    ],
)
@pytest.mark.slow
def test_student_is_pushed_with_its_results_and_computes_the_same_when_loaded(
    seen, kind, weights, relation, library, loader
):
    found = seen[kind]
    wanted = {"README.md", "opd_run.json", "token_stats.safetensors", "report.html", "tokenizer.json"}
    assert wanted <= set(found["files"])
    assert [name for name in found["files"] if name.endswith("model.safetensors")] == [f"{weights}.safetensors"]
    assert not any(name.startswith("checkpoint") for name in found["files"])

    # Norms and embeddings of a 4-bit base have other dtypes in training than when it is loaded here.
    assert found["difference"] < (0.3 if kind == "qlora" else 1e-4)
    assert found["difference_to_base"] > 1e-3

    data = yaml.safe_load(found["card"].split("---\n")[1])
    assert data["base_model"] == "user/base"
    assert data["base_model_relation"] == relation
    assert data["library_name"] == library
    assert {"trl-opd", "on-policy-distillation", "trl", "distillation"} <= set(data["tags"])
    assert f'{loader}.from_pretrained("user/{kind}"' in found["card"]


def test_card_names_teacher_quantisation_accuracy_and_papers(seen):
    card = seen["qlora"]["card"]
    assert "user/teacher" in card.replace("&#47;", "/")
    assert "4-bit nf4" in card
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")' in card
    assert "accuracy before the first step" in card
    assert "accuracy after step 1" in card
    assert "2605.09253" in card
    assert "agarwal2024on-policy" in card
    assert "trl-opd" in card


def test_card_of_a_run_with_frozen_rocks_says_so_and_its_rock_set_is_pushed(seen):
    card = seen["lora"]["card"]
    assert "the rock types of the rock set, weight 0.0 in the loss" in card
    assert "of the tokens had weight 0" in card
    assert seen["lora"]["rocks"] == seen["rocks on the Hub"]
    assert "<code>" in card


def test_checkpoints_are_pushed_during_training_but_a_merged_student_only_at_its_end(seen):
    assert any("Training in progress" in message for message in seen["full"]["messages"])
    assert not any("Training in progress" in message for message in seen["merged"]["messages"])


@pytest.mark.parametrize("case", ["wrong token", "command line: wrong token"])
def test_rejected_token_is_a_one_line_error(seen, case):
    message = seen[case]["error"]
    assert "user/refused" in message
    assert "did not accept the token" in message
    assert "hf auth login" in message
    assert "\n" not in message.strip()


def test_connection_that_breaks_during_a_push_is_a_one_line_error_and_loses_nothing(seen):
    found = seen["cut"]
    assert found["steps"] == 1  # trained from a student that was pushed before
    assert "nothing local is lost, run the same again" in found["error"]
    assert "\n" not in found["error"]
    assert found["local"] == found["local after"]
    assert "model.safetensors" in found["local"]
    assert found["pushed after"]


def test_push_that_fails_during_training_is_a_warning(seen):
    assert any("push a checkpoint to the Hub while training" in text for text in seen["lost push"]["warnings"])
    assert seen["lost push"]["steps"] == 2


def test_command_line_pushes_once_at_the_end(seen):
    found = seen["command line"]
    assert found["code"] == 0
    assert "README.md" in found["files"]
    assert sum("End of training" in message or "Model save" in message for message in found["messages"]) == 1


def test_files_cards_reports_and_output_contain_no_token(seen):
    assert seen["files with a token"] == []
    assert TOKEN not in seen["output"]
    assert WRONG not in seen["output"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(work(Path(sys.argv[1]))))
