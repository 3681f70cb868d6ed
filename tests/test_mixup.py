"""Mixup and CutMix, compared with their definitions on images whose pixel values identify the source image."""
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from losses import LabelSmoothingCrossEntropyLoss, SoftTargetCrossEntropyLoss
from mixup import Mixup, build_mixup
from utils import UserError


def numbered(n, height=6, width=10):
    """Images [n, 3, height, width]; every pixel of image i has the value i."""
    return paddle.arange(n, dtype='float32').reshape([n, 1, 1, 1]).expand([n, 3, height, width])


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_mixup(mode, n):
    images, labels = numbered(n), paddle.arange(n) % 3
    before = images.numpy().copy(), labels.numpy().copy()
    mixed, targets = Mixup(0.7, 0, mode=mode, label_smoothing=0, num_classes=3)(images, labels,
                                                                               np.random.default_rng(0))
    assert (images.numpy() == before[0]).all() and (labels.numpy() == before[1]).all()
    shares = Mixup(0.7, 0, mode=mode).draw(n, 6, 10, np.random.default_rng(0))[0]
    assert ((0 < shares) & (shares < 1)).all()
    assert len(set(shares)) == {'batch': 1, 'pair': -(-n // 2), 'elem': n}[mode]
    if mode == 'pair':
        assert (shares == shares[::-1]).all()
    one_hot = np.eye(3)[labels.numpy()]
    for i in range(n):
        np.testing.assert_allclose(mixed[i].numpy(), shares[i] * i + (1 - shares[i]) * (n - 1 - i), rtol=1e-5,
                                   atol=1e-6)
        np.testing.assert_allclose(targets[i].numpy(), shares[i] * one_hot[i] + (1 - shares[i]) * one_hot[n - 1 - i],
                                   rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('minmax', [None, (0.2, 0.6)])
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_cutmix_pastes_a_box_and_counts_its_pixels(mode, minmax):
    """The images are not square, so that swapped rows and columns would fail."""
    rng, boxes = np.random.default_rng(1), []
    for _ in range(100):
        mixed, targets = Mixup(0, 1.0, minmax, mode=mode, label_smoothing=0, num_classes=4)(
            numbered(4, 6, 40), paddle.arange(4), rng)
        for i in range(4):
            pasted = mixed[i].numpy() != i
            assert (pasted == pasted[0]).all() and (mixed[i].numpy()[pasted] == 3 - i).all()
            rows, columns = pasted[0].any(axis=1), pasted[0].any(axis=0)
            assert pasted[0].sum() == rows.sum() * columns.sum()  # a rectangle
            share = 1 - pasted[0].mean()
            np.testing.assert_allclose(targets[i].numpy(), share * np.eye(4)[i] + (1 - share) * np.eye(4)[3 - i],
                                       atol=1e-6)
            boxes.append((rows.sum() / 6, columns.sum() / 40))
    heights, widths = np.array(boxes).T
    if minmax:
        assert heights.min() >= 1 / 6 and heights.max() <= 4 / 6 and 0.2 <= widths.min() and widths.max() <= 0.6
    else:
        assert heights.min() <= 1 / 6 and heights.max() > 0.9 and widths.max() > 0.9


def test_probabilities():
    rng = np.random.default_rng(0)
    shares, boxes = Mixup(1, 1, prob=0.75, switch_prob=0.2, mode='elem').draw(4000, 32, 32, rng)
    cut = boxes[:, 1] > boxes[:, 0]
    assert (shares == 1).mean() == pytest.approx(0.25, abs=0.03) and cut.mean() == pytest.approx(0.15, abs=0.03)
    # with only one kind on, it is always used
    assert (Mixup(0, 1, switch_prob=0.2, mode='elem').draw(200, 224, 224, rng)[0] < 1).mean() > 0.9
    boxes = Mixup(1, 0, switch_prob=0.9, mode='elem').draw(200, 224, 224, rng)[1]
    assert (boxes[:, 0] == boxes[:, 1]).all() and (boxes[:, 2] == boxes[:, 3]).all()
    mixed, targets = Mixup(1, 1, prob=0, num_classes=4)(numbered(4), paddle.arange(4), rng)
    assert (mixed.numpy() == numbered(4).numpy()).all()


def test_errors():
    with pytest.raises(UserError, match='mode is .half.'):
        Mixup(1, mode='half')
    with pytest.raises(UserError, match='both 0'):
        Mixup(0, 0)


def test_smoothed_targets_and_their_loss():
    """Without mixing, soft targets give the same loss as label smoothing."""
    logits = paddle.randn([5, 7])
    labels = paddle.to_tensor([0, 6, 2, 2, 1])
    _, targets = Mixup(1, prob=0, label_smoothing=0.2, num_classes=7)(numbered(5), labels)
    np.testing.assert_allclose(targets.sum(axis=1).numpy(), np.ones(5), rtol=1e-6)
    loss = SoftTargetCrossEntropyLoss()(logits, targets)
    assert float(loss) == pytest.approx(float(LabelSmoothingCrossEntropyLoss(0.2)(logits, labels)), rel=1e-6)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, targets, soft_label=True)), rel=1e-6)
    assert SoftTargetCrossEntropyLoss()(logits.astype('float16'), targets).dtype == paddle.float32


@pytest.mark.parametrize('keys, kind', [
    ({}, None), ({'MIXUP_ALPHA': 0.2}, (0.2, 0.0, None)), ({'CUTMIX_ALPHA': 1.0}, (0.0, 1.0, None)),
    ({'CUTMIX_MINMAX': [0.1, 0.5]}, (0.0, 0.0, [0.1, 0.5])), ({'MIXUP_ALPHA': 0.2, 'MIXUP_PROB': 0.0}, None)])
def test_build_mixup(config, keys, kind):
    config.TRAIN.SMOOTHING, config.TRAIN.MIXUP_MODE = 0.3, 'ELEM'
    for key, value in keys.items():
        config.TRAIN[key] = value
    mixup = build_mixup(config)
    if kind is None:
        assert mixup is None
    else:
        assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.cutmix_minmax) == kind
        assert (mixup.num_classes, mixup.label_smoothing, mixup.mode) == (10, 0.3, 'elem')
