"""Weight files and checkpoints on the disk: written whole or not at all, read without executing them, the newest."""
import functools
import glob
import hashlib
import math
import os
import pathlib

import numpy as np
import paddle

from runtime.files import check_regular, replace
from runtime.safe_pickle import check_key, read_pickle
from utils import LOG, UserError, describe_error, first_few, misfits

LATEST, BEST = 'latest.pdparams', 'best.pdparams'
# what a checkpoint of training holds, and of which type
PARTS = {'model': dict, 'model_ema': dict, 'optimizer': dict, 'epoch': int, 'step': int, 'lr_scheduler': dict,
         'amp_grad_scaler': dict, 'best': dict, 'world_size': int, 'progress': dict}
# of its parts: the best epoch; how far the next epoch is, empty after a whole one; PaddlePaddle's GradScaler, empty
# where it does nothing
PARTS_OF = {
    'best': {'acc1': float, 'epoch': int},
    'progress': {'steps': int, 'seconds': float, 'sums': np.ndarray, 'steps_per_epoch': int, 'total_batch': int},
    'amp_grad_scaler': {'scale': np.ndarray, 'incr_ratio': float, 'decr_ratio': float, 'incr_every_n_steps': int,
                        'decr_every_n_nan_or_inf': int, 'incr_count': int, 'decr_count': int,
                        'use_dynamic_loss_scaling': bool},
}
SAFETENSORS = '.safetensors'
# bytes of the header of such a file: that of a network of a thousand tensors has 0.1 million
_LONGEST_HEADER = 1_000_000
# its data types; NumPy has no bfloat16, whose bits Paddle keeps as uint16
_DTYPES = {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': '<u2', 'I64': '<i8', 'I32': '<i4', 'I16': '<i2',
           'I8': 'i1', 'U64': '<u8', 'U32': '<u4', 'U8': 'u1', 'BOOL': '?'}


def save(state, path):
    """Write nested dictionaries of tensors, arrays and plain numbers to `path`, whole or not at all.

    A path that ends in .safetensors takes a flat dictionary of tensors or arrays.
    Raises: UserError for a file that cannot be written, and without safetensors for such a path.
    """
    arrays = to_arrays(state)
    if path.endswith(SAFETENSORS):
        safetensors = _import_safetensors(path)
        others = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
        if others:
            raise UserError(f'{path}: holds only arrays, not {type(arrays[others[0]]).__name__} under {others[0]!r}; '
                            'save it as .pdparams')
        replace(path, lambda partial: pathlib.Path(partial).write_bytes(safetensors.numpy.save(arrays)))
    else:
        replace(path, lambda partial: paddle.save(arrays, partial))


def _import_safetensors(path):
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(f'{path}: needs safetensors: pip install safetensors') from None
    return safetensors


def _read_safetensors(safetensors, data):
    if int.from_bytes(data[:8], 'little') > _LONGEST_HEADER:
        raise ValueError(f'its header is longer than {_LONGEST_HEADER:,} bytes, which no weights need')
    return {check_key(name): np.frombuffer(tensor['data'], _DTYPES[tensor['dtype']]).reshape(tensor['shape'])
            for name, tensor in safetensors.deserialize(data)}


def to_arrays(state):
    """The same nested dictionaries with NumPy arrays in place of tensors."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, paddle.Tensor) else state


def check_exists(path, key=''):
    """Raises: UserError if `path`, unless empty, is no file, or one that is larger than the machine's memory.

    key: the config's that names it, for the message.
    """
    check_regular(path, key)
    if path and not os.path.isfile(path):
        raise UserError(f'{path}: no such weight file; check the path{f", {key}" if key else ""}')
    if path and os.path.getsize(path) > _memory():
        raise _too_large(path)


def _memory():
    """Bytes of the machine's memory; no bound where the system does not say (Windows)."""
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else math.inf


def _too_large(path):
    return UserError(f'{path}: memory does not suffice for its {os.path.getsize(path):,} bytes; check that it is the '
                     'file that you mean, or use a machine with more of it')


def sha256(path):
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def load(path):
    """What `save` or `paddle.save` wrote, with NumPy arrays; or the arrays of a .safetensors file.

    Nothing in the file is executed (`read_pickle`). Its SHA-256 is logged.
    Raises: UserError for an unreadable file, naming what was refused in it.
    """
    check_exists(path)
    try:
        return _load(path)
    except MemoryError:
        raise _too_large(path) from None


def _load(path):
    with open(path, 'rb') as file:
        data = file.read()
    LOG.info(f'{path}: {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}')
    is_pickle = not path.endswith(SAFETENSORS)
    read = read_pickle if is_pickle else functools.partial(_read_safetensors, _import_safetensors(path))
    try:
        return read(data)
    except MemoryError:
        raise
    except Exception as error:  # a broken file raises nearly every type
        raise UserError(f'{path}: not a {".pdparams" if is_pickle else SAFETENSORS} file that can be read safely '
                        f'({describe_error(error, 200)}); nothing of it was executed; get it again from its '
                        'publisher') from None


def load_training(path):
    """The checkpoint of a training, to be resumed: a dictionary of PARTS.

    Raises: UserError for a file that is none, or that another project has written.
    """
    state = load(path)
    if not (isinstance(state, dict) and isinstance(state.get('model'), dict)):
        raise UserError(f'{path}: holds weights alone, which cannot be resumed; start from them with -pretrained')
    state.setdefault('progress', {})  # checkpoints of earlier versions end with an epoch
    missing = _missing(PARTS, state)
    if not missing:
        for part, kinds in PARTS_OF.items():
            missing += _missing(kinds, state[part], f'{part}.') if state[part] or part == 'best' else []
    if missing:
        raise UserError(f'{path}: is no checkpoint of this project (no {", ".join(missing)}), and others cannot be '
                        'resumed; start from its weights with -pretrained')
    numbers = {f'{part}.{name}': np.asarray(state[part][name]) for part, kinds in PARTS_OF.items() if state[part]
               for name, kind in kinds.items() if kind in (float, np.ndarray)}
    expected = {'progress.sums': f'float64 {[state["world_size"], 4]}', 'amp_grad_scaler.scale': 'float32 [1]'}
    found = {name: f'{array.dtype} {list(array.shape)}' for name, array in numbers.items() if name in expected}
    problems = misfits({name: expected[name] for name in found}, found)
    if problems:
        raise UserError(f'{path}: is broken: {first_few(problems)}; resume another one')
    for part in ('model', 'model_ema', 'optimizer'):
        check_floats(state[part], path)
    for arrays in (state['model'], state['model_ema'], state['optimizer'], numbers):
        _check_finite(arrays, path)
    return {part: value for part, value in state.items() if part in PARTS}


def _missing(kinds, state, prefix=''):
    return [prefix + name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]


def check_floats(arrays, path):
    """Raises: UserError unless the values of a dictionary are arrays of floats."""
    for key, value in arrays.items():
        is_array = isinstance(value, np.ndarray)
        if not (is_array and value.dtype.kind == 'f'):
            kind = f'an array of {value.dtype}' if is_array else type(value).__name__
            remedy = '; save bfloat16 as float32' if is_array and value.dtype == 'uint16' else ''
            raise UserError(f'{path}: {key} is {kind}, not an array of floats{remedy}')


def _check_finite(arrays, path):
    """Raises: UserError unless the values of a dictionary of arrays are finite, as the float32 that they become."""
    with np.errstate(over='ignore'):
        bad = [key for key, value in arrays.items() if not np.isfinite(value.astype('float32', copy=False)).all()]
    if bad:
        raise UserError(f'{path}: {first_few(bad)} hold numbers that are not finite; resume another one')


def find_all(folder):
    """Yield (path, state) of a folder's checkpoints of training, by name; what is none is passed over, and said."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.pdparams'))):
        try:
            yield path, load_training(path)
        except UserError as error:
            LOG.info(f'passed over: {error}')


def position(state):
    """How far the run of a checkpoint is: (epochs done, steps done of the next).

    Epochs go first, not steps: a run that is resumed with larger batches has fewer steps.
    """
    return state['epoch'], state['progress'].get('steps', 0)


def find_newest(folder):
    """(path, state) of the whole checkpoint of a folder that is furthest; None where there is none.

    Raises: UserError when there are checkpoints and none can be read: to start afresh would replace them.
    """
    newest = None
    for path, state in find_all(folder):
        # of equal ones the last by name, which is latest.pdparams
        if newest is None or position(state) >= position(newest[1]):
            newest = path, state
    latest = os.path.join(folder, LATEST)
    if newest is None and os.path.exists(latest):
        raise UserError(f'{latest}: cannot be resumed (see above), nor is there another checkpoint in its folder; '
                        'remove it to start afresh, or choose another -output')
    return newest
