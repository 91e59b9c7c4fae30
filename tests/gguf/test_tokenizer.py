"""Tokenizers as llama.cpp has them: read as llama.cpp reads them, they cut texts as before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lorakit.errors import LorakitError
from lorakit.gguf.file import Fields
from lorakit.gguf.tokenizer import PRE_TOKENIZERS, tokenizer_fields
from lorakit.models.tokens import Encoder
from tests.support.gguf import merging_tokenizer
from tests.support.models import byte_tokenizer

TINY = Path(__file__).parents[2] / "lorakit" / "tiny"
TEXTS = (
    "The people of the town",
    "It's 12:30; don't   worry  about  it.",
    "def add(a, b):\n    return a + b\n",
    "東京は日本の首都です。",
    "¿Café? Naïve — “yes”…",
)


def fields_of(tokenizer: Any, size: int | None = None, ends: Sequence[int] = (2,)) -> Fields:
    encoder = Encoder(tokenizer, tuple(ends), 100)
    return tokenizer_fields(encoder, size=size or len(tokenizer), name="x")


def joined_by_score(text: str, fields: Fields) -> list[str]:
    """Cut a text as llama.cpp cuts it for the model `llama`.

    Of all neighbours whose text is a token, those of the highest score are joined, the leftmost
    first; what is no token in the end is spelt by bytes.
    """
    tokens: Any = fields["tokenizer.ggml.tokens"]
    scores: Any = fields["tokenizer.ggml.scores"]
    score_of = dict(zip(tokens, scores, strict=True))
    prefix = " " if fields["tokenizer.ggml.add_space_prefix"] else ""
    parts = list((prefix + text).replace(" ", "▁"))
    while True:
        pairs = {place: "".join(parts[place : place + 2]) for place in range(len(parts) - 1)}
        known = {place: pair for place, pair in pairs.items() if pair in score_of}
        if not known:
            break
        best = max(known, key=lambda place: (score_of[known[place]], -place))
        parts[best : best + 2] = [known[best]]
    spelt = [
        [part] if part in score_of else [f"<0x{byte:02X}>" for byte in part.encode()]
        for part in parts
    ]
    return [token for run in spelt for token in run]


def sentencepiece(**options: Any) -> Any:
    """Return a BPE with byte fallback, trained on TEXTS, as Llama 2's and Gemma's are."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = options.get("normalizer")
    tokenizer.pre_tokenizer = options.get("pre_tokenizer")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    words = [word for text in TEXTS[:3] for word in text.replace(" ", " ▁").split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]
    again = Tokenizer.from_str(json.dumps(parts))
    again.pre_tokenizer = options.get("cut", again.pre_tokenizer)
    again.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=again, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def replacing(*first: normalizers.Normalizer) -> normalizers.Normalizer:
    return normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])


SENTENCEPIECES: dict[str, dict[str, Any]] = {
    "as Llama 2's": {"normalizer": replacing(normalizers.Prepend("▁"))},
    "as Gemma's": {
        "normalizer": replacing(),
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
    },
    "as later Mistrals'": {
        "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    },
}


@pytest.mark.parametrize("options", SENTENCEPIECES.values(), ids=SENTENCEPIECES.keys())
def test_scores_join_what_merges_join(options: dict[str, Any]) -> None:
    tokenizer = sentencepiece(**options)
    fields = fields_of(tokenizer)
    assert fields["tokenizer.ggml.model"] == "llama"
    for text in TEXTS:
        assert joined_by_score(text, fields) == tokenizer.tokenize(text), text


def test_tinys_tokens_are_cut_as_before_without_its_pre_tokenizer() -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(TINY)
    fields = fields_of(tokenizer)
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    for text in TEXTS:
        theirs = [token.replace(" ", "▁") for token in tokenizer.tokenize(text)]
        assert joined_by_score(text, fields) == theirs, text


def test_tokens_have_llama_cpps_kinds_and_every_row_has_a_token() -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<mine>"])
    fields = fields_of(tokenizer, size=len(tokenizer) + 2)
    tokens: Any = fields["tokenizer.ggml.tokens"]
    kinds: Any = fields["tokenizer.ggml.token_type"]
    kind_of = dict(zip(tokens, kinds, strict=True))
    assert [kind_of[token] for token in ("<unk>", "<s>", "<mine>", "<0x0A>", "e")] == [
        2,
        3,
        4,
        6,
        1,
    ]
    assert kinds[-2:] == [5, 5]
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is False


def test_of_several_end_tokens_two_are_named() -> None:
    fields = fields_of(merging_tokenizer(), ends=(2, 7))
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.eot_token_id"] == 7


def test_the_chat_template_goes_with_it() -> None:
    tokenizer = merging_tokenizer()
    assert "tokenizer.chat_template" not in fields_of(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert fields_of(tokenizer)["tokenizer.chat_template"] == "{{ messages }}"


def byte_level(*steps: Any, whole: bool = False, **options: Any) -> Any:
    """Return a byte-level BPE with these steps before it."""
    tokenizer = merging_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts["model"]["ignore_merges"] = whole
    inner = Tokenizer.from_str(json.dumps(parts))
    inner.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    for name, value in options.items():
        setattr(inner, name, value)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


def split(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), "isolated")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED: dict[str, Any] = {
    "gpt-2": lambda: byte_level(WORDS),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), WORDS),
    "qwen2": lambda: byte_level(split(QWEN), BYTES, normalizer=normalizers.NFC()),
    "llama-bpe": lambda: byte_level(
        split(QWEN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")), BYTES, whole=True
    ),
    "dbrx": lambda: byte_level(split(QWEN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")), BYTES),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_pre_tokenizer_has_llama_cpps_name(name: str) -> None:
    fields = fields_of(NAMED[name]())
    assert fields["tokenizer.ggml.pre"] == name
    assert name in PRE_TOKENIZERS.values()


REFUSED: dict[str, tuple[Any, str]] = {
    "expression": (lambda: byte_level(split("a+"), BYTES), "cuts texts by a"),
    "prefix": (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "of its own"),
    "normalizer": (
        lambda: byte_level(WORDS, normalizer=normalizers.Lowercase()),
        "has the normalizer Lowercase",
    ),
    "cut": (
        lambda: sentencepiece(normalizer=replacing(), cut=split("e")),
        "cuts through its own token",
    ),
    "no merges": (byte_tokenizer, "has no merges"),
    "unigram": (
        lambda: transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0, False))
        ),
        "is a Unigram model",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_does_not_follow_is_refused(build: Any, message: str) -> None:
    with pytest.raises(LorakitError, match=message):
        fields_of(build())


def test_more_tokens_than_rows_are_refused() -> None:
    with pytest.raises(LorakitError, match="tokens and 3 rows in its embedding"):
        fields_of(byte_tokenizer(), size=3)
