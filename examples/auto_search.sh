#!/bin/sh
# How well `merge --prune-ratio auto` searches: on the microworld's English tasks and three seeds, the
# merge of XS+WL+TGT at every ratio from 0 to 0.9 to the end (the grid), and the search. Prints by task
# and seed the rank correlation of the search's order with the grid's, the regret of what it chose, and
# its cost in merges. What it printed is in examples/README.md.
#
#     sh examples/auto_search.sh [FOLDER]    # goes on in the folder of adaptive_merge.sh, by default ./runs
#
# Takes the adapters that adaptive_merge.sh has left in FOLDER, or trains them. Draws the grids of a task
# over its seeds (the adaptive-merge paper's Figure 4) as FOLDER/en/TASK/grid.svg. $TASKS, $LANG_, $SEEDS
# and $JOBS choose what is run and how much at a time; $SIZE and $VALIDATION are numbers of records (with
# others than 50, take a folder of their own). A command whose output exists is skipped.

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
tasks=${TASKS:-title impression highlights} lang=${LANG_:-en} seeds=${SEEDS:-0 1 2}
root=$out/$lang size=${SIZE:-50} validation=${VALIDATION:-50}
related="--lr 6e-3 --batch-size 16 --epochs 3 --dtype float32 --resume -q"
few="--data train.jsonl --val val.jsonl"
target="$few --batch-size 2 --epochs 6 --patience 2 --dtype float32 --resume -q"
grid=0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9

make() { # make OUTPUT COMMAND…: print a command to run in $folder, unless its output exists
    output=$1
    shift
    [ -e "$folder/$output" ] || echo "$folder lorakit $* -o $output"
}
data() { # data OUTPUT TASK SPLIT SEED COUNT
    make "$1" build-dataset microworld "$2" --lang "$lang" --split "$3" --seed "$4" --sample "$5" -q
}
each() { # each FUNCTION, for every task and seed, in its folder
    for task in $tasks; do
        for seed in $seeds; do
            folder=$root/$task/$seed
            mkdir -p "$folder"
            $1
        done
    done
}
records() {
    data train.jsonl "$task" train "$seed" "$size"
    data val.jsonl "$task" validation "$seed" "$validation"
}
alone() { make tgt.safetensors train-adapter $target --lr 6e-3 --seed "$seed"; }
searches() {
    merging="merge ../../xs.safetensors ../../wl.safetensors tgt.safetensors $target --lr 3e-3"
    make grid.safetensors $merging --seed "$seed" --prune-ratio $grid --plot grid.svg --log grid.log
    make auto.safetensors $merging --seed "$seed" --prune-ratio auto --plot auto.svg --log auto.log
}

mkdir -p "$root"
{
    folder=$root
    for pair in xs:headline wl:howto; do
        data "${pair%:*}.train.jsonl" "${pair#*:}" train 0 600
        data "${pair%:*}.val.jsonl" "${pair#*:}" validation 0 50
    done
    each records
    folder=$root
    for name in xs wl; do
        make $name.safetensors train-adapter --data $name.train.jsonl --val $name.val.jsonl $related
    done
    each alone
    each searches
} | python examples/forks.py ${JOBS:+--jobs "$JOBS"}

for task in $tasks; do
    files=""
    for seed in $seeds; do files="$files seed-$seed=$root/$task/$seed/grid.svg.jsonl"; done
    python examples/overlay.py "$root/$task/grid.svg" $files
done
python examples/auto_search.py "$root" --tasks $tasks --seeds $seeds
