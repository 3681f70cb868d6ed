"""Weight files and checkpoints: write them atomically, read them without executing anything, find the newest."""
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
from utils import LOG, UserError, describe_error, first_few, mismatches

LATEST, BEST = 'latest.pdparams', 'best.pdparams'
# the parts of a training checkpoint and their types
PARTS = {'model': dict, 'model_ema': dict, 'optimizer': dict, 'epoch': int, 'step': int, 'lr_scheduler': dict,
         'amp_grad_scaler': dict, 'best': dict, 'world_size': int, 'progress': dict}
# best: the best epoch so far. progress: how far the next epoch is; empty between epochs. amp_grad_scaler: the state of
# PaddlePaddle's GradScaler; empty when it is disabled
PARTS_OF = {
    'best': {'acc1': float, 'epoch': int},
    'progress': {'steps': int, 'seconds': float, 'sums': np.ndarray, 'steps_per_epoch': int, 'total_batch': int},
    'amp_grad_scaler': {'scale': np.ndarray, 'incr_ratio': float, 'decr_ratio': float, 'incr_every_n_steps': int,
                        'decr_every_n_nan_or_inf': int, 'incr_count': int, 'decr_count': int,
                        'use_dynamic_loss_scaling': bool},
}
SAFETENSORS = '.safetensors'
# longest header accepted in a .safetensors file, in bytes; a thousand tensors need about 0.1 million
_LONGEST_HEADER = 1_000_000
# data types of .safetensors; NumPy has no bfloat16, so its bits are kept as uint16, as Paddle does
_DTYPES = {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': '<u2', 'I64': '<i8', 'I32': '<i4', 'I16': '<i2',
           'I8': 'i1', 'U64': '<u8', 'U32': '<u4', 'U8': 'u1', 'BOOL': '?'}


def save(state, path):
    """Write nested dictionaries of tensors, arrays and plain numbers to `path` atomically.

    A .safetensors file takes a flat dictionary of tensors or arrays.
    Raises: UserError for a file that cannot be written, or a .safetensors path without the safetensors package.
    """
    arrays = to_arrays(state)
    if path.endswith(SAFETENSORS):
        safetensors = _import_safetensors(path)
        others = [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]
        if others:
            raise UserError(f'{path}: can hold only arrays, but {others[0]!r} is a {type(arrays[others[0]]).__name__}; '
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
        raise ValueError(f'its header is longer than {_LONGEST_HEADER:,} bytes, more than weights ever need')
    return {check_key(name): np.frombuffer(tensor['data'], _DTYPES[tensor['dtype']]).reshape(tensor['shape'])
            for name, tensor in safetensors.deserialize(data)}


def to_arrays(state):
    """Return the same nested dictionaries with NumPy arrays in place of tensors."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, paddle.Tensor) else state


def check_exists(path, key=''):
    """Check that `path`, unless empty, is a file that fits into memory. key: its config key, for the message.

    Raises: UserError if it does not exist, is not a regular file, or is larger than the machine's memory.
    """
    check_regular(path, key)
    if path and not os.path.isfile(path):
        raise UserError(f'{path}: no such weight file; check {key or "the path"}')
    if path and os.path.getsize(path) > _memory():
        raise _too_large(path)


def _memory():
    """The machine's memory in bytes; infinite where the system does not report it (Windows)."""
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else math.inf


def _too_large(path):
    return UserError(f'{path}: its {os.path.getsize(path):,} bytes do not fit into memory; check that it is the right '
                     'file, or use a machine with more memory')


def sha256(path):
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def load(path):
    """Return what `save` or `paddle.save` wrote, with NumPy arrays, or the arrays of a .safetensors file.

    Nothing in the file is executed (`read_pickle`). Its SHA-256 is logged.
    Raises: UserError for a file that cannot be read, with the content that was rejected.
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
    except Exception as error:  # a corrupt file can raise almost any type
        raise UserError(f'{path}: not a {".pdparams" if is_pickle else SAFETENSORS} file that can be read safely '
                        f'({describe_error(error, 200)}); nothing in it was executed; download it again from '
                        'its publisher') from None


def load_training(path):
    """Read a training checkpoint to resume. Returns: a dictionary of PARTS.

    Raises: UserError for any other file, including another project's checkpoint, and for a corrupt one.
    """
    state = load(path)
    if not (isinstance(state, dict) and isinstance(state.get('model'), dict)):
        raise UserError(f'{path}: contains only weights, which cannot be resumed; start from them with -pretrained')
    state.setdefault('progress', {})  # earlier versions saved only between epochs
    missing = _missing(PARTS, state)
    if not missing:
        for part, kinds in PARTS_OF.items():
            missing += _missing(kinds, state[part], f'{part}.') if state[part] or part == 'best' else []
    if missing:
        raise UserError(f'{path}: not a checkpoint of this project (no {", ".join(missing)}), so it cannot be resumed; '
                        'start from its weights with -pretrained')
    numbers = {f'{part}.{name}': np.asarray(state[part][name]) for part, kinds in PARTS_OF.items() if state[part]
               for name, kind in kinds.items() if kind in (float, np.ndarray)}
    expected = {'progress.sums': f'float64 {[state["world_size"], 4]}', 'amp_grad_scaler.scale': 'float32 [1]'}
    found = {name: f'{array.dtype} {list(array.shape)}' for name, array in numbers.items() if name in expected}
    problems = mismatches({name: expected[name] for name in found}, found)
    if problems:
        raise UserError(f'{path}: is corrupt: {first_few(problems)}; resume from another checkpoint')
    for part in ('model', 'model_ema', 'optimizer'):
        check_floats(state[part], path)
    for arrays in (state['model'], state['model_ema'], state['optimizer'], numbers):
        _check_finite(arrays, path)
    return {part: value for part, value in state.items() if part in PARTS}


def _missing(kinds, state, prefix=''):
    return [prefix + name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]


def check_floats(arrays, path):
    """Raise a UserError unless all values of a dictionary are arrays of floats."""
    for key, value in arrays.items():
        is_array = isinstance(value, np.ndarray)
        if not (is_array and value.dtype.kind == 'f'):
            kind = f'an array of {value.dtype}' if is_array else type(value).__name__
            remedy = '; save bfloat16 as float32' if is_array and value.dtype == 'uint16' else ''
            raise UserError(f'{path}: {key} is {kind}, not an array of floats{remedy}')


def _check_finite(arrays, path):
    """Raise a UserError unless the arrays of a dictionary are finite as float32, the type they are loaded as."""
    with np.errstate(over='ignore'):
        bad = [key for key, value in arrays.items() if not np.isfinite(value.astype('float32', copy=False)).all()]
    if bad:
        raise UserError(f'{path}: non-finite numbers in {first_few(bad)}; resume from another checkpoint')


def find_all(folder):
    """Yield (path, state) of each training checkpoint in a folder, sorted by name; log and skip any other file."""
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), '*.pdparams'))):
        try:
            yield path, load_training(path)
        except UserError as error:
            LOG.info(f'skipped: {error}')


def position(state):
    """Return how far along a checkpoint is: (epochs done, steps done of the next epoch).

    Epochs come first because a run resumed with larger batches counts fewer steps.
    """
    return state['epoch'], state['progress'].get('steps', 0)


def find_newest(folder):
    """Return (path, state) of the readable checkpoint in a folder that is furthest along, or None.

    Raises: UserError if latest.pdparams exists but no checkpoint can be read: starting over would overwrite it.
    """
    newest = None
    for path, state in find_all(folder):
        # on a tie, the last by name wins: latest.pdparams
        if newest is None or position(state) >= position(newest[1]):
            newest = path, state
    latest = os.path.join(folder, LATEST)
    if newest is None and os.path.exists(latest):
        raise UserError(f'{latest}: cannot be resumed (see above), and its folder has no other checkpoint; remove it '
                        'to start from scratch, or choose another -output')
    return newest
