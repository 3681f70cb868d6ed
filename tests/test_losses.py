"""The losses, compared with their formulas in NumPy. test_mixup.py checks soft targets."""
import numpy as np
import paddle
import pytest

from losses import DistillationLoss, LabelSmoothingCrossEntropyLoss, SoftTargetCrossEntropyLoss
from mobileone import build_mobileone
from utils import UserError

LOGITS = np.random.default_rng(0).normal(size=(4, 3)).astype('float32')
TAUGHT = np.random.default_rng(1).normal(size=(4, 3)).astype('float32')
LABELS = np.array([0, 2, 1, 1])


def test_label_smoothing():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((4, 7)), rng.integers(0, 7, 4)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for smoothing in (0.0, 0.1, 0.5):
        target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
        loss = LabelSmoothingCrossEntropyLoss(smoothing)(paddle.to_tensor(logits), paddle.to_tensor(labels))
        assert float(loss) == pytest.approx(-(target * log_probs).sum(1).mean(), abs=1e-9)
    with pytest.raises(ValueError, match='smoothing is 2'):
        LabelSmoothingCrossEntropyLoss(2)


class Teacher(paddle.nn.Layer):
    """Outputs TAUGHT for any images, and records the images and its mode."""

    def __init__(self):
        super().__init__()
        self.weight = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.0))

    def forward(self, images):
        self.seen, self.mode = images, self.training
        return paddle.to_tensor(TAUGHT) * self.weight


def probabilities(logits, tau):
    weights = np.exp(logits.astype('float64') / tau)
    return weights / weights.sum(axis=1, keepdims=True)


def cross_entropy(logits, labels):
    return -np.log(probabilities(logits, 1)[np.arange(4), labels]).mean()


def expected_extra(kind, tau):
    if kind == 'hard':
        return cross_entropy(LOGITS, TAUGHT.argmax(axis=1))
    teacher, student = probabilities(TAUGHT, tau), probabilities(LOGITS, tau)
    return tau ** 2 * (teacher * np.log(teacher / student)).sum(axis=1).mean()


@pytest.mark.parametrize('kind, alpha, tau', [('soft', 0.3, 1.0), ('soft', 0.7, 4.0), ('soft', 1.0, 2.0),
                                              ('hard', 0.5, 3.0), ('hard', 0.0, 1.0)])
def test_distillation_matches_its_formula(kind, alpha, tau):
    teacher, images = Teacher(), paddle.randn([4, 3, 2, 2])
    criterion = DistillationLoss(LabelSmoothingCrossEntropyLoss(0.0), teacher, kind, alpha, tau)
    criterion.train()
    logits = paddle.to_tensor(LOGITS, stop_gradient=False)
    loss = criterion(images, logits, paddle.to_tensor(LABELS))
    expected = (1 - alpha) * cross_entropy(LOGITS, LABELS) + alpha * expected_extra(kind, tau)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert teacher.seen is images and teacher.mode is False
    loss.backward()
    assert teacher.weight.grad is None
    if kind == 'soft' and alpha == 1.0:  # the gradient of tau^2 KL is tau (student - teacher), averaged over the images
        gradient = tau * (probabilities(LOGITS, tau) - probabilities(TAUGHT, tau)) / 4
        np.testing.assert_allclose(logits.grad.numpy(), gradient, rtol=1e-4, atol=1e-7)


def test_loss_is_zero_if_student_and_teacher_agree():
    criterion = DistillationLoss(LabelSmoothingCrossEntropyLoss(0.0), Teacher(), 'soft', 1.0, 2.0)
    assert float(criterion(None, paddle.to_tensor(TAUGHT), paddle.to_tensor(LABELS))) == pytest.approx(0, abs=1e-6)


def test_type_none_is_the_base_criterion():
    targets = paddle.to_tensor([[0.5, 0.5, 0.0]] * 4)
    loss = DistillationLoss(SoftTargetCrossEntropyLoss())(None, paddle.to_tensor(LOGITS), targets)
    assert float(loss) == float(SoftTargetCrossEntropyLoss()(paddle.to_tensor(LOGITS), targets))


def test_half_precision_logits_are_cast_to_float32():
    class Half(Teacher):
        def forward(self, images):
            return super().forward(images).astype('float16')
    logits = paddle.to_tensor(LOGITS).astype('float16')
    loss = DistillationLoss(LabelSmoothingCrossEntropyLoss(0.0), Half(), 'soft', 1.0, 2.0)(
        None, logits, paddle.to_tensor(LABELS))
    assert loss.dtype == paddle.float32 and float(loss) == pytest.approx(expected_extra('soft', 2.0), rel=1e-2)


def test_errors():
    with pytest.raises(UserError, match="distillation_type is 'warm', but must be none, soft or hard"):
        DistillationLoss(SoftTargetCrossEntropyLoss(), Teacher(), 'warm')
    with pytest.raises(UserError, match="'soft', but teacher_model is missing"):
        DistillationLoss(SoftTargetCrossEntropyLoss(), distillation_type='soft')


@pytest.mark.parametrize('criterion, targets, message', [
    (LabelSmoothingCrossEntropyLoss, np.ones((4, 3), 'float32'), r'float32 \[4, 3\], .*; use SoftTargetCrossEntropyLo'),
    (LabelSmoothingCrossEntropyLoss, np.ones(4, 'float32'), r'float32 \[4\], but LabelSmoothing.* takes int64 \[N\]'),
    (LabelSmoothingCrossEntropyLoss, LABELS[:, None], r'int64 \[4, 1\], but'),
    (SoftTargetCrossEntropyLoss, LABELS, r'int64 \[4\], but .* takes float \[4, 3\]; use LabelSmoothing'),
    (SoftTargetCrossEntropyLoss, np.eye(4, 3, dtype='int64'), r'int64 \[4, 3\], but'),
    (SoftTargetCrossEntropyLoss, np.ones((4, 1), 'float32'), r'float32 \[4, 1\], but'),
])
def test_wrong_targets_name_the_right_criterion(criterion, targets, message):
    with pytest.raises(UserError, match=f'the targets are {message}'):
        criterion()(paddle.to_tensor(LOGITS), paddle.to_tensor(targets))


def test_teacher_batch_norm_does_not_change(config):
    teacher = build_mobileone(config)
    before = {name: tensor.numpy() for name, tensor in teacher.state_dict().items()}
    criterion = DistillationLoss(LabelSmoothingCrossEntropyLoss(), teacher, 'hard')
    criterion.train()
    criterion(paddle.randn([4, 3, 32, 32]), paddle.randn([4, 10]), paddle.to_tensor(LABELS))
    for name, tensor in teacher.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])
