"""What llama.cpp itself computes from lorakit's GGUF files, against transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from lorakit.adapters.storage import load_adapter
from lorakit.export.model_folder import open_model_folder
from lorakit.gguf.adapter import convert_to_gguf
from lorakit.gguf.model import fuse_gguf
from lorakit.reporting import Silent
from lorakit.settings import ModelSettings
from tests.support.gguf import CONFIGS, save_random
from tests.support.llama_cpp import Answer, ask, set_up

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "lorakit" / "tiny"
TEXTS = (
    "The people of the town",
    "Once upon a time, there was a",
    "My name is John Smith, and I have 3 cats.\nThey",
    "The capital of France is",
    "It's 12:30; don't   worry about",
    "The quick brown fox jumps over the",
    "In 1969, men walked on the",
    "def add(a, b):\n    return",
    "Water boils at 100",
    "To be, or not to be: that is",
    "The opposite of hot is",
    "She opened the door and saw",
    "Roses are red, violets are",
    "Two plus two equals",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mayor's boat is",
    "A list of fruits: apples, pears,",
    "東京は日本の",
    "El perro está en la",
    "¿Café? Naïve — “yes”…",
)
# What log probabilities may differ by: for float16 weights, and for llama.cpp's cache, in float16.
F16, CACHE = 0.1, 0.05


@pytest.fixture(scope="module")
def node() -> Path:
    return set_up()


def write_gguf(folder: Path, output: Path, adapter: Path | None = None, **options: Any) -> Path:
    """Write a base, or one with an adapter fused into it, as GGUF in float16."""
    settings = {"dtype": "float16", **options}
    fuse_gguf(
        None if adapter is None else load_adapter(str(adapter)),
        open_model_folder(ModelSettings(), str(folder)),
        str(output),
        trust_remote_code=False,
        reporter=Silent(),
        **settings,
    )
    return output


def with_random_lora(model: Any, folder: Path, modules: list[str]) -> Any:
    """Return PEFT's model with an adapter that changes much of what the model says; save it."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=modules,
        init_lora_weights=False,
        fan_in_fan_out="c_attn" in modules,
    )
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.6 / parameter.shape[1] ** 0.5
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted


def greedy(model: Any, ids: list[int], length: int, ends: list[int]) -> list[int]:
    """Return what a model says greedily, up to an end token."""
    with torch.no_grad():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
    said: list[int] = output[0, len(ids) :].tolist()
    return [token for token in said if token not in ends]


def largest_difference(
    model: Any, prompts: Mapping[str, list[int]], answers: list[Answer]
) -> float:
    """Return by how much the log probabilities of the likeliest first tokens differ at most."""
    differences = []
    for ids, answer in zip(prompts.values(), answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        expected = logits.float().log_softmax(-1)
        differences += [abs(float(expected[token]) - p) for token, p in answer.top.items()]
    return max(differences)


def share_equal(model: Any, prompts: Mapping[str, list[int]], answers: list[Answer]) -> float:
    """Return the share of prompts after which both say the same, greedily."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    same = [
        greedy(model, ids, 12, ends) == answer.generated
        for ids, answer in zip(prompts.values(), answers, strict=True)
    ]
    return float(np.mean(same))


@pytest.fixture(params=["tiny", "smollm2"])
def base(request: pytest.FixtureRequest) -> Path:
    return TINY if request.param == "tiny" else Path(request.getfixturevalue("smollm2"))


def test_a_model_and_its_adapter_say_in_llama_cpp_what_they_say_in_transformers(
    base: Path, node: Path, tmp_path: Path
) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    prompts = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain_file = write_gguf(base, tmp_path / "base.gguf")
    plain = ask(node, plain_file, prompts)
    for text, answer in zip(TEXTS, plain, strict=True):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer.tokenized == bare, text
    assert largest_difference(model, prompts, plain) < F16
    assert share_equal(model, prompts, plain) > 0.8

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = with_random_lora(model, tmp_path / "adapter", targets)
    lora = tmp_path / "adapter.gguf"
    named = ModelSettings(model=str(base))
    convert_to_gguf(load_adapter(str(tmp_path / "adapter")), str(lora), named, Silent().note)
    fused = write_gguf(base, tmp_path / "fused.gguf", tmp_path / "adapter")
    assert largest_difference(adapted, prompts, plain) > 5 * F16, "the adapter changes too little"
    for answers in (ask(node, plain_file, prompts, lora=lora), ask(node, fused, prompts)):
        assert largest_difference(adapted, prompts, answers) < F16
        assert share_equal(adapted, prompts, answers) > 0.8


SCALED: dict[str, dict[str, Any]] = {
    "phi3 longrope": {
        "rope_type": "longrope",
        "partial_rotary_factor": 1.0,
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.01 * place for place in range(8)],
        "long_factor": [1.0 + 0.4 * place for place in range(8)],
        "original_max_position_embeddings": 8,
    },
    "llama llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
LORA_ON = {"phi3": ["qkv_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


@pytest.mark.parametrize("kind", [*CONFIGS, *SCALED])
def test_every_family_computes_in_llama_cpp_what_it_does_in_transformers(
    kind: str, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = kind.partition(" ")[0]
    if kind in SCALED:
        monkeypatch.setitem(CONFIGS, kind, _scaled(CONFIGS[family], SCALED[kind]))
    model = save_random(kind, tmp_path / "base").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    prompts = {text: tokenizer(text)["input_ids"] for text in TEXTS[:3]}
    plain_file = write_gguf(tmp_path / "base", tmp_path / "base.gguf", dtype="float32")
    plain = ask(node, plain_file, prompts, length=0)
    difference = largest_difference(model, prompts, plain)
    targets = LORA_ON.get(family, ["q_proj", "v_proj"])
    adapted = with_random_lora(model, tmp_path / "adapter", targets)
    lora, adapter = tmp_path / "a.gguf", tmp_path / "adapter"
    named = ModelSettings(model=str(tmp_path / "base"))
    convert_to_gguf(load_adapter(str(adapter)), str(lora), named, Silent().note)
    fused = write_gguf(tmp_path / "base", tmp_path / "fused.gguf", adapter, dtype="float32")
    changed = ask(node, fused, prompts, length=0)
    beside = ask(node, plain_file, prompts, lora=lora, length=0)
    differences = (
        difference,
        largest_difference(adapted, prompts, changed),
        largest_difference(adapted, prompts, beside),
    )
    assert max(differences) < CACHE, differences
    assert largest_difference(adapted, prompts, plain) > 10 * CACHE, "it changes too little"


def _scaled(
    build: Callable[[], transformers.PretrainedConfig], rope: dict[str, Any]
) -> Callable[[], transformers.PretrainedConfig]:
    """Return a function that builds a config with its rotary positions scaled."""

    def built() -> transformers.PretrainedConfig:
        config = build()
        config.rope_parameters = rope
        return config

    return built
