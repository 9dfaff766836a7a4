"""Checkpoints that are whole, runs that are killed and go on, and what a full disk or a signal leaves behind."""

import errno
import inspect
import json
import os
import re
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl.trainer.utils import RepeatSampler

from trl_opd import OPDTrainer
from trl_opd.artefacts import atomic
from trl_opd.artefacts.hub import HubError
from trl_opd.artefacts.run_files import MANIFEST_FILE as FILE_NAME
from trl_opd.cli import main
from trl_opd.rollouts.data_order import EpochRepeatSampler
from trl_opd.saving import checkpoints
from trl_opd.saving.checkpoints import find_fault, resolve_checkpoint

from tests.benchmarks.crash_runs import write_world
from tests.helpers.command_line import flags
from tests.helpers.full_disk import full_disk
from tests.helpers.paths import ROOT
from tests.helpers.trainers import build

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    build(folder, **SAVING).train()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of that folder, to break."""
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run), str(folder)], check=True)
    return folder


def cut(folder: Path, name: str = "optimizer.pt") -> None:
    """Cut a checkpoint's file as a kill does in the middle of writing it."""
    with open(folder / name, "r+b") as file:
        file.truncate(100)


def unfinish(folder: Path) -> None:
    """Leave of a checkpoint what a kill leaves while the optimizer is written."""
    for name in (FILE_NAME, "trainer_state.json", "rng_state.pth", "scheduler.pt"):
        (folder / name).unlink()
    cut(folder)


# What a checkpoint says of itself


def test_a_checkpoint_lists_every_file_with_its_size(run):
    for step in (2, 4):
        folder = run / f"checkpoint-{step}"
        listed = json.loads((folder / FILE_NAME).read_text())["files"]
        there = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != FILE_NAME}
        assert listed == there
        assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "token_stats.safetensors"} <= there.keys()
        assert find_fault(folder) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_file_that_is_cut_or_gone_is_told(copy, name):
    folder = copy / "checkpoint-4"
    size = (folder / name).stat().st_size
    cut(folder, name)
    assert find_fault(folder) == f"its {name} has 100 of {size} bytes"
    (folder / name).unlink()
    assert find_fault(folder) == f"its {name} is gone"


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
def test_a_list_that_is_none_is_damage(copy, content):
    (copy / "checkpoint-4" / FILE_NAME).write_text(content)
    assert find_fault(copy / "checkpoint-4") == f"its {FILE_NAME} is damaged"


def test_the_list_is_there_before_a_checkpoint_is_pushed_and_before_an_older_one_goes(tmp_path, monkeypatch):
    seen = []

    class Pushing(OPDTrainer):
        def _push_from_checkpoint(self, checkpoint_folder):
            seen.append(("pushed", find_fault(checkpoint_folder)))

    from transformers import trainer as module

    rotate = module.rotate_checkpoints

    def rotate_seen(output_dir, **kwargs):
        newest = get_last_checkpoint(output_dir)
        seen.append(("rotated", find_fault(newest)))
        rotate(output_dir, **kwargs)

    monkeypatch.setattr(module, "rotate_checkpoints", rotate_seen)
    trainer = build(tmp_path, cls=Pushing, save_total_limit=1, **SAVING)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    trainer.train()
    assert seen == [("pushed", None), ("rotated", None)] * 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_step_that_is_saved_again_is_not_whole_in_between(copy):
    trainer = build(copy, **(SAVING | {"max_steps": 4}))
    seen, save = [], trainer._save_optimizer_and_scheduler

    def save_seen(folder):
        seen.append(find_fault(folder))
        save(folder)

    trainer._save_optimizer_and_scheduler = save_seen
    trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert seen == [f"it has no {FILE_NAME}, so its saving was not finished"]
    assert find_fault(copy / "checkpoint-4") is None


# From which one a run goes on


def test_true_means_the_newest_whole_one(copy):
    assert resolve_checkpoint(True, copy) == str(copy / "checkpoint-4")
    unfinish(copy / "checkpoint-4")
    with pytest.warns(UserWarning, match=r"checkpoint-4 is incomplete .*: the run resumes from checkpoint-2\."):
        assert resolve_checkpoint(True, copy) == str(copy / "checkpoint-2")


def test_what_transformers_takes_for_the_newest_leads_to_the_newest_whole_one(copy):
    unfinish(copy / "checkpoint-4")
    newest = get_last_checkpoint(copy)
    assert newest.endswith("checkpoint-4")
    with pytest.warns(UserWarning, match="the run resumes from checkpoint-2"):
        assert resolve_checkpoint(newest, copy) == str(copy / "checkpoint-2")


def test_a_file_that_was_changed_since_and_has_grown_is_no_sign_of_a_kill(copy):
    with (copy / "checkpoint-4" / "config.json").open("a") as file:
        file.write("\n")
    assert find_fault(copy / "checkpoint-4") is None


def test_a_checkpoint_of_the_model_only_is_taken_with_a_warning(tmp_path):
    build(tmp_path, save_only_model=True, **SAVING).train()
    message = r"checkpoint-4 holds the model only .*: optimizer and learning-rate schedule start"
    with pytest.warns(UserWarning, match=message):
        assert resolve_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("name", "is_one"), [("checkpoint-4", True), ("checkpoint-qwen", False), ("checkpoint-4-b", False), ("run", False)]
)
def test_a_folder_is_a_checkpoint_by_its_number(tmp_path, name, is_one):
    assert checkpoints.is_checkpoint(tmp_path / name) == is_one


def test_an_epoch_that_is_cut_short_is_followed_by_another_one():
    settings = {"data_source": range(50), "mini_repeat_count": 1, "shuffle": True, "seed": 3}
    trls, ours = RepeatSampler(**settings), EpochRepeatSampler(epoch=lambda: 0, **settings)
    orders = [list(trls) for _ in range(3)]
    assert [list(ours) for _ in range(3)] == orders
    resumed = EpochRepeatSampler(epoch=lambda: 1, **settings)
    assert [list(resumed) for _ in range(2)] == orders[1:]


def test_steps_are_numbers_and_not_names(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "a").write_text("a")
        checkpoints.write_manifest(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    assert resolve_checkpoint(True, tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("resume", [None, False])
def test_nothing_to_go_on_from_is_a_run_that_begins(copy, resume):
    assert resolve_checkpoint(resume, copy) is None


def test_an_older_checkpoint_that_is_named_and_not_whole_is_refused(copy):
    cut(copy / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 is incomplete: its optimizer.pt has 100 of \d+ bytes"):
        resolve_checkpoint(copy / "checkpoint-2", copy)
    assert resolve_checkpoint(copy / "checkpoint-4", copy) == str(copy / "checkpoint-4")


def test_no_whole_checkpoint_is_a_sentence(copy, tmp_path):
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


def test_a_checkpoint_of_another_trainer_is_taken_when_it_is_named(copy):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / FILE_NAME).unlink()
    with pytest.raises(ValueError, match="To use a checkpoint of another trainer, pass its folder"):
        resolve_checkpoint(True, copy)
    with pytest.warns(UserWarning, match="another trainer seems to have written it"):
        assert resolve_checkpoint(copy / "checkpoint-2", copy) == str(copy / "checkpoint-2")


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_ends_as_if_nothing_was(run, copy):
    unfinish(copy / "checkpoint-4")
    trainer = build(copy, **SAVING)
    with pytest.warns(UserWarning, match="the run resumes from checkpoint-2"):
        trainer.train(resume_from_checkpoint=True)
    files_of = [(folder / "checkpoint-4" / "model.safetensors").read_bytes() for folder in (run, copy)]
    assert files_of[0] == files_of[1]
    assert find_fault(copy / "checkpoint-4") is None


# Killed, terminated, interrupted


@pytest.mark.slow
@pytest.mark.processes
def test_killed_runs_go_on_and_end_equal_to_the_bit():
    """`tests/benchmarks/crash.py` by the number that a test can afford: see docs/reliability.md for more."""
    command = [sys.executable, "-m", "tests.benchmarks.crash", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 equal, 0 different." in done.stdout
    kills = re.search(r"3 runs, (\d+) kills", done.stdout)
    assert int(kills[1]) >= 3
    assert len(re.findall(r"killed in saving", done.stdout)) >= 1


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
@pytest.mark.slow
def test_signal_ends_a_training_and_the_message_says_how_to_resume(world, tmp_path, capsys, number, word, code):
    # A shell starts background jobs with SIGINT ignored, and Python then has no handler for it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end_and_resume_a_training(world, tmp_path / "out", capsys, number, word, code)
    finally:
        signal.signal(signal.SIGINT, inherited)


def end_and_resume_a_training(world, out, capsys, number, word, code):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 400}

    def send():
        until = time.monotonic() + 60
        while not (out / "checkpoint-2" / FILE_NAME).exists() and time.monotonic() < until:
            time.sleep(0.01)
        # Python loses an exception of a handler that runs within a destructor; who asks, asks again.
        while not ended.is_set() and time.monotonic() < until:
            os.kill(os.getpid(), number)
            ended.wait(10)

    before, ended = signal.getsignal(signal.SIGTERM), threading.Event()
    sender = threading.Thread(target=send)
    sender.start()
    try:
        found = main(["train", *flags(world, out, **settings)])
    finally:
        ended.set()
    sender.join()
    assert found == code
    error = capsys.readouterr().err
    assert f"trl-opd train: {word}: its checkpoints are kept, pass --resume_from_checkpoint to resume" in error
    assert "Traceback" not in error
    assert not (out / "model.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == before
    last = int(Path(resolve_checkpoint(True, out)).name.split("-")[1])
    settings["max_steps"] = last + 1
    assert main(["train", *flags(world, out, resume_from_checkpoint=True, **settings)]) == 0
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
def test_a_process_that_was_forked_is_ended_by_sigterm_as_without_us():
    """`Pool` and the workers of a reward end theirs so."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["ready", str(-signal.SIGTERM)]


# No room


def temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".part") or path.name.startswith("_saving")]


@pytest.mark.parametrize("room", [300_000, 700_000], ids=["for no model", "for no optimizer"])
@pytest.mark.slow
def test_a_checkpoint_without_room_is_a_sentence_and_the_one_before_is_whole(world, tmp_path, capsys, room):
    out = tmp_path / "out"
    settings = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": True}
    assert main(["train", *flags(world, out, save_strategy="steps", save_steps=2, max_steps=2)]) == 0
    sizes = {path.name: path.stat().st_size for path in (out / "checkpoint-2").iterdir()}
    assert sizes["model.safetensors"] > 300_000
    assert sizes["model.safetensors"] < 700_000 < sizes["optimizer.pt"]
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    with full_disk(room):
        assert main(["train", *flags(world, out, max_steps=4, **settings)]) == 1
    error = capsys.readouterr().err
    sentence = error.strip().splitlines()[-1]
    assert sentence.startswith(f"trl-opd train: error: {out}/checkpoint-4 cannot be written: ")
    assert sentence.endswith("checkpoint-2 is complete: make room, then resume from it with resume_from_checkpoint.")
    assert "Traceback" not in error
    assert (out / "model.safetensors").read_bytes() == before
    assert Path(resolve_checkpoint(True, out)).name == "checkpoint-2" if (out / "checkpoint-4").exists() else True
    assert main(["train", *flags(world, out, max_steps=4, **settings)]) == 0
    assert find_fault(out / "checkpoint-4") is None
    assert not temporary(out)


@pytest.mark.slow
def test_a_student_without_room_leaves_the_one_before(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", *flags(world, out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".safetensors"}
    capsys.readouterr()
    with full_disk(300_000):
        assert main(["train", *flags(world, out, save_strategy="no", learning_rate=0.1)]) == 1
    error = capsys.readouterr().err
    assert f"trl-opd train: error: {out} cannot be written: " in error
    assert "Traceback" not in error
    assert (out / "model.safetensors").read_bytes() == before["model.safetensors"]
    assert not temporary(out)


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Models, problems, rocks and collected rollouts."""
    folder = write_world(tmp_path_factory.mktemp("collected"))
    assert main(commands(folder, folder)["collect"]) == 0
    return folder


def commands(models: Path, out: Path) -> dict[str, list[str]]:
    student = f"--model_name_or_path {models}/student --max_completion_length 8 --use_cpu"
    prompts = f"--dataset_name {models}/problems.jsonl"
    teacher = f"--teacher_model_name_or_path {models}/teacher --bf16 false"
    rocks, rows = f"--rock_set {models}/rock_set.json", f"{models}/rollouts/occurrences.parquet"
    both = f"--model_name_or_path {models}/student {teacher} --use_cpu"
    reward = "--reward tests.benchmarks.crash_runs.even --greedy"
    return {
        name: [name, *rest.split()]
        for name, rest in {
            "collect": f"{student} {prompts} {teacher} --output_dir {out}/rollouts",
            "detect": f"{rows} --score aggregate --top_k 5 --output {out}/rocks.json",
            "probe": f"{student} {prompts} {rocks} {reward} --output {out}/k.json",
            "gradients": f"{rows} {rocks} {both} --output {out}/g.parquet",
            "report": f"{models}/rollouts --output {out}/r.html",
        }.items()
    }


@pytest.mark.parametrize("name", ["collect", "detect", "probe", "gradients", "report"])
@pytest.mark.parametrize("room", [10, 600])
def test_a_command_without_room_says_so_and_goes_on_later(collected, tmp_path, capsys, name, room):
    command = commands(collected, tmp_path)[name]
    with full_disk(room):
        assert main(command) == 1
    printed = capsys.readouterr()
    sentence = printed.err.strip().splitlines()[-1]
    assert sentence.rpartition("\r")[2].strip().startswith(f"trl-opd {name}: error: ")
    assert re.search(r"cannot be written: .*(File too large|No space)", sentence)
    assert "Traceback" not in printed.err
    finished = [path.name for path in tmp_path.iterdir() if path.is_file() and not path.name.startswith(".")]
    assert finished == []
    assert main(command) == 0
    assert not temporary(tmp_path)


@pytest.mark.parametrize("name", ["collect", "detect", "probe", "gradients", "report"])
def test_a_folder_that_may_not_be_written_is_a_sentence(collected, tmp_path, capsys, name):
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main(commands(collected, tmp_path)[name]) == 1
    error = capsys.readouterr().err
    assert f"trl-opd {name}: error: " in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("content", "goes_on"), [(b"", True), (b'{"a', True), (b"{}\n", False), (b"\xff\n", False)])
def test_a_journal_that_was_cut_begins_anew_and_one_of_others_stays(collected, tmp_path, capsys, content, goes_on):
    journal = tmp_path / ".k.json.journal.jsonl"
    journal.write_bytes(content)
    assert main(commands(collected, tmp_path)["probe"]) == (0 if goes_on else 1)
    assert goes_on or f"{journal} belongs to an interrupted probe with other settings" in capsys.readouterr().err
    assert journal.exists() != goes_on


def test_a_journal_with_a_damaged_line_is_named_with_the_line(collected, tmp_path, capsys, monkeypatch):
    journal = tmp_path / ".k.json.journal.jsonl"
    monkeypatch.setattr("trl_opd.studies.probe.Probe.close", lambda probe: None)
    assert main(commands(collected, tmp_path)["probe"]) == 0
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], '["token 60", 0]', *lines[4:]]) + "\n")
    capsys.readouterr()
    assert main(commands(collected, tmp_path)["probe"]) == 1
    assert f"{journal} is damaged in line 4: remove the file." in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), HubError("Could not push to user/student: refused.")])
def test_other_errors_while_saving_pass_as_they_are(tmp_path, error):
    trainer = build(tmp_path, **SAVING)

    def fail(folder):
        raise error

    trainer._save_optimizer_and_scheduler = fail
    with pytest.raises(type(error), match=str(error)):
        trainer.train()
    assert "save_to_json" not in vars(trainer.state)


# Files


def test_files_move_to_their_folder_at_the_end_and_none_after_an_error(tmp_path):
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

    def break_off():
        with atomic.complete_files(tmp_path) as part:
            (part / "old").write_text("newer")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        break_off()
    assert (tmp_path / "old").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "old"]


@pytest.mark.processes
def test_what_a_killed_process_left_of_a_file_goes_when_it_is_written_again(tmp_path):
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
    """What would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["a payload", "a cut archive", "noise"])
@pytest.mark.slow
def test_a_state_is_read_without_running_what_is_in_it_or_refused_in_a_sentence(world, tmp_path, capsys, name, damage):
    out, marker = tmp_path / "out", tmp_path / "executed"
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    assert main(["train", *flags(world, out, **settings)]) == 0
    file = out / "checkpoint-1" / name
    whole = file.read_bytes()
    archive = {"a cut archive": whole[: len(whole) // 2], "noise": b"noise" * 100}
    if damage in archive:
        file.write_bytes(archive[damage])
    else:
        torch.save(Evil(marker), file)
    checkpoints.write_manifest(out / "checkpoint-1")
    capsys.readouterr()
    settings |= {"max_steps": 2, "resume_from_checkpoint": True}
    assert main(["train", *flags(world, out, **settings)]) == 1
    error = capsys.readouterr().err
    told = f"({name}: its {name} is damaged)" if damage in archive else "holds a file that torch's safe loader refuses"
    assert told.replace(f"({name}", "(checkpoint-1") in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not marker.exists()
