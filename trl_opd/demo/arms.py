"""One arm of the demo: distil from the shipped start, evaluate, and leave the result on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from ..artefacts.atomic import write_json
from ..artefacts.run_files import ROCK_SET_FILE, find_checkpoints
from ..opd_config import OPDConfig
from ..opd_trainer import OPDTrainer
from ..studies.accuracy import AccuracyCallback
from ..training.rollout_samples import RolloutSamples
from .arithmetic import Problem, draw_problems, is_right, solved

MODELS = Path(__file__).parent / "models"
ROLLOUTS = 64  # of an optimizer step
MAX_COMPLETION = 56  # tokens; a right answer has about 40
EVAL_PROBLEMS, CURVE_PROBLEMS, EVAL_SEED = 500, 100, 20260523
SAMPLES = 2  # rollouts that are kept of each log
WINDOWS = 8  # of token statistics, and points of the curves
RESULT, MARKER = "result.json", ".trl_opd_demo"


@dataclass(frozen=True)
class ArmResult:
    """What an arm left: `settings` that made it, which problems it solved, its curve, seconds and frozen share."""

    settings: dict
    correct: list[bool]
    curve: list[tuple[int, float]]
    seconds: float
    frozen_token_share: float

    @property
    def accuracy(self) -> float:
        """Share of the held-out problems that were solved, greedily."""
        return sum(self.correct) / len(self.correct)


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the shipped "teacher" or "student", in float32 on the CPU, and its tokenizer."""
    folder = MODELS / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def eval_problems() -> list[Problem]:
    """Return the held-out problems; their operands are in no training."""
    return draw_problems(EVAL_PROBLEMS, EVAL_SEED, held_out=True)


@torch.no_grad()
def solve(model: PreTrainedModel, tokenizer, problems: list[Problem]) -> list[bool]:
    """Return which problems the model solves, greedily."""
    was_training = model.training
    model.eval()
    inputs = tokenizer([problem.question for problem in problems], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs.to(model.device), max_new_tokens=MAX_COMPLETION, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return [is_right(problem, text) for problem, text in zip(problems, texts, strict=True)]


def run_arm(arm: str, folder: Path, *, seed: int, steps: int, rock_set: Path | None, label: str) -> ArmResult:
    """Distil one arm, or return the result of a finished one with the same settings.

    Args:
        arm (`str`): "uniform", "rock", "control" or "random": the trainer's `token_weighting`.
        folder (`Path`): Where checkpoints, student and result go.
        seed (`int`): Seed of prompts and rollouts.
        steps (`int`): Optimizer steps.
        rock_set (`Path`, *optional*): File of the rock set; not for the uniform arm.
        label (`str`): Of the progress bar.
    """
    rocks = None if rock_set is None else json.loads(rock_set.read_text(encoding="utf-8"))
    weights = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in MODELS.glob("*/*.safetensors")
    }
    settings = {"arm": arm, "seed": seed, "steps": steps, "rollouts": ROLLOUTS, "rock_set": rocks, "weights": weights}
    finished = read_result(folder)
    last_steps = [step for step, _ in find_checkpoints(folder)][-1:]
    if finished is not None and finished.settings == settings and last_steps == [steps]:
        return finished
    _clear(folder)
    started = time.perf_counter()
    trainer = distil(arm, folder, seed=seed, steps=steps, rock_set=rock_set, label=label)
    trainer.save_model()
    correct = solve(trainer.model, trainer.processing_class, eval_problems())
    # Lines of the log have the same number of steps, but for the last.
    lines = trainer.state.log_history
    curve = [(line["step"], line["eval_accuracy"]) for line in lines if "eval_accuracy" in line]
    shares = [line["weight/zero_share"] for line in lines if "weight/zero_share" in line]
    result = ArmResult(settings, correct, curve, time.perf_counter() - started, sum(shares) / len(shares))
    write_json(folder / RESULT, asdict(result))
    return result


def _clear(folder: Path) -> None:
    """Make room for an arm; a folder that no demo has marked as its own is left as it is."""
    marker = folder / MARKER
    if folder.exists() and any(folder.iterdir()) and not marker.exists():
        raise ValueError(f"{folder} holds files that are not the demo's: choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in (RESULT, ROCK_SET_FILE):  # the rock set of an arm of another seed is not this one's
        (folder / name).unlink(missing_ok=True)
    for _, checkpoint in find_checkpoints(folder):
        shutil.rmtree(checkpoint)


def read_result(folder: Path) -> ArmResult | None:
    """Return the result of a finished arm; `None` where there is none, or none that can be read."""
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        curve = [(int(step), float(value)) for step, value in content["curve"]]
        numbers = {name: float(content[name]) for name in ("seconds", "frozen_token_share")}
        correct = [solved for solved in content["correct"] if isinstance(solved, bool)]
        result = ArmResult(settings=content["settings"], correct=correct, curve=curve, **numbers)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return result if len(correct) == EVAL_PROBLEMS and curve else None


def distil(arm: str, folder: Path, *, seed: int, steps: int, rock_set: Path | None, label: str) -> OPDTrainer:
    """Return the trainer of an arm, trained; as [`run_arm`] takes them."""
    student, tokenizer = load("student")
    teacher, _ = load("teacher")
    every = max(1, steps // WINDOWS)
    problems = draw_problems(steps * ROLLOUTS, seed, held_out=False)
    config = OPDConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=ROLLOUTS,
        per_device_eval_batch_size=CURVE_PROBLEMS,
        max_completion_length=MAX_COMPLETION,
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=min(10, steps // 2),
        logging_steps=max(1, every // 3),
        save_steps=every,
        save_only_model=True,
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        token_weighting=arm,
        rock_set=None if rock_set is None else str(rock_set),
    )
    solving = Dataset.from_list(
        [{"prompt": one.question, "answer": str(one.answer)} for one in eval_problems()[:CURVE_PROBLEMS]]
    )
    bar = _Bar(label)
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [problem.question for problem in problems]}),
        processing_class=tokenizer,
        callbacks=[bar, AccuracyCallback(solving, solved, eval_steps=every), RolloutSamples(SAMPLES)],
    )
    trainer.run_record.dataset_name = "generated word problems"
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        bar.close()
    return trainer


class _Bar(TrainerCallback):
    """A progress bar that shows the accuracy on some of the held-out problems."""

    def __init__(self, label: str):
        self._bar = tqdm(desc=label, unit="step")

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar.total = state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_accuracy" in (logs or {}):
            self._bar.set_postfix(accuracy=f"{logs['eval_accuracy']:.2f}")

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
