"""Conversion of official checkpoints: every tensor once, and the errors."""
import hashlib
import importlib.util
import json
import pathlib
import pickle

import numpy as np
import official_weights
import pytest
from conftest import ROOT, VARIANTS, fails, run, variant_config

from mobileone import build_mobileone
from utils import UserError
from weights import convert_state_dict, is_fused, load_weights, official_name

HERE = pathlib.Path(official_weights.__file__).parent
OFFICIAL = json.loads((HERE / 'official_keys.json').read_text())
PADDLE = json.loads((HERE / 'paddle_keys.json').read_text())


def numbered(shapes):
    """Arrays of these shapes, each filled with a number of its own."""
    return {name: np.full(shape, number, 'float32') for number, (name, shape) in enumerate(shapes.items(), 1)}


@pytest.mark.parametrize('kind', ['unfused', 'fused'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_tensor_is_used_once(variant, kind):
    official = numbered(OFFICIAL[variant][kind])
    converted = convert_state_dict(official, variant_config(variant))
    assert {name: list(value.shape) for name, value in converted.items()} == PADDLE[variant][kind]
    used = [value.flat[0] for value in converted.values()]
    expected = [value.flat[0] for name, value in official.items() if not name.endswith('num_batches_tracked')]
    assert sorted(used) == sorted(expected)
    assert is_fused(converted) == (kind == 'fused')


def test_classifier_is_transposed_and_nothing_else_moves():
    official = official_weights.state_dict('s1')
    converted = convert_state_dict(official, variant_config('s1'))
    np.testing.assert_array_equal(converted['fc.weight'], official['linear.weight'].T)
    for name in ('stages.1.0.dw_1x1.conv.weight', 'stages.3.4.pw_skip._variance',
                 'stages.2.1.pw_1x1_blocks.0.norm._mean'):
        np.testing.assert_array_equal(converted[name], official[official_name(name)])
    assert official_name('stages.3.4.pw_skip._variance') == 'stage3.9.rbr_skip.running_var'
    assert official_name('stages.0.0.dw_3x3_blocks.0.norm.bias') == 'stage0.rbr_conv.0.bn.bias'


def test_errors_name_the_tensors():
    config, official = variant_config('s1'), numbered(OFFICIAL['s1']['unfused'])
    name = 'stage2.3.rbr_conv.0.bn.running_mean'
    with pytest.raises(UserError, match=f'missing {name}'):
        convert_state_dict({key: value for key, value in official.items() if key != name}, config)
    for extra in ('stage9.0.x', 'stage1.0.rbr_skip.num_batches_tracked'):  # the second has no batch norm
        with pytest.raises(UserError, match=f'unexpected {extra}'):
            convert_state_dict({**official, extra: np.zeros(3)}, config)
    with pytest.raises(UserError, match=rf'{name} is \[3\], which does not fit stages.2.1.pw_1x1_blocks.0.norm._mean'):
        convert_state_dict({**official, name: np.zeros(3)}, config)
    with pytest.raises(UserError, match='more; give the -cfg'):
        convert_state_dict(official, variant_config('s0'))
    config.MODEL.NUM_CLASSES = 10
    with pytest.raises(UserError, match=r'linear.weight is \[1000, 1280\]'):
        convert_state_dict(official, config)


def test_other_networks_convert(config):
    """The names follow from the config, not from the five variants."""
    config.MODEL.NUM_BLOCKS = [1, 2, 1, 3, 2]
    model = build_mobileone(config)
    official = {official_name(name): np.asarray(tensor.numpy()) for name, tensor in model.state_dict().items()}
    official['linear.weight'] = official['linear.weight'].T
    assert len(official) == len(model.state_dict())
    converted = convert_state_dict(official, config)
    assert all(np.array_equal(converted[name], tensor.numpy()) for name, tensor in model.state_dict().items())


# a stand-in for PyTorch, which the tests do not install: it checks how the file is read
FAKE_TORCH = '''
import os, pickle
__version__ = os.environ.get('FAKE_TORCH_VERSION', '2.13.0+cpu')
def load(path, map_location, weights_only):
    assert map_location == 'cpu' and weights_only is True
    class Tensor:
        def __init__(self, value): self.value = value
        def numpy(self): return self.value
    state = pickle.load(open(path, 'rb'))
    return state if os.environ.get('FAKE_TORCH_RAW') else {name: Tensor(value) for name, value in state.items()}
'''


def test_command_line(tmp_path):
    (tmp_path / 'fake').mkdir()
    (tmp_path / 'fake/torch.py').write_text(FAKE_TORCH)
    env = {'PYTHONPATH': str(tmp_path / 'fake')}
    source, target, cfg = tmp_path / 's0.pth.tar', tmp_path / 's0.pdparams', ROOT / 'configs/mobileone_s0.yaml'
    source.write_bytes(pickle.dumps(official_weights.state_dict('s0')))
    out = run('load_pytorch_weights.py', '-cfg', cfg, source, target, env=env).stdout
    assert '(unfused)' in out and 's0.pdparams' in out
    assert f'{source}: SHA-256 {hashlib.sha256(source.read_bytes()).hexdigest()}' in out
    assert 'PyTorch is 2.5.1, in which a file can run code' in fails(
        'load_pytorch_weights.py', '-cfg', cfg, source, target, env={**env, 'FAKE_TORCH_VERSION': '2.5.1'})
    loaded, _ = load_weights(str(target))
    expected = convert_state_dict(official_weights.state_dict('s0'), variant_config('s0'))
    assert all(np.array_equal(loaded[name], value) for name, value in expected.items()) and len(loaded) == len(expected)
    line = fails('load_pytorch_weights.py', f'-cfg={ROOT}/configs/mobileone_s1.yaml', source, target, env=env)
    assert 'does not fit the network of the config' in line
    assert f'{tmp_path}: is a folder, not a regular file' in fails(
        'load_pytorch_weights.py', '-cfg', cfg, tmp_path, target, env=env)
    assert 'no such checkpoint' in fails('load_pytorch_weights.py', '-cfg', cfg, tmp_path / 'x', target, env=env)
    source.write_bytes(pickle.dumps({'state_dict': {}, 'epoch': 3}))
    env_flat = {'PYTHONPATH': str(tmp_path / 'fake'), 'FAKE_TORCH_RAW': '1'}
    assert 'holds no flat dictionary' in fails('load_pytorch_weights.py', '-cfg', cfg, source, target, env=env_flat)
    source.write_bytes(b'broken')
    assert 'is the input too' in fails('load_pytorch_weights.py', '-cfg', cfg, source, source, env=env)
    assert 'not a PyTorch state dict' in fails('load_pytorch_weights.py', '-cfg', cfg, source, target, env=env)
    source.write_bytes(pickle.dumps(official_weights.state_dict('s0')))
    (tmp_path / 'two.yaml').write_text('MODEL:\n  NUM_BLOCKS: [2, 1, 1, 1, 1]\n')
    assert 'NUM_BLOCKS' in fails('load_pytorch_weights.py', '-cfg', tmp_path / 'two.yaml', source, target, env=env)


def test_without_pytorch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise ImportError("none here")')
    line = fails('load_pytorch_weights.py', '-cfg', ROOT / 'configs/mobileone_s0.yaml', 'x.pth.tar', 'y.pdparams',
                 env={'PYTHONPATH': str(tmp_path)})
    assert 'pip install torch' in line


@pytest.mark.skipif(importlib.util.find_spec('torch') is None,
                    reason='PyTorch is no requirement; the stand-in above covers the rest')
def test_real_pytorch_file(tmp_path):
    # in a process of its own: PyTorch and Paddle do not go well together in one
    run('-c', f"""
import sys, torch, numpy as np
sys.path.insert(0, {str(HERE)!r})
import official_weights
torch.save({{name: torch.from_numpy(np.array(value)) for name, value in official_weights.state_dict('s0').items()}},
           {str(tmp_path / 's0.pth.tar')!r})
""")
    run('load_pytorch_weights.py', '-cfg', ROOT / 'configs/mobileone_s0.yaml', tmp_path / 's0.pth.tar',
        tmp_path / 's0.pdparams')
    loaded, _ = load_weights(str(tmp_path / 's0.pdparams'))
    expected = convert_state_dict(official_weights.state_dict('s0'), variant_config('s0'))
    assert all(np.array_equal(loaded[name], value) for name, value in expected.items())
