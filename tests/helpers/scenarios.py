"""Runs in which the processes see unequal things; each writes what it has seen. Started by test_processes.py.

`python -m torch.distributed.run --nproc_per_node 2 tests/helpers/scenarios.py FOLDER NAME...` and the same without
the launcher train on the same greedy rollouts. Every process writes `FOLDER/NAME-PROCESSES-RANK.json`. `--fsdp2`
shards the student.
"""

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_opd import AccuracyCallback, OPDTrainer, RolloutSamples
from trl_opd.cli.train import GLOO_RELEASE_SECONDS

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_config, make_model, make_tokenizer

PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
NAMES = ("seen", "count", "kl_sum", "kl_sq_sum", "entropy_sum")
# Greedy rollouts of `student()`: these end within six tokens, after one to six, and those are cut.
ENDING = ["Sell 5 eggs first.", "Step 2 = 7", "42 = 7", "Wait left?"]
CUT = ["Add 3 and 4.", "42 and 4.", "A farmer and 4.", "So left?"]
# Tokens of the rollouts of these four, and of no rollout of the four above.
APART = ["A farmer and 4.", "How many and 4.", "42 first.", "Wait and 4."]


def student() -> torch.nn.Module:
    model = make_model(seed=0)
    with torch.no_grad():
        model.lm_head.weight[2] *= 4  # so that some rollouts end
    return model


def rows(*prompts: str) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts)})


class SpoilStudent(TrainerCallback):
    """Put a NaN into the student of one process, as a broken card would, before the second step."""

    def on_step_begin(self, args, state, control, model=None, **_):
        if state.global_step == 1 and RANK == PROCESSES - 1:
            with torch.no_grad():
                model.lm_head.weight[7] = torch.nan


def run(folder: Path, *, prompts: list[str], problems: int | None = None, lora: bool = False, **changes) -> dict:
    """Train on `prompts`, of which the first half is the first process's; return what this process knows then."""
    callbacks = list(changes.pop("callbacks", ()))
    evaluation = None if problems is None else rows(*(ENDING + CUT)[2 : 2 + problems])
    if evaluation is not None:
        answers = evaluation.add_column("answer", [float(place + 1) for place in range(problems)])
        callbacks = [AccuracyCallback(answers, lambda completions, answer, **_: answer)]
    settings = {
        "per_device_train_batch_size": 4 // PROCESSES,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
        "generation_kwargs": {"do_sample": False},
        "max_completion_length": 6,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "shuffle_dataset": False,
    }
    adapter = LoraConfig(r=4, target_modules="all-linear") if lora else None
    torch.manual_seed(3)  # of the adapter
    trainer = OPDTrainer(
        model=student(),
        teacher_model=make_model(seed=1),
        args=make_config(folder, **settings | changes),
        train_dataset=rows(*prompts),
        eval_dataset=evaluation,
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        peft_config=adapter,
    )
    return observe(trainer)


def weights_of(trainer: OPDTrainer) -> torch.Tensor:
    """Return a copy of the trained weights in one vector; with FSDP a collective."""
    parts = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in parts])


def observe(trainer: OPDTrainer) -> dict:
    """Train; return the movement of the weights, the statistics of this process and of all, the log and the error."""
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
    local, total = trainer.token_stats, trainer.reduced_token_stats()
    return {
        "processes": trainer.accelerator.num_processes,
        "error": error,
        "warnings": [str(one.message) for one in caught],
        "evaluated": evaluated,
        "log": trainer.state.log_history,
        "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        "moved": moved[torch.linspace(0, len(moved) - 1, 4000).long()].tolist(),
        "sharded": any(hasattr(p, "full_tensor") for p in trainer.model.parameters()),
        "local": {"seen": int(local.seen.sum()), "count": int(local.count.sum())},
        "stats": {name: getattr(total, name).tolist() for name in NAMES},
    }


def rocks(folder: Path) -> str:
    """Return a rock set of every token that rollouts of `APART` have, so that all their positions are frozen."""
    model, tokenizer, ids = student().eval(), make_tokenizer(), set()
    for prompt in APART:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids |= set(model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :].tolist())
    return rock_file(folder.with_name(f"{folder.name}-{PROCESSES}-{RANK}.json"), sorted(ids))


def frozen(folder: Path, **changes) -> dict:
    prompts = [*CUT[:2], "Add 3 the equation", "So the equation", *APART]
    return run(folder, prompts=prompts, token_weighting="rock", rock_set=rocks(folder), **changes)


SCENARIOS = {
    "cut on one": lambda folder: run(folder, prompts=ENDING + CUT, mask_truncated_completions=True),
    "cut on one, LoRA": lambda folder: run(folder, prompts=ENDING + CUT, mask_truncated_completions=True, lora=True),
    "cut everywhere": lambda folder: run(folder, prompts=CUT + CUT, mask_truncated_completions=True),
    "cut everywhere, LoRA": lambda folder: run(folder, prompts=CUT + CUT, mask_truncated_completions=True, lora=True),
    "frozen on one": lambda folder: frozen(folder, logging_steps=5),
    "frozen on one, LoRA": lambda folder: frozen(folder, logging_steps=5, lora=True),
    "frozen on one, by weights": lambda folder: frozen(folder, weight_normalization="weights"),
    "uneven": lambda folder: run(folder, prompts=ENDING + CUT, problems=3),
    "one problem": lambda folder: run(folder, prompts=ENDING + CUT, problems=1),
    "sampled": lambda folder: run(
        folder, prompts=ENDING + CUT, max_steps=3, learning_rate=0.05, callbacks=[RolloutSamples(2)]
    ),
    "spoilt": lambda folder: run(folder, prompts=ENDING + CUT, max_steps=3, callbacks=[SpoilStudent()]),
}


def shard_on_cpu() -> None:
    """Let Accelerate shard with FSDP2 on the CPU, which torch can: it shards on accelerators only (1.15)."""
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


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if "--fsdp2" in names:
        names.remove("--fsdp2")
        shard_on_cpu()
    for name in names:
        found = SCENARIOS[name](folder / name)
        (folder / f"{name}-{PROCESSES}-{RANK}.json").write_text(json.dumps(found))
    if PROCESSES > 1:
        torch.distributed.barrier()
        time.sleep(GLOO_RELEASE_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
