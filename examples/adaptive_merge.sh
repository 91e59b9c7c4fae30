#!/bin/sh
# The adaptive-merge paper's experiments on the microworld's target tasks, English and Japanese, over
# three seeds. Table 2: zero-shot, the related adapters (XS: headlines, WL: how-to steps), the target
# adapter (TGT, 50 examples), LoRAHub, and our merges of XS+WL and of XS+WL+TGT, each without and with
# pruning. Table 4, on the Japanese tasks: what makes a parameter important, the unit that is pruned,
# and the value it is reset to, every row at the ratio 0.1. A star marks what differs from TGT (Table
# 2) or from no pruning (Table 4) by paired approximate randomization, p < 0.05. What it printed is in
# examples/README.md.
#
#     sh examples/adaptive_merge.sh [FOLDER]    # work goes to FOLDER, by default ./runs
#
# A command whose output exists is skipped, so that a stopped run can go on. The
# related adapters are trained once, on 600 records each; a seed draws the 50 target examples and
# the 50 validation examples and seeds all training on them. $TASKS, $LANGS and $SEEDS choose fewer.

set -eu
case ${1:-} in
    "") out=$(cd "$(dirname "$0")/.." && pwd)/runs ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
. tests/setup.sh
export OMP_NUM_THREADS=1 LORAKIT_MODEL=tiny
tasks=${TASKS:-title impression highlights} langs=${LANGS:-en ja} seeds=${SEEDS:-0 1 2}
related="--lr 6e-3 --batch-size 16 --epochs 3 --dtype float32 --resume -q"
few="--data train.jsonl --val val.jsonl"
target="$few --batch-size 2 --epochs 6 --patience 2 --dtype float32 --resume -q"
merging="$target --lr 3e-3 --prune-ratio"

# make OUTPUT COMMAND…: print a command to run in $folder, unless its output exists
make() {
    output=$1
    shift
    [ -e "$folder/$output" ] || echo "$folder lorakit $* -o $output"
}
data() { # data OUTPUT TASK SPLIT SEED COUNT
    make "$1" build-dataset microworld "$2" --lang "$lang" --split "$3" --seed "$4" --sample "$5" -q
}
predict() { # predict NAME [ADAPTER]
    make "$1.jsonl" generate ${2:+"$2"} --data "$test" --max-new-tokens 48 --batch-size 60 -q
}

commands() { # print every command of the experiments, those that others need first
    for lang in $langs; do
        folder=$out/$lang
        mkdir -p "$folder"
        for pair in xs:headline wl:howto; do
            data "${pair%:*}.train.jsonl" "${pair#*:}" train 0 600
            data "${pair%:*}.val.jsonl" "${pair#*:}" validation 0 50
        done
        for task in $tasks; do
            folder=$out/$lang/$task
            mkdir -p "$folder"
            data test.jsonl "$task" test 0 60
            for seed in $seeds; do
                folder=$out/$lang/$task/$seed
                mkdir -p "$folder"
                data train.jsonl "$task" train "$seed" 50
                data val.jsonl "$task" validation "$seed" 50
            done
        done
    done
    for lang in $langs; do
        folder=$out/$lang
        for name in xs wl; do
            make $name.safetensors train-adapter --data $name.train.jsonl --val $name.val.jsonl $related
        done
        each_seed alone
    done
    for lang in $langs; do each_seed merges; done
    for lang in $langs; do
        for task in $tasks; do
            folder=$out/$lang/$task test=test.jsonl
            predict zero-shot
            predict xs ../xs.safetensors
            predict wl ../wl.safetensors
        done
    done
    for lang in $langs; do each_seed outputs; done
    scores
}

each_seed() { # each_seed FUNCTION
    for task in $tasks; do
        for seed in $seeds; do
            folder=$out/$lang/$task/$seed test=../test.jsonl
            $1
        done
    done
}

alone() { make tgt.safetensors train-adapter $target --lr 6e-3 --seed "$seed"; }

merges() {
    for set in xs+wl xs+wl+tgt; do
        adapters="../../xs.safetensors ../../wl.safetensors"
        [ $set = xs+wl ] || adapters="$adapters tgt.safetensors"
        make lorahub.$set.safetensors merge $adapters --method lorahub --data train.jsonl \
            --dtype float32 -q
        make $set.safetensors merge $adapters $merging 0 --seed "$seed"
        make $set.pruned.safetensors merge $adapters $merging 0.1 --seed "$seed"
    done
    ablations
}

ablations() { # of XS+WL+TGT, Japanese; the eighth, input-parameter-zero, is xs+wl+tgt.pruned
    [ "$lang" = ja ] || return 0
    for value in zero init; do
        for importance in input gradient; do
            pruning="--importance $importance --prune-value $value --seed $seed"
            [ $importance-$value = input-zero ] ||
                make "$importance-parameter-$value.safetensors" merge $adapters $merging 0.1 $pruning
            make "$importance-module-$value.safetensors" merge $adapters $merging 0.1 \
                --unit module $pruning
        done
    done
}

outputs() {
    for adapter in tgt lorahub.xs+wl lorahub.xs+wl+tgt xs+wl xs+wl.pruned xs+wl+tgt xs+wl+tgt.pruned \
        $(ablated); do
        predict $adapter $adapter.safetensors
    done
}
ablated() {
    [ "$lang" = ja ] || return 0
    for value in zero init; do
        echo input-module-$value gradient-module-$value gradient-parameter-$value
    done
    echo input-parameter-init
}

system() { # system NAME: its files over the seeds, as score takes them
    files=""
    for seed in $seeds; do files="$files,$seed/$1.jsonl"; done
    echo "--system $1=${files#,}"
}
compare() { # compare TABLE BASELINE SYSTEM…: scores of systems with seeds, and of single files
    table=$1 baseline=$2 systems=""
    shift 2
    for name in "$@"; do
        case $name in *.jsonl) systems="$systems $name" ;; *) systems="$systems $(system $name)" ;; esac
    done
    echo "$out/$lang/$task lorakit score $systems --baseline $baseline --lang $lang" \
        "--metric rougeL,bleu,em --format json -q -o $table.scores.jsonl"
}
scores() {
    for lang in $langs; do
        for task in $tasks; do
            compare table2 tgt zero-shot.jsonl xs.jsonl wl.jsonl tgt lorahub.xs+wl lorahub.xs+wl+tgt \
                xs+wl xs+wl.pruned xs+wl+tgt xs+wl+tgt.pruned
            [ $lang != ja ] || compare table4 xs+wl+tgt xs+wl+tgt xs+wl+tgt.pruned $(ablated)
        done
    done
}

commands | python examples/forks.py
python examples/table.py "$out" --table 2
python examples/table.py "$out" --table 4
