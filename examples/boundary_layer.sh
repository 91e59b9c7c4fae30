#!/bin/sh
# The boundary-layer paper's experiments on the microworld, with tiny (8 layers): questions, counting,
# summaries, translation and yes/no answers. Table 1: an adapter of all layers (fine-tuned), the same
# adapter cut at the boundary that 50 validation records choose (ours), and one trained on the bottom
# five layers only (partial, as the paper's 20 of 32). Table 6: ranks. Table 7: the boundary found on
# questions, kept for other tasks' records. Figures 4 and 1: scores and probabilities by layer.
#
#     sh examples/boundary_layer.sh [FOLDER]    # work goes to FOLDER, by default ./boundary
#
# A command whose output exists is skipped, so that a stopped run can go on. $TASKS, $RANKS
# and $TRAIN (records to train on) choose less. `contains` is the paper's EM. What it printed is in
# examples/README.md.

set -eu
case ${1:-} in
    "") out=$(cd "$(dirname "$0")/.." && pwd)/boundary ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
root=$PWD
. tests/setup.sh
export OMP_NUM_THREADS=1 LORAKIT_MODEL=tiny
tasks=${TASKS:-qa count summary translate yesno} ranks=${RANKS:-4 16} train=${TRAIN:-300}
fit="--lr 6e-3 --batch-size 4 --epochs 6 --patience 2 --dtype float32"
training="--data train.jsonl --val val.jsonl $fit --resume -q"

metric_of() {
    case $1 in
        qa) echo contains ;; count) echo gsm8k ;; yesno) echo accuracy ;; summary) echo rougeL ;;
        translate) echo bleu ;;
    esac
}
lang_of() { [ "$1" = translate ] && echo ja || echo en; } # of the outputs
make() { # make OUTPUT COMMAND…: print a command to run in $folder, unless its output exists
    output=$1
    shift
    [ -e "$folder/$output" ] || echo "$folder lorakit $* -o $output"
}
data() { # data SPLIT COUNT
    make "$1.jsonl" build-dataset microworld "$task" --split "$1" --sample "$2" -q
}
predict() { # predict NAME DATA
    make "$1.jsonl" generate "${3:-$1}.safetensors" --data "$2" --max-new-tokens 48 --batch-size 50 -q
}
each() { # each FUNCTION, for every task, in its folder
    for task in $tasks; do
        folder=$out/$task
        $1
    done
}
records() {
    mkdir -p "$folder"
    data train "$train"
    data validation 50
    data test 60
}
adapters() {
    ln -sf validation.jsonl "$folder/val.jsonl"
    make tuned.safetensors train-adapter $training
    make partial.safetensors train-adapter $training --layers 0-4
    [ "$task" != qa ] || for rank in $ranks; do
        make rank$rank.safetensors train-adapter $training --rank "$rank" --alpha $((2 * rank))
    done
}
boundaries() {
    for name in tuned $(ranked); do
        make $name.boundary.jsonl find-boundary $name.safetensors --data val.jsonl --batch-size 50 \
            --metric "$(metric_of "$task")" --lang "$(lang_of "$task")" --max-new-tokens 48 -q
    done
    make tuned.probability.jsonl find-boundary tuned.safetensors --data val.jsonl --by probability -q
    predict tuned test.jsonl
    predict partial test.jsonl
    for name in $(ranked); do predict $name test.jsonl; done
}
ranked() { [ "$task" != qa ] || for rank in $ranks; do echo rank$rank; done; }
stripped() {
    for name in tuned $(ranked); do
        make $name.ours.safetensors strip-layers $name.safetensors --boundary $name.boundary.jsonl -q
    done
}
outputs() {
    for name in tuned $(ranked); do predict $name.ours test.jsonl; done
    [ "$task" = qa ] || [ ! -d "$out/qa" ] || for name in tuned tuned.ours; do
        make qa.$name.jsonl generate "$out/qa/$name.safetensors" --data test.jsonl \
            --max-new-tokens 48 --batch-size 50 -q
    done
}

{
    each records
    each adapters
    each boundaries
    each stripped
    each outputs
} | python examples/forks.py

score() { # score TABLE METRICS FILE…: a line of scores for each file, with its table and task
    table=$1 metrics=$2
    shift 2
    lorakit score "$@" --metric "$metrics" --lang "$(lang_of "$task")" --format json -q |
        sed "s/^{/{\"table\": $table, \"task\": \"$task\", /"
}
for task in $tasks; do
    cd "$out/$task"
    metrics=$(metric_of "$task")
    [ "$task" != qa ] || metrics=contains,f1
    score 1 "$metrics" tuned.jsonl partial.jsonl tuned.ours.jsonl
    if [ "$task" = qa ]; then
        for rank in $ranks; do score 6 "$metrics" rank$rank.jsonl rank$rank.ours.jsonl; done
        score 3 contains-baseline,contains-baseline-worse tuned.ours.jsonl --baseline tuned.jsonl
    elif [ -d "$out/qa" ]; then
        score 7 "$metrics" qa.tuned.jsonl qa.tuned.ours.jsonl
    fi
done > "$out/scores.jsonl"
cd "$root"
python examples/boundary_table.py "$out"
