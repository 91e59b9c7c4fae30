"""Chat templates: conversations as one text, where the answer begins, and what is only reasoning.

A template writes the turns of a conversation with its own marks around them. Some add a block of
reasoning before an answer that has none; with Qwen3's, the conversation `Hi`, `Hello` becomes

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n

Whatever stands before `Hello` belongs to the prompt, in training and in generation alike; what a
model itself writes between the marks is its reasoning, not its answer. No tokens are known here.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from lorakit.adapters.history import Header
from lorakit.errors import LorakitError
from lorakit.models.templates import render
from lorakit.records.completions import CLOSE, OPEN
from lorakit.records.record import Turn
from lorakit.settings import GenerationSettings, TrainingSettings

S = TypeVar("S", TrainingSettings, GenerationSettings)
V = TypeVar("V")
Tokenizer = Any  # transformers.PreTrainedTokenizerFast

# The date that templates get when they ask for today's, so that a run does not depend on its day. A
# macro in front of the template hides the function of that name, which would ask the clock.
CHAT_DATE = datetime.date(2025, 1, 1)
_DATED = "".join(
    [
        "{% macro strftime_now(format) %}{{ format",
        *(f"|replace('%{code}', '{CHAT_DATE:%{code}}')" for code in "dmYyBbAaHMSjI"),
        "}}{% endmacro %}{{ '' }}",
    ]
)
_THINKING = ("enable_thinking", "thinking")  # what templates call the switch
_SENTINEL = "\N{WHITE SQUARE}answer\N{WHITE SQUARE}"


class Rendered(NamedTuple):
    """A conversation as one text, of which what follows `prompt` is learnt."""

    prompt: str
    text: str


class _Frame(NamedTuple):
    """The text before an answer.

    `opening` is what the template writes for generation, `before` what it writes when an answer
    follows. `prompt` is what lorakit generates and trains after, and `lead` all of the text before
    the answer: they differ where the template puts white space between them.
    """

    opening: str
    before: str
    prompt: str
    lead: str


@dataclass(frozen=True)
class Chat:
    """How conversations are put to a tokenizer's template.

    `system` is the system turn of conversations without one, `arguments` go to the template by
    their names.
    """

    tokenizer: Tokenizer
    system: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)

    def prompt(self, turns: Sequence[Turn], where: str) -> str:
        """Return the text up to where the model's answer begins.

        Where a template's switch for thinking is set to true, this is what the template itself
        writes for generation; else the prompt that answers are learnt after.
        """
        if any(self.arguments.get(name) is True for name in _THINKING):
            return self._render(turns, None, where)
        return self._frame(turns, where).prompt

    def answered(self, turns: Sequence[Turn], answer: str, where: str) -> Rendered:
        """Return the prompt and the whole text with an answer, without its outer white space.

        Reasoning that the answer itself holds, between its template's marks, is learnt where the
        template keeps it. Raises LorakitError where the template writes the turns otherwise when an
        answer follows.
        """
        frame = self._frame(turns, where)
        text = self._render(turns, answer.strip(), where)
        if CLOSE in answer and text.startswith(frame.opening):
            return Rendered(frame.opening, text)
        if not text.startswith(frame.before):
            raise _written_otherwise(where)
        return Rendered(frame.prompt, frame.lead + text[len(frame.before) :])

    def _frame(self, turns: Sequence[Turn], where: str) -> _Frame:
        """Return what the template writes before an answer, with and without one.

        Raises LorakitError where one is not the other's beginning, but for a mark of reasoning.
        """
        opening = self._render(turns, None, where)
        before, sentinel, _ = self._render(turns, _SENTINEL, where).partition(_SENTINEL)
        if sentinel and before.startswith(opening):
            adds_block = before[len(opening) :].strip()
            return _Frame(opening, before, before if adds_block else opening, before)
        if sentinel and opening.startswith(before) and opening[len(before) :].strip() == OPEN:
            closed = f"{opening.rstrip()}\n\n{CLOSE}\n\n"
            return _Frame(opening, before, closed, closed)
        raise _written_otherwise(where)

    def _render(self, turns: Sequence[Turn], answer: str | None, where: str) -> str:
        """Apply the template; without an answer, up to where the answer begins."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        if self.system is not None and not any(turn.role == "system" for turn in turns):
            messages.insert(0, {"role": "system", "content": self.system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        variables = {
            "tools": None,
            "documents": None,
            **self.tokenizer.special_tokens_map,
            **self.arguments,
            "messages": messages,
            "add_generation_prompt": answer is None,
        }
        try:
            return render(_DATED + self.tokenizer.get_chat_template(), variables)
        except ValueError as error:  # also transformers', for several templates without a default
            raise LorakitError(
                f"{where}: the model's chat template cannot be applied ({error}); use --chat off"
            ) from error


def _written_otherwise(where: str) -> LorakitError:
    return LorakitError(
        f"{where}: the chat template writes the prompt otherwise when an answer follows; train "
        "with --chat off"
    )


def following(settings: S, headers: Sequence[Header]) -> S:
    """Return the settings with what they leave open of chat taken from the adapters' headers.

    Raises LorakitError where the adapters do not agree on what is left open.
    """
    chats = {str(header["chat"]) for header in headers if header.get("chat")}
    if settings.chat == "auto" and len(chats) > 1:
        raise LorakitError(
            "some of the adapters were trained with the chat template and some without; choose by "
            "--chat on or --chat off"
        )
    chat = chats.pop() if settings.chat == "auto" and chats else settings.chat
    system, arguments = settings.system, settings.chat_args
    if system is None:
        system = _agreed([header.get("system") for header in headers], "--system")
    if not arguments:
        stored = _agreed([header.get("chat_args") for header in headers], "--chat-arg")
        arguments = tuple((stored or {}).items())
    return replace(settings, chat=chat, system=system, chat_args=arguments)


def _agreed(values: Sequence[V | None], option: str) -> V | None:
    """Return the value that all headers have; LorakitError naming the option where they differ."""
    first = next(iter(values), None)
    if any(value != first for value in values):
        raise LorakitError(
            f"the adapters were trained with different values of {option}; give it on the command "
            "line"
        )
    return first


def reasons(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's template knows marks around a model's reasoning."""
    templates = tokenizer.chat_template or ""
    return OPEN in str(templates) and CLOSE in str(templates)
