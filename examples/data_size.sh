#!/bin/sh
# How much the number of target examples matters (the adaptive-merge paper's Figure 6): the target
# adapter alone, and our merges with pruning of XS+WL and XS+WL+TGT, by the size of the training set.
#
#     sh examples/data_size.sh [FOLDER]    # goes on in the folder of adaptive_merge.sh, by default ./runs
#
# Takes the related adapters that adaptive_merge.sh has left in FOLDER, or trains them. Prints the
# scores, saves them as FOLDER/data_size.jsonl and draws FOLDER/data_size.png. $TASK, $LANG_, $SIZES
# and $SEEDS choose what is run. A command whose output exists is skipped. What it printed is in
# examples/README.md.

set -eu
case ${1:-} in
    "") out=$(cd "$(dirname "$0")/.." && pwd)/runs ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
LORAKIT_EXTRAS="[plot]"
. tests/setup.sh
export OMP_NUM_THREADS=1 LORAKIT_MODEL=tiny
task=${TASK:-title} lang=${LANG_:-en} sizes=${SIZES:-10 20 50 100 200} seeds=${SEEDS:-0 1 2}
root=$out/$lang top=$out/$lang/$task/sizes
related="--lr 6e-3 --batch-size 16 --epochs 3 --dtype float32 --resume -q"
few="--data train.jsonl --val val.jsonl"
target="$few --batch-size 2 --epochs 6 --patience 2 --dtype float32 --resume -q"
mkdir -p "$top"

make() { # make OUTPUT COMMAND…: print a command to run in $folder, unless its output exists
    output=$1
    shift
    [ -e "$folder/$output" ] || echo "$folder lorakit $* -o $output"
}
data() { # data OUTPUT TASK SPLIT SEED COUNT
    make "$1" build-dataset microworld "$2" --lang "$lang" --split "$3" --seed "$4" --sample "$5" -q
}
each() { # each FUNCTION, for every size and seed, in its folder
    for size in $sizes; do
        for seed in $seeds; do
            folder=$top/$size/$seed
            mkdir -p "$folder"
            $1
        done
    done
}
records() {
    data train.jsonl "$task" train "$seed" "$size"
    data val.jsonl "$task" validation "$seed" 50
}
alone() { make tgt.safetensors train-adapter $target --lr 6e-3 --seed "$seed"; }
merges() {
    parents="$root/xs.safetensors $root/wl.safetensors"
    for system in xs+wl xs+wl+tgt; do
        [ $system = xs+wl ] || parents="$parents tgt.safetensors"
        make $system.safetensors merge $parents $target --lr 3e-3 --prune-ratio 0.1 --seed "$seed"
    done
}
outputs() {
    for system in tgt xs+wl xs+wl+tgt; do
        make $system.jsonl generate $system.safetensors --data "$top/test.jsonl" \
            --max-new-tokens 48 --batch-size 50 -q
    done
}

{
    folder=$root
    for pair in xs:headline wl:howto; do
        data "${pair%:*}.train.jsonl" "${pair#*:}" train 0 600
        data "${pair%:*}.val.jsonl" "${pair#*:}" validation 0 50
    done
    folder=$top
    data test.jsonl "$task" test 0 60
    each records
    folder=$root
    for name in xs wl; do
        make $name.safetensors train-adapter --data $name.train.jsonl --val $name.val.jsonl $related
    done
    each alone
    each merges
    each outputs
} | python examples/forks.py

for size in $sizes; do
    systems=""
    for system in tgt xs+wl xs+wl+tgt; do
        files=""
        for seed in $seeds; do files="$files,$size/$seed/$system.jsonl"; done
        systems="$systems --system $size:$system=${files#,}"
    done
    (cd "$top" && lorakit score $systems --lang "$lang" --metric rougeL --format json)
done > "$out/data_size.jsonl"
python examples/data_size.py "$out/data_size.jsonl" --plot "$out/data_size.png"
