"""Generate completions for a stream of records, in order.

Records are taken a window at a time, so that memory holds one window. Within it they are batched by
length, which leaves little padding, and yielded in their original order. In float32 the output for
a record is the same in a batch as alone. Files are read and written in predictions.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import transformers

from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.chat import reasons, split_reasoning
from lorakit.models.tokens import Encoder, Example
from lorakit.records import Record
from lorakit.settings import GenerationSettings

BATCHES_A_WINDOW = 16


def window_size(settings: GenerationSettings) -> int:
    """Return the number of records in a window."""
    return BATCHES_A_WINDOW * settings.batch_size


def generate(
    base: Base,
    encoder: Encoder,
    records: Iterable[Record],
    settings: GenerationSettings,
    *,
    first: int = 0,
) -> Iterator[tuple[Record, Example]]:
    """Yield each record with its `prediction`, and its prompt in tokens, in order.

    `first` is the number of records before these (a multiple of the window); it seeds sampling.
    Raises LorakitError naming a record whose prompt leaves no room for the new tokens.
    """
    size = window_size(settings)
    iterator = iter(records)
    for number in itertools.count(first // size):
        window = list(itertools.islice(iterator, size))
        if not window:
            return
        prompts = [encoder.prompt(record, settings.max_new_tokens) for record in window]
        torch.manual_seed(settings.seed * 1_000_003 + number)
        completions = _complete_window(base, prompts, settings)
        for record, prompt, completion in zip(window, prompts, completions, strict=True):
            yield completion.added_to(record), prompt


class Completion(NamedTuple):
    """What a model wrote: the answer, and the reasoning before it, None where it has none."""

    prediction: str
    reasoning: str | None = None

    def added_to(self, record: Record) -> Record:
        """Return the record with the completion in its fields."""
        predicted = record.with_field("prediction", self.prediction)
        if self.reasoning is None:
            return predicted
        return predicted.with_field("reasoning", self.reasoning)


def _complete_window(
    base: Base, prompts: Sequence[Example], settings: GenerationSettings
) -> list[Completion]:
    """Return the completion of each prompt, in their order; batches are cut longest first."""
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
    completions = [Completion("")] * len(prompts)
    for start in range(0, len(order), settings.batch_size):
        places = order[start : start + settings.batch_size]
        rows = [prompts[place].ids for place in places]
        for place, ids in zip(places, complete(base, rows, settings), strict=True):
            opened = prompts[place].opens_reasoning
            completions[place] = completion_of(base, ids, opened=opened)
    return completions


@torch.inference_mode()
def complete(
    base: Base, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and without the first end token.

    Prompts are padded on the left and masked, so that no row depends on the rest of its batch.
    """
    length = max(map(len, prompts))
    pad = base.end_tokens[0]  # hidden by the mask; a tokenizer's own may lie outside the vocabulary
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    config = _generation_config(base, settings, pad)
    sequences = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=config,
        logits_processor=transformers.LogitsProcessorList([_FiniteLogits(base.name)]),
    )
    ends = set(base.end_tokens)
    return [_until(row, ends) for row in sequences[:, length:].tolist()]


def text_of(base: Base, ids: Sequence[int]) -> str:
    """Return the answer in new tokens: without special tokens, reasoning and outer white space."""
    return completion_of(base, ids).prediction


def completion_of(base: Base, ids: Sequence[int], *, opened: bool = False) -> Completion:
    """Return the answer and the reasoning in new tokens; `opened`: the prompt began reasoning."""
    text = base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not reasons(base.tokenizer):
        return Completion(str(text).strip())
    return Completion(*split_reasoning(str(text), opened=opened))


def check_finite(logits: torch.Tensor, name: str) -> None:
    """Raise LorakitError where a base named `name` has computed logits that are no numbers."""
    if bool(torch.isnan(logits).any()):
        raise LorakitError(
            f"{name}: its logits are not finite; take a whole copy of the model, or give --dtype "
            "float32 where its weights are"
        )


class _FiniteLogits(transformers.LogitsProcessor):
    """Checks the logits of every step of generation and changes none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_finite(scores, self._name)
        return scores


def _generation_config(
    base: Base, settings: GenerationSettings, pad: int
) -> transformers.GenerationConfig:
    """Return a generation config of these settings alone, without the model's defaults."""
    decoding: dict[str, object] = {"do_sample": False, "num_beams": 1}
    if settings.temperature:
        decoding = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
        }
    return transformers.GenerationConfig(
        eos_token_id=list(base.end_tokens),
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=pad,
        **decoding,
    )


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Return the ids before the first end token."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))
