#!/bin/sh
# The main job, end to end, on a laptop: adapters trained on two related tasks and one on 50 target
# examples, merged without and with pruning; every system generates and is scored; then the layer
# above which the merged LoRA does no good is found, and the LoRA above it dropped. Sets up .venv.
#
#     sh examples/quickstart.sh [FOLDER]        # results go to FOLDER, by default ./quickstart

set -eu
case ${1:-} in
    "") out=$(cd "$(dirname "$0")/.." && pwd)/quickstart ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
. tests/setup.sh
mkdir -p "$out"
# Two runs at a time, one thread each: the model is small, and start-up is most of the work.
export OMP_NUM_THREADS=1 LORAKIT_MODEL=tiny
related="--lr 6e-3 --batch-size 16 --epochs 4 --dtype float32"
target="--batch-size 2 --epochs 6 --patience 2 --dtype float32"

echo "== data: two related tasks, and 50 examples of the target task" >&2
lorakit build-dataset microworld headline --sample 600 -o "$out/xs.train.jsonl"
lorakit build-dataset microworld howto --sample 600 -o "$out/wl.train.jsonl"
lorakit build-dataset microworld title --sample 50 -o "$out/train.jsonl"
lorakit build-dataset microworld headline --split validation --sample 50 -o "$out/xs.val.jsonl"
lorakit build-dataset microworld howto --split validation --sample 50 -o "$out/wl.val.jsonl"
lorakit build-dataset microworld title --split validation --sample 50 -o "$out/val.jsonl"
lorakit build-dataset microworld title --split test --sample 100 -o "$out/test.jsonl"

echo "== adapters on the related tasks" >&2
lorakit train-adapter --data "$out/xs.train.jsonl" --val "$out/xs.val.jsonl" $related \
    -o "$out/xs.safetensors" &
lorakit train-adapter --data "$out/wl.train.jsonl" --val "$out/wl.val.jsonl" $related \
    -o "$out/wl.safetensors" -q
wait $!

echo "== an adapter on the target task, and merges" >&2
cd "$out"
targets="--data train.jsonl --val val.jsonl $target"
lorakit train-adapter $targets --lr 6e-3 -o tgt.safetensors &
lorakit merge xs.safetensors wl.safetensors $targets --lr 3e-3 -q -o xs+wl.safetensors
wait $!
lorakit merge xs.safetensors wl.safetensors $targets --lr 3e-3 --prune-ratio 0.1 -q \
    -o xs+wl.pruned.safetensors &
lorakit merge xs.safetensors wl.safetensors tgt.safetensors $targets --lr 3e-3 \
    -o xs+wl+tgt.safetensors
wait $!
lorakit merge xs.safetensors wl.safetensors tgt.safetensors $targets --lr 3e-3 \
    --prune-ratio 0.1 -q -o xs+wl+tgt.pruned.safetensors &
merged=$!

echo "== predictions" >&2
predict() {
    lorakit generate ${2:+"$2"} --data test.jsonl --max-new-tokens 40 --batch-size 50 -q -o "$1"
}
predict zero-shot.jsonl
wait "$merged"
pair() { # two systems at a time
    predict "$1.jsonl" "$1.safetensors" &
    [ -z "${2:-}" ] || predict "$2.jsonl" "$2.safetensors"
    wait $!
}
pair xs wl
pair tgt xs+wl
pair xs+wl.pruned xs+wl+tgt
pair xs+wl+tgt.pruned

echo "== scores; what is in a merged file: lorakit inspect $out/xs+wl+tgt.pruned.safetensors" >&2
lorakit score --metric rougeL,em --format table --baseline tgt.jsonl \
    zero-shot.jsonl xs.jsonl wl.jsonl tgt.jsonl xs+wl.jsonl xs+wl.pruned.jsonl xs+wl+tgt.jsonl \
    xs+wl+tgt.pruned.jsonl

echo "== the score by the number of bottom layers that keep their LoRA; the best is cut there" >&2
lorakit find-boundary xs+wl+tgt.pruned.safetensors --data val.jsonl --max-new-tokens 40 \
    --batch-size 50 | tee boundary.jsonl |
    lorakit strip-layers xs+wl+tgt.pruned.safetensors --boundary - -o final.safetensors
sed 's/.*"boundary": \([0-9]*\), "score": \([0-9.]*\).*"best": \([a-z]*\).*/boundary \1: \2 \3/' \
    boundary.jsonl | sed 's/false$//; s/true$/best/'

echo "== what they write, on three of the test records: the label, then each system" >&2
python - <<'END'
import json

systems = ["zero-shot", "xs", "wl", "tgt", "xs+wl+tgt"]
outputs = [[json.loads(line) for line in open(f"{name}.jsonl", encoding="utf-8")] for name in systems]
for records in list(zip(*outputs))[:3]:
    print()
    print("label     ", records[0]["completion"].strip())
    for name, record in zip(systems, records):
        print(f"{name:10}", record["prediction"].strip())
END
