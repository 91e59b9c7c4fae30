"""Opening an endpoint from what the command line names: a URL and a variable with the key."""

from __future__ import annotations

import os
import urllib.parse
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError, check_packages
from lorakit.settings import AskingSettings

if TYPE_CHECKING:  # it imports the SDK
    from lorakit.judging.client import Endpoint

_LONGEST_HOST = 253  # characters, RFC 1035


def open_endpoint(command: str, url: str, variable: str, settings: AskingSettings) -> Endpoint:
    """Return the endpoint at a URL, with the key that an environment variable holds, if any.

    A variable that is not set means no key, as local servers have. Raises LorakitError for what is
    no URL or key, and where the extra `endpoint`, which `command` needs, is missing.
    """
    check_packages(command, "openai", "httpx2", extra="endpoint")
    from lorakit.judging.client import Endpoint, check_key

    key = check_key(os.environ.get(variable), variable)
    return Endpoint(check_url(url), key, settings.timeout, settings.retries)


def check_url(url: str) -> str:
    """Return an endpoint's URL without a slash at its end; LorakitError where it is not a URL.

    A name and password in it would show in messages, and are refused.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_sound = _is_port(parts.port) and _is_host(parts.hostname or "") and url.isprintable()
    except ValueError:  # brackets that do not close, a port or a label of a host that is none
        is_sound = False
    if not is_sound or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise LorakitError(
            "--endpoint is no http(s) URL; give one such as http://localhost:8000/v1"
        )
    if parts.username is not None:
        raise LorakitError("--endpoint holds a name or password; use --key-variable instead")
    return url.rstrip("/")


def _is_port(port: int | None) -> bool:
    return port is None or port > 0


def _is_host(host: str) -> bool:
    """Return whether a host can be looked up; ValueError for labels that are too long or empty."""
    if not host.isascii():
        from idna import encode  # the SDK's, stricter than Python's codec

        return len(encode(host)) <= _LONGEST_HOST
    return 0 < len(host.encode("idna")) <= _LONGEST_HOST and " " not in host
