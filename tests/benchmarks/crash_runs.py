"""The runs that `crash.py` kills, the phase that a run is in, and the comparison of two runs."""

import json
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers.trainer import safe_globals
from transformers.trainer_utils import get_last_checkpoint

from trl_opd import AccuracyCallback, Controls, OPDTrainer, RockSet, RolloutSamples, TokenStats
from trl_opd.artefacts.run_files import MANIFEST_FILE, TOKEN_STATS_FILE, checkpoint_step
from trl_opd.artefacts.token_stats import COUNTS, SUMS
from trl_opd.cli import main
from trl_opd.rocks.rock_set import Rock
from trl_opd.saving.checkpoints import find_fault, newest_complete

from tests.helpers.tiny import PROMPTS, make_config, make_dataset, make_model, make_tokenizer

PHASES = ("other", "generation", "teacher", "backward", "saving")
STEPS = 6
SAVE_STEPS = 2
# Endings of metrics that are not compared: times, throughput, and means over the steps of one process.
UNEQUAL = ("_s", "_runtime", "_per_second", "step_time", "train_loss")


class Phases:
    """The phase that a process is in and how often it entered each phase, in memory shared with its parent."""

    def __init__(self):
        self._shared = mmap.mmap(-1, 4 * (len(PHASES) + 1))

    def now(self) -> str:
        return PHASES[self._get(0)]

    def entered(self, phase: str) -> int:
        """Return how often the process entered a phase."""
        return self._get(1 + PHASES.index(phase))

    def clear(self) -> None:
        self._shared[:] = bytes(len(self._shared))

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before = self._get(0)
        place = PHASES.index(phase)
        self._put(1 + place, self.entered(phase) + 1)
        self._put(0, place)
        try:
            yield
        finally:
            self._put(0, before)

    def _get(self, place: int) -> int:
        return int.from_bytes(self._shared[4 * place : 4 * place + 4], "little")

    def _put(self, place: int, value: int) -> None:
        self._shared[4 * place : 4 * place + 4] = value.to_bytes(4, "little")


@dataclass(frozen=True)
class Job:
    """A run to kill: `run` starts or resumes it, `differences` compares its folder with that of a run never killed."""

    name: str
    run: Callable[[Path, Phases], None]
    differences: Callable[[Path, Path, list[int]], list[str]]
    resumed_from: Callable[[Path], list[int]] = field(default=lambda folder: [])


class Watched(OPDTrainer):
    """A trainer that records the phase that it is in."""

    phases: Phases

    def _generate_and_score_completions(self, inputs):
        with self.phases.within("generation"):
            return super()._generate_and_score_completions(inputs)

    def training_step(self, *args, **kwargs):
        with self.phases.within("backward"):
            return super().training_step(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self.phases.within("saving"):
            super()._save_checkpoint(*args, **kwargs)


def even(completions, **_) -> list[float]:
    """Return 1 for completions of even length."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [float(len(text) % 2 == 0) for text in texts]


def rock_file(path: Path) -> str:
    """Write a rock set of some byte tokens, with controls, and return its path."""
    rocks = [Rock(id, None, 1, 1.0, 1.0) for id in range(60, 180)]
    RockSet(
        rocks=rocks,
        tokenizer={"name": None, "vocab_size": 300, "fingerprint": None},
        measure={"divergence": "reverse_kl", "temperature": 1.0},
        method={"score": "aggregate", "top_k": len(rocks)},
        corpus={"tokens": 1000, "kl_sum": 500.0},
        controls=Controls(list(range(200, 240)), 1.0, True),
    ).save(path)
    return str(path)


def make_trainer(kind: str, folder: Path, phases: Phases) -> Watched:
    """Return the trainer of a run: of a LoRA student, of a whole student, or on a streaming dataset."""
    torch.manual_seed(11)
    model = make_model(seed=0, attention_dropout=0.1)
    with torch.no_grad():  # so that some rollouts end, and some are cut
        model.lm_head.weight[2] *= 4
    settings = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_strategy": "steps", "save_occurrences": 1}
    data = make_dataset(6)
    callbacks = [RolloutSamples(2)]
    others = {}
    if kind == "lora":
        settings |= {"token_weighting": "rock", "rock_set": rock_file(folder.parent / "rocks.json"), "rock_window": 1}
        settings |= {"num_generations": 2, "save_total_limit": 1}
        callbacks.append(AccuracyCallback(make_dataset(5), even, eval_steps=3, greedy=False))
        others["peft_config"] = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    elif kind == "full":
        settings |= {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "mask_truncated_completions": True}
        settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5}
        others["eval_dataset"] = make_dataset(3)
    elif kind == "stream":
        rows = list(make_dataset(6, chat=False))
        data = IterableDataset.from_generator(lambda: iter(rows))
        settings |= {"token_weighting": "random", "rock_set": rock_file(folder.parent / "rocks.json")}
        settings |= {"num_generations": 2, "rock_weight": 0.5, "teacher_placement": "parked"}
    trainer = Watched(
        model=model,
        teacher_model=make_model(seed=1, width=64),
        args=make_config(folder, **settings),
        train_dataset=data,
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        **others,
    )
    trainer.phases = phases
    teacher_states = trainer.model_pair.teacher_states
    score = teacher_states.compute_states

    def score_watched(batch):
        with phases.within("teacher"):
            return score(batch)

    teacher_states.compute_states = score_watched
    return trainer


def train(kind: str) -> Callable[[Path, Phases], None]:
    """Return a function that runs a training over several epochs, and resumes if there is a complete checkpoint."""

    def run(folder: Path, phases: Phases) -> None:
        trainer = make_trainer(kind, folder, phases)
        complete = newest_complete(folder)
        if complete is None:
            trainer.train()
        else:
            with resumed_file(folder).open("a") as file:
                file.write(f"{checkpoint_step(complete)}\n")
            trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))  # as TRL's scripts do
        trainer.save_model()

    return run


def resumed_file(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.resumed"


def resumed_from(folder: Path) -> list[int]:
    """Return the steps from which a training was resumed."""
    path = resumed_file(folder)
    return list(map(int, path.read_text().split())) if path.is_file() else []


def compare_trainings(whole: Path, killed: Path, resumed: list[int]) -> list[str]:
    """Return what differs between the folders of two trainings, which must be bit-identical."""
    return (
        _compare_checkpoints(whole, killed, resumed)
        + _compare_results(whole, killed)
        + _compare_logs(whole, killed, resumed)
        + left_behind(killed)
    )


def _compare_checkpoints(whole: Path, killed: Path, resumed: list[int]) -> list[str]:
    names = sorted(path.name for path in whole.glob("checkpoint-*"))
    names_of_killed = sorted(path.name for path in killed.glob("checkpoint-*"))
    if names != names_of_killed:
        return [f"checkpoints {names} and {names_of_killed}"]
    found = []
    for name in names:
        fault = find_fault(killed / name)
        if fault is not None:
            found.append(f"{name} {fault}")
        for path in sorted((whole / name).iterdir()):
            if path.name in (MANIFEST_FILE, "README.md", "training_args.bin"):
                continue
            if _contents(path, resumed) != _contents(killed / name / path.name, resumed):
                found.append(f"{name}/{path.name}")
    return found


def _compare_results(whole: Path, killed: Path) -> list[str]:
    found = []
    for pattern in ("*model.safetensors", "occurrences/*.parquet", "rollout_samples.parquet"):
        paths = sorted(path.relative_to(whole) for path in whole.glob(pattern))
        paths_of_killed = sorted(path.relative_to(killed) for path in killed.glob(pattern))
        if not paths or paths != paths_of_killed:
            found.append(f"{pattern}: {paths} and {paths_of_killed}")
        else:
            found += [str(path) for path in paths if not _is_same_file(whole / path, killed / path)]
    return found


def _compare_logs(whole: Path, killed: Path, resumed: list[int]) -> list[str]:
    logs = []
    for folder in (whole, killed):
        record = json.loads((folder / "opd_run.json").read_text())
        logs.append(_log(record["log"], resumed))
    return [] if logs[0] and logs[0] == logs[1] else ["opd_run.json: log"]


def _is_same_file(one: Path, other: Path) -> bool:
    """Return whether two files have the same content: Parquet row by row, JSON without times, others byte by byte."""
    if one.suffix == ".parquet":
        return pq.read_table(one).equals(pq.read_table(other))
    if one.suffix == ".json":
        return _without_times(json.loads(one.read_text())) == _without_times(json.loads(other.read_text()))
    return one.read_bytes() == other.read_bytes()


def left_behind(folder: Path) -> list[str]:
    """Return the temporary files that a killed process left and nothing removed."""
    names = [path.name for path in folder.rglob("*")]
    return [f"left behind: {name}" for name in names if name.endswith(".part") or name.startswith(("_", ".k.json"))]


def _contents(path: Path, resumed: list[int]):
    """Return the content of a checkpoint's file as values that can be compared, or its bytes."""
    if path.name == TOKEN_STATS_FILE:  # its header has a different order each time
        stats = TokenStats.load(path)
        return stats.measure, [_plain(getattr(stats, name)) for name in (*COUNTS, *SUMS)]
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        state["log_history"] = _log(state["log_history"], resumed)
        return state
    if path.suffix in (".pt", ".pth"):
        with safe_globals():  # allows NumPy's RNG state
            return _plain(torch.load(path, weights_only=True))
    return path.read_bytes()


def _plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _log(lines: list[dict], resumed: list[int]) -> list[dict]:
    """Return the lines of a log without times, and only the step of a line if a run resumed within its window."""
    found = []
    start = 0  # of the window over which a line of the training is a mean
    for line in lines:
        step = line["step"]
        was_split = False
        if "loss" in line:
            was_split = any(start < one < step for one in resumed)
            start = step
        if was_split:
            found.append({"step": step})
        else:
            found.append({key: value for key, value in line.items() if not key.endswith(UNEQUAL)})
    return found


def write_world(folder: Path) -> Path:
    """Write a student, a teacher, problems and a rock set for the commands, and return the folder."""
    for name, seed in (("student", 0), ("teacher", 1)):
        make_model(seed=seed, width=64).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    texts = [f"{prompt} {number}" for number in range(5) for prompt in PROMPTS]
    rows = [{"prompt": text, "answer": "1"} for text in texts]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rock_file(folder / "rock_set.json")
    return folder


def command(name: str, world: Path) -> Callable[[Path, Phases], None]:
    """Return a function that runs a command, which resumes when it is started again with the same folder."""
    student = f"--model_name_or_path {world}/student --dataset_name {world}/problems.jsonl --max_completion_length 24"
    argv = {
        "collect": f"{student} --teacher_model_name_or_path {world}/teacher --per_device_eval_batch_size 2 "
        "--num_generations 2 --use_cpu --bf16 false --report_to none --output_dir {folder}",
        "probe": f"{student} --rock_set {world}/rock_set.json --temperature 0.9 --use_cpu "
        "--reward tests.benchmarks.crash_runs.even --output {folder}/k.json",
        "demo": "--steps 6 --output_dir {folder}",
    }[name]

    def run(folder: Path, phases: Phases) -> None:
        folder.mkdir(exist_ok=True)
        if code := main([name, *argv.replace("{folder}", str(folder)).split()]):
            raise SystemExit(code)

    return run


def compare_files(*patterns: str) -> Callable[[Path, Path, list[int]], list[str]]:
    """Return a function that compares the files of these patterns in two folders."""

    def differences(whole: Path, killed: Path, _resumed: list[int]) -> list[str]:
        paths = sorted(path.relative_to(whole) for pattern in patterns for path in whole.glob(pattern))
        found = [] if paths else ["nothing was written"]
        for path in paths:
            if not (killed / path).is_file():
                found.append(f"{path} is missing")
            elif not _is_same_file(whole / path, killed / path):
                found.append(str(path))
        return found + left_behind(killed)

    return differences


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if "seconds" not in key and key != "output"}
    if isinstance(value, list):
        return [_without_times(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def jobs(what: str, work: Path) -> list[Job]:
    """Return the jobs of a name: `train` (three different ones), `collect`, `probe` or `demo`."""
    if what == "train":
        return [Job(kind, train(kind), compare_trainings, resumed_from) for kind in ("lora", "full", "stream")]
    files = {
        "collect": ("occurrences.parquet", "prompts.parquet"),
        "probe": ("k.json",),
        "demo": ("summary.json", "rock_set.json", "*/model.safetensors"),
    }
    world = work / "world"
    world.mkdir()
    return [Job(what, command(what, write_world(world)), compare_files(*files[what]))]
