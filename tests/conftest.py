"""What the tests share: the folder of real data, a tiny model, a file of records.

Nothing here imports torch at its top: most tests need none, and it takes seconds to import.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small gain nothing from more threads

# A shell runs background jobs with SIGINT ignored, and what they start inherits that: the tests of
# Ctrl-C need children that get it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"
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


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A file of three records, one of them with a field of its author's and one with references."""
    path = tmp_path / "records.jsonl"
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
    path.write_text("".join(lines), encoding="utf-8")
    return path
