"""MobileOne's weight files: inferring the network, strict loading, the exception for the classifier."""
import os
import pickle

import numpy as np
import paddle
import pytest
from conftest import variant_config

from mobileone import build_mobileone, model_convert
from runtime import checkpoint
from utils import UserError
from weights import is_fused, load_into, load_model, load_start, load_weights, with_classes_of


@pytest.fixture
def model(config):
    return build_mobileone(config)


def arrays(model):
    return checkpoint.to_arrays(model.state_dict())


def test_released_file_and_round_trip(model, config, tmp_path):
    path = str(tmp_path / 'released.pdparams')
    paddle.save(model.state_dict(), path)  # as for the released files
    weights, is_ema = load_weights(path)
    assert not is_ema and not is_fused(weights)
    paddle.seed(1)
    other = build_mobileone(config)
    assert load_into(other, weights, path) == []
    assert all(np.array_equal(value, arrays(other)[name]) for name, value in arrays(model).items())
    checkpoint.save(model.state_dict(), path)
    again, _ = load_weights(path)
    assert all(np.array_equal(value, again[name]) for name, value in weights.items())
    assert os.listdir(tmp_path) == ['released.pdparams']


def test_fused_weights_are_recognized_by_name(model):
    assert not is_fused(model.state_dict())
    assert is_fused(model_convert(model).state_dict())
    config = variant_config('s4')
    config.MODEL.DEPLOY = True
    assert is_fused(build_mobileone(config).state_dict())


def test_ema_weights_come_first(model, tmp_path):
    path = str(tmp_path / 'c.pdparams')
    ema = {name: value + 1 for name, value in arrays(model).items()}
    checkpoint.save({'model': model.state_dict(), 'model_ema': ema, 'epoch': 3}, path)
    weights, is_ema = load_weights(path)
    assert is_ema and all(np.array_equal(weights[name], ema[name]) for name in ema)
    weights, is_ema = load_weights(path, raw=True)
    assert not is_ema and np.array_equal(weights['fc.weight'], model.fc.weight.numpy())
    paddle.save({'model': model.state_dict(), 'epoch': 3}, path)  # nested tensors, as in the ancestor's checkpoints
    weights, is_ema = load_weights(path)
    assert not is_ema and np.array_equal(weights['fc.weight'], model.fc.weight.numpy())
    for without in ({}, None):
        checkpoint.save({'model': model.state_dict(), 'model_ema': without, 'epoch': 3}, path)
        weights, is_ema = load_weights(path)
        assert not is_ema and np.array_equal(weights['fc.weight'], model.fc.weight.numpy())


def test_loading_is_strict(model):
    good = arrays(model)
    before = arrays(model)
    name = 'stages.1.0.dw_1x1.conv.weight'
    for bad, message in (
            ({key: value for key, value in good.items() if key != name}, f'w.pdparams: .*missing {name}'),
            ({**good, 'stages.9.0.x': good[name]}, 'unexpected stages.9.0.x'),
            ({**good, name: good[name][:1]}, rf'{name} is \[1, 1, 1, 1\], not \[4, 1, 1, 1\]'),
            ({**good, 'fc.bias': good['fc.bias'][:3]}, r'fc.bias is \[3\], not \[10\].*MODEL.NUM_CLASSES')):
        bad = {key: value + 1 for key, value in bad.items()}
        with pytest.raises(UserError, match=message):
            load_into(model, bad, 'w.pdparams')
        assert all(np.array_equal(value, before[key]) for key, value in arrays(model).items())


def test_only_a_classifier_with_a_different_size_may_be_skipped(model, config):
    config.MODEL.NUM_CLASSES = 4
    smaller = build_mobileone(config)
    own = arrays(smaller)
    left_out = load_into(smaller, arrays(model), 'w', allow_other_classifier=True)
    assert left_out == ['fc.weight', 'fc.bias']
    for name, value in arrays(smaller).items():
        assert np.array_equal(value, own[name] if name in left_out else arrays(model)[name])
    weights = arrays(model)
    weights['stages.0.0.dw_1x1.conv.weight'] = weights['stages.0.0.dw_1x1.conv.weight'][:2]
    with pytest.raises(UserError, match='stages.0.0.dw_1x1.conv.weight'):
        load_into(smaller, weights, 'w', allow_other_classifier=True)
    without = {name: value for name, value in arrays(model).items() if name != 'fc.bias'}
    with pytest.raises(UserError, match='missing fc.bias'):
        load_into(model, without, 'w', allow_other_classifier=True)


@pytest.mark.parametrize('content, message', [
    (None, 'no such weight file'),
    (b'', 'not a .pdparams file'),
    (b'not a pickle', 'not a .pdparams file'),
    (pickle.dumps([1, 2], protocol=4), 'contains list'),
    (pickle.dumps({'epoch': 1}, protocol=4), 'no MobileOne weights'),
    (pickle.dumps({1: np.zeros(3)}, protocol=4), 'a key in it is int, not a short printable string'),
    (pickle.dumps({'stages.0': [[1], [1, 2]]}, protocol=4), 'stages.0 is .*, not an array of floats'),
    (pickle.dumps({'stage0.rbr_conv.0.conv.weight': np.zeros(3)}, protocol=4), 'load_pytorch_weights.py'),
    (pickle.dumps({'stem.conv_scale.conv.weight': np.zeros(3), 'stages.0.0.conv_scale.conv.weight': np.zeros(3)},
                  protocol=4), 'load_pytorch_weights.py'),
])
def test_files_without_weights(tmp_path, content, message):
    path = tmp_path / 'w.pdparams'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f'w.pdparams.*{message}') as error:
        load_weights(str(path))
    assert '\n' not in str(error.value)


def test_raw_weights_are_used_if_the_ema_is_invalid(model, tmp_path):
    for other in (np.zeros(2), 3, [1]):
        checkpoint.save({'model': model.state_dict(), 'model_ema': other}, str(tmp_path / 'x.pdparams'))
        weights, is_ema = load_weights(str(tmp_path / 'x.pdparams'))
        assert not is_ema and weights.keys() == model.state_dict().keys()


@pytest.mark.parametrize('fused_file, deploy, fused', [(False, False, False), (False, True, True), (True, False, True),
                                                       (True, True, True)])
def test_keys_determine_whether_the_network_is_fused(model, config, tmp_path, fused_file, deploy, fused):
    path = str(tmp_path / 'w.pdparams')
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._mean.set_value(paddle.randn(layer._mean.shape))
    model.eval()
    checkpoint.save((model_convert(model) if fused_file else model).state_dict(), path)
    config.MODEL.DEPLOY = deploy
    loaded, is_ema = load_model(config, path)
    loaded.eval()
    assert is_fused(loaded.state_dict()) == fused and not is_ema
    images = paddle.randn([2, 3, 32, 32])
    with paddle.no_grad():
        np.testing.assert_allclose(loaded(images).numpy(), model(images).numpy(), rtol=1e-3, atol=1e-4)


def test_training_may_start_with_different_classes(model, config, tmp_path):
    path = str(tmp_path / 'w.pdparams')
    checkpoint.save(model.state_dict(), path)
    for classes in (10, 4):
        config.MODEL.NUM_CLASSES = classes
        loaded, is_new = load_start(config, path)
        assert is_new == (classes == 4) and len(loaded.fc.bias) == classes
        for name, value in arrays(loaded).items():
            assert np.array_equal(value, arrays(model)[name]) or is_new and name.startswith('fc.')
    checkpoint.save(model_convert(model).state_dict(), path)
    with pytest.raises(UserError, match='w.pdparams: contains fused weights, which cannot be trained'):
        load_start(config, path)


def test_num_classes_0_is_taken_from_the_weights(model, config, tmp_path):
    path = str(tmp_path / 'w.pdparams')
    checkpoint.save({'model': model.state_dict(), 'model_ema': {}, 'epoch': 3}, path)
    config.MODEL.NUM_CLASSES = 4
    assert with_classes_of(config, path) is config
    config.MODEL.NUM_CLASSES = 0
    assert with_classes_of(config, path).MODEL.NUM_CLASSES == 10 and config.MODEL.NUM_CLASSES == 0
    assert np.array_equal(load_model(config, path)[0].fc.weight.numpy(), model.fc.weight.numpy())
    checkpoint.save({name: value for name, value in arrays(model).items() if name != 'fc.bias'}, path)
    for function in (lambda: load_model(config, path), lambda: build_mobileone(config)):
        with pytest.raises(UserError, match='MODEL.NUM_CLASSES is 0, .* with -opts MODEL.NUM_CLASSES N'):
            function()
