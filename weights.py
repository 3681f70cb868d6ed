"""MobileOne's weight files: build the network that fits their keys, load strictly, convert other projects' names."""
from typing import NamedTuple

import numpy as np

from config import with_values
from mobileone import build_mobileone, model_convert
from runtime import checkpoint
from utils import LOG, UserError, first_few, mismatches

CLASSIFIER = ('fc.weight', 'fc.bias')


def load_model(config, path, raw=False):
    """Build the network of a config with the weights in a file; fused weights give a fused network.

    With MODEL.DEPLOY, unfused weights are fused after loading. MODEL.NUM_CLASSES 0 takes the number from the weights.
    Nothing in the file is executed.
    raw: as in `load_weights`.
    Returns: (model, in training mode unless it was fused here; whether the weights are a checkpoint's EMA).
    Raises: UserError for a file that cannot be read, tensors that do not fit, or a config that describes no network.
    """
    config = with_classes_of(config, path)
    weights, is_ema = load_weights(path, raw)
    fused = is_fused(weights)
    model = build_network(config, fused)
    load_into(model, weights, path)
    LOG.info(f'loaded {"EMA " if is_ema else ""}weights ({"fused" if fused else "unfused"}) from {path}')
    if config.MODEL.DEPLOY and not fused:
        model = model_convert(model)
        LOG.info('fused the branches')
    return model, is_ema


def load_start(config, path):
    """Build the network to train from the weights in a file. A classifier of another size starts from random weights.

    Returns: (model, whether its classifier is random).
    Raises: UserError as `load_model`, and for fused weights.
    """
    weights, is_ema = load_weights(path)
    if is_fused(weights):
        raise UserError(f'{path}: contains fused weights, which cannot be trained; use the unfused ones')
    model = build_mobileone(config)
    left_out = load_into(model, weights, path, allow_other_classifier=True)
    LOG.info(f'loaded {"EMA " if is_ema else ""}weights from {path}')
    if left_out:
        LOG.info(f'skipped {", ".join(left_out)}, made for {weights[left_out[-1]].shape[-1]} classes, not '
                 f'{config.MODEL.NUM_CLASSES}: the classifier starts from random weights')
    return model, bool(left_out)


def with_classes_of(config, path):
    """Return the config, with MODEL.NUM_CLASSES 0 replaced by the number of classes in a weight file.

    Raises: UserError for a file that cannot be read.
    """
    if config.MODEL.NUM_CLASSES:
        return config
    bias = load_weights(path)[0].get('fc.bias')
    return config if bias is None else with_values(config, {'MODEL.NUM_CLASSES': bias.size})


def load_weights(path, raw=False):
    """Read the weights in a released .pdparams or .safetensors file, or in a training checkpoint.

    raw: take a checkpoint's raw weights even if it has EMA weights.
    Returns: ({name: array}, whether they are a checkpoint's EMA).
    Raises: UserError for a file that cannot be read or contains no MobileOne weights.
    """
    state, is_ema = checkpoint.load(path), False
    if isinstance(state, dict) and isinstance(state.get('model'), dict):
        is_ema = not raw and isinstance(state.get('model_ema'), dict) and bool(state['model_ema'])
        state = state['model_ema'] if is_ema else state['model']
    if not isinstance(state, dict):
        raise UserError(f'{path}: contains {type(state).__name__}, not a dictionary of weights; use another file')
    state = {key: value for key, value in state.items() if key != 'StructuredToParameterName@@'}
    # timm's stages are also named `stages.`, but its stem is not one of them
    if not any(key.startswith('stages.') for key in state) or any(key.startswith('stem.') for key in state):
        raise UserError(f'{path}: contains no MobileOne weights with the names of this project (stages.0.0.dw_...); '
                        'convert official PyTorch and timm files with load_pytorch_weights.py')
    checkpoint.check_floats(state, path)
    return state, is_ema


def is_fused(names):
    """Whether these tensor names are those of a fused network."""
    return not any('_blocks.' in name for name in names)


def build_network(config, fused):
    """Build the network of a config with random weights, fused or not, regardless of MODEL.DEPLOY."""
    return build_mobileone(with_values(config, {'MODEL.DEPLOY': fused}))


def load_into(model, weights, path, allow_other_classifier=False):
    """Load weights into a model. The names and shapes of all tensors must match exactly.

    allow_other_classifier: skip `fc.*` if its shape differs (another NUM_CLASSES).
    Returns: names of the skipped tensors.
    Raises: UserError that names `path` and the tensors that do not match; the model is then unchanged.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    left_out = []
    if allow_other_classifier:
        left_out = [name for name in CLASSIFIER if name in found and found[name] != expected[name]]
        expected = {name: shape for name, shape in expected.items() if name not in left_out}
        weights = {name: value for name, value in weights.items() if name not in left_out}
    problems = mismatches(expected, {name: found[name] for name in weights})
    if problems:
        raise UserError(f'{path}: does not fit the network of the config: {first_few(problems)}; '
                        'use the -cfg (and MODEL.NUM_CLASSES) that these weights belong to')
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            with np.errstate(over='ignore'):  # overflows become inf, which the check of the loss catches
                tensor.set_value(weights[name].astype(tensor.numpy().dtype))
    return left_out


class Layout(NamedTuple):
    """How a PyTorch file names the tensors of the MobileOne in it."""
    name: str  # a key of LAYOUTS
    fused: bool
    prefix: str  # of the MobileOne's names in a larger network: '', 'module.', 'backbone.'
    description: str  # of the file, for messages


def find_layout(state_dict):
    """Infer the Layout of a PyTorch state dict from its tensor names. Raises: UserError unless exactly one fits."""
    # every network has the stem's convolution
    stems = {(name, fused): function(f'stages.0.0.dw_3x3{"" if fused else "_blocks.0"}.conv.weight')
             for name, function in LAYOUTS.items() for fused in (True, False)}
    found = [_describe(state_dict, name, fused, key[:-len(stem)]) for (name, fused), stem in stems.items()
             for key in state_dict if f'.{key}'.endswith(f'.{stem}')]
    if not found:
        raise UserError('the checkpoint contains no MobileOne with official or timm names (no tensor is named '
                        f'{" or ".join(stems.values())}), but {first_few(list(state_dict)) or "nothing"}; give a '
                        'checkpoint of a MobileOne')
    if len(found) > 1:
        raise UserError(f'the checkpoint contains {len(found)} MobileOnes: '
                        f'{first_few([layout.description for layout in found])}; save only one of them')
    return found[0]


def _describe(state_dict, name, fused, prefix):
    classifier = state_dict.get(prefix + LAYOUTS[name]('fc.weight'))
    others = sum(not key.startswith(prefix) for key in state_dict)
    return Layout(name, fused, prefix, ''.join([
        f'{name} names, {"fused" if fused else "unfused"}', f", prefix '{prefix}'" if prefix else '',
        ', no classifier' if classifier is None else f', classifier {list(classifier.shape)}',
        f', other tensors ignored: {others}' if others else '']))


def convert_state_dict(state_dict, config):
    """Convert the MobileOne in a PyTorch state dict, official or timm, to the Paddle names of a config's network.

    state_dict: {name: float array, or uint16 array with the bits of bfloat16}. Tensors outside the prefix of the
        MobileOne are ignored. Arrays are copied only after their shapes have been checked.
    Returns: {Paddle name: float32 array}, in the order of the network's own state dict.
    Raises: UserError that describes the state dict and names missing, unexpected and misshapen tensors.
    """
    layout = find_layout(state_dict)
    tensors = {name[len(layout.prefix):]: value for name, value in state_dict.items() if name.startswith(layout.prefix)}
    network = build_network(config, layout.fused).state_dict()
    names = {name: LAYOUTS[layout.name](name) for name in network}
    if not any(names[name] in tensors for name in CLASSIFIER):
        raise UserError(f'the checkpoint ({layout.description}) lacks the classifier that weight files have: add '
                        f'{" and ".join(layout.prefix + names[name] for name in CLASSIFIER)} to it; random values are '
                        'enough for fine-tuning')
    # PyTorch stores fc.weight as [out, in], Paddle as [in, out]
    expected = {names[name]: list(tensor.shape)[::-1 if name == 'fc.weight' else 1] for name, tensor in network.items()}
    # drop the batch counters of PyTorch's batch norms, which Paddle lacks; a counter without its batch norm is an error
    counters = {name.replace('running_mean', 'num_batches_tracked') for name in expected if 'running_mean' in name}
    tensors = {name: value for name, value in tensors.items() if name not in counters}
    problems = mismatches(expected, {name: list(value.shape) for name, value in tensors.items()})
    if problems:
        raise UserError(f'the checkpoint ({layout.description}) does not fit the network of the config: '
                        f'{first_few(problems)}; give the -cfg of its variant, and any differences from it with -opts '
                        '(MODEL.NUM_CLASSES for example)')
    tensors = {name: _from_bfloat16(value) for name, value in tensors.items()}
    checkpoint.check_floats(tensors, 'the checkpoint')
    converted = {name: tensors[names[name]] for name in network}
    converted['fc.weight'] = converted['fc.weight'].T
    return {name: np.ascontiguousarray(value, 'float32') for name, value in converted.items()}


def _from_bfloat16(array):
    """Convert uint16 bits of bfloat16 (the upper half of a float32) to float32; return other arrays unchanged."""
    return (array.astype('uint32') << 16).view('float32') if array.dtype == 'uint16' else array


def official_name(name):
    """Return the official PyTorch name of a Paddle name: stages.1.0.pw_skip._mean -> stage1.1.rbr_skip.running_mean.

    The stem `stages.0.0` is `stage0`. The depthwise and pointwise layers of block j are official blocks 2j and 2j + 1.
    """
    if name.startswith('fc.'):
        return name.replace('fc.', 'linear.')
    _, stage, block, part, rest = name.split('.', 4)
    layer, part = part.split('_', 1)
    prefix = 'stage0' if stage == '0' else f'stage{stage}.{2 * int(block) + (layer == "pw")}'
    if part == 'se':
        return f'{prefix}.se.{rest}'
    if rest.startswith('conv.') and (layer, part) in (('dw', '3x3'), ('pw', '1x1')):
        return f'{prefix}.reparam_conv.{rest[len("conv."):]}'
    branch = {'skip': 'rbr_skip', '1x1': 'rbr_scale'}.get(part, 'rbr_conv')
    rest = rest.replace('norm.', 'bn.').replace('_mean', 'running_mean').replace('_variance', 'running_var')
    return f'{prefix}.{branch}.{rest}'


def timm_name(name):
    """Return timm's name of a Paddle name: stages.1.0.pw_skip._mean -> stages.0.1.identity.running_mean.

    timm's stem is not a stage, so its stages count from 0. It has the same tensors as the official network.
    """
    place, rest = official_name(name).split('.', 1)
    place = {'linear': 'head.fc', 'stage0': 'stem'}.get(place) or f'stages.{int(place[-1]) - 1}'
    for official, own in (('rbr_conv', 'conv_kxk'), ('rbr_scale', 'conv_scale'), ('rbr_skip', 'identity'),
                          ('se.reduce', 'attn.fc1'), ('se.expand', 'attn.fc2')):
        rest = rest.replace(official, own)
    return f'{place}.{rest}'


# naming scheme of a PyTorch file -> function that returns its name for a Paddle name
LAYOUTS = {'official': official_name, 'timm': timm_name}
