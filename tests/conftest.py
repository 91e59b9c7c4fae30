"""What the tests share: the folder of real data, a tiny model, a file of records.

Nothing here imports torch at its top: most tests need none, and it takes seconds to import.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from more threads

# A shell runs background jobs with SIGINT ignored, and what they start inherits that: the tests of
# Ctrl-C need children that get it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RECORDS = [
    {"id": "a", "prompt": "The cat sat on", "completion": " the mat.", "note": [1, None]},
    {"id": "b", "prompt": "猫は", "completion": "座った。", "references": ["座った。", "いた。"]},
    {"id": "c", "prompt": "One and one is", "completion": " two."},
]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, adapters and models that lies beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("there is no folder of real data beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random Llama and its tokenizer."""
    from tests.support.models import save_model

    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct: $LORAKIT_SMOLLM2, else made into the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "smollm2"
    folder = os.environ.get("LORAKIT_SMOLLM2") or str(cache)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "make_smollm2.py"), "--out", folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == os.EX_UNAVAILABLE:
        pytest.skip(f"SmolLM2 cannot be made: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A file of three records, one of them with a field of its author's and one with references."""
    path = tmp_path / "records.jsonl"
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    path.write_text("".join(lines), encoding="utf-8")
    return path
