"""Untrusted weight files: what Paddle writes is read, and nothing in a file is ever executed."""
import collections
import hashlib
import os
import pickle
import sys
import tracemalloc

import numpy as np
import paddle
import pytest
import safetensors.numpy
from conftest import ROOT, options, run
from hypothesis import given, settings
from hypothesis import strategies as st

from mobileone import build_mobileone
from runtime import checkpoint
from utils import UserError
from weights import load_weights


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_what_paddle_writes_is_read(config, tmp_path, protocol):
    """Tensors, arrays, and the states of optimizer, scheduler and scaler, at each protocol of paddle.save."""
    model = build_mobileone(config)
    scheduler = paddle.optimizer.lr.CosineAnnealingDecay(0.1, 10)
    optimizer = paddle.optimizer.AdamW(scheduler, parameters=model.parameters())
    model(paddle.randn([2, 3, 32, 32])).sum().backward()
    optimizer.step()
    arrays = {'F': np.asfortranarray(np.arange(6.0).reshape(2, 3)), 'bool': np.array([True]), 'none': None,
              'scalar': paddle.to_tensor(3), 'half': np.ones([2], 'float16'), 'list': [1, 2.5, 'x', False],
              'empty': np.zeros([0, 3])}
    numbers = {kind: np.dtype(kind).type(1.5) for kind in ('float16', 'float32', 'float64', 'int64', 'uint8', 'bool')}
    state = {'model': model.state_dict(), 'model_ema': collections.OrderedDict(model.state_dict()),
             'optimizer': optimizer.state_dict(), 'lr_scheduler': scheduler.state_dict(), 'epoch': 3,
             'amp_grad_scaler': paddle.amp.GradScaler(enable=False).state_dict(), 'arrays': arrays, 'again': arrays,
             'numbers': numbers}
    path = str(tmp_path / 'w.pdparams')
    paddle.save(state, path, protocol=protocol)

    def same(own, theirs):
        if isinstance(theirs, dict):
            theirs.pop('StructuredToParameterName@@', None)
            own.pop('StructuredToParameterName@@', None)
            assert list(own) == list(theirs)
            return [same(own[key], theirs[key]) for key in theirs]
        if isinstance(theirs, np.ndarray):
            assert own.dtype == theirs.dtype and own.shape == theirs.shape and own.flags.writeable
            return np.testing.assert_array_equal(own, theirs)
        if isinstance(theirs, np.generic):
            theirs = theirs.item()
        assert type(own) is type(theirs) and own == theirs
    same(checkpoint.load(path), paddle.load(path, return_numpy=True))


class Call:
    """An object whose unpickling calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def dumps(value):
    return pickle.dumps(value, protocol=4)


def named(module, name):
    """A pickle of {'stages.0': the global `name` of a module}, called with ('touch hacked',)."""
    call = f'c{module}\n{name}\n(X\x0c\x00\x00\x00touch hackedtR'
    return b'\x80\x02}X\x08\x00\x00\x00stages.0' + call.encode() + b's.'


def array_pickle(shape, code='f4', content=b'', dtype_state=(3, '<', None, None, None, -1, -1, 0), made=b'b', count=1):
    """A pickle of `count` arrays that claim this shape and data type and share their content, but not their tuples."""
    class Dtype:
        def __reduce__(self):
            return np.dtype, (code, False, True), tuple([*dtype_state])

    class Array:
        def __reduce__(self):
            function = np.zeros(0).__reduce__()[0]
            return function, (np.ndarray, tuple([0]), made), (1, type(shape)([*shape]), Dtype(), False, content)
    return dumps({f'stages.{index}': Array() for index in range(count)})


def shared(depth, count):
    """Lists nested `depth` deep, each with the same inner list `count` times, for which Python needs little memory."""
    value = []
    for _ in range(depth):
        value = [value] * count
    return dumps(value)


def text(value):
    return b'X' + len(value.encode()).to_bytes(4, 'little') + value.encode()


# nested tuples: hashing them crashes Python
DEEP = b')' + b'\x85' * 300_000
# numbers with the same hash: a dictionary compares each one with all earlier ones
SAME_HASH = b''.join(b'\x8a\x0a' + ((2 ** 61 - 1) * k).to_bytes(10, 'little') + b'N' for k in range(1, 100_000))


ATTACKS = {
    'os.system': (dumps({'stages.0': Call(os.system, 'touch hacked')}), r"'posix.system', which does not"),
    'eval': (dumps(Call(eval, '__import__("os").system("touch hacked")')), "'builtins.eval', which does not belong"),
    'exec in a checkpoint': (dumps({'model': {'stages.0': np.zeros(2), 'x': Call(exec, 'open("hacked", "w")')}}),
                             "'builtins.exec'"),
    'in the name of a tensor': (dumps({'stages.0': Call(tuple, (Call(os.system, 'touch hacked'), np.zeros(2)))}),
                                "'posix.system'"),
    'nested': (dumps({'x': Call(os.system, Call(eval, '"touch hacked"'))}), "'posix.system'|'builtins.eval'"),
    'getattr': (dumps(Call(getattr, 'x', 'upper')), "'builtins.getattr'"),
    'another name in numpy': (named('numpy', 'load'), "'numpy.load'"),
    'hidden in numpy': (named('numpy.core.multiarray', 'os.system'), "'numpy.core.multiarray.os.system'"),
    'another name in collections': (named('collections', 'namedtuple'), "'collections.namedtuple'"),
    'another codec': (named('_codecs', 'encode'), 'it calls _codecs.encode with arguments that weights never have'),
    'another dtype': (named('numpy', 'dtype'), 'it calls numpy.dtype with arguments'),
    'a path and a name': (b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch hacked\x85R.', "'os.system'"),
    'instance': (b'(S"touch hacked"\nios\nsystem\n.', 'the pickle instruction'),
    'object': (b'\x80\x02(cos\nsystem\nS"x"\no.', "instruction STRING|'os.system'"),
    'new object': (dumps(Exception('x')), 'exceptions|builtins.Exception'),
    'extension': (b'\x80\x02\x82\x01.', 'the pickle instruction EXT1'),
    'persistent': (b'\x80\x02X\x01\x00\x00\x00aQ.', 'the pickle instruction BINPERSID'),
    'buffer': (b'\x80\x05\x97.', 'the pickle instruction NEXT_BUFFER'),
    'state of a dictionary': (b'\x80\x02}}b.', 'it contains dict where|not enough values|unpack'),
    'state of a name': (b'\x80\x02cnumpy\ndtype\n(K\x01(K\x01tcnumpy\ndtype\n\x89C\x00tb.', 'where weights never do'),
    'an array of objects': (array_pickle((1,), 'O', [Call(os.system, 'touch hacked')]),
                            "'posix.system'|it calls numpy.dtype"),
    'an array of objects that it shares': (array_pickle((1,), 'O8', []), 'it calls numpy.dtype'),
    'a data type with fields': (array_pickle((1,), 'V8', b'\0' * 8), 'it calls numpy.dtype'),
    'a state of a data type': (array_pickle((1,), 'f4', b'\0' * 4, (3, '<', ('f4', (2,)), None, None, 4, 4, 0)),
                               'a data type that weights never have'),
    'a large shape': (array_pickle((2 ** 40,)), r'an array of shape \[1099511627776\] in 0 bytes'),
    'a shape whose product overflows': (array_pickle((2 ** 32, 2 ** 32), 'f4', b''), 'an array of shape'),
    'a negative shape': (array_pickle((-1, -4), 'i1', b'\0' * 4), 'an array of shape'),
    'too short': (array_pickle((3,), 'f4', b'\0' * 8), r'an array of shape \[3\] in 8 bytes'),
    'too long': (array_pickle((1,), 'f4', b'\0' * 8), r'an array of shape \[1\] in 8 bytes'),
    'too many sides': (array_pickle((1,) * 40, 'f4', b'\0' * 4), 'an array of 40 dimensions'),
    'many large sides': (b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01('
                         b'\x8a\xff' + b'\x7f' * 255 + b'q\x00' + b'h\x00' * 400_000 + b'tcnumpy\ndtype\n(' + text('f4')
                         + b'K\x00K\x01tR\x89C\x00tb.', 'an array of 400001 dimensions'),
    'a state that is text': (b'\x80\x02cnumpy\ndtype\n(' + text('f4') + b'K\x00K\x01tR' + text('\u0100' * 3_000_000)
                             + b'b.', 'it contains str where weights never do'),
    'a shape that is bytes': (array_pickle(b'\x01', 'f4', b'\0' * 4), 'it contains bytes where weights never do'),
    'text for bytes': (array_pickle((1,), 'i1', 'x'), 'it contains str where weights never do'),
    'without content': (b'\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t'
                        b'C\x01btRs.', 'it contains NoneType where weights never do'),
    'another byte order': (array_pickle((1,), 'f4', b'\0' * 4, (3, '>', None, None, None, -1, -1, 0)),
                           'a data type that weights never have'),
    'another version of a data type': (array_pickle((1,), 'f4', b'\0' * 4, (4, '<', None, None, None, -1, -1, 0)),
                                       'a data type that weights never have'),
    'metadata of a data type': (array_pickle((1,), 'f4', b'\0' * 4, (3, '<', None, None, None, -1, -1, 0, {})),
                                'a data type that weights never have'),
    'another beginning of an array': (array_pickle((1,), 'f4', b'\0' * 4, made=b'f'),
                                      'it calls numpy._?core.multiarray._reconstruct with arguments'),
    'a number of two': (b'\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n' + text('i1')
                        + b'\x89\x88\x87RC\x02ab\x86R.', 'too many values'),
    'a number of text': (b'\x80\x02cnumpy.core.multiarray\nscalar\n' + text('i1') + b'C\x01a\x86R.',
                         'it contains str where weights never do'),
    'content again and again': (array_pickle((10 ** 6,), 'u1', bytes(10 ** 6), count=200), 'it describes more data'),
    'text made bytes again and again': (
        b'\x80\x02]' + text('a' * 10 ** 6) + b'q\x00c_codecs\nencode\nq\x01'
        + (b'h\x01h\x00' + text('latin1') + b'\x86R') * 200 + b'.', 'it describes more data'),
    'lists of the same lists': (shared(9, 10), 'it describes more data'),
    'too many instructions': (b'\x80\x04](' + b'N' * 1_000_000 + b'e.', 'it describes more data'),
    'a deep key': (b'\x80\x04}' + DEEP + b'Ns.', 'a key in it is tuple'),
    'a deep key among several': (b'\x80\x04}(' + DEEP + b'Nu.', 'a key in it is tuple'),
    'a deep data type': (b'\x80\x04cnumpy\ndtype\n' + DEEP + b'\x89\x88\x87R.', 'it contains tuple where'),
    'keys of the same hash': (b'\x80\x04}(' + SAME_HASH + b'u.', 'a key in it is int'),
    'more than there is': (b'\x80\x04N\x86.', 'not a pickle: it pops more than its stack contains'),
    'less than nothing': (b'\x80\x04}' + text('a') + b'N(st.', 'not a pickle: it pops more than its stack contains'),
    'a key without a value': (b'\x80\x04}(' + text('a') + b'u.', 'not a pickle: it has a key without a value'),
    'a long key': (dumps({'stages.' + 'x' * 200: np.zeros(1)}), 'a key in it is str, not a short printable string'),
    'a large memo': (b'\x80\x02}r\xff\xff\xff\xff.', 'contains no MobileOne weights'),
    'large bytes': (b'\x80\x04\x8e' + (2 ** 40).to_bytes(8, 'little') + b'x.', 'ValueError'),
    'large text': (b'\x80\x04\x8d' + (2 ** 62).to_bytes(8, 'little') + b'x.', 'ValueError'),
    'a large frame': (b'\x80\x04\x95' + (2 ** 40).to_bytes(8, 'little') + b'N.', 'contains NoneType'),
    'in itself': (b'\x80\x04}\x94\x8c\x01ah\x00s.', 'nested too deeply'),
    'twice in itself': (b'\x80\x04]\x94(h\x00h\x00e.', 'nested too deeply'),
    'deep': (b'\x80\x04' + b'}\x8c\x01a' * 100000 + b'N' + b's' * 100000 + b'.', 'nested too deeply'),
    'a key that is no text': (b'\x80\x04}K\x01K\x02s.', 'a key in it is int'),
    'a key of several lines': (dumps({'stages.0\nerror': np.zeros(1)}), 'a key in it is str, not a short'),
    'what follows the end': (dumps({'stages.0': np.zeros(1)}) + dumps(Call(os.system, 'touch hacked')),
                             'bytes follow its end'),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_attacks_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, message = ATTACKS[name]
    (tmp_path / 'w.pdparams').write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=rf'w.pdparams: .*({message})') as error:
            load_weights('w.pdparams')
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert '\n' not in str(error.value) and len(str(error.value)) < 500
    assert os.listdir(tmp_path) == ['w.pdparams']


def test_the_attacks_are_real(tmp_path, monkeypatch):
    """Python's own unpickler executes them."""
    monkeypatch.chdir(tmp_path)
    for name in ('os.system', 'eval', 'exec in a checkpoint', 'nested', 'a path and a name'):
        pickle.loads(ATTACKS[name][0])
        os.remove('hacked')
    (tmp_path / 'w.pdparams').write_bytes(ATTACKS['os.system'][0])
    paddle.load('w.pdparams')
    assert os.path.exists('hacked')


def test_all_programs_read_safely(fashion, tmp_path):
    path = tmp_path / 'w.pdparams'
    path.write_bytes(ATTACKS['os.system'][0].replace(b'touch hacked', b'echo hacked '))
    for args in (['main_single_gpu.py', '-eval', '-pretrained', path], ['main_single_gpu.py', '-pretrained', path],
                 ['main_single_gpu.py', '-resume', path, '-output', tmp_path / 'other'],
                 ['-m', 'tools.fuse', '-no_data', '-pretrained', path]):
        process = run(*args, *(options(fashion) if 'main' in args[0] else []), status=2, cwd=ROOT, env={
            'PYTHONPATH': str(ROOT)})
        assert "it contains 'posix.system', which does not belong in weights" in process.stderr
        assert 'hacked' not in process.stdout + process.stderr


def test_sha256_of_every_weight_file_is_logged(fashion, tmp_path):
    """Covers weights, resumed checkpoints and teachers."""
    def run_logs(name, *args):
        opts = options(fashion, 'TRAIN.NUM_EPOCHS', '2', *args[1:])
        return run('main_single_gpu.py', '-output', tmp_path / name, *opts, *args[0]).stdout
    run_logs('first', [], 'TRAIN.NUM_EPOCHS', '1')
    path = tmp_path / 'first/latest.pdparams'
    line = f'{path}: {path.stat().st_size:,} bytes, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}'
    assert line in run_logs('tuned', ['-pretrained', path])
    assert line in run_logs('evaluated', ['-eval', '-pretrained', path])
    assert line in run_logs('resumed', ['-resume', path])
    assert line in run_logs('taught', [], 'TRAIN.DISTILLATION.TYPE', 'hard', 'TRAIN.DISTILLATION.TEACHER_CFG',
                            tmp_path / 'first/config.yaml', 'TRAIN.DISTILLATION.TEACHER_WEIGHTS', path)


def test_safetensors(config, fashion, tmp_path):
    """The format needs no pickle; programs accept it wherever they accept .pdparams."""
    path = str(tmp_path / 'w.safetensors')
    model = build_mobileone(config)
    checkpoint.save(model.state_dict(), path)
    weights, is_ema = load_weights(path)
    assert not is_ema and safetensors.numpy.load_file(path).keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(weights[name], tensor.numpy())
    short = options(fashion, 'TRAIN.NUM_EPOCHS', '1')
    run('main_single_gpu.py', '-output', tmp_path / 'a', '-pretrained', path, *short)
    out = run('-m', 'tools.fuse', '-cfg', tmp_path / 'a/config.yaml', '-no_data', '-pretrained',
              tmp_path / 'a/best.pdparams', '-save', tmp_path / 'fused.safetensors').stdout
    assert f'fused weights: {tmp_path}/fused.safetensors' in out
    assert '(fused)' in run('main_single_gpu.py', '-eval', '-output', tmp_path / 'b', *options(fashion), '-pretrained',
                            tmp_path / 'fused.safetensors').stdout
    content = (tmp_path / 'w.safetensors').read_bytes()
    for broken in (content[:-1], content[:100], b'', b'\xff' * 8 + content[8:], ATTACKS['os.system'][0]):
        (tmp_path / 'broken.safetensors').write_bytes(broken)
        with pytest.raises(UserError, match='broken.safetensors: not a .safetensors file that can be read safely'):
            load_weights(str(tmp_path / 'broken.safetensors'))
    safetensors.numpy.save_file({'stages.0\nerror: ': np.zeros(1)}, tmp_path / 'key.safetensors')
    with pytest.raises(UserError, match='a key in it is str, not a short printable string'):
        load_weights(str(tmp_path / 'key.safetensors'))
    safetensors.numpy.save_file({f'stages.{n}': np.zeros(0, 'uint8') for n in range(20_000)},
                                tmp_path / 'many.safetensors')
    with pytest.raises(UserError, match='its header is longer than 1,000,000 bytes'):
        load_weights(str(tmp_path / 'many.safetensors'))
    (tmp_path / 'plain.safetensors').write_bytes(content.replace(b'"F32"', b'"\\u001b"', 1))
    with pytest.raises(UserError) as error:
        load_weights(str(tmp_path / 'plain.safetensors'))
    assert str(error.value).isprintable()
    with pytest.raises(UserError, match='contains only weights'):
        checkpoint.load_training(path)
    with pytest.raises(UserError, match='x.safetensors: can hold only arrays, but .model. is a dict'):
        checkpoint.save({'model': model.state_dict()}, str(tmp_path / 'x.safetensors'))


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    monkeypatch.setitem(sys.modules, 'safetensors.numpy', None)
    (tmp_path / 'w.safetensors').write_bytes(b'')
    for call in (lambda path: checkpoint.load(path), lambda path: checkpoint.save({}, path)):
        with pytest.raises(UserError, match='w.safetensors: needs safetensors: pip install safetensors'):
            call(str(tmp_path / 'w.safetensors'))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """The bytes of a small checkpoint."""
    path = str(tmp_path_factory.mktemp('small') / 'w.pdparams')
    state = {name: kind() for name, kind in checkpoint.PARTS.items()}
    arrays = {f'stages.{n}': np.arange(n, dtype='float32') for n in range(1, 4)}
    paddle.save({**state, 'model': arrays, 'model_ema': arrays, 'best': {'acc1': 1.5, 'epoch': 1}}, path)
    with open(path, 'rb') as file:
        return file.read()


@pytest.mark.filterwarnings('ignore:invalid escape sequence')  # from pickletools, which decodes bytes as text
def test_any_bytes_are_read_or_refused(small, long, tmp_path):
    """Mutated checkpoints and pickles of other objects give a value or a one-line UserError."""
    path = str(tmp_path / 'w.pdparams')
    values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
                          lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner)
                          | st.tuples(inner, inner), max_leaves=10)
    edits = st.lists(st.tuples(st.integers(0, len(small) - 1), st.integers(0, 3), st.binary(max_size=4)), min_size=1,
                     max_size=6)
    seen = {'read': 0, 'refused': 0}

    @settings(max_examples=20000 if long else 300, deadline=None, derandomize=True, database=None)
    @given(edits | values | st.binary())
    def check(value):
        if isinstance(value, list) and value and all(isinstance(edit, tuple) and len(edit) == 3 for edit in value):
            content = bytearray(small)
            for place, length, new in value:
                content[place:place + length] = new
        else:
            content = value if isinstance(value, bytes) else pickle.dumps(value, protocol=4)
        with open(path, 'wb') as file:
            file.write(content)
        for load in (checkpoint.load, load_weights, checkpoint.load_training):
            try:
                load(path)
                seen['read'] += 1
            except UserError as error:
                assert '\n' not in str(error) and len(str(error)) < 600
                seen['refused'] += 1
    check()
    assert min(seen.values()) > 10
