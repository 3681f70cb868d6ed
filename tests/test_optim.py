"""Schedules at their boundaries, parameter groups, optimizer arithmetic, EMA."""
import copy
import math

import numpy as np
import paddle
import pytest

from mobileone import build_mobileone
from optim import (
    ModelEma,
    Schedule,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_weight_decay,
    warmup_cosine,
)
from tools.benchmark.launches import count_launches
from utils import UserError
from weights import load_into


def test_warmup_cosine():
    lrs = [warmup_cosine(step, 100, 10, 1.0, 0.1, 0.2) for step in range(101)]
    assert lrs[0] == pytest.approx(0.1) and lrs[5] == pytest.approx(0.55) and lrs[10] == pytest.approx(1.0)
    assert lrs[55] == pytest.approx(0.6) and lrs[100] == pytest.approx(0.2)
    assert lrs[32] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert all(a < b for a, b in zip(lrs[:10], lrs[1:11])) and all(a > b for a, b in zip(lrs[10:], lrs[11:]))
    assert warmup_cosine(0, 10, 0, 1.0, 0.1, 0.2) == 1.0


def test_schedule_scales_with_the_total_batch(config):
    config.TRAIN.LINEAR_SCALED_LR = 256
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS = 10, 2
    schedule = Schedule(config, steps_per_epoch=7, total_batch=512)
    assert schedule.lr(14) == pytest.approx(2 * config.TRAIN.BASE_LR)
    assert schedule.lr(0) == pytest.approx(2 * config.TRAIN.WARMUP_START_LR)
    assert schedule.lr(70) == pytest.approx(2 * config.TRAIN.END_LR)
    config.TRAIN.LINEAR_SCALED_LR = 0
    assert Schedule(config, 7, 512).lr(14) == config.TRAIN.BASE_LR
    assert {Schedule(config, 7, 512).weight_decay(step) for step in (0, 35, 70)} == {config.TRAIN.WEIGHT_DECAY}
    config.TRAIN.WEIGHT_DECAY, config.TRAIN.END_WEIGHT_DECAY = 0.4, 0.1  # not scaled by the batch, and no warm-up
    for total in (256, 512):
        decays = [Schedule(config, 7, total).weight_decay(step) for step in (0, 14, 35, 69, 70)]
        assert decays == pytest.approx([0.4, 0.1 + 0.3 * (1 + math.cos(math.pi / 5)) / 2, 0.25,
                                        0.1 + 0.3 * (1 + math.cos(math.pi * 69 / 70)) / 2, 0.1])
    config.TRAIN.MODEL_EMA_DECAY = 0.99
    decays = [Schedule(config, 7, 512).ema_decay(step) for step in (0, 90, 10000)]
    assert decays == [0.1, 0.91, 0.99]
    config.TRAIN.LINEAR_SCALED_LR = 256
    for total in (64, 256, 512):  # two steps of 256 images forget as much as one of 512
        assert Schedule(config, 7, total).ema_decay(10000) == pytest.approx(0.99 ** (total / 256), rel=1e-12)


@pytest.mark.parametrize('epochs, warmup, text', [
    (300, 5, 'after 5 epochs of warm-up, weight'), (1, 0, 'after 0 epochs of warm-up, weight'),
    (3, 5, 'after 2 epochs of warm-up (TRAIN.WARMUP_EPOCHS 5, cut for TRAIN.NUM_EPOCHS 3), weight'),
    (1, 5, 'after 0 epochs of warm-up (TRAIN.WARMUP_EPOCHS 5, cut for TRAIN.NUM_EPOCHS 1), weight'),
])
def test_warmup_leaves_at_least_one_epoch(config, epochs, warmup, text):
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS = epochs, warmup
    schedule = Schedule(config, 7, 256)
    lrs = [schedule.lr(step) for step in range(7 * epochs)]
    assert np.argmax(lrs) == 7 * min(warmup, epochs - 1) and text in str(schedule)


def test_parameter_groups(config):
    model = build_mobileone(config)
    decayed, rest = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names, rest_names = ([names[id(p)] for p in group] for group in (decayed, rest))
    assert all(name.endswith('weight') and 'norm' not in name and 'skip' not in name for name in decayed_names)
    assert {'fc.weight', 'stages.0.0.dw_1x1.conv.weight', 'stages.4.0.pw_se.reduce.weight'} <= set(decayed_names)
    assert {'fc.bias', 'stages.1.0.dw_1x1.norm.weight', 'stages.4.0.pw_se.reduce.bias'} <= set(rest_names)
    trainable = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    assert sorted(decayed_names + rest_names) == sorted(trainable)
    assert not any('_mean' in name or '_variance' in name for name in trainable)


def steps(config, decays=()):
    """Weight and bias of a small layer after three optimizer steps with gradient 1. decays: set before each step."""
    layer = paddle.nn.Linear(2, 1)
    layer.weight.set_value(np.full((2, 1), 2.0, 'float32'))
    layer.bias.set_value(np.full((1,), 2.0, 'float32'))
    optimizer = build_optimizer(config, layer)
    for step in range(3):
        (layer.weight.sum() + layer.bias.sum()).backward()
        optimizer.set_lr(0.1 * (step + 1))
        if decays:
            set_weight_decay(optimizer, decays[step])
        optimizer.step()
        optimizer.clear_grad()
    return layer.weight.numpy()[0, 0], layer.bias.numpy()[0]


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_arithmetic(config, nesterov):
    config.TRAIN.WEIGHT_DECAY = 0.5
    config.TRAIN.OPTIMIZER.MOMENTUM = 0.8
    config.TRAIN.OPTIMIZER.NESTEROV = nesterov
    expected = []
    for decay in (0.5, 0.0):  # the weight decays, the bias does not
        w, v = 2.0, 0.0
        for step in range(3):
            g = 1 + decay * w
            v = 0.8 * v + g
            w -= 0.1 * (step + 1) * (g + 0.8 * v if nesterov else v)
        expected.append(w)
    np.testing.assert_allclose(steps(config), expected, rtol=1e-5)


def test_adamw_arithmetic(config):
    config.TRAIN.WEIGHT_DECAY = 0.5
    config.TRAIN.OPTIMIZER.NAME = 'adamw'
    config.TRAIN.OPTIMIZER.BETAS = [0.8, 0.9]
    config.TRAIN.OPTIMIZER.EPS = 0.1
    expected = []
    for decay in (0.5, 0.0):
        w, m, v = 2.0, 0.0, 0.0
        for step in range(3):
            lr = 0.1 * (step + 1)
            m, v = 0.8 * m + 0.2, 0.9 * v + 0.1
            m_hat, v_hat = m / (1 - 0.8 ** (step + 1)), v / (1 - 0.9 ** (step + 1))
            w -= lr * (m_hat / (math.sqrt(v_hat) + 0.1) + decay * w)
        expected.append(w)
    np.testing.assert_allclose(steps(config), expected, rtol=2e-2)
    config.TRAIN.OPTIMIZER.EPS = 1e-8  # small enough that it does not matter where an implementation adds it
    expected = []
    for decay in (0.5, 0.0):
        w = 2.0
        for step in range(3):
            w -= 0.1 * (step + 1) * (1 + decay * w)
        expected.append(w)
    np.testing.assert_allclose(steps(config), expected, rtol=1e-5)


@pytest.mark.parametrize('start', [0.0, 0.9])
@pytest.mark.parametrize('name', ['SGD', 'AdamW'])
def test_set_weight_decay(config, name, start):
    """It overrides the optimizer's initial decay, and affects only the weight."""
    config.TRAIN.OPTIMIZER.NAME, config.TRAIN.OPTIMIZER.MOMENTUM = name, 0.8
    config.TRAIN.WEIGHT_DECAY = start
    decays, expected = [0.5, 0.0, 0.3], []
    for of_parameter in (decays, [0.0] * 3):
        w, v = 2.0, 0.0
        for step, decay in enumerate(of_parameter):
            lr = 0.1 * (step + 1)
            if name == 'SGD':
                v = 0.8 * v + 1 + decay * w
                w -= lr * v
            else:
                w -= lr * (1 + decay * w)
        expected.append(w)
    np.testing.assert_allclose(steps(config, decays), expected, rtol=1e-5)


def test_ema(config):
    model = build_mobileone(config)
    ema = ModelEma(model)
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for decay in (0.1, 0.7):
        for tensor in model.state_dict().values():
            tensor.set_value(tensor + 1.5)
        ema.update(decay)
        expected = {name: decay * expected[name] + (1 - decay) * tensor.numpy()
                    for name, tensor in model.state_dict().items()}
    own = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for name, tensor in ema.network.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-5, atol=1e-6)
    assert any('_variance' in name for name in expected)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), own[name])


def test_ema_leaves_a_frozen_backbone_unchanged(config):
    model = build_mobileone(config)
    model.freeze_backbone()
    assert [group[0].shape for group in parameter_groups(model)] == [[8, 10], [10]]
    ema, before = ModelEma(model), model.fc.weight.numpy()
    for tensor in model.stages.parameters():
        tensor.set_value(tensor / 3)
    model.fc.weight.set_value(before + 1)
    frozen = {name: tensor.numpy() for name, tensor in ema.network.stages.state_dict().items()}
    ema.update(0.7)
    np.testing.assert_allclose(ema.network.fc.weight.numpy(), before + 0.3, rtol=1e-5)
    assert all(np.array_equal(tensor.numpy(), frozen[name]) for name, tensor in
               ema.network.stages.state_dict().items())


def test_ema_is_bitwise_that_of_each_tensor(config):
    """An update takes at most four launches, even after operations that give tensors new memory."""
    model = build_mobileone(config)
    ema = ModelEma(model)

    def update(decay):
        expected = {}
        for name, average in ema.network.state_dict().items():
            tensor = model.state_dict()[name]
            tensor.set_value(tensor + 1.5)
            expected[name] = (average * decay + tensor * (1 - decay)).numpy()
        own = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        assert count_launches(lambda: ema.update(decay)) <= 4
        for name, average in ema.network.state_dict().items():
            np.testing.assert_array_equal(average.numpy(), expected[name], err_msg=name)
            np.testing.assert_array_equal(model.state_dict()[name].numpy(), own[name], err_msg=name)
    update(0.3)
    weights = {name: np.full(tensor.shape, 2, 'float32') for name, tensor in ema.network.state_dict().items()}
    load_into(ema.network, weights, 'x')
    update(0.9)
    ema, model = copy.deepcopy((ema, model))
    update(0.8)
    model.to(dtype='float64')
    model.to(dtype='float32')
    update(0.7)


@pytest.mark.parametrize('name, kinds', [('SGD', 1), ('AdamW', 4)])
def test_optimizer_state_loads_for_a_second_model(config, name, kinds):
    """Both are in one process, where Paddle's parameter names differ for each model."""
    config.TRAIN.OPTIMIZER.NAME = name
    models = [build_mobileone(config) for _ in range(2)]
    models[1].set_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(config, model) for model in models]
    images = paddle.randn([4, 3, 32, 32])

    def step(model, optimizer):
        model(images).square().mean().backward()
        optimizer.set_lr(0.01)
        optimizer.step()
        optimizer.clear_grad()
    assert optimizer_state(optimizers[0], models[0]) == {}
    for _ in range(2):
        step(models[0], optimizers[0])
    state = {key: tensor.numpy() for key, tensor in optimizer_state(optimizers[0], models[0]).items()}
    trainable = [name for name, parameter in models[0].named_parameters() if not parameter.stop_gradient]
    assert len(state) == kinds * len(trainable) and all(key.rpartition('.')[0] in trainable for key in state)
    models[1].set_state_dict(models[0].state_dict())
    load_optimizer_state(optimizers[1], models[1], state, 'x')
    for model, optimizer in zip(models, optimizers):
        step(model, optimizer)
    for key, tensor in models[0].state_dict().items():
        assert (tensor.numpy() == models[1].state_dict()[key].numpy()).all(), key
    for key, tensor in optimizer_state(optimizers[0], models[0]).items():
        assert (tensor.numpy() == optimizer_state(optimizers[1], models[1])[key].numpy()).all(), key

    key = next(key for key in state if key.startswith('fc.weight'))
    for broken in ({k: v for k, v in state.items() if k != key}, {**state, 'x.velocity': state[key]},
                   {**state, key: state[key][:-1]}):
        with pytest.raises(UserError, match='file: its optimizer state does not match: (missing|unexpected|fc.weight)'):
            load_optimizer_state(build_optimizer(config, models[0]), models[0], broken, 'file')
