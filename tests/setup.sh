# Sourced by tests/run.sh and by the scripts in examples/: makes `.venv` with lorakit in it.
# Versions are those of tests/constraints.txt, the ones lorakit was tested with. Nothing is done
# where it was done before. $LORAKIT_EXTRAS names extras, e.g. "[test]". An environment that has
# lorakit already (a GPU machine's, say) is used by setting LORAKIT_ENV to its folder, as it is.
# Expects the repository's root as the working directory.

set -eu
extras=${LORAKIT_EXTRAS:-}
env=${LORAKIT_ENV:-.venv}
python=${PYTHON:-python3}
if [ -z "${LORAKIT_ENV:-}" ]; then
    stamp=$(cat pyproject.toml tests/constraints.txt | cksum | tr -d ' ')
    mark=.venv/installed-$stamp
    if [ ! -e "$mark" ] || ! grep -qxF "extras:$extras" "$mark"; then
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        install="$env/bin/python -m pip install --quiet --disable-pip-version-check"
        # torch first and by its exact version, so that what else is installed cannot choose another
        $install -c tests/constraints.txt "$(grep '^torch==' tests/constraints.txt)"
        $install -c tests/constraints.txt -e ".$extras"
        echo "extras:$extras" >> "$mark"
    fi
fi
PATH=$(cd "$env/bin" && pwd):$PATH
export PATH
# The cores are shared by the threads of one process; tokenizers' own threads would only fight it.
export TOKENIZERS_PARALLELISM=false
# Threads that wait sleep: where others use the machine too, spinning costs several times the work.
export OMP_WAIT_POLICY=PASSIVE
