"""MobileOne's weight files: which network their keys ask for, strict loading, the names of other projects."""
import numpy as np

from config import with_values
from mobileone import build_mobileone, model_convert
from runtime import checkpoint
from utils import LOG, UserError, first_few, misfits

CLASSIFIER = ('fc.weight', 'fc.bias')


def load_model(config, path, allow_other_classifier=False):
    """The network of a config with the weights in a file: the fused network if they are those of one.

    With MODEL.DEPLOY, unfused weights are fused after they are loaded. Nothing of the file is executed.
    allow_other_classifier: a classifier of another size stays random.
    Returns: (model, whether the weights are a checkpoint's EMA).
    Raises: UserError for a file that cannot be read, and for tensors that do not fit.
    """
    weights, is_ema = load_weights(path)
    fused = is_fused(weights)
    model = build_network(config, fused)
    left_out = load_into(model, weights, path, allow_other_classifier)
    LOG.info(f'loaded {"EMA " if is_ema else ""}weights ({"fused" if fused else "unfused"}) from {path}')
    if left_out:
        LOG.info(f'left out {", ".join(left_out)}, made for {weights[left_out[-1]].shape[-1]} classes, not '
                 f'{config.MODEL.NUM_CLASSES}: the classifier starts from random weights')
    if config.MODEL.DEPLOY and not fused:
        model = model_convert(model)
        LOG.info('fused the branches')
    return model, is_ema


def load_weights(path):
    """The weights in a released .pdparams or .safetensors, or in a checkpoint of training.

    Returns: ({name: array}, whether they are a checkpoint's EMA, which goes before its raw weights).
    Raises: UserError for a file that holds neither.
    """
    state, is_ema = checkpoint.load(path), False
    if isinstance(state, dict) and isinstance(state.get('model'), dict):
        is_ema = isinstance(state.get('model_ema'), dict) and bool(state['model_ema'])
        state = state['model_ema'] if is_ema else state['model']
    if not isinstance(state, dict):
        raise UserError(f'{path}: holds {type(state).__name__}, not a dictionary of weights')
    state = {key: value for key, value in state.items() if key != 'StructuredToParameterName@@'}
    if not any(key.startswith('stages.') for key in state):
        raise UserError(f'{path}: holds no MobileOne weights (no key starts with "stages."); official PyTorch files '
                        'are converted by load_pytorch_weights.py')
    checkpoint.check_floats(state, path)
    return state, is_ema


def is_fused(names):
    """Whether tensors of these names, ours or the official ones, are those of a fused network."""
    return not any('_blocks.' in name or 'rbr_conv' in name for name in names)


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


def convert_state_dict(state_dict, config):
    """Rename an official PyTorch state dict to the Paddle network of a config.

    state_dict: {official name: tensor or array}, fused or unfused.
    Returns: {Paddle name: ndarray}, in the order of the network's own state dict.
    Raises: UserError that names missing, unexpected and misshapen tensors.
    """
    converted, used, problems = {}, set(), []
    for name, target in build_network(config, is_fused(state_dict)).state_dict().items():
        official = official_name(name)
        used.add(official)
        if official not in state_dict:
            problems.append(f'missing {official}')
            continue
        value = np.asarray(state_dict[official])
        value = value.T if name == 'fc.weight' else value  # PyTorch keeps [out, in], Paddle [in, out]
        if list(value.shape) != list(target.shape):
            problems.append(f'{official} is {list(state_dict[official].shape)}, which does not fit {name} '
                            f'{list(target.shape)}')
        converted[name] = np.ascontiguousarray(value)
    # the batch counters of PyTorch's batch norms have no counterpart; each belongs to a batch norm that is used
    counters = {name.replace('running_mean', 'num_batches_tracked') for name in used if 'running_mean' in name}
    problems += [f'unexpected {name}' for name in state_dict if name not in used | counters]
    if problems:
        raise UserError(f'the checkpoint does not fit the network of the config: {first_few(problems)}; '
                        'give the -cfg of its variant')
    return converted


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
