#!/bin/sh
# Train a small MobileOne on real images, evaluate it, fuse it, and compare: a few minutes on two cores, no GPU needed.
#
#   sh run_demo.sh
#
# Needs Python 3.9 to 3.12 and network access for pip. Creates .venv, data/fashion_mnist_demo, and output/demo. Run it
# again to resume an interrupted run, or to start over after a finished one. Expected: 87.5% top-1.
# Set PADDLE to choose the wheel, PYTHON to choose the interpreter.
set -eu
cd "$(dirname "$0")"
case ${1:-} in -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' run_demo.sh
    exit 0 ;;
esac
sh tools/venv.sh .venv "${PADDLE:-paddlepaddle==3.3.1}"
[ ! -e output/demo/fused.pdparams ] || rm -rf output/demo
.venv/bin/python -m tools.make_fashion_mnist -source demo -output data/fashion_mnist_demo
# 24 images per step either way; two processes are faster than one (docs/performance.md)
if [ "$(uname)" = Linux ] && [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ]; then
    set -- main_multi_gpu.py -nproc 2 -batch_size 12 -opts DATA.NUM_WORKERS 0
else
    set -- main_single_gpu.py
fi
.venv/bin/python "$@" -device cpu -cfg configs/demo.yaml -output output/demo -resume auto
.venv/bin/python -m tools.fuse -cfg configs/demo.yaml -pretrained output/demo/best.pdparams -save output/demo/fused.pdparams
