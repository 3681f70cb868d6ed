"""Convert the ONNX file of a network for engines that run on phones: ncnn and MNN."""
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np

from utils import UserError, one_line

# format -> its file, and the command that installs its converter and engine
FORMATS = {'ncnn': ('model.ncnn.param', 'pip install ncnn && pip install --no-deps pnnx'),
           'mnn': ('model.mnn', 'pip install MNN')}


def find_converter(name):
    """Return the path of a format's converter; None unless it and the engine that checks its output are installed."""
    if not find_spec({'ncnn': 'ncnn', 'mnn': 'MNN'}[name]):
        return None
    if name == 'ncnn':  # the binary, because the pnnx command imports PyTorch
        package = find_spec('pnnx')
        return package and shutil.which(os.path.join(package.submodule_search_locations[0], 'pnnx'))
    return shutil.which(os.path.join(os.path.dirname(sys.executable), 'mnnconvert')) or shutil.which('mnnconvert')


def convert(name, onnx, spec):
    """Convert an ONNX file to a format of FORMATS, written next to it: model.ncnn.param and .bin, or model.mnn.

    Raises: UserError with the last line of the converter's output if it fails.
    """
    folder, source = os.path.split(onnx)
    target, size = FORMATS[name][0], spec.image_size
    arguments = {'ncnn': [source, f'inputshape=[1,3,{size},{size}]', 'fp16=0'],
                 'mnn': ['-f', 'ONNX', '--modelFile', source, '--MNNModel', target, '--bizCode', 'mobileone']}[name]
    before = set(os.listdir(folder))
    process = subprocess.run([find_converter(name), *arguments], cwd=folder, capture_output=True, text=True)
    made = set(os.listdir(folder)) - before
    if process.returncode or target not in made:
        last = (process.stderr.strip() or process.stdout.strip()).rpartition('\n')[2]
        raise UserError(f'-format {name}: its converter failed with status {process.returncode} ({one_line(last)}); '
                        'drop the format, free up disk space if it is full (`df -h`), or install another version')
    for other in made - {target, 'model.ncnn.bin'}:  # pnnx leaves its intermediate files
        os.remove(os.path.join(folder, other))


def _unreadable(path):
    return UserError(f'{os.path.basename(path)}: its engine cannot read what the converter wrote; check that the disk '
                     'is not full (`df -h`), or drop the format')


def load_ncnn(path):
    """Return run(float32 [N, 3, H, W]) for model.ncnn.param, which computes one image at a time in float32.

    Raises: UserError if ncnn cannot read the file.
    """
    import ncnn
    net = ncnn.Net()
    for option in ('use_fp16_packed', 'use_fp16_storage', 'use_fp16_arithmetic', 'use_bf16_storage'):
        setattr(net.opt, option, False)
    if net.load_param(path) or net.load_model(f'{path[:-len("param")]}bin'):  # inference would crash otherwise
        raise _unreadable(path)

    def run(images):
        rows = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input('in0', ncnn.Mat(image).clone())
            rows.append(np.array(extractor.extract('out0')[1]))
        return np.stack(rows)
    return run


def load_mnn(path):
    """Return run(float32 [N, 3, H, W]) for model.mnn. Raises: UserError if MNN cannot read the file."""
    import MNN
    try:
        module = MNN.nn.load_module_from_file(path, ['image'], [])
    except SystemError:
        raise _unreadable(path) from None

    def run(images):
        source = MNN.expr.const(images, images.shape, MNN.expr.NCHW, MNN.expr.float)
        return np.array(MNN.expr.convert(module.forward([source])[0], MNN.expr.NCHW).read())
    return run


LOADERS = {'ncnn': load_ncnn, 'mnn': load_mnn}
