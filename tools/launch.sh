#!/bin/sh
# Start main_multi_gpu.py under Paddle's launcher; what run_train_multi.sh and run_eval_multi.sh have in common.
#
#   sh tools/launch.sh OUTPUT [flags of main_multi_gpu.py]
#
# Reads the variables GPUS, NNODES, MASTER, RANK and PYTHON, which those explain; the launcher logs to OUTPUT/launch-RANK.
set -eu
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' tools/launch.sh
    exit 0 ;;
esac
output=$1
shift
if [ "${NNODES:-1}" != 1 ] && [ "${MASTER:+x}${RANK:+x}" != xx ]; then
    echo "launch.sh: error: NNODES is $NNODES: set MASTER (the first machine's address:port) and RANK (from 0) too" >&2
    exit 2
fi
# an empty list of devices stops the launcher
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] || unset CUDA_VISIBLE_DEVICES
exec "${PYTHON:-python}" -m paddle.distributed.launch ${GPUS:+--devices "$GPUS"} \
    ${NNODES:+--nnodes "$NNODES"} ${MASTER:+--master "$MASTER"} ${RANK:+--rank "$RANK"} \
    --log_dir "$output/launch-${RANK:-0}" main_multi_gpu.py -output "$output" -amp "$@"
