"""Training criteria: logits and targets -> mean loss, a scalar tensor."""
import paddle
import paddle.nn as nn
import paddle.nn.functional as F

from utils import UserError


class LabelSmoothingCrossEntropyLoss(nn.Layer):
    """Cross entropy with targets (1 - smoothing) * one-hot + smoothing / C (arXiv 1512.00567, section 7).

    logits: float [N, C]; labels: int64 or int32 [N]. Half-precision logits are cast to float32.
    Raises: UserError for a smoothing outside [0, 1], and for other targets.
    """

    def __init__(self, smoothing=0.1):
        super().__init__()
        if not 0 <= smoothing <= 1:
            raise UserError(f'smoothing is {smoothing}, but must be between 0 and 1')
        self.smoothing = smoothing

    def forward(self, logits, labels):
        if labels.dtype not in (paddle.int32, paddle.int64) or labels.ndim != 1:
            raise UserError(f'the targets are {_describe(labels)}, but LabelSmoothingCrossEntropyLoss takes int64 [N] '
                            'labels; use SoftTargetCrossEntropyLoss for mixup targets')
        log_probs = F.log_softmax(_as_float32(logits), axis=-1)
        nll = F.nll_loss(log_probs, labels)
        return (1 - self.smoothing) * nll - self.smoothing * log_probs.mean()


class SoftTargetCrossEntropyLoss(nn.Layer):
    """Cross entropy with class distributions as targets, such as those that mixup returns.

    logits: float [N, C]; targets: float [N, C], each row sums to 1. Half-precision logits are cast to float32.
    Raises: UserError for targets of another type or shape.
    """

    def forward(self, logits, targets):
        if not targets.is_floating_point() or targets.shape != logits.shape:
            raise UserError(f'the targets are {_describe(targets)}, but SoftTargetCrossEntropyLoss takes float '
                            f'{list(logits.shape)}; use LabelSmoothingCrossEntropyLoss for labels')
        return -(targets * F.log_softmax(_as_float32(logits), axis=-1)).sum(axis=-1).mean()


class DistillationLoss(nn.Layer):
    """(1 - alpha) * loss on the targets + alpha * loss on a teacher's outputs for the same images.

    base_criterion: (logits, targets) -> loss on the targets.
    teacher_model: images -> logits for the same classes; runs in evaluation mode, without gradients.
    distillation_type: 'none', only the loss on the targets, no teacher needed; 'soft', tau^2 * KL(teacher || student)
    at temperature tau, averaged over the images (arXiv 1503.02531, section 2); 'hard', cross entropy with
    the teacher's top class as the label (arXiv 2012.12877, equation 3).
    Raises: UserError for an unknown type or a missing teacher.
    """

    def __init__(self, base_criterion, teacher_model=None, distillation_type='none', alpha=0.5, tau=1.0):
        super().__init__()
        if distillation_type not in ('none', 'soft', 'hard'):
            raise UserError(f'distillation_type is {distillation_type!r}, but must be none, soft or hard')
        if distillation_type != 'none' and teacher_model is None:
            raise UserError(f'distillation_type is {distillation_type!r}, but teacher_model is missing: pass a network')
        self.base_criterion = base_criterion
        self.teacher_model = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, inputs, outputs, targets):
        """inputs: the student's input images [N, C, H, W]; outputs: its logits [N, classes]; targets: their targets."""
        loss = self.base_criterion(outputs, targets)
        if self.distillation_type == 'none':
            return loss
        self.teacher_model.eval()
        with paddle.no_grad():
            teacher = _as_float32(self.teacher_model(inputs))
        student = _as_float32(outputs)
        if self.distillation_type == 'hard':
            distillation = F.cross_entropy(student, teacher.argmax(axis=-1))
        else:
            student, teacher = (F.log_softmax(logits / self.tau, axis=-1) for logits in (student, teacher))
            distillation = self.tau ** 2 * (teacher.exp() * (teacher - student)).sum(axis=-1).mean()
        return (1 - self.alpha) * loss + self.alpha * distillation


def _as_float32(logits):
    return logits.astype('float32') if logits.dtype in (paddle.float16, paddle.bfloat16) else logits


def _describe(tensor):
    return f'{str(tensor.dtype).replace("paddle.", "")} {list(tensor.shape)}'
