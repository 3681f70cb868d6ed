"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with itself in reverse order."""
import numpy as np
import paddle
import paddle.nn.functional as F

from transforms import box_mask
from utils import UserError


class Mixup:
    """Mixes image i of a batch with image N - 1 - i, and their targets in the same proportion.

    mixup_alpha, cutmix_alpha: the share of image i is drawn from Beta(alpha, alpha); 0 turns that kind off.
    cutmix_minmax: (smallest, largest) side of CutMix's box as shares of the image's, in place of cutmix_alpha.
    prob: probability that a mix happens; switch_prob: that it is CutMix where both kinds are on.
    mode: what is drawn once: 'batch', for all images; 'pair', for images i and N - 1 - i; 'elem', for each image.
    label_smoothing: share of a target that is spread over all num_classes classes.
    Raises: UserError for an unknown mode, or when both kinds are off.
    """

    def __init__(self, mixup_alpha=1.0, cutmix_alpha=0.0, cutmix_minmax=None, prob=1.0, switch_prob=0.5, mode='batch',
                 label_smoothing=0.1, num_classes=1000):
        if mode not in ('batch', 'pair', 'elem'):
            raise UserError(f'mode is {mode!r}, but must be batch, pair or elem')
        self.cutmix_minmax = cutmix_minmax if cutmix_minmax is not None and max(cutmix_minmax) > 0 else None
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        cutmix = self.cutmix_minmax is not None or cutmix_alpha > 0
        if not (cutmix or mixup_alpha > 0):
            raise UserError('mixup_alpha and cutmix_alpha are both 0: there is nothing to mix')
        self.cutmix_prob = (switch_prob if mixup_alpha > 0 else 1.0) if cutmix else 0.0
        self.prob = prob
        self.mode = mode
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes

    def __call__(self, images, labels, rng=None):
        """Float images [N, C, H, W] and labels int64 [N] -> mixed images and soft targets float32 [N, num_classes].

        The given tensors are left as they are. rng: NumPy generator that decides what is mixed.
        """
        n, _, height, width = images.shape
        shares, boxes = self.draw(n, height, width, rng or np.random.default_rng())
        has_box = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
        # a few numbers per image go to the device; a pixel's weight is 0 or 1 where a box is pasted, else the share
        shares = paddle.to_tensor(shares.astype('float32')).unsqueeze(1)
        weights = shares.reshape([n, 1, 1, 1])
        if has_box.any():
            inside = box_mask(boxes, height, width)
            weights = paddle.where(paddle.to_tensor(has_box).reshape([n, 1, 1, 1]),
                                   1 - inside.astype('float32'), weights)
        weights = weights.astype(images.dtype)
        mixed = images * weights + images.flip(axis=0) * (1 - weights)
        one_hot = F.one_hot(labels, self.num_classes)
        targets = F.label_smooth(one_hot * shares + one_hot.flip(axis=0) * (1 - shares), epsilon=self.label_smoothing)
        return mixed, targets

    def draw(self, n, height, width, rng):
        """What to do with each of n images: the shares that stay, float [n], and boxes to paste, int [n, 4].

        A box is (top, bottom, left, right) in pixels, empty where there is none; the share of an image with a box is
        that of its area outside of it.
        """
        count = {'batch': 1, 'pair': -(-n // 2), 'elem': n}[self.mode]
        mixed = rng.random(count) < self.prob
        cut = mixed & (rng.random(count) < self.cutmix_prob)
        shares = rng.beta(self.mixup_alpha, self.mixup_alpha, count) if self.mixup_alpha > 0 else np.ones(count)
        shares = np.where(mixed & ~cut, shares, 1.0)
        if self.cutmix_minmax is not None:
            sides = rng.uniform(*self.cutmix_minmax, [2, count])
        else:
            alpha = self.cutmix_alpha if self.cutmix_alpha > 0 else 1.0
            sides = np.sqrt(1 - rng.beta(alpha, alpha, count))[None].repeat(2, 0)
        size = np.array([[height], [width]])
        lengths = np.where(cut, np.rint(sides * size), 0).astype('int64')
        if self.cutmix_minmax is not None:
            starts = rng.integers(0, size - lengths + 1)
        else:
            # the box's centre may be anywhere, and what is outside the image is cut off, as in the paper's code
            starts = rng.integers(0, size, [2, count]) - lengths // 2
        ends = np.clip(starts + lengths, 0, size)
        starts = np.clip(starts, 0, size)
        area = (ends - starts).prod(axis=0) / (height * width)
        shares = np.where(cut, 1 - area, shares)
        boxes = np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1)
        # image N - 1 - i of a pair is drawn as image i
        index = {'batch': np.zeros(n, int), 'pair': np.minimum(np.arange(n), np.arange(n)[::-1]),
                 'elem': np.arange(n)}[self.mode]
        return shares[index], boxes[index]


def build_mixup(config):
    """The Mixup of a config, or None where both kinds are off."""
    train = config.TRAIN
    if max(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, *train.CUTMIX_MINMAX) == 0 or train.MIXUP_PROB == 0:
        return None
    return Mixup(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.CUTMIX_MINMAX, train.MIXUP_PROB, train.MIXUP_SWITCH_PROB,
                 train.MIXUP_MODE.lower(), train.SMOOTHING, config.MODEL.NUM_CLASSES)
