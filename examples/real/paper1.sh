#!/bin/sh
# The adaptive-merge paper's experiments on real data and a real model: SmolLM2-135M-Instruct, or $MODEL.
# Targets: SciTLDR (abstracts in one sentence) and DialogSum (summaries of dialogues), 50 training and 50
# validation examples, 150 test records, three seeds. Related adapters, of 100 examples each: XS is the
# other set, WL titles from abstracts, FAR word problems (GSM8K).
#
#     sh examples/real/paper1.sh [--smoke] [FOLDER]    # work goes to FOLDER, by default ./paper1
#
# Raw data: $DATA/scitldr, $DATA/dialogsum, $DATA/gsm8k. A command whose output exists is skipped, so that
# a stopped run goes on where it was. $TARGETS, $SEEDS and $PARTS choose less; --smoke tries every command
# with a few records on the shipped model, for SciTLDR unless $TARGETS says more. What it prints, by
# tables.py, is in examples/README.md; scores and figures are copied to the folder $RESULTS, if that is set.

set -eu
. "$(dirname "$0")/steps.sh"
targets=${TARGETS:-scitldr dialogsum}
parts=${PARTS:-core search baselines pruned far ablation sizes}
sizes=${SIZES:-10 200}
[ ! "$smoke" ] || targets=${TARGETS:-scitldr} sizes=2
fit="--lr 1e-3 --max-length $length --truncate --dtype $dtype --resume -q"
titles="--template 'Write the title of the paper with this abstract.\nAbstract: {{article}}\nTitle:'"
titles="$titles --completion ' {{title}}'"

wanted() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac; }
raw_of() { # raw_of SET SPLIT: the recipe and its raw file
    case $1.$2 in
        dialogsum.test) echo "dialogsum $raw/dialogsum/dialogsum.test.jsonl" ;;
        dialogsum.*) echo "dialogsum $raw/dialogsum/dialogsum.dev.jsonl" ;; # no training split there
        scitldr.*) echo "scitldr $raw/scitldr --split $2" ;;
        titles.*) printf '%s\n' "scitldr $raw/scitldr --split $2 $titles" ;;
        gsm8k.validation) echo "gsm8k $raw/gsm8k/test.jsonl" ;; # likewise
        gsm8k.*) echo "gsm8k $raw/gsm8k/$2.jsonl" ;;
    esac
}
pair() { # pair SET TRAIN VALIDATION SEED: draw records for both, which do not overlap
    if [ "$1" = dialogsum ]; then
        draw both.jsonl $(($2 + $3)) "$4" $(raw_of "$1" train)
    else
        draw train.jsonl "$2" "$4" $(raw_of "$1" train)
        draw val.jsonl "$3" "$4" $(raw_of "$1" validation)
    fi
}
split() { # split TRAIN VALIDATION: a draw of both
    if [ -e "$folder/both.jsonl" ] && [ ! -e "$folder/val.jsonl" ]; then
        head -n "$1" "$folder/both.jsonl" > "$folder/train.jsonl"
        tail -n "$2" "$folder/both.jsonl" > "$folder/val.jsonl"
    fi
}
train() { # train NAME [OPTION…], on $folder's records
    name=$1
    shift
    make "$name.safetensors" train-adapter --data train.jsonl --val val.jsonl $fit "$@"
}
combine() { # combine NAME SET OPTION…: a merge of a set of adapters on $folder's records
    name=$1 adapters=$(adapters_of "$2")
    shift 2
    make "$name.safetensors" merge $adapters --data train.jsonl --val val.jsonl $fit --seed "$seed" "$@"
}
at() { # at TARGET [SEED]: choose the folder
    target=$1 seed=${2:-}
    folder=$out/$target${seed:+/$seed}
    case $target in scitldr) other=dialogsum ;; *) other=scitldr ;; esac
    xs=$out/related/$other/adapter.safetensors wl=$out/related/titles/adapter.safetensors
    far=$out/related/gsm8k/adapter.safetensors
}
adapters_of() {
    case $1 in
        xs+wl) echo "$xs $wl" ;;
        xs+wl+tgt) echo "$xs $wl tgt.safetensors" ;;
        xs+wl+far+tgt) echo "$xs $wl $far tgt.safetensors" ;;
    esac
}
outputs() { for name in "$@"; do predict "$name.jsonl" ../test.jsonl "$name.safetensors"; done; }
each_target() { for target in $targets; do at "$target"; "$@"; done; }
each_seed() { # each_seed COMMAND…, in the folder of every target and seed
    for target in $targets; do
        for seed in $seeds; do at "$target" "$seed"; "$@"; done
    done
}
each_related() { # each_related COMMAND…, in the folder of every related task
    for task in dialogsum scitldr titles gsm8k; do
        [ "$targets" != "$task" ] || continue
        folder=$out/related/$task
        "$@"
    done
}

records() {
    { each_related eval 'pair $task "$many" "$few" 0'
      each_target eval 'draw test.jsonl "$tests" 0 $(raw_of "$target" test)'
      each_seed eval 'pair "$target" "$few" "$few" "$seed"'
      each_size eval 'pair "$target" "$size" "$few" "$seed"'; } | run
    each_related split "$many" "$few"
    each_seed split "$few" "$few"
    each_size eval 'split "$size" "$few"'
}
related() { # related TASK [OPTION…]
    folder=$out/related/$1
    shift
    train adapter --epochs "$epochs" "$@"
}
core() { # Table 2 without its baselines, the ratio of XS+WL+TGT chosen per seed on validation
    case $targets in *scitldr*) related dialogsum ;; esac
    case $targets in *dialogsum*) related scitldr ;; esac
    related titles
    each_target single
    each_seed trained
}
single() { # what has no seed
    predict zero-shot.jsonl test.jsonl
    predict xs.jsonl test.jsonl "$xs"
    predict wl.jsonl test.jsonl "$wl"
}
trained() {
    train tgt --epochs "$epochs" --seed "$seed"
    merged xs+wl+tgt
    train tgt.budget --epochs $((5 * epochs)) --rank 24 --alpha 48 --seed "$seed"
    combine xs+wl.0 xs+wl --epochs "$epochs" --prune-ratio 0
    outputs tgt tgt.budget xs+wl.0
}
merged() { # merged SET: at every ratio, and the validation outputs that choose among them
    for ratio in $ratios; do
        combine "$1.$ratio" "$1" --epochs "$epochs" --prune-ratio "$ratio"
        predict "$1.$ratio.val.jsonl" val.jsonl "$1.$ratio.safetensors"
    done
}
choose() { # choose SET: the ratio, if its outputs are there
    [ -e "$folder/$1.chosen" ] || [ ! -e "$folder/$1.${ratios##* }.val.jsonl" ] ||
        (cd "$folder" && python "$root/examples/real/choose.py" "$1" $ratios)
}
chosen_outputs() { # chosen_outputs SET: without pruning and at the chosen ratio
    [ -e "$folder/$1.chosen" ] || return 0
    read -r ratio < "$folder/$1.chosen"
    outputs "$1.0"
    [ "$ratio" = 0 ] || outputs "$1.$ratio"
    ln -sf "$1.$ratio.jsonl" "$folder/$1.chosen.jsonl"
}
pruned() { each_seed merged xs+wl; }
search() { each_seed automatic; }
automatic() {
    combine xs+wl+tgt.auto xs+wl+tgt --epochs "$epochs" --prune-ratio auto --metric rougeL \
        --max-new-tokens "$words" --plot auto.svg
    outputs xs+wl+tgt.auto
}
baselines() { each_seed by_weights; }
by_weights() {
    combine learned xs+wl+tgt --epochs "$epochs" --method learned-weights --lr 0.03 # as merge has it
    for set in xs+wl xs+wl+tgt; do
        make lorahub.$set.safetensors merge $(adapters_of $set) --data train.jsonl --method lorahub \
            --max-length "$length" --truncate --dtype "$dtype" -q
    done
    outputs learned lorahub.xs+wl lorahub.xs+wl+tgt
}
far() { # word problems have little to do with either target
    related gsm8k --max-length 512 # its answers are long
    each_target predict far.jsonl test.jsonl "$out/related/gsm8k/adapter.safetensors"
    each_seed with_far
}
with_far() {
    combine xs+wl+far+tgt.0 xs+wl+far+tgt --epochs "$epochs" --prune-ratio 0
    outputs xs+wl+far+tgt.0
}
ablation() { each_seed ablated; }
ablated() { # Table 4, at equal dose: three tenths of the parameters at every step
    for how in "gradient parameter zero matrix" "magnitude parameter zero matrix" \
        "input parameter init matrix" "input parameter reinit matrix" "input module zero all" \
        "input module init all" "input parameter zero row" "input parameter zero all"; do
        set -- $how
        combine "$1-$2-$3-$4" xs+wl+tgt --epochs "$epochs" --prune-ratio 0.3 --importance "$1" \
            --unit "$2" --prune-value "$3" --group "$4"
        outputs "$1-$2-$3-$4"
    done
    outputs xs+wl+tgt.0.3
}
sizes() { # Figure 6: fewer and more examples, the related adapters and settings as they are
    each_size small
}
each_size() { # each_size COMMAND…, in the folder of every target, seed and size, if that part is run
    wanted sizes || return 0
    for size in $sizes; do each_seed of_size "$@"; done
}
of_size() {
    folder=$folder.size$size
    "$@"
}
small() {
    train tgt --epochs "$epochs" --seed "$seed"
    combine xs+wl+tgt.0 xs+wl+tgt --epochs "$epochs" --prune-ratio 0
    outputs tgt xs+wl+tgt.0
}

records
# The search is the longest command, which others keep company if it starts as soon as it can.
for part in search core baselines pruned far ablation sizes; do ! wanted $part || $part; done | run
for set in xs+wl xs+wl+tgt; do each_seed choose $set; done
for set in xs+wl xs+wl+tgt; do each_seed chosen_outputs $set; done | run

system() { # system NAME [SUFFIX]: its outputs over the seeds, as score takes them; nothing if one is missing
    files=""
    for seed in $seeds; do
        [ -e "$out/$target/$seed${2:-}/$1.jsonl" ] || return 0
        files="$files,$seed${2:-}/$1.jsonl"
    done
    echo "--system $1=${files#,}"
}
compare() { # compare TABLE BASELINE SYSTEM…: scores of systems with seeds, and of single files
    table=$1 baseline=$2 systems=""
    shift 2
    [ "$(system "$baseline")" ] || return 0
    for name in "$@"; do
        case $name in
            *.jsonl) [ ! -e "$out/$target/$name" ] || systems="$systems $name" ;;
            *) one=$(system "$name") && systems="$systems${one:+ $one}" ;;
        esac
    done
    [ "$systems" != " $(system "$baseline")" ] || return 0 # nothing to compare it with
    (cd "$out/$target" && lorakit score $systems --baseline "$baseline" --metric rougeL,length \
        --format json -q -o "$table.scores.jsonl")
}
scores() {
    compare table2 tgt zero-shot.jsonl xs.jsonl wl.jsonl far.jsonl tgt tgt.budget lorahub.xs+wl \
        lorahub.xs+wl+tgt learned xs+wl.0 xs+wl.chosen xs+wl+tgt.0 xs+wl+tgt.chosen xs+wl+tgt.auto \
        xs+wl+far+tgt.0
    compare pruning xs+wl+tgt.0 xs+wl+tgt.0 xs+wl+tgt.chosen xs+wl+tgt.auto tgt.budget
    compare table4 xs+wl+tgt.0 xs+wl+tgt.0 xs+wl+tgt.0.3 gradient-parameter-zero-matrix \
        magnitude-parameter-zero-matrix input-parameter-init-matrix input-parameter-reinit-matrix \
        input-module-zero-all input-module-init-all input-parameter-zero-row input-parameter-zero-all
    for size in $sizes; do
        both="$(system tgt .size$size) $(system xs+wl+tgt.0 .size$size)"
        [ "$both" = " " ] || (cd "$out/$target" && lorakit score $both --baseline tgt --metric rougeL \
            --format json -q -o "size$size.scores.jsonl")
    done
}
figures() { # 4: the search over seeds; 5: importance by module, first seed; 6 is drawn by tables.py
    curves=""
    for seed in $seeds; do
        data=$out/$target/$seed/auto.svg.jsonl
        [ ! -e "$data" ] || curves="$curves seed-$seed=$data"
    done
    [ ! "$curves" ] || python examples/overlay.py --metric rougeL \
        "$out/$target/figure4.svg" $curves
    at "$target" "${seeds%% *}"
    [ ! -e "$folder/xs+wl+tgt.0.safetensors" ] || (cd "$folder" && lorakit inspect xs+wl+tgt.0.safetensors \
        --importance --data val.jsonl --max-length "$length" --truncate --plot ../figure5.svg -q \
        -o importance.jsonl)
}
each_target scores
each_target figures
python examples/real/tables.py paper1 "$out"
each_target eval 'publish "$target"'
