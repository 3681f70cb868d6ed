"""Weight files and checkpoints: atomic writing, safe and strict loading, latest and best."""
import functools
import glob
import hashlib
import itertools
import math
import os
import pickletools
import re
from dataclasses import dataclass
from typing import Optional

import numpy as np
import paddle

from utils import LOG, UserError, describe_error, first_few, misfits

LATEST, BEST = 'latest.pdparams', 'best.pdparams'
# what a checkpoint of training holds, and of which type
PARTS = {'model': dict, 'model_ema': dict, 'optimizer': dict, 'epoch': int, 'step': int, 'lr_scheduler': dict,
         'amp_grad_scaler': dict, 'best': dict, 'world_size': int, 'progress': dict}
# of `best`; of `progress`, which is empty after an epoch: see engine.EpochPart; of PaddlePaddle's GradScaler, which is
# empty where it does nothing
BEST_PARTS = {'acc1': float, 'epoch': int}
PROGRESS_PARTS = {'steps': int, 'seconds': float, 'sums': np.ndarray, 'steps_per_epoch': int, 'total_batch': int}
SCALER_PARTS = {'scale': np.ndarray, 'incr_ratio': float, 'decr_ratio': float, 'incr_every_n_steps': int,
                'decr_every_n_nan_or_inf': int, 'incr_count': int, 'decr_count': int, 'use_dynamic_loss_scaling': bool}
# more epochs, steps, seconds and images than a run has
_MANY = 2 ** 53
CLASSIFIER = ('fc.weight', 'fc.bias')
SAFETENSORS = '.safetensors'


def replace(path, write):
    """Let write(path of a new file) make the file `path`, whole or not at all."""
    partial = f'{path}.partial'
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(os.path.dirname(path) or '.')
    except OSError as error:
        raise UserError(f'{path}: cannot write ({error.strerror}); free the disk or choose another folder') from None
    finally:
        if os.path.lexists(partial):
            os.remove(partial)


def _sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        replace(path, lambda partial: _write(partial, safetensors.save(arrays)))
    else:
        replace(path, lambda partial: paddle.save(arrays, partial))


def _write(path, content):
    with open(path, 'wb') as file:
        file.write(content)


def _import_safetensors(path):
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(f'{path}: needs safetensors: pip install safetensors') from None
    return safetensors.numpy


def _read_safetensors(safetensors, data):
    if int.from_bytes(data[:8], 'little') > _MOST:
        raise ValueError(f'its header is longer than {_MOST:,} bytes, which no weights need')
    return {_check_key(name): array for name, array in safetensors.load(data).items()}


def to_arrays(state):
    """The same nested dictionaries with NumPy arrays in place of tensors."""
    if isinstance(state, dict):
        return {key: to_arrays(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, paddle.Tensor) else state


def check_exists(path):
    """Raises: UserError if `path`, unless empty, is no file."""
    if path and not os.path.isfile(path):
        raise UserError(f'{path}: no such weight file; give a .pdparams file (MODEL.PRETRAINED, MODEL.RESUME)')


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
    with open(path, 'rb') as file:
        data = file.read()
    LOG.info(f'{path}: {len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}')
    is_pickle = not path.endswith(SAFETENSORS)
    read = read_pickle if is_pickle else functools.partial(_read_safetensors, _import_safetensors(path))
    try:
        return read(data)
    except Exception as error:  # a broken file raises nearly every type
        raise UserError(f'{path}: not a {".pdparams" if is_pickle else SAFETENSORS} file that can be read safely '
                        f'({describe_error(error, 200)}); nothing of it was executed; get it again from its '
                        'publisher') from None


# A .pdparams file is a pickle: a program for a machine with a stack. Python's machine imports and calls what the
# program names; this one knows only the instructions of Paddle's files, imports nothing and calls nothing.
@dataclass
class _Global:
    """A name in a pickle."""
    name: str


@dataclass
class _Dtype:
    code: str


@dataclass
class _Array:
    """An array whose content comes later in the pickle than its name."""
    value: Optional[np.ndarray] = None


# what paddle.save (2.6, 3.x) names: arrays and numbers as NumPy 1 and 2 pickle them, tensors as the tuples (name,
# array), and for protocol 2 bytes as text
_GLOBALS = {f'{module}.{name}' for module, name in [
    ('numpy.core.multiarray', '_reconstruct'), ('numpy._core.multiarray', '_reconstruct'), ('numpy', 'ndarray'),
    ('numpy.core.multiarray', 'scalar'), ('numpy._core.multiarray', 'scalar'), ('numpy', 'dtype'),
    ('builtins', 'tuple'), ('__builtin__', 'tuple'), ('collections', 'OrderedDict'), ('_codecs', 'encode'),
    ('__builtin__', 'bytes')]}
_DTYPES = {'b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8'}
_LITERALS = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8',
             'SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8'}
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
# instructions of a pickle, and values in what they make: a checkpoint of MobileOne-S0 has up to 0.2 million; bytes of a
# header of .safetensors: its weights have 0.1 million
_MOST = 1_000_000


def read_pickle(data):
    """The nested dictionaries and lists of arrays and plain values that `paddle.save` (2.6, 3.x) pickled to bytes.

    NumPy's numbers become Python's. Takes time and memory in proportion to the bytes, whatever they say.
    Raises: ValueError for anything else in the pickle, naming it; for bytes that are no pickle nearly every type.
    """
    stack, marks, memo = [], [], {}
    made = 0  # bytes of arrays, and of text that is made bytes

    def pop(count):
        if not 0 <= count <= len(stack):
            raise ValueError('it is no pickle: it takes more from its stack than that holds')
        items = stack[len(stack) - count:]
        del stack[len(stack) - count:]
        return items

    for index, (opcode, argument, offset) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if index == _MOST or made > 2 * len(data):
            raise ValueError('it describes more than weights of its size can be')
        if name in ('PROTO', 'FRAME'):
            pass
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'EMPTY_LIST':
            stack.append([])
        elif name == 'MARK':
            marks.append(len(stack))
        elif name == 'TUPLE':
            stack.append(tuple(pop(len(stack) - marks.pop())))
        elif name in _TUPLES:
            stack.append(tuple(pop(_TUPLES[name])))
        elif name in ('SETITEM', 'SETITEMS'):
            items = pop(2 if name == 'SETITEM' else len(stack) - marks.pop())
            if len(items) % 2:
                raise ValueError('it is no pickle: it has a key without a value')
            # keys are checked before they are hashed, which deep tuples and chosen numbers make costly
            _expect(stack[-1], dict).update(zip(map(_check_key, items[::2]), items[1::2]))
        elif name in ('APPEND', 'APPENDS'):
            items = pop(1 if name == 'APPEND' else len(stack) - marks.pop())
            _expect(stack[-1], list).extend(items)
        elif name in ('MEMOIZE', 'BINPUT', 'LONG_BINPUT'):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(_expect(memo[argument], (str, bytes, int, float, dict, list, _Global, _Dtype, _Array)))
        elif name == 'GLOBAL':
            stack.append(_find(argument.replace(' ', '.', 1)))
        elif name == 'STACK_GLOBAL':
            stack.append(_find('.'.join(pop(2))))
        elif name == 'REDUCE':
            stack.append(_reduce(*pop(2)))
            made += len(stack[-1]) if isinstance(stack[-1], bytes) else 0
        elif name == 'BUILD':
            stack.append(_build(*pop(2)))
            made += stack[-1].value.nbytes if isinstance(stack[-1], _Array) else 0
        elif name == 'STOP':
            if offset + 1 != len(data):
                raise ValueError(f'{len(data) - offset - 1} bytes follow its end')
            value, = stack
            return _plain(value, itertools.count())
        else:
            raise ValueError(f'it holds the pickle instruction {name}, which no weights need')


def _expect(value, kinds):
    if not isinstance(value, kinds):
        raise ValueError(f'it holds {type(value).__name__} where no weights have it')
    return value


def _check_key(key):
    """A key of a dictionary in a weight file. Raises: ValueError for one that no message could show."""
    if not (isinstance(key, str) and key.isprintable() and len(key) <= 200):
        raise ValueError(f'a key in it is {type(key).__name__}, not a short text')
    return key


def _find(name):
    if name not in _GLOBALS:
        raise ValueError(f'it holds {name[:100]!r}, which is no part of weights')
    return _Global(name)


def _reduce(function, arguments):
    """What a call of one of `_GLOBALS` in a pickle makes, for the arguments that Paddle's files have."""
    name = _expect(function, _Global).name
    if name.endswith('._reconstruct') and arguments == (_Global('numpy.ndarray'), (0,), b'b'):
        return _Array()
    if name == 'numpy.dtype' and _expect(arguments[0], str) in _DTYPES and arguments[1:] in ((False, True), (0, 1)):
        return _Dtype(arguments[0])
    if name.endswith('.scalar'):
        dtype, content = arguments
        number, = _array(dtype, content)
        return number.item()
    if name.endswith('.tuple'):
        (label, array), = arguments
        _expect(label, str)
        return _expect(array, _Array)
    if name == 'collections.OrderedDict' and arguments == ():
        return {}
    if name == '_codecs.encode' and arguments[1:] == ('latin1',):
        return _expect(arguments[0], str).encode('latin1')
    if name == '__builtin__.bytes' and arguments == ():
        return b''
    raise ValueError(f'it calls {name} with arguments that no weights have')


def _build(target, state):
    """A data type or an array of a pickle with its state: of the array the shape, which must fit its bytes."""
    if isinstance(target, _Dtype):
        if _expect(state, tuple) not in [(3, order, None, None, None, -1, -1, 0) for order in ('<', '|')]:
            raise ValueError('it holds a data type that no weights have')
        return target
    _, shape, dtype, is_fortran, content = _expect(state, tuple)
    array = _array(dtype, content)
    if len(_expect(shape, tuple)) > 32:
        raise ValueError(f'it holds an array of {len(shape)} sides')
    if any(_expect(side, int) < 0 for side in shape) or math.prod(shape) != array.size:
        sides = ', '.join(str(side) if 0 <= side < _MANY else 'out of range' for side in shape)
        raise ValueError(f'it holds an array of shape [{sides}] in {array.nbytes} bytes')
    _expect(target, _Array).value = array.reshape(shape, order='F' if is_fortran else 'C').copy()
    return target


def _array(dtype, content):
    """The bytes of a pickle as the numbers of a _Dtype, not copied."""
    return np.frombuffer(_expect(content, bytes), '<' + _expect(dtype, _Dtype).code)


def _plain(value, counter, depth=0):
    """A finished value of a pickle with its arrays in their places.

    counter: counts the values. A dictionary may have several places, and so a small file could describe an endless one.
    """
    if depth > 10:
        raise ValueError('its dictionaries are nested too deeply')
    if next(counter) == _MOST:
        raise ValueError('it describes more than weights of its size can be')
    if isinstance(value, dict):
        return {key: _plain(item, counter, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, counter, depth + 1) for item in value]
    if isinstance(value, _Array):
        return _expect(value.value, np.ndarray)
    return _expect(value, (str, int, float, type(None)))


def load_training(path):
    """The checkpoint of a training, to be resumed: a dictionary of PARTS.

    Raises: UserError for a file that is none, a checkpoint of the PaddleViT port of MobileOne among them.
    """
    state = load(path)
    if not (isinstance(state, dict) and isinstance(state.get('model'), dict)):
        raise UserError(f'{path}: holds weights alone, which cannot be resumed; start from them with -pretrained')
    state.setdefault('progress', {})  # checkpoints of earlier versions end with an epoch
    missing = _missing(PARTS, state)
    if not missing:
        missing = _missing(BEST_PARTS, state['best'], 'best.')
        for part, parts in (('progress', PROGRESS_PARTS), ('amp_grad_scaler', SCALER_PARTS)):
            missing += _missing(parts, state[part], f'{part}.') if state[part] else []
    if missing:
        raise UserError(f'{path}: is no checkpoint of this project (no {", ".join(missing)}), and others cannot be '
                        'resumed; start from its weights with -pretrained')
    for part in ('model', 'model_ema', 'optimizer'):
        _check_floats(state[part], path)
        _check_finite(state[part], path)
    impossible = [name for name, is_possible in _facts(state).items() if not is_possible]
    if impossible:
        raise UserError(f'{path}: is broken: {", ".join(impossible)} cannot be; resume another one')
    return {part: value for part, value in state.items() if part in PARTS}


def _facts(state):
    """Whether what a checkpoint of training says can be: {name: bool}."""
    best, progress, scaler = state['best'], state['progress'], state['amp_grad_scaler']
    facts = {'epoch': 0 <= state['epoch'] < _MANY, 'step': 0 <= state['step'] < _MANY,
             'world_size': 1 <= state['world_size'] < _MANY, 'best.acc1': math.isfinite(best['acc1']),
             'best.epoch': 0 <= best['epoch'] <= state['epoch']}
    if progress:
        sums = progress['sums']
        facts.update({'progress.steps': 0 < progress['steps'] <= progress['steps_per_epoch'] < _MANY,
                      'progress.total_batch': 1 <= progress['total_batch'] < _MANY,
                      'progress.seconds': 0 <= progress['seconds'] < 1e9,
                      'progress.sums': sums.shape == (state['world_size'], 4) and sums.dtype == 'float64'
                      and bool(((sums >= 0) & (sums < _MANY)).all())})
    if scaler:
        scale = scaler['scale']
        facts['amp_grad_scaler.scale'] = (scale.shape == (1,) and scale.dtype == 'float32' and 0 < scale[0] < math.inf)
        facts.update({f'amp_grad_scaler.{name}': scaler[name] > 1 and math.isfinite(scaler[name])
                      if name == 'incr_ratio' else 0 < scaler[name] < 1 for name in ('incr_ratio', 'decr_ratio')})
        facts.update({f'amp_grad_scaler.{name}': 0 <= scaler[name] < 2 ** 31
                      for name, kind in SCALER_PARTS.items() if kind is int})
    return facts


def _missing(parts, state, prefix=''):
    return [prefix + name for name, kind in parts.items() if not isinstance(state.get(name), kind)]


def _check_floats(arrays, path):
    """Raises: UserError unless the values of a dictionary are arrays of floats."""
    for key, value in arrays.items():
        if not (isinstance(value, np.ndarray) and value.dtype.kind == 'f'):
            kind = f'an array of {value.dtype}' if isinstance(value, np.ndarray) else type(value).__name__
            raise UserError(f'{path}: {key} is {kind}, not an array of floats'
                            f'{"; save bfloat16 as float32" if kind.endswith("uint16") else ""}')


def _check_finite(arrays, path):
    """Raises: UserError unless the values of a dictionary of arrays are finite, as the float32 that they become."""
    with np.errstate(over='ignore'):
        bad = [key for key, value in arrays.items() if not np.isfinite(value.astype('float32', copy=False)).all()]
    if bad:
        raise UserError(f'{path}: {first_few(bad)} hold numbers that are not finite; resume another one')


def _checkpoints(folder):
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
    for path, state in _checkpoints(folder):
        # of equal ones the last by name, which is latest.pdparams
        if newest is None or position(state) >= position(newest[1]):
            newest = path, state
    latest = os.path.join(folder, LATEST)
    if newest is None and os.path.exists(latest):
        raise UserError(f'{latest}: cannot be resumed (see above), nor is there another checkpoint in its folder; '
                        'remove it to start afresh, or choose another -output')
    return newest


def put_aside(folder, last):
    """Append .past to the names of a folder's checkpoints past `last`, a `position`. Returns: (old, new path) of each.
    """
    renamed = []
    for path, state in _checkpoints(folder):
        if position(state) > last:
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
        is_ema = isinstance(state.get('model_ema'), dict) and bool(state['model_ema'])
        state = state['model_ema'] if is_ema else state['model']
    if not isinstance(state, dict):
        raise UserError(f'{path}: holds {type(state).__name__}, not a dictionary of weights')
    state = {key: value for key, value in state.items() if key != 'StructuredToParameterName@@'}
    if not any(key.startswith('stages.') for key in state):
        raise UserError(f'{path}: holds no MobileOne weights (no key starts with "stages."); official PyTorch files '
                        'are converted by load_pytorch_weights.py')
    _check_floats(state, path)
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
            with np.errstate(over='ignore'):  # infinite then, which the loss will be, and is refused
                tensor.set_value(weights[name].astype(tensor.numpy().dtype))
    return left_out


def prune(folder, keep):
    """Remove all but the newest `keep` epoch_N.pdparams of a folder; 0 keeps all."""
    pattern = re.compile(r'epoch_(\d+)\.pdparams')
    epochs = {int(match[1]): path for path in glob.glob(os.path.join(glob.escape(folder), 'epoch_*.pdparams'))
              for match in [pattern.fullmatch(os.path.basename(path))] if match}
    for epoch in sorted(epochs)[:-keep] if keep else []:
        os.remove(epochs[epoch])
