"""From the tokens that a model has written to a completion: where it ends and what it says.

How tokens are chosen is decided in generation.py and greedy.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import torch

from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.chat import reasons
from lorakit.records.completions import Completion, completion_in, stopped


def text_of(base: Base, ids: Sequence[int]) -> str:
    """Return the answer in new tokens: without special tokens, reasoning and outer white space."""
    return completion_of(base, ids).prediction


def completion_of(
    base: Base, ids: Sequence[int], stop: Sequence[str] = (), *, opened: bool = False
) -> Completion:
    """Return the answer and the reasoning in new tokens; `opened`: the prompt began reasoning."""
    text = _decoded(base, ids)
    return completion_in(text, stop=stop, reasons=reasons(base.tokenizer), opened=opened)


def _decoded(base: Base, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones left out."""
    return str(
        base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


class StopTexts:
    """Says whether an answer holds a stop text, which ends it.

    A text that has just been completed lies in the last tokens: each but the special ones holds a
    byte of it at least. Only where it is found there are all tokens of the row decoded.
    """

    def __init__(self, base: Base, stop: Sequence[str]) -> None:
        self._base, self._stop = base, stop
        self._special = frozenset(base.tokenizer.all_special_ids)
        self._tail = max(len(text.encode("utf-8", "surrogatepass")) for text in stop) + 4
        self._reasons = reasons(base.tokenizer)

    def end(self, ids: Sequence[int], opened: bool) -> bool:
        """Return whether the last of the tokens completes a stop text.

        `opened`: the prompt has begun reasoning, in which a stop text ends nothing.
        """
        tail = _decoded(self._base, self._last(ids))
        if not any(text in tail for text in self._stop):
            return False
        written = _decoded(self._base, ids)
        return stopped(written, stop=self._stop, reasons=self._reasons, opened=opened)

    def _last(self, ids: Sequence[int]) -> list[int]:
        """Return the last tokens in which a stop text can have been completed."""
        plain = (token for token in reversed(ids) if token not in self._special)
        return list(itertools.islice(plain, self._tail))[::-1]


def until_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return the ids before the first end token."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))


def check_finite(logits: torch.Tensor, name: str) -> None:
    """Raise LorakitError where a base named `name` has computed logits that are no numbers."""
    if bool(torch.isnan(logits).any()):
        raise LorakitError(
            f"{name}: its logits are not finite; take a whole copy of the model, or give --dtype "
            "float32 where its weights are"
        )
