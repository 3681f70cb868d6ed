"""Measure how fast a network trains on the GPU, or else on the CPU, compared with timm's if timm is installed.

  python -m tools.benchmark train -cfg configs/mobileone_s0.yaml
  python -m tools.benchmark train -cfg configs/mobileone_s0.yaml -batch_size 32 128 -precision float32 O1 O2 -json
  python -m tools.benchmark train -cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet -num_workers 4 8 16

A step is the same as in a run, with the config's EMA, loss, mixup, and optimizer, on images of DATA.IMAGE_SIZE: batches
from data workers with -data_path, otherwise one synthetic batch in memory. timm's network trains on a synthetic batch,
with timm's optimizer, label smoothing, and EMA, and with autocast in place of O1. Each row has its own process. Rows
with the same batch size take turns of -steps steps, with pauses in between. The first turn does not count, nor do the
first 1 + 2 x workers steps of each turn. The table shows medians over the turns and

  range     of the time per step over the turns
  launches  operators that a step launches, counted by PaddlePaddle's profiler
  MiB       peak memory: of tensors on a GPU, growth of the process on a CPU
  waiting   share of the time that the host waits for images; - with a synthetic batch
  ratio     of times, turn by turn, to timm's first row with that batch size or, without timm, to the first row
"""
import importlib.util
import itertools
import json
import os
import statistics
import tempfile

from config import get_config, get_parser, resolve_config, update_config, with_values
from runtime.files import write_text
from runtime.program import prepare_runtime, usable_cores
from tools.benchmark.train_worker import config_of
from tools.benchmark.turns import compare, describe_cpu, find_versions, measure, with_range
from utils import UserError

PRECISIONS = ('float32', 'O1', 'O2')


def parse_args():
    """Parse the command line. Raises: UserError for values out of range."""
    parser = get_parser(__doc__, ('data_path', 'image_size'))
    parser.add_argument('-batch_size', metavar='N', nargs='+', type=int, dest='batches',
                        help="batch sizes to measure (default: the config's)")
    parser.add_argument('-num_workers', metavar='N', nargs='+', type=int, dest='workers',
                        help="with -data_path: numbers of data workers to measure (default: the config's)")
    parser.add_argument('-precision', nargs='+', choices=PRECISIONS, help='on a GPU: float32 and levels of mixed '
                        'precision to measure (default: all)')
    parser.add_argument('-dtype', choices=('float16', 'bfloat16'), help="mixed-precision dtype (default: the config's)")
    parser.add_argument('-threads', metavar='N', type=int, help='threads on a CPU (default: one per core)')
    parser.add_argument('-steps', metavar='N', type=int, help='steps per turn (default: 30 on a GPU, 2 on a CPU)')
    parser.add_argument('-turns', metavar='N', type=int, default=5, help='turns per row (default: 5)')
    parser.add_argument('-json', action='store_true', help='print a JSON object per row instead of the table')
    args = parser.parse_args()
    numbers = [args.turns, *(number for number in (args.steps, args.threads) if number is not None)]
    if min(numbers) < 1:
        raise UserError('-threads, -steps and -turns must be at least 1')
    if args.workers and not args.data_path:
        raise UserError('-num_workers has no effect on a synthetic batch: add -data_path, or leave it out')
    return args


def make_rows(args, config, on_gpu, batch):
    """Return the rows for a batch size, those of timm last."""
    precisions = args.precision or (PRECISIONS if on_gpu else PRECISIONS[:1])
    workers = (args.workers or [config.DATA.NUM_WORKERS]) if args.data_path else [None]
    common = {'network': config.MODEL.NAME, 'image_size': config.DATA.IMAGE_SIZE, 'batch': batch,
              'device': 'cuda' if on_gpu else 'cpu', 'amp_dtype': config.AMP_DTYPE,
              'threads': args.threads or (1 if on_gpu else usable_cores())}
    rows = [{**common, 'framework': 'paddle', 'precision': precision, 'workers': count}
            for precision, count in itertools.product(precisions, workers)]
    if all(map(importlib.util.find_spec, ('torch', 'timm'))):  # PyTorch has no O2
        rows += [{**common, 'framework': 'timm', 'precision': precision, 'workers': None}
                 for precision in precisions if precision != 'O2']
    return rows


def summarize(rows):
    """Summarize the turns of each row: add the table's numbers, reduce 'turns' to milliseconds; see `compare`."""
    for row in rows:
        turns = row.get('turns')
        if turns:
            row.update(turns[-1], turns=[turn['milliseconds'] for turn in turns])  # peak memory so far, and launches
            row['images_per_second'] = statistics.median(turn['images_per_second'] for turn in turns)
            if row['waiting'] is not None:
                row['waiting'] = statistics.median(turn['waiting'] for turn in turns)
    compare(rows, choose_base)


def choose_base(rows):
    """Return timm's first row, or the first row; None if there are no rows."""
    return next((row for row in rows if row['framework'] == 'timm'), next(iter(rows), None))


def describe(row):
    """Return a row as a line of the table."""
    workers = '-' if row['workers'] is None else row['workers']
    start = f'{row["framework"]:10}{row["precision"]:9}{row["batch"]:6}{workers:>9}'
    if 'error' in row:
        return f'{start}  {row["error"]}'
    launches = '-' if row['launches'] is None else row['launches']
    memory = '-' if row['memory'] is None else round(row['memory'] / 2 ** 20)
    waiting = '-' if row['waiting'] is None else f'{row["waiting"]:.0%}'
    return (f'{start}{row["images_per_second"]:10.1f}  {with_range(row["turns"], 1):30}{launches:>9} {memory:>7} '
            f'{waiting:>8} {row["ratio"]:6.2f}')


def main():
    args = parse_args()
    config = update_config(get_config(), args)
    config = resolve_config(with_values(config, {
        'TRAIN.CURRICULUM': [], 'AMP_DTYPE': args.dtype or config.AMP_DTYPE}))
    prepare_runtime()
    import paddle

    from datasets import get_dataset
    on_gpu = paddle.device.cuda.device_count() > 0
    if not on_gpu and (args.dtype or {*(args.precision or ())} - {'float32'}):
        raise UserError('mixed precision (-precision O1 O2, -dtype) has no effect on a CPU: leave it out')
    groups = [make_rows(args, config, on_gpu, batch) for batch in args.batches or [config.DATA.BATCH_SIZE]]
    for row in itertools.chain(*groups):
        config_of(row, config)  # report invalid values before anything is measured
    if args.data_path:
        get_dataset(config)
    machine = paddle.device.cuda.get_device_name() if on_gpu else describe_cpu()[0]
    versions = find_versions('paddlepaddle', 'paddlepaddle-gpu', 'torch', 'timm')
    steps = args.steps or (30 if on_gpu else 2)
    if not args.json:
        print(f'{machine}; {", ".join(map(" ".join, versions.items()))}; {config.MODEL.NAME} at '
              f'{config.DATA.IMAGE_SIZE} pixels; {args.turns} turns of {steps} steps' +
              (f'; O1 and O2 in {config.AMP_DTYPE}' if on_gpu else ''))
        print('framework precision batch  workers  images/s  ms per step (range)            launches     MiB  waiting  '
              'ratio')
    with tempfile.TemporaryDirectory() as folder:
        write_text(os.path.join(folder, 'config.yaml'), config.dump())
        for rows in groups:
            measure('tools.benchmark.train_worker', rows, folder, args.turns, steps)
            summarize(rows)
            for row in rows:
                print(json.dumps({**row, 'machine': machine, 'versions': versions}) if args.json else describe(row),
                      flush=True)
