"""A tokenizer as llama.cpp has it: tokens, their kinds, merges or scores, and special ids.

llama.cpp knows two kinds of BPE, which tokenizer.json tells apart by its pieces:

    gpt2     tokens of bytes, each written as a letter; text is first cut by an expression, which
             llama.cpp holds itself, by the name of a model that has it (PRE_TOKENIZERS)
    llama    SentencePiece's: spaces are ▁, what is no token is spelt by bytes (<0x0A>). Nothing is
             cut first; of all pairs whose text is a token that of the highest score is joined. The
             scores are the places of merges, so both join alike, if no token spans a cut.

Whatever else a tokenizer.json asks for is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any  # values of tokenizer.json

from lorakit.errors import LorakitError
from lorakit.gguf.file import Fields, Value
from lorakit.models.chat import Tokenizer
from lorakit.models.tokens import Encoder

Pieces = tuple[str, ...]  # the steps of a pre-tokenizer
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# llama.cpp's kinds of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTES = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(end: str) -> str:
    """Return the expression for words cut where upper case follows lower, with what ends them."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}|"


_BYTE_LEVEL, _BYTES_AND_WORDS, _DIGITS = "bytes", "bytes, words", "digits"

# By the steps, and whether a word that is a token is taken whole: llama.cpp's name for them.
PRE_TOKENIZERS: Mapping[tuple[Pieces, bool], str] = {
    ((_BYTES_AND_WORDS,), False): "gpt-2",
    ((_DIGITS, _BYTES_AND_WORDS), False): "smollm",
    ((_WORDS + r"\p{N}" + _SIGNS + _ENDS, _BYTE_LEVEL), False): "qwen2",
    ((_WORDS + r"\p{N}{1,3}" + _SIGNS + _ENDS, _BYTE_LEVEL), True): "llama-bpe",
    ((_WORDS + r"\p{N}{1,3}" + _SIGNS + _ENDS, _BYTE_LEVEL), False): "dbrx",
    (
        (_by_case("") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _ENDS, _BYTE_LEVEL),
        True,
    ): "tekken",
    (
        (
            _by_case(f"{_CONTRACTIONS}?") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _ENDS,
            _BYTE_LEVEL,
        ),
        False,
    ): "gpt-4o",
}


def tokenizer_fields(encoder: Encoder, *, size: int, name: str) -> Fields:
    """Return the fields of a tokenizer; `size` is the number of rows of the embedding.

    Of the end tokens llama.cpp is told two. Rows without a token get one that is
    never written. Raises LorakitError for a tokenizer that llama.cpp would not follow.
    """
    tokenizer = encoder.tokenizer
    parts: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > size:
        raise LorakitError(
            f"{name} has {len(tokenizer)} tokens and {size} rows in its embedding; take a new copy "
            "of its tokenizer"
        )
    if parts["model"].get("type") != "BPE":
        raise _refusal(name, f"is a {parts['model'].get('type')} model")
    if not parts["model"]["merges"]:
        raise _refusal(name, "has no merges")
    by_bytes = any(step["type"] == "ByteLevel" for step in _steps(parts["pre_tokenizer"]))
    kind = _byte_level if by_bytes else _sentencepiece
    fields = {
        **kind(parts, size, name),
        "token_type": _kinds(tokenizer, parts, size),
        **_special(tokenizer, encoder.ends),
    }
    keyed = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if (template := _template(tokenizer)) is not None:
        keyed["tokenizer.chat_template"] = template
    return keyed


def _byte_level(parts: Mapping[str, Any], size: int, name: str) -> dict[str, Value]:
    """Return tokens, merges and the name of the pre-tokenizer of a byte-level BPE."""
    _allow(parts["normalizer"], ("NFC",), name)
    pieces = tuple(_pieces(parts["pre_tokenizer"], name))
    whole = bool(parts["model"].get("ignore_merges"))
    if (pieces, whole) not in PRE_TOKENIZERS:
        raise _refusal(name, f"cuts texts by {' and '.join(pieces)}")
    merges = [f"{left} {right}" for left, right in _merges(parts)]
    return {
        "model": "gpt2",
        "pre": PRE_TOKENIZERS[pieces, whole],
        "tokens": _tokens(parts, size),
        "merges": merges,
    }


def _sentencepiece(parts: Mapping[str, Any], size: int, name: str) -> dict[str, Value]:
    """Return tokens and scores of a BPE with byte fallback, as SentencePiece's."""
    model = parts["model"]
    if not model.get("byte_fallback"):
        raise _refusal(name, "neither works on bytes nor falls back to them")
    prefixes = "Prepend" in _allow(parts["normalizer"], ("Prepend", "Replace"), name)
    for step in _steps(parts["pre_tokenizer"]):
        prefixes |= _joins_as_uncut(step, parts, name)
    tokens = [token.replace(" ", _SPACE) for token in _tokens(parts, size)]
    places: dict[str, float] = {}
    for place, (left, right) in enumerate(_merges(parts)):
        places.setdefault((left + right).replace(" ", _SPACE), -float(place))
    last = -float(len(places) + 1)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [places.get(token, last) for token in tokens],
        "add_space_prefix": prefixes,
    }


def _joins_as_uncut(step: Mapping[str, Any], parts: Mapping[str, Any], name: str) -> bool:
    """Return whether a step of the pre-tokenizer writes a space before the text.

    Raises LorakitError for one that would cut through a token that merges make.
    """
    if step["type"] == "Metaspace" and step.get("replacement") == _SPACE:
        return bool(step.get("prepend_scheme", "always") != "never")
    if step["type"] != "Split":
        raise _refusal(name, f"has the pre-tokenizer {step['type']}")
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    pattern = step["pattern"]
    cut = Split(
        Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"],
        step["behavior"].lower().replace("merged", "merged_").replace("with", "with_"),
        step["invert"],
    )
    for left, right in _merges(parts):
        if len(cut.pre_tokenize_str(left + right)) > 1:
            raise _refusal(name, f"cuts through its own token {left + right!r}")
    return False


def _steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or a pre-tokenizer, which may be a sequence of them."""
    inner = ("normalizers", "pretokenizers")
    if part is not None and part["type"] == "Sequence":
        for step in next(part[key] for key in inner if key in part):
            yield from _steps(step)
    elif part is not None:
        yield part


def _allow(part: Mapping[str, Any] | None, kinds: Sequence[str], name: str) -> set[str]:
    """Return the kinds of a normalizer's steps; LorakitError for one that is not in `kinds`.

    What is put before a text, and what for a space, has to be ▁.
    """
    steps = list(_steps(part))
    for step in steps:
        mark = step.get("prepend", step.get("content", _SPACE))
        if step["type"] not in kinds or mark != _SPACE:
            raise _refusal(name, f"has the normalizer {step['type']}")
    return {step["type"] for step in steps}


def _pieces(part: Mapping[str, Any] | None, name: str) -> Iterator[str]:
    """Yield the steps of a byte-level pre-tokenizer, as PRE_TOKENIZERS has them."""
    for step in _steps(part):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            yield _BYTES_AND_WORDS if step.get("use_regex", True) else _BYTE_LEVEL
        elif step["type"] == "Digits" and step.get("individual_digits"):
            yield _DIGITS
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
            yield str(step["pattern"].get("Regex"))
        else:
            raise _refusal(name, f"has a pre-tokenizer {step['type']} of its own")


def _merges(parts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in parts["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _tokens(parts: Mapping[str, Any], size: int) -> list[str]:
    """Return the tokens by id, with a name for every id that has none."""
    by_id = {place: token for token, place in parts["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in parts["added_tokens"]}
    return [by_id.get(place, f"[PAD{place}]") for place in range(size)]


def _kinds(tokenizer: Tokenizer, parts: Mapping[str, Any], size: int) -> list[int]:
    """Return llama.cpp's kind of every token."""
    kinds = [_UNUSED] * size
    for token, place in parts["model"]["vocab"].items():
        is_byte = parts["model"].get("byte_fallback") and _BYTE.fullmatch(token)
        kinds[place] = _BYTES if is_byte else _NORMAL
    for token in parts["added_tokens"]:
        kinds[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    unknown = parts["model"].get("unk_token")
    if unknown is not None and unknown == tokenizer.unk_token:
        kinds[tokenizer.unk_token_id] = _UNKNOWN
    return kinds


def _special(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, Value]:
    """Return the ids of special tokens, and whether a text gets one before or after it."""
    first, *others = ends
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": first,
        "eot_token_id": others[0] if others else None,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    encoded = tokenizer("a")["input_ids"]
    return {
        **{key: int(place) for key, place in ids.items() if place is not None},
        "add_bos_token": encoded[0] == tokenizer.bos_token_id,
        "add_eos_token": encoded[-1] == tokenizer.eos_token_id,
    }


def _template(tokenizer: Tokenizer) -> str | None:
    """Return the chat template, of several the default one."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _refusal(name: str, what: str) -> LorakitError:
    return LorakitError(
        f"the tokenizer of {name} {what}, which llama.cpp does not follow; convert the adapter "
        "alone (lorakit convert --to gguf), for a base that is GGUF already"
    )
