"""Errors of the Hub become one line without a token: single errors here, the real client's in another process."""

import os
import subprocess
import sys

import pytest

from trl_opd import RockSet
from trl_opd.artefacts.hub import HubError, hub_errors, redact

from tests.helpers.hub_server import TOKEN, WRONG
from tests.helpers.paths import ROOT
from tests.helpers.rock_sets import rock_file

BROKE = "the connection to the Hub broke ({}); nothing local is lost, run the same again."
REJECTED = "the Hub did not accept the token ({}); run `hf auth login`, or set HF_TOKEN to a token that may {}."


@pytest.mark.processes
@pytest.mark.slow
def test_rock_sets_and_folders_go_to_a_hub_on_loopback_and_back_without_printing_a_token():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["--capture=no", "tests/artefacts/online_hub.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for token in (TOKEN, WRONG):
        assert token not in done.stdout + done.stderr


def test_offline_mode_is_named_as_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    rocks = RockSet.load(rock_file(tmp_path / "rocks.json", [1]))
    for act in (lambda: RockSet.load("someone/rocks"), lambda: rocks.push_to_hub("someone/rocks", token=TOKEN)):
        with pytest.raises(HubError, match=r"someone/rocks.*: offline mode is on .* unset HF_HUB_OFFLINE") as caught:
            act()
        assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("path", ["rocks/missing.json", "a/b/c", "./rocks", "/rocks", "rocks/", "rocks"])
def test_path_that_is_not_a_repository_name_is_not_looked_for_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not the name of a Hub repository"):
        RockSet.load(path)


def http_error(status: int, said: str | None = None, *, method: str = "POST", kind: str = "HfHubHTTPError"):
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    request = httpx.Request(method, "http://127.0.0.1/api/models/user/x", headers={"Authorization": "Bearer x"})
    response = httpx.Response(status, request=request, headers={"X-Request-Id": "Root=1-abc"})
    return getattr(errors, kind)(f"{status}\n\nlong\n{said}", response=response, server_message=said)


def reason(error: BaseException) -> str:
    """Return what `hub_errors` gives as the reason of an error, which must stay the cause of the new one."""
    with pytest.raises(HubError) as caught, hub_errors("do a thing"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("Could not do a thing: ")


@pytest.mark.parametrize(
    ("answer", "kind", "expected"),
    [
        ((404, None), "HfHubHTTPError", "the Hub has no such repository or file."),
        ((404, None), "RevisionNotFoundError", "the repository has no such revision."),
        ((400, "a name\nis wrong."), "HfHubHTTPError", "the Hub answered 400 Bad Request: a name is wrong."),
        (
            (503, "Down (Request ID: Root=1-abc)"),
            "HfHubHTTPError",
            "the Hub answered 503 Service Unavailable: Down; nothing local is lost, run the same again later.",
        ),
        (
            (429, None),
            "HfHubHTTPError",
            "the Hub answered 429 Too Many Requests; nothing local is lost, run the same again later.",
        ),
        (
            (403, f"{WRONG} may not"),
            "HfHubHTTPError",
            REJECTED.format("403 Forbidden: <TOKEN> may not", "write there"),
        ),
        ((403, "Ask first."), "GatedRepoError", REJECTED.format("403 Forbidden: Ask first", "write there")),
    ],
)
def test_error_status_becomes_its_meaning_and_what_to_do(answer, kind, expected):
    assert reason(http_error(*answer, kind=kind)) == expected


def test_long_answer_is_cut_but_never_within_a_token():
    message = reason(http_error(500, "x" * 195 + WRONG))
    assert len(message) < 320
    assert "hf_" not in message
    assert "..." in message


def test_connection_errors_are_recognised_whatever_wraps_them():
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    assert reason(httpx.ReadTimeout("too slow")) == BROKE.format("too slow")
    assert reason(httpx.ReadError("")) == BROKE.format("ReadError")
    assert reason(httpx.InvalidURL("Invalid port: 'x'")) == BROKE.format("Invalid port: 'x'")
    # hf_xet raises errors of the system; only their text shows that the Hub rejected the token.
    assert reason(ConnectionError("Network error")) == BROKE.format("Network error")
    rejected = ConnectionError("Network error: HTTP status client error (401 Unauthorized), domain: http://x")
    assert "did not accept the token" in reason(rejected)
    # A thread, a cache and transformers wrap errors in these.
    for wrap in (RuntimeError("Error while uploading"), errors.RevisionResolutionError("x"), OSError("We couldn't")):
        wrap.__cause__ = httpx.ConnectError("refused")
        assert reason(wrap) == BROKE.format("refused")
    assert reason(errors.LocalTokenNotFoundError("x")).startswith("this needs a token and none is set; run")
    unknown = errors.LocalEntryNotFoundError("Not a Hub endpoint.\nCheck HF_ENDPOINT.")
    assert reason(unknown) == "Not a Hub endpoint. Check HF_ENDPOINT."


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RuntimeError("CUDA out of memory"), None),
        (FileNotFoundError("no such file"), None),
        (PermissionError("a folder"), None),
        (BrokenPipeError("the terminal"), None),
        (ValueError("a message of ours"), ConnectionError("refused")),
        (HubError("Could not do an inner thing."), ConnectionError("refused")),
        (KeyboardInterrupt(), ConnectionError("refused")),
        (itself := RuntimeError("raised from itself"), itself),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_pass_unchanged(error, cause):
    error.__cause__ = cause
    with pytest.raises(type(error)) as caught, hub_errors("do a thing"):
        raise error
    assert caught.value is error


def test_name_of_the_action_is_redacted_and_without_an_error_nothing_is_raised(monkeypatch):
    with hub_errors("do a thing"):
        pass
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
def test_text_that_looks_like_a_token_is_redacted(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"])
def test_tokens_of_the_environment_are_redacted_whatever_they_look_like_the_longest_first(monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "one")
    monkeypatch.setenv(name, "one-and-more\n")
    assert redact("x one-and-more y") == "x <TOKEN> y"
    monkeypatch.setenv(name, "")
    assert redact("x y") == "x y"
