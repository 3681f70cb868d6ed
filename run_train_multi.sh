#!/bin/sh
# Train on all visible GPUs of one or more machines. Run it again to resume from the newest checkpoint.
#
#   sh run_train_multi.sh
#   CFG=configs/mobileone_s1.yaml DATA_PATH=/dataset/imagenet GPUS=0,1,2,3 sh run_train_multi.sh -opts SEED 1
#   NNODES=2 MASTER=10.0.0.1:8090 RANK=0 sh run_train_multi.sh     # RANK=1 on the second machine
#
# Flags are passed to main_multi_gpu.py (-h lists them). Optional variables, with their defaults in parentheses:
#   CFG         config file (configs/mobileone_s0.yaml)
#   DATA_PATH   folder with train_list.txt and val_list.txt (/dataset/imagenet)
#   OUTPUT      folder of the run (output/NAME, with the name of the config)
#   BATCH_SIZE  images per GPU and step (the config's 32: the paper's total of 256 with 8 GPUs)
#   PRETRAINED  weights to start from (random ones)
#   GPUS        GPUs to use, e.g. 0,1,2,3 (all visible ones)
#   NNODES, MASTER, RANK  number of machines, address:port or name:port of the first one, and number of this one, from 0
#   PYTHON      Python interpreter (python)
# Without a GPU, one process runs on the CPU; PADDLE_NPROC_PER_NODE=2 starts two.
set -eu
cd "$(dirname "$0")"
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run_train_multi.sh
    exit 0 ;;
esac
cfg=${CFG:-configs/mobileone_s0.yaml}
output=${OUTPUT:-output/$(basename "$cfg" .yaml)}
exec sh tools/launch.sh "$output" -cfg "$cfg" -data_path "${DATA_PATH:-/dataset/imagenet}" -resume auto \
    ${BATCH_SIZE:+-batch_size "$BATCH_SIZE"} ${PRETRAINED:+-pretrained "$PRETRAINED"} "$@"
