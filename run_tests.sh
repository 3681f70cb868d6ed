#!/bin/sh
# Create the test environment and run the tests on all cores; about eight minutes on two:
#
#   sh run_tests.sh [pytest arguments]
#   PADDLE=paddlepaddle==2.6.2 sh run_tests.sh
#   sh run_tests.sh --long          # more random faults and mutations
set -eu
cd "$(dirname "$0")"
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run_tests.sh
    exit 0 ;;
esac
PADDLE=${PADDLE:-paddlepaddle==3.3.1}
venv=.venv-test-$(echo "$PADDLE" | tr -d '=')
sh tools/venv.sh "$venv" "$PADDLE" tests/requirements.txt
exec "$venv/bin/python" -m pytest -n logical --maxprocesses 8 --dist loadfile --durations 10 "$@"
