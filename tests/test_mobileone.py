"""The network: names, sizes, branches, fusion."""
import json
import pathlib

import numpy as np
import official_weights
import paddle
import pytest
from conftest import VARIANTS, variant_config

from mobileone import MobileOne, MobileOneBlock, build_mobileone, model_convert
from utils import UserError
from weights import convert_state_dict

KEYS = json.loads((pathlib.Path(official_weights.__file__).parent / 'paddle_keys.json').read_text())
# fused parameters, unfused trainable ones, multiply-adds at 224 fused and unfused, all parameters unfused
SIZES = {
    's0': (2078504, 5293272, 278949888, 1088464384, 5381464),
    's1': (4764840, 4825192, 831393024, 858500608, 4893544),
    's2': (7808168, 7884648, 1306086656, 1338575616, 7971688),
    's3': (10078312, 10170600, 1905025024, 1943961600, 10275304),
    's4': (14838352, 14951248, 2993094760, 3042844264, 15078992),
}


def randomise(model, seed=0):
    """Random weights, batch-norm statistics and affine values: fresh ones would hide mistakes of the fusion."""
    rng = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith('_variance'):
            value = rng.uniform(0.5, 2, shape)
        elif len(shape) > 1:
            value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        elif name.endswith('weight'):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = 0.3 * rng.standard_normal(shape)
        tensor.set_value(value.astype(tensor.numpy().dtype))
    model.eval()


def images(size, dtype='float32', batch=2, channels=3):
    return paddle.to_tensor(np.random.default_rng(1).standard_normal((batch, channels, size, size)).astype(dtype))


@pytest.mark.parametrize('variant', VARIANTS)
def test_names_shapes_and_sizes(variant):
    config = variant_config(variant)
    fused, unfused, flops_fused, flops_unfused, unfused_all = SIZES[variant]
    model = build_mobileone(config)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == KEYS[variant]['unfused']
    assert sum(p.size for p in model.parameters() if not p.stop_gradient) == unfused
    assert sum(p.size for p in model.parameters()) == unfused_all
    assert paddle.flops(model, [1, 3, 224, 224]) == flops_unfused
    config.MODEL.DEPLOY = True
    model = build_mobileone(config)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == KEYS[variant]['fused']
    assert sum(p.size for p in model.parameters()) == fused
    assert paddle.flops(model, [1, 3, 224, 224]) == flops_fused


@pytest.mark.parametrize('variant', VARIANTS)
def test_fused_equals_unfused_in_float64(variant):
    config = variant_config(variant)
    model = build_mobileone(config)
    model.set_state_dict(convert_state_dict(official_weights.state_dict(variant), config))
    model.to(dtype='float64')
    model.eval()
    x = images(64, 'float64', batch=1)
    with paddle.no_grad():
        expected = model(x).numpy()
        tolerance = dict(rtol=0, atol=1e-9 * np.abs(expected).max())
        np.testing.assert_allclose(model_convert(model)(x).numpy(), expected, **tolerance)
        for block in model.sublayers():
            if isinstance(block, MobileOneBlock):
                block.switch_to_deploy()
        np.testing.assert_allclose(model(x).numpy(), expected, **tolerance)


@pytest.mark.parametrize('options', [
    dict(num_blocks=[1, 1, 1, 1, 1], channels=[5, 7, 9, 11, 13], num_branches=[3, 1, 2, 3, 4]),
    dict(num_blocks=[1, 3, 2, 5, 3], channels=[8, 8, 8, 8, 8], num_branches=[1, 2, 1, 2, 1], use_se=True),
    dict(num_blocks=[1, 1, 2, 3, 2], channels=[64, 16, 24, 32, 40], num_branches=[1] * 5, strides=[1, 1, 2, 1, 2],
         num_classes=1, in_channels=1),
    dict(num_blocks=[1, 1, 2, 3, 2], channels=[3, 16, 24, 32, 40], num_branches=[1] * 5, strides=[1, 1, 2, 1, 2]),
])
def test_other_networks_fuse(options):
    options = dict(dict(strides=[2, 1, 2, 1, 2], expansions=[1.0] * 5, num_classes=7), **options)
    model = MobileOne(**options)
    randomise(model)
    x = images(32, channels=options.get('in_channels', 3))
    fused = model_convert(model)
    assert all(block.deploy for block in fused.sublayers() if isinstance(block, MobileOneBlock))
    assert model(x).shape == [2, options['num_classes']]
    assert not np.allclose(model(x)[0].numpy(), model(x)[1].numpy(), atol=1e-3)
    np.testing.assert_allclose(fused(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-4)
    # the fused network's state fits a network that is built fused
    built = MobileOne(**options, deploy=True)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in fused.state_dict().items()}
    built.set_state_dict(fused.state_dict())
    built.eval()
    np.testing.assert_array_equal(built(x).numpy(), fused(x).numpy())


def test_conversion_leaves_the_model_as_it_is(config):
    model = build_mobileone(config)
    randomise(model)
    model.train()
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    fused = model_convert(model)
    assert model.training and not fused.training
    after = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert list(after) == list(before)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    for tensor in fused.state_dict().values():
        tensor.set_value(tensor * 0)
    assert all(np.array_equal(tensor.numpy(), before[name]) for name, tensor in model.state_dict().items())


def test_conversion_inside_another_layer_and_of_a_block():
    class Detector(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.backbone = paddle.nn.Sequential(MobileOneBlock(3, 8, 2, stride=2, use_pw=False),
                                                 MobileOneBlock(8, 16, 2, use_se=True))
            self.head = paddle.nn.Conv2D(16, 4, 1)

        def forward(self, x):
            return self.head(self.backbone(x))

    model = Detector()
    randomise(model)
    np.testing.assert_allclose(model_convert(model)(images(16)).numpy(), model(images(16)).numpy(), atol=1e-5)
    block = model.backbone[1]
    x = images(8, channels=8)
    expected = block(x).numpy()
    np.testing.assert_allclose(model_convert(block)(x).numpy(), expected, atol=1e-5)
    block.switch_to_deploy()
    block.switch_to_deploy()  # the second call finds nothing to do
    np.testing.assert_allclose(block(x).numpy(), expected, atol=1e-5)
    assert sorted(name.split('.')[0] for name in block.state_dict()) == sorted(
        ['dw_3x3'] * 2 + ['pw_1x1'] * 2 + ['dw_se'] * 4 + ['pw_se'] * 4)


def test_converting_after_training_mode_matters(config):
    """The fused network equals the evaluation mode, not the training mode, of the unfused one."""
    model = build_mobileone(config)
    randomise(model)
    fused = model_convert(model)
    model.train()
    assert np.abs(model(images(32)).numpy() - fused(images(32)).numpy()).max() > 1e-2


def test_what_is_frozen_stays_frozen(config):
    model = build_mobileone(config)
    for name, tensor in model.named_parameters():
        # whole layers, half a layer, a classifier's bias, SE
        if name.startswith(('stages.0.', 'stages.1.0.dw_', 'stages.2.0.pw_1x1_blocks.0.conv', 'fc.bias', 'stages.4.')):
            tensor.stop_gradient = True
    fused = model_convert(model)
    frozen = {name for name, tensor in fused.named_parameters() if tensor.stop_gradient}
    assert frozen == {name for name, _ in fused.named_parameters() if name.startswith(
        ('stages.0.', 'stages.1.0.dw_', 'fc.bias', 'stages.4.'))}
    assert {'stages.0.0.dw_3x3.conv.weight', 'stages.0.0.dw_3x3.conv.bias', 'stages.4.0.dw_se.expand.bias'} < frozen
    for tensor in model.parameters():
        tensor.stop_gradient = True
    assert all(tensor.stop_gradient for tensor in model_convert(model).parameters())


def test_a_network_prepared_for_quantization_is_refused(config):
    from paddle.quantization import QAT, QuantConfig, imperative, quanters
    quanter = quanters.FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    networks = [QAT(QuantConfig(activation=activation, weight=weight)).quantize(build_mobileone(config))
                for activation, weight in ((quanter, quanter), (quanter, None), (None, quanter))]
    networks.append(build_mobileone(config))
    imperative.ImperativeQuantAware().quantize(networks[-1])  # PaddlePaddle's older way
    for network in networks:
        with pytest.raises(UserError, match='a branch of dw_3x3 has .*: convert the network before it is quantized'):
            model_convert(network)
    # what the message asks for
    fused = model_convert(build_mobileone(config))
    fused.train()
    quantized = QAT(QuantConfig(activation=quanter, weight=quanter)).quantize(fused)
    assert quantized(images(32)).shape == model_convert(quantized)(images(32)).shape == [2, 10]


@pytest.mark.filterwarnings('ignore:The program will return to single-card operation')
def test_the_network_in_a_data_parallel_is_converted(config):
    model = build_mobileone(config)
    randomise(model)
    fused = model_convert(paddle.DataParallel(model))
    assert isinstance(fused, MobileOne) and not fused.training
    np.testing.assert_allclose(fused(images(32)).numpy(), model(images(32)).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('blocks', [1, 2, 5, 10])
def test_place_of_se(blocks):
    model = MobileOne([1, 2, 2, blocks, 2], [1] * 5, [8] * 5, [2] * 5, [1.0] * 5, use_se=True)
    with_se = [[hasattr(block, 'dw_se') and hasattr(block, 'pw_se') for block in stage] for stage in model.stages]
    assert with_se == [[False], [False] * 2, [False] * 2, [index >= blocks // 2 for index in range(blocks)], [True] * 2]


@pytest.mark.parametrize('entry', [0, 4])
def test_entry_0_of_branches_has_no_effect(config, entry):
    config.MODEL.NUM_BRANCHES = [1, 2, 1, 1, 2]
    with_one = build_mobileone(config).state_dict()
    config.MODEL.NUM_BRANCHES = [entry, 2, 1, 1, 2]
    assert list(with_one) == list(build_mobileone(config).state_dict())


@pytest.mark.parametrize('key, value, message', [
    ('NUM_BLOCKS', [2, 1, 1, 1, 1], 'stem'),
    ('NUM_BLOCKS', [1, 1, 1, 1], 'NUM_BLOCKS'),
    ('STRIDES', [2, 2, 0, 2, 2], 'STRIDES'),
    ('NUM_BRANCHES', [1, 0, 1, 1, 1], 'NUM_BRANCHES'),
    ('CHANNELS', [4, 4, 4, 4, -4], 'CHANNELS'),
    ('EXPANSIONS', [0.1, 1.0, 1.0, 1.0, 1.0], 'EXPANSIONS'),
    ('TYPE', 'ResNet', 'ResNet'),
    ('CHANNELS', [4, 2 ** 31, 4, 4, 4], 'below 2..31'),
    ('NUM_CLASSES', 10 ** 21, 'below 2..31'),
])
def test_lists_that_describe_no_network(config, key, value, message):
    config.MODEL[key] = value
    with pytest.raises(UserError, match=message):
        build_mobileone(config)


@pytest.mark.parametrize('variant', ['s0', 's4'])
def test_features(variant):
    """Of both networks, and what they are called. In float64, for such a network is chaotic in float32."""
    model = build_mobileone(variant_config(variant))
    randomise(model)
    model.to(dtype='float64')
    fused = model_convert(model)
    assert model.feature_strides == fused.feature_strides == [2, 4, 8, 16, 32]
    images = paddle.randn([2, 3, 75, 64]).astype('float64')
    with paddle.no_grad():
        maps, others = model.forward_features(images), fused.forward_features(images)
        assert len(maps) == 5
        for own, other, channels, stride in zip(maps, others, model.feature_channels, model.feature_strides):
            assert own.shape == other.shape == [2, channels, -(-75 // stride), 64 // stride]
            np.testing.assert_allclose(own.numpy(), other.numpy(), atol=1e-6 * float(own.abs().max()))
        logits = model.fc(maps[-1].mean([2, 3]))
        np.testing.assert_allclose(model(images).numpy(), logits.numpy(), rtol=1e-6)


def test_blocks_inside_a_larger_network_are_fused():
    class Detector(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.backbone = build_mobileone(variant_config('s0'))
            self.neck = paddle.nn.Conv2D(self.backbone.feature_channels[3], 4, 1)

        def forward(self, x):
            return self.neck(self.backbone.forward_features(x)[3])
    model = Detector()
    randomise(model)
    model.eval()
    fused = model_convert(model)
    assert not [name for name in fused.state_dict() if '_blocks.' in name]
    images = paddle.randn([1, 3, 64, 64])
    with paddle.no_grad():
        expected = model(images).numpy()
        np.testing.assert_allclose(fused(images).numpy(), expected, atol=1e-4 * np.abs(expected).max())
