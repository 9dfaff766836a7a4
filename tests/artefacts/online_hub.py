"""Rock sets and folders on their way to the Hub and back: the real client against a Hub on loopback.

The client reads its address when it is imported, and pytest's own process is offline. So test_hub.py runs this file in
another process: `python -m pytest --noconftest tests/artefacts/online_hub.py`.
"""

import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.hub_server import LFS_BYTES, WRONG, HubServer

HOME = tempfile.TemporaryDirectory()
HUB = HubServer()
os.environ |= HUB.environment | {"HF_HOME": HOME.name}

from trl_opd.artefacts.hub import HubError, hub_errors  # noqa: E402
from trl_opd.artefacts.run_files import ROCK_SET_FILE  # noqa: E402
from trl_opd.rocks.rock_set import RockSet  # noqa: E402

from tests.helpers.rock_sets import rock_file  # noqa: E402

ROCKS = RockSet.load(rock_file(HOME.name + "/rocks.json", [31, 7]))
OTHER = replace(ROCKS, rocks=ROCKS.rocks[:1])
CARD = b"---\nlicense: apache-2.0\ntags: [trl_opd]\n---\n\n# A student\n"
BROKE = "nothing local is lost, run the same again."
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path) -> list[float]:
    """Seconds that the client waits between its tries, up to 23 in all, of which it sleeps a hundredth."""
    seconds = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda wanted: (seconds.append(wanted), sleep(wanted / 100)))
    monkeypatch.chdir(tmp_path)
    return seconds


@pytest.fixture
def repo() -> str:
    """Name of a repository that does not exist yet."""
    return f"user/rocks-{next(NUMBERS)}"


@pytest.fixture
def content() -> bytes:
    """The file of `ROCKS`."""
    ROCKS.save("local.json")
    return Path("local.json").read_bytes()


def error_of(function, *args, **kwargs) -> str:
    """Return the error message of a call: one line of limited length, without a token or a request's id."""
    with pytest.raises(OSError, match=r"^Could not .*\.$") as caught:  # the command line prints an OSError in one line
        function(*args, **kwargs)
    message = str(caught.value)
    assert type(caught.value) is HubError
    assert caught.value.__cause__ is not None
    assert [part for part in ("\n", "Root=", "hf_") if part in message] == []
    assert len(message) < 450
    return message


def test_pushed_set_loads_as_the_same_set(repo, content):
    assert ROCKS.push_to_hub(repo).oid == HUB.repos[repo][-1].oid
    assert HUB.files(repo)[ROCK_SET_FILE] == content
    assert RockSet.load(repo) == ROCKS
    assert os.listdir() == ["local.json"]
    assert "torch" not in sys.modules


def test_push_replaces_the_set_and_keeps_other_files_and_an_unchanged_set_makes_no_commit(repo):
    ROCKS.push_to_hub(repo)
    HUB.commit(repo, {"README.md": CARD}, "a card")
    pushed = OTHER.push_to_hub(repo, commit_message="One rock")
    assert RockSet.load(repo) == OTHER
    assert OTHER.push_to_hub(repo).oid == pushed.oid
    assert HUB.messages(repo)[1:] == ["Upload rock_set.json with huggingface_hub", "a card", "One rock"]
    assert sorted(HUB.files(repo)) == [".gitattributes", "README.md", ROCK_SET_FILE]


@pytest.mark.parametrize("private", [True, False])
def test_new_repository_is_private_when_asked(repo, private):
    ROCKS.push_to_hub(repo, private=private)
    assert (repo in HUB.private) == private
    assert RockSet.load(repo) == ROCKS


def test_name_without_a_user_is_a_repository_of_the_tokens_owner():
    ROCKS.push_to_hub("bare")
    assert RockSet.load("user/bare") == ROCKS


def test_set_that_load_would_not_accept_is_not_pushed(repo):
    with pytest.raises(ValueError, match="occurs twice in rocks"):
        replace(ROCKS, rocks=ROCKS.rocks * 2).push_to_hub(repo)
    assert repo not in HUB.repos


# Requests that the Hub rejects


@pytest.mark.parametrize(("repo", "token"), [("user/rocks", WRONG), ("someone/rocks", None)])
def test_token_without_write_access_is_named_as_the_reason(repo, token, waits):
    message = error_of(ROCKS.push_to_hub, repo, token=token)
    assert message.startswith(f"Could not push the rock set to {repo}: the Hub did not accept the token (40")
    assert message.endswith("; run `hf auth login`, or set HF_TOKEN to a token that may write there.")
    assert waits == []


def test_missing_token_is_not_called_a_wrong_one():
    assert error_of(ROCKS.push_to_hub, "user/rocks", token=False) == (
        "Could not push the rock set to user/rocks: this needs a token and none is set; run `hf auth login`, or set "
        "HF_TOKEN to a token that may write there."
    )


def test_wrong_token_for_reading_asks_for_one_that_may_read(repo, monkeypatch):
    ROCKS.push_to_hub(repo)
    monkeypatch.setenv("HF_TOKEN", WRONG)
    message = error_of(RockSet.load, repo)
    assert f"{repo}, which" in message
    assert "did not accept the token" in message
    assert message.endswith("a token that may read it.")


@pytest.mark.parametrize("exists", [True, False])
def test_repository_that_is_not_shown_may_be_private(repo, monkeypatch, exists):
    if exists:
        ROCKS.push_to_hub(repo, private=True)
        monkeypatch.delenv("HF_TOKEN")
    message = error_of(RockSet.load, repo)
    assert message.startswith(f"Could not load the rock set {repo}, which is no file or folder here, from the Hub: ")
    assert "shows no such repository" in message
    assert message.endswith("a token that may read it.")


def test_repository_without_a_rock_set_is_an_error(repo):
    HUB.commit(repo, {"README.md": CARD})
    message = error_of(RockSet.load, repo)
    assert f"{repo}, which" in message
    assert message.endswith("the repository holds no such file.")


def test_broken_or_newer_set_on_the_hub_is_the_error_of_its_file(repo, content):
    newer = json.dumps(json.loads(content) | {"version": 2}).encode()
    for data, reason in ((content[:20], "Unterminated string"), (newer, "upgrade trl_opd")):
        HUB.commit(repo, {ROCK_SET_FILE: data})
        with pytest.raises(ValueError, match=f"{repo.replace('/', '--')}.*{ROCK_SET_FILE}: not a rock set: .*{reason}"):
            RockSet.load(repo)


# Connections that break


@pytest.mark.parametrize(("kind", "point"), [("create", "request"), ("commit", "request"), ("commit", "answer")])
def test_push_that_is_cut_loses_nothing_and_succeeds_again(repo, content, waits, kind, point):
    HUB.cut(kind, point)
    message = error_of(ROCKS.push_to_hub, repo)
    assert message.startswith(f"Could not push the rock set to {repo}: the connection to the Hub broke (")
    assert message.endswith(BROKE)
    assert sum(waits) <= 30
    # Where only the answer was lost, the commit is there, and the second push adds none.
    assert (ROCK_SET_FILE in HUB.files(repo)) == (point == "answer")
    assert Path("local.json").read_bytes() == content
    ROCKS.push_to_hub(repo)
    assert RockSet.load(repo) == ROCKS
    assert len(HUB.messages(repo)) == 2


def test_download_that_is_cut_once_is_tried_again(repo, content, waits):
    HUB.commit(repo, {ROCK_SET_FILE: content})
    HUB.cut("download")
    assert RockSet.load(repo) == ROCKS
    assert 0 < sum(waits) <= 2


@pytest.mark.parametrize("kind", ["download", "head"])
def test_download_that_is_always_cut_is_given_up(repo, content, waits, kind):
    HUB.commit(repo, {ROCK_SET_FILE: content})
    HUB.cut(kind, always=True)
    message = error_of(RockSet.load, repo)
    HUB.mend()
    assert f"{repo}, which" in message
    assert message.endswith(BROKE)
    assert sum(waits) <= 30
    assert RockSet.load(repo) == ROCKS


def test_folder_whose_upload_is_cut_goes_up_later_and_comes_back_with_the_same_bytes(repo, waits):
    from huggingface_hub import HfApi, snapshot_download

    files = {"README.md": CARD, "deep/config.json": b"{}", "weights.dat": bytes(2 * LFS_BYTES)}
    files["model.safetensors"] = bytes(1000)
    for path, data in files.items():
        Path("student", path).parent.mkdir(parents=True, exist_ok=True)
        Path("student", path).write_bytes(data)

    def upload():
        with hub_errors(f"push the student to {repo}"):
            HfApi().create_repo(repo, exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path="student")

    HUB.cut("upload", always=True)
    message = error_of(upload)
    HUB.mend()
    assert message.startswith(f"Could not push the student to {repo}: the connection to the Hub broke (")
    assert message.endswith(BROKE)
    assert sum(waits) <= 2 * 30  # two files, in two threads
    assert list(HUB.files(repo)) == [".gitattributes"]

    waits.clear()
    HUB.cut("upload")
    upload()
    assert 0 < sum(waits) <= 2
    assert len(HUB.lfs) == 2, "large files and weights go by LFS"
    copy = Path(snapshot_download(repo))
    for folder in (copy, Path("student")):
        assert {path: (folder / path).read_bytes() for path in files} == files
    assert len([path for path in copy.rglob("*") if path.is_file()]) == len(files) + 1  # .gitattributes


# The last test, because the Hub stays closed.


def test_hub_that_is_down_is_an_error_but_what_is_cached_still_loads(repo, waits):
    ROCKS.push_to_hub(repo)
    assert RockSet.load(repo) == ROCKS
    HUB.close()
    message = error_of(ROCKS.push_to_hub, repo)
    assert message.startswith(f"Could not push the rock set to {repo}: ")
    assert message.endswith(f"Connection refused); {BROKE}")
    assert waits == []
    message = error_of(RockSet.load, "user/never-seen")
    assert message.startswith("Could not load the rock set user/never-seen, ")
    assert message.endswith(f"Connection refused); {BROKE}")
    assert sum(waits) <= 30
    assert RockSet.load(repo) == ROCKS
