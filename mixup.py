"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): mix a batch with itself in reverse order."""
import numpy as np
import paddle
import paddle.nn.functional as F

from transforms import box_mask
from utils import UserError


class Mixup:
    """Mix image i of a batch with image N - 1 - i, and their targets in the same proportion.

    mixup_alpha, cutmix_alpha: image i's share is drawn from Beta(alpha, alpha); 0 turns that kind off.
    cutmix_minmax: (smallest, largest) side of the CutMix box as fractions of the image side; replaces cutmix_alpha.
    prob: probability of mixing at all; switch_prob: probability of CutMix when both kinds are on.
    mode: draw once per 'batch', once per 'pair' of images i and N - 1 - i, or once per image ('elem').
    label_smoothing: fraction of each target that is spread over all num_classes classes.
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
            raise UserError('mixup_alpha and cutmix_alpha are both 0, which turns mixing off: set one above 0')
        self.cutmix_prob = (switch_prob if mixup_alpha > 0 else 1.0) if cutmix else 0.0
        self.prob = prob
        self.mode = mode
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes

    def __call__(self, images, labels, rng=None):
        """Float images [N, C, H, W], int64 labels [N] -> mixed images, soft targets float32 [N, num_classes].

        The inputs are not modified. Labels are below num_classes. rng: NumPy generator for all random
        choices; None: a new one, not seeded.
        """
        n, _, height, width = images.shape
        shares, boxes = self.draw(n, height, width, rng or np.random.default_rng())
        has_box = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
        # only a few numbers per image go to the device. With a box, a pixel's weight is 0 or 1; without one, the share
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
        """Draw how to mix n images: the fraction of each that is kept, float [n], and the boxes to paste, int [n, 4].

        A box is (top, bottom, left, right) in pixels, empty for mixup and unmixed images; with a box, the fraction is
        the area outside it.
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
            # as in the paper's code, the box's center may be anywhere, and the part outside the image is cut off
            starts = rng.integers(0, size, [2, count]) - lengths // 2
        ends = np.clip(starts + lengths, 0, size)
        starts = np.clip(starts, 0, size)
        area = (ends - starts).prod(axis=0) / (height * width)
        shares = np.where(cut, 1 - area, shares)
        boxes = np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1)
        # in a pair, image N - 1 - i gets the draw of image i
        index = {'batch': np.zeros(n, int), 'pair': np.minimum(np.arange(n), np.arange(n)[::-1]),
                 'elem': np.arange(n)}[self.mode]
        return shares[index], boxes[index]


def build_mixup(config):
    """Return the Mixup of a config, or None if it would never mix."""
    train = config.TRAIN
    if max(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, *train.CUTMIX_MINMAX) == 0 or train.MIXUP_PROB == 0:
        return None
    return Mixup(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.CUTMIX_MINMAX, train.MIXUP_PROB, train.MIXUP_SWITCH_PROB,
                 train.MIXUP_MODE.lower(), train.SMOOTHING, config.MODEL.NUM_CLASSES)
