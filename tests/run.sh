#!/bin/sh
# Sets everything up and runs every check; arguments go to pytest (`sh tests/run.sh -m slow`).
cd "$(dirname "$0")/.."
LORAKIT_EXTRAS="[test]"
. tests/setup.sh
export HF_HUB_OFFLINE=1
# A process a core with one thread each: the tests are many and small.
export OMP_NUM_THREADS=1
ruff format --check .
ruff check .
mypy
pytest -n auto --dist worksteal "$@"
