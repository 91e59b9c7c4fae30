"""One question to an OpenAI-compatible chat endpoint, asked again while the trouble may pass.

It knows HTTP and the chat-completions format, nothing of judging. The key goes into one header of
the request and nowhere else: no message, no file.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import math
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lorakit.errors import LorakitError
from lorakit.files import explain

FIRST_WAIT = 1.0  # seconds before the second try; each further wait is twice as long
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0  # who is asked to wait longer had better come back
_PASSING = (408, 425, 429)  # and all from 500 on
_LONGEST_REPLY = 1 << 24
_LONGEST_QUOTE = 200


class PassingError(Exception):
    """What may be over when the question is asked again, `wait` seconds from now at the soonest."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where to ask: the URL up to and with `/v1`, the key, and how long and often to try."""

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5

    def ask(self, body: Mapping[str, Any]) -> str:
        """Return the text that answers `body`, a chat-completions request; "" where it has none.

        429, 5xx, time-outs, closed connections and replies that are no chat completion are tried
        again after a growing wait, or the one the server asks for (Retry-After). Raises
        LorakitError for whatever else is wrong, and when all tries are used up.
        """
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            try:
                return _text(self._post(data))
            except PassingError as trouble:
                reason = self.shown(str(trouble))
                if attempt < self.retries:
                    time.sleep(max(trouble.wait, _backoff(attempt)))
        raise LorakitError(
            f"{self.url}: {reason}, {self.retries + 1} times; try again later, with --resume"
        )

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "lorakit"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as reply:
                content = bytes(reply.read(_LONGEST_REPLY))
                if reply.length:  # of what was announced and did not come
                    raise PassingError("the answer was cut short")
                return content
        except urllib.error.HTTPError as error:
            self._refuse(error)
        except (OSError, http.client.HTTPException) as error:
            self._lose(error)

    def _refuse(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            reason = f"{error.code} {error.reason}"
            wait = retry_after(error.headers.get("Retry-After"))
            detail = _detail(error)
        if wait > LONGEST_RETRY_AFTER:
            raise LorakitError(
                f"{self.url}: {reason}, asks to wait {wait:.0f} s; run again then, with --resume"
            )
        if error.code in _PASSING or error.code >= 500:
            raise PassingError(reason, wait) from None
        told = self.shown(f"{reason}{': ' if detail else ''}{detail}")
        remedy = _REMEDIES.get(error.code, "mend the request or the endpoint's settings")
        raise LorakitError(f"{self.url}: {told}; {remedy}") from None

    def _lose(self, error: OSError | http.client.HTTPException) -> NoReturn:
        """Say whether a lost connection may come back: not one that was never made."""
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            raise PassingError(f"no answer within {self.timeout:g} s") from None
        closed = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
        if isinstance(cause, (http.client.HTTPException, *closed)):
            raise PassingError("the connection was closed") from None
        reason = explain(cause) if isinstance(cause, OSError) else str(cause)
        raise LorakitError(
            f"cannot reach {self.url}: {self.shown(reason)}; start the server or mend --endpoint"
        ) from None

    def shown(self, text: str) -> str:
        """Return a server's text as one short printable line without the key."""
        clean = text.replace(self.key, "(the key)") if self.key else text
        line = "".join(c if c.isprintable() else " " for c in clean)
        return line if len(line) <= _LONGEST_QUOTE else line[: _LONGEST_QUOTE - 1] + "…"


_REMEDIES = {
    401: "put a valid key into the variable that --key-variable names",
    403: "use a key that may use this model",
    404: "mend --endpoint (it ends in /v1 on most servers) or --judge-model",
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirection: it could take the key to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def check_url(url: str) -> str:
    """Return an endpoint's URL without a slash at its end; LorakitError where it is none.

    A name and password in it would show in messages, and are refused.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise LorakitError(
            "--endpoint is no http(s) URL; give one such as http://localhost:8000/v1"
        )
    if parts.username is not None:
        raise LorakitError("--endpoint holds a name or password; use --key-variable instead")
    return url.rstrip("/")


def check_key(key: str | None, variable: str) -> str | None:
    """Return the key that an environment variable holds, None for none; LorakitError for no key."""
    key = (key or "").strip()
    if not all(" " < c <= "~" for c in key):
        raise LorakitError(f"${variable} holds what cannot be a key; put the key alone into it")
    return key or None


def retry_after(text: str | None) -> float:
    """Return the seconds that a Retry-After header, a number or a date, asks for; else 0."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    try:
        seconds: float = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0
    return max(seconds, 0.0)


def _backoff(attempt: int) -> float:
    """Return FIRST_WAIT·2^attempt seconds, or up to half less so that not all come at once."""
    longest = min(math.ldexp(FIRST_WAIT, min(attempt, 30)), LONGEST_WAIT)
    return longest * random.uniform(0.5, 1.0)


def _detail(error: urllib.error.HTTPError) -> str:
    """Return what the server says is wrong, as OpenAI's format or others have it."""
    try:
        value = json.loads(error.read(_LONGEST_REPLY))
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return ""
    found = value.get("error", value.get("detail")) if isinstance(value, dict) else None
    message = found.get("message") if isinstance(found, dict) else found
    return message if isinstance(message, str) else ""


def _text(reply: bytes) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise PassingError("the answer is no chat completion") from None
    if not isinstance(content, str | None):
        raise PassingError("the answer is no text")
    return content or ""
