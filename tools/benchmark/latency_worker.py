"""The process that measures one row of tools.benchmark.latency."""
import os
import statistics
import time

import numpy as np

from config import get_config
from deploy.predictor import LOADERS, load_program
from runtime.program import prepare_runtime, run_program
from tools.benchmark.turns import serve_turns
from utils import UserError

# engine -> its program, and the engine inside Paddle Inference that runs it
PROGRAMS = {
    'inference-openvino': ('inference.pdmodel', 'openvino'),
    'inference-pdmodel': ('inference.pdmodel', 'onednn'),
    'inference-json': ('inference.json', 'onednn'),
    'inference-plain': ('plain/inference.pdmodel', 'onednn'),
}
INT8 = 'int8.onnx'


def load(engine, folder, config, threads, precision):
    """Return run(images) of an engine: float32 [N, 3, H, W] -> float32 [N, classes].

    folder: written by `latency.export`. Raises: UserError if the engine needs unfused weights and the folder has none.
    """
    if engine == 'timm':
        return load_timm(config.MODEL.NAME, config.MODEL.NUM_CLASSES, threads)
    path = os.path.join(folder, INT8) if precision == 'int8' else folder
    if engine == 'onnxruntime':
        return LOADERS[engine](path, None, threads)[1]
    if engine == 'openvino':
        return LOADERS[engine](path, None, threads, precision='bf16' if precision == 'bfloat16' else 'f32')[1]
    prepare_runtime()
    if engine in PROGRAMS:
        name, by = PROGRAMS[engine]
        return load_program(os.path.join(folder, name), threads, precision == 'bfloat16', by)
    fused = engine == 'paddle'
    path = os.path.join(folder, 'fused.pdparams' if fused else 'unfused.pdparams')
    if not os.path.exists(path):
        raise UserError('the weights are fused; give unfused ones')
    return LOADERS['paddle'](path, None, threads, fused=fused)[1]


def load_timm(name, classes, threads):
    """Return run(images) of timm's network of this name, reparameterized, with random weights."""
    import timm
    import torch
    from timm.utils import reparameterize_model
    torch.set_num_threads(threads)
    model = reparameterize_model(timm.create_model(name, num_classes=classes).eval())

    def run(images):
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()
    return run


def milliseconds(run, images, seconds):
    """Return the median milliseconds of a call, over as many calls as fit into `seconds`, but at least one.

    An extra first call, which is slow after a pause, does not count.
    """
    run(images)
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def start(row, folder):
    """Return turn(seconds) -> milliseconds of a call to a row's engine. folder: written by `latency.export`."""
    config = get_config(os.path.join(folder, 'config.yaml'))
    size = config.DATA.IMAGE_SIZE
    images = np.random.default_rng(0).standard_normal([row['batch'], 3, size, size], 'float32')
    run = load(row['engine'], folder, config, row['threads'], row['precision'])
    return lambda seconds: milliseconds(run, images, seconds)


if __name__ == '__main__':
    run_program(lambda: serve_turns(start))
