"""Image transforms, compared with the same steps in Pillow, and normalization on the device."""
import math

import numpy as np
import paddle
import pytest
from PIL import Image

from images import InMemory
from transforms import EvalTransform, Normalize, TrainTransform, random_crop_box


def photo(width, height, seed=0):
    """Return smooth color noise, so that filters and positions matter."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype='uint8')
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize('width, height', [(500, 375), (375, 500), (300, 300), (257, 256), (256, 256), (90, 200)])
def test_evaluation_equals_pillow_resize_and_crop(width, height):
    image = photo(width, height)
    scale = 256 / min(width, height)
    resized = image.resize((256, math.floor(height * scale)) if width <= height else (math.floor(width * scale), 256),
                           Image.Resampling.BICUBIC)
    left, top = int(round((resized.width - 224) / 2)), int(round((resized.height - 224) / 2))
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
    out = EvalTransform(224, 0.875, 'bicubic')(image)
    assert out.dtype == np.uint8 and out.shape == (224, 224, 3)
    np.testing.assert_array_equal(out, expected)


def test_evaluation_options_change_pixels():
    image = photo(300, 280)
    outputs = [EvalTransform(96, crop, name)(image) for crop, name in
               ((0.875, 'bicubic'), (0.875, 'bilinear'), (0.875, 'nearest'), (0.875, 'LANCZOS'), (1.0, 'bicubic'))]
    for index, out in enumerate(outputs):
        assert out.shape == (96, 96, 3)
        assert all((out != other).any() for other in outputs[:index])
    exact = photo(96, 96)
    np.testing.assert_array_equal(EvalTransform(96, 1.0, 'bicubic')(exact), np.asarray(exact))


def test_crop_boxes():
    areas, aspects = [], []
    for seed in range(500):
        left, top, right, bottom = random_crop_box(400, 300, (0.08, 1.0), np.random.default_rng(seed))
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / 120000)
        aspects.append((right - left) / (bottom - top))
    assert 0.07 < min(areas) < 0.12 and 0.85 < max(areas) <= 1
    assert 0.73 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.36
    for seed in range(50):
        left, top, right, bottom = random_crop_box(400, 300, (0.5, 0.5), np.random.default_rng(seed))
        assert abs((right - left) * (bottom - top) / 120000 - 0.5) < 0.01


@pytest.mark.parametrize('width, height, box', [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)),
                                                (1, 1, (0, 0, 1, 1))])
def test_crop_box_when_none_fits(width, height, box):
    assert random_crop_box(width, height, (1.0, 1.0), np.random.default_rng(0)) == box


def test_training_crops_and_flips():
    image = photo(60, 40)
    whole = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    flips = 0
    for seed in range(40):  # with this scale and a square image, only the flip is random
        square = photo(32, 32)
        out = TrainTransform(32, (1.0, 1.0), 'bicubic')(InMemory(square), np.random.default_rng(seed))
        flipped = np.array_equal(out, np.asarray(square)[:, ::-1])
        assert flipped or np.array_equal(out, np.asarray(square))
        flips += flipped
    assert 10 < flips < 30
    transform = TrainTransform(32, (0.08, 1.0), 'bicubic')
    out = transform(InMemory(image), np.random.default_rng(1))
    assert out.dtype == np.uint8 and out.shape == (32, 32, 3) and (out != whole).any()
    np.testing.assert_array_equal(out, transform(InMemory(image), np.random.default_rng(1)))
    assert (out != transform(InMemory(image), np.random.default_rng(2))).any()


def test_training_crop_equals_pillow():
    image, seed = photo(60, 40), 5
    rng = np.random.default_rng(seed)
    box = random_crop_box(60, 40, (0.2, 0.6), rng)
    expected = np.asarray(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR))
    expected = expected[:, ::-1] if rng.random() < 0.5 else expected
    out = TrainTransform(24, (0.2, 0.6), 'bilinear')(InMemory(image), np.random.default_rng(seed))
    np.testing.assert_array_equal(out, expected)


def test_normalize():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype='uint8')
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    out = Normalize(mean, std)(paddle.to_tensor(images))
    assert out.dtype == paddle.float32 and out.shape == [2, 3, 5, 7]
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
