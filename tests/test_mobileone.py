"""The network: names, sizes, branches, fusion."""
import copy
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


def randomize(model, seed=0):
    """Randomize weights, batch-norm statistics and affine values: initial ones would hide bugs in the fusion."""
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
def test_custom_networks_fuse(options):
    options = dict(dict(strides=[2, 1, 2, 1, 2], expansions=[1.0] * 5, num_classes=7), **options)
    model = MobileOne(**options)
    randomize(model)
    x = images(32, channels=options.get('in_channels', 3))
    fused = model_convert(model)
    assert all(block.deploy for block in fused.sublayers() if isinstance(block, MobileOneBlock))
    assert model(x).shape == [2, options['num_classes']]
    assert not np.allclose(model(x)[0].numpy(), model(x)[1].numpy(), atol=1e-3)
    np.testing.assert_allclose(fused(x).numpy(), model(x).numpy(), rtol=1e-4, atol=1e-4)
    # the fused network's state dict loads into a network built with deploy=True
    built = MobileOne(**options, deploy=True)
    assert {k: v.shape for k, v in built.state_dict().items()} == {k: v.shape for k, v in fused.state_dict().items()}
    built.set_state_dict(fused.state_dict())
    built.eval()
    np.testing.assert_array_equal(built(x).numpy(), fused(x).numpy())


def test_conversion_does_not_change_the_model(config):
    model = build_mobileone(config)
    randomize(model)
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


def test_convert_a_block_and_a_layer_that_contains_blocks():
    class Detector(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.backbone = paddle.nn.Sequential(MobileOneBlock(3, 8, 2, stride=2, use_pw=False),
                                                 MobileOneBlock(8, 16, 2, use_se=True))
            self.head = paddle.nn.Conv2D(16, 4, 1)

        def forward(self, x):
            return self.head(self.backbone(x))

    model = Detector()
    randomize(model)
    np.testing.assert_allclose(model_convert(model)(images(16)).numpy(), model(images(16)).numpy(), atol=1e-5)
    block = model.backbone[1]
    x = images(8, channels=8)
    expected = block(x).numpy()
    np.testing.assert_allclose(model_convert(block)(x).numpy(), expected, atol=1e-5)
    block.switch_to_deploy()
    block.switch_to_deploy()  # the second call does nothing
    np.testing.assert_allclose(block(x).numpy(), expected, atol=1e-5)
    assert sorted(name.split('.')[0] for name in block.state_dict()) == sorted(
        ['dw_3x3'] * 2 + ['pw_1x1'] * 2 + ['dw_se'] * 4 + ['pw_se'] * 4)


def test_fused_network_differs_from_training_mode(config):
    """It equals the unfused network only in evaluation mode."""
    model = build_mobileone(config)
    randomize(model)
    fused = model_convert(model)
    model.train()
    assert np.abs(model(images(32)).numpy() - fused(images(32)).numpy()).max() > 1e-2


def test_frozen_branches_fuse_into_frozen_layers(config):
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


def test_frozen_backbone_trains_only_the_classifier(config):
    """The backbone keeps its batch-norm statistics, too, and its features are those of evaluation mode."""
    model = build_mobileone(config)
    randomize(model)
    model.eval()
    before, expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}, model(images(32)).numpy()
    model.freeze_backbone()
    model.train()
    assert model.training and model.fc.training and not any(layer.training for layer in model.stages.sublayers(True))
    assert [name for name, tensor in model.named_parameters() if not tensor.stop_gradient] == ['fc.weight', 'fc.bias']
    outputs = model(images(32))
    assert np.array_equal(outputs.numpy(), expected)
    outputs.square().mean().backward()
    assert model.fc.weight.grad is not None and all(p.grad is None for p in model.stages.parameters())
    assert all(np.array_equal(tensor.numpy(), before[name]) for name, tensor in model.state_dict().items())
    for other in (copy.deepcopy(model), model_convert(model)):
        other.train()
        assert np.allclose(other(images(32)).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_networks_prepared_for_quantization_are_rejected(config):
    from paddle.quantization import QAT, QuantConfig, imperative, quanters
    quanter = quanters.FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
    networks = [QAT(QuantConfig(activation=activation, weight=weight)).quantize(build_mobileone(config))
                for activation, weight in ((quanter, quanter), (quanter, None), (None, quanter))]
    networks.append(build_mobileone(config))
    imperative.ImperativeQuantAware().quantize(networks[-1])  # PaddlePaddle's older API
    for network in networks:
        with pytest.raises(UserError, match='a branch of dw_3x3 contains .*: convert the network before quantizing it'):
            model_convert(network)
    # the remedy in the message works
    fused = model_convert(build_mobileone(config))
    fused.train()
    quantized = QAT(QuantConfig(activation=quanter, weight=quanter)).quantize(fused)
    assert quantized(images(32)).shape == model_convert(quantized)(images(32)).shape == [2, 10]


@pytest.mark.filterwarnings('ignore:The program will return to single-card operation')
def test_data_parallel_is_unwrapped_and_converted(config):
    model = build_mobileone(config)
    randomize(model)
    fused = model_convert(paddle.DataParallel(model))
    assert isinstance(fused, MobileOne) and not fused.training
    np.testing.assert_allclose(fused(images(32)).numpy(), model(images(32)).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('blocks', [1, 2, 5, 10])
def test_blocks_with_se(blocks):
    model = MobileOne([1, 2, 2, blocks, 2], [1] * 5, [8] * 5, [2] * 5, [1.0] * 5, use_se=True)
    with_se = [[hasattr(block, 'dw_se') and hasattr(block, 'pw_se') for block in stage] for stage in model.stages]
    assert with_se == [[False], [False] * 2, [False] * 2, [index >= blocks // 2 for index in range(blocks)], [True] * 2]


@pytest.mark.parametrize('entry', [0, 4])
def test_entry_0_of_num_branches_has_no_effect(config, entry):
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
    ('CHANNELS', [4, 2 ** 31, 4, 4, 4], 'fewer than 2..31'),
    ('NUM_CLASSES', 10 ** 21, 'fewer than 2..31'),
])
def test_invalid_network_configs_are_rejected(config, key, value, message):
    config.MODEL[key] = value
    with pytest.raises(UserError, match=message):
        build_mobileone(config)


@pytest.mark.parametrize('variant', ['s0', 's4'])
def test_features(variant):
    """Fused and unfused feature maps, with their channels and strides. In float64: float32 errors grow too large."""
    model = build_mobileone(variant_config(variant))
    randomize(model)
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


def test_backbone_inside_a_detector_is_fused():
    class Detector(paddle.nn.Layer):
        def __init__(self):
            super().__init__()
            self.backbone = build_mobileone(variant_config('s0'))
            self.neck = paddle.nn.Conv2D(self.backbone.feature_channels[3], 4, 1)

        def forward(self, x):
            return self.neck(self.backbone.forward_features(x)[3])
    model = Detector()
    randomize(model)
    model.eval()
    fused = model_convert(model)
    assert not [name for name in fused.state_dict() if '_blocks.' in name]
    images = paddle.randn([1, 3, 64, 64])
    with paddle.no_grad():
        expected = model(images).numpy()
        np.testing.assert_allclose(fused(images).numpy(), expected, atol=1e-4 * np.abs(expected).max())


# networks with branches to merge; 64-pixel images give feature maps of 32, 16, 8, 4 and 2 pixels
NARROW = dict(channels=[8, 8, 16, 16, 24], strides=[2, 2, 2, 2, 2], expansions=[1.0] * 5, num_classes=10)
MERGED = [dict(num_blocks=[1, 2, 1, 2, 1], num_branches=[4] * 5),
          dict(num_blocks=[1, 1, 2, 1, 1], num_branches=[1] * 5),
          dict(num_blocks=[1, 1, 1, 2, 1], num_branches=[1, 2, 1, 3, 1], use_se=True)]


def branch_by_branch(monkeypatch):
    monkeypatch.setattr(MobileOneBlock, 'mergeable_branches', lambda self, name: [])


def trained_step(model, x):
    """Run a forward and backward pass in training mode. Returns: (output, {name: gradient}, {name: state})."""
    model.train()
    output = model(x)
    (output * paddle.to_tensor(np.random.default_rng(2).standard_normal(output.shape))).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if not p.stop_gradient}
    return output.numpy(), gradients, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_steps_equal(first, second, atol=1e-12):
    np.testing.assert_allclose(first[0], second[0], rtol=0, atol=atol)
    for one, other in zip(first[1:], second[1:]):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=atol * max(1, np.abs(one[name]).max()),
                                       err_msg=name)


@pytest.mark.parametrize('on_cpu', [True, False])
@pytest.mark.parametrize('options', MERGED)
def test_merged_branches_equal_separate_branches(monkeypatch, options, on_cpu):
    """Compares outputs, gradients and statistics in float64, with CPU and with GPU operators."""
    model = MobileOne(**NARROW, **options)
    randomize(model)
    model.to(dtype='float64')
    convolutions, conv2d = [], paddle.nn.functional.conv2d
    monkeypatch.setattr('mobileone._is_on_cpu', lambda x: on_cpu)
    monkeypatch.setattr(paddle.nn.functional, 'conv2d', lambda *args, **kwargs: convolutions.append(kwargs['groups'])
                        or conv2d(*args, **kwargs))
    x = images(64, 'float64', batch=3)
    merged = trained_step(copy.deepcopy(model), x)
    layers = [(block, name) for stage in model.stages for block in stage for name in block.convs
              if len(getattr(block, f'{name}_blocks')) + hasattr(block, f'{name[:2]}_1x1') > 1]
    assert len(convolutions) == len(layers) > 3
    # groups have two channels in outputs of 16 pixels, four in outputs of 8 pixels, and eight in smaller ones
    assert set(convolutions) == ({1, 8 // 2, 16 // 4, 16 // 8} if on_cpu else {1, 8, 16})
    branch_by_branch(monkeypatch)
    assert_steps_equal(merged, trained_step(copy.deepcopy(model), x))
    assert len(convolutions) == len(layers)


def test_statistics_of_merged_branches(monkeypatch):
    """They equal those of separate branches, even after operations that give the norms new memory."""
    def trainings():
        """Yield the result of a training step after each of several operations that users perform on a network."""
        paddle.seed(0)
        model, x = MobileOne(**NARROW, **MERGED[0]), images(32)
        initial = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        yield trained_step(model, x)
        model = copy.deepcopy(model)
        yield trained_step(model, x)
        model.set_state_dict(initial)
        yield trained_step(model, x)
        model.stages[1][0].dw_1x1.norm._mean.set_value(np.full(8, 3, 'float32'))
        yield trained_step(model, x)
        model.eval()
        model(x)
        yield trained_step(model, x)
        with paddle.no_grad():
            model.train()
            model(x)
        yield trained_step(model, x)
        model.to(dtype='float64')
        yield trained_step(model, x.astype('float64'))
        yield trained_step(model, x.astype('float64'))
    merged = list(trainings())
    # all differ except the third, which starts from the same state as the first
    assert len({step[2]['stages.1.0.dw_1x1.norm._mean'].tobytes() for step in merged}) == len(merged) - 1
    branch_by_branch(monkeypatch)
    for one, other in zip(merged, trainings()):
        # not the gradients: float32 is not precise enough for them
        assert_steps_equal((one[0], one[2]), (other[0], other[2]), atol=1e-4)


def test_modified_branches_are_not_merged():
    """Hooks run, norms in evaluation mode keep their statistics, and other kinds of layers run as usual."""
    model = MobileOne(**NARROW, **MERGED[0])
    model.train()
    block = model.stages[1][0]
    branch, calls = block.dw_3x3_blocks[1], []
    assert len(block.mergeable_branches('dw_3x3')) == 5 and len(block.mergeable_branches('pw_1x1')) == 4
    for layer in (branch, branch.conv, branch.norm):
        for register in (layer.register_forward_pre_hook, layer.register_forward_post_hook):
            hook = register(lambda called, *args: calls.append(called))
            model(images(32))
            assert calls == [layer] and block.mergeable_branches('dw_3x3') == []
            hook.remove()
            calls.clear()
            assert len(block.mergeable_branches('dw_3x3')) == 5
    for attribute, value in (('training', False), ('_use_global_stats', True)):
        before = branch.norm._mean.numpy()
        old = getattr(branch.norm, attribute)
        setattr(branch.norm, attribute, value)
        model(images(32))
        np.testing.assert_array_equal(branch.norm._mean.numpy(), before)
        setattr(branch.norm, attribute, old)
    model(images(32))
    assert (branch.norm._mean.numpy() != before).any()
    branch.norm._momentum = 0.5
    assert block.mergeable_branches('dw_3x3') == []
    branch.norm._momentum = 0.9
    branch.conv = paddle.nn.utils.spectral_norm(branch.conv)
    assert block.mergeable_branches('dw_3x3') == []
    synchronized = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert not any(block.mergeable_branches(name) for stage in synchronized.stages for block in stage
                   for name in block.convs)


def test_merged_branches_may_be_frozen():
    model = MobileOne(**NARROW, **MERGED[0])
    branch = model.stages[1][0].pw_1x1_blocks[2]
    for tensor in branch.parameters():
        tensor.stop_gradient = True
    trained_step(model, images(32))
    assert branch.conv.weight.grad is None and model.stages[1][0].pw_1x1_blocks[1].conv.weight.grad is not None


def test_training_as_a_static_graph():
    """In a static graph the branches are not merged."""
    x, outputs = images(32), []
    for convert in (lambda model: model, lambda model: paddle.jit.to_static(model, full_graph=True)):
        paddle.seed(0)
        model = MobileOne(**NARROW, **MERGED[0])
        model.train()
        with paddle.no_grad():
            output = convert(model)(x).numpy()
        outputs.append((output, model.stages[1][0].dw_1x1.norm._mean.numpy()))
    np.testing.assert_allclose(outputs[0][0], outputs[1][0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs[0][1], outputs[1][1], rtol=0, atol=1e-5)
