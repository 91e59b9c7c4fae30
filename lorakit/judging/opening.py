"""Opening an endpoint from what the command line names: a URL and a variable with the key."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lorakit.errors import check_packages
from lorakit.settings import AskingSettings

if TYPE_CHECKING:  # it imports the SDK
    from lorakit.judging.client import Endpoint


def open_endpoint(command: str, url: str, variable: str, settings: AskingSettings) -> Endpoint:
    """Return the endpoint at a URL, with the key that an environment variable holds, if any.

    A variable that is not set means no key, as local servers have. Raises LorakitError for what is
    no URL or key, and where the extra `endpoint`, which `command` needs, is missing.
    """
    check_packages(command, "openai", "httpx2", extra="endpoint")
    from lorakit.judging.client import Endpoint, check_key, check_url

    key = check_key(os.environ.get(variable), variable)
    return Endpoint(check_url(url), key, settings.timeout, settings.retries)
