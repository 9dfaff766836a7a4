"""Errors of the Hugging Face Hub, turned into one sentence that contains no access token.

The Hub's client raises HTTP errors, errors of its HTTP library (which are no `OSError`) and errors of the system, and
threads and caches wrap each of these once more. This module turns all of them into one `OSError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# Tokens of users and of organisations (the old form; both have over 30 characters), and OAuth and JWT tokens.
TOKEN = re.compile(r"(?:hf|api_org)_(?:(?:oauth|jwt)_+[\w.-]*|[A-Za-z0-9]{16,})")
REQUEST_ID = re.compile(r"\(?(?:Request ID|Amzn Trace ID|Amz CF ID): [^\s)]+\)?", re.IGNORECASE)
XET_REFUSAL = re.compile(r"XetAuthenticationError|\b40[13] (?:Unauthorized|Forbidden)")
MAX_DETAIL = 200


class HubError(OSError):
    """An error of the Hub or of the connection to it; the client's own error is its `__cause__`."""


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one sentence: "Could not {what}: the reason, and what to do."

    Errors that are not the Hub's pass unchanged, and so does a `HubError`.

    Args:
        what (`str`): What is done, with the repository's name: "push the rock set to user/rocks".

    Raises:
        `HubError`: if the Hub or the way to it failed; it is an `OSError`.
    """
    try:
        yield
    except (HubError, ValueError):  # these are sentences
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise HubError(redact(" ".join(f"Could not {what}: {reason}.".split()))) from error


def redact(text: str) -> str:
    """Return the text with `<TOKEN>` in place of what looks like a Hub token, and of the tokens in the environment."""
    known = {os.environ.get(name, "").strip() for name in TOKEN_VARIABLES} - {""}
    for token in sorted(known, key=len, reverse=True):
        text = text.replace(token, "<TOKEN>")
    return TOKEN.sub("<TOKEN>", text)


def _reason(error: BaseException | None) -> str | None:
    """Return why it failed, from the outermost error that says so, or `None` if none of them is the Hub's."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    last = None
    while error is not None:
        said = _short(str(error) or type(error).__name__)
        response = getattr(error, "response", None)
        if isinstance(error, httpx.HTTPError) and response is not None:
            return _refusal(error, response)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "offline mode is on and the local cache does not hold it; unset HF_HUB_OFFLINE to reach the Hub"
        if isinstance(error, errors.LocalTokenNotFoundError):
            return f"it takes a token and there is none; {_login()}"
        # hf_xet raises errors of the system, and only their text shows that the Hub refused the token.
        if isinstance(error, (ConnectionError, PermissionError)) and XET_REFUSAL.search(repr(error)):
            return f"the Hub did not accept the token ({said}); {_login()}"
        broken = isinstance(error, (httpx.HTTPError, httpx.InvalidURL, ConnectionError, TimeoutError))
        if broken and not isinstance(error, BrokenPipeError):  # a closed terminal pipe, not the Hub
            return f"the connection to the Hub broke ({said}); nothing local is lost, run the same again"
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.FileMetadataError)):
            last = said
        error = error.__cause__ if error.__cause__ is not error else None
    return last


def _refusal(error: Exception, response) -> str:
    from huggingface_hub import errors

    status = response.status_code
    sent = response.request
    login = _login("read it" if sent.method in ("GET", "HEAD") else "write there")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the repository holds no such file"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return f"the Hub shows no such repository; check its name, and if it is private {login}"
    if status == 404:
        return "the Hub has no such repository or file"
    if status == 401 and "Authorization" not in sent.headers:
        return f"it takes a token and there is none; {login}"
    said = _short(getattr(error, "server_message", None) or "")
    answer = f"{status} {response.reason_phrase}".strip() + (f": {said}" if said else "")
    if status in (401, 403):
        return f"the Hub did not accept the token ({answer}); {login}"
    later = "; nothing local is lost, run the same again later" if status in (408, 429) or status >= 500 else ""
    return f"the Hub answered {answer}{later}"


def _login(right: str = "write there") -> str:
    return f"run `hf auth login`, or set HF_TOKEN to a token that may {right}"


def _short(text: str) -> str:
    # We redact before we shorten, because a token that is cut in two no longer matches the pattern.
    text = redact(" ".join(REQUEST_ID.sub("", text).split())).rstrip(".")
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}..."
