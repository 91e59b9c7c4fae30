"""Score two systems with intervals and p-values, lorakit against sacrebleu's own command.

BLEU and chrF of two systems of WMT23 English to Chinese (2,074 segments), with 10,000 trials of
approximate randomization and 10,000 of the bootstrap, by `lorakit score --baseline` in one run and
by sacrebleu's `--paired-ar` and `--paired-bs` in two: sacrebleu does one of both at a time. Whole
processes are timed, in turns, start-up included; the p-values must be equal.

    python -m tests.benchmarks.score [--rounds 3] [--trials 10000]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.commands import LORAKIT, compared, costs_in_turns, install
from tests.benchmarks.program import data_folder, main, option
from tests.benchmarks.result import BenchmarkError, Result

DATA = "wmt23-en-zh"
FILE = "generaltest2023.en-zh.{}.zh"
REFERENCE = "ref.refA"
SYSTEMS = ("hyp.NLLB_Greedy", "hyp.ONLINE-A")  # the first is the baseline
SEED = "12345"


@dataclass(frozen=True)
class Options:
    rounds: int = option(3, "turns of each side")
    trials: int = option(10_000, "of approximate randomization, and of the bootstrap")
    segments: int = option(0, "how many are scored; 0: all 2,074")


SMOKE = Options(rounds=1, trials=100, segments=40)


def measure(options: Options) -> Result:
    """Score by both in turns, and compare what they took and their p-values."""
    data = Path(data_folder(DATA))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, data, options.segments or None)
        environment = {**install(folder), "SACREBLEU_SEED": SEED}
        lines = commands(options.trials)
        costs = costs_in_turns(lines, environment, folder, options.rounds)
        check(folder, environment, lines["ar"])
    both = [ar + bs for ar, bs in zip(costs["ar"], costs["bs"], strict=True)]
    details = {
        "trials": options.trials,
        "seconds of --paired-ar": min(cost.seconds for cost in costs["ar"]),
        "seconds of --paired-bs": min(cost.seconds for cost in costs["bs"]),
    }
    return compared("score", costs["lorakit"], both, details)


def prepare(folder: Path, data: Path, count: int | None) -> None:
    """Write the texts as sacrebleu reads them, and the systems' as records with predictions."""
    lines = {}
    for name in (REFERENCE, *SYSTEMS):
        lines[name] = (data / FILE.format(name)).read_text(encoding="utf-8").split("\n")[:-1]
        lines[name] = lines[name][:count]
        text = "".join(f"{line}\n" for line in lines[name])
        (folder / name).write_text(text, encoding="utf-8")
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
    """Raise BenchmarkError where the p-values are not those of sacrebleu's `--paired-ar`."""
    done = subprocess.run(
        command, env=dict(environment), cwd=folder, capture_output=True, check=True
    )
    theirs = json.loads(done.stdout)[-1]
    records = map(json.loads, (folder / "ours.jsonl").read_text(encoding="utf-8").splitlines())
    (ours,) = (r["significance"]["p_values"] for r in records if "p_values" in r["significance"])
    if list(ours.values()) != [theirs[name]["p_value"] for name in ("BLEU", "chrF2")]:
        raise BenchmarkError(f"the p-values {ours} are not sacrebleu's")


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
