#!/bin/sh
# The boundary-layer paper's experiments on real data and a real model: SmolLM2-135M-Instruct, or $MODEL.
# Tasks: DialogSum, yes/no (does a summary belong to its dialogue), SciTLDR, GSM8K, HotpotQA; adapters of
# three epochs on 150 examples, the last epoch kept as in the paper, at rank 8 (and 32, and the best epoch,
# to compare); the boundary searched for on 30 validation records by the task's metric, by loss and by
# probability; 100 test records. The main comparison is repeated for the other $SEEDS (of examples,
# initialisation and order; HotpotQA, a subset in one file, keeps its examples).
#
#     sh examples/real/paper2.sh [--smoke] [FOLDER]    # work goes to FOLDER, by default ./paper2
#
# Raw data: $DATA/dialogsum, scitldr, gsm8k, hotpotqa. A command whose output exists is skipped, so that a
# stopped run goes on where it was. $TASKS and $PARTS choose less; --smoke tries every command with a few
# records on the shipped model, for yes/no and HotpotQA unless $TASKS says more. What it prints, by
# tables.py, is in examples/README.md; scores and figures are copied to the folder $RESULTS, if that is set.

set -eu
. "$(dirname "$0")/steps.sh"
tasks=${TASKS:-dialogsum yesno scitldr gsm8k hotpotqa}
parts=${PARTS:-tuned best rank32 seeds other_domains}
[ ! "$smoke" ] || tasks=${TASKS:-yesno hotpotqa} seeds=${SEEDS:-0 1}
first_seed=${seeds%% *} other_seeds=${seeds#"${seeds%% *}"} # of which the others are for part seeds
layers=${LAYERS:-30} # of the model
examples=150 sweep=30 answers=100
[ ! "$smoke" ] || { layers=8 examples=6 sweep=4 answers=4; }
bottom=0-$((layers * 2 / 3 - 1))

metric_of() {
    case $1 in
        yesno) echo accuracy ;; gsm8k) echo gsm8k ;; hotpotqa) echo contains ;; *) echo rougeL ;;
    esac
}
words_of() { # words_of TASK: the longest output
    case $1 in yesno) echo 4 ;; gsm8k) echo 160 ;; hotpotqa) echo 16 ;; *) echo "$words" ;; esac
}
question="Dialogue: {{dialogue}}\nSummary: {{summary}}\nDoes the summary belong to the dialogue, Yes or No?"
yesno="--template '$question\nAnswer:' --completion ' {{label}}' --document dialogue"
raw_of() { # raw_of TASK train|test: the recipe and its raw file
    case $1.$2 in
        dialogsum.train) echo "dialogsum $raw/dialogsum/dialogsum.dev.jsonl" ;;
        dialogsum.test) echo "dialogsum $raw/dialogsum/dialogsum.test.jsonl" ;;
        yesno.*) printf '%s\n' "jsonl $out/yesno/$2.rows.jsonl $yesno" ;;
        scitldr.*) echo "scitldr $raw/scitldr --split $2" ;;
        gsm8k.*) echo "gsm8k $raw/gsm8k/$2.jsonl" ;;
        hotpotqa.*) echo "hotpotqa $raw"/hotpotqa/hotpot*.json ;; # a subset, in one file
    esac
}
at() { # at TASK [SEED]; `room` is the longest sequence in tokens
    task=$1 seed=${2:-$first_seed} folder=$out/$1${2:+/seed$2} metric=$(metric_of "$1") longest=$(words_of "$1")
    room=$((length > 2 * longest ? length : 512))
}
each() { for task in $tasks; do at "$task"; "$@"; done; }
each_other_seed() { # each_other_seed COMMAND…, if that part is run
    case " $parts " in *" seeds "*) ;; *) return 0 ;; esac
    for task in $tasks; do
        for seed in $other_seeds; do at "$task" "$seed"; "$@"; done
    done
}
lines() { # lines FILE FIRST LAST OUTPUT: some records of a file
    if [ -e "$folder/$1" ] && [ ! -e "$folder/$4" ]; then
        sed -n "$2,$3p" "$folder/$1" > "$folder/$4.part"
        if [ -s "$folder/$4.part" ]; then mv "$folder/$4.part" "$folder/$4"; else rm "$folder/$4.part"; fi
    fi
}
records() { # train, val and test do not overlap; HotpotQA's subset is one file
    each questions
    { each drawn; each_other_seed drawn_anew; } | run
    each divided
    each_other_seed divided_anew
}
questions() {
    mkdir -p "$folder"
    [ "$task" = yesno ] || return 0
    for split in dev test; do
        [ $split = dev ] && rows=train.rows.jsonl || rows=test.rows.jsonl
        [ -e "$folder/$rows" ] ||
            python examples/real/yesno.py "$raw/dialogsum/dialogsum.$split.jsonl" > "$folder/$rows"
    done
}
drawn() {
    if [ "$task" = hotpotqa ]; then
        draw all.jsonl $((examples + sweep + answers)) "$seed" $(raw_of "$task" train)
    else
        drawn_anew
        draw test.jsonl "$answers" 0 $(raw_of "$task" test)
    fi
}
drawn_anew() { # for another seed, which has the first's test records
    [ "$task" = hotpotqa ] || draw all.jsonl $((examples + sweep)) "$seed" $(raw_of "$task" train)
}
divided_anew() {
    mkdir -p "$folder"
    ln -sf ../test.jsonl "$folder/test.jsonl"
    if [ "$task" = hotpotqa ]; then ln -sf ../train.jsonl ../val.jsonl "$folder"; else fitted; fi
}
fitted() { # the records to train and to validate on
    lines all.jsonl 1 "$examples" train.jsonl
    lines all.jsonl $((examples + 1)) $((examples + sweep)) val.jsonl
}
divided() {
    fitted
    [ "$task" != hotpotqa ] ||
        lines all.jsonl $((examples + sweep + 1)) $((examples + sweep + answers)) test.jsonl
}
train() { # train NAME [OPTION…]
    name=$1
    shift
    make "$name.safetensors" train-adapter --data train.jsonl --val val.jsonl --lr 1e-3 --epochs "$epochs" \
        --max-length "$room" --truncate --dtype "$dtype" --seed "$seed" --resume -q "$@"
}
search() { # search NAME BY ADAPTER [OPTION…]: the records of find-boundary, NAME.BY.jsonl
    name=$1 by=$2 adapter=$3
    shift 3
    make "$name.$by.jsonl" find-boundary "$adapter.safetensors" --data val.jsonl \
        --max-length "$room" --truncate --dtype "$dtype" -q "$@"
}
answers() { # answers NAME…: outputs for the test records
    for name in "$@"; do
        make "$name.jsonl" generate "$name.safetensors" --data test.jsonl --max-new-tokens "$longest" \
            --max-length "$room" --truncate --batch-size "$batch" --dtype "$dtype" -q
    done
}
sweeps() { # sweeps NAME: by the task's metric with standard errors, and by loss
    search "$1" metric "$1" --metric "$metric" --max-new-tokens "$longest" --batch-size "$batch" \
        --rule 1se --plot "$1.metric.svg"
    search "$1" loss "$1" --metric loss --plot "$1.loss.svg"
}
boundary_of() { # boundary_of FILE best|1se
    python examples/real/boundary_of.py "$folder/$1" --rule "$2"
}
cuts() { # every adapter that was searched for, at its boundaries, and its neighbours
    for name in tuned tuned-best rank32; do cut_at_boundaries "$name"; done
    [ ! -e "$folder/tuned.metric.jsonl" ] || neighbours
}
cut_at_boundaries() { # at the best boundary by metric, at that of the rule 1se, and at the best by loss
    [ -e "$folder/$1.metric.jsonl" ] || return 0
    make "$1.ours.safetensors" strip-layers "$1.safetensors" -q \
        --boundary "$(boundary_of "$1.metric.jsonl" best)"
    make "$1.ours-1se.safetensors" strip-layers "$1.safetensors" --boundary "$1.metric.jsonl" -q
    make "$1.ours-loss.safetensors" strip-layers "$1.safetensors" --boundary "$1.loss.jsonl" -q
    answers "$1.ours" "$1.ours-1se" "$1.ours-loss"
}
neighbours() { # as many layers as the rule 1se keeps, by LoRA-drop's output and by importance
    kept=$(boundary_of tuned.metric.jsonl 1se)
    for by in output importance; do
        make tuned.$by.safetensors strip-layers tuned.safetensors --by $by \
            --share "$(python -c "print(round($kept / $layers, 4))")" --data val.jsonl \
            --max-length "$room" --truncate --dtype "$dtype" -q
    done
    answers tuned.output tuned.importance
}

compared() { # rank 8, the last epoch, all layers or the bottom ones: Table 1
    variant tuned --keep last
    train partial --keep last --layers "$bottom"
    answers partial
}
tuned() { # the same, Figures 1, 2, 4 and 5, bottom against top against random
    compared
    make zero-shot.jsonl generate --data test.jsonl --max-new-tokens "$longest" --truncate \
        --max-length "$room" --batch-size "$batch" --dtype "$dtype" -q
    search tuned probability tuned --by probability --plot tuned.probability.svg \
        --compare $((layers / 3)),$((layers * 2 / 3)),$((layers * 5 / 6))
    for keep in top random; do search tuned.$keep loss tuned --metric loss --keep $keep; done
    search tuned factors tuned --metric loss --factors 0,0.25,0.5,0.75 \
        --boundaries $((layers / 3)),$((layers / 2)),$((layers * 2 / 3)),$((layers * 5 / 6))
}
variant() { # variant NAME [OPTION…]: an adapter, its searches and its answers
    train "$@"
    sweeps "$1"
    answers "$1"
}
best() { variant tuned-best; } # the best epoch, as lorakit keeps by default
rank32() { variant rank32 --keep last --rank 32 --alpha 64; } # Table 6
other_domains() { # Table 7: each adapter and its cut on the other tasks' records
    for other in $tasks; do
        [ "$other" = "$task" ] || for name in tuned tuned.ours; do
            make "$other.$name.jsonl" generate "$out/$other/$name.safetensors" --data test.jsonl \
                --max-new-tokens "$longest" --max-length 512 --truncate --batch-size "$batch" \
                --dtype "$dtype" -q
        done
    done
}

[ ! -e "$out/seed" ] || [ "$(cat "$out/seed")" = "$first_seed" ] || {
    echo "Error: $out was begun with seed $(cat "$out/seed") first; take another folder" >&2
    exit 1
}
echo "$first_seed" > "$out/seed"
records
{ for part in $parts; do case $part in seeds | other_domains) ;; *) each "$part" ;; esac; done
  each_other_seed compared; } | run
{ each cuts
  each_other_seed cut_at_boundaries tuned
  case " $parts " in *" other_domains "*) each other_domains ;; esac; } | run

score() { # score TABLE NAME…: the scores of the outputs that exist, all compared with the first
    table=$1 files="" first=""
    shift
    for name in "$@"; do
        [ ! -e "$folder/$name.jsonl" ] || { files="$files $name.jsonl"; first=${first:-$name.jsonl}; }
    done
    [ "$files" = " $first" ] || [ ! "$files" ] || (cd "$folder" && lorakit score $files \
        --baseline "$first" --metric "$metrics" --format json -q -o "$table.scores.jsonl")
}
over_seeds() { # over_seeds NAME…: Table 1 with the outputs of all seeds, as far as they are there
    systems="" baseline=$1
    for name in "$@"; do
        files=$name.jsonl
        for other in $other_seeds; do files=$files,seed$other/$name.jsonl; done
        for file in $(echo "$files" | tr , ' '); do
            [ -e "$folder/$file" ] || continue 2
        done
        systems="$systems --system $name=$files"
    done
    [ ! "$other_seeds" ] || case $systems in
        *" $baseline="*" --system "*)
            (cd "$folder" && lorakit score $(ls zero-shot.jsonl 2> /dev/null) $systems \
                --baseline "$baseline" --metric "$metrics" --format json -q -o seeds.scores.jsonl) ;;
    esac
}
scores() {
    case $task in
        hotpotqa) metrics=contains,em,f1 ;; yesno) metrics=accuracy,words-beyond-label ;;
        *) metrics=$metric,length ;;
    esac
    score table1 tuned zero-shot partial tuned.ours tuned.ours-1se tuned.ours-loss tuned.output \
        tuned.importance
    over_seeds tuned partial tuned.ours tuned.ours-1se tuned.ours-loss
    score best tuned-best tuned-best.ours tuned-best.ours-1se tuned-best.ours-loss
    score table6 rank32 rank32.ours rank32.ours-1se rank32.ours-loss
    for other in $tasks; do score "table7.$other" "$other.tuned" "$other.tuned.ours"; done
    if [ "$task" = hotpotqa ]; then # Table 3: outputs that hold the uncut adapter's output
        metrics=contains-baseline,contains-baseline-worse score table3 tuned tuned.ours
    fi
}
each scores
python examples/real/tables.py paper2 "$out"
each eval 'publish "$task"'
