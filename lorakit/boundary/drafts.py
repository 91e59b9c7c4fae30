"""Drafts: what a text will go on with, guessed from the texts that were seen beside it.

All texts of one prompt, the prompt itself first, are kept by their last few tokens, so that a guess
costs a few look-ups. A wrong guess costs nothing but the room it took in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

_ORDERS = (3, 2, 1)


class Drafts:
    """The continuations seen after every run of up to three tokens, the newest of each."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._after: dict[tuple[int, ...], tuple[Sequence[int], int]] = {}
        for place in range(1, len(prompt)):
            self.add(prompt, place)

    def add(self, ids: Sequence[int], place: int) -> None:
        """Note that ids[place] follows the tokens before it; `ids` may grow later."""
        for order in _ORDERS:
            if order <= place:
                self._after[tuple(ids[place - order : place])] = (ids, place)

    def guess(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """Return up to `most` tokens that may follow `ids`, by the longest run of them seen."""
        if most > 0:
            for order in _ORDERS:
                if order <= len(ids) and (found := self._after.get(tuple(ids[-order:]))):
                    seen, place = found
                    return seen[place : place + most]
        return ()
