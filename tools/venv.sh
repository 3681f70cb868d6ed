#!/bin/sh
# Create a virtual environment with PaddlePaddle and the requirements of this repository:
#
#   sh tools/venv.sh DIR PADDLE [REQUIREMENTS_FILE]
#   sh tools/venv.sh .venv paddlepaddle==3.3.1
#
# Uses the first of $PYTHON, python3, python3.12 ... python3.9 that is Python 3.9 to 3.12. An environment that is
# already complete is left unchanged.
set -eu
fail() {
    echo "venv.sh: error: $1" >&2
    exit 2
}
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0 ;;
esac
[ $# -ge 2 ] || fail "DIR and PADDLE are needed, e.g. sh tools/venv.sh .venv paddlepaddle==3.3.1 (see -h)"
cd "$(dirname "$0")/.."
dir=$1
paddle=$2
more=${3:-}

requirements=$(cat requirements.txt ${more:+"$more"} && echo "$paddle")
if [ -f "$dir/installed" ] && [ "$requirements" = "$(cat "$dir/installed")" ]; then
    exit 0
fi
if [ -e "$dir" ] && [ ! -f "$dir/pyvenv.cfg" ]; then
    fail "$dir exists and is not a virtual environment; choose another folder, or remove it"
fi

for python in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10 python3.9; do
    if "$python" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' 2>/dev/null; then
        found=$python
        break
    fi
done
[ -n "${found:-}" ] || fail "no Python 3.9 to 3.12 found; install one, or set PYTHON, e.g. PYTHON=/path/to/python3.11"

# PaddlePaddle 2.x crashes with NumPy 2, and its launcher needs setuptools
extra=
case $paddle in *==2.*) extra='numpy<2 setuptools' ;; esac

echo "making $dir: $("$found" --version), $paddle (downloads about 200 MB for the CPU)"
"$found" -m venv --clear "$dir" ||
    fail "$found cannot create virtual environments; on Debian and Ubuntu: apt install python3-venv"
# shellcheck disable=SC2086 # the extras are words
"$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$paddle" $extra -r requirements.txt \
    ${more:+-r "$more"} || fail "pip could not install $paddle and the requirements; see its message above"
echo "$requirements" > "$dir/installed"
