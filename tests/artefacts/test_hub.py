"""Tests of trl_opd.hub, and of a rock set's way to the Hub and back: the real client against a Hub on loopback.

The client reads its address and its mode when it is imported, and pytest's process is offline. So one other
interpreter, `python -m tests.artefacts.test_hub FOLDER`, does everything once, without torch, and prints what happened
as JSON.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trl_opd.artefacts.hub import HubError, hub_errors, redact
from trl_opd.artefacts.run_files import ROCK_SET_FILE as FILE_NAME
from trl_opd.rocks.rock_set import Controls, Rock, RockSet

from tests.helpers.hub_server import LFS_BYTES, TOKEN, WRONG, HubServer
from tests.helpers.paths import ROOT

ROCKS = RockSet(
    rocks=[Rock(id=31, text=" So", count=60, mean_kl=0.75, score=2.5), Rock(7, None, 40, 0.5, 2.0, role="pillar")],
    tokenizer={"name": "a/student", "vocab_size": 50, "fingerprint": None},
    measure={"divergence": "reverse_kl", "temperature": 1.0},
    method={"score": "context", "top_k": 100},
    corpus={"tokens": 400, "kl_sum": 30.5, "rollouts": None},
    controls=Controls([5, 0, 49], 1.01, True, 3, ["\n", None, "é"]),
)
OTHER = replace(ROCKS, controls=None)
CARD = "---\nlicense: apache-2.0\ntags: [trl_opd]\n---\n\n# A student\n"


class Recorder:
    """Runs one step after the other and keeps what came of it.

    The client waits 1 + 2 + 4 + 8 + 8 s between its tries: the waits are counted, and slept at a hundredth.
    """

    def __init__(self):
        self.steps, self.waits = {}, []
        self._sleep = time.sleep
        time.sleep = self._short_sleep

    def _short_sleep(self, seconds):
        self.waits.append(seconds)
        self._sleep(seconds / 100)

    def __call__(self, name: str, function, *args, **kwargs):
        waited = len(self.waits)
        step = self.steps[name] = {}
        try:
            step["value"] = function(*args, **kwargs)
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            step |= {"error": str(error), "kinds": kinds, "cause": type(error.__cause__).__name__}
        step["waited"] = sum(self.waits[waited:])


def work(folder: Path) -> dict:
    """Do every step with the real client and return what happened."""
    with HubServer() as hub:
        os.environ |= hub.environment | {"HF_HOME": str(folder / "home")}
        os.chdir(folder)
        step = Recorder()
        roads_of_a_rock_set(hub, step)
        refusals(hub, step)
        cuts(hub, step)
        folders(hub, step, folder)
        hub.close()
        step("down: push", push, ROCKS, "user/rocks")
        step("down: load", same, "user/never-seen", ROCKS)
        step("down: load what is cached", same, "user/rocks", OTHER)
    return {"steps": step.steps, "torch": "torch" in sys.modules, "left": sorted(os.listdir(folder))}


def push(rock_set: RockSet, repo: str, **kwargs) -> str:
    return rock_set.push_to_hub(repo, **kwargs).oid


def same(repo: str, expected: RockSet) -> bool:
    return RockSet.load(repo) == expected


def roads_of_a_rock_set(hub, step):
    ROCKS.save("local.json")
    step("push", push, ROCKS, "user/rocks")
    step("push: commit", lambda: hub.repos["user/rocks"][-1].oid)
    step("push: same bytes", lambda: hub.files("user/rocks")[FILE_NAME] == Path("local.json").read_bytes())
    step("load", same, "user/rocks", ROCKS)
    hub.commit("user/rocks", {"README.md": CARD.encode()}, "a card")
    step("push again", push, OTHER, "user/rocks", commit_message="Without controls")
    step("load again", same, "user/rocks", OTHER)
    step("push again: messages", hub.messages, "user/rocks")
    step("push again: files", lambda: sorted(hub.files("user/rocks")))
    step("push the same", push, OTHER, "user/rocks")
    step("push the same: messages", hub.messages, "user/rocks")
    step("push private", push, ROCKS, "user/private", private=True)
    step("push public", push, ROCKS, "user/public", private=False)
    step("private", lambda: sorted(hub.private))
    step("push a bare name", push, ROCKS, "bare")
    step("load a bare name", same, "user/bare", ROCKS)
    step("push what is no rock set", push, replace(ROCKS, rocks=ROCKS.rocks * 2), "user/twice")
    step("repositories", lambda: sorted(hub.repos))


def refusals(hub, step):
    step("wrong token", push, ROCKS, "user/rocks", token=WRONG)
    step("no token", push, ROCKS, "user/rocks", token=False)
    step("another's name", push, ROCKS, "someone/rocks")
    del os.environ["HF_TOKEN"]
    step("load a private set without a token", same, "user/private", ROCKS)
    os.environ["HF_TOKEN"] = WRONG
    step("load with a wrong token", same, "user/public", ROCKS)
    os.environ["HF_TOKEN"] = TOKEN
    step("load a private set", same, "user/private", ROCKS)
    step("no repository", same, "user/nothing", ROCKS)
    hub.commit("user/card", {"README.md": CARD.encode()})
    step("no file", same, "user/card", ROCKS)
    hub.commit("user/broken", {FILE_NAME: b'{"format": "trl_opd.rock_set"'})
    step("broken", same, "user/broken", ROCKS)
    newer = json.loads(Path("local.json").read_bytes()) | {"version": 2}
    hub.commit("user/newer", {FILE_NAME: json.dumps(newer).encode()})
    step("newer", same, "user/newer", ROCKS)


def cuts(hub, step):
    before = Path("local.json").read_bytes()
    for kind, point in (("create", "body"), ("commit", "body"), ("commit", "answer")):
        name, repo = f"cut {kind} {point}", f"user/cut-{kind}-{point}"
        hub.cut(kind, point=point)
        step(name, lambda repo=repo: push(RockSet.load("local.json"), repo))
        step(f"{name}: arrived", lambda repo=repo: FILE_NAME in hub.files(repo) if repo in hub.repos else False)
        step(f"{name}: local", lambda: Path("local.json").read_bytes() == before)
        step(f"{name}: again", lambda repo=repo: bool(push(RockSet.load("local.json"), repo)) and same(repo, ROCKS))
        step(f"{name}: messages", hub.messages, repo)
    hub.commit("user/once", {FILE_NAME: before})
    hub.cut("download")
    step("cut download once", same, "user/once", ROCKS)
    hub.commit("user/always", {FILE_NAME: before})
    hub.cut("download", always=True)
    step("cut download always", same, "user/always", ROCKS)
    hub.cut("head", always=True)
    step("cut head always", same, "user/always", ROCKS)
    hub.mend()
    step("cut head always: again", same, "user/always", ROCKS)


def folders(hub, step, folder):
    from huggingface_hub import HfApi, snapshot_download

    student = folder / "student"
    (student / "deep").mkdir(parents=True)
    content = {"README.md": CARD.encode(), "deep/config.json": b"{}", "weights.dat": bytes(range(256)) * 8192}
    content["model.safetensors"] = content["weights.dat"][:1000]
    for path, data in content.items():
        (student / path).write_bytes(data)

    def upload() -> bool:
        with hub_errors("push the student to user/student"):
            HfApi().create_repo("user/student", exist_ok=True)
            HfApi().upload_folder(repo_id="user/student", folder_path=student)
        return hub.files("user/student").items() >= content.items()

    hub.cut("upload", nth=2, always=True)
    step("cut upload always", upload)
    step("cut upload always: files", lambda: sorted(hub.files("user/student")))
    step(
        "cut upload always: local", lambda: all((student / path).read_bytes() == data for path, data in content.items())
    )
    hub.mend()
    hub.cut("upload")
    step("cut upload once", upload)
    stored = hub.repos["user/student"][-1].files
    step("lfs", lambda: sorted(path for path, blob in stored.items() if blob.lfs))
    step("lfs: over the bound", lambda: len(content["weights.dat"]) > LFS_BYTES)

    def download() -> list[str]:
        copy = Path(snapshot_download("user/student"))
        paths = [path for path in copy.rglob("*") if path.is_file()]
        files = {str(path.relative_to(copy)): path.read_bytes() for path in paths}
        assert files.items() >= content.items()
        return sorted(files)

    step("snapshot", download)
    (student / "README.md").write_text("---\nlicense: [\n---\n")
    step("card that is no YAML", upload)
    step("requests", lambda: sorted({method for method, _ in hub.requests}))
    step("who", lambda: HfApi().whoami()["name"])
    step("info", lambda: HfApi().model_info("user/student").sha == hub.repos["user/student"][-1].oid)
    step("list", HfApi().list_repo_files, "user/student")
    step("tree", lambda: [entry.path for entry in HfApi().list_repo_tree("user/student", "deep")])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict:
    """What one interpreter of its own did with the client; nothing it printed holds a token."""
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "tests.artefacts.test_hub", str(folder)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ended = subprocess.run(command, cwd=ROOT, env=ours, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert TOKEN not in ended.stdout + ended.stderr
    assert WRONG not in ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture
def steps(done) -> dict:
    return done["steps"]


def value(step: dict):
    assert "error" not in step, step["error"]
    return step["value"]


def sentence(step: dict) -> str:
    """Return why a step failed: one line without a token or a request's id, of bounded length, after a bounded wait."""
    assert "error" in step, "it should have failed"
    message = step["error"]
    assert step["kinds"][0] == "HubError"
    assert "OSError" in step["kinds"]  # what the command line prints as one sentence
    assert step["cause"] != "NoneType"
    assert message.startswith("Could not ")
    assert message.endswith(".")
    assert "\n" not in message
    assert "Root=" not in message
    assert "hf_" not in message
    assert len(message) < 450
    assert step["waited"] <= 30
    return message


# There and back


@pytest.mark.slow
def test_a_pushed_set_loads_as_the_same_set(steps):
    assert value(steps["push"]) == value(steps["push: commit"])
    assert value(steps["push: same bytes"])
    assert value(steps["load"])


def test_a_push_to_a_repository_replaces_the_set_and_keeps_the_rest(steps):
    assert value(steps["push again"])
    assert value(steps["load again"])
    messages = ["initial commit", "Upload rock_set.json with huggingface_hub", "a card", "Without controls"]
    assert value(steps["push again: messages"]) == messages
    assert value(steps["push again: files"]) == [".gitattributes", "README.md", FILE_NAME]


def test_an_unchanged_set_makes_no_commit(steps):
    assert value(steps["push the same"]) == value(steps["push again"])
    assert value(steps["push the same: messages"]) == value(steps["push again: messages"])


def test_a_new_repository_is_private_when_asked(steps):
    assert value(steps["push private"])
    assert value(steps["push public"])
    assert value(steps["private"]) == ["user/private"]
    assert value(steps["load a private set"])


def test_a_bare_name_is_a_repository_of_the_user(steps):
    assert value(steps["push a bare name"])
    assert value(steps["load a bare name"])


def test_what_load_would_refuse_is_not_pushed(steps):
    refused = steps["push what is no rock set"]
    assert refused["kinds"][0] == "ValueError"
    assert "occurs twice in rocks" in refused["error"]
    assert "user/twice" not in value(steps["repositories"])


def test_nothing_is_left_behind_and_nothing_heavy_is_imported(done):
    assert done["left"] == ["home", "local.json", "student"]
    assert not done["torch"]


# Refusals


@pytest.mark.parametrize("name", ["wrong token", "another's name"])
def test_a_token_that_may_not_write_is_named_as_the_reason(steps, name):
    message = sentence(steps[name])
    repo = "user/rocks" if name == "wrong token" else "someone/rocks"
    assert message.startswith(f"Could not push the rock set to {repo}: the Hub did not accept the token (40")
    assert message.endswith("; run `hf auth login`, or set HF_TOKEN to a token that may write there.")
    assert steps[name]["waited"] == 0


def test_no_token_is_not_called_a_wrong_one(steps):
    expected = (
        "Could not push the rock set to user/rocks: it takes a token and there is none; run `hf auth login`, or set "
        "HF_TOKEN to a token that may write there."
    )
    assert sentence(steps["no token"]) == expected


def test_reading_asks_for_a_token_that_may_read(steps):
    message = sentence(steps["load with a wrong token"])
    assert "user/public" in message
    assert "did not accept the token" in message
    assert message.endswith("a token that may read it.")


@pytest.mark.parametrize("name", ["no repository", "load a private set without a token"])
def test_a_repository_that_is_not_shown_may_be_private(steps, name):
    repo = "user/nothing" if name == "no repository" else "user/private"
    message = sentence(steps[name])
    assert message.startswith(f"Could not load the rock set {repo}, which is no file or folder here, from the Hub: ")
    assert "shows no such repository" in message
    assert message.endswith("a token that may read it.")


def test_a_repository_without_a_rock_set(steps):
    message = sentence(steps["no file"])
    assert "user/card" in message
    assert message.endswith("the repository holds no such file.")


@pytest.mark.parametrize(("name", "reason"), [("broken", "Expecting ',' delimiter"), ("newer", "upgrade it")])
def test_a_repository_whose_file_is_none_gets_the_usual_sentence(steps, name, reason):
    step = steps[name]
    assert step["kinds"][0] == "ValueError"
    assert f"{FILE_NAME}: not a rock set: " in step["error"]
    assert reason in step["error"]
    assert f"user--{name}" in step["error"]


# Connections that break

BROKE = "nothing local is lost, run the same again."


@pytest.mark.parametrize("name", ["cut create body", "cut commit body", "cut commit answer"])
def test_a_cut_push_loses_nothing_and_succeeds_again(steps, name):
    repo = "user/" + name.replace(" ", "-")
    message = sentence(steps[name])
    assert message.startswith(f"Could not push the rock set to {repo}: the connection to the Hub broke (")
    assert message.endswith(BROKE)
    # Where only the answer was lost, the commit is there, and the second push adds none.
    assert value(steps[f"{name}: arrived"]) == name.endswith("answer")
    assert value(steps[f"{name}: local"])
    assert value(steps[f"{name}: again"])
    assert len(value(steps[f"{name}: messages"])) == 2


def test_a_cut_download_is_tried_again(steps):
    assert value(steps["cut download once"])
    assert 0 < steps["cut download once"]["waited"] <= 2


def test_a_hub_that_always_breaks_is_given_up(steps):
    for name in ("cut download always", "cut head always"):
        message = sentence(steps[name])
        assert "user/always" in message
        assert message.endswith(BROKE)
    assert value(steps["cut head always: again"])


def test_a_hub_that_is_down(steps):
    for name, repo in (("down: push", "user/rocks"), ("down: load", "user/never-seen")):
        message = sentence(steps[name])
        assert repo in message
        assert "Connection refused" in message
        assert message.endswith(BROKE)
    assert steps["down: push"]["waited"] == 0
    assert value(steps["down: load what is cached"])


def test_a_cut_upload_of_a_folder_loses_nothing_and_succeeds_again(steps):
    message = sentence(steps["cut upload always"])
    assert message.startswith("Could not push the student to user/student: the connection to the Hub broke (")
    assert message.endswith(BROKE)
    assert value(steps["cut upload always: files"]) == [".gitattributes"]
    assert value(steps["cut upload always: local"])
    assert value(steps["cut upload once"])
    assert 0 < steps["cut upload once"]["waited"] <= 2


# The server speaks as the Hub does


def test_a_folder_comes_back_with_the_same_bytes(steps):
    files = [".gitattributes", "README.md", "deep/config.json", "model.safetensors", "weights.dat"]
    assert value(steps["snapshot"]) == files
    assert value(steps["list"]) == files
    assert value(steps["tree"]) == ["deep/config.json"]
    assert value(steps["info"])
    assert value(steps["who"]) == "user"


def test_large_files_and_weights_go_by_lfs(steps):
    assert value(steps["lfs"]) == ["model.safetensors", "weights.dat"]
    assert value(steps["lfs: over the bound"])
    assert value(steps["requests"]) == ["GET", "HEAD", "POST", "PUT"]


def test_a_card_that_is_no_yaml_is_refused_by_its_name(steps):
    step = steps["card that is no YAML"]
    assert step["kinds"][0] == "ValueError"
    assert "Invalid metadata in README.md" in step["error"]


# Offline, as every other test here is


def test_offline_mode_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for act in (lambda: RockSet.load("someone/rocks"), lambda: ROCKS.push_to_hub("someone/rocks", token=TOKEN)):
        with pytest.raises(HubError, match=r"someone/rocks.*: offline mode is on .* unset HF_HUB_OFFLINE") as caught:
            act()
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("path", ["rocks/missing.json", "a/b/c", "./rocks", "/rocks", "rocks/", "rocks"])
def test_what_can_be_no_repository_is_not_looked_for_there(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not the name of a Hub repository"):
        RockSet.load(path)


# Units


def http_error(status: int, *, method: str = "POST", said: str | None = None, kind: str = "HfHubHTTPError", **headers):
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    request = httpx.Request(method, "http://127.0.0.1/api/models/user/x", headers=headers)
    response = httpx.Response(status, request=request, headers={"X-Request-Id": "Root=1-abc"})
    return getattr(errors, kind)(f"{status}\n\nlong\n{said}", response=response, server_message=said)


def translated(error: BaseException) -> str:
    """Return the sentence that an error becomes, whose cause it stays."""
    with pytest.raises(HubError) as caught, hub_errors("do a thing"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("Could not do a thing: ")


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (404, None, "the Hub has no such repository or file."),
        (400, "a name\nis wrong.", "the Hub answered 400 Bad Request: a name is wrong."),
        (
            503,
            "Down (Request ID: Root=1-abc)",
            "the Hub answered 503 Service Unavailable: Down; nothing local is lost, run the same again later.",
        ),
        (
            429,
            None,
            "the Hub answered 429 Too Many Requests; nothing local is lost, run the same again later.",
        ),
        (
            403,
            f"{WRONG} may not",
            "the Hub did not accept the token (403 Forbidden: <TOKEN> may not); run `hf auth login`, or set HF_TOKEN "
            "to a token that may write there.",
        ),
    ],
)
def test_answers_that_are_errors(status, said, expected):
    assert translated(http_error(status, said=said, Authorization="Bearer x")) == expected


def test_a_gated_repository_is_a_matter_of_the_token():
    error = http_error(403, method="GET", said="Ask for access.", kind="GatedRepoError", Authorization="Bearer x")
    assert translated(error).startswith("the Hub did not accept the token (403 Forbidden: Ask for access); run")


def test_a_revision_that_is_not_there():
    assert translated(http_error(404, kind="RevisionNotFoundError")) == "the repository has no such revision."


def test_what_the_server_says_is_cut_and_its_tokens_are_not():
    message = translated(http_error(500, said="x" * 195 + WRONG))
    assert len(message) < 320
    assert "hf_" not in message
    assert "..." in message


def test_errors_of_the_connection_and_what_wraps_them():
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    broke = "the connection to the Hub broke ({}); " + BROKE
    assert translated(httpx.ReadTimeout("too slow")) == broke.format("too slow")
    assert translated(httpx.ReadError("")) == broke.format("ReadError")
    assert translated(httpx.InvalidURL("Invalid port: 'x'")) == broke.format("Invalid port: 'x'")
    # hf_xet has the system's errors; a refusal among them is known by its text alone.
    assert translated(ConnectionError("Network error")) == broke.format("Network error")
    refused = ConnectionError("Network error: HTTP status client error (401 Unauthorized), domain: http://x")
    assert "did not accept the token" in translated(refused)
    # A thread's wrapping, a cache's, and transformers'.
    for wrap in (RuntimeError("Error while uploading"), errors.RevisionResolutionError("x"), OSError("We couldn't")):
        wrap.__cause__ = httpx.ConnectError("refused")
        assert translated(wrap) == broke.format("refused")
    assert translated(errors.LocalTokenNotFoundError("x")).startswith("it takes a token and there is none; run")
    unknown = errors.LocalEntryNotFoundError("Not a Hub endpoint.\nCheck HF_ENDPOINT.")
    assert translated(unknown) == "Not a Hub endpoint. Check HF_ENDPOINT."


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        ValueError("a sentence"),
        FileNotFoundError("no such file"),
        PermissionError("a folder"),
        BrokenPipeError("the terminal"),
        HubError("Could not do an inner thing."),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_unchanged(error):
    if isinstance(error, (HubError, ValueError, KeyboardInterrupt)):  # also when the connection is behind them
        error.__cause__ = ConnectionError("refused")
    with pytest.raises(type(error)) as caught, hub_errors("do a thing"):
        raise error
    assert caught.value is error


def test_an_error_that_is_its_own_cause_passes_unchanged():
    error = RuntimeError("raised from itself")
    error.__cause__ = error
    with pytest.raises(RuntimeError, match="from itself"), hub_errors("do a thing"):
        raise error


def test_no_error_is_no_error():
    with hub_errors("do a thing"):
        pass


def test_a_sentence_holds_no_token_of_its_own_subject(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-another-kind ")
    with pytest.raises(HubError) as caught, hub_errors(f"push {WRONG}\nwith of-another-kind"):
        raise ConnectionError("x")
    assert str(caught.value).startswith("Could not push <TOKEN> with <TOKEN>: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Bearer {WRONG}.", "Bearer <TOKEN>."),
        ("hf_abcdefgh12345678", "<TOKEN>"),
        ("hf_abcdefgh1234567 of hf_transfer", "hf_abcdefgh1234567 of hf_transfer"),
        ("api_org_abcdefgh12345678,", "<TOKEN>,"),
        ("hf_oauth__eyJ.a-b_c and hf_jwt_eyJhb.x", "<TOKEN> and <TOKEN>"),
        ("hf_hub_download of HF_TOKEN by hf_xet", "hf_hub_download of HF_TOKEN by hf_xet"),
        (f"http://x/?token={WRONG}&y", "http://x/?token=<TOKEN>&y"),
        ("", ""),
    ],
)
def test_what_looks_like_a_token_is_redacted(text, expected):
    assert redact(text) == expected


def test_of_two_tokens_the_longer_is_redacted_first(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "one")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "one-and-more")
    assert redact("one-and-more, one") == "<TOKEN>, <TOKEN>"


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"])
def test_the_tokens_of_the_environment_are_redacted_whatever_they_look_like(monkeypatch, name):
    monkeypatch.setenv(name, "hf_abcdefgh-and-more\n")
    assert redact("x hf_abcdefgh-and-more y") == "x <TOKEN> y"
    monkeypatch.setenv(name, "")
    assert redact("x y") == "x y"


if __name__ == "__main__":
    print(json.dumps(work(Path(sys.argv[1]))))
