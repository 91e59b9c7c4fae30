"""BERTScore: the F1 of a greedy matching of two texts' tokens by the cosine of their embeddings.

It is written out here because the package bert-score (0.3.13 of 2023, its last) fails with
transformers 5 on an empty text and on tokenizers that name no maximum length, and no longer puts
the space before RoBERTa's first word. Apart from that the values agree with its own to rounding: no
idf weights, no rescaling, the layers it chose per model. This file knows vectors, and of models
only their names; an Embedder is opened by models/text_encoder.py.

Source: Zhang et al. 2020, BERTScore: Evaluating text generation with BERT.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import check_packages
from lorakit.runs.resume import SavedValues, nothing_saved, run_key

_EXAMPLES_AT_ONCE = 64

DEFAULT_MODELS = {"en": "roberta-large", "zh": "bert-base-chinese"}
OTHER_MODEL = "bert-base-multilingual-cased"
# The layer that agreed best with human judgement when the authors tuned it on WMT16.
TUNED_LAYERS = {
    "bert-base-chinese": 8,
    "bert-base-multilingual-cased": 9,
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "distilbert-base-uncased": 5,
    "microsoft/deberta-xlarge-mnli": 40,
    "roberta-base": 10,
    "roberta-large": 17,
    "xlm-roberta-base": 9,
    "xlm-roberta-large": 17,
}


def check_libraries() -> None:
    """Raise LorakitError where a library needed to embed texts is missing, without importing it."""
    check_packages("--metric bertscore", "torch", "transformers", "peft")


@dataclass(frozen=True)
class EmbeddedText:
    """The tokens of a text: vectors of length 1 (tokens × width), and which of them count.

    The tokenizer's class and separator tokens do not count, but others may be matched with them.
    """

    vectors: NDArray[np.float32]
    counts: NDArray[np.bool_]


class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def signature(self) -> str:
        """The part of a score's signature that names the model."""
        ...

    def embed(self, texts: Sequence[str]) -> list[EmbeddedText]:
        """Return the tokens of each text, in order."""
        ...


def greedy_f1(ours: EmbeddedText, theirs: EmbeddedText) -> float:
    """Return the F1 (at most 1) of two texts; 0 where one of them has no token that counts.

    Precision is the mean over our tokens of the cosine with the closest of theirs, recall the
    converse.
    """
    if not (ours.counts.any() and theirs.counts.any()):
        return 0.0
    cosines = ours.vectors @ theirs.vectors.T
    precision = float(cosines.max(axis=1)[ours.counts].mean())
    recall = float(cosines.max(axis=0)[theirs.counts].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def best_f1s(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    embedder: Embedder,
    saved: SavedValues | None = None,
) -> list[float]:
    """Return each prediction's highest F1 over its references, embedding 64 examples at a time.

    The values of the 64 are added to `saved`, and not computed if they are there.
    """
    saved = nothing_saved() if saved is None else saved
    best: list[float] = []
    for start in range(0, len(predictions), _EXAMPLES_AT_ONCE):
        group = slice(start, start + _EXAMPLES_AT_ONCE)
        ours, theirs = predictions[group], references[group]
        name = f"bertscore {run_key(embedder.signature, list(ours), [list(r) for r in theirs])}"
        measure = functools.partial(_best_of_group, ours, theirs, embedder)
        best += saved.find(name, float, measure)
    return best


def _best_of_group(
    predictions: Sequence[str], references: Sequence[Sequence[str]], embedder: Embedder
) -> list[float]:
    """Return each prediction's highest F1 over its references, all texts embedded at once."""
    distinct = list(dict.fromkeys(itertools.chain(predictions, *references)))
    embedded = dict(zip(distinct, embedder.embed(distinct), strict=True))
    return [
        max(greedy_f1(embedded[text], embedded[other]) for other in alternatives)
        for text, alternatives in zip(predictions, references, strict=True)
    ]
