"""BERTScore against bert-score itself, the formula, and models that are tiny and random."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from lorakit.commands.compare import compare
from lorakit.commands.score import score
from lorakit.errors import LorakitError
from lorakit.scoring.bertscore import EmbeddedText, best_f1s, greedy_f1
from lorakit.scoring.metrics import METRICS, compute_statistics

if TYPE_CHECKING:  # imports torch
    from lorakit.models.text_encoder import LayerEmbedder

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", ".", ","]
PREDICTIONS = ["the cat sat on the mat .", "a dog", "cat , dog ran", "mat"]
REFERENCES = [["a dog ran .", "the cat sat"], ["a dog"], ["on a mat"], ["the dog sat on a cat"]]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random BERT of three layers, with a tokenizer by words."""
    return save_encoder(tmp_path_factory.mktemp("bert"))


def save_encoder(folder: Path) -> str:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, **names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def embedder(bert: str, layer: int | None = None) -> LayerEmbedder:
    from lorakit.models.text_encoder import open_embedder

    return open_embedder("en", bert, layer)


# — the matching —


def tokens(*rows: Sequence[float], uncounted: Sequence[int] = ()) -> EmbeddedText:
    vectors = np.array(rows, dtype=np.float32)
    counts = np.array([place not in uncounted for place in range(len(rows))])
    return EmbeddedText(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), counts)


def test_each_token_counts_with_its_closest() -> None:
    ours, theirs = tokens((1, 0), (0, 1)), tokens((1, 0), (1, 1), (3, 4))
    precision, recall = (1 + 0.8) / 2, (1 + 0.5**0.5 + 0.8) / 3
    expected = 2 * precision * recall / (precision + recall)
    assert greedy_f1(ours, theirs) == pytest.approx(expected, abs=1e-6)
    assert greedy_f1(theirs, ours) == pytest.approx(expected, abs=1e-6)


def test_a_token_that_does_not_count_may_still_be_matched() -> None:
    ours, theirs = tokens((1, 0)), tokens((1, 0), (0, 1), uncounted=[0])
    assert greedy_f1(ours, theirs) == 0  # recall: (0, 1) finds nothing; precision: 1
    assert greedy_f1(ours, tokens((1, 0), (3, 4), uncounted=[0])) == pytest.approx(2 * 0.6 / 1.6)


def test_texts_without_a_token_that_counts_score_0() -> None:
    nothing = tokens((1, 0), uncounted=[0])
    assert greedy_f1(nothing, tokens((1, 0))) == greedy_f1(tokens((1, 0)), nothing) == 0
    assert greedy_f1(nothing, nothing) == 0


# — with a model —


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_values_are_those_of_bert_score(bert: str, layer: int) -> None:
    import bert_score

    _, _, theirs = bert_score.score(PREDICTIONS, REFERENCES, model_type=bert, num_layers=layer)
    ours = best_f1s(PREDICTIONS, REFERENCES, embedder(bert, layer))
    assert ours == pytest.approx(theirs.tolist(), abs=1e-5)


def test_a_text_equals_itself_and_an_empty_one_scores_0(bert: str) -> None:
    values = best_f1s(["the cat sat", " ", "dog"], [["the cat sat"], ["dog"], [""]], embedder(bert))
    assert values == pytest.approx([1, 0, 0], abs=1e-6)


def test_a_text_is_embedded_alike_alone_and_among_others(bert: str) -> None:
    model = embedder(bert)
    together = model.embed([*PREDICTIONS, " cat", "cat "])
    for text, embedded in zip([*PREDICTIONS, "cat", "cat"], together, strict=True):
        (alone,) = model.embed([text])
        assert np.allclose(alone.vectors, embedded.vectors, atol=1e-5)
        assert alone.counts.tolist() == embedded.counts.tolist()
        assert alone.counts.tolist() == [False, *[True] * (len(alone.counts) - 2), False]


def test_many_examples_give_what_each_gives_alone(bert: str) -> None:
    model = embedder(bert)
    some = [value for _ in range(40) for value in best_f1s(PREDICTIONS, REFERENCES, model)]
    assert best_f1s(PREDICTIONS * 40, REFERENCES * 40, model) == pytest.approx(some, abs=1e-5)


def test_a_text_longer_than_the_model_reads_is_cut(bert: str) -> None:
    (long,) = embedder(bert).embed(["cat " * 100])
    assert len(long.vectors) == 16


def test_robertas_first_word_is_read_as_one_inside_a_text(tmp_path: Path) -> None:
    import torch
    import transformers

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "Ġ", "Ġa"]
    merges: Any = [("Ġ", "a")]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    transformers.RobertaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(
        vocab_size=8, intermediate_size=8, max_position_embeddings=20, pad_token_id=1, **sizes
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    encoder = embedder(str(tmp_path)).encoder
    assert encoder.encode(["a a"])[0].tolist() == [[0, 7, 7, 2]]
    assert encoder.limit == 18  # positions start after the padding id
    assert len(embedder(str(tmp_path)).embed(["a " * 50])[0].vectors) == 18


def test_the_last_layer_is_taken_of_a_model_that_is_not_known(bert: str) -> None:
    signature = compute_statistics(
        ["a"], [["a"]], metric="bertscore", embedder=embedder(bert)
    ).signature
    assert "nrefs:1|refs:max|measure:f1|idf:no|rescaled:no|" in signature
    assert f"|model:{bert}|layer:3|transformers:" in signature


def test_the_value_is_the_mean_in_percent_of_the_best_over_references(bert: str) -> None:
    model = embedder(bert)
    result = compute_statistics(PREDICTIONS, REFERENCES, metric="bertscore", embedder=model)
    assert result.value == pytest.approx(100 * np.mean(best_f1s(PREDICTIONS, REFERENCES, model)))
    alone = [best_f1s(PREDICTIONS[:1], [[reference]], model)[0] for reference in REFERENCES[0]]
    assert result.rows[0][0] == pytest.approx(max(alone), abs=1e-5)


# — the command —


def test_score_computes_it_beside_other_metrics_and_tests_it(bert: str, tmp_path: Path) -> None:
    files = []
    for name, texts in (("a", PREDICTIONS), ("b", PREDICTIONS[::-1])):
        pairs = zip(texts, REFERENCES, strict=True)
        lines = [json.dumps({"prediction": text, "references": listed}) for text, listed in pairs]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(lines), encoding="utf-8")
    options = ["--metric", "bertscore,em", "--bertscore-model", bert, "--bertscore-layer", "2"]
    arguments = [*map(str, files), "--baseline", str(files[0]), *options]
    result = CliRunner().invoke(score, arguments, catch_exceptions=False)
    first, second = map(json.loads, result.stdout.splitlines())
    assert "|layer:2|" in first["signatures"]["bertscore"]
    assert first["bertscore"] > second["bertscore"]
    assert 0 < second["significance"]["p_values"]["bertscore"] <= 1


def test_compare_scores_records_by_it(bert: str, tmp_path: Path) -> None:
    paths = []
    for name, texts in (("a.jsonl", ["a cat", "a dog"]), ("b.jsonl", ["a cat", "the cat sat"])):
        rows = [{"prediction": text, "completion": "a dog"} for text in texts]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(tmp_path / name))
    options = ("--metric", "bertscore", "--bertscore-model", bert)
    arguments = [*paths, *options, "--where", "worse"]
    result = CliRunner().invoke(compare, arguments, catch_exceptions=False)
    (line,) = map(json.loads, result.stdout.splitlines())
    assert line["prediction_b"] == "the cat sat"
    assert line["score_a"] == pytest.approx(100)
    alone = compute_statistics(
        ["the cat sat"], [["a dog"]], metric="bertscore", embedder=embedder(bert)
    )
    assert line["score_b"] == pytest.approx(alone.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bertscore-layer", "4"), "has 3 layers, none is number 4; choose another"),
        (("--bertscore-model", "none/of-these"), "cannot load the model none/of-these: "),
    ],
)
def test_a_model_or_layer_that_is_not_there_is_one_line(
    bert: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prediction": "a", "completion": "a"}')
    options = ["--metric", "bertscore", "--bertscore-model", bert, *arguments]
    result = CliRunner().invoke(score, [str(tmp_path / "a.jsonl"), *options])
    assert isinstance(result.exception, LorakitError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_without_a_model_it_says_so() -> None:
    assert METRICS["bertscore"].needs == "model"
    with pytest.raises(LorakitError, match="needs a model"):
        compute_statistics(["a"], [["a"]], metric="bertscore")


WITHOUT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == {0!r} else find(name, *rest)
from lorakit.cli import main
main()
"""


@pytest.mark.parametrize("missing", ["torch", "transformers", "peft"])
def test_a_missing_library_is_named_with_its_remedy(missing: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c", "prediction": "c"}\n')

    def run(metric: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            WITHOUT.format(missing),
            "score",
            "a.jsonl",
            "--metric",
            metric,
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    result = run("bertscore")
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: --metric bertscore needs {missing}; run: pip install lorakit\n"
    )
    assert run("rougeL").returncode == 0
