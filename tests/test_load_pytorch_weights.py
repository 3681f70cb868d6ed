"""Conversion of PyTorch checkpoints: each tensor used once, wrapped or prefixed state dicts, errors."""
import hashlib
import importlib.util
import json
import pathlib
import pickle
import re

import numpy as np
import official_weights
import pytest
import safetensors.numpy
from conftest import NARROW, ROOT, VARIANTS, assert_same, fails, run, variant_config

from load_pytorch_weights import unwrap
from mobileone import build_mobileone
from utils import UserError
from weights import CLASSIFIER, LAYOUTS, convert_state_dict, find_layout, is_fused, load_weights

HERE = pathlib.Path(official_weights.__file__).parent
KEYS = {layout: json.loads((HERE / f'{layout}_keys.json').read_text()) for layout in LAYOUTS}
OFFICIAL = KEYS['official']
PADDLE = json.loads((HERE / 'paddle_keys.json').read_text())


def numbered(shapes):
    """Arrays of these shapes, each filled with its own number."""
    return {name: np.full(shape, number, 'float32') for number, (name, shape) in enumerate(shapes.items(), 1)}


def renamed(arrays, layout):
    """Rename and transpose the arrays of a Paddle network as PyTorch stores them."""
    return {LAYOUTS[layout](name): value.T if name == 'fc.weight' else value for name, value in arrays.items()}


@pytest.fixture
def arrays(config):
    """The arrays of a narrow, unfused network."""
    return {name: tensor.numpy() for name, tensor in build_mobileone(config).state_dict().items()}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', ['unfused', 'fused'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_tensor_is_used_once(variant, kind, layout):
    tensors = numbered(KEYS[layout][variant][kind])
    converted = convert_state_dict(tensors, variant_config(variant))
    assert {name: list(value.shape) for name, value in converted.items()} == PADDLE[variant][kind]
    used = [value.flat[0] for value in converted.values()]
    expected = [value.flat[0] for name, value in tensors.items() if not name.endswith('num_batches_tracked')]
    assert sorted(used) == sorted(expected)
    assert is_fused(converted) == (kind == 'fused')
    # converting the same network from either layout gives the same arrays
    for other in LAYOUTS:
        assert_same(convert_state_dict(renamed(converted, other), variant_config(variant)), converted)


@pytest.mark.parametrize('own, official, timm', [
    ('stages.0.0.dw_3x3_blocks.0.norm.bias', 'stage0.rbr_conv.0.bn.bias', 'stem.conv_kxk.0.bn.bias'),
    ('stages.0.0.dw_1x1.conv.weight', 'stage0.rbr_scale.conv.weight', 'stem.conv_scale.conv.weight'),
    ('stages.0.0.dw_3x3.conv.bias', 'stage0.reparam_conv.bias', 'stem.reparam_conv.bias'),
    ('stages.3.4.pw_skip._variance', 'stage3.9.rbr_skip.running_var', 'stages.2.9.identity.running_var'),
    ('stages.1.0.dw_3x3_blocks.3.norm._mean', 'stage1.0.rbr_conv.3.bn.running_mean',
     'stages.0.0.conv_kxk.3.bn.running_mean'),
    ('stages.1.0.pw_1x1_blocks.1.conv.weight', 'stage1.1.rbr_conv.1.conv.weight', 'stages.0.1.conv_kxk.1.conv.weight'),
    ('stages.2.7.dw_1x1.norm.weight', 'stage2.14.rbr_scale.bn.weight', 'stages.1.14.conv_scale.bn.weight'),
    ('stages.4.0.pw_1x1.conv.weight', 'stage4.1.reparam_conv.weight', 'stages.3.1.reparam_conv.weight'),
    ('stages.4.0.dw_se.reduce.weight', 'stage4.0.se.reduce.weight', 'stages.3.0.attn.fc1.weight'),
    ('stages.3.9.pw_se.expand.bias', 'stage3.19.se.expand.bias', 'stages.2.19.attn.fc2.bias'),
    ('fc.weight', 'linear.weight', 'head.fc.weight')])
def test_names_in_each_layout(own, official, timm):
    assert (LAYOUTS['official'](own), LAYOUTS['timm'](own)) == (official, timm)
    kinds = ('unfused', 'fused')
    assert any(own in PADDLE['s4'][kind] or own in PADDLE['s0'][kind] for kind in kinds)
    for layout, name in (('official', official), ('timm', timm)):
        assert any(name in KEYS[layout][variant][kind] for kind in kinds for variant in ('s0', 's4'))


def test_only_the_classifier_is_transposed():
    official = official_weights.state_dict('s1')
    converted = convert_state_dict(official, variant_config('s1'))
    np.testing.assert_array_equal(converted['fc.weight'], official['linear.weight'].T)
    for name in ('stages.1.0.dw_1x1.conv.weight', 'stages.3.4.pw_skip._variance',
                 'stages.2.1.pw_1x1_blocks.0.norm._mean'):
        np.testing.assert_array_equal(converted[name], official[LAYOUTS['official'](name)])


def test_errors_name_the_tensors():
    config, official = variant_config('s1'), numbered(OFFICIAL['s1']['unfused'])
    name = 'stage2.3.rbr_conv.0.bn.running_mean'
    with pytest.raises(UserError, match=f'missing {name}'):
        convert_state_dict({key: value for key, value in official.items() if key != name}, config)
    for extra in ('stage9.0.x', 'stage1.0.rbr_skip.num_batches_tracked'):  # the second belongs to no batch norm
        with pytest.raises(UserError, match=f'unexpected {extra}'):
            convert_state_dict({**official, extra: np.zeros(3)}, config)
    with pytest.raises(UserError, match=rf'{name} is \[3\], not \[192\]'):
        convert_state_dict({**official, name: np.zeros(3)}, config)
    with pytest.raises(UserError, match=r'official names, unfused, classifier \[1000, 1280\]\) .*'
                                        'more; give the -cfg'):
        convert_state_dict(official, variant_config('s0'))
    config.MODEL.NUM_CLASSES = 10
    with pytest.raises(UserError, match=r'linear.weight is \[1000, 1280\], not .*MODEL.NUM_CLASSES'):
        convert_state_dict(official, config)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_custom_networks_are_converted(config, layout):
    """Names depend on the config, not on the five variants."""
    config.MODEL.NUM_BLOCKS = [1, 2, 1, 3, 2]
    arrays = {name: tensor.numpy() for name, tensor in build_mobileone(config).state_dict().items()}
    tensors = renamed(arrays, layout)
    assert len(tensors) == len(arrays)
    assert_same(convert_state_dict(tensors, config), arrays)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('prefix', ['module.', 'backbone.', 'model.stage0.'])
def test_a_network_in_a_larger_one(arrays, config, prefix, layout):
    tensors = {prefix + name: value for name, value in renamed(arrays, layout).items()}
    assert find_layout(tensors).description == f"{layout} names, unfused, prefix '{prefix}', classifier [10, 8]"
    tensors.update({'n_averaged': np.array(3), 'neck.conv.weight': np.broadcast_to(np.float32(0), [2 ** 20] * 2)})
    assert find_layout(tensors).description.endswith('classifier [10, 8], other tensors ignored: 2')
    assert_same(convert_state_dict(tensors, config), arrays)
    with pytest.raises(UserError, match='unexpected stem2.weight'):
        convert_state_dict({**tensors, f'{prefix}stem2.weight': np.zeros(3, 'float32')}, config)
    for name in CLASSIFIER:
        del tensors[prefix + LAYOUTS[layout](name)]
    with pytest.raises(UserError, match=f'prefix .{prefix}., no classifier, other tensors ignored: 2.*: add '
                                        f'{prefix}{LAYOUTS[layout]("fc.weight")} and'):
        convert_state_dict(tensors, config)


def test_checkpoints_with_no_mobileone_or_several(arrays, config):
    with pytest.raises(UserError, match='no MobileOne .*but conv1.weight; layer1.0.bn1.weight; give'):
        find_layout(dict.fromkeys(('conv1.weight', 'layer1.0.bn1.weight'), np.zeros(3)))
    with pytest.raises(UserError, match='no MobileOne .*but nothing; give'):
        find_layout({})
    with pytest.raises(UserError, match='no MobileOne .*but stages.0.0.dw_1x1.conv.weight; '):
        find_layout(arrays)
    with pytest.raises(UserError, match='no MobileOne'):  # a name with only the same ending
        find_layout({f'old{name}': value for name, value in renamed(arrays, 'official').items()})
    tensors = {f'{layout}.{name}': value for layout in LAYOUTS for name, value in renamed(arrays, layout).items()}
    with pytest.raises(UserError, match='contains 2 MobileOnes: official names, .*; timm names, .*; save only one'):
        convert_state_dict(tensors, config)


def bfloat16(array):
    """The bits of an array's numbers, truncated to bfloat16."""
    return (np.ascontiguousarray(array, 'float32').view('uint32') >> 16).astype('uint16')


def test_other_types_become_float32(arrays, config):
    arrays = {name: np.round(value * 4) for name, value in arrays.items()}  # exact in all types
    tensors = renamed(arrays, 'timm')
    for convert in (bfloat16, lambda value: value.astype('float16'), lambda value: value.astype('float64')):
        assert_same(convert_state_dict({name: convert(value) for name, value in tensors.items()}, config), arrays)
    with pytest.raises(UserError, match='head.fc.weight is an array of int8, not an array of floats'):
        convert_state_dict({**tensors, 'head.fc.weight': tensors['head.fc.weight'].astype('int8')}, config)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'uint16'])
def test_expanded_tensors_take_no_memory(arrays, config, dtype):
    """A few bytes that claim to be terabytes."""
    tensors = renamed(arrays, 'official')
    huge = np.broadcast_to(np.zeros(1, dtype), [2 ** 21, 2 ** 21])
    with pytest.raises(UserError, match=r'linear.weight is \[2097152, 2097152\], not \[10, 8\]'):
        convert_state_dict({**tensors, 'linear.weight': huge}, config)
    converted = convert_state_dict({**tensors, 'linear.weight': np.broadcast_to(np.zeros(1, dtype), [10, 8])}, config)
    assert converted['fc.weight'].flags.c_contiguous and not converted['fc.weight'].any()


# a stand-in for PyTorch, which the tests do not install: it checks how a file, here a pickle of arrays, is read. uint16
# arrays represent bfloat16, and bool a type that NumPy lacks
FAKE_TORCH = '''
import contextlib, os, pickle, types
import numpy
__version__ = os.environ.get('FAKE_TORCH_VERSION', '2.13.0+cpu')
bfloat16, int16 = 'torch.bfloat16', 'int16'
serialization = types.SimpleNamespace(safe_globals=lambda classes: contextlib.nullcontext())
class Tensor:
    layout = 'torch.strided'
    def __init__(self, value, detached=False):
        self.value, self.detached = value, detached
        self.dtype = bfloat16 if value.dtype == 'uint16' else value.dtype
    def detach(self):
        return Tensor(self.value, True)
    def view(self, dtype):
        return Tensor(self.value.view(dtype), self.detached)
    def numpy(self):
        if self.dtype in (bfloat16, bool):
            raise TypeError('no such type')
        if not self.detached:
            raise RuntimeError('requires grad')
        return self.value
def tensors(state):
    if isinstance(state, dict):
        return {name: tensors(value) for name, value in state.items()}
    return Tensor(state) if isinstance(state, numpy.ndarray) else state
def load(path, map_location, weights_only):
    assert map_location == 'cpu' and weights_only is True
    return tensors(pickle.load(open(path, 'rb')))
'''


@pytest.fixture
def env(tmp_path):
    """An environment that imports the stand-in as torch."""
    (tmp_path / 'fake').mkdir()
    (tmp_path / 'fake/torch.py').write_text(FAKE_TORCH)
    return {'PYTHONPATH': str(tmp_path / 'fake')}


@pytest.fixture
def convert(tmp_path, env):
    """convert(state, call) -> the result of call (`run` or `fails`) for converting a file of S1's tensors."""
    def convert(state, call):
        (tmp_path / 'in.pth').write_bytes(pickle.dumps(state))
        return call('load_pytorch_weights.py', tmp_path / 'in.pth', tmp_path / 'out.pdparams', '-cfg',
                    ROOT / 'configs/mobileone_s1.yaml', env=env)
    return convert


def test_command_line(tmp_path, env):
    source, target, cfg = tmp_path / 's0.pth.tar', tmp_path / 's0.pdparams', ROOT / 'configs/mobileone_s0.yaml'
    source.write_bytes(pickle.dumps(official_weights.state_dict('s0')))
    out = run('load_pytorch_weights.py', '-cfg', cfg, source, target, env=env).stdout
    assert '(unfused)' in out and 's0.pdparams' in out
    assert f'{source}: SHA-256 {hashlib.sha256(source.read_bytes()).hexdigest()}' in out
    assert f'{source}: official names, unfused, classifier [1000, 1024]\n' in out
    assert 'in PyTorch 2.5.1, a file can run code' in fails(
        'load_pytorch_weights.py', '-cfg', cfg, source, target, env={**env, 'FAKE_TORCH_VERSION': '2.5.1'})
    loaded, _ = load_weights(str(target))
    expected = convert_state_dict(official_weights.state_dict('s0'), variant_config('s0'))
    assert_same(loaded, expected)
    line = fails('load_pytorch_weights.py', f'-cfg={ROOT}/configs/mobileone_s1.yaml', source, target, env=env)
    assert 'does not fit the network of the config' in line
    assert f'{tmp_path}: is a folder, not a regular file' in fails(
        'load_pytorch_weights.py', '-cfg', cfg, tmp_path, target, env=env)
    assert 'no such checkpoint' in fails('load_pytorch_weights.py', '-cfg', cfg, tmp_path / 'x', target, env=env)
    assert '-cfg is required' in fails('load_pytorch_weights.py', source, target, env=env)
    source.write_bytes(b'broken')
    assert 'is also the input' in fails('load_pytorch_weights.py', '-cfg', cfg, source, source, env=env)
    assert 'not a PyTorch state dict' in fails('load_pytorch_weights.py', '-cfg', cfg, source, target, env=env)
    source.write_bytes(pickle.dumps(official_weights.state_dict('s0')))
    (tmp_path / 'two.yaml').write_text('MODEL:\n  NUM_BLOCKS: [2, 1, 1, 1, 1]\n')
    assert 'NUM_BLOCKS' in fails('load_pytorch_weights.py', '-cfg', tmp_path / 'two.yaml', source, target, env=env)


def test_wrapped_state_dicts(convert, tmp_path):
    """The innermost one is used, averaged weights first, regardless of what is next to it."""
    state = {name: value.astype('float16') for name, value in numbered(KEYS['timm']['s1']['fused']).items()}
    half = {name: bfloat16(value) for name, value in state.items()}
    other = {name: value + 1 for name, value in state.items()}
    averaged = {'n_averaged': np.array(7), **{f'module.{name}': value for name, value in state.items()}}
    expected = convert_state_dict(state, variant_config('s1'))
    for wrapped, place in (
            ({'state_dict': state, 'epoch': 3, 'arch': 'mobileone_s1', 'optimizer': {'state': {}}}, 'in state_dict: '),
            ({'model': averaged, 'model_ema': {}, 'state_dict_ema': None},
             "in model: timm names, fused, prefix 'module.'"),
            ({'model': {'state_dict': half}}, 'in model.state_dict: '),
            ({'model': other, 'model_ema': averaged}, 'in model_ema: '),
            ({'state_dict': other, 'state_dict_ema': state}, 'in state_dict_ema: ')):
        assert f'in.pth: {place}' in convert(wrapped, run).stdout
        assert_same(load_weights(str(tmp_path / 'out.pdparams'))[0], expected)


def test_checkpoints_without_a_network(convert):
    for state, line in (({'state_dict': {}, 'epoch': 3}, "no dictionary of tensors, .* but dict .'state_dict', 'ep"),
                        ([1, 2], 'no dictionary of tensors, .* but list'),
                        (np.zeros(2), 'no dictionary of tensors, .* but Tensor'),
                        ({'a\nb': np.zeros(2)}, 'not a PyTorch state dict'),
                        ({'head.fc.weight': np.zeros(2, 'bool')}, 'head.fc.weight is a tensor of bool .torch.strided.'),
                        ({'model': {'fc.weight': np.zeros(2)}}, 'contains no MobileOne .* but fc.weight; give')):
        assert re.search(line, convert(state, fails))
    itself = {}
    itself['model'] = itself
    assert unwrap(itself)[0] is itself


@pytest.mark.parametrize('type_', ['float32', 'bfloat16'])
def test_other_widths_and_classes_by_opts(tmp_path, arrays, type_):
    """Converting one .safetensors file to another needs no PyTorch."""
    arrays = {name: np.round(value * 4) for name, value in arrays.items()}
    tensors = {f'model.{name}': np.ascontiguousarray(value) for name, value in renamed(arrays, 'timm').items()}
    tensors['model.stem.conv_kxk.0.bn.num_batches_tracked'] = np.array(5)
    source, target = tmp_path / 'in.safetensors', tmp_path / 'out.safetensors'
    if type_ == 'bfloat16':
        tensors = {name: bfloat16(value) if value.dtype == 'float32' else value for name, value in tensors.items()}
    content = safetensors.numpy.save(tensors)
    size = int.from_bytes(content[:8], 'little')
    header = content[8:8 + size].replace(b'"U16"', b'"BF16"')
    source.write_bytes(len(header).to_bytes(8, 'little') + header + content[8 + size:])
    (tmp_path / 'torch.py').write_text('raise ImportError("none here")')
    command = ['load_pytorch_weights.py', source, target, '-cfg', ROOT / 'configs/mobileone_s0.yaml', '-opts', *NARROW]
    out = run(*command, 'MODEL.NUM_CLASSES', '10', env={'PYTHONPATH': str(tmp_path)}).stdout
    assert f"{source}: timm names, unfused, prefix 'model.', classifier [10, 8]" in out
    loaded, _ = load_weights(str(target))  # safetensors sorts the tensors its own way
    assert_same(dict(sorted(loaded.items())), dict(sorted(arrays.items())))
    assert 'head.fc.weight is [10, 8], not [1000, 8]' in fails(*command)
    assert 'MODEL.NUM_CLASSES is 0, ' in fails(*command, 'MODEL.NUM_CLASSES', '0')


def test_without_pytorch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ImportError("none here")')
    line = fails('load_pytorch_weights.py', '-cfg', ROOT / 'configs/mobileone_s0.yaml', 'x.pth.tar', 'y.pdparams',
                 env={'PYTHONPATH': str(tmp_path)})
    assert 'pip install torch' in line


@pytest.mark.skipif(importlib.util.find_spec('torch') is None,
                    reason='PyTorch is not required; the stand-in above covers the rest')
def test_real_pytorch_files(tmp_path):
    """Averaged bfloat16 weights with gradients, under a prefix, next to the arguments that timm stores."""
    # in its own process: PyTorch and Paddle conflict within one
    run('-c', f"""
import argparse, sys, torch, numpy as np
sys.path.insert(0, {str(HERE)!r})
import official_weights
state = {{name: torch.from_numpy(np.array(value)) for name, value in official_weights.state_dict('s0').items()}}
torch.save(state, {str(tmp_path / 's0.pth.tar')!r})
state = {{f'module.{{name}}': torch.nn.Parameter(value.bfloat16()) if value.is_floating_point() else value
         for name, value in state.items()}}
state['neck.weight'] = torch.zeros(1, dtype=torch.bfloat16).expand(2 ** 21, 2 ** 21)
torch.save({{'args': argparse.Namespace(lr=0.1), 'state_dict': {{}}, 'state_dict_ema': state}},
           {str(tmp_path / 's0.pth')!r})
state['module.linear.weight'] = state['neck.weight']
torch.save(state, {str(tmp_path / 'huge.pth')!r})
state['module.linear.weight'] = torch.zeros(2, 2).to_sparse()
torch.save(state, {str(tmp_path / 'sparse.pth')!r})
""")
    expected = convert_state_dict(official_weights.state_dict('s0'), variant_config('s0'))
    cfg, target = ROOT / 'configs/mobileone_s0.yaml', tmp_path / 's0.pdparams'
    run('load_pytorch_weights.py', '-cfg', cfg, tmp_path / 's0.pth.tar', target)
    assert_same(load_weights(str(target))[0], expected)
    out = run('load_pytorch_weights.py', '-cfg', cfg, tmp_path / 's0.pth', target).stdout
    assert "in state_dict_ema: official names, unfused, prefix 'module.', classifier" in out
    for name, value in load_weights(str(target))[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=2 ** -8)
    assert 'linear.weight is [2097152, 2097152], not' in fails(
        'load_pytorch_weights.py', '-cfg', cfg, tmp_path / 'huge.pth', target)
    assert 'linear.weight is a tensor of torch.float32 (torch.sparse_coo)' in fails(
        'load_pytorch_weights.py', '-cfg', cfg, tmp_path / 'sparse.pth', target)
