"""Transforms of an image (crop, flip, augmentation; in evaluation, resize and center crop) and of a batch on the device
(normalization, erasing).

Random transforms take a NumPy generator, so the caller decides what the randomness depends on. Only batch transforms
import Paddle, so that other engines can predict without it.
"""
import functools
import math
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from utils import UserError

FILTERS = {
    'nearest': Image.Resampling.NEAREST,
    'bilinear': Image.Resampling.BILINEAR,
    'bicubic': Image.Resampling.BICUBIC,
    'lanczos': Image.Resampling.LANCZOS,
}


def find_filter(name):
    """Return the Pillow resampling filter with this name, in any case. Raises: UserError for an unknown name."""
    if name.lower() not in FILTERS:
        raise UserError(f'DATA.INTERPOLATION is {name!r}, but must be one of {", ".join(FILTERS)}')
    return FILTERS[name.lower()]


def random_crop_box(width, height, scale, rng, ratio=(3 / 4, 4 / 3), tries=10):
    """Draw a training crop (left, top, right, bottom) in pixels, as for GoogLeNet (arXiv 1409.4842, section 6).

    scale: (smallest, largest) fraction of the image's area. ratio: bounds of width / height, drawn log-uniformly.
    After `tries` boxes that do not fit, returns the largest centered box with an allowed ratio.
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


# fill for the pixels that a geometric operation leaves empty
GRAY = (128, 128, 128)


def _affine(image, matrix):
    """matrix: first two rows of the matrix that maps points of the result to points of the image."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=GRAY)


def _shear_x(image, amount):
    return _affine(image, (1, amount, 0, 0, 1, 0))


def _shear_y(image, amount):
    return _affine(image, (1, 0, 0, amount, 1, 0))


def _translate_x(image, amount):
    return _affine(image, (1, 0, amount * image.width, 0, 1, 0))


def _translate_y(image, amount):
    return _affine(image, (1, 0, 0, 0, 1, amount * image.height))


def _rotate(image, degrees):
    return image.rotate(degrees, fillcolor=GRAY)


def _posterize(image, bits):
    return ImageOps.posterize(image, 8 - round(bits))


def _solarize(image, amount):
    return ImageOps.solarize(image, 256 - amount)


def _enhance(enhancer, image, change):
    """enhancer: a class of PIL.ImageEnhance, whose factor 1 changes nothing."""
    return enhancer(image).enhance(1 + change)


# The same operations with OpenCV on uint8 arrays [H, W, 3], for speed. Results equal Pillow's, or differ by at most two
# levels where averages are rounded.
LEVELS = np.arange(256)


def _by_histograms(table_of, pixels):
    """Map the levels of each channel. table_of(number of pixels per level, int [256]) -> new levels, uint8 [256]."""
    import cv2
    planes = cv2.split(pixels)
    histograms = [cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype('int64') for plane in planes]
    return cv2.merge([cv2.LUT(plane, table_of(histogram)) for plane, histogram in zip(planes, histograms)])


def _equalizing_table(histogram):
    below = histogram.cumsum() - histogram
    step = (below[-1] + histogram[-1] - histogram[histogram.nonzero()[0][-1]]) // 255
    return np.minimum((step // 2 + below) // step if step else LEVELS, 255).astype('uint8')


def _stretching_table(histogram):
    low, high = histogram.nonzero()[0][[0, -1]]
    if low == high:
        return LEVELS.astype('uint8')
    scale = 255 / (high - low)
    return np.clip(LEVELS * scale - low * scale, 0, 255).astype('uint8')


def _posterize_array(pixels, bits):
    return pixels & np.uint8(256 - (1 << round(bits)))


def _look_up(pixels, table):
    """table: new level of each level, [256]."""
    import cv2
    return cv2.LUT(pixels, table.astype('uint8'))


def _solarize_array(pixels, amount):
    return _look_up(pixels, np.where(LEVELS < 256 - amount, LEVELS, 255 - LEVELS))


def _invert_array(pixels):
    return 255 - pixels


def _away_from(level, pixels, change):
    """Multiply the distance of all levels from `level` by 1 + change."""
    return _look_up(pixels, np.clip(level + np.float32(1 + change) * (LEVELS - level).astype('float32'), 0, 255))


def _brightness_array(pixels, change):
    return _away_from(0, pixels, change)


def _contrast_array(pixels, change):
    import cv2
    return _away_from(int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5), pixels, change)


def _color_array(pixels, change):
    import cv2
    luma = np.tile([0.299, 0.587, 0.114], [3, 1])
    return cv2.transform(pixels, luma + (1 + change) * (np.eye(3) - luma))


def _sharpness_array(pixels, change):
    import cv2
    smooth = pixels.copy()  # Pillow does not smooth the border
    smooth[1:-1, 1:-1] = cv2.filter2D(pixels, -1, np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13)[1:-1, 1:-1]
    return cv2.addWeighted(pixels, 1 + change, smooth, -change, 0)


@dataclass
class Operation:
    """An augmentation, function(image, amount) -> image, that changes nothing at amount 0.

    largest: amount at full magnitude; 0 for an operation without an amount: function(image).
    signed: whether the sign of the amount is random.
    on_array: the same for arrays, with OpenCV; without it, `function` gets the array as a Pillow image.
    """
    function: Callable
    largest: float = 0.0
    signed: bool = False
    on_array: Optional[Callable] = None

    def apply(self, image, *amount):
        """image: Pillow image or uint8 [H, W, 3]. Returns: the same type."""
        if not isinstance(image, np.ndarray):
            return self.function(image, *amount)
        if self.on_array:
            return self.on_array(image, *amount)
        return np.asarray(self.function(Image.fromarray(image), *amount))

    def __call__(self, image, magnitude, rng):
        """magnitude: in [0, 1]."""
        if not self.largest:
            return self.apply(image)
        sign = -1 if self.signed and rng.random() < 0.5 else 1
        return self.apply(image, sign * magnitude * self.largest)


# AutoAugment's operations and their largest amounts (arXiv 1805.09501, table 6). As in torchvision, magnitude 0 changes
# nothing; in the paper, some operations differ.
OPERATIONS = {
    'ShearX': Operation(_shear_x, 0.3, signed=True),
    'ShearY': Operation(_shear_y, 0.3, signed=True),
    'TranslateX': Operation(_translate_x, 150 / 331, signed=True),
    'TranslateY': Operation(_translate_y, 150 / 331, signed=True),
    'Rotate': Operation(_rotate, 30, signed=True),
    'AutoContrast': Operation(ImageOps.autocontrast, on_array=functools.partial(_by_histograms, _stretching_table)),
    'Invert': Operation(ImageOps.invert, on_array=_invert_array),
    'Equalize': Operation(ImageOps.equalize, on_array=functools.partial(_by_histograms, _equalizing_table)),
    'Solarize': Operation(_solarize, 256, on_array=_solarize_array),
    'Posterize': Operation(_posterize, 4, on_array=_posterize_array),
    'Contrast': Operation(functools.partial(_enhance, ImageEnhance.Contrast), 0.9, True, _contrast_array),
    'Color': Operation(functools.partial(_enhance, ImageEnhance.Color), 0.9, True, _color_array),
    'Brightness': Operation(functools.partial(_enhance, ImageEnhance.Brightness), 0.9, True, _brightness_array),
    'Sharpness': Operation(functools.partial(_enhance, ImageEnhance.Sharpness), 0.9, True, _sharpness_array),
}

# AutoAugment's policy for ImageNet (same paper, table 9): pairs of (operation, probability, magnitude from 0 to 9)
IMAGENET_POLICY = [
    (('Posterize', 0.4, 8), ('Rotate', 0.6, 9)),
    (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
    (('Posterize', 0.6, 7), ('Posterize', 0.6, 6)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
    (('Equalize', 0.4, 4), ('Rotate', 0.8, 8)),
    (('Solarize', 0.6, 3), ('Equalize', 0.6, 7)),
    (('Posterize', 0.8, 5), ('Equalize', 1.0, 2)),
    (('Rotate', 0.2, 3), ('Solarize', 0.6, 8)),
    (('Equalize', 0.6, 8), ('Posterize', 0.4, 6)),
    (('Rotate', 0.8, 8), ('Color', 0.4, 0)),
    (('Rotate', 0.4, 9), ('Equalize', 0.6, 2)),
    (('Equalize', 0.0, 7), ('Equalize', 0.8, 8)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Rotate', 0.8, 8), ('Color', 1.0, 2)),
    (('Color', 0.8, 8), ('Solarize', 0.8, 7)),
    (('Sharpness', 0.4, 7), ('Invert', 0.6, 8)),
    (('ShearX', 0.6, 5), ('Equalize', 1.0, 9)),
    (('Color', 0.4, 0), ('Equalize', 0.6, 3)),
    (('Equalize', 0.4, 7), ('Solarize', 0.2, 4)),
    (('Solarize', 0.6, 5), ('AutoContrast', 0.6, 5)),
    (('Invert', 0.6, 4), ('Equalize', 1.0, 8)),
    (('Color', 0.6, 4), ('Contrast', 1.0, 8)),
    (('Equalize', 0.8, 8), ('Equalize', 0.6, 3)),
]


class AutoAugment:
    """Apply one of AutoAugment's 25 pairs of operations, drawn for each image (arXiv 1805.09501).

    strength: from 0 (no change) to 1 (full policy). It multiplies the magnitudes and, for operations without one, the
        probabilities. MobileOne increases it during training (arXiv 2206.04040).
    """

    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, image, rng):
        for name, probability, magnitude in IMAGENET_POLICY[rng.integers(len(IMAGENET_POLICY))]:
            operation = OPERATIONS[name]
            if not operation.largest:
                probability *= self.strength
            if rng.random() < probability:
                image = operation(image, self.strength * magnitude / 9, rng)
        return image


class RandAugment:
    """Apply `layers` operations, drawn for each image, at one magnitude from 0 to 10 (arXiv 1909.13719).

    The paper's 14 operations: Identity and those of AutoAugment except Invert.
    """

    names = ['Identity'] + [name for name in OPERATIONS if name != 'Invert']

    def __init__(self, layers, magnitude):
        self.layers = layers
        self.magnitude = magnitude

    def __call__(self, image, rng):
        for name in rng.choice(self.names, self.layers):
            if name != 'Identity':
                image = OPERATIONS[name](image, self.magnitude / 10, rng)
        return image


class ColorJitter:
    """Multiply brightness, contrast and color, in random order, each by a factor from [1 - amount, 1 + amount]."""

    def __init__(self, amount):
        self.amount = amount

    def __call__(self, image, rng):
        for name in rng.permutation(['Brightness', 'Contrast', 'Color']):
            image = OPERATIONS[name].apply(image, rng.uniform(-self.amount, self.amount))
        return image


class TrainTransform:
    """Random resized crop, horizontal flip, augmentations: an image of `open_image` -> uint8 [size, size, 3].

    scale: as in `random_crop_box`. augmentations: functions (image, rng) -> image.
    fast: pass uint8 arrays, for OpenCV, to the augmentations instead of Pillow images.
    """

    def __init__(self, size, scale, interpolation, augmentations=(), fast=False):
        self.size = size
        self.scale = scale
        self.filter = find_filter(interpolation)
        self.augmentations = augmentations
        self.fast = fast

    def __call__(self, image, rng):
        box = random_crop_box(*image.size, self.scale, rng)
        flip = rng.random() < 0.5
        image = image.region(box, self.size, self.filter, flip)
        if self.augmentations and not self.fast:
            image = Image.fromarray(image)
        for augment in self.augmentations:
            image = augment(image, rng)
        return np.asarray(image)


# aspect ratio above which evaluation does not resize the whole image: for 10,000 x 1 pixels, that takes gigabytes
ELONGATED = 100


class EvalTransform:
    """Resize the shorter side to size / crop_pct, then crop the center: RGB image -> uint8 [size, size, 3]."""

    def __init__(self, size, crop_pct, interpolation):
        self.size = size
        self.resize = int(size / crop_pct)
        self.filter = find_filter(interpolation)

    def __call__(self, image, rng=None):
        short = min(image.size)
        # the longer side is rounded down, as in the published measurements
        size = tuple(int(self.resize * side / short) for side in image.size)
        left, top = (round((side - self.size) / 2) for side in size)
        box = left, top, left + self.size, top + self.size
        if max(image.size) > ELONGATED * short:
            # resize only the crop; rounding may differ slightly
            box = [edge * side / resized for edge, side, resized in zip(box, 2 * image.size, 2 * size)]
            return np.asarray(image.resize((self.size, self.size), self.filter, box))
        if size != image.size:
            image = image.resize(size, self.filter)
        return np.asarray(image.crop(box))


class Normalize:
    """uint8 [N, H, W, C] on the device -> float32 [N, C, H, W], (pixel / 255 - mean) / std per channel."""

    def __init__(self, mean, std):
        import paddle
        self.shift = 255 * paddle.to_tensor(mean, dtype='float32').reshape([1, -1, 1, 1])
        self.scale = 1 / (255 * paddle.to_tensor(std, dtype='float32').reshape([1, -1, 1, 1]))

    def __call__(self, images):
        return (images.transpose([0, 3, 1, 2]).astype('float32') - self.shift) * self.scale


def box_mask(boxes, height, width):
    """Return bool [N, 1, height, width] on the device, true inside each image's box.

    boxes: int array [N, 4], (top, bottom, left, right) in pixels. Only these four numbers per image go to the device.
    """
    import paddle
    top, bottom, left, right = paddle.to_tensor(boxes.T.reshape([4, len(boxes), 1, 1, 1]))
    rows, columns = paddle.arange(height).reshape([1, 1, -1, 1]), paddle.arange(width).reshape([1, 1, 1, -1])
    return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


class RandomErase:
    """Random erasing (arXiv 1708.04896) of a normalized batch: float [N, C, H, W] -> a new tensor of the same shape.

    prob: probability that an image is erased, in 1 to `count` boxes. Together they cover at most a third of it; a
        single box covers at least 2%. Height / width is drawn log-uniformly from 0.3 to 1 / 0.3; a side longer
        than the image's is cut.
    mode: fill of a box: 'const' for zeros, the mean color of the dataset; 'rand' for a normally distributed color;
        'pixel' for normally distributed noise.
    """

    def __init__(self, prob, mode='pixel', count=1):
        self.prob = prob
        self.mode = mode
        self.count = count

    def draw(self, n, height, width, rng):
        """Draw boxes, int [count, n, 4]: (top, bottom, left, right) in pixels; empty ones erase nothing."""
        shape = [self.count, n]
        counts = rng.integers(1, self.count + 1, n) * (rng.random(n) < self.prob)
        area = height * width * rng.uniform(0.02, 1 / 3, shape) / np.maximum(counts, 1)
        aspect = np.exp(rng.uniform(math.log(0.3), -math.log(0.3), shape))
        sides = np.stack([np.sqrt(area * aspect), np.sqrt(area / aspect)])
        size = np.array([height, width]).reshape([2, 1, 1])
        sides = np.clip(np.rint(sides), 1, size).astype('int64') * (np.arange(self.count)[:, None] < counts)
        starts = rng.integers(0, size - sides + 1)
        return np.stack([starts[0], starts[0] + sides[0], starts[1], starts[1] + sides[1]], axis=-1)

    def __call__(self, images, rng):
        import paddle
        n, channels, height, width = images.shape
        for boxes in self.draw(n, height, width, rng):
            if self.mode == 'const':
                fill = paddle.zeros([1])
            elif self.mode == 'rand':
                fill = paddle.to_tensor(rng.standard_normal([n, channels, 1, 1]).astype('float32'))
            else:
                paddle.seed(int(rng.integers(2 ** 31)))  # noise is drawn on the device, but depends only on rng
                fill = paddle.randn(images.shape)
            images = paddle.where(box_mask(boxes, height, width), fill.astype(images.dtype), images)
        return images
