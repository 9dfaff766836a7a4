"""Runs one arm of the demo: distils the shipped student, evaluates it, and saves student and result."""

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
ROLLOUTS = 64  # per optimizer step
MAX_COMPLETION = 56  # tokens; a right answer has about 40
EVAL_PROBLEMS = 500
EVAL_SEED = 20260523
CURVE_PROBLEMS = 100  # the first of the evaluation's problems, solved for each point of the accuracy curve
SAMPLES = 2  # rollouts to keep at each log
WINDOWS = 8  # of token statistics, and points of the curves
RESULT = "result.json"
MARKER = ".trl_opd_demo"  # an empty file in every folder that a demo made


@dataclass(frozen=True)
class ArmResult:
    """Result of an arm, as its `result.json` has it.

    Args:
        settings (`dict`): Settings that the result depends on.
        correct (`list[bool]`): Which held-out problems the student solved.
        curve (`list[tuple[int, float]]`): Steps of the training, and accuracy at each on the first of these problems.
        seconds (`float`): Seconds of training and evaluation.
        frozen_token_share (`float`): Share of the tokens that had weight 0 in the loss.
    """

    settings: dict
    correct: list[bool]
    curve: list[tuple[int, float]]
    seconds: float
    frozen_token_share: float

    @property
    def accuracy(self) -> float:
        """Share of the held-out problems that the student solved with greedy decoding."""
        return sum(self.correct) / len(self.correct)


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the shipped model "teacher" or "student" in float32 on the CPU, and its tokenizer."""
    folder = MODELS / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def eval_problems() -> list[Problem]:
    """Return the held-out problems, whose operands never occur in training."""
    return draw_problems(EVAL_PROBLEMS, EVAL_SEED, held_out=True)


@torch.no_grad()
def solve(model: PreTrainedModel, tokenizer, problems: list[Problem]) -> list[bool]:
    """Return which problems the model solves with greedy decoding."""
    was_training = model.training
    model.eval()
    questions = [problem.question for problem in problems]
    inputs = tokenizer(questions, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_COMPLETION, do_sample=False)
    model.train(was_training)

    prompt_length = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [is_right(problem, text) for problem, text in zip(problems, texts, strict=True)]


def run_arm(arm: str, folder: Path, *, seed: int, steps: int, rock_set: Path | None, label: str) -> ArmResult:
    """Distil one arm, or return the result of a finished one with the same settings.

    Args:
        arm (`str`): "uniform", "rock", "control" or "random": the trainer's `token_weighting`.
        folder (`Path`): Where to save checkpoints, student and result.
        seed (`int`): Seed of prompts and rollouts.
        steps (`int`): Optimizer steps.
        rock_set (`Path`, *optional*): File of the rock set; `None` for the uniform arm.
        label (`str`): Text beside the progress bar.

    Raises:
        `ValueError`: if the folder has files that no demo made.
    """
    rocks = None if rock_set is None else json.loads(rock_set.read_text(encoding="utf-8"))
    weights = {}
    for path in MODELS.glob("*/*.safetensors"):
        weights[path.parent.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = {"arm": arm, "seed": seed, "steps": steps, "rollouts": ROLLOUTS, "rock_set": rocks, "weights": weights}

    finished = read_result(folder)
    if finished is not None and finished.settings == settings:
        saved_steps = [step for step, _ in find_checkpoints(folder)]
        if saved_steps and saved_steps[-1] == steps:
            return finished

    _clear(folder)
    started = time.perf_counter()
    trainer = distil(arm, folder, seed=seed, steps=steps, rock_set=rock_set, label=label)
    trainer.save_model()
    correct = solve(trainer.model, trainer.processing_class, eval_problems())

    # A plain mean of the log lines is right, because all but the last cover equally many steps.
    shares = []
    curve = []
    for line in trainer.state.log_history:
        if "weight/zero_share" in line:
            shares.append(line["weight/zero_share"])
        if "eval_accuracy" in line:
            curve.append((line["step"], line["eval_accuracy"]))
    result = ArmResult(
        settings=settings,
        correct=correct,
        curve=curve,
        seconds=time.perf_counter() - started,
        frozen_token_share=sum(shares) / len(shares),
    )
    write_json(folder / RESULT, asdict(result))
    return result


def _clear(folder: Path) -> None:
    """Remove an earlier arm from a folder; raise `ValueError` if the folder has files but not the marker of a demo."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    if any(folder.iterdir()) and not marker.exists():
        raise ValueError(f"{folder} holds files that are not the demo's: choose another --output_dir.")
    marker.touch()
    (folder / RESULT).unlink(missing_ok=True)
    (folder / ROCK_SET_FILE).unlink(missing_ok=True)  # an arm of another seed has other rocks
    for _, checkpoint in find_checkpoints(folder):
        shutil.rmtree(checkpoint)


def read_result(folder: Path) -> ArmResult | None:
    """Return the result of a finished arm; `None` if it is missing or cannot be read."""
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        result = ArmResult(
            settings=content["settings"],
            correct=[solved for solved in content["correct"] if isinstance(solved, bool)],
            curve=[(int(step), float(value)) for step, value in content["curve"]],
            seconds=float(content["seconds"]),
            frozen_token_share=float(content["frozen_token_share"]),
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    if len(result.correct) != EVAL_PROBLEMS or not result.curve:
        return None
    return result


def distil(arm: str, folder: Path, *, seed: int, steps: int, rock_set: Path | None, label: str) -> OPDTrainer:
    """Train an arm and return its trainer; the arguments are those of [`run_arm`]."""
    student, tokenizer = load("student")
    teacher, _ = load("teacher")
    every = max(1, steps // WINDOWS)
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
    problems = draw_problems(steps * ROLLOUTS, seed, held_out=False)
    prompts = Dataset.from_dict({"prompt": [problem.question for problem in problems]})
    curve_rows = []
    for problem in eval_problems()[:CURVE_PROBLEMS]:
        curve_rows.append({"prompt": problem.question, "answer": str(problem.answer)})
    accuracy = AccuracyCallback(Dataset.from_list(curve_rows), solved, eval_steps=every)
    bar = _Bar(label)
    trainer = OPDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=[bar, accuracy, RolloutSamples(SAMPLES)],
    )
    trainer.run_record.dataset_name = "generated word problems"
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        bar.close()
    return trainer


class _Bar(TrainerCallback):
    """Progress bar over the steps that also shows the last accuracy on the held-out problems."""

    def __init__(self, label: str):
        self._bar = tqdm(desc=label, unit="step", delay=0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar.total = state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "eval_accuracy" in logs:
            self._bar.set_postfix(accuracy=f"{logs['eval_accuracy']:.2f}")

    def close(self) -> None:
        """Close the bar, so that what follows is printed below it."""
        self._bar.close()
