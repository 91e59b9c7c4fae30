#!/bin/sh
# Both papers' experiments on one GPU, side by side, several commands at a time.
#
#     sh examples/real/gpu.sh [--smoke] [FOLDER]    # work goes to FOLDER/paper1 and FOLDER/paper2
#
# Their tables are printed in the end, and stay in paper1.md and paper2.md beside the work. $JOBS says how
# many commands share the GPU, of which paper 1, the longer, gets five in eight; see the two scripts for
# $DATA, $MODEL, $RESULTS and what to choose. Each command's seconds go to stderr; what needs a command that
# failed is left out, and made when the script is run again. Small commands share a GPU best under NVIDIA's
# multi-process service (`nvidia-cuda-mps-control -d` before, `echo quit | nvidia-cuda-mps-control` after).
# --smoke tries every command with a few records on the shipped model, on a CPU, too: in a minute or two.

set -eu
case ${1:-} in --smoke) smoke=--smoke; shift ;; *) smoke= ;; esac
folder=${1:-.}
jobs=${JOBS:-12} of_first=$(((5 * ${JOBS:-12} + 4) / 8))
export BATCH=${BATCH:-256} KEEP_GOING=1
here=$(dirname "$0")
mkdir -p "$folder"
JOBS=$of_first sh "$here/paper1.sh" $smoke "$folder/paper1" > "$folder/paper1.md" &
first=$!
JOBS=$((jobs > of_first ? jobs - of_first : 1)) sh "$here/paper2.sh" $smoke "$folder/paper2" > "$folder/paper2.md" &
second=$!
wait $first && failed= || failed=paper1.sh
wait $second || failed="$failed${failed:+ and }paper2.sh"
cat "$folder/paper1.md" "$folder/paper2.md"
[ ! "$failed" ] || { echo "Error: $failed failed; run this again to go on" >&2; exit 1; }
