"""BERTScore: the F1 of a greedy matching of two texts' tokens by the cosine of their embeddings.

It is written out here because the package bert-score (0.3.13 of 2023, its last) fails with
transformers 5 on an empty text and on tokenizers that name no longest length, and no longer puts
the space before RoBERTa's first word. But for that the values are its own to rounding: no idf
weights, no rescaling, the layers it chose per model. This file knows vectors, not the models they
come from; those are in text_encoder.py.

Source: Zhang et al. 2020, BERTScore: Evaluating text generation with BERT.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lorakit.errors import missing_package

_EXAMPLES_AT_ONCE = 64

DEFAULT_MODELS = {"en": "roberta-large", "zh": "bert-base-chinese"}
OTHER_MODEL = "bert-base-multilingual-cased"
# The layer that agreed best with people's judgement in the authors' tuning on WMT16.
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
    """Raise LorakitError where a library that embeds texts is not installed; imports none."""
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise missing_package("--metric bertscore", name)


@dataclass(frozen=True)
class Embedded:
    """A text's tokens: vectors of length 1 (tokens × width), and which of them count.

    The tokenizer's class and separator tokens do not count, but others may be matched with them.
    """

    vectors: NDArray[np.float32]
    counts: NDArray[np.bool_]


class Embedder(Protocol):
    """What turns texts into vectors, and the part of the signature that names it."""

    @property
    def signature(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> list[Embedded]: ...


def greedy_f1(ours: Embedded, theirs: Embedded) -> float:
    """Return F1 of precision (our tokens, each with its closest of theirs) and recall, up to 1.

    It is 0 where a text has no token that counts.
    """
    if not (ours.counts.any() and theirs.counts.any()):
        return 0.0
    cosines = ours.vectors @ theirs.vectors.T
    precision = float(cosines.max(axis=1)[ours.counts].mean())
    recall = float(cosines.max(axis=0)[theirs.counts].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def best_f1s(
    predictions: Sequence[str], references: Sequence[Sequence[str]], embedder: Embedder
) -> list[float]:
    """Return each prediction's highest F1 over its references; vectors are of 64 at a time."""
    found = []
    for start in range(0, len(predictions), _EXAMPLES_AT_ONCE):
        group = slice(start, start + _EXAMPLES_AT_ONCE)
        texts = [*predictions[group], *(text for listed in references[group] for text in listed)]
        different = list(dict.fromkeys(texts))
        vectors = dict(zip(different, embedder.embed(different), strict=True))
        for text, listed in zip(predictions[group], references[group], strict=True):
            found.append(max(greedy_f1(vectors[text], vectors[other]) for other in listed))
    return found
