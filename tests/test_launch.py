"""The launch files in examples/ fit the installed TRL and Accelerate."""

import dataclasses
import inspect
import re
import shlex

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.scripts.vllm_serve import ScriptArguments, build_command

from trl_opd import OPDConfig
from trl_opd.models.shape import shape_of

from tests.helpers.paths import ROOT

LAUNCH = ROOT / "examples" / "launch"
PAGE = ROOT / "docs" / "scaling.md"


def commands(text: str, word: str) -> list[list[str]]:
    """Return the commands of a text that begin with `word`, also after `#` or environment variables, as words."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    lines = re.findall(rf"^[#\s]*(?:[A-Z_]+=\S+ )*({word} .*?)(?: &)?$", joined, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def options(words: list[str]) -> dict[str, str]:
    """Return the options of a command by name, without dashes."""
    places = [place for place, word in enumerate(words) if word.startswith("--")]
    return {words[place][2:].replace("-", "_"): "".join(words[place + 1 : place + 2]) for place in places}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_accepts_the_launch_files_and_their_commands(path):
    config = load_config_from_file(str(path))  # raises an error for unknown keys
    known = {action.dest for action in launch_command_parser()._actions}
    nested = [*(config.fsdp_config or {}), *(config.deepspeed_config or {})]
    assert [key for key in nested if key not in known] == []
    (command,) = commands(path.read_text(), "accelerate launch")
    arguments = launch_command_parser().parse_args(command[2:])
    assert arguments.config_file == str(path.relative_to(ROOT))
    assert (ROOT / arguments.training_script).is_file()
    assert (ROOT / options(arguments.training_script_args)["config"]).is_file()


def test_launch_files_cover_ddp_fsdp2_and_zero3():
    kinds = {path.stem: yaml.safe_load(path.read_text()) for path in LAUNCH.glob("*.yaml")}
    found = {name: content["distributed_type"] for name, content in kinds.items()}
    assert found == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    assert kinds["fsdp2"]["fsdp_config"]["fsdp_version"] == 2
    assert kinds["deepspeed_zero3"]["deepspeed_config"]["zero_stage"] == 3


@pytest.mark.parametrize("path", [LAUNCH / "vllm_server.sh", PAGE], ids=lambda path: path.name)
def test_vllm_server_command_is_trls_and_its_options_exist(path):
    text = path.read_text()
    assert "VLLM_SERVER_DEV_MODE=1" in text
    (command,) = commands(text, "vllm serve")
    built = options(build_command(ScriptArguments(model="student", port=8000, max_model_len=4096)))
    shown = options(command)
    shown.pop("gpu_memory_utilization", None)  # the user chooses it
    assert shown.items() <= built.items()
    assert {"weight_transfer_config", "logprobs_mode", "max_logprobs", "port", "max_model_len"} <= shown.keys()

    named = set(re.findall(r"\b(?:use_vllm|vllm_[a-z_]+)\b", text)) - {"vllm_server"}
    assert {"use_vllm", "vllm_mode", "vllm_server_port"} <= named
    assert named <= {field.name for field in dataclasses.fields(OPDConfig)}


def test_trl_requests_one_completion_per_repeated_prompt_from_vllm():
    parameters = inspect.signature(VLLMGeneration.generate).parameters
    assert list(parameters) == ["self", "prompts", "images", "num_generations", "profiler"]
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"]
    assert isinstance(DistributedBackend.is_zero3, property)  # we read it to decide how to gather the heads


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [((1536, 8960, 28, 12, 2, 151_936), True), ((3584, 18_944, 28, 28, 4, 152_064), False)],
    ids=["1.5B", "7B"],
)
def test_scaling_page_counts_qwens_weights_as_the_planner_does(sizes, tied):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    settings = dict(zip((*names, "vocab_size"), sizes, strict=True))
    with torch.device("meta"):
        shape = shape_of(Qwen2ForCausalLM(Qwen2Config(**settings, tie_word_embeddings=tied)))
    page = PAGE.read_text().replace("\n", " ")
    linear = sum(rows * columns for rows, columns in shape.linear)
    assert f"L = {linear:,}" in page
    assert f"{shape.size:,} together" in page
    if tied:  # the student
        adapter = sum(32 * (rows + columns) for rows, columns in shape.linear)
        assert f"{adapter:,} weights" in page
        assert f"{2 * (linear + shape.head_size) / 1e9:.2f} GFLOP" in page
        assert f"{2 * 2 * shape.layers * shape.key_value:,} bytes" in page
    else:
        assert f"{2 * linear / 1e9:.2f} GFLOP" in page
