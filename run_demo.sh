#!/bin/sh
# Train a small MobileOne on real images, evaluate it, fuse it, and compare: a few minutes on two cores, no GPU needed.
#
#   sh run_demo.sh
#
# Needs Python 3.9 to 3.12 and a network for pip. Makes .venv, data/fashion_mnist_demo and output/demo; run again, it
# trains again, or goes on where it was stopped. Expected: at least 82 % top-1 (see README.md). PADDLE chooses the wheel,
# PYTHON the interpreter.
set -eu
cd "$(dirname "$0")"
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run_demo.sh
    exit 0 ;;
esac
sh tools/venv.sh .venv "${PADDLE:-paddlepaddle==3.3.1}"
[ ! -e output/demo/fused.pdparams ] || rm -rf output/demo
.venv/bin/python -m tools.make_fashion_mnist -source demo -output data/fashion_mnist_demo
# the same 24 images a step, which two processes take in less time than one (docs/performance.md)
if [ "$(uname)" = Linux ] && [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ]; then
    set -- main_multi_gpu.py -nproc 2 -batch_size 12 -opts DATA.NUM_WORKERS 0
else
    set -- main_single_gpu.py
fi
.venv/bin/python "$@" -device cpu -cfg configs/demo.yaml -output output/demo -resume auto
.venv/bin/python -m tools.fuse -cfg configs/demo.yaml -pretrained output/demo/best.pdparams -save output/demo/fused.pdparams
