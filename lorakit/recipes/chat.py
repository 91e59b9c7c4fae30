"""Conversations: in the forms people have them, to records with `messages`.

Read are messages (`role`, `content`, as OpenAI's fine-tuning files have them), ShareGPT (`from`,
`value`), Alpaca (`instruction`, `input`, `output`) and TRL's lists of turns in `prompt` and
`completion`. A record's last turn is the assistant's: the one that is learnt. This file knows no
model and no chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lorakit.errors import LorakitError
from lorakit.recipes.readers.hub_data import hub_rows
from lorakit.recipes.readers.rows import converted, id_of, rest_of
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_LISTS = ("messages", "conversations", "conversation")
_ALPACA = ("instruction", "input", "output", "history")
_CALLS = ("tool_calls", "function_call")
_READ = ("role", "from", "content", "value", "weight", *_CALLS)
_SKIP = "or give --on-error skip"

Turn = Mapping[str, object]


def chat_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield conversations with `messages`: system, turns, the assistant's answer last.

    A source is a file of JSON, JSON lines, CSV or Parquet, a data set saved to disk, or
    hf://owner/name[:config][@revision]. A line:

        {"id": "c1", "messages": [{"role": "system", "content": "Be brief."},
                                  {"role": "user", "content": "Where is Paris?"},
                                  {"role": "assistant", "content": "In France."}]}
    """
    rows = hub_rows(sources, request, tally)
    yield from converted(rows, lambda row: _conversation(row, tally), tally)


def _conversation(row: Record, tally: Tally) -> Record:
    """Return the record of a conversation in any of the forms."""
    turns, used = _turns(row)
    messages = [_message(turn, number, row.where) for number, turn in enumerate(turns, 1)]
    system = _system(row, messages)
    if system:
        messages, turns = [{"role": "system", "content": system}, *messages], [{}, *turns]
    messages = messages[: _learnt_turns(messages, turns)]
    _check_order(messages, row.where)
    lost = {name for turn in turns for name in turn if turn[name] is not None} - {*_READ}
    for name in sorted(lost):
        tally.noticed[f"conversations whose turns lose the field {name!r}"] += 1
    fields = {"id": id_of(row, "id", "prompt_id", "conversation_id"), "messages": messages}
    used = (*used, "system") if system or not row.fields.get("system") else used
    return Record({**fields, **rest_of(row, "id", *used)}, row.where)


def _system(row: Record, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the text of a row's own field `system`, unless a turn of the system is there."""
    system = row.fields.get("system")
    has_turn = messages[0]["role"] == "system"
    return system if isinstance(system, str) and system.strip() and not has_turn else ""


def _turns(row: Record) -> tuple[list[Turn], tuple[str, ...]]:
    """Return a row's turns as they stand there, and the fields that they were read from."""
    fields = row.fields
    for name in _LISTS:
        if fields.get(name) is not None:
            return _listed(row, name), (name,)
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        return _listed(row, "prompt") + _listed(row, "completion"), ("prompt", "completion")
    if "instruction" in fields and "output" in fields:
        return _alpaca(row), _ALPACA
    names = ", ".join(fields) or "none"
    raise LorakitError(
        f"{row.where}: no conversation in the fields {names}; give messages, conversations, "
        "instruction and output, or prompt and completion as lists of turns, or take the recipe "
        "jsonl with --template"
    )


def _listed(row: Record, name: str) -> list[Turn]:
    """Return a field's list of turns; LorakitError if it is none."""
    turns = row.fields[name]
    if not isinstance(turns, list) or not turns:
        raise LorakitError(f"{row.where}: {name!r} is not a list of turns; mend it, {_SKIP}")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise LorakitError(
                f"{row.where}: turn {number} of {name!r} is not an object with role and content; "
                f"mend it, {_SKIP}"
            )
    return turns


def _alpaca(row: Record) -> list[Turn]:
    """Return the turns of a row of Alpaca's form: those of its history, then its own.

    The input, where there is one, stands on the line below the instruction.
    """
    history = row.fields.get("history") or []
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    )
    if not is_pairs:
        raise LorakitError(
            f"{row.where}: 'history' is not a list of pairs of question and answer; "
            f"mend it, {_SKIP}"
        )
    asked = [row.fields["instruction"], row.fields.get("input")]
    if any(not isinstance(text, str | None) for text in asked):
        raise LorakitError(f"{row.where}: the instruction is not a text; mend it, {_SKIP}")
    question = "\n".join(text for text in asked if text and text.strip())
    pairs = [*history, [question, row.fields["output"]]]
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _message(turn: Turn, number: int, where: str) -> dict[str, str]:
    """Return a turn's role and content; LorakitError if it has none that can be learnt from."""
    name = turn.get("role", turn.get("from"))
    role = _ROLES.get(str(name).lower())
    if any(turn.get(call) for call in _CALLS):
        raise LorakitError(
            f"{where}: turn {number} calls a tool; only texts are learnt: take it out, {_SKIP}"
        )
    if role is None:
        what = "no role" if name is None else f"the role {name!r}"
        raise LorakitError(
            f"{where}: turn {number} has {what}; use system, user or assistant, {_SKIP}"
        )
    return {"role": role, "content": _content(turn, number, where)}


def _content(turn: Turn, number: int, where: str) -> str:
    """Return a turn's text; that of a list of text parts is what they say together."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        kinds = {str(part.get("type")) if isinstance(part, dict) else "?" for part in content}
        if kinds - {"text"}:
            other = ", ".join(sorted(kinds - {"text"}))
            raise LorakitError(
                f"{where}: turn {number} holds other things than text ({other}); "
                f"take them out, {_SKIP}"
            )
        texts = [part.get("text") for part in content]
        content = "".join(text for text in texts if isinstance(text, str))
    if content is not None and not isinstance(content, str):
        raise LorakitError(f"{where}: the content of turn {number} is not a text; mend it, {_SKIP}")
    if not content or not content.strip():
        raise LorakitError(f"{where}: turn {number} is empty; fill it, {_SKIP}")
    return content


def _learnt_turns(messages: Sequence[Turn], turns: Sequence[Turn]) -> int:
    """Return how many turns there are up to the last answer that is not of weight 0.

    Weights are those of OpenAI's fine-tuning files. Raises UnwantedError if all are 0.
    """
    answers = [place for place, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
    if not answers or answers[-1] != len(messages):
        return len(messages)
    learnt = [place for place in answers if turns[place - 1].get("weight") != 0]
    if not learnt:
        raise UnwantedError("a conversation whose answers all have weight 0")
    return learnt[-1]


def _check_order(messages: Sequence[Turn], where: str) -> None:
    """Raise LorakitError unless a question comes before the answer that ends a conversation."""
    last = messages[-1]["role"]
    if last != "assistant":
        raise LorakitError(
            f"{where}: the conversation ends in a turn of the {last}; "
            f"end it with the assistant's answer, {_SKIP}"
        )
    if all(message["role"] != "user" for message in messages):
        raise LorakitError(f"{where}: the conversation has no turn of the user; add it, {_SKIP}")
