"""Which checkpoints are complete, how killed runs resume, and what a full disk or a signal leaves behind."""

import errno
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer
from transformers import trainer as trainer_module
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl.trainer.utils import RepeatSampler

from trl_opd import OPDTrainer
from trl_opd.artefacts import atomic
from trl_opd.artefacts.hub import HubError
from trl_opd.artefacts.run_files import MANIFEST_FILE
from trl_opd.cli import main
from trl_opd.rollouts.data_order import EpochRepeatSampler
from trl_opd.saving.checkpoints import find_fault, is_checkpoint, resolve_checkpoint, write_manifest

from tests.benchmarks.crash_runs import write_world
from tests.helpers.command_line import error_of, flags
from tests.helpers.full_disk import full_disk
from tests.helpers.paths import ROOT
from tests.helpers.trainers import build

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    build(folder, **SAVING).train()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of that folder, to break."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def cut(folder: Path, name: str = "optimizer.pt") -> None:
    """Cut a checkpoint's file, as a kill in the middle of writing does."""
    os.truncate(folder / name, 100)


def unfinish(folder: Path) -> None:
    """Leave what is left of a checkpoint when its process is killed while it writes the optimizer."""
    for name in (MANIFEST_FILE, "trainer_state.json", "rng_state.pth", "scheduler.pt"):
        (folder / name).unlink()
    cut(folder)


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".part") or path.name.startswith("_saving")]


# Complete checkpoints


def test_a_checkpoint_lists_every_file_with_its_size(run):
    for step in (2, 4):
        folder = run / f"checkpoint-{step}"
        listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST_FILE}
        assert listed == sizes
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "token_stats.safetensors"} <= sizes.keys()
        assert find_fault(folder) is None


def test_cut_damaged_or_missing_file_makes_a_checkpoint_incomplete_but_not_a_longer_one(copy):
    folder = copy / "checkpoint-4"
    for name in (*STATES, "model.safetensors", "trainer_state.json"):
        file = folder / name
        content = file.read_bytes()
        cut(folder, name)
        assert find_fault(folder) == f"its {name} has 100 of {len(content)} bytes"
        file.unlink()
        assert find_fault(folder) == f"its {name} is gone"
        if name in STATES:
            for damaged in (b"noise" * 100, content[: len(content) // 2]):
                file.write_bytes(damaged)
                write_manifest(folder)
                assert find_fault(folder) == f"its {name} is damaged"
        file.write_bytes(content + b"\n")
        assert find_fault(folder) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"format": "x", "files": {"a": 1}}',
        '{"files": []}',
        '{"format": "trl_opd.checkpoint", "files": {}}',
        '{"format": "trl_opd.checkpoint", "files": {"a": "1"}}',
    ],
    ids=range(8),
)
def test_broken_manifest_is_damage(tmp_path, content):
    (tmp_path / MANIFEST_FILE).write_text(content)
    assert find_fault(tmp_path) == f"its {MANIFEST_FILE} is damaged"


def test_manifest_is_written_before_a_checkpoint_is_pushed_and_older_ones_are_deleted(tmp_path, monkeypatch):
    seen = []

    class Pushing(OPDTrainer):
        def _push_from_checkpoint(self, checkpoint_folder):
            seen.append(("pushed", find_fault(checkpoint_folder)))

    rotate = trainer_module.rotate_checkpoints

    def rotate_seen(output_dir, **kwargs):
        seen.append(("rotated", find_fault(get_last_checkpoint(output_dir))))
        rotate(output_dir, **kwargs)

    monkeypatch.setattr(trainer_module, "rotate_checkpoints", rotate_seen)
    trainer = build(tmp_path, cls=Pushing, save_total_limit=1, **SAVING)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    trainer.train()
    assert seen == [("pushed", None), ("rotated", None)] * 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), HubError("Could not push to user/student: refused.")])
def test_errors_other_than_failed_writes_pass_unchanged(tmp_path, error):
    trainer = build(tmp_path, **SAVING | {"max_steps": 2})

    def fail(folder):
        raise error

    trainer._save_optimizer_and_scheduler = fail
    with pytest.raises(type(error), match=str(error)):
        trainer.train()
    assert "save_to_json" not in vars(trainer.state)


# The checkpoint to resume from


def test_newest_checkpoint_means_the_newest_complete_one(copy):
    newest = get_last_checkpoint(copy)
    assert newest == str(copy / "checkpoint-4")
    assert resolve_checkpoint(True, copy) == newest
    unfinish(copy / "checkpoint-4")
    for resume in (True, newest):
        with pytest.warns(UserWarning, match=r"checkpoint-4 is incomplete .*: the run resumes from checkpoint-2\."):
            assert resolve_checkpoint(resume, copy) == str(copy / "checkpoint-2")
    for resume in (None, False):
        assert resolve_checkpoint(resume, copy) is None


def test_resuming_from_a_checkpoint_without_optimizer_warns(copy):
    for name in STATES:
        (copy / "checkpoint-4" / name).unlink()
    write_manifest(copy / "checkpoint-4")
    message = r"checkpoint-4 holds the model only .*: optimizer and learning-rate schedule start"
    with pytest.warns(UserWarning, match=message):
        assert resolve_checkpoint(True, copy) == str(copy / "checkpoint-4")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("checkpoint-4", True), ("checkpoint-qwen", False), ("checkpoint-4-b", False), ("run", False)],
)
def test_folder_is_a_checkpoint_if_its_name_ends_in_a_step(tmp_path, name, expected):
    assert is_checkpoint(tmp_path / name) == expected


def test_checkpoints_are_ordered_by_number_and_not_by_name(tmp_path):
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "a").write_text("a")
        write_manifest(folder)
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    assert resolve_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-10")


def test_older_incomplete_checkpoint_that_the_user_names_is_an_error(copy):
    cut(copy / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 is incomplete: its optimizer.pt has 100 of \d+ bytes"):
        resolve_checkpoint(copy / "checkpoint-2", copy)
    assert resolve_checkpoint(copy / "checkpoint-4", copy) == str(copy / "checkpoint-4")


def test_no_complete_checkpoint_is_an_error(copy, tmp_path):
    for step in (2, 4):
        unfinish(copy / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is complete .*Start without resume_from_checkpoint"):
        resolve_checkpoint(True, copy)
    with pytest.raises(ValueError, match="checkpoint-4 is incomplete"):
        resolve_checkpoint(get_last_checkpoint(copy), copy)
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        resolve_checkpoint(True, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_checkpoint(copy / "checkpoint-6", copy)


def test_checkpoint_of_another_trainer_is_used_only_if_the_user_names_it(copy):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match="To use a checkpoint of another trainer, pass its folder"):
        resolve_checkpoint(True, copy)
    with pytest.warns(UserWarning, match="another trainer seems to have written it"):
        assert resolve_checkpoint(copy / "checkpoint-2", copy) == str(copy / "checkpoint-2")


def test_sampler_repeats_trls_order_and_starts_at_the_epoch_of_a_resumed_run():
    settings = {"data_source": range(50), "mini_repeat_count": 1, "shuffle": True, "seed": 3}
    trls = RepeatSampler(**settings)
    orders = [list(trls) for _ in range(3)]
    for complete in (0, 1):
        ours = EpochRepeatSampler(epoch=lambda complete=complete: complete, **settings)
        assert [list(ours) for _ in orders[complete:]] == orders[complete:]


# Killed and resumed


def test_step_that_a_resumed_run_saves_again_is_incomplete_meanwhile_and_ends_bit_identical(run, copy):
    trainer = build(copy, **SAVING)
    seen = []
    save = trainer._save_optimizer_and_scheduler

    def save_seen(folder):
        seen.append(find_fault(folder))
        save(folder)

    trainer._save_optimizer_and_scheduler = save_seen
    trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert seen == [f"it has no {MANIFEST_FILE}, so its saving was not finished"]
    models = [(folder / "checkpoint-4" / "model.safetensors").read_bytes() for folder in (run, copy)]
    assert models[0] == models[1]
    assert find_fault(copy / "checkpoint-4") is None


@pytest.mark.slow
@pytest.mark.processes
def test_killed_runs_go_on_and_end_equal_to_the_bit():
    """`tests/benchmarks/crash.py` with as many runs as a test can afford: see docs/reliability.md for more."""
    command = [sys.executable, "-m", "tests.benchmarks.crash", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 equal, 0 different." in done.stdout
    kills = re.search(r"3 runs, (\d+) kills", done.stdout)
    assert int(kills[1]) >= 3
    assert "killed in saving" in done.stdout


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
@pytest.mark.slow
def test_signal_ends_a_training_and_the_message_says_how_to_resume(world, tmp_path, capsys, number, word, code):
    out = tmp_path / "out"
    ended = threading.Event()

    def send():
        until = time.monotonic() + 60
        while not (out / "checkpoint-2" / MANIFEST_FILE).exists() and time.monotonic() < until:
            time.sleep(0.01)
        # Python loses an exception that a handler raises within a destructor, so ask again.
        while not ended.is_set() and time.monotonic() < until:
            os.kill(os.getpid(), number)
            ended.wait(10)

    # A shell starts background jobs with SIGINT ignored, and Python then has no handler for it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert main(["train", *flags(world, out, **SAVING | {"max_steps": 400})]) == code
    finally:
        ended.set()
        sender.join()
        signal.signal(signal.SIGINT, inherited)
    error = capsys.readouterr().err
    assert f"trl-opd train: {word}: its checkpoints are kept, pass --resume_from_checkpoint to resume" in error
    assert "Traceback" not in error
    assert not (out / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == before

    last = int(Path(resolve_checkpoint(True, out)).name.split("-")[1])
    resuming = SAVING | {"max_steps": last + 1, "resume_from_checkpoint": True}
    assert main(["train", *flags(world, out, **resuming)]) == 0
    assert (out / "model.safetensors").exists()
    assert not temporary(out)


FORKED = """
import os, signal, sys, time
from trl_opd.cli import _ended_by_sigterm
with _ended_by_sigterm():
    child = os.fork()
    if child == 0:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            os._exit(3)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.processes
@pytest.mark.slow
def test_sigterm_ends_a_forked_process_as_without_our_handler():
    """`multiprocessing.Pool` and the worker processes of a reward end their children with this signal."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["ready", str(-signal.SIGTERM)]


# Full disks


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A run of the command line with a checkpoint of step 1."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(["train", *flags(world, out, save_strategy="steps", save_steps=1, max_steps=1)]) == 0
    return out


@pytest.fixture
def resumable(trained, tmp_path) -> Path:
    """A copy of that run, to resume or to break."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


RESUMING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "resume_from_checkpoint": True}


@pytest.mark.slow
def test_full_disk_while_saving_a_checkpoint_keeps_the_one_before(world, resumable, capsys):
    sizes = {path.name: path.stat().st_size for path in (resumable / "checkpoint-1").iterdir()}
    assert 300_000 < sizes["model.safetensors"] < 700_000 < sizes["optimizer.pt"]
    before = (resumable / "model.safetensors").read_bytes()
    command = ["train", *flags(world, resumable, **RESUMING)]
    for room in (300_000, 700_000):  # too little for the model, and for the optimizer
        with full_disk(room):
            message = error_of(command, capsys)
        assert message.startswith(f"{resumable}/checkpoint-2 cannot be written: ")
        assert message.endswith("checkpoint-1 is complete: make room, then resume from it with resume_from_checkpoint.")
        assert (resumable / "model.safetensors").read_bytes() == before
        if (resumable / "checkpoint-2").exists():
            with pytest.warns(UserWarning, match="the run resumes from checkpoint-1"):
                assert resolve_checkpoint(True, resumable) == str(resumable / "checkpoint-1")
    assert main(command) == 0
    assert find_fault(resumable / "checkpoint-2") is None
    assert not temporary(resumable)


@pytest.mark.slow
def test_full_disk_while_saving_the_student_keeps_the_old_one(world, resumable, capsys):
    before = (resumable / "model.safetensors").read_bytes()
    with full_disk(300_000):
        command = ["train", *flags(world, resumable, save_strategy="no", max_steps=1, learning_rate=0.1)]
        assert error_of(command, capsys).startswith(f"{resumable} cannot be written: ")
    assert (resumable / "model.safetensors").read_bytes() == before
    assert not temporary(resumable)


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Models, problems, rocks and collected rollouts."""
    folder = write_world(tmp_path_factory.mktemp("collected"))
    assert main(command_of("collect", folder, folder)) == 0
    return folder


def command_of(name: str, models: Path, out: Path) -> list[str]:
    student = f"--model_name_or_path {models}/student --use_cpu"
    teacher = f"--teacher_model_name_or_path {models}/teacher --bf16 false"
    prompts = f"--dataset_name {models}/problems.jsonl --max_completion_length 8"
    rocks = f"--rock_set {models}/rock_set.json"
    rows = f"{models}/rollouts/occurrences.parquet"
    reward = "--reward tests.benchmarks.crash_runs.even --greedy"
    arguments = {
        "collect": f"{student} {prompts} {teacher} --output_dir {out}/rollouts",
        "detect": f"{rows} --score aggregate --top_k 5 --output {out}/rocks.json",
        "probe": f"{student} {prompts} {rocks} {reward} --output {out}/k.json",
        "gradients": f"{rows} {rocks} {student} {teacher} --output {out}/g.parquet",
        "report": f"{models}/rollouts --output {out}/r.html",
    }
    return [name, *arguments[name].split()]


COMMANDS = ["collect", "detect", "probe", "gradients", "report"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_full_disk_is_an_error_of_every_command_which_works_again_with_room(collected, tmp_path, capsys, name):
    command = command_of(name, collected, tmp_path)
    for room in (10, 600):
        with full_disk(room):
            message = error_of(command, capsys)
        assert re.search(r"cannot be written: .*(File too large|No space)", message)
        assert [path for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith(".")] == []
    assert main(command) == 0
    assert not temporary(tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_folder_without_write_permission_is_an_error(collected, tmp_path, capsys, name):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    error_of(command_of(name, collected, tmp_path), capsys)


@pytest.mark.slow
def test_probe_overwrites_a_journal_cut_in_its_first_line_and_keeps_one_of_another_probe(collected, tmp_path, capsys):
    command = command_of("probe", collected, tmp_path)
    journal = tmp_path / ".k.json.journal.jsonl"
    for content in (b"{}\n", b"\xff\n"):
        journal.write_bytes(content)
        message = error_of(command, capsys)
        assert message.startswith(f"{journal} belongs to an interrupted probe with other settings")
        assert journal.read_bytes() == content
    for content in (b"", b'{"a'):
        journal.write_bytes(content)
        assert main(command) == 0
        assert not journal.exists()


@pytest.mark.slow
def test_damaged_line_of_a_journal_is_named(collected, tmp_path, capsys, monkeypatch):
    journal = tmp_path / ".k.json.journal.jsonl"
    command = command_of("probe", collected, tmp_path)
    monkeypatch.setattr("trl_opd.studies.probe.Probe.close", lambda probe: None)
    assert main(command) == 0
    lines = journal.read_text().splitlines()
    lines[3] = '["token 60", 0]'
    journal.write_text("\n".join(lines) + "\n")
    assert error_of(command, capsys).startswith(f"{journal} is damaged in line 4: remove the file.")


# Files


def test_files_move_to_their_folder_together_and_after_an_error_none_does(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "_saving-left").mkdir()
    with atomic.complete_files(tmp_path) as part:
        (part / "old").write_text("new")
        (part / "deep").mkdir()
        (part / "deep" / "file").write_text("file")
        assert (tmp_path / "old").read_text() == "old"
        assert not (tmp_path / "deep").exists()
    assert (tmp_path / "old").read_text() == "new"
    assert (tmp_path / "deep" / "file").read_text() == "file"

    def write_and_fail():
        with atomic.complete_files(tmp_path) as part:
            (part / "old").write_text("newer")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_and_fail()
    assert (tmp_path / "old").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "old"]


@pytest.mark.processes
def test_temporary_files_of_killed_processes_are_removed_when_the_file_is_written_again(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid(), "x"):
        (tmp_path / f"_a.json.{pid}.part").write_text("half")
    (tmp_path / f"_b.json.{dead.pid}.part").write_text("half")
    with atomic.complete_file(tmp_path / "a.json") as part:
        part.write_text("whole")
    kept = {f"_a.json.{os.getppid()}.part", "_a.json.x.part", f"_b.json.{dead.pid}.part", "a.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_push_of_a_checkpoint_leaves_temporary_files_out(tmp_path):
    """A file that the pushing thread has listed and that is then renamed would make the push fail."""
    patterns = re.search(r"ignore_patterns=(\[.*\])", inspect.getsource(Trainer._push_from_checkpoint))[1]
    patterns = eval(patterns, {"PREFIX_CHECKPOINT_DIR": PREFIX_CHECKPOINT_DIR})
    with atomic.complete_file(tmp_path / "a.json") as part, atomic.complete_files(tmp_path) as folder:
        part.write_text("half")
        (folder / "model.safetensors").write_text("half")
        names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
        assert len(names) == 2
        assert list(filter_repo_objects(names, ignore_patterns=patterns)) == []


class Evil:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.slow
def test_state_that_would_run_code_is_an_error_and_runs_nothing(world, resumable, capsys, name):
    marker = resumable / "executed"
    torch.save(Evil(marker), resumable / "checkpoint-1" / name)
    write_manifest(resumable / "checkpoint-1")
    message = error_of(["train", *flags(world, resumable, **RESUMING)], capsys)
    assert "holds a file that torch's safe loader refuses" in message
    assert not marker.exists()


def test_resuming_from_a_damaged_state_is_an_error(world, resumable, capsys):
    (resumable / "checkpoint-1" / "optimizer.pt").write_bytes(b"noise" * 100)
    write_manifest(resumable / "checkpoint-1")
    message = error_of(["train", *flags(world, resumable, **RESUMING)], capsys)
    assert "(checkpoint-1: its optimizer.pt is damaged)" in message
