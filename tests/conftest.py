"""Settings of every test: offline, and no telemetry."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers with several threads each are in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")


def pytest_collection_finish():
    # Every training collects garbage, which takes 0.25 s while the objects of all imported libraries are searched.
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer():
    from tests.helpers.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    from tests.helpers.paths import SHARED_DATA

    if not SHARED_DATA.is_dir():
        pytest.skip("the shared data (GSM8K, published rocks) is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a student, a teacher and chat prompts; a module with another world has a fixture of its own."""
    from tests.helpers.tiny import PROMPTS, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher")):
        make_model("qwen3", seed=seed, width=64).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    chats = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n")
    return folder


@pytest.fixture
def projections(monkeypatch) -> list[int]:
    """Rows of every projection of hidden states through an LM head, as they happen."""
    from trl_opd.loss import fused

    rows, original = [], fused._project

    def project(hidden, *head, out):
        if len(hidden):
            rows.append(len(hidden))
        return original(hidden, *head, out=out)

    monkeypatch.setattr(fused, "_project", project)
    monkeypatch.setattr(fused, "MAX_ROWS", 10_000)  # one chunk
    return rows
