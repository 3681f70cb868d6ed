"""Write a fused MobileOne as an int8 ONNX file, with channels rescaled to suit 8 bits. No training is needed.

An activation tensor has a single scale, so channels with small values get few of the 256 levels. But the outputs of a
ReLU network do not change when a channel is divided by a positive factor where it is produced and multiplied by it
where it is used (arXiv 1906.04721, section 4.1). This module chooses the factors in two ways; `quantize` tries both and
the unscaled network, and keeps the one closest to the original on held-out images.
"""
import copy
import errno
import functools
import os
import tempfile

import numpy as np
import onnx
import paddle
import paddle.nn as nn
from google.protobuf.message import DecodeError
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from deploy.onnx_graph import build_onnx
from deploy.predictor import LOADERS, run_batches
from transforms import Normalize

# passes over the network; after this many the weight ranges no longer change
SWEEPS = 20
# images at a time; small, because calibration takes a lot of memory
BATCH = 8
# one image in this many is held out of calibration for the comparison
HOLD_OUT = 4
# nodes of deploy.onnx_graph that stay in floating point
FLOAT_NODES = ['shifted', 'normalized', 'probabilities']


def find_links(model):
    """Return the layers around each ReLU of a fused network, in order: (convolution, SEBlock or None, next layer).

    The next layer is a convolution or, at the end, the classifier, which gets the mean over each map.
    """
    made = [(getattr(block, name).conv, getattr(block, f'{name[:2]}_se', None))
            for stage in model.stages for block in stage for name in block.convs]
    users = [conv for conv, _ in made[1:]] + [model.fc]
    return [(conv, se, user) for (conv, se), user in zip(made, users)]


def _is_depthwise(layer):
    return isinstance(layer, nn.Conv2D) and layer._groups > 1


def _input_axis(layer):
    """Return the axis of the input channels C: depthwise [C, 1, K, K], dense [O, C, K, K], classifier [C, classes]."""
    return int(isinstance(layer, nn.Conv2D) and not _is_depthwise(layer))


def _largest(weight, axis):
    """Return the largest magnitude at each index of an axis."""
    magnitudes = np.moveaxis(np.abs(weight.numpy()), axis, 0)
    return magnitudes.reshape([len(magnitudes), -1]).max(axis=1)


def _multiply(tensor, axis, factors):
    shape = [-1 if index == axis else 1 for index in range(tensor.ndim)]
    values = tensor.numpy()
    tensor.set_value((values * factors.reshape(shape)).astype(values.dtype))


def divide_activation(link, numerator, denominator=1):
    """Divide the channels of a link's activation by numerator / denominator, [C] each, in place. No output changes.

    A ratio of 0, infinity or nan means a channel that is always zero or never used; it is left alone.
    """
    conv, se, user = link
    with np.errstate(divide='ignore', invalid='ignore'):
        factors = np.asarray(numerator / denominator, 'float64')
    factors[~((factors > 0) & np.isfinite(factors))] = 1
    _multiply(conv.weight, 0, 1 / factors)
    _multiply(conv.bias, 0, 1 / factors)
    if se is not None:  # the gate depends on the channel means and must not change
        _multiply(se.reduce.weight, 1, factors)
    _multiply(user.weight, _input_axis(user), factors)


def _copy(model):
    """Return a float64 copy, so that scaling rounds only once."""
    return copy.deepcopy(model).to(dtype='float64')


def equalize_weights(model):
    """Give each channel the same range in the weights that produce it and in those that use it.

    Cross-layer equalization, arXiv 1906.04721, section 4.1. model: a fused network. Returns: a new network with the
    same outputs.
    """
    model = _copy(model)
    for _ in range(SWEEPS):
        for link in find_links(model):
            made, used = _largest(link[0].weight, 0), _largest(link[2].weight, _input_axis(link[2]))
            divide_activation(link, np.sqrt(made), np.sqrt(used))
    return model.to(dtype='float32')


def equalize_activations(model, largest):
    """Rescale channels by the ranges of their activations.

    Before a depthwise convolution, whose weights have a scale per channel, all channels get the same range. Before a
    dense layer, where all the weights of an output share a scale, the range is split between activations and weights:
    SmoothQuant with alpha 0.5, arXiv 2211.10438, equation 4. Links are processed from last to first, because scaling a
    layer's outputs changes the weights that determine how its inputs are scaled.

    model: a fused network; largest: from `find_largest`. Returns: a new network with the same outputs.
    """
    model = _copy(model)
    for link, top in reversed(list(zip(find_links(model), largest))):
        if _is_depthwise(link[2]):
            divide_activation(link, top)
        else:
            divide_activation(link, np.sqrt(top), np.sqrt(_largest(link[2].weight, _input_axis(link[2]))))
    return model.to(dtype='float32')


@paddle.no_grad()
def find_largest(model, spec, pixels):
    """Return the largest value of each channel after each ReLU of a fused network, as a list of float32 [C].

    With SE, it is the largest magnitude before SE instead, because that tensor is quantized too, negative values
    included. pixels: uint8 [N, size, size, 3].
    """
    normalize, found = Normalize(spec.mean, spec.std), []

    def observe(layer, inputs, output, transform):
        found[-1].append(transform(output).max([0, 2, 3]).numpy())
    hooks = [conv.register_forward_post_hook(functools.partial(observe, transform=nn.functional.relu if se is None else
                                                               paddle.abs)) for conv, se, _ in find_links(model)]
    for start in range(0, len(pixels), BATCH):
        found.append([])
        model(normalize(paddle.to_tensor(pixels[start:start + BATCH])))
    for hook in hooks:
        hook.remove()
    return [np.max(batches, axis=0) for batches in zip(*found)]


class _Images(CalibrationDataReader):
    """Batches of a model's input. The last is filled up with the first images, because a model may need full ones."""

    def __init__(self, spec, pixels):
        size = spec.batch or BATCH
        self.batches = ({'image': spec.to_input(pixels.take(range(start, start + size), axis=0, mode='wrap'))}
                        for start in range(0, len(pixels), size))

    def get_next(self):
        return next(self.batches, None)


def write_int8(model, spec, pixels, path):
    """Write a fused network as an int8 ONNX file with the inputs, outputs and metadata of `build_onnx`.

    Weights are signed, with a scale per output channel. Activations are unsigned, with a scale per tensor from their
    smallest and largest values on the calibration images. pixels: uint8 [N, size, size, 3].
    """
    proto = build_onnx(model, spec)
    # silences ONNX Runtime's advice to preprocess; nothing is left to fuse
    onnx.helper.set_model_props(proto, {'onnx.quant.pre_process': 'onnxruntime.quant'})
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        source = os.path.join(folder, 'float.onnx')
        onnx.save(proto, source)
        try:
            quantize_static(source, path, _Images(spec, pixels), QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=FLOAT_NODES)
        except DecodeError:  # the C++ code of onnx wrote a truncated file without noticing that the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, spec.to_metadata())
    onnx.save(proto, path)


def find_outputs(path, engine, spec, pixels):
    """Return the outputs, float32 [N, classes], of the model at a path for uint8 pixels [N, size, size, 3]."""
    return run_batches(LOADERS[engine](path, None, None)[1], spec, pixels)


def compare_outputs(outputs, expected):
    """Compare two arrays [N, classes].

    Returns: (fraction of rows with the same top-1, mean signal-to-noise ratio of the rows in dB).
    """
    signal, noise = ((array.astype('float64') ** 2).sum(axis=1) for array in (expected, outputs - expected))
    decibels = 10 * np.log10(np.maximum(signal, 1e-30) / np.maximum(noise, 1e-30)).mean()
    return float((outputs.argmax(axis=1) == expected.argmax(axis=1)).mean()), float(decibels)


def quantize(model, spec, pixels, path):
    """Replace the ONNX file of a fused network with an int8 one: plain, or equalized in one of two ways.

    Of every HOLD_OUT images, one is held out, and the variant with the highest signal-to-noise ratio on these is kept.
    Top-1 would be too coarse: with so few images, a single prediction could decide.

    pixels: uint8 [N, size, size, 3], images like those the network will see.
    Returns: ({variant: result of `compare_outputs`}, the kept variant, the held-out pixels, the network's outputs for
        them).
    """
    is_held_out = np.arange(len(pixels)) % HOLD_OUT == HOLD_OUT - 1
    pixels, held_out = pixels[~is_held_out], pixels[is_held_out]
    expected = find_outputs(path, 'onnxruntime', spec, held_out)
    variants = {'plain': model, 'weights equalized': equalize_weights(model),
                'activations equalized': equalize_activations(model, find_largest(model, spec, pixels))}
    scores = {}
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        for variant, network in variants.items():
            file = os.path.join(folder, f'{variant}.onnx')
            write_int8(network, spec, pixels, file)
            scores[variant] = compare_outputs(find_outputs(file, 'onnxruntime', spec, held_out), expected)
        best = max(scores, key=lambda variant: scores[variant][1])
        os.replace(os.path.join(folder, f'{best}.onnx'), path)
    return scores, best, held_out, expected
