"""Weight files and checkpoints: atomic writing, strict loading, latest and best."""
import glob
import itertools
import os
import re

import numpy as np
import paddle

from utils import LOG, UserError, first_few, misfits

LATEST, BEST = 'latest.pdparams', 'best.pdparams'
# what a checkpoint of training holds, and of which type
PARTS = {'model': dict, 'model_ema': dict, 'optimizer': dict, 'epoch': int, 'step': int, 'lr_scheduler': dict,
         'amp_grad_scaler': dict, 'best': dict, 'world_size': int}
CLASSIFIER = ('fc.weight', 'fc.bias')


def replace(path, write):
    """Let write(path of a new file) make the file `path`, whole or not at all."""
    partial = f'{path}.partial'
    try:
        write(partial)
        with open(partial, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f'{path}: cannot write ({error.strerror}); free the disk or choose another folder') from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def save(state, path):
    """Write nested dictionaries of tensors, arrays and plain numbers to `path`, whole or not at all."""
    replace(path, lambda partial: paddle.save(to_arrays(state), partial))


def to_arrays(state):
    """The same nested dictionaries with NumPy arrays in place of tensors."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, paddle.Tensor) else state


def check_exists(path):
    """Raises: UserError if `path`, unless empty, is no file."""
    if path and not os.path.isfile(path):
        raise UserError(f'{path}: no such weight file; give a .pdparams file (MODEL.PRETRAINED, MODEL.RESUME)')


def load(path):
    """What `save` or `paddle.save` wrote, with NumPy arrays. Raises: UserError for an unreadable file."""
    check_exists(path)
    try:
        return paddle.load(path, return_numpy=True)
    except Exception as error:  # unpickling a broken file raises nearly every type
        raise UserError(f'{path}: not a .pdparams file ({type(error).__name__}: '
                        f'{" ".join(str(error).split())[:200]})') from None


def load_training(path):
    """The checkpoint of a training, to be resumed: a dictionary of PARTS.

    Raises: UserError for a file that is none, a checkpoint of the PaddleViT port of MobileOne among them.
    """
    state = load(path)
    if not (isinstance(state, dict) and isinstance(state.get('model'), dict)):
        raise UserError(f'{path}: holds weights alone, which cannot be resumed; start from them with -pretrained')
    missing = [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]
    if missing:
        raise UserError(f'{path}: is no checkpoint of this project (no {", ".join(missing)}), and others cannot be '
                        'resumed; start from its weights with -pretrained')
    return state


def _checkpoints(folder):
    """Yield (path, state) of a folder's checkpoints of training, by name; what is none is passed over, and said."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.pdparams'))):
        try:
            yield path, load_training(path)
        except UserError as error:
            LOG.info(f'passed over: {error}')


def find_newest(folder):
    """(path, state) of the whole checkpoint of a folder that has seen the most epochs; None where there is none.

    Epochs, not steps: a run that is resumed with larger batches has fewer steps.
    Raises: UserError when there are checkpoints and none can be read: to start afresh would replace them.
    """
    newest = None
    for path, state in _checkpoints(folder):
        # of equal ones the last by name, which is latest.pdparams
        if newest is None or state['epoch'] >= newest[1]['epoch']:
            newest = path, state
    latest = os.path.join(folder, LATEST)
    if newest is None and os.path.exists(latest):
        raise UserError(f'{latest}: cannot be resumed (see above), nor is there another checkpoint in its folder; '
                        'remove it to start afresh, or choose another -output')
    return newest


def put_aside(folder, epoch):
    """Append .past to the names of a folder's checkpoints that are past an epoch. Returns: (old, new path) of each."""
    renamed = []
    for path, state in _checkpoints(folder):
        if state['epoch'] > epoch:
            names = itertools.chain([f'{path}.past'], (f'{path}.past-{number}' for number in itertools.count(2)))
            renamed.append((path, next(name for name in names if not os.path.exists(name))))
    for path, new in renamed:
        os.replace(path, new)
    return renamed


def load_weights(path):
    """The weights in a released .pdparams or in a checkpoint of training.

    Returns: ({name: array}, whether they are a checkpoint's EMA, which goes before its raw weights).
    Raises: UserError for a file that holds neither.
    """
    state, is_ema = load(path), False
    if isinstance(state, dict) and isinstance(state.get('model'), dict):
        is_ema = bool(state.get('model_ema'))
        state = state['model_ema'] if is_ema else state['model']
    if not isinstance(state, dict):
        raise UserError(f'{path}: holds {type(state).__name__}, not a dictionary of weights')
    state = {key: value for key, value in state.items() if key != 'StructuredToParameterName@@'}
    if not any(str(key).startswith('stages.') for key in state):
        raise UserError(f'{path}: holds no MobileOne weights (no key starts with "stages."); official PyTorch files '
                        'are converted by load_pytorch_weights.py')
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, np.ndarray) and value.dtype.kind == 'f'):
            raise UserError(f'{path}: {key} is {type(value).__name__}, not an array of floats')
    return state, is_ema


def is_fused(weights):
    """Whether the names are those of a fused network."""
    return not any('_blocks.' in name for name in weights)


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
            tensor.set_value(weights[name].astype(tensor.numpy().dtype))
    return left_out


def prune(folder, keep):
    """Remove all but the newest `keep` epoch_N.pdparams of a folder; 0 keeps all."""
    pattern = re.compile(r'epoch_(\d+)\.pdparams')
    epochs = {int(match[1]): path for path in glob.glob(os.path.join(glob.escape(folder), 'epoch_*.pdparams'))
              for match in [pattern.fullmatch(os.path.basename(path))] if match}
    for epoch in sorted(epochs)[:-keep] if keep else []:
        os.remove(epochs[epoch])
