"""Measure how training speeds up with the number of processes, at a fixed batch size per process.

  python -m tools.benchmark ddp -cfg configs/demo.yaml -data_path data/fashion_mnist_demo
  python -m tools.benchmark ddp -cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet -amp -nproc 1 2 4 8

A run has two epochs of -steps steps; only the second one counts. Runs with different numbers of processes alternate,
-repeats times each. The table shows medians and ranges of images per second, and the efficiency: images per second per
process, relative to the first number of processes. On a CPU each process uses one core: it computes with one thread and
reads its images itself.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile

from config import get_config, get_parser, resolve_config, update_config, with_values
from runtime.program import prepare_runtime
from utils import UserError

MAIN = os.path.abspath(os.path.join(os.path.dirname(__file__), '..', '..', 'main_multi_gpu.py'))


def write_run(folder, config, images, count, steps):
    """Write the config of a run, and lists for `steps` steps of `count` processes. images: pairs of path and label."""
    for split, length in (('train', count * config.DATA.BATCH_SIZE * steps), ('val', 1)):
        with open(os.path.join(folder, f'{split}_list.txt'), 'w', encoding='utf-8') as file:
            for path, label in itertools.islice(itertools.cycle(images), length):
                file.write(f'{path} {label}\n')
    config = with_values(config, {
        'DATA.DATA_PATH': folder, 'SAVE': os.path.join(folder, 'run'), 'TRAIN.NUM_EPOCHS': 2, 'TRAIN.WARMUP_EPOCHS': 0,
        'VALIDATE_FREQ': 2, 'SAVE_FREQ': 0, 'REPORT_FREQ': steps})
    with open(os.path.join(folder, 'config.yaml'), 'w', encoding='utf-8') as file:
        file.write(config.dump())


def images_per_second(config, images, count, steps):
    """Return the images per second in the second epoch of a run with `count` processes.

    Raises: UserError with the last line of its output if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_run(folder, config, images, count, steps)
        process = subprocess.run([sys.executable, MAIN, '-nproc', str(count), '-cfg',
                                  os.path.join(folder, 'config.yaml')], capture_output=True, text=True)
        if process.returncode:
            raise UserError(f'-nproc {count}: {(process.stderr or process.stdout).strip().splitlines()[-1]}')
        with open(os.path.join(folder, 'run', 'log.jsonl'), encoding='utf-8') as file:
            rows = [json.loads(line) for line in file]
        return next(row['images_per_second'] for row in rows if row['split'] == 'train' and row['epoch'] == 2)


def main():
    parser = get_parser(__doc__, ('data_path', 'batch_size', 'image_size', 'amp'))
    parser.add_argument('-nproc', metavar='N', type=int, nargs='+',
                        help='numbers of processes to compare (default: 1 and the number of GPUs; 1 and 2 on a CPU)')
    parser.add_argument('-steps', metavar='N', type=int, default=50, help='steps per epoch (default: 50)')
    parser.add_argument('-repeats', metavar='N', type=int, default=5, help='runs per number of processes (default: 5)')
    args = parser.parse_args()
    config = update_config(get_config(), args)
    prepare_runtime()
    import paddle

    from datasets import read_list
    gpus = paddle.device.cuda.device_count()
    if not gpus:
        os.environ['OMP_NUM_THREADS'] = '1'
        config.DATA.NUM_WORKERS = 0
    config = resolve_config(config)
    counts = args.nproc or sorted({1, gpus or 2})
    if min(*counts, args.steps, args.repeats) < 1:
        raise UserError('-nproc, -steps and -repeats must be at least 1')
    data = os.path.abspath(config.DATA.DATA_PATH)
    images = [(os.path.join(data, path), label) for path, label in zip(*read_list(
        os.path.join(data, 'train_list.txt'), config.MODEL.NUM_CLASSES))]
    speeds = {count: [] for count in counts}
    for _ in range(args.repeats):
        for count in counts:
            speeds[count].append(images_per_second(config, images, count, args.steps))
    print(f'{config.MODEL.NAME} at {config.DATA.IMAGE_SIZE} pixels, {config.DATA.BATCH_SIZE} images per process and '
          f'step, {args.steps} steps, medians (and ranges) of {args.repeats} runs, PaddlePaddle {paddle.__version__} '
          f'on {"GPUs" if gpus else "the CPU, one thread per process"}')
    print('processes  images/s                    efficiency')
    for count in counts:
        # ratios within a turn, so that a slow moment of the machine affects both numbers
        ratios = [speed / count / (first / counts[0]) for speed, first in zip(speeds[count], speeds[counts[0]])]
        low, high = min(speeds[count]), max(speeds[count])
        print(f'{count:9}  {statistics.median(speeds[count]):8.1f} ({low:.1f} to {high:.1f})'.ljust(39) +
              f'{statistics.median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})')
