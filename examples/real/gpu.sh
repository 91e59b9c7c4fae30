#!/bin/sh
# Both papers' experiments on one GPU, several commands at a time: paper1.sh, then paper2.sh.
#
#     sh examples/real/gpu.sh [--smoke] [FOLDER]    # work goes to FOLDER/paper1 and FOLDER/paper2
#
# $JOBS says how many commands share the GPU; see the two scripts for $DATA, $MODEL, $RESULTS and what to
# choose. --smoke tries every command with a few records on the shipped model, on a CPU, too.

set -eu
case ${1:-} in --smoke) smoke=--smoke; shift ;; *) smoke= ;; esac
folder=${1:-.}
export JOBS=${JOBS:-6}
here=$(dirname "$0")
sh "$here/paper1.sh" $smoke "$folder/paper1"
sh "$here/paper2.sh" $smoke "$folder/paper2"
