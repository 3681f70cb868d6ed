"""MobileOne's weight files: which network their keys ask for, strict loading, the names of other projects."""
from typing import NamedTuple

import numpy as np

from config import with_values
from mobileone import build_mobileone, model_convert
from runtime import checkpoint
from utils import LOG, UserError, first_few, misfits

CLASSIFIER = ('fc.weight', 'fc.bias')


def load_model(config, path, raw=False):
    """The network of a config with the weights in a file: the fused network if they are those of one.

    With MODEL.DEPLOY, unfused weights are fused after they are loaded; MODEL.NUM_CLASSES 0 is as many as the weights
    have. Nothing of the file is executed.
    raw: as in `load_weights`.
    Returns: (model, whether the weights are a checkpoint's EMA).
    Raises: UserError for a file that cannot be read, and for tensors that do not fit.
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
    """The network to train from the weights in a file; a classifier of another size starts from random weights.

    Returns: (model, whether it does).
    Raises: UserError as `load_model`, and for fused weights.
    """
    weights, is_ema = load_weights(path)
    if is_fused(weights):
        raise UserError(f'{path}: holds fused weights, which cannot be trained; give the unfused ones')
    model = build_mobileone(config)
    left_out = load_into(model, weights, path, allow_other_classifier=True)
    LOG.info(f'loaded {"EMA " if is_ema else ""}weights from {path}')
    if left_out:
        LOG.info(f'left out {", ".join(left_out)}, made for {weights[left_out[-1]].shape[-1]} classes, not '
                 f'{config.MODEL.NUM_CLASSES}: the classifier starts from random weights')
    return model, bool(left_out)


def with_classes_of(config, path):
    """A config whose MODEL.NUM_CLASSES, if it is 0, is the number of classes of the weights in a file.

    Raises: UserError for a file that cannot be read.
    """
    if config.MODEL.NUM_CLASSES:
        return config
    bias = load_weights(path)[0].get('fc.bias')
    return config if bias is None else with_values(config, {'MODEL.NUM_CLASSES': bias.size})


def load_weights(path, raw=False):
    """The weights in a released .pdparams or .safetensors, or in a checkpoint of training.

    raw: take a checkpoint's raw weights, before which its EMA goes otherwise.
    Returns: ({name: array}, whether they are a checkpoint's EMA).
    Raises: UserError for a file that holds neither.
    """
    state, is_ema = checkpoint.load(path), False
    if isinstance(state, dict) and isinstance(state.get('model'), dict):
        is_ema = not raw and isinstance(state.get('model_ema'), dict) and bool(state['model_ema'])
        state = state['model_ema'] if is_ema else state['model']
    if not isinstance(state, dict):
        raise UserError(f'{path}: holds {type(state).__name__}, not a dictionary of weights')
    state = {key: value for key, value in state.items() if key != 'StructuredToParameterName@@'}
    # timm's stages are called `stages.`, too, but its stem is not one of them
    if not any(key.startswith('stages.') for key in state) or any(key.startswith('stem.') for key in state):
        raise UserError(f'{path}: holds no MobileOne weights under the names of this project (stages.0.0.dw_...); '
                        "official PyTorch files and timm's are converted by load_pytorch_weights.py")
    checkpoint.check_floats(state, path)
    return state, is_ema


def is_fused(names):
    """Whether tensors of these names are those of a fused network."""
    return not any('_blocks.' in name for name in names)


def build_network(config, fused):
    """The network of a config, fused or not, whatever its MODEL.DEPLOY says; with random weights."""
    return build_mobileone(with_values(config, {'MODEL.DEPLOY': fused}))


def load_into(model, weights, path, allow_other_classifier=False):
    """Load weights into a model; every tensor must be there, with its shape, and no other.

    allow_other_classifier: leave out `fc.*` if its shape differs (another NUM_CLASSES).
    Returns: names that were left out.
    Raises: UserError that names the tensors which do not match, and `path`.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: list(value.shape) for name, value in weights.items()}
    left_out = []
    if allow_other_classifier:
        left_out = [name for name in CLASSIFIER if name in found and found[name] != expected[name]]
        expected = {name: shape for name, shape in expected.items() if name not in left_out}
        weights = {name: value for name, value in weights.items() if name not in left_out}
    problems = misfits(expected, {name: found[name] for name in weights})
    if problems:
        raise UserError(f'{path}: does not fit the network of the config: {first_few(problems)}; '
                        'give the -cfg (and MODEL.NUM_CLASSES) that these weights belong to')
    for name, tensor in model.state_dict().items():
        if name not in left_out:
            with np.errstate(over='ignore'):  # infinite then, which the loss will be, and is refused
                tensor.set_value(weights[name].astype(tensor.numpy().dtype))
    return left_out


class Layout(NamedTuple):
    """How a PyTorch file names the tensors of its MobileOne."""
    name: str  # of LAYOUTS
    fused: bool
    prefix: str  # of the MobileOne in a larger network: '', 'module.', 'backbone.'
    description: str  # of the file, for people


def find_layout(state_dict):
    """The Layout of a PyTorch state dict, seen from the names of its tensors. Raises: UserError unless there is one."""
    # the stem's convolution is there whatever the config says
    stems = {(name, fused): function(f'stages.0.0.dw_3x3{"" if fused else "_blocks.0"}.conv.weight')
             for name, function in LAYOUTS.items() for fused in (True, False)}
    found = [_describe(state_dict, name, fused, key[:-len(stem)]) for (name, fused), stem in stems.items()
             for key in state_dict if f'.{key}'.endswith(f'.{stem}')]
    if not found:
        raise UserError(f'the checkpoint holds no MobileOne under the official names or timm\'s (no tensor is called '
                        f'{" or ".join(stems.values())}), but {first_few(list(state_dict)) or "nothing"}; give a '
                        'checkpoint of a MobileOne')
    if len(found) > 1:
        raise UserError(f'the checkpoint holds {len(found)} MobileOnes: '
                        f'{first_few([layout.description for layout in found])}; save one of them alone')
    return found[0]


def _describe(state_dict, name, fused, prefix):
    classifier = state_dict.get(prefix + LAYOUTS[name]('fc.weight'))
    others = sum(not key.startswith(prefix) for key in state_dict)
    return Layout(name, fused, prefix, ''.join([
        f'{name} names, {"fused" if fused else "unfused"}', f", under the prefix '{prefix}'" if prefix else '',
        ', no classifier' if classifier is None else f', a classifier of {list(classifier.shape)}',
        f', other tensors left out: {others}' if others else '']))


def convert_state_dict(state_dict, config):
    """Rename the MobileOne in a PyTorch state dict, official or timm's, to the Paddle network of a config.

    state_dict: {name: float array, or uint16 array of a bfloat16's bits}, as `find_layout` describes. Tensors beside
        the prefix are left out; arrays are copied only once their shapes fit.
    Returns: {Paddle name: float32 array}, in the order of the network's own state dict.
    Raises: UserError that names missing, unexpected and misshapen tensors, and says what the state dict looks like.
    """
    layout = find_layout(state_dict)
    tensors = {name[len(layout.prefix):]: value for name, value in state_dict.items() if name.startswith(layout.prefix)}
    network = build_network(config, layout.fused).state_dict()
    names = {name: LAYOUTS[layout.name](name) for name in network}
    if not any(names[name] in tensors for name in CLASSIFIER):
        raise UserError(f'the checkpoint ({layout.description}) lacks the classifier that weight files have: add '
                        f'{" and ".join(layout.prefix + names[name] for name in CLASSIFIER)} to it; random values do '
                        'for fine-tuning')
    # PyTorch keeps fc.weight as [out, in], Paddle as [in, out]
    expected = {names[name]: list(tensor.shape)[::-1 if name == 'fc.weight' else 1] for name, tensor in network.items()}
    # the batch counters of PyTorch's batch norms have no counterpart; each belongs to a batch norm that is used
    counters = {name.replace('running_mean', 'num_batches_tracked') for name in expected if 'running_mean' in name}
    tensors = {name: value for name, value in tensors.items() if name not in counters}
    problems = misfits(expected, {name: list(value.shape) for name, value in tensors.items()})
    if problems:
        raise UserError(f'the checkpoint ({layout.description}) does not fit the network of the config: '
                        f'{first_few(problems)}; give the -cfg of its variant, and what differs from it with -opts, '
                        'MODEL.NUM_CLASSES for example')
    tensors = {name: _from_bfloat16(value) for name, value in tensors.items()}
    checkpoint.check_floats(tensors, 'the checkpoint')
    converted = {name: tensors[names[name]] for name in network}
    converted['fc.weight'] = converted['fc.weight'].T
    return {name: np.ascontiguousarray(value, 'float32') for name, value in converted.items()}


def _from_bfloat16(array):
    """Bits of bfloat16, which are the upper half of a float32's, as float32; other arrays as they are."""
    return (array.astype('uint32') << 16).view('float32') if array.dtype == 'uint16' else array


def official_name(name):
    """The official PyTorch name of a Paddle name, e.g. stages.1.0.pw_skip._mean -> stage1.1.rbr_skip.running_mean.

    The stem `stages.0.0` is `stage0`; a block's depthwise and pointwise layers are two blocks, 2j and 2j + 1.
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
    """timm's name of a Paddle name, e.g. stages.1.0.pw_skip._mean -> stages.0.1.identity.running_mean.

    Its stem is no stage, so that its stages count from 0; otherwise it names the same tensors as the official network.
    """
    place, rest = official_name(name).split('.', 1)
    place = {'linear': 'head.fc', 'stage0': 'stem'}.get(place) or f'stages.{int(place[-1]) - 1}'
    for official, own in (('rbr_conv', 'conv_kxk'), ('rbr_scale', 'conv_scale'), ('rbr_skip', 'identity'),
                          ('se.reduce', 'attn.fc1'), ('se.expand', 'attn.fc2')):
        rest = rest.replace(official, own)
    return f'{place}.{rest}'


# whose names the tensors of a PyTorch file have -> their name of a Paddle name
LAYOUTS = {'official': official_name, 'timm': timm_name}
