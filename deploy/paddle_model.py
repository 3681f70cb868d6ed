"""Write a fused MobileOne for Paddle Inference, with the inference.yml that PaddleX 3 reads."""
import contextlib
import copy
import io
import os

import paddle
import paddle.nn as nn
import yaml
from paddle.base.layer_helper import LayerHelper
from paddle.static import InputSpec

from deploy.predictor import CARD
from mobileone import ConvNorm, SEBlock


class _Exported(nn.Layer):
    """Images [N, 3, H, W] in the form of spec.pixels -> logits [N, C], or probabilities with spec.softmax."""

    def __init__(self, model, spec):
        super().__init__()
        self.model, self.spec = model, spec
        self.shift, self.scale = map(paddle.to_tensor, spec.shift_and_scale())

    def forward(self, image):
        if self.spec.pixels != 'normalized':
            image = (image.astype('float32') - self.shift) * self.scale
        logits = self.model(image)
        return nn.functional.softmax(logits) if self.spec.softmax else logits


def with_batch_norms(model):
    """Return a copy of a fused network with each bias moved into a batch norm that does nothing else.

    oneDNN in PaddlePaddle 2.6.2 merges a convolution with a batch norm, but not with its own bias.
    """
    model = copy.deepcopy(model)
    for layer in model.sublayers():
        if isinstance(layer, ConvNorm):
            norm = nn.BatchNorm2D(layer.conv.weight.shape[0], epsilon=0.0)
            norm.bias.set_value(layer.conv.bias)
            layer.conv.bias = None
            layer.add_sublayer('norm', norm)
    model.eval()
    return model


class _OldSigmoid(nn.Layer):
    """A sigmoid for programs in the 2.x format, where PaddlePaddle 3.3.1's own sigmoid raises."""

    def forward(self, x):
        helper = LayerHelper('sigmoid')
        y = helper.create_variable_for_type_inference(x.dtype)
        helper.append_op(type='sigmoid', inputs={'X': [x]}, outputs={'Out': [y]})
        return y


def _with_old_sigmoids(model):
    model = copy.deepcopy(model)
    for layer in model.sublayers():
        if isinstance(layer, SEBlock):
            layer.sigmoid = _OldSigmoid()
    return model


def write_paddle(model, spec, folder, plain=False):
    """Write a fused network to `folder`: inference.pdiparams, inference.yml and its programs.

    The programs are inference.pdmodel, which every PaddlePaddle version reads, and on 3.x also inference.json.
    plain: on 2.x, keep plain biases instead of `with_batch_norms`, for benchmarks.
    Returns: the file names of the programs.
    """
    size = [spec.batch, 3, spec.image_size, spec.image_size]
    inputs = [InputSpec(size, 'uint8' if spec.pixels == 'uint8' else 'float32', 'image')]
    path = os.path.join(folder, 'inference')
    if paddle.__version__.startswith('2.'):
        programs = {'inference.pdmodel': (model if plain else with_batch_norms(model), contextlib.nullcontext)}
    else:
        programs = {'inference.pdmodel': (_with_old_sigmoids(model), paddle.pir_utils.OldIrGuard),
                    'inference.json': (model, contextlib.nullcontext)}
    for network, context in programs.values():
        layer = _Exported(network, spec)
        layer.eval()
        # both programs have the same parameters, so the second save writes the same inference.pdiparams again
        with context(), contextlib.redirect_stderr(io.StringIO()):
            paddle.jit.save(paddle.jit.to_static(layer, input_spec=inputs), path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(f'{path}.pdiparams.info')
    with open(os.path.join(folder, CARD), 'w', encoding='utf-8') as file:
        yaml.safe_dump(describe(spec), file, sort_keys=False, allow_unicode=True)
    return list(programs)


def describe(spec):
    """Return the content of inference.yml: PaddleX's preprocessing and postprocessing, and the Spec.

    PaddleX rounds the longer side to the nearest pixel; evaluation rounds down, so the crops may differ by one pixel.
    """
    mean, std = ([0.0] * 3, [1.0] * 3) if spec.pixels != 'normalized' else (list(spec.mean), list(spec.std))
    interpolation = 'LANCZOS4' if spec.interpolation == 'lanczos' else spec.interpolation.upper()
    steps = [{'ResizeImage': {'resize_short': spec.transform.resize, 'interpolation': interpolation, 'backend': 'pil'}},
             {'CropImage': {'size': spec.image_size}},
             {'NormalizeImage': {'mean': mean, 'std': std, 'scale': 1.0 if spec.pixels == 'uint8' else 1 / 255,
                                 'order': '', 'channel_num': 3}},
             {'ToCHWImage': None}]
    return {'Global': {'model_name': spec.name}, 'PreProcess': {'transform_ops': steps},
            'PostProcess': {'Topk': {'topk': 5, 'label_list': list(spec.class_names)}},
            'MobileOne': spec.to_metadata()}
