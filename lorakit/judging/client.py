"""Ask one question of an OpenAI-compatible endpoint, and again while trouble may pass.

It speaks HTTP through the `openai` package (the extra `endpoint`) and knows nothing of judging. The
key goes into one header of the request and nowhere else: no message, no file. The package's own
retries are off: they do not repeat a question whose answer is not a chat completion, and they would
repeat one to a server that is not there.
"""

from __future__ import annotations

import email.utils
import json
import math
import random
import time
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeVar

import httpx2
import openai

from lorakit.errors import LorakitError, missing_package
from lorakit.files import explain

T = TypeVar("T")
FIRST_WAIT = 1.0  # seconds before the second try; each further wait is twice as long
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0  # a longer wait is left to the user
LONGEST_REPLY = 1 << 24  # bytes
_TRANSIENT_STATUSES = (408, 425, 429)  # as are all from 500 on
_LONGEST_QUOTE = 200  # characters of a server's text
_REASONING_FIELDS = ("reasoning_content", "reasoning")  # vLLM's, before and since 0.12


class TransientError(Exception):
    """Trouble that may have passed when the question is asked again, after `wait` seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Message(NamedTuple):
    """What a server's model wrote: its text, and the reasoning that the server tells apart."""

    text: str
    reasoning: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where to ask: the URL up to and with `/v1`, the key, and how long and often to try.

    Its connections stay open for the next question; several threads may use it at a time.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5
    _client: openai.OpenAI = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            client = _open_client(self.url, self.key, self.timeout)
        except ImportError:
            raise missing_package("a SOCKS proxy", "socksio", "endpoint") from None
        except OSError as error:
            self._raise_unreachable(f"{error.filename or 'its certificates'}: {explain(error)}")
        except (httpx2.InvalidURL, ValueError) as error:  # the URL, or a proxy's
            self._raise_unreachable(str(error))
        object.__setattr__(self, "_client", client)
        weakref.finalize(self, client.close)

    def ask(self, body: Mapping[str, object]) -> str:
        """Return the text that answers `body`, a chat-completions request; "" where it has none.

        Raises LorakitError as `message` does.
        """
        return self.message(body).text

    def message(self, body: Mapping[str, object]) -> Message:
        """Return the message that answers `body`, a chat-completions request.

        429, 5xx, time-outs, closed connections and replies that are no chat completion are tried
        again after a growing wait, or the one the server asks for (Retry-After). Raises
        LorakitError for whatever else is wrong, and when all tries are used up.
        """
        return self._put("/chat/completions", body, _message)

    def continuation(self, body: Mapping[str, object]) -> str:
        """Return the text that goes on after the prompt in `body`, a completions request.

        Tries again, and raises LorakitError, as `message` does.
        """
        return self._put("/completions", body, _continuation)

    def _put(self, path: str, body: Mapping[str, object], read: Callable[[bytes], T]) -> T:
        """Return what `read` finds in the reply to a request."""
        data = json.dumps(body).encode()  # ASCII: a text may hold half a surrogate pair
        for attempt in range(self.retries + 1):
            try:
                return read(self._post(path, data))
            except TransientError as error:
                reason = self.printable(str(error))
                if attempt < self.retries:
                    time.sleep(max(error.wait, _backoff(attempt)))
        raise LorakitError(
            f"{self.url}: {reason}, {self.retries + 1} times; try again later, with --resume"
        )

    def _post(self, path: str, data: bytes) -> bytes:
        """Return the server's reply to one request."""
        try:
            return self._client.post(path, cast_to=httpx2.Response, content=data).content
        except openai.APIStatusError as error:
            self._raise_status(error.response)
        except openai.APITimeoutError:
            raise TransientError(f"no answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            self._raise_connection_error(error.__cause__)

    def _raise_status(self, reply: httpx2.Response) -> NoReturn:
        """Raise what a status other than 2xx means; a redirect could take the key elsewhere."""
        reason = f"{reply.status_code} {reply.reason_phrase}"
        wait = retry_after(reply.headers.get("Retry-After"))
        if wait > LONGEST_RETRY_AFTER:
            raise LorakitError(
                f"{self.url}: {reason}, asks to wait {wait:.0f} s; run again then, with --resume"
            ) from None
        if reply.status_code in _TRANSIENT_STATUSES or reply.status_code >= 500:
            raise TransientError(reason, wait) from None
        detail = _detail(reply.content)
        answer = self.printable(f"{reason}{': ' if detail else ''}{detail}")
        remedy = _REMEDIES.get(reply.status_code, "mend the request or the endpoint's settings")
        raise LorakitError(f"{self.url}: {answer}; {remedy}") from None

    def _raise_connection_error(self, error: BaseException | None) -> NoReturn:
        """Raise TransientError for a closed connection, LorakitError where none was made."""
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError) and not isinstance(cause, _CLOSED):
            self._raise_unreachable(explain(cause))
        if cause is None and isinstance(error, _NOT_CONNECTED):
            self._raise_unreachable(str(error))
        raise TransientError("the connection was closed") from None

    def _raise_unreachable(self, reason: str) -> NoReturn:
        """Raise the LorakitError for a server that cannot be connected to."""
        reason = self.printable(reason)
        raise LorakitError(
            f"cannot reach {self.url}: {reason}; start the server or mend --endpoint"
        ) from None

    def printable(self, text: str) -> str:
        """Return a server's text as one short printable line without the key."""
        clean = text.replace(self.key, "(the key)") if self.key else text
        line = "".join(c if c.isprintable() else " " for c in clean)
        return line if len(line) <= _LONGEST_QUOTE else line[: _LONGEST_QUOTE - 1] + "…"


_CLOSED = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
_NOT_CONNECTED = (httpx2.ConnectError, httpx2.ProxyError, httpx2.UnsupportedProtocol)
_REMEDIES = {
    401: "put a valid key into the variable that --key-variable names",
    403: "use a key that may use this model",
    404: "mend --endpoint (it ends in /v1 on most servers) or the model's name",
}


def _open_client(url: str, key: str | None, timeout: float) -> openai.OpenAI:
    """Return the SDK's client: no retries, no redirects, bounded replies, and our headers only.

    The SDK would add headers that describe this machine and that OPENAI_… variables name.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "lorakit",
        "Accept-Encoding": "identity",
        **({"Authorization": f"Bearer {key}"} if key else {}),
    }

    def replace_headers(request: httpx2.Request) -> None:
        needed = {name: request.headers[name] for name in ("Host", "Content-Length")}
        request.headers = httpx2.Headers({**needed, **headers})

    is_https = url.startswith("https:")  # certificates are not read where none is looked at
    connections = openai.DefaultHttpxClient(
        transport=httpx2.HTTPTransport(verify=is_https, proxy=_proxy_for(url)),
        timeout=timeout,
        follow_redirects=False,
        event_hooks={"request": [replace_headers], "response": [_limit_size]},
    )
    return openai.OpenAI(
        api_key=key or "none", base_url=url, max_retries=0, timeout=timeout, http_client=connections
    )


def _proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for a URL; None where it names none.

    Left to itself, the SDK would open the proxies of all URLs, also of those not asked.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


def _limit_size(reply: httpx2.Response) -> None:
    """Let at most LONGEST_REPLY bytes of a reply be read, and none of it be inflated."""
    reply.headers.pop("Content-Encoding", None)  # none was asked for
    if isinstance(reply.stream, httpx2.SyncByteStream):
        reply.stream = _BoundedStream(reply.stream)


@dataclass(frozen=True)
class _BoundedStream(httpx2.SyncByteStream):
    """The first LONGEST_REPLY bytes of a stream."""

    stream: httpx2.SyncByteStream

    def __iter__(self) -> Iterator[bytes]:
        left = LONGEST_REPLY
        for chunk in self.stream:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return

    def close(self) -> None:
        self.stream.close()


def check_key(key: str | None, variable: str) -> str | None:
    """Return a variable's key, None where it is empty; LorakitError where it cannot be one."""
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
    """Return FIRST_WAIT·2^attempt seconds, at random up to half less: retries must not coincide."""
    longest = min(math.ldexp(FIRST_WAIT, min(attempt, 30)), LONGEST_WAIT)
    return longest * random.uniform(0.5, 1.0)


def _detail(content: bytes) -> str:
    """Return what the server says is wrong, in OpenAI's format or a similar one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    error = value.get("error", value.get("detail")) if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def _message(reply: bytes) -> Message:
    """Return the message of a chat completion; TransientError where the reply is not one."""
    try:
        message = json.loads(reply)["choices"][0]["message"]
        content = message["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise TransientError("the answer is no chat completion") from None
    if not isinstance(content, str | None):
        raise TransientError("the answer is no text")
    thoughts = [message.get(name) for name in _REASONING_FIELDS]
    return Message(content or "", next((t for t in thoughts if t and isinstance(t, str)), None))


def _continuation(reply: bytes) -> str:
    """Return the text of a completion; TransientError where the reply is not one."""
    try:
        text = json.loads(reply)["choices"][0]["text"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise TransientError("the answer is no completion") from None
    if not isinstance(text, str):
        raise TransientError("the answer is no text")
    return text
