"""What MLX itself computes with a converted adapter, in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner

from lorakit.cli import lorakit
from tests.adapters.test_mlx import UNEVEN

pytestmark = pytest.mark.slow
TINY = Path(__file__).parents[2] / "lorakit" / "tiny"
IDS = [5, 17, 33, 90, 12, 7]
PRINT_LOGITS = """
    import json, sys
    import mlx.core as mx
    from mlx_lm import load
    model, _ = load(sys.argv[1], adapter_path=sys.argv[2])
    logits = model(mx.array([json.loads(sys.argv[3])]))
    print(json.dumps(logits[0].astype(mx.float32).tolist()))
"""


@pytest.fixture(scope="module")
def mlx_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a Python in which MLX is installed, for its CPU."""
    folder = tmp_path_factory.mktemp("mlx")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "mlx[cpu]", "mlx-lm"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"MLX cannot be installed here: {done.stderr.splitlines()[-1:]}")
    return python


def save_for_mlx(base: Any, folder: Path) -> None:
    """Save a base as MLX reads it: its `rope_theta` stands where transformers 4 wrote it."""
    base.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    theta = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps({**config, "rope_theta": theta}))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="all layers"),
        pytest.param({"layers_to_transform": [0, 2, 5]}, id="some layers"),
        pytest.param(UNEVEN, id="several ranks and scales"),
    ],
)
def test_mlx_gives_pefts_logits(settings: dict[str, Any], mlx_python: str, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    save_for_mlx(base, tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings
    )
    model: Any = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
        with model.disable_adapter():
            plain = model(torch.tensor([IDS])).logits[0]
    arguments = [str(tmp_path / "peft"), "--to", "mlx", "-o", str(tmp_path / "mlx")]
    assert CliRunner().invoke(lorakit, ["convert", *arguments]).exit_code == 0
    done = subprocess.run(
        [
            *(mlx_python, "-c", textwrap.dedent(PRINT_LOGITS)),
            *(str(tmp_path / "base"), str(tmp_path / "mlx"), json.dumps(IDS)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
