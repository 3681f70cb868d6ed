"""Measure the latency of fused networks on this CPU, in every installed engine.

  python -m tools.benchmark latency -cfg configs/mobileone_s0.yaml
  python -m tools.benchmark latency -cfg configs/mobileone_s*.yaml -threads 1 2 -batch 1 8 -plot latency.png

A latency is the time of one call, from a NumPy array of images to an array of logits. A turn measures the median of the
calls in -seconds seconds; the table shows the median and the range of -turns turns. The ratio to the fastest float32
row is the median of the ratios turn by turn. Each engine has its own process, because in a shared process the waiting
threads of one engine slow down the next. The processes take turns, with pauses in between. Engines that support
bfloat16 are also measured in bfloat16 if the CPU has it. The int8 network is made by tools.export_model and calibrated
on random images, which does not affect its speed. Engines:

  paddle              PaddlePaddle; paddle-unfused: with all training branches
  inference-openvino  Paddle Inference with the OpenVINO in PaddlePaddle 3, inference.pdmodel
  inference-pdmodel   Paddle Inference with oneDNN; on PaddlePaddle 2, biases are exported as batch norms
  inference-plain     (PaddlePaddle 2) the same, with plain biases
  inference-json      (PaddlePaddle 3) Paddle Inference with oneDNN, inference.json
  onnxruntime         ONNX Runtime, model.onnx
  openvino            OpenVINO, model.onnx
  timm                PyTorch: timm's network of the same name, reparameterized, with random weights
"""
import contextlib
import importlib.util
import io
import itertools
import json
import os
import tempfile

import numpy as np

from config import get_config, resolve_config, with_values
from runtime.files import replace, write_text
from runtime.program import prepare_runtime, usable_cores
from runtime.settings import ArgumentParser
from tools import import_pyplot
from tools.benchmark.latency_worker import INT8
from tools.benchmark.turns import compare, describe_cpu, find_versions, measure, with_range
from utils import UserError

# engine -> the packages it needs, for Paddle with an optional major version
ENGINES = {
    'paddle': ('paddle',), 'paddle-unfused': ('paddle',), 'inference-openvino': ('paddle 3',),
    'inference-pdmodel': ('paddle',), 'inference-plain': ('paddle 2',), 'inference-json': ('paddle 3',),
    'onnxruntime': ('onnx', 'onnxruntime'), 'openvino': ('onnx', 'openvino'), 'timm': ('torch', 'timm'),
}
DISTRIBUTIONS = ('paddlepaddle', 'paddlepaddle-gpu', 'onnxruntime', 'onnxruntime-gpu', 'openvino', 'torch', 'timm')
PRECISIONS = {'bfloat16': ('inference-openvino', 'openvino'), 'int8': ('onnxruntime', 'openvino')}
# top-1 accuracy at 224 pixels, from the table in README.md
ACCURACY = {'mobileone_s0': 71.14, 'mobileone_s1': 75.65, 'mobileone_s2': 77.22, 'mobileone_s3': 77.74,
            'mobileone_s4': 79.07}


def missing(engine):
    """Return the packages that an engine needs but that are not installed."""
    import paddle
    major = '2' if paddle.__version__.startswith('2.') else '3'
    return [need for need in ENGINES[engine]
            if not importlib.util.find_spec(need.split()[0]) or need.split()[1:] not in ([], [major])]


def choose_engines(names):
    """Return the named engines, or all that are installed. Raises: UserError for one that is not installed."""
    for name in names or []:
        if missing(name):
            raise UserError(f'-engines {name}: needs {" and ".join(missing(name))}: install it, or leave it out')
    return names or [name for name in ENGINES if not missing(name)]


def read_config(path, weights):
    """Return the config of a network with these weights, or with random ones if `weights` is empty."""
    return resolve_config(with_values(get_config(path), {
        'EVAL': bool(weights), 'MODEL.DEPLOY': False, 'MODEL.PRETRAINED': weights, 'MODEL.RESUME': ''}))


def export(config, folder, onnx):
    """Write a network to a folder in every format that the engines read.

    The files are config.yaml, fused.pdparams and, if the weights are not fused, unfused.pdparams; the files of
    tools.export_model; int8.onnx; and on PaddlePaddle 2 plain/, the program with plain biases.
    onnx: whether to write the ONNX files.
    """
    import paddle

    from deploy.paddle_model import write_paddle
    from deploy.predictor import Spec
    from mobileone import model_convert
    from runtime import checkpoint
    from tools.export_model import write
    from weights import build_network, is_fused, load_model
    paddle.seed(config.SEED)
    weights = config.MODEL.PRETRAINED
    model = load_model(config, weights)[0] if weights else build_network(config, fused=False)
    fused, spec = model_convert(model), Spec.of_config(config, ())
    write_text(os.path.join(folder, 'config.yaml'), config.dump())
    checkpoint.save(fused.state_dict(), os.path.join(folder, 'fused.pdparams'))
    if not is_fused(model.state_dict()):
        checkpoint.save(model.state_dict(), os.path.join(folder, 'unfused.pdparams'))
    write(fused, spec, folder, ['paddle', 'onnx'] if onnx else ['paddle'])
    if onnx and not missing('onnxruntime'):
        from deploy.quantize import write_int8
        size = config.DATA.IMAGE_SIZE
        pixels = np.random.default_rng(0).integers(0, 256, [8, size, size, 3], 'uint8')
        write_int8(fused, spec, pixels, os.path.join(folder, INT8))
    if not missing('inference-plain'):
        os.mkdir(os.path.join(folder, 'plain'))
        write_paddle(fused, spec, os.path.join(folder, 'plain'), plain=True)


def fastest(rows):
    """Return the float32 row with the smallest median, or None if no float32 row was measured."""
    return min((row for row in rows if row['precision'] == 'float32' and 'milliseconds' in row),
               key=lambda row: row['milliseconds'], default=None)


def show(row, as_json):
    """Print a row as JSON or as a line of the table."""
    if as_json:
        text = json.dumps(row)
    else:
        text = (f'{row["network"]:14}{row["batch"]:5}{row["threads"]:9}  {row["engine"]:20}{row["precision"]:10}' +
                (row.get('error') or describe_times(row)))
    print(text, flush=True)


def describe_times(row):
    spread = with_range(row['turns'], 2)
    return f'{spread:32}{row["ratio"]:.2f}' if row['ratio'] else spread


def plot(rows, configs, path):
    """Plot accuracy against the latency of the fastest float32 row into a PNG file, like figure 1 of the paper.

    If the accuracy of a network was not published, the FLOPs of all networks are plotted instead.
    """
    pyplot = import_pyplot()
    known = all(config.MODEL.NAME in ACCURACY and config.DATA.IMAGE_SIZE == 224 for config in configs)
    heights = {config.MODEL.NAME: ACCURACY[config.MODEL.NAME] if known else count_flops(config) / 1e6
               for config in configs}
    figure, axis = pyplot.subplots(figsize=(7, 5), layout='constrained')
    for batch, threads in dict.fromkeys((row['batch'], row['threads']) for row in rows):
        chosen = [row for row in rows if (row['batch'], row['threads']) == (batch, threads)]
        best = filter(None, (fastest(row for row in chosen if row['network'] == name) for name in heights))
        points = [(row['milliseconds'], heights[row['network']], row['network']) for row in best]
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], marker='o',
                  label=f'batch {batch}, threads {threads}')
        for x, y, name in points:
            axis.annotate(name, (x, y), xytext=(5, -10), textcoords='offset points', fontsize='small')
    axis.set(xlabel='latency of the fastest float32 engine (ms)',
             ylabel='published top-1 accuracy (%)' if known else 'FLOPs, fused (millions of multiply-adds)')
    axis.margins(0.25)  # room for the names
    axis.grid(alpha=0.3)
    axis.legend()
    replace(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def count_flops(config):
    """Return the multiply-adds of the fused network per image."""
    import paddle

    from weights import build_network
    size = config.DATA.IMAGE_SIZE
    with contextlib.redirect_stdout(io.StringIO()):
        return paddle.flops(build_network(config, fused=True), [1, 3, size, size])


def parse_args():
    """Parse the command line. Raises: UserError for values out of range."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-cfg', metavar='FILE', nargs='+', required=True, help='configs of the networks (see configs/)')
    parser.add_argument('-pretrained', metavar='FILE', nargs='+', help='weight files, one per config (default: random '
                        'weights)')
    parser.add_argument('-engines', metavar='NAME', nargs='+', choices=ENGINES, help='engines to measure (default: all '
                        'that are installed)')
    parser.add_argument('-threads', metavar='N', nargs='+', type=int, default=[usable_cores()],
                        help='numbers of threads to measure (default: one per core)')
    parser.add_argument('-batch', metavar='N', nargs='+', type=int, default=[1],
                        help='batch sizes to measure (default: 1)')
    parser.add_argument('-turns', metavar='N', type=int, default=5, help='turns per engine (default: 5)')
    parser.add_argument('-seconds', metavar='S', type=float, default=1, help='length of a turn in seconds (default: 1)')
    parser.add_argument('-json', action='store_true', help='print a JSON object per row instead of the table')
    parser.add_argument('-plot', metavar='FILE', help='plot accuracy or FLOPs against latency into this PNG')
    args = parser.parse_args()
    if min(*args.threads, *args.batch, args.turns) < 1 or not 0 < args.seconds < float('inf'):
        raise UserError('-threads, -batch and -turns must be at least 1, and -seconds above 0')
    args.weights = args.pretrained or [''] * len(args.cfg)
    if len(args.weights) != len(args.cfg):
        raise UserError(f'-pretrained has {len(args.weights)} files for {len(args.cfg)} configs: give one per config')
    if args.plot:
        import_pyplot()
    return args


def main():
    args = parse_args()
    configs = list(map(read_config, args.cfg, args.weights))
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # for the workers too
    prepare_runtime()
    engines = choose_engines(args.engines)
    (cpu, has_bfloat16), versions = describe_cpu(), find_versions(*DISTRIBUTIONS)
    able = {'bfloat16': has_bfloat16, 'int8': not missing('onnxruntime')}  # it writes the int8 file
    precisions = [(engine, precision) for engine in engines for precision in ('float32', *PRECISIONS)
                  if precision == 'float32' or able[precision] and engine in PRECISIONS[precision]]
    kind = 'given weights' if args.pretrained else 'random weights'
    if not args.json:
        print(f'{cpu}; {", ".join(map(" ".join, versions.items()))}; {kind}; {args.turns} turns of {args.seconds:g} s')
        print('network       batch  threads  engine              precision ms per call (range)           ratio')
    rows = []
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            export(config, folder, bool({'onnxruntime', 'openvino'} & set(engines)))
            for batch, threads in itertools.product(args.batch, args.threads):
                group = [{'network': config.MODEL.NAME, 'batch': batch, 'threads': threads, 'engine': engine,
                          'precision': precision} for engine, precision in precisions]
                measure('tools.benchmark.latency_worker', group, folder, args.turns, args.seconds)
                compare(group, fastest)
                for row in group:
                    show({**row, 'cpu': cpu, 'versions': versions, 'weights': kind}, args.json)
                rows += group
    if args.plot:
        plot(rows, configs, args.plot)
