"""PiSSA and its kin converted to plain LoRA: against PEFT's own conversion and logits."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lorakit.adapters.initial import subtract_initial
from lorakit.adapters.storage import load_adapter
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from tests.support.adapters import tiny
from tests.support.peft_models import logits, random_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa by iterations": ("llama", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "rslora": ("llama", {"init_lora_weights": "pissa", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "init_lora_weights": "olora",
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "conv1d": (
        "gpt2",
        {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
}


def trained(family: str, fields: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Save PEFT's adapter before and after training; return the base and PEFT's model."""
    base = random_model(family)
    plain = copy.deepcopy(base)
    model: Any = peft.get_peft_model(plain, peft.LoraConfig(**PLAIN | fields)).eval()
    config = model.peft_config["default"]
    init, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(folder / "initial")
    config.init_lora_weights = init
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "trained")
    return base, model


def convert(folder: Path, *arguments: str) -> Any:
    line = ["convert", f"{folder}/trained", "-o", f"{folder}/plain/", *arguments]
    return CliRunner().invoke(lorakit, line)


@pytest.mark.parametrize(("family", "fields"), KINDS.values(), ids=KINDS.keys())
def test_the_converted_adapter_gives_pefts_logits_on_the_unchanged_base(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    base, model = trained(family, fields, tmp_path)
    expected = logits(model)
    assert convert(tmp_path, "--initial-adapter", f"{tmp_path}/initial").exit_code == 0
    ours: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "plain")).eval()
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base), expected, atol=1e-2)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_tensors_and_the_scale_are_those_of_pefts_conversion(kind: str, tmp_path: Path) -> None:
    _, model = trained(*KINDS[kind], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            tmp_path / "theirs",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    convert(tmp_path, "--initial-adapter", f"{tmp_path}/initial")
    theirs, ours = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "plain")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours_, theirs_ = (load_adapter(str(tmp_path / name)) for name in ("plain", "theirs"))
    assert [m.scale for m in ours_.modules()] == [m.scale for m in theirs_.modules()]


def test_without_the_initial_factors_the_line_that_converts_is_named(tmp_path: Path) -> None:
    trained(*KINDS["pissa"], tmp_path)
    done = convert(tmp_path)
    assert isinstance(done.exception, LorakitError)
    assert "convert the adapter by lorakit convert --initial-adapter" in str(done.exception)


def test_the_history_names_both_adapters(tmp_path: Path) -> None:
    adapter, initial = pissa(), tiny()
    (entry,) = subtract_initial(adapter, initial).header["history"]
    assert entry["command"] == "convert"
    assert entry["settings"] == {"initial_adapter": initial.sha256}
    assert entry["parents"] == {"tiny": adapter.sha256}


def pissa() -> Any:
    return tiny(init_lora_weights="pissa")


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "plain LoRA": (tiny(), tiny(), "took nothing out of the base"),
    "LoftQ": (tiny(init_lora_weights="loftq"), tiny(), "'loftq' took nothing out"),
    "itself": (pissa(), pissa(), "holds the same as tiny"),
    "another rank": (pissa(), tiny(rank=3), "has another rank, shape or scale"),
    "another scale": (pissa(), tiny(lora_alpha=9), "has another rank, shape or scale"),
    "fewer modules": (pissa(), tiny(layers=1), "layers.1.self_attn.q_proj' has another rank"),
}


@pytest.mark.parametrize(("adapter", "initial", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_do_not_belong_together_are_refused(
    adapter: Any, initial: Any, message: str
) -> None:
    with pytest.raises(LorakitError, match=message):
        subtract_initial(adapter, initial)
