"""Trainings whose processes see unequal rollouts, on one process, on two and with FSDP2. Started by test_processes.py.

`python tests/helpers/scenarios.py FOLDER WORLD` writes the results of each process to `FOLDER/GROUP/NAME-RANK.json`.
WORLD has the models and prompts of the runs that are started from the command line, as in conftest.py.
"""

import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow.parquet as pq
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_opd import AccuracyCallback, OPDTrainer, RolloutSamples, TokenStats, cli
from trl_opd.cli.train import GLOO_RELEASE_SECONDS

from tests.helpers.command_line import flags
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_tokenizer
from tests.helpers.token_statistics import NAMES
from tests.helpers.trainers import GREEDY, Recorder, build, ending_student

# Greedy rollouts of `ending_student()`: these end within six tokens, after one to six, and those are cut.
ENDING = ["Sell 5 eggs first.", "Step 2 = 7", "42 = 7", "Wait left?"]
CUT = ["Add 3 and 4.", "42 and 4.", "A farmer and 4.", "So left?"]
MIXED = [prompt for pair in zip(ENDING, CUT, strict=True) for prompt in pair]
# Tokens of the rollouts of these four, and of no rollout of the four above.
APART = ["A farmer and 4.", "How many and 4.", "42 first.", "Wait and 4."]
LORA = LoraConfig(r=4, target_modules="all-linear")


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


class SpoilStudent(TrainerCallback):
    """Put a NaN into the student of one process, as a broken GPU would, before the second step."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 1 and rank() == processes() - 1:
            with torch.no_grad():
                model.lm_head.weight[7] = torch.nan


def run(folder: Path, *, prompts: list[str], problems: int = 0, lora: bool = False, callbacks=(), **changes) -> dict:
    """Train on `prompts`, of which the first half is the first process's, and return what this process knows then."""
    evaluation = None
    if problems:
        evaluation = Dataset.from_dict({"prompt": (ENDING + CUT)[2 : 2 + problems]})
        answers = evaluation.add_column("answer", [float(place + 1) for place in range(problems)])
        callbacks = [*callbacks, AccuracyCallback(answers, lambda completions, answer, **_: answer)]
    settings = {
        "per_device_train_batch_size": 4 // processes(),
        "per_device_eval_batch_size": 2,
        "generation_kwargs": GREEDY,
        "max_completion_length": 6,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
    }
    torch.manual_seed(3)  # of the adapter
    trainer = build(
        folder,
        student=ending_student(),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=evaluation,
        callbacks=list(callbacks),
        peft_config=LORA if lora else None,
        **settings | changes,
    )
    return observe(trainer)


def weights_of(trainer: OPDTrainer) -> torch.Tensor:
    """Return a copy of the trained weights in one vector; with FSDP a collective operation."""
    parts = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in parts])


def sums_of(stats: TokenStats) -> dict[str, list]:
    return {name: getattr(stats, name).tolist() for name in NAMES}


def columns(path: Path, *names: str) -> dict[str, list] | None:
    """Return columns of a Parquet file, or `None` if the run wrote none."""
    return pq.read_table(path, columns=list(names)).to_pydict() if path.exists() else None


def observe(trainer: OPDTrainer) -> dict:
    """Train; return the movement of the weights, the statistics of this process and of all, the log and the files."""
    before, error = weights_of(trainer), None
    evaluated = trainer.evaluate() if trainer.eval_dataset is not None else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except ValueError as stop:
            error = str(stop)
    weights = weights_of(trainer)
    moved = weights - before
    folder = Path(trainer.args.output_dir)
    samples, occurrences = folder / "rollout_samples.parquet", folder / "occurrences" / "step-1.parquet"
    checkpoint = folder / "checkpoint-1"
    return {
        "processes": trainer.accelerator.num_processes,
        "error": error,
        "warnings": [str(one.message) for one in caught],
        "evaluated": evaluated,
        "log": trainer.state.log_history,
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        "moved": moved[torch.linspace(0, len(moved) - 1, 4000).long()].tolist(),
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "local": {name: int(getattr(trainer.token_stats, name).sum()) for name in ("seen", "count")},
        "stats": sums_of(trainer.reduced_token_stats()),
        "checkpoint": sums_of(TokenStats.load(checkpoint)) if checkpoint.is_dir() else None,
        "samples": columns(samples, "step", "rollout", "token_id", "kl"),
        "occurrences": columns(occurrences, "rollout", "position", "token_id", "prompt", "kl"),
    }


@functools.cache
def ids_apart() -> list[int]:
    """Return every token that rollouts of `APART` have; with these as rocks all their positions are frozen."""
    model, tokenizer, ids = ending_student().eval(), make_tokenizer(), set()
    for prompt in APART:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids |= set(model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :].tolist())
    return sorted(ids)


def rocks(folder: Path, ids) -> dict:
    """Return the settings that freeze or weight these types; every process writes its own rock set."""
    return {"token_weighting": "rock", "rock_set": rock_file(folder.with_name(f"{folder.name}-{rank()}-rocks"), ids)}


def frozen(folder: Path, **changes) -> dict:
    prompts = [*CUT[:2], "Add 3 the equation", "So the equation", *APART]
    return run(folder, prompts=prompts, **rocks(folder, ids_apart()), **changes)


def weighted(folder: Path) -> dict:
    """Train with weights between 0 and 1, groups of rollouts, some of them cut, and every file that a run can write."""
    return run(
        folder,
        prompts=MIXED,
        problems=5,
        callbacks=[RolloutSamples(2)],
        num_generations=2,
        rock_weight=0.5,
        weight_normalization="weights",
        mask_truncated_completions=True,
        save_strategy="steps",
        save_steps=1,
        save_only_model=True,
        save_occurrences=1,
        **rocks(folder, range(60, 180)),
    )


def random_arm(folder: Path) -> dict:
    """Train with weights at random positions; with everything else equal these depend on the rollout's number."""
    share_of_half = rocks(folder, range(60, 65))  # fifty of a hundred tokens
    return run(folder, prompts=MIXED, **share_of_half | {"token_weighting": "random"})


def sampled_evaluation(folder: Path) -> dict:
    """Return the completions that this process samples of one prompt in an evaluation."""
    dataset = Dataset.from_dict({"prompt": [CUT[0]] * 8})
    trainer = build(folder, cls=Recorder, eval_dataset=dataset, per_device_eval_batch_size=4)
    trainer.evaluate()
    return {"completions": trainer.batches[0][-1]["completion_ids"].tolist()}


CUTS = {"mask_truncated_completions": True}
SCENARIOS = {
    "cut on one": lambda folder: run(folder, prompts=ENDING + CUT, **CUTS),
    "cut on one, LoRA": lambda folder: run(folder, prompts=ENDING + CUT, lora=True, **CUTS),
    "cut everywhere": lambda folder: run(folder, prompts=CUT + CUT, **CUTS),
    "cut everywhere, LoRA": lambda folder: run(folder, prompts=CUT + CUT, lora=True, **CUTS),
    "frozen on one": lambda folder: frozen(folder, logging_steps=5),
    "frozen on one, LoRA": lambda folder: frozen(folder, logging_steps=5, lora=True),
    "frozen on one, by weights": lambda folder: frozen(folder, weight_normalization="weights"),
    "weighted": weighted,
    "random arm": random_arm,
    "sampled evaluation": sampled_evaluation,
    "uneven": lambda folder: run(folder, prompts=ENDING + CUT, problems=3),
    "one problem": lambda folder: run(folder, prompts=ENDING + CUT, problems=1),
    "sampled": lambda folder: run(
        folder, prompts=ENDING + CUT, max_steps=3, learning_rate=0.05, callbacks=[RolloutSamples(2)]
    ),
    "spoilt": lambda folder: run(folder, prompts=ENDING + CUT, max_steps=3, callbacks=[SpoilStudent()]),
}
SHARDED = ["cut on one", "cut on one, LoRA", "uneven", "sampled"]


def shard_on_cpu() -> None:
    """Let Accelerate 1.15, which shards on accelerators only, shard with FSDP2 on the CPU, as torch can."""
    settings = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "CPU_RAM_EFFICIENT_LOADING": "false"}
    settings |= {"RESHARD_AFTER_FORWARD": "true", "STATE_DICT_TYPE": "FULL_STATE_DICT"}
    os.environ |= {f"FSDP_{name}": value for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    find_out = PartialState.__init__

    def pretend(state, *args, **kwargs):
        is_first = not PartialState._shared_state
        find_out(state, *args, **kwargs)
        if is_first:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend


def run_scenarios(folder: Path, names: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        found = SCENARIOS[name](folder / name)
        (folder / f"{name}-{rank()}.json").write_text(json.dumps(found))
    if processes() > 1:
        torch.distributed.barrier()
        time.sleep(GLOO_RELEASE_SECONDS)


def run_sharded_scenarios(folder: Path) -> None:
    shard_on_cpu()
    run_scenarios(folder, SHARDED)


def launch(count: int, task: Callable[[], object]) -> list[int]:
    """Run `task` on `count` processes as torchrun does, which ends the others if one fails; return their exit codes.

    The processes are forks of this one, because a new process needs five seconds for its imports.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for number in range(count):
        process = os.fork()
        if process == 0:
            if count > 1:
                os.environ |= {name: str(number) for name in ("RANK", "LOCAL_RANK")}
                os.environ |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} | address
            sys.exit(task())
        started.append(process)
    codes = {}
    while len(codes) < count:
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process] != 0:
            for other in set(started) - codes.keys():
                os.kill(other, signal.SIGTERM)
    return [codes[process] for process in started]


def command(world: Path, out: Path, **changes) -> list[str]:
    """Return the flags of a training of two prompts for each process."""
    settings = {"shuffle_dataset": "false", "per_device_train_batch_size": 2, "max_completion_length": 4}
    return flags(world, out, **settings | changes)


def resume(folder: Path, world: Path) -> list[int]:
    """Train, copy the folder as if both processes had been killed while they saved, resume, and return exit codes."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    codes = launch(2, lambda: cli.main(["train", *command(world, folder / "whole", **settings)]))
    shutil.copytree(folder / "whole", folder / "killed")
    for name in ("rng_state_1.pth", "opd_complete.json"):
        (folder / "killed" / "checkpoint-4" / name).unlink()
    settings["resume_from_checkpoint"] = "true"
    return codes + launch(2, lambda: cli.main(["train", *command(world, folder / "killed", **settings)]))


def main(folder: Path, world: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py, and the forks share this memory
    codes = {
        "one": launch(1, lambda: run_scenarios(folder / "one", list(SCENARIOS))),
        "two": launch(2, lambda: run_scenarios(folder / "two", list(SCENARIOS))),
        "fsdp2": launch(2, lambda: run_sharded_scenarios(folder / "fsdp2")),
        "resume": resume(folder, world),
        "no dataset": launch(
            2, lambda: cli.main(["train", *command(world, folder / "none", dataset_name=world / "nowhere.jsonl")])
        ),
    }
    (folder / "exit_codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
