"""A model whose modules are named unlike any family's, and are in no list of layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

from lorakit.adapters.storage import load_adapter
from tests.support.in_process import Ended, run_here
from tests.support.models import CONTEXT, VOCABULARY, byte_tokenizer
from tests.support.training_data import rows, save_rows


class OddConfig(transformers.PretrainedConfig):
    """Says nothing of heads or widths by the names that other configs use."""

    model_type = "odd-one-out"

    def __init__(self, breadth: int = 16, num_hidden_layers: int = 2, **options: Any) -> None:
        self.breadth = breadth
        self.num_hidden_layers = num_hidden_layers  # transformers' caches are made for so many
        super().__init__(**options)


class Stage(torch.nn.Module):
    """Adds to each token the mean of the tokens up to it, through two projections."""

    def __init__(self, breadth: int) -> None:
        super().__init__()
        self.gather = torch.nn.Linear(breadth, breadth)
        self.spread = torch.nn.Linear(breadth, breadth)

    def forward(self, state: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        summed = (self.gather(state) * weight).cumsum(1)
        mean = summed / weight.cumsum(1).clamp_min(1)
        return state + torch.tanh(self.spread(mean))


class OddModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Two stages, each an attribute of its own."""

    config_class = OddConfig
    main_input_name = "input_ids"

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.words = torch.nn.Embedding(VOCABULARY, config.breadth)
        self.early, self.late = Stage(config.breadth), Stage(config.breadth)
        self.speak = torch.nn.Linear(config.breadth, VOCABULARY)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.speak

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = mask[..., None].to(self.words.weight.dtype)
        state = self.late(self.early(self.words(input_ids), weight), weight)
        return CausalLMOutput(logits=self.speak(state))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of such a model, which transformers is told of."""
    transformers.AutoConfig.register(OddConfig.model_type, OddConfig)
    transformers.AutoModelForCausalLM.register(OddConfig, OddModel)
    folder = tmp_path_factory.mktemp("odd")
    torch.manual_seed(0)
    config = OddConfig(eos_token_id=2, max_position_embeddings=CONTEXT)
    OddModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    yield str(folder)
    transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(OddConfig)
    transformers.models.auto.configuration_auto.CONFIG_MAPPING._extra_content.pop(
        OddConfig.model_type
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "data.jsonl", rows(6))


def train(odd: str, data: str, output: Path, *more: str) -> Ended:
    options = ("--epochs", "2", "--lr", "1e-2", "--dtype", "float32", "--rank", "2")
    return run_here(
        "train-adapter", "--model", odd, "--data", data, "-o", str(output), *options, *more
    )


@pytest.fixture(scope="module")
def adapter(odd: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("adapter") / "odd.safetensors"
    trained = train(odd, data, path, "--target-modules", "gather,late.spread")
    assert trained.code == 0, trained.stderr
    return str(path)


def test_lora_on_named_modules_is_trained(adapter: str) -> None:
    names = [module.name for module in load_adapter(adapter).modules()]
    assert names == ["early.gather", "late.gather", "late.spread"]


def test_all_linear_leaves_the_output_head_out(odd: str, data: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert train(odd, data, path, "--target-modules", "all-linear").code == 0
    names = [module.name for module in load_adapter(str(path)).modules()]
    assert names == ["early.gather", "early.spread", "late.gather", "late.spread"]


def test_what_needs_no_layers_works(odd: str, data: str, adapter: str, tmp_path: Path) -> None:
    base = ("--model", odd, "--data", data)
    for arguments in (
        ("generate", adapter, *base, "--max-new-tokens", "3", "-o", f"{tmp_path}/g.jsonl"),
        ("merge", adapter, adapter, "--method", "svd", "-o", f"{tmp_path}/m.safetensors"),
        (
            *("merge", adapter, adapter, *base, "--epochs", "1", "--prune-ratio", "0.2"),
            *("-o", f"{tmp_path}/p.safetensors"),
        ),
        ("inspect", adapter),
        ("inspect", adapter, "--importance", *base),
        ("convert", adapter, "-o", f"{tmp_path}/c/"),
    ):
        ended = run_here(*arguments)
        assert ended.code == 0, ended.stderr


NEED_LAYERS: dict[str, tuple[str, ...]] = {
    "strip-layers": ("strip-layers", "{adapter}", "--boundary", "1", "-o", "{o}/x.safetensors"),
    "scale-layers": (
        "scale-layers",
        "{adapter}",
        "--from",
        "1",
        "--factor",
        "0",
        "-o",
        "{o}/x.safetensors",
    ),
    "find-boundary": ("find-boundary", "{adapter}", "--data", "{data}", "--model", "{odd}"),
    "find-boundary by loss": (
        *("find-boundary", "{adapter}", "--data", "{data}", "--model", "{odd}"),
        *("--metric", "loss"),
    ),
    "find-boundary by probability": (
        *("find-boundary", "{adapter}", "--data", "{data}", "--model", "{odd}"),
        *("--by", "probability"),
    ),
    "strip-layers by importance": (
        *("strip-layers", "{adapter}", "--by", "importance", "--share", "0.5"),
        *("--data", "{data}", "--model", "{odd}", "-o", "{o}/x.safetensors"),
    ),
    "train-adapter on layers": (
        *("train-adapter", "--data", "{data}", "--model", "{odd}", "--layers", "0"),
        *("--target-modules", "gather", "-o", "{o}/x.safetensors"),
    ),
}


@pytest.mark.parametrize("name", NEED_LAYERS)
def test_what_needs_layers_is_one_line(
    name: str, odd: str, data: str, adapter: str, tmp_path: Path
) -> None:
    fields = {"odd": odd, "data": data, "adapter": adapter, "o": str(tmp_path)}
    ended = run_here(*(word.format(**fields) for word in NEED_LAYERS[name]))
    assert ended.code == 1, ended.stderr
    (line,) = ended.errors
    assert "layer" in line
    assert not list(tmp_path.iterdir())


def test_unknown_targets_are_named_from_what_is_there(odd: str, data: str, tmp_path: Path) -> None:
    for targets in ((), ("--target-modules", "q_proj")):
        ended = train(odd, data, tmp_path / "x.safetensors", *targets)
        assert ended.code == 1
        assert "gather" in ended.errors[0]
        assert "spread" in ended.errors[0]
