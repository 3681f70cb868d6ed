"""Parity with the official implementation, using the numbers in tests/reference."""
import pathlib

import numpy as np
import official_weights
import paddle
import pytest
from conftest import VARIANTS, variant_config

from losses import LabelSmoothingCrossEntropyLoss
from mobileone import MobileOneBlock, build_mobileone, model_convert
from optim import parameter_groups
from weights import convert_state_dict, official_name

GOLDEN = np.load(pathlib.Path(official_weights.__file__).parent / 'golden_seed0.npz')


def reference_model(variant):
    config = variant_config(variant)
    model = build_mobileone(config)
    model.set_state_dict(convert_state_dict(official_weights.state_dict(variant), config))
    return model


@pytest.mark.parametrize('variant', VARIANTS)
def test_logits(variant):
    model = reference_model(variant)
    model.eval()
    fused = model_convert(model)
    inputs = {224: official_weights.images(0, 2, 224), 160: official_weights.images(1, 1, 160)}
    inputs = {size: paddle.to_tensor(images) for size, images in inputs.items()}
    with paddle.no_grad():
        unfused_logits = {size: model(x).numpy() for size, x in inputs.items()}
        for block in model.sublayers():
            if isinstance(block, MobileOneBlock):
                block.switch_to_deploy()
        for size, x in inputs.items():
            official = GOLDEN[f'{variant}_logits_{size}']
            np.testing.assert_allclose(unfused_logits[size], official, rtol=0, atol=3e-4)
            for network in (fused, model):  # fused as a copy, and in place
                np.testing.assert_allclose(network(x).numpy(), official, rtol=0, atol=3e-4)
                np.testing.assert_allclose(network(x).numpy(), unfused_logits[size], rtol=0, atol=3e-4)


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_and_losses(variant):
    model = reference_model(variant)
    model.to(dtype='float64')
    model.train()
    decayed, rest = parameter_groups(model)
    optimizer = paddle.optimizer.Momentum(5e-4, 0.9, parameters=[{'params': decayed, 'weight_decay': 1e-4},
                                                                 {'params': rest, 'weight_decay': 0.0}])
    criterion = LabelSmoothingCrossEntropyLoss(0.1)
    losses = []
    for step in range(3):
        loss = criterion(model(paddle.to_tensor(official_weights.images(10 + step, 8, 96).astype('float64'))),
                         paddle.to_tensor(official_weights.labels(10 + step, 8)))
        loss.backward()
        if step == 0:
            gradients = {official_name(name): parameter.grad.numpy() for name, parameter in model.named_parameters()
                         if not parameter.stop_gradient}
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert set(GOLDEN[f'{variant}_grad_names'].tolist()) == set(gradients)
    norms = [np.linalg.norm(gradients[name]) for name in GOLDEN[f'{variant}_grad_names'].tolist()]
    np.testing.assert_allclose(norms, GOLDEN[f'{variant}_grad_norms'], rtol=1e-5)
    np.testing.assert_allclose(gradients['stage0.rbr_conv.0.conv.weight'], GOLDEN[f'{variant}_grad_stage0'],
                               rtol=0, atol=1e-5 * np.abs(GOLDEN[f'{variant}_grad_stage0']).max())
    np.testing.assert_allclose(losses, GOLDEN[f'{variant}_loss'], rtol=0, atol=1e-4)
