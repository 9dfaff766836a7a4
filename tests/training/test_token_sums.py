"""Statistics of a run: the positions they count, the window in a checkpoint, and resumed runs."""

import numpy as np
import pytest
import torch

from trl_opd import Controls, TokenStats
from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.training.model_pair import describe_measure
from trl_opd.training.token_sums import TokenSums

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_config, make_dataset, make_model
from tests.helpers.token_statistics import MEASURE, ROWS, V, equal, signals, stats_of
from tests.helpers.trainers import ROCKS, build, ending_student, loss_positions, measured, record


def positions(batches) -> list[int]:
    """Return the number of positions of each batch."""
    return [int(batch["completion_mask"].sum()) for *_, batch in batches]


def test_statistics_are_sums_over_all_rollouts(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, learning_rate=0.0)
    stats = trainer.token_stats
    parts = [measured(trainer, batch) for *_, batch in trainer.batches]
    ids, divergences = (torch.cat(part) for part in zip(*parts, strict=True))
    assert len(set(ids.tolist())) > 5
    assert stats.vocab_size == 300
    assert torch.equal(stats.seen, torch.bincount(ids, minlength=300))
    assert torch.equal(stats.seen, stats.count)
    for sums, values in ((stats.kl_sum, divergences), (stats.kl_sq_sum, divergences**2)):
        torch.testing.assert_close(sums, torch.bincount(ids, values, minlength=300), rtol=1e-5, atol=0)
    lines = [line["entropy"] for line in trainer.state.log_history if "entropy" in line]
    assert float(stats.entropy_sum.sum()) == pytest.approx(np.dot(lines, positions(trainer.batches)), rel=1e-6)


@pytest.mark.slow
def test_statistics_do_not_change_the_trained_weights(tokenizer, tmp_path):
    runs = [record(tokenizer, tmp_path / str(on), token_statistics=on) for on in (True, False)]
    for one, two in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def test_no_statistics_are_kept_or_saved_if_turned_off(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, token_statistics=False, save_strategy="steps", save_steps=1)
    assert trainer.token_stats is None
    assert trainer.reduced_token_stats() is None
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not list(tmp_path.rglob("token_stats*"))


@pytest.mark.parametrize(
    ("arm", "changes"),
    [("rock", {}), ("rock", {"mask_truncated_completions": True}), ("control", {})],
    ids=["rocks", "without cut rollouts", "controls"],
)
def test_frozen_position_is_seen_in_every_step_and_measured_in_steps_that_log(tokenizer, tmp_path, arm, changes):
    controls = Controls(list(range(180, 240)), 1.0, True)
    rock_set = rock_file(tmp_path / "rocks.json", ROCKS, controls=controls)
    settings = {"token_weighting": arm, "rock_set": rock_set, "logging_steps": 3, "max_steps": 4}
    trainer = record(tokenizer, tmp_path, student=ending_student(), **settings, **changes)
    frozen = ROCKS if arm == "rock" else controls.ids
    is_frozen = torch.isin(torch.arange(300), torch.tensor(frozen))
    seen, counted = torch.zeros(300, dtype=torch.int64), torch.zeros(300, dtype=torch.int64)
    for _, step, _, batch in trainer.batches:
        ids = batch["completion_ids"][loss_positions(batch)]
        seen += torch.bincount(ids, minlength=300)
        counted += torch.bincount(ids if step + 1 == 3 else ids[~is_frozen[ids]], minlength=300)
    stats = trainer.token_stats
    assert torch.equal(stats.seen, seen)
    assert torch.equal(stats.count, counted)
    assert 0 < counted[frozen].sum() < seen[frozen].sum()


def test_evaluation_does_not_change_the_statistics(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, eval_dataset=make_dataset(3, chat=False), max_steps=1)
    before = trainer.token_stats
    trainer.evaluate()
    assert equal(trainer.token_stats, before)


@pytest.mark.slow
def test_checkpoint_holds_the_statistics_since_the_previous_checkpoint(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, max_steps=5, save_strategy="steps", save_steps=2)
    windows = [TokenStats.load(tmp_path / f"checkpoint-{step}") for step in (2, 4, 5)]
    counts = positions(trainer.batches)
    assert [int(window.seen.sum()) for window in windows] == [sum(counts[:2]), sum(counts[2:4]), counts[4]]
    total = windows[0].merge(windows[1]).merge(windows[2])
    assert equal(total, trainer.token_stats)
    assert equal(trainer.reduced_token_stats(), trainer.token_stats)


def test_saving_outside_a_checkpoint_closes_no_window(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path / "run", max_steps=1)
    stats = trainer.token_stats
    trainer.save_model(_internal_call=True)  # as `push_to_hub` does
    trainer.save_model(tmp_path / "copy", _internal_call=True)
    trainer.save_model()
    # The statistics of the whole run, that it writes at its end, are no window.
    assert [path.parent for path in tmp_path.rglob("token_stats*")] == [tmp_path / "run"]
    trainer.save_model(tmp_path / "checkpoint-1", _internal_call=True)
    assert equal(TokenStats.load(tmp_path / "checkpoint-1"), stats)


@pytest.mark.slow
def test_checkpoint_that_is_saved_again_keeps_its_statistics(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    first = TokenStats.load(folder)
    trainer.save_model(str(folder), _internal_call=True)
    assert equal(TokenStats.load(folder), first)
    trainer.train()  # a new run replaces the window
    assert int(TokenStats.load(folder).seen.sum()) == sum(positions(trainer.batches[2:]))


@pytest.mark.slow
def test_resumed_run_saves_the_same_windows_as_an_uninterrupted_one(tokenizer, tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    record(tokenizer, tmp_path / "whole", **changes)
    broken = record(tokenizer, tmp_path / "broken", **(changes | {"max_steps": 3}))
    checkpoint = str(tmp_path / "broken" / "checkpoint-2")
    resumed = build(tmp_path / "broken", tokenizer=tokenizer, train_dataset=make_dataset(chat=False), **changes)
    resumed.train(resume_from_checkpoint=checkpoint)
    windows = [TokenStats.load(tmp_path / name / "checkpoint-4") for name in ("whole", "broken")]
    assert int(windows[0].seen.sum()) > 0
    assert equal(*windows)
    assert equal(resumed.token_stats, windows[0])
    # The same trainer object drops on resume the sums of steps after the checkpoint.
    broken.args.max_steps = 4
    broken.train(resume_from_checkpoint=checkpoint)
    assert equal(broken.token_stats, windows[0])


def test_a_second_run_of_a_trainer_adds_to_its_statistics(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path)
    first = trainer.token_stats
    trainer.train()
    assert int(first.seen.sum()) < int(trainer.token_stats.seen.sum()) == sum(positions(trainer.batches))


def test_statistics_contain_the_measure_of_the_run(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, max_steps=1, temperature=0.7)
    expected = {"divergence": "reverse_kl", "beta": 1.0, "temperature": 0.7, "dropout": 0.0}
    expected |= {"student": "", "teacher": ""}
    tokens = {"name": tokenizer.name_or_path, "vocab_size": len(tokenizer), "fingerprint": fingerprint(tokenizer)}
    assert trainer.token_stats.measure == expected | {"tokenizer": tokens}


@pytest.mark.parametrize(("beta", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.5, "jsd"), (0.9, "jsd")])
def test_measure_names_the_divergence_and_the_dropout(tokenizer, tmp_path, beta, name):
    student = make_model(seed=0)
    student.model.layers[0].self_attn.attention_dropout = 0.1
    args = make_config(tmp_path, beta=beta)
    measure = describe_measure(args, student, student, tokenizer)
    assert (measure["divergence"], measure["beta"], measure["dropout"]) == (name, beta, 0.1)


def test_waiting_signals_are_added_at_the_next_log(tokenizer, tmp_path):
    trainer = record(tokenizer, tmp_path, max_steps=1)
    before = trainer.token_stats
    trainer._token_sums._waits = True  # as on MPS, which has no float64
    trainer.train()
    assert trainer._token_sums._waiting == []
    assert int(trainer.token_stats.seen.sum()) > int(before.seen.sum())


# Windows. "mps" needs no such device, because its signals are added up on the CPU.


@pytest.fixture(params=["cpu", "mps"])
def sums(request) -> TokenSums:
    return TokenSums(V, MEASURE, torch.device(request.param))


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    return tmp_path / "checkpoint-1"


ALL = stats_of(ROWS)
TWICE = stats_of(ROWS + ROWS)
NOTHING = TokenStats(V, MEASURE)


def test_windows_merge_to_the_total(sums):
    windows = []
    for rows in (ROWS[:2], ROWS[2:3], [], ROWS[3:]):
        sums.update(signals(rows))
        assert equal(sums.total(), sums.total())
        windows.append(sums.close_window())
    assert [int(window.seen.sum()) for window in windows] == [2, 1, 0, 4]
    total = TokenStats(V, MEASURE)
    for window in windows:
        total.merge(window)
    assert equal(total, ALL)
    assert equal(sums.total(), ALL)


def test_total_is_a_copy(sums):
    sums.update(signals(ROWS))
    total = sums.total()
    sums.update(signals(ROWS))
    assert equal(total, ALL)
    total.update(signals(ROWS[:1]))
    assert equal(sums.total(), TWICE)


@pytest.mark.parametrize("flushes", [0, 1, 3])
def test_flushing_repeatedly_counts_each_position_once(sums, flushes):
    sums.update(signals(ROWS))
    for _ in range(flushes):
        sums.flush()
    assert equal(sums.total(), ALL)
    assert equal(sums.close_window(), ALL)


def test_start_drops_all_sums_on_resume_and_otherwise_opens_a_window(sums):
    sums.update(signals(ROWS[:2]))
    sums.start(resumed=False)
    sums.update(signals(ROWS[2:]))
    assert equal(sums.total(), ALL)
    assert equal(sums.close_window(), stats_of(ROWS[2:]))
    sums.update(signals(ROWS))
    sums.start(resumed=True)
    assert equal(sums.total(), NOTHING)


def test_totals_and_windows_are_summed_over_processes_and_the_local_total_is_unchanged(sums, checkpoint):
    sums.update(signals(ROWS[:3]))
    sums.close_window()
    sums.update(signals(ROWS[3:]))
    assert equal(sums.total(lambda local: 2 * local), TWICE)
    assert equal(sums.total(torch.clone), ALL)
    sums.write_window(str(checkpoint), lambda local: 2 * local, is_main=True)
    assert equal(TokenStats.load(checkpoint), stats_of(ROWS[3:] + ROWS[3:]))
    assert equal(sums.total(), ALL)
    assert equal(sums.close_window(), NOTHING)


def test_only_the_main_process_writes_the_reduced_window(sums, checkpoint):
    calls = []
    sums.update(signals(ROWS))
    sums.write_window(str(checkpoint), lambda local: calls.append(local) or local, is_main=False)
    assert calls
    assert not list(checkpoint.iterdir())
    assert equal(sums.close_window(), NOTHING)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_disabled_token_sums_return_and_write_nothing(device, checkpoint):
    sums = TokenSums(V, MEASURE, torch.device(device), enabled=False)
    sums.update(signals(ROWS))
    sums.start(resumed=False)
    sums.write_window(str(checkpoint), torch.clone, is_main=True)
    assert sums.total() is None
    assert sums.total(torch.clone) is None
    assert not list(checkpoint.iterdir())
