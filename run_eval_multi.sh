#!/bin/sh
# Evaluate weights on all visible GPUs of one or more machines. Every image of the val list counts exactly once.
#
#   sh run_eval_multi.sh
#   CFG=configs/mobileone_s1.yaml GPUS=0 sh run_eval_multi.sh -deploy
#
# Flags are passed to main_multi_gpu.py (-h lists them). Optional variables, with their defaults in parentheses:
#   CFG         config file (configs/mobileone_s0.yaml)
#   PRETRAINED  weights (./NAME.pdparams, with the name of the config)
#   DATA_PATH   folder with val_list.txt (/dataset/imagenet)
#   OUTPUT      folder for the log (output/eval-NAME, with the name of the config); an existing log is appended to
#   BATCH_SIZE  images per GPU and step (256)
#   GPUS        GPUs to use, e.g. 0,1,2,3 (all visible ones)
#   NNODES, MASTER, RANK  number of machines, address:port or name:port of the first one, and number of this one, from 0
#   PYTHON      Python interpreter (python)
# Without a GPU, one process runs on the CPU; PADDLE_NPROC_PER_NODE=2 starts two.
set -eu
cd "$(dirname "$0")"
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run_eval_multi.sh
    exit 0 ;;
esac
cfg=${CFG:-configs/mobileone_s0.yaml}
name=$(basename "$cfg" .yaml)
exec sh tools/launch.sh "${OUTPUT:-output/eval-$name}" -cfg "$cfg" -data_path "${DATA_PATH:-/dataset/imagenet}" -eval \
    -batch_size "${BATCH_SIZE:-256}" -pretrained "${PRETRAINED:-./$name.pdparams}" "$@"
