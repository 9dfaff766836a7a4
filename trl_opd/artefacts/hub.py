"""Errors of the Hugging Face Hub, turned into one-line messages that contain no access token.

The Hub's client raises HTTP errors, errors of its HTTP library (which are not `OSError`s) and errors of the system, and
threads and caches wrap each of these once more. This module turns all of them into one `OSError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# OAuth and JWT tokens, and the older tokens of users and of organisations, which have more than 30 characters.
TOKEN = re.compile(r"(?:hf|api_org)_(?:(?:oauth|jwt)_+[\w.-]*|[A-Za-z0-9]{16,})")
REQUEST_ID = re.compile(r"\(?(?:Request ID|Amzn Trace ID|Amz CF ID): [^\s)]+\)?", re.IGNORECASE)
XET_REJECTION = re.compile(r"XetAuthenticationError|\b40[13] (?:Unauthorized|Forbidden)")
MAX_DETAIL = 200


class HubError(OSError):
    """An error of the Hub or of the connection to it; the client's own error is its `__cause__`."""


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the Hub's client raised inside into a `HubError`: "Could not {what}: {reason; what to do}."

    Errors that do not come from the Hub or from the connection to it pass unchanged, and so does a `HubError`.

    Args:
        what (`str`): What the block does, with the repository's name: "push the rock set to user/rocks".

    Raises:
        `HubError`: if the Hub or the connection to it failed; it is an `OSError`.
    """
    try:
        yield
    except (HubError, ValueError):  # their messages are already clear
        raise
    except Exception as error:  # the client raises errors of many classes, and wraps them in others
        reason = _reason(error)
        if reason is None:
            raise
        message = " ".join(f"Could not {what}: {reason}.".split())
        raise HubError(redact(message)) from error


def redact(text: str) -> str:
    """Return the text with `<TOKEN>` for everything that looks like a Hub token, and for the environment's tokens."""
    known = {os.environ.get(name, "").strip() for name in TOKEN_VARIABLES} - {""}
    for token in sorted(known, key=len, reverse=True):  # a token may begin with a shorter one
        text = text.replace(token, "<TOKEN>")
    return TOKEN.sub("<TOKEN>", text)


def _reason(error: BaseException | None) -> str | None:
    """Return why a request failed, from the outermost error that shows it; `None` if no error comes from the Hub."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    reason = None
    while error is not None:
        detail = _shorten(str(error) or type(error).__name__)
        response = getattr(error, "response", None)
        if isinstance(error, httpx.HTTPError) and response is not None:
            return _reason_of_answer(error, response)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return "offline mode is on and the local cache does not hold it; unset HF_HUB_OFFLINE to reach the Hub"
        if isinstance(error, errors.LocalTokenNotFoundError):
            return f"this needs a token and none is set; {_login('write there')}"
        # hf_xet raises errors of the system, and only their text shows that the Hub rejected the token.
        if isinstance(error, (ConnectionError, PermissionError)) and XET_REJECTION.search(repr(error)):
            return f"the Hub did not accept the token ({detail}); {_login('write there')}"
        broken = isinstance(error, (httpx.HTTPError, httpx.InvalidURL, ConnectionError, TimeoutError))
        if broken and not isinstance(error, BrokenPipeError):  # that one is a closed terminal, not the Hub
            return f"the connection to the Hub broke ({detail}); nothing local is lost, run the same again"
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.FileMetadataError)):
            reason = detail
        error = error.__cause__ if error.__cause__ is not error else None
    return reason


def _reason_of_answer(error: Exception, response) -> str:
    """Return why a request failed to which the Hub answered with an error status."""
    from huggingface_hub import errors

    status = response.status_code
    request = response.request
    login = _login("read it" if request.method in ("GET", "HEAD") else "write there")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the repository holds no such file"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return f"the Hub shows no such repository; check its name, and if it is private {login}"
    if status == 404:
        return "the Hub has no such repository or file"
    if status == 401 and "Authorization" not in request.headers:
        return f"this needs a token and none is set; {login}"

    answer = f"{status} {response.reason_phrase}".strip()
    detail = _shorten(getattr(error, "server_message", None) or "")
    if detail:
        answer += f": {detail}"
    if status in (401, 403):
        return f"the Hub did not accept the token ({answer}); {login}"
    if status in (408, 429) or status >= 500:
        answer += "; nothing local is lost, run the same again later"
    return f"the Hub answered {answer}"


def _login(right: str) -> str:
    return f"run `hf auth login`, or set HF_TOKEN to a token that may {right}"


def _shorten(text: str) -> str:
    # We redact before we shorten, because a token that is cut in two no longer matches the pattern.
    words = REQUEST_ID.sub("", text).split()
    text = redact(" ".join(words)).rstrip(".")
    if len(text) > MAX_DETAIL:
        text = f"{text[:MAX_DETAIL]}..."
    return text
