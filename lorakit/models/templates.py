"""Render chat templates within bounds of time, memory and size, in a process of their own.

A template is a program that comes with the model. In this process none could be stopped for sure:
`9 ** (9 ** 9)` is one step of Python's, which no signal or thread interrupts. The process of
template_worker.py is ended by the kernel.
"""

from __future__ import annotations

import atexit
import functools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from lorakit.models import template_worker

_SCRIPT = str(Path(template_worker.__file__))
_LONGEST_REASON = 200  # characters of what a template says is wrong


class TemplateError(ValueError):
    """A template that cannot be rendered; the message says why."""


class _Renderer:
    """The process that renders, started when first needed, and again after a template ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: Mapping[str, object]) -> str:
        """Return the text; TemplateError where there is none."""
        request = {"template": template, "variables": variables}
        with self._lock:
            reply = self._ask(json.dumps(request, default=str).encode() + b"\n")
        if "error" in reply:
            reason = " ".join(reply["error"].split())
            raise TemplateError(reason[:_LONGEST_REASON])
        return reply["text"]

    def _ask(self, request: bytes) -> dict[str, str]:
        process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            code = self.close()
            raise TemplateError(
                f"it takes more than {template_worker.SECONDS:g} s of processor time"
                if code == -signal.SIGPROF
                else f"it ended its process, with {code}"
            )
        reply: dict[str, str] = json.loads(line)
        return reply

    def close(self) -> int | None:
        """End the process, if there is one, and return its code."""
        process, self._process = self._process, None
        if process is None:
            return None
        with process:  # closes the pipes, whereupon it ends, and waits
            pass
        return process.returncode


def _start() -> subprocess.Popen[bytes]:
    """Start the process; -P keeps this folder's modules from taking the place of others."""
    return subprocess.Popen(
        [sys.executable, "-P", _SCRIPT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run
    )


@functools.cache
def _renderer() -> _Renderer:
    renderer = _Renderer()
    atexit.register(renderer.close)
    return renderer


def render(template: str, variables: Mapping[str, object]) -> str:
    """Return the text that a template makes of the variables, which are JSON values.

    Raises TemplateError for a template that is none, that refuses the variables, or that takes more
    time, memory or characters than template_worker.py allows.
    """
    return _renderer().render(template, variables)
