"""What `crash.py` kills: small real runs, the phase that they are in, and how the results of two are compared."""

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
from trl_opd.artefacts.run_files import MANIFEST_FILE as FILE_NAME
from trl_opd.artefacts.run_files import TOKEN_STATS_FILE
from trl_opd.artefacts.token_stats import COUNTS, SUMS
from trl_opd.cli import main
from trl_opd.rocks.rock_set import Rock
from trl_opd.saving.checkpoints import find_fault

from tests.helpers.tiny import PROMPTS, make_config, make_dataset, make_model, make_tokenizer

PHASES = ("other", "generation", "teacher", "backward", "saving")
STEPS, SAVE_STEPS = 8, 2
# Not a function of what was trained: times, throughput, and means over the steps of one process.
UNEQUAL = ("_s", "_runtime", "_per_second", "step_time", "train_loss")


class Phases:
    """The phase that a process is in and how often it has entered each, in memory that its parent sees."""

    def __init__(self):
        self._shared = mmap.mmap(-1, 4 * (len(PHASES) + 1))

    def now(self) -> str:
        return PHASES[self._get(0)]

    def entered(self, phase: str) -> int:
        """Return how often a phase was entered."""
        return self._get(1 + PHASES.index(phase))

    def clear(self) -> None:
        self._shared[:] = bytes(len(self._shared))

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, place = self._get(0), PHASES.index(phase)
        self._put(1 + place, self._get(1 + place) + 1)
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
    """Something to kill: `run` starts it or goes on, `differences` tells what two folders do not have in common."""

    name: str
    run: Callable[[Path, Phases], None]
    differences: Callable[[Path, Path, list[int]], list[str]]
    resumed_from: Callable[[Path], list[int]] = field(default=lambda folder: [])


class Watched(OPDTrainer):
    """Tells in which phase it is."""

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
    unnamed = {"name": None, "vocab_size": 300, "fingerprint": None}
    measure, method = {"divergence": "reverse_kl", "temperature": 1.0}, {"score": "aggregate", "top_k": len(rocks)}
    corpus = {"tokens": 1000, "kl_sum": 500.0}
    RockSet(rocks, unnamed, measure, method, corpus, Controls(list(range(200, 240)), 1.0, True)).save(path)
    return str(path)


def train(kind: str) -> Callable[[Path, Phases], None]:
    """Return a training over several epochs that goes on as a script lets it: from the newest checkpoint, if any."""

    def run(folder: Path, phases: Phases) -> None:
        torch.manual_seed(11)
        model, changes, data = make_model(seed=0, attention_dropout=0.1), {}, make_dataset(6)
        with torch.no_grad():  # some rollouts end, and some are cut
            model.lm_head.weight[2] *= 4
        callbacks = [RolloutSamples(2)]
        if kind == "lora":
            changes = {"token_weighting": "rock", "rock_set": rock_file(folder.parent / "rocks.json")}
            changes |= {"num_generations": 2, "rock_window": 1, "save_total_limit": 1}
            callbacks.append(AccuracyCallback(make_dataset(5), even, eval_steps=3, greedy=False))
        elif kind == "full":
            changes = {
                "eval_strategy": "steps",
                "eval_steps": 3,
                "logging_steps": 3,
                "mask_truncated_completions": True,
            }
            changes |= {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5}
        elif kind == "stream":
            rows = list(make_dataset(6, chat=False))
            data, changes = IterableDataset.from_generator(lambda: iter(rows)), {"num_generations": 2}
            changes |= {"token_weighting": "random", "rock_weight": 0.5, "teacher_placement": "parked"}
            changes["rock_set"] = rock_file(folder.parent / "rocks.json")
        config = make_config(
            folder,
            **{"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_strategy": "steps", "save_occurrences": 1} | changes,
        )
        trainer = Watched(
            model=model,
            teacher_model=make_model(seed=1, width=64),
            args=config,
            train_dataset=data,
            eval_dataset=make_dataset(3) if kind == "full" else None,
            processing_class=make_tokenizer(),
            callbacks=callbacks,
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if kind == "lora" else None,
        )
        trainer.phases = phases
        teacher_states = trainer.model_pair.teacher_states
        score = teacher_states.compute_states

        def score_watched(batch):
            with phases.within("teacher"):
                return score(batch)

        teacher_states.compute_states = score_watched
        found = get_last_checkpoint(folder) if folder.is_dir() else None
        whole = found and any(find_fault(path) is None for path in folder.glob("checkpoint-*"))
        if whole:
            steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if find_fault(path) is None]
            with (folder.parent / f"{folder.name}.resumed").open("a") as file:
                file.write(f"{max(steps)}\n")
        trainer.train(resume_from_checkpoint=found if whole else None)
        trainer.save_model()

    return run


def resumed_from(folder: Path) -> list[int]:
    """Return the steps from which a training went on."""
    path = folder.parent / f"{folder.name}.resumed"
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def compare_trainings(whole: Path, killed: Path, resumed: list[int]) -> list[str]:
    """Return what the folders of two trainings do not have in common; equal to the bit is what they have to be."""
    found = []
    names = [sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (whole, killed)]
    if names[0] != names[1]:
        found.append(f"checkpoints {names[0]} and {names[1]}")
    for name in set(names[0]) & set(names[1]):
        found += [f"{name} {reason}" for reason in (find_fault(killed / name),) if reason]
        for path in sorted((whole / name).iterdir()):
            if path.name not in (FILE_NAME, "README.md", "training_args.bin"):
                same = _contents(path, resumed) == _contents(killed / name / path.name, resumed)
                found += [] if same else [f"{name}/{path.name}"]
    for pattern in ("*model.safetensors", "occurrences/*.parquet", "rollout_samples.parquet"):
        paths = [sorted(path.relative_to(folder) for path in folder.glob(pattern)) for folder in (whole, killed)]
        if not paths[0] or paths[0] != paths[1]:
            found.append(f"{pattern}: {paths[0]} and {paths[1]}")
            continue
        for path in paths[0]:
            same = (
                pq.read_table(whole / path).equals(pq.read_table(killed / path))
                if path.suffix == ".parquet"
                else (whole / path).read_bytes() == (killed / path).read_bytes()
            )
            found += [] if same else [str(path)]
    lines = [_log(json.loads((folder / "opd_run.json").read_text())["log"], resumed) for folder in (whole, killed)]
    found += [] if lines[0] == lines[1] and lines[0] else ["opd_run.json: log"]
    return found + left_behind(killed)


def left_behind(folder: Path) -> list[str]:
    """Return the temporary files of a killed process that are still there."""
    names = [path.name for path in folder.rglob("*")]
    return [f"left behind: {name}" for name in names if name.endswith(".part") or name.startswith(("_", ".k.json"))]


def _contents(path: Path, resumed: list[int]):
    """Return what a file of a checkpoint holds in a form that compares by value, or its bytes."""
    if path.name == TOKEN_STATS_FILE:  # the order of its header is drawn anew each time
        stats = TokenStats.load(path)
        return stats.measure, [_plain(getattr(stats, name)) for name in (*COUNTS, *SUMS)]
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        state["log_history"] = _log(state["log_history"], resumed)
        return state
    if path.suffix in (".pt", ".pth"):
        with safe_globals():  # of NumPy's random state
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
    """Return the lines of a log without times; of those whose window a resumed run began within, the step only."""
    found, window = [], 0
    for line in lines:
        crossed = "loss" in line and any(window < step < line["step"] for step in resumed)
        window = line["step"] if "loss" in line else window
        kept = {key: value for key, value in line.items() if not key.endswith(UNEQUAL)}
        found.append({"step": line["step"]} if crossed else kept)
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
    """Return a command that writes its result to a folder, and goes on there when it is started again."""
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
    """Return a comparison of files: Parquet row by row, JSON without times, others byte by byte."""

    def differences(whole: Path, killed: Path, _resumed: list[int]) -> list[str]:
        paths = sorted(path.relative_to(whole) for pattern in patterns for path in whole.glob(pattern))
        found = [] if paths else ["nothing was written"]
        for path in paths:
            if not (killed / path).is_file():
                found.append(f"{path} is missing")
            elif path.suffix == ".parquet":
                same = pq.read_table(whole / path).equals(pq.read_table(killed / path))
                found += [] if same else [str(path)]
            elif path.suffix == ".json":
                ours, theirs = (_without_times(json.loads((folder / path).read_text())) for folder in (whole, killed))
                found += [] if ours == theirs else [str(path)]
            elif (whole / path).read_bytes() != (killed / path).read_bytes():
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
    """Return the jobs of a name: `train` (three kinds), `collect`, `probe` or `demo`."""
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
