#!/bin/sh
# Make the test environment and run the tests, some minutes on two cores:
#
#   sh run_tests.sh [pytest's arguments]
#   PADDLE=paddlepaddle==2.6.2 sh run_tests.sh
set -eu
cd "$(dirname "$0")"
PADDLE=${PADDLE:-paddlepaddle==3.3.1}
sh tools/venv.sh ".venv-test-${PADDLE##*=}" "$PADDLE" tests/requirements.txt
exec ".venv-test-${PADDLE##*=}/bin/python" -m pytest "$@"
