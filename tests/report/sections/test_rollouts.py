"""Tests of the rollouts section: it shows the rows of the file, and says which part of many or long rollouts."""

import shutil
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest

from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.artefacts.occurrences import write_occurrences
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.artefacts.sampled_rollouts import join_parts
from trl_opd.report.blocks import Note, Rollouts
from trl_opd.report.contents import read_contents
from trl_opd.report.sections import rollouts as shown_rollouts
from trl_opd.report.sections.rollouts import rollouts

from tests.helpers.planted import make_world, save_world
from tests.helpers.report_folders import ROCKS, make_samples
from tests.helpers.report_sections import of_kind


def test_rollouts_are_the_rows_of_the_file(run_folder, tokenizer):
    (block,) = of_kind(rollouts(read_contents(run_folder)), Rollouts)
    rows = pq.read_table(run_folder / FILE_NAME).to_pylist()
    shown = [(one.step, one.rollout) for one in block.rollouts]
    assert shown == sorted({(row["step"], row["rollout"]) for row in rows})
    assert block.rocks == frozenset(ROCKS)
    for one in block.rollouts:
        mine = [row for row in rows if (row["step"], row["rollout"]) == (one.step, one.rollout)]
        assert one.token_ids.tolist() == [row["token_id"] for row in mine]
        for name in ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p"):
            np.testing.assert_allclose(getattr(one, name), [row[name] for row in mine], rtol=1e-6)
        assert one.teacher_top[0].tolist() == [row["teacher_top_ids"] for row in mine]
        assert one.prompt.startswith("<|start|>user\n")
        assert all(block.texts[id] == tokenizer.decode([id]) for id in one.token_ids.tolist())


def test_many_rollouts_are_sampled_with_the_first_and_the_last_step_and_a_note_says_so(copy):
    (copy / FILE_NAME).unlink()
    make_samples(copy, steps=40, rollouts_of_step=9, tokens=30)
    section = rollouts(read_contents(copy))
    (block,) = of_kind(section, Rollouts)
    steps = sorted({one.step for one in block.rollouts})
    assert (steps[0], steps[-1], len(steps)) == (1, 40, shown_rollouts.MOST_STEPS)
    assert f"A sample: {len(block.rollouts)} of 360 rollouts from 12 of the 40 steps" in of_kind(section, Note)[0].text
    assert sum(len(one.token_ids) for one in block.rollouts) <= shown_rollouts.MOST_TOKENS


def test_long_rollout_is_cut_and_a_note_says_so(copy):
    (copy / FILE_NAME).unlink()
    make_samples(copy, steps=1, rollouts_of_step=2, tokens=1000)
    section = rollouts(read_contents(copy))
    (block,) = of_kind(section, Rollouts)
    assert [len(one.token_ids) for one in block.rollouts] == [shown_rollouts.MOST_OF_ONE] * 2
    assert "2 rollouts are cut: only the first 600 tokens are shown." in of_kind(section, Note)[0].text


def test_rollout_of_exactly_the_limit_is_not_cut(copy):
    (copy / FILE_NAME).unlink()
    make_samples(copy, steps=1, rollouts_of_step=2, tokens=shown_rollouts.MOST_OF_ONE)
    assert not any("only the first" in note.text for note in of_kind(rollouts(read_contents(copy)), Note))


def test_rollouts_do_not_depend_on_the_row_groups_of_the_file(run_folder, copy):
    expected = of_kind(rollouts(read_contents(run_folder)), Rollouts)[0].rollouts
    pq.write_table(pq.read_table(copy / FILE_NAME), copy / FILE_NAME, row_group_size=5)
    found = of_kind(rollouts(read_contents(copy)), Rollouts)[0].rollouts
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.rollout, one.prompt) == (other.step, other.rollout, other.prompt)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.student_top[0], other.student_top[0])


@pytest.mark.slow
def test_reading_a_late_rollout_takes_little_memory(tmp_path):
    size = 4 * 2**20
    columns = {"rollout": np.repeat([0, 1], size), "position": np.tile(np.arange(size), 2)}
    columns |= {"token_id": np.repeat([5, 6], size), "kl": np.repeat(np.float32([0.5, 1.5]), size)}
    write_occurrences(tmp_path / "o.parquet", columns, {})
    tracemalloc.start()
    shown = shown_rollouts.shown_of_collection(tmp_path / "o.parquet", tmp_path / "none", lambda ids: None).rollouts
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size  # bytes: a column of its rows is 64 MB
    assert [(one.rollout, set(one.token_ids.tolist()), set(one.kl.tolist())) for one in shown] == [
        (0, {5}, {0.5}),
        (1, {6}, {1.5}),
    ]


@pytest.mark.slow
def test_arms_share_the_token_limit_of_a_page(run_folder, tmp_path):
    arms = ("uniform", "rock", "control", "random")
    for arm in arms:
        (tmp_path / arm).mkdir()
        shutil.copy(run_folder / "opd_run.json", tmp_path / arm)
        make_samples(tmp_path / arm, steps=20, rollouts_of_step=2, tokens=1000)
        join_parts(tmp_path / arm)
    section = rollouts(read_contents(tmp_path))
    blocks = of_kind(section, Rollouts)
    assert [{one.step for one in block.rollouts} for block in blocks] == [{1, 7, 14, 20}] * 4
    assert sum(len(one.token_ids) for block in blocks for one in block.rollouts) <= shown_rollouts.MOST_TOKENS
    notes = [note.text for note in of_kind(section, Note)]
    assert notes[0].startswith("Rollouts of the arm uniform. A sample: 4 of 40 rollouts from 4 of the 20 steps")
    assert sum("4 rollouts are cut: only the first 600 tokens" in note for note in notes) == 4


def test_collection_with_its_tokenizer_shows_token_texts_and_prompts(collection, tokenizer, tmp_path):
    shutil.copytree(collection, tmp_path / "c")
    tokenizer.save_pretrained(tmp_path / "c")
    section = {"name": None, "vocab_size": 300, "fingerprint": fingerprint(tokenizer)}
    save_world(make_world(0, vocab=300), tmp_path / "c" / "occurrences.parquet", tokenizer=section)
    (block,) = of_kind(rollouts(read_contents(tmp_path / "c")), Rollouts)
    assert block.rollouts[0].prompt == tokenizer.decode([60, 61, 0])
    assert block.texts[int(block.rollouts[0].token_ids[0])] == tokenizer.decode([int(block.rollouts[0].token_ids[0])])
    section["fingerprint"] = "sha256:another"
    save_world(make_world(0, vocab=300), tmp_path / "c" / "occurrences.parquet", tokenizer=section)
    assert not read_contents(tmp_path / "c").names.complete
