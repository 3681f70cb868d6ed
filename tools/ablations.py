"""Ablate the paper's recipe on a narrow network: train every arm with every seed, then print a table of means.

  python -m tools.make_fashion_mnist -source /usr/share/datasets/fashion-mnist -output data/fashion_mnist
  python -m tools.ablations -data_path data/fashion_mnist -output output/ablations

The first arm is configs/ablations.yaml; the others differ from it in one setting, the last in two. All arms share data,
epochs, and seeds. Each run uses one thread, and -jobs of them run at a time. After an interruption, run the same
command again: it finishes the missing runs and prints the table.
"""
import concurrent.futures
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass

from config import get_config, with_values
from runtime.files import check_regular, write_text
from runtime.program import prepare_runtime, run_program
from runtime.settings import ArgumentParser
from tools.plot_log import read_log
from utils import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BASE = get_config(os.path.join(ROOT, 'configs', 'ablations.yaml'))


@dataclass
class Arm:
    """A recipe to compare. branches: k; end_decay: final weight decay as a fraction of the initial one."""
    description: str
    branches: int = 4
    skip_and_scale: bool = True
    end_decay: float = 0.1


ARMS = {
    'paper': Arm('k = 4, skip and scale, annealed weight decay'),
    'constant_decay': Arm('weight decay constant', end_decay=1.0),
    'one_branch': Arm('k = 1', branches=1),
    'no_skip_scale': Arm('no skip, no scale', skip_and_scale=False),
    'plain': Arm('k = 1, no skip, no scale', branches=1, skip_and_scale=False),
}


def remove_skip_and_scale():
    """Make this process build networks from the k convolutions only, without skip and scale branches."""
    import mobileone

    class ConvolutionsOnly(mobileone.MobileOneBlock):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name in ('dw_skip', 'dw_1x1', 'pw_skip'):
                if hasattr(self, name):
                    delattr(self, name)
    mobileone.MobileOneBlock = ConvolutionsOnly


def write_lists(source, target, train_images):
    """Write lists with absolute paths: the first `train_images` lines of the training list and the whole val list.

    The training list of Fashion-MNIST is in random order, so its first images are a random sample.
    Raises: UserError for missing lists, for too few images, and if `target` has lists of different images.
    """
    os.makedirs(target, exist_ok=True)
    for name, count in (('train_list.txt', train_images), ('val_list.txt', None)):
        check_regular(os.path.join(source, name))
        try:
            with open(os.path.join(source, name), encoding='utf-8') as file:
                lines = file.read().splitlines()[:count]
        except OSError as error:
            raise UserError(f'{error.filename}: {error.strerror}; set -data_path to a folder written by '
                            'tools.make_fashion_mnist') from None
        if count and len(lines) < count:
            raise UserError(f'-train_images is {count}, but {source} has {len(lines)}')
        text = ''.join(f'{os.path.abspath(source)}/{line}\n' for line in lines)
        path = os.path.join(target, name)
        if os.path.exists(path):
            with open(path, encoding='utf-8') as file:
                if file.read() != text:
                    raise UserError(f'{path}: the runs in this folder use different images; choose another -output')
        write_text(path, text)


def halfway(epochs):
    """Return the epoch that is evaluated in addition to the last one."""
    return -(-epochs // 2)


def run_arm(args):
    """Train one arm with one seed in this process, resuming an unfinished run."""
    prepare_runtime()
    import run

    arm = ARMS[args.arm]
    if not arm.skip_and_scale:
        remove_skip_and_scale()
    run.run(with_values(BASE, {
        'MODEL.NUM_BRANCHES': [arm.branches] * 5, 'TRAIN.WEIGHT_DECAY': args.weight_decay,
        'TRAIN.END_WEIGHT_DECAY': arm.end_decay * args.weight_decay, 'TRAIN.NUM_EPOCHS': args.epochs,
        'VALIDATE_FREQ': halfway(args.epochs), 'DATA.DATA_PATH': args.data_path, 'DATA.NUM_WORKERS': 0,
        'SEED': args.seed, 'SAVE': args.output, 'MODEL.RESUME': 'auto'}))


def start(arm, seed, args):
    """Call `run_arm` in a separate process. Raises: UserError with its last output line if it fails."""
    folder = os.path.join(args.output, f'{arm}-{seed}')
    process = subprocess.run(
        [sys.executable, '-m', 'tools.ablations', '-arm', arm, '-seed', str(seed), '-data_path',
         os.path.join(args.output, 'data'), '-output', folder, '-epochs', str(args.epochs), '-weight_decay',
         str(args.weight_decay)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if process.returncode:
        last = (process.stderr or process.stdout).rstrip().rpartition('\n')[2]
        raise UserError(f'{folder}: exited with status {process.returncode}: {last}')
    print(f'{folder}: done', flush=True)


def read_accuracies(folder):
    """Return {(epoch, 'raw' or 'ema'): top-1 in percent} for the evaluations of a run."""
    return {(row['epoch'], row['weights']): row['acc1'] for row in read_log(folder) if row['split'] == 'val'}


def table(output, seeds, epochs):
    """Return a Markdown table of each arm's top-1, halfway and at the end, raw and EMA: mean ± std over the seeds.

    The last column is, for each seed, the difference in final EMA top-1 from the first arm.
    """
    columns = [(epoch, weights) for epoch in (halfway(epochs), epochs) for weights in ('raw', 'ema')]
    runs = {arm: [read_accuracies(os.path.join(output, f'{arm}-{seed}')) for seed in range(seeds)] for arm in ARMS}
    first = next(iter(runs.values()))
    lines = [f'| arm | {" | ".join(f"{weights}, epoch {epoch}" for epoch, weights in columns)} | to the first |',
             '|---' * (2 + len(columns)) + '|']
    for arm in ARMS:
        cells = []
        for column in columns:
            values = [run[column] for run in runs[arm]]
            spread = f' ± {statistics.stdev(values):.2f}' if seeds > 1 else ''
            cells.append(f'{statistics.mean(values):.2f}{spread}')
        cells.append(', '.join(f'{run[columns[-1]] - base[columns[-1]]:+.2f}' for run, base in zip(runs[arm], first)))
        lines.append(f'| {ARMS[arm].description} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-data_path', metavar='DIR', required=True, help='folder written by tools.make_fashion_mnist')
    parser.add_argument('-output', metavar='DIR', required=True, help='folder for the runs')
    parser.add_argument('-seeds', metavar='N', type=int, default=3,
                        help='number of runs per arm, with seeds from 0 (default: 3)')
    parser.add_argument('-jobs', metavar='N', type=int, default=2, help='number of runs at a time (default: 2)')
    parser.add_argument('-epochs', metavar='N', type=int, default=BASE.TRAIN.NUM_EPOCHS,
                        help=f'epochs per run (default: {BASE.TRAIN.NUM_EPOCHS})')
    parser.add_argument('-train_images', metavar='N', type=int, default=8000,
                        help='number of training images to use (default: 8000)')
    parser.add_argument('-weight_decay', metavar='X', type=float, default=BASE.TRAIN.WEIGHT_DECAY,
                        help=f'weight decay of the first step, annealed to a tenth (default: '
                             f'{BASE.TRAIN.WEIGHT_DECAY:g})')
    parser.add_argument('-arm', metavar='NAME', choices=ARMS,
                        help=f'train only this arm, in -output: {", ".join(ARMS)}')
    parser.add_argument('-seed', metavar='N', type=int, default=0, help='seed for -arm (default: 0)')
    args = parser.parse_args()
    if min(args.seeds, args.jobs, args.train_images) < 1 or args.epochs < 2 or args.weight_decay < 0:
        raise UserError('-seeds, -jobs and -train_images must be at least 1, -epochs 2, -weight_decay 0')
    if args.arm:
        return run_arm(args)
    # runs with a different budget or decay get their own folder
    args.output = os.path.join(os.path.abspath(args.output),
                               f'{args.epochs}_epochs_of_{args.train_images}_decay_{args.weight_decay:g}')
    write_lists(args.data_path, os.path.join(args.output, 'data'), args.train_images)
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    try:
        for run in [pool.submit(start, arm, seed, args) for seed in range(args.seeds) for arm in ARMS]:
            run.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, do not start the pending runs
    print(table(args.output, args.seeds, args.epochs))


if __name__ == '__main__':
    run_program(main)
