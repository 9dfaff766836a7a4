"""Folders to report on: of a run, a copy of it to break, and of a collection."""

import html
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.text import Text
from peft import LoraConfig

from trl_opd import AccuracyCallback, OPDTrainer, RolloutSamples
from trl_opd.artefacts.occurrences import PROMPT_SCHEMA
from trl_opd.cli import main
from trl_opd.rocks.rock_set import Controls

from tests.helpers.planted import make_world, save_world
from tests.helpers.problems import Seen, problems
from tests.helpers.report_folders import CONTROLS, ROCKS
from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import make_config, make_dataset, make_model


@pytest.fixture(scope="session")
def run_folder(tokenizer, tmp_path_factory):
    """The output folder of a run with a LoRA student, frozen rocks, rollouts, accuracies and statistics."""
    folder = tmp_path_factory.mktemp("run")
    rock_set = rock_file(folder / "rocks.json", ROCKS, controls=Controls(CONTROLS, 1.0, True))
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "num_generations": 2}
    trainer = OPDTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(folder / "run", token_weighting="rock", rock_set=rock_set, **settings),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        callbacks=[RolloutSamples(3), AccuracyCallback(problems(5), Seen(), eval_steps=4)],
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return folder / "run"


@pytest.fixture
def copy(run_folder, tmp_path):
    """A copy of that folder, to break or to empty."""
    return shutil.copytree(run_folder, tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """In place of its plots a page holds their texts, for tests that need no drawing, which takes seconds."""

    def texts_of(figure, prefix):
        return "\n".join(html.escape(text.get_text()) for text in figure.findobj(Text))

    for section in ("run", "rocks", "evidence"):
        monkeypatch.setattr(f"trl_opd.report.sections.{section}.to_svg", texts_of)


@pytest.fixture(scope="session")
def collection(tokenizer, tmp_path_factory):
    """A folder as `trl-opd collect` leaves it, of a planted world, with prompts and a rock set chosen by `detect`."""
    folder = tmp_path_factory.mktemp("collection")
    save_world(make_world(0, vocab=300), folder / "occurrences.parquet", student="s")
    ids = [[60, 61, place] for place in range(1000)]
    columns = [pa.array(range(1000), pa.int32()), pa.array(ids, PROMPT_SCHEMA.field(1).type), pa.array(range(1000))]
    pq.write_table(pa.Table.from_arrays(columns, schema=PROMPT_SCHEMA), folder / "prompts.parquet")
    settings = ["--top_k", "20"]
    flags = ["detect", str(folder / "occurrences.parquet"), "--output", str(folder / "rock_set.json"), *settings]
    assert main(flags) == 0
    return folder
