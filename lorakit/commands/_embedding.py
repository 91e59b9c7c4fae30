"""The model of `--metric bertscore`: its options, and how it is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.commands._options import together
from lorakit.commands._types import Whole
from lorakit.reach import check_model

if TYPE_CHECKING:
    from lorakit.scoring.bertscore import Embedder

bertscore_options = together(
    click.option(
        "--bertscore-model",
        metavar="NAME",
        help="bertscore's model: a folder or hub id. [default: roberta-large, or one for --lang]",
    ),
    click.option(
        "--bertscore-layer",
        type=Whole(0),
        metavar="N",
        help="Whose output it takes. [default: the one tuned for the model, or its last]",
    ),
)


def open_embedder(lang: str, model: str | None, layer: int | None) -> Embedder:
    """Load bertscore's model, once it is clear that its library is there."""
    from lorakit.scoring.bertscore import check_libraries

    check_libraries()
    check_model(model)
    from lorakit.models import text_encoder

    return text_encoder.open_embedder(lang, model, layer)
