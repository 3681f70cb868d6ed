#!/bin/sh
# Make a virtual environment with PaddlePaddle and what this repository needs:
#
#   sh tools/venv.sh DIR PADDLE [REQUIREMENTS_FILE]
#   sh tools/venv.sh .venv paddlepaddle==3.3.1
#
# Takes the first of $PYTHON, python3, python3.12 ... python3.9 that is Python 3.9 to 3.12. Done once, it does nothing.
set -eu
cd "$(dirname "$0")/.."
dir=$1
paddle=$2
shift 2

requirements=$(cat requirements.txt "$@" && echo "$paddle")
if [ -f "$dir/installed" ] && [ "$requirements" = "$(cat "$dir/installed")" ]; then
    exit 0
fi

for python in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10 python3.9; do
    if "$python" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' 2>/dev/null; then
        found=$python
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "venv.sh: error: no Python 3.9 to 3.12 found; install one, or name it: PYTHON=/path/to/python3.11" >&2
    exit 2
fi

# PaddlePaddle 2.x crashes with NumPy 2, and its launcher needs setuptools
extra=
case $paddle in *==2.*) extra='numpy<2 setuptools' ;; esac

echo "making $dir: $("$found" --version), $paddle (a download of some 200 MB for the CPU)"
"$found" -m venv --clear "$dir" || {
    echo "venv.sh: error: $found cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 2
}
# shellcheck disable=SC2086 # the extras are words
"$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$paddle" $extra -r requirements.txt ${1:+-r "$1"}
echo "$requirements" > "$dir/installed"
