#!/bin/sh
# The adaptive-merge paper's comparison on target tasks of the microworld, English and Japanese,
# over three seeds: zero-shot, each related adapter (XS: headlines, WL: how-to steps), the target
# adapter (TGT, 50 examples), and the merges without and with pruning. Prints mean and spread.
# The tasks are title and impression, or those of $TASKS (highlights is a third).
#
#     sh examples/adaptive_merge.sh [FOLDER]    # work goes to FOLDER, by default ./runs
#
# Every step that has its output is skipped, so that a stopped run goes on where it was. The related
# adapters are trained once, on 1000 records each; a seed draws the 50 target examples and the 50
# validation examples and seeds all training on them.

set -eu
case ${1:-} in
    "") out=$(cd "$(dirname "$0")/.." && pwd)/runs ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
. tests/setup.sh
export OMP_NUM_THREADS=1 LORAKIT_MODEL=tiny out
tasks=${TASKS:-title impression}
export related="--lr 6e-3 --batch-size 16 --epochs 5 --patience 2 --dtype float32 --resume -q"
export target="--epochs 16 --patience 2 --dtype float32 --resume -q"
export lr_alone=6e-3 lr_merge=3e-3 ratio=0.1

data() { # data TASK LANG SPLIT SEED COUNT FILE
    [ -e "$6" ] || lorakit build-dataset microworld "$1" --lang "$2" --split "$3" --seed "$4" \
        --sample "$5" -q -o "$6"
}

related() { # related LANG NAME TASK
    folder=$out/$1
    mkdir -p "$folder"
    [ ! -e "$folder/$2.safetensors" ] || return 0
    data "$3" "$1" train 0 1000 "$folder/$2.train.jsonl"
    data "$3" "$1" validation 0 100 "$folder/$2.val.jsonl"
    lorakit train-adapter --data "$folder/$2.train.jsonl" --val "$folder/$2.val.jsonl" $related \
        -o "$folder/$2.safetensors"
}

predict() { # predict TEST NAME [ADAPTER]
    [ -e "$2.jsonl" ] || lorakit generate ${3:+"$3"} --data "$1" --max-new-tokens 48 \
        --batch-size 50 -q -o "$2.jsonl"
}

merge() { # merge NAME RATIO ADAPTER…
    name=$1 share=$2
    shift 2
    [ -e "$name.safetensors" ] || lorakit merge "$@" --data train.jsonl --val val.jsonl $target \
        --lr $lr_merge --prune-ratio "$share" --seed "$seed" -o "$name.safetensors"
    predict ../test.jsonl "$name" "$name.safetensors"
}

untrained() { # untrained LANG TASK: what needs no target example
    folder=$out/$1/$2
    mkdir -p "$folder"
    data "$2" "$1" test 0 100 "$folder/test.jsonl"
    cd "$folder"
    predict test.jsonl zero-shot
    predict test.jsonl xs ../xs.safetensors
    predict test.jsonl wl ../wl.safetensors
}

trained() { # trained LANG TASK SEED
    seed=$3
    folder=$out/$1/$2/$3
    mkdir -p "$folder"
    data "$2" "$1" train "$3" 50 "$folder/train.jsonl"
    data "$2" "$1" validation "$3" 50 "$folder/val.jsonl"
    cd "$folder"
    [ -e tgt.safetensors ] || lorakit train-adapter --data train.jsonl --val val.jsonl $target \
        --lr $lr_alone --seed "$seed" -o tgt.safetensors
    predict ../test.jsonl tgt tgt.safetensors
    set -- ../../xs.safetensors ../../wl.safetensors
    merge xs+wl 0 "$@"
    merge xs+wl.pruned "$ratio" "$@"
    merge xs+wl+tgt 0 "$@" tgt.safetensors
    merge xs+wl+tgt.pruned "$ratio" "$@" tgt.safetensors
}

if [ $# -gt 1 ]; then # one piece of the work, called from below
    shift
    "$@"
    exit
fi

# Two pieces at a time, one thread each; xargs stops at the first that fails.
pieces() { xargs -P 2 -L 1 sh examples/adaptive_merge.sh "$out" >&2; }
for lang in en ja; do
    echo related $lang xs headline
    echo related $lang wl howto
done | pieces
for lang in en ja; do
    for task in $tasks; do echo untrained $lang $task; done
done | pieces
for task in $tasks; do
    for lang in en ja; do
        for seed in 0 1 2; do echo trained $lang $task $seed; done
    done
done | pieces

for lang in en ja; do
    for task in $tasks; do
        find "$out/$lang/$task" -name '*.jsonl' ! -name test.jsonl ! -name train.jsonl \
            ! -name val.jsonl
    done | LC_ALL=C sort | xargs lorakit score --lang $lang --metric rougeL,em --format json
done > "$out/scores.jsonl"
python examples/table.py "$out/scores.jsonl"
