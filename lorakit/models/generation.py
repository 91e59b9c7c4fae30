"""Generate completions for a stream of records, in order.

Records are taken a window at a time, so that memory holds one window, and yielded in their
original order. Greedy decoding is continuous batching (greedy.py). Sampling, and models whose cache
nothing can stand in for, take transformers' own loop, in batches by length. In float32 the output
for a record is the same in a batch as alone, but where a model's rotary frequencies depend on the
longest row. Several processes take batches, or groups of them, in
turn. Files are read and written in predictions.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import transformers

from lorakit.models.architecture import steady_positions
from lorakit.models.base import Base
from lorakit.models.completions import StopTexts, check_finite, completion_of, until_end
from lorakit.models.greedy import complete_greedily
from lorakit.models.memory import BatchSize, in_batches
from lorakit.models.packed import packed_weights
from lorakit.models.sharing import ALONE, Team
from lorakit.models.tokens import Encoder, Example
from lorakit.records.completions import Completion, with_completions
from lorakit.records.few_shot import NO_EXAMPLES, FewShot
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings

BATCHES_A_WINDOW = 16
_PAYS = 16  # tokens of a completion from which it pays to put weights in another order, and back
_SEEDS_APART = 0x9E37_79B9_7F4A_7C15  # the seeds of a window's batches: 2^64 over the golden ratio


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
    few_shot: FewShot = NO_EXAMPLES,
    note: Callable[[str], None] = lambda text: None,
    team: Team = ALONE,
) -> Iterator[tuple[Record, Example]]:
    """Yield each record with its `prediction`, and its prompt in tokens, in order.

    Examples of `few_shot` come before each prompt. `first` is the number of records before these (a
    multiple of the window), which seeds sampling. Every process of the `team` yields all of them;
    the first one's `records` and `first` count. Where memory runs out, batches are halved from then
    on, and `note` gets a line. Raises LorakitError naming a record whose prompt leaves no room for
    the new tokens.
    """
    batch_size = BatchSize(settings.batch_size, note)
    pays = settings.max_new_tokens >= _PAYS
    with packed_weights(base.model) if pays else contextlib.nullcontext():
        yield from _generate(base, encoder, records, settings, first, few_shot, batch_size, team)


def _generate(
    base: Base,
    encoder: Encoder,
    records: Iterable[Record],
    settings: GenerationSettings,
    first: int,
    few_shot: FewShot,
    batch_size: BatchSize,
    team: Team,
) -> Iterator[tuple[Record, Example]]:
    """Yield what `generate` does."""
    size = window_size(settings)
    iterator, number = iter(records), first // size
    while True:
        number, window = team.from_first((number, list(itertools.islice(iterator, size))))
        if not window:
            return
        room = settings.max_new_tokens
        prompts = [encoder.prompt(record, room, few_shot.before(record)) for record in window]
        rows = [prompt for prompt in prompts for _ in range(settings.samples)]
        seed = settings.seed * 1_000_003 + number
        completions = iter(_complete_window(base, rows, settings, batch_size, seed, team))
        for record, prompt in zip(window, prompts, strict=True):
            samples = list(itertools.islice(completions, settings.samples))
            yield with_completions(record, samples), prompt
        number += 1


def _complete_window(
    base: Base,
    prompts: Sequence[Example],
    settings: GenerationSettings,
    batch_size: BatchSize,
    seed: int,
    team: Team,
) -> list[Completion]:
    """Return the completion of each prompt, in their order; batches are cut longest first.

    Each batch draws from a seed of its own, so that it may be any process's.
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].ids))
    grouped = 1
    if is_continuous(base, settings, max(len(prompt.ids) for prompt in prompts)):
        grouped = _batches_a_group(len(order), settings.batch_size, team)

    def complete_rows(places: Sequence[int]) -> list[Completion]:
        rows = [prompts[place].ids for place in places]
        opened = [prompts[place].opens_reasoning for place in places]
        ids = complete_prompts(base, rows, settings, opened, at_once=batch_size.rows)
        written = zip(ids, opened, strict=True)
        return [completion_of(base, ids, settings.stop, opened=opens) for ids, opens in written]

    def in_groups(rows: Sequence[int], size: int) -> list[Sequence[int]]:
        return in_batches(rows, grouped * size)

    def complete_batch(numbered: tuple[int, Sequence[int]]) -> list[Completion]:
        index, places = numbered
        torch.manual_seed((seed + index * _SEEDS_APART) % 2**63)
        parts = batch_size.over(places, complete_rows, in_groups)
        return [row for part in parts for row in part]

    batches = list(enumerate(in_groups(order, settings.batch_size)))
    completions = (row for batch in team.in_turn(batches, complete_batch) for row in batch)
    by_place = dict(zip(order, completions, strict=True))
    return [by_place[place] for place in range(len(prompts))]


def _batches_a_group(rows: int, size: int, team: Team) -> int:
    """Return how many batches of a window are decoded as one: each process's share of them.

    At the end of a group places stay empty until its longest text ends; so groups are few.
    """
    batches = -(-rows // size)
    return max(1, -(-batches // team.count))


def is_continuous(base: Base, settings: GenerationSettings, longest: int) -> bool:
    """Return whether prompts of up to `longest` tokens are decoded by continuous batching."""
    if settings.temperature or longest + settings.max_new_tokens > steady_positions(base.model):
        return False
    return base.batches_continuously


def complete_prompts(
    base: Base,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    opened: Sequence[bool] = (),
    *,
    at_once: int,
) -> list[list[int]]:
    """Return what `complete` returns, in the faster way where the model and settings allow it.

    There, at most `at_once` prompts are decoded at a time.
    """
    if is_continuous(base, settings, max(map(len, prompts))):
        return complete_greedily(base, prompts, settings, opened, at_once=at_once)
    return complete(base, prompts, settings, opened)


@torch.inference_mode()
def complete(
    base: Base,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    opened: Sequence[bool] = (),
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and without the first end token.

    A row ends with the token that completes a stop text in its answer; `opened` says which prompts
    have begun reasoning (empty: none). Prompts are padded on the left under a mask, so that a row
    does not see what it is batched with.
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
        stopping_criteria=_stopping(base, settings.stop, length, opened or [False] * len(prompts)),
    )
    ends = set(base.end_tokens)
    return [until_end(row, ends) for row in sequences[:, length:].tolist()]


def _stopping(
    base: Base, stop: Sequence[str], length: int, opened: Sequence[bool]
) -> transformers.StoppingCriteriaList:
    criteria = [_Stopping(StopTexts(base, stop), length, opened)] if stop else []
    return transformers.StoppingCriteriaList(criteria)


class _Stopping(transformers.StoppingCriteria):
    """Ends a row once its answer, which begins at `length`, holds a stop text."""

    def __init__(self, stop: StopTexts, length: int, opened: Sequence[bool]) -> None:
        self._stop, self._length, self._opened = stop, length, opened

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor | None, **_: object
    ) -> torch.Tensor:
        rows = zip(input_ids[:, self._length :].tolist(), self._opened, strict=True)
        ended = [self._stop.end(ids, opened) for ids, opened in rows]
        return torch.tensor(ended, device=input_ids.device)


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
            "top_k": settings.top_k,
        }
    return transformers.GenerationConfig(
        eos_token_id=list(base.end_tokens),
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=pad,
        **decoding,
    )
