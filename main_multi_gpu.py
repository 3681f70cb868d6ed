"""Train or evaluate MobileOne on all visible GPUs, with one process per GPU; without GPUs, on the CPU.

  python main_multi_gpu.py -cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet
  CUDA_VISIBLE_DEVICES=0,1 python main_multi_gpu.py -cfg configs/mobileone_s0.yaml -eval -pretrained s0.pdparams
  python main_multi_gpu.py -nproc 2 -cfg configs/mobileone_s0.yaml          # no GPU: two processes on the CPU
  python -m paddle.distributed.launch main_multi_gpu.py -cfg configs/mobileone_s0.yaml

run_train_multi.sh and run_eval_multi.sh start this program, also on several machines. It writes the same files as
main_single_gpu.py.
"""
import os
import sys

from config import get_config, get_parser, resolve_config, update_config
from runtime.launcher import check_srun, run_processes
from runtime.program import (
    count_gpus,
    environment_number,
    join_process_group,
    prepare_runtime,
    run_program,
    use_device,
)
from runtime.settings import add_device_flag
from utils import UserError


def main():
    parser = get_parser(__doc__)
    parser.add_argument('-nproc', metavar='N', type=int, help='processes to start on this machine, unless a launcher '
                        'already did (default: one per visible GPU, or one if there are none)')
    add_device_flag(parser)
    args = parser.parse_args()
    config = update_config(get_config(), args)
    resolve_config(config)  # report mistakes before starting processes
    check_srun(args.nproc)
    threads = os.environ.get('OMP_NUM_THREADS')
    prepare_runtime(args.device)
    gpus = count_gpus(args.device)
    if 'PADDLE_TRAINER_ID' not in os.environ:  # not started by a launcher
        count = max(1, gpus) if args.nproc is None else args.nproc
        if count < 1 or 0 < gpus < count:
            raise UserError(f'-nproc is {count}, but must be at least 1 and, with GPUs, at most their number; GPUs '
                            f'found: {gpus}')
        if count > 1 and sys.platform != 'linux':
            raise UserError(f'{count} processes need Linux: use -nproc 1')
        if count > 1:
            if threads is None:
                os.environ.pop('OMP_NUM_THREADS', None)  # set for one process; each new one sets its own share
            # not sys.argv[0], which is something else in a notebook
            sys.exit(run_processes([sys.executable, __file__, *sys.argv[1:]], count))
    import run
    use_device(args.device, environment_number('FLAGS_selected_gpus', 0))
    join_process_group()
    run.run(config)


if __name__ == '__main__':
    run_program(main)
