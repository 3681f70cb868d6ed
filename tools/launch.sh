#!/bin/sh
# Start main_multi_gpu.py on the GPUs of one or more machines, for run_train_multi.sh and run_eval_multi.sh.
#
#   sh tools/launch.sh OUTPUT [flags of main_multi_gpu.py]
#
# Reads the variables GPUS, NNODES, MASTER, RANK and PYTHON, which those scripts explain, and PADDLE_NPROC_PER_NODE. On
# several machines Paddle's launcher starts the processes and logs to OUTPUT/launch-RANK.
set -eu
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' tools/launch.sh
    exit 0 ;;
esac
output=$1
shift
for gpu in $(echo "${GPUS:-}" | tr , ' '); do
    case ",${CUDA_VISIBLE_DEVICES:-$GPUS}," in *",$gpu,"*) ;; *)
        echo "launch.sh: error: GPUS is $GPUS, but CUDA_VISIBLE_DEVICES allows only $CUDA_VISIBLE_DEVICES" >&2
        exit 2 ;;
    esac
done
if [ "${NNODES:-1}" = 1 ]; then
    [ -z "${GPUS:-}" ] || export CUDA_VISIBLE_DEVICES="$GPUS"
    exec "${PYTHON:-python}" main_multi_gpu.py ${PADDLE_NPROC_PER_NODE:+-nproc "$PADDLE_NPROC_PER_NODE"} \
        -output "$output" -amp "$@"
fi
if [ "${MASTER:+x}${RANK:+x}" != xx ]; then
    echo "launch.sh: error: NNODES is $NNODES: set MASTER (the first machine's address:port) and RANK (from 0) too" >&2
    exit 2
fi
master=$MASTER
host=
if [ "$RANK" = 0 ]; then
    # Paddle's launcher serves only on an address that this machine's host name resolves to; with a name in MASTER, it
    # would wait for itself
    master=127.0.0.1:${MASTER##*:}
    case ${MASTER%:*} in *[!0-9.]*) ;; *) host=${MASTER%:*} ;; esac
fi
# an empty list of devices stops the launcher
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] || unset CUDA_VISIBLE_DEVICES
exec "${PYTHON:-python}" -m paddle.distributed.launch ${GPUS:+--devices "$GPUS"} \
    ${host:+--host "$host"} --nnodes "$NNODES" --master "$master" --rank "$RANK" --log_dir "$output/launch-$RANK" \
    main_multi_gpu.py -output "$output" -amp "$@"
