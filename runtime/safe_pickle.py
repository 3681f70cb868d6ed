"""Read Paddle's pickles without executing them.

A .pdparams file is a pickle: a program for a stack machine. Python's own machine imports and calls whatever the
program names; this one knows only the instructions in Paddle's files, imports nothing and calls nothing.
"""
import itertools
import math
import pickletools
from dataclasses import dataclass
from typing import Optional

import numpy as np


@dataclass
class _Global:
    """The name of a class or function in a pickle."""
    name: str


@dataclass
class _Dtype:
    code: str


@dataclass
class _Array:
    """An array whose content follows later in the pickle."""
    value: Optional[np.ndarray] = None


# globals in pickles of paddle.save (2.6, 3.x): arrays and numbers as NumPy 1 and 2 pickle them, tensors as tuples
# (name, array), and bytes, which protocol 2 stores as text
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
# limit on the instructions in a pickle and on the values they create; a checkpoint with a thousand tensors has at most
# 0.2 million
_MOST = 1_000_000


def read_pickle(data):
    """Read the nested dictionaries and lists of arrays and plain values that `paddle.save` (2.6, 3.x) pickled.

    NumPy scalars become Python numbers. Time and memory are proportional to the size of the data, whatever its content.
    Raises: ValueError that names anything else in the pickle; almost any exception for bytes that are not a pickle.
    """
    stack, marks, memo = [], [], {}
    made = 0  # bytes of arrays, and of text encoded as bytes

    def pop(count):
        if not 0 <= count <= len(stack):
            raise ValueError('not a pickle: it pops more than its stack contains')
        items = stack[len(stack) - count:]
        del stack[len(stack) - count:]
        return items

    for index, (opcode, argument, offset) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if index == _MOST or made > 2 * len(data):
            raise ValueError('it describes more data than a weight file of its size can contain')
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
                raise ValueError('not a pickle: it has a key without a value')
            # check keys before hashing them: deep tuples and chosen numbers would make that slow
            _expect(stack[-1], dict).update(zip(map(check_key, items[::2]), items[1::2]))
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
            raise ValueError(f'it contains the pickle instruction {name}, which weights never need')


def _expect(value, kinds):
    if not isinstance(value, kinds):
        raise ValueError(f'it contains {type(value).__name__} where weights never do')
    return value


def check_key(key):
    """Return a key of a weight file. Raises: ValueError unless it is printable and at most 200 characters long."""
    if not (isinstance(key, str) and key.isprintable() and len(key) <= 200):
        raise ValueError(f'a key in it is {type(key).__name__}, not a short printable string')
    return key


def _find(name):
    if name not in _GLOBALS:
        raise ValueError(f'it contains {name[:100]!r}, which does not belong in weights')
    return _Global(name)


def _reduce(function, arguments):
    """Return the result of a pickle's call of one of `_GLOBALS`, for the arguments that occur in Paddle's files."""
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
    raise ValueError(f'it calls {name} with arguments that weights never have')


def _build(target, state):
    """Set the state of a pickle's data type or array; an array's shape must match its bytes."""
    if isinstance(target, _Dtype):
        if _expect(state, tuple) not in [(3, order, None, None, None, -1, -1, 0) for order in ('<', '|')]:
            raise ValueError('it contains a data type that weights never have')
        return target
    _, shape, dtype, is_fortran, content = _expect(state, tuple)
    array = _array(dtype, content)
    if len(_expect(shape, tuple)) > 32:
        raise ValueError(f'it contains an array of {len(shape)} dimensions')
    if any(_expect(side, int) < 0 for side in shape) or math.prod(shape) != array.size:
        sides = ', '.join(str(side) if 0 <= side < 2 ** 53 else 'out of range' for side in shape)
        raise ValueError(f'it contains an array of shape [{sides}] in {array.nbytes} bytes')
    _expect(target, _Array).value = array.reshape(shape, order='F' if is_fortran else 'C').copy()
    return target


def _array(dtype, content):
    """Return bytes of a pickle as an array of a _Dtype, without copying."""
    return np.frombuffer(_expect(content, bytes), '<' + _expect(dtype, _Dtype).code)


def _plain(value, counter, depth=0):
    """Return a finished value of a pickle with its arrays filled in.

    counter: counts the values. A dictionary may occur several times, so a small file could describe an endless value.
    """
    if depth > 10:
        raise ValueError('its dictionaries are nested too deeply')
    if next(counter) == _MOST:
        raise ValueError('it describes more data than a weight file of its size can contain')
    if isinstance(value, dict):
        return {key: _plain(item, counter, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, counter, depth + 1) for item in value]
    if isinstance(value, _Array):
        return _expect(value.value, np.ndarray)
    return _expect(value, (str, int, float, type(None)))
