"""What is done to an image: random crop and flip in training, resize and centre crop in evaluation, normalisation.

Random transforms take a NumPy generator, so that the caller decides what an image's randomness depends on.
"""
import math

import numpy as np
import paddle
from PIL import Image

from utils import UserError

FILTERS = {
    'nearest': Image.Resampling.NEAREST,
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
    'lanczos': Image.Resampling.LANCZOS,
}


def find_filter(name):
    """Pillow's resampling filter of a name, in any case. Raises: UserError for an unknown one."""
    if name.lower() not in FILTERS:
        raise UserError(f'DATA.INTERPOLATION is {name!r}, but must be one of {", ".join(FILTERS)}')
    return FILTERS[name.lower()]


def random_crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3), tries=10):
    """A random box (left, top, right, bottom) in pixels, as "Going deeper with convolutions" crops for training.

    scale: smallest and largest share of the image's area; ratio: of width to height, drawn uniformly in its logarithm.
    After `tries` boxes that do not fit, the largest centred one whose ratio is allowed.
    """
    for _ in range(tries):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class TrainTransform:
    """RandomResizedCrop and horizontal flip: RGB image -> uint8 [size, size, 3]."""

    def __init__(self, size, scale, interpolation):
        self.size = size
        self.scale = scale
        self.filter = find_filter(interpolation)

    def __call__(self, image, rng):
        box = random_crop_box(*image.size, self.scale, rng)
        image = image.crop(box).resize((self.size, self.size), self.filter)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)


class EvalTransform:
    """Resize the shorter side to size / crop_pct, then crop the centre: RGB image -> uint8 [size, size, 3]."""

    def __init__(self, size, crop_pct, interpolation):
        self.size = size
        self.resize = int(size / crop_pct)
        self.filter = find_filter(interpolation)

    def __call__(self, image, rng=None):
        short = min(image.size)
        # the longer side is rounded down, as in the published measurements
        size = tuple(int(self.resize * side / short) for side in image.size)
        if size != image.size:
            image = image.resize(size, self.filter)
        left, top = (round((side - self.size) / 2) for side in size)
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))


class Normalize:
    """uint8 [N, H, W, C] on the device -> float32 [N, C, H, W], (pixel / 255 - mean) / std per channel."""

    def __init__(self, mean, std):
        self.shift = 255 * paddle.to_tensor(mean, dtype='float32').reshape([1, -1, 1, 1])
        self.scale = 1 / (255 * paddle.to_tensor(std, dtype='float32').reshape([1, -1, 1, 1]))

    def __call__(self, images):
        return (images.transpose([0, 3, 1, 2]).astype('float32') - self.shift) * self.scale
