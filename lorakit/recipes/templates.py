"""From a row to a record: what the templates of prompt and completion make of its fields.

The record's `document` is the span of the prompt, in characters, that may be shortened where the
prompt is too long for a model; instruction, question and cue stand outside it. This file knows no
data set.
"""

from __future__ import annotations

from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.prompts import (
    Prompt,
    Substitution,
    field_of,
    fields_of,
    fill,
    fill_with_spans,
    unescaped,
)
from lorakit.recipes.request import Request
from lorakit.records.record import Record

_ALWAYS_KEPT = ("id", "references")
_PROMPT_ITSELF = "{{prompt}}"


class Templates(NamedTuple):
    """The templates of prompt and completion, and the field of the prompt that is its document.

    `document` is empty where the prompt has none, and None where the longest field of a row is it.
    Without a prompt, rows are records already.
    """

    prompt: str
    completion: str
    document: str | None = ""

    def asked_for_by(self, request: Request) -> Templates:
        """Return these templates with those of the request in their places.

        In a template of the request, the document is `--document`, else the field it was before if
        that is there, else the longest. Raises LorakitError if the template lacks `--document`, or
        only one of prompt and completion is there.
        """
        prompt = unescaped(request.template or "") or self.prompt
        completion = unescaped(request.completion or "") or self.completion
        if bool(prompt) != bool(completion):
            raise LorakitError(
                "only one of prompt and completion has a template; "
                "give --template and --completion, or leave both out"
            )
        names = fields_of(prompt)
        if request.document and request.document not in names:
            raise LorakitError(
                f"the prompt's template has no {{{{{request.document}}}}} for --document; "
                f"name one of its fields: {', '.join(names) or 'none'}"
            )
        is_longest = bool(request.template) and (self.document or "") not in names
        document = request.document or (None if is_longest else self.document)
        return Templates(prompt, completion, document)

    def record(self, row: Record) -> Record:
        """Return the record of a row: the fields that went into a template are not repeated."""
        if not self.prompt:
            return row
        self._check_form(row)
        prompt, substitutions = fill_with_spans(self.prompt, row.fields, row.where)
        filled = Prompt(prompt, fill(self.completion, row.fields, row.where))
        names = (*fields_of(self.prompt), *fields_of(self.completion))
        used = {"prompt", "completion", *(field_of(name, row.fields) for name in names)}
        used = used - {*_ALWAYS_KEPT} | {"id"} | ({"document"} if self.document != "" else set())
        rest = {name: value for name, value in row.fields.items() if name not in used}
        span = self._document_span(substitutions)
        fields = {"id": row.id, "prompt": filled.prefix, "completion": filled.completion}
        return Record({**fields, **({"document": span} if span else {}), **rest}, row.where)

    def _check_form(self, row: Record) -> None:
        """Raise LorakitError for a conversation where a prompt is expected."""
        has_turns = isinstance(row.fields.get("prompt", row.fields.get("messages")), list)
        if self.prompt == _PROMPT_ITSELF and (has_turns or "conversations" in row.fields):
            raise LorakitError(
                f"{row.where}: a conversation, not a prompt; take the recipe chat, "
                "or name the fields by --template"
            )

    def _document_span(self, substitutions: list[Substitution]) -> list[int]:
        """Return the span of the document; empty if this prompt has none."""
        texts = [text for text in substitutions if self.document in (None, text.name)]
        if self.document is None:
            texts.sort(key=lambda text: text.start - text.end)  # stable: the first of the longest
        return [texts[0].start, texts[0].end] if texts and texts[0].end > texts[0].start else []
