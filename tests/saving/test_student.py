"""Students on their way to the Hub and back, with TRL's trainer underneath: the real client against a Hub on loopback.

The client reads its address when it is imported, and pytest's process is offline, so one other interpreter,
`python -m tests.saving.test_student FOLDER`, does everything once and prints what it saw as JSON.
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

KINDS = ("full", "lora", "qlora", "merged")


def work(folder: Path) -> dict:
    """Push students of every kind, break what can break, and return what came of it."""
    with HubServer() as hub:
        os.environ |= hub.environment | {"HF_HOME": str(folder / "home")}
        os.chdir(folder)
        from tests.helpers.push_cases import Cases  # imports the client

        return Cases(hub, folder).run()


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("push")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-W", "ignore", "-m", "tests.saving.test_student", str(folder)]
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    # The models are tiny: a second thread would only wait, and for long where others use the cores.
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout + done.stderr}


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_student_goes_up_with_card_record_statistics_and_report(seen, kind):
    wanted = {"README.md", "opd_run.json", "token_stats.safetensors", "report.html", "tokenizer.json"}
    assert wanted <= set(seen[kind]["files"])
    weights = "adapter_model.safetensors" if kind in ("lora", "qlora") else "model.safetensors"
    other = {"adapter_model.safetensors", "model.safetensors"} - {weights}
    assert weights in seen[kind]["files"]
    assert not other & set(seen[kind]["files"])
    assert not any(name.startswith("checkpoint") for name in seen[kind]["files"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_down_computes_what_went_up(seen, kind):
    # A base in 4 bits is trained with other dtypes of norms and embeddings than it is loaded with here.
    assert seen[kind]["difference"] < (0.3 if kind == "qlora" else 1e-4)
    assert seen[kind]["difference_to_base"] > 1e-3


@pytest.mark.parametrize(
    ("kind", "relation", "library"),
    [
        ("full", "finetune", "transformers"),
        ("lora", "adapter", "peft"),
        ("qlora", "adapter", "peft"),
        ("merged", "finetune", "transformers"),
    ],
)
def test_the_card_says_what_the_student_is_to_its_base(seen, kind, relation, library):
    data = front_matter(seen[kind]["card"])
    assert data["base_model"] == "user/base"
    assert data["base_model_relation"] == relation
    assert data["library_name"] == library
    assert {"trl-opd", "on-policy-distillation", "trl", "distillation"} <= set(data["tags"])
    loader = "AutoPeftModelForCausalLM" if relation == "adapter" else "AutoModelForCausalLM"
    assert f'{loader}.from_pretrained("user/{kind}"' in seen[kind]["card"]


def test_the_card_tells_teacher_quantisation_accuracy_and_papers(seen):
    card = seen["qlora"]["card"]
    assert "user/teacher" in card.replace("&#47;", "/")
    assert "4-bit nf4" in card
    assert 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")' in card
    assert "accuracy before the first step" in card
    assert "accuracy after step 2" in card
    assert "2605.09253" in card
    assert "agarwal2024on-policy" in card
    assert "trl-opd" in card


def test_a_frozen_run_tells_what_it_froze_and_brings_its_rocks(seen):
    card = seen["lora"]["card"]
    assert "the rock types of the rock set, weight 0.0 in the loss" in card
    assert "of the tokens had weight 0" in card
    assert seen["lora"]["rocks"] == seen["rocks on the Hub"]
    assert "<code>" in card


def test_a_training_can_begin_from_what_was_pushed(seen):
    assert seen["train again"]["steps"] == 1


def test_checkpoints_are_pushed_while_training_and_a_merged_student_waits_for_its_end(seen):
    assert any("Training in progress" in message for message in seen["full"]["messages"])
    assert not any("Training in progress" in message for message in seen["merged"]["messages"])


@pytest.mark.parametrize("case", ["wrong token", "command line: wrong token"])
def test_a_refused_token_is_one_sentence(seen, case):
    sentence = seen[case]["error"]
    assert "user/refused" in sentence
    assert "did not accept the token" in sentence
    assert "hf auth login" in sentence
    assert "\n" not in sentence.strip()


def test_a_connection_cut_in_the_middle_is_one_sentence_and_loses_nothing(seen):
    found = seen["cut"]
    assert "nothing local is lost, run the same again" in found["error"]
    assert "\n" not in found["error"]
    assert found["local"] == found["local after"]
    assert "model.safetensors" in found["local"]
    assert found["pushed after"]


def test_a_push_that_fails_beside_the_training_is_a_warning(seen):
    assert any("push a checkpoint to the Hub while training" in text for text in seen["lost push"]["warnings"])
    assert seen["lost push"]["steps"] == 2


def test_the_command_line_pushes_once_at_the_end(seen):
    found = seen["command line"]
    assert found["code"] == 0
    assert "README.md" in found["files"]
    assert sum("End of training" in message or "Model save" in message for message in found["messages"]) == 1


def test_no_token_is_in_a_file_a_card_a_report_or_the_output(seen):
    assert seen["files with a token"] == []
    assert TOKEN not in seen["output"]
    assert WRONG not in seen["output"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(work(Path(sys.argv[1]))))
