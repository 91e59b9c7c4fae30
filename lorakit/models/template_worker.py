"""The process that renders chat templates, which come with models and can be bombs.

It is run as a script by templates.py, imports nothing of lorakit, and answers each line of JSON on
stdin, `{"template": …, "variables": …}`, by one on stdout, `{"text": …}` or `{"error": …}`. A
rendering that takes too long ends the process, by a signal that no template can hold up; one that
needs too much memory is an error. Templates see the names that transformers gives them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

SECONDS = 5.0  # of processor time for one rendering
MEMORY = 1 << 30  # bytes of address space, with those of Python
LONGEST = 1 << 22  # characters of a text
_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class _Generation(jinja2.ext.Extension):
    """The tag `generation` around what an assistant writes, which leaves it as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, through which sandboxes leak."""

    def __init__(*args: Any, **fields: Any) -> None:  # `self` may be the name of a field
        own, *others = args
        values = dict(*others, **fields)
        for name in values:
            _check_public(name)
        jinja2.utils.Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace has no field {name!r}")


class _Dict:
    """What templates call `dict`: a function, without the attributes of the class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(template)


def answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """Return the text that a template makes of the variables, or what is wrong with it."""
    try:
        text = _compiled(template).render(**variables)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except _ERRORS as error:
        return {"error": str(error) or type(error).__name__}
    if len(text) > LONGEST:
        return {"error": f"it writes more than {LONGEST >> 20} Mi characters"}
    return {"text": text}


def main() -> None:
    """Answer requests until stdin ends."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        reply = answer(**request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
