# What the scripts beside this one share: the folder of the work, the model, the settings of training,
# and functions that print commands for forks.py. Read with `.`, not run.

case ${1:-} in --smoke) smoke=1; shift ;; *) smoke= ;; esac
case ${1:-} in
    "") out=$PWD/${smoke:+smoke.}$(basename "$0" .sh) ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
data=${DATA:-$(dirname "$0")/../../../shared/data}
if ! raw=$(cd "$data" 2> /dev/null && pwd); then
    echo "Error: no folder $data; set \$DATA to the folder of the raw data sets" >&2
    exit 1
fi
cd "$(dirname "$0")/../.."
root=$PWD
LORAKIT_EXTRAS=${LORAKIT_EXTRAS:-[plot]}
. tests/setup.sh
mkdir -p "$out"
if [ "$smoke" ]; then
    export LORAKIT_MODEL=tiny
    seeds=0 few=4 many=6 tests=4 epochs=1 ratios="0 0.3" words=8 length=512 batch=4
elif [ "${MODEL:-}" ]; then
    export LORAKIT_MODEL=$MODEL
else
    [ -d "$out/../smollm2" ] || sh examples/smollm2.sh "$out/../smollm2"
    export LORAKIT_MODEL=$(cd "$out/../smollm2" && pwd)
fi
seeds=${SEEDS:-${seeds:-0 1 2}} few=${few:-50} many=${many:-100} tests=${tests:-150} epochs=${epochs:-3}
ratios=${ratios:-0 0.1 0.3 0.5 0.7} words=${words:-48} length=${length:-256} batch=${batch:-${BATCH:-50}}
dtype=${DTYPE:-auto}

# make OUTPUT COMMAND…: print a command to run in $folder, unless its output exists
make() {
    output=$1
    shift
    mkdir -p "$folder"
    [ -e "$folder/$output" ] || printf '%s\n' "$folder lorakit $* -o $output"
}
draw() { # draw OUTPUT SAMPLE SEED RECIPE SOURCE [OPTION…]: records of a data set
    output=$1 sample=$2 seed_of=$3
    shift 3
    make "$output" build-dataset "$@" --sample "$sample" --seed "$seed_of" -q
}
predict() { # predict NAME DATA [ADAPTER]
    make "$1" generate ${3:+"$3"} --data "$2" --max-new-tokens "$words" --max-length "$length" \
        --truncate --batch-size "$batch" --dtype "$dtype" -q
}
run() { # the printed commands, from stdin; with $KEEP_GOING, what fails is told and left out
    python examples/forks.py --jobs "${JOBS:-1}" ${KEEP_GOING:+--keep-going --verbose} ||
        [ "${KEEP_GOING:-}" ]
}
publish() { # publish TARGET: copy its scores and figures to $RESULTS, if that is set
    [ ! "${RESULTS:-}" ] || for file in "$out/$1"/*.scores.jsonl "$out/$1"/*.svg; do
        [ ! -e "$file" ] || cp "$file" "$RESULTS/$(basename "$0" .sh).$1.$(basename "$file")"
    done
}
