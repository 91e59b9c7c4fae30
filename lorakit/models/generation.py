"""Generate completions for a stream of records, in order.

Records are taken a window at a time, so that memory holds one window. Within it they are batched by
length, which leaves little padding, and yielded in their original order. In float32 the output for
a record is the same in a batch as alone. Files are read and written in predictions.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import transformers

from lorakit.models.base import Base
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
        texts = _complete_window(base, prompts, settings)
        for record, prompt, text in zip(window, prompts, texts, strict=True):
            yield record.with_field("prediction", text), prompt


def _complete_window(
    base: Base, prompts: Sequence[Example], settings: GenerationSettings
) -> list[str]:
    """Return the completions of the prompts, in order; batches are cut longest first."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
    texts = [""] * len(prompts)
    for start in range(0, len(order), settings.batch_size):
        indices = order[start : start + settings.batch_size]
        rows = [prompts[index].ids for index in indices]
        for index, ids in zip(indices, complete(base, rows, settings), strict=True):
            texts[index] = text_of(base, ids)
    return texts


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
        input_ids=ids.to(base.device), attention_mask=mask.to(base.device), generation_config=config
    )
    ends = set(base.end_tokens)
    return [_until(row, ends) for row in sequences[:, length:].tolist()]


def text_of(base: Base, ids: Sequence[int]) -> str:
    """Return the text of new tokens, without special tokens or surrounding white space."""
    text = base.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


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
