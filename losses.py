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
        if logits.dtype in (paddle.float16, paddle.bfloat16):
            logits = logits.astype('float32')
        log_probs = F.log_softmax(logits, axis=-1)
        nll = F.nll_loss(log_probs, labels)
        return (1 - self.smoothing) * nll - self.smoothing * log_probs.mean()
