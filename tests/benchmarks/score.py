"""Score two systems with intervals and p-values, lorakit against sacrebleu's own command.

BLEU and chrF of two systems of WMT23 English to Chinese (2,074 segments), with 10,000 trials of
approximate randomization and 10,000 of the bootstrap, by `lorakit score --baseline` in one run and
by sacrebleu's `--paired-ar` and `--paired-bs` in two: sacrebleu does one of both at a time. Whole
processes are timed, in turns, start-up included; the p-values must be equal.

    python -m tests.benchmarks.score [--rounds 3] [--trials 10000] [--json]

The data are those of `shared/data/wmt23-en-zh` beside the repository, or in the folder $DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.benchmarks.commands import LORAKIT, as_text, comparison, in_turns, install

FILES = "wmt23-en-zh/generaltest2023.en-zh.{}.zh"
REFERENCE = "ref.refA"
SYSTEMS = ("hyp.NLLB_Greedy", "hyp.ONLINE-A")  # the first is the baseline
SEED = "12345"
_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


def prepare(folder: Path, data: Path) -> None:
    """Write the texts as sacrebleu reads them, and the systems' as records with predictions."""
    lines = {}
    for name in (REFERENCE, *SYSTEMS):
        text = (data / FILES.format(name)).read_text(encoding="utf-8")
        (folder / name).write_text(text, encoding="utf-8")
        lines[name] = text.split("\n")[:-1]
    for name in SYSTEMS:
        pairs = zip(lines[name], lines[REFERENCE], strict=True)
        records = [{"prediction": ours, "completion": reference} for ours, reference in pairs]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def commands(trials: int) -> dict[str, list[str]]:
    """Return the command lines of both sides."""
    baseline, system = SYSTEMS
    ours = ["score", f"{system}.jsonl", "--baseline", f"{baseline}.jsonl", "--lang", "zh"]
    ours += ["--metric", "bleu,chrf", "--seed", SEED, "--trials", str(trials), "-o", "ours.jsonl"]
    theirs = [sys.executable, "-m", "sacrebleu", REFERENCE, "-i", baseline, system]
    theirs += ["-m", "bleu", "chrf", "--tokenize", "zh"]
    return {
        "lorakit": [*LORAKIT, *ours],
        "ar": [*theirs, "--format", "json", "--paired-ar", "--paired-ar-n", str(trials)],
        "bs": [*theirs, "--format", "text", "--paired-bs", "--paired-bs-n", str(trials)],
    }


def check(folder: Path, environment: Mapping[str, str], command: list[str]) -> None:
    """End the benchmark where the p-values are not those of sacrebleu's `--paired-ar`."""
    done = subprocess.run(
        command, env=dict(environment), cwd=folder, capture_output=True, check=True
    )
    theirs = json.loads(done.stdout)[-1]
    records = map(json.loads, (folder / "ours.jsonl").read_text(encoding="utf-8").splitlines())
    (ours,) = (r["significance"]["p_values"] for r in records if "p_values" in r["significance"])
    if list(ours.values()) != [theirs[name]["p_value"] for name in ("BLEU", "chrF2")]:
        sys.exit(f"the p-values {ours} are not sacrebleu's")


def measure(folder: Path, rounds: int, trials: int) -> dict[str, object]:
    """Return how the two compare by the clock, and in processor time."""
    environment = {**install(folder), "SACREBLEU_SEED": SEED}
    lines = commands(trials)
    costs = in_turns(lines, environment, folder, rounds)
    check(folder, environment, lines["ar"])
    both = [ar + bs for ar, bs in zip(costs["ar"], costs["bs"], strict=True)]
    processor = comparison(
        "",
        "s",
        [cost.processor for cost in costs["lorakit"]],
        [cost.processor for cost in both],
    )
    return comparison(
        "score",
        "s",
        [cost.seconds for cost in costs["lorakit"]],
        [cost.seconds for cost in both],
        trials=trials,
        processor_seconds=processor["ours"],
        processor_ratio=processor["ratio"],
        paired_ar_seconds=min(cost.seconds for cost in costs["ar"]),
        paired_bs_seconds=min(cost.seconds for cost in costs["bs"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    data = Path(os.environ.get("DATA") or _BESIDE)
    if not (data / FILES.format(REFERENCE)).is_file():
        sys.exit(f"there is no {data / FILES.format(REFERENCE)}; set $DATA to the data's folder")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), data)
        result = measure(Path(folder), options.rounds, options.trials)
    print(json.dumps(result) if options.json else as_text(result))


if __name__ == "__main__":
    main()
