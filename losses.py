"""Training criteria: logits [N, C] and targets -> the mean loss, a scalar tensor."""
import paddle
import paddle.nn as nn
import paddle.nn.functional as F

from utils import UserError


class LabelSmoothingCrossEntropyLoss(nn.Layer):
    """Cross entropy against (1 - smoothing) * one-hot + smoothing / C (arXiv 1512.00567, section 7).

    logits: float [N, C]; labels: int64 [N]. Half-precision logits are computed in float32.
    """

    def __init__(self, smoothing=0.1):
        super().__init__()
        if not 0 <= smoothing <= 1:
            raise UserError(f'smoothing is {smoothing}, but must be between 0 and 1')
        self.smoothing = smoothing

    def forward(self, logits, labels):
        log_probs = F.log_softmax(_as_float32(logits), axis=-1)
        nll = F.nll_loss(log_probs, labels)
        return (1 - self.smoothing) * nll - self.smoothing * log_probs.mean()


class SoftTargetCrossEntropyLoss(nn.Layer):
    """Cross entropy against a distribution over the classes, as mixup makes them.

    logits: float [N, C]; targets: float [N, C], each row sums to 1. Half-precision logits are computed in float32.
    """

    def forward(self, logits, targets):
        return -(targets * F.log_softmax(_as_float32(logits), axis=-1)).sum(axis=-1).mean()


def _as_float32(logits):
    return logits.astype('float32') if logits.dtype in (paddle.float16, paddle.bfloat16) else logits
