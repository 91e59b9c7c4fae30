"""How much memory a model takes on its device, by formula: from its config, without its weights.

A pass is described by how many values go through the model, a decoder by its widths, so that all
functions here are pure. What is modelled is a dense decoder (normed attention, normed MLP) with
frozen weights and LoRA on some projections, as lorakit trains it (training/lora_step.py, loss.py).
Per position and decoder layer, torch stores for the backward pass, in bytes:

    two norms           2·(4d + 4)          the input, widened to float32, and 1/rms
                                            (d·b + 4 where norms.py computes them)
    attention           2·h·w·a + 2·k·w·a   queries, outputs, keys, values
                        + 4h                the logarithm of each softmax's sum
    MLP                 3·i·b               what its activation and product read
                                            (2·i·b where swiglu.py computes them)
    each LoRA           4r + d_in           A·x, and the dropout mask
    each LoRA's input   d_in·b              once for the projections that share it

d hidden width, h heads and k heads of keys of width w, i inner width of the MLP, r rank, b bytes of
a value in the base's dtype, a those inside attention (4 on a CPU, where it runs in float32). Frozen
projections store nothing, and neither do layers below the lowest LoRA; that layer stores all but
its first norm. The last layer's MLP counts in full, though it may leave tokens out (last_layer.py).
Before the head stand the last norm and the rotary angles; the logits are stored once, and once more
as their gradient. With checkpointing there is the input of every layer, d·b, and one layer's share
while it is computed again. Freed memory that an allocator keeps, and buffers of kernels, are not
counted. tests/models/test_estimate.py counts what torch saves: the formulae are within 1 % for
Llama, Qwen2 and Mistral, within 25 % for GPT-2, Phi, Phi-3 and Gemma-2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorakit.adapters.names import last_part, layer_of
from lorakit.models.architecture import Model, ModelConfig
from lorakit.models.tokens import Example

# Bytes a weight of a projection that bitsandbytes quantises: four bits and a float32 for every 64
# weights (with double quantisation a byte, and a float32 for every 256 of those); or one byte.
FOUR_BIT = 0.5 + 4 / 64
FOUR_BIT_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)
EIGHT_BIT = 1.0
QUANTISED = {"4bit": FOUR_BIT_DOUBLE, "8bit": EIGHT_BIT}  # by what `--load-in` takes
_LONE_INPUT = ("o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2")  # shared with no other

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in), by projection
Ranks = Mapping[str, int]  # by projection


class Part(NamedTuple):
    """Memory for one purpose, and what it consists of, in words."""

    name: str
    bytes: int
    remark: str


@dataclass(frozen=True)
class Decoder:
    """The widths of a decoder, and how many layers it has."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int


@dataclass(frozen=True)
class Precision:
    """Bytes of a value in the base's dtype, inside attention, and of a norm's stored input.

    `mlp` counts the inner values that an MLP stores for each position. `eager` attention stores its
    matrices; `cosines_by_head` says that those of rotary positions are stored for every head
    (rotary.py).
    """

    value: int
    attention: int
    eager: bool = False
    norm: int = 4
    mlp: int = 3
    cosines_by_head: bool = False


class Pass(NamedTuple):
    """What goes through the model together, padding included.

    `logits` counts the positions for which the output head is computed, `squares` sums up the
    squared lengths of the rows; `padded` says that a mask hides padding.
    """

    positions: int
    logits: int
    squares: int
    padded: bool


# — what there is —


def decoder_of(config: ModelConfig) -> Decoder:
    """Return the widths in the config of a text decoder."""
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    inner: Any = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Decoder(
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        intermediate=int(inner or 4 * hidden),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or hidden // heads),
        vocabulary=int(config.vocab_size),
    )


def quantised_bytes(quantisation: Mapping[str, Any] | None) -> float | None:
    """Return the bytes of a weight by a config's `quantization_config`; None if not quantised.

    bitsandbytes' is read exactly; of others, `bits` and a 16-bit scale a group of weights.
    """
    if not quantisation:
        return None
    if quantisation.get("load_in_4bit"):
        return FOUR_BIT_DOUBLE if quantisation.get("bnb_4bit_use_double_quant") else FOUR_BIT
    if quantisation.get("load_in_8bit"):
        return EIGHT_BIT
    bits = quantisation.get("bits")
    return None if bits is None else bits / 8 + 2 / quantisation.get("group_size", 128)


def count_parameters(model: Model) -> int:
    """Return the number of a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: Model, quantised: Iterable[str] = (), bytes_each: float = 0) -> int:
    """Return the bytes of a model's parameters, of which the model may have the shapes alone.

    The weights of the projections named in `quantised` take `bytes_each`; all others, biases,
    embeddings, norms and the head, are in the dtype that the model has them in.
    """
    total = sum(parameter.nbytes for parameter in model.parameters())
    for name in quantised:
        weight = model.get_submodule(name).weight
        total += round(weight.numel() * bytes_each) - weight.nbytes
    return int(total)


def lora_parameters(ranks: Ranks, shapes: Shapes) -> int:
    """Return the parameters of A (r × d_in) and B (d_out × r) on all modules."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


# — what goes through together —


def training_pass(rows: Sequence[Example], *, packed: bool) -> Pass:
    """Return the pass of a micro-batch; a row's last token is a label only (models/batches.py)."""
    lengths = [len(row.ids) - 1 for row in rows]
    if packed:
        targets = sum(row.targets for row in rows)
        return Pass(sum(lengths), targets, sum(length**2 for length in lengths), padded=False)
    width = max(row.targets for row in rows)
    return padded_pass(lengths, len(rows) * width)


def padded_pass(lengths: Sequence[int], logits: int) -> Pass:
    """Return the pass of padded rows that need so many rows of logits."""
    longest, count = max(lengths), len(lengths)
    return Pass(count * longest, logits, count * longest**2, padded=min(lengths) < longest)


# — what it takes —


def activation_bytes(
    decoder: Decoder,
    precision: Precision,
    size: Pass,
    ranks: Ranks,
    shapes: Shapes,
    *,
    dropout: bool = True,
    checkpointing: bool = False,
) -> int:
    """Return what is stored for the backward pass of a micro-batch, logits aside."""
    by_layer = {
        layer: list(names)
        for layer, names in itertools.groupby(
            sorted(ranks, key=lambda name: layer_of(name) or 0), lambda name: layer_of(name) or 0
        )
    }
    norm = size.positions * (precision.norm * decoder.hidden + 4)
    attention = _attention_bytes(decoder, precision, size)
    mlp = size.positions * precision.mlp
    plain = 2 * norm + attention + mlp * decoder.intermediate * precision.value
    lora = {
        layer: _lora_bytes(names, precision, size, ranks, shapes, dropout=dropout)
        for layer, names in by_layer.items()
    }
    cosines = sum({decoder.heads, decoder.kv_heads}) if precision.cosines_by_head else 1
    angles = (cosines + 1) * decoder.head_width * precision.value * size.positions
    if checkpointing:
        inputs = decoder.layers * size.positions * decoder.hidden * precision.value
        return inputs + norm + plain + max(lora.values(), default=0) + angles
    stored = decoder.layers - min(by_layer, default=decoder.layers)
    first_norm = norm if stored else 0  # of the lowest LoRA's layer, whose input needs no gradient
    return stored * plain - first_norm + sum(lora.values()) + norm + angles


def _attention_bytes(decoder: Decoder, precision: Precision, size: Pass) -> int:
    """Return what one layer's attention stores."""
    keys = decoder.heads if size.padded else decoder.kv_heads  # repeated under a mask
    values = 2 * (decoder.heads + keys) * decoder.head_width * precision.attention
    stored = size.positions * (values + 4 * decoder.heads)
    if precision.eager:  # the softmax in float32 and in the base's dtype
        return stored + decoder.heads * size.squares * (4 + precision.value)
    return stored + (size.squares * precision.attention if size.padded else 0)


def _lora_bytes(
    names: Sequence[str],
    precision: Precision,
    size: Pass,
    ranks: Ranks,
    shapes: Shapes,
    *,
    dropout: bool,
) -> int:
    """Return what the LoRA of one layer's modules stores."""
    inputs = {_input_of(name): shapes[name][1] for name in names}
    low = sum(4 * ranks[name] + (shapes[name][1] if dropout else 0) for name in names)
    return size.positions * (low + precision.value * sum(inputs.values()))


def _input_of(name: str) -> str:
    """Return a name of a projection's input: that of its parent, where others share it."""
    return name if last_part(name) in _LONE_INPUT else name.rpartition(".")[0]


def logit_bytes(decoder: Decoder, precision: Precision, size: Pass) -> int:
    """Return what the logits of a micro-batch and their gradient take."""
    return 2 * size.logits * decoder.vocabulary * precision.value


def forward_bytes(decoder: Decoder, precision: Precision, size: Pass) -> int:
    """Return what a pass without gradients holds at once: one layer's values, and the logits.

    The states and their norm, in both dtypes; then what attention reads and writes, or three
    tensors of the MLP, whichever is more; in the end the logits, also in float32.
    """
    states = decoder.hidden * (2 * precision.value + 8)
    mlp = 3 * decoder.intermediate * precision.value
    layer = size.positions * states + max(
        _attention_bytes(decoder, precision, size), size.positions * mlp
    )
    return max(layer, size.logits * decoder.vocabulary * (precision.value + 4))


def cache_bytes(decoder: Decoder, precision: Precision, rows: int, positions: int) -> int:
    """Return what the keys and values of a cache take: 2·L·k·w values a position of each row."""
    width = decoder.kv_heads * decoder.head_width
    return 2 * decoder.layers * width * precision.value * rows * positions


def trained_parts(parameters: int, *, gradients: bool = True) -> list[Part]:
    """Return what so many LoRA parameters take in float32, and their gradients and moments."""
    weights = Part("LoRA", 4 * parameters, f"{parameters:,} parameters in float32")
    if not gradients:
        return [weights]
    moments = Part("optimiser", 8 * parameters, "AdamW's two moments, float32")
    return [weights, Part("gradients", 4 * parameters, "of the LoRA, float32"), moments]
