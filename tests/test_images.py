"""All kinds of image files that are converted or rejected; reading lists and images from random bytes."""
import io
import math
import os
import pathlib
import re
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from conftest import run, write_images
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import transforms
from datasets import get_dataloader, get_dataset, read_list
from images import InMemory, describe_backend, find_backend, find_images, is_image, open_image, read_image, read_range
from transforms import EvalTransform, TrainTransform
from utils import UserError

# images.py sets this filter, but pytest resets it
pytestmark = pytest.mark.filterwarnings('ignore:::PIL')

RAMP = np.arange(65536, dtype='uint16').reshape(256, 256)


@pytest.mark.parametrize('name, expected', [
    *((name, True) for name in ('a.jpg', 'a b.JPEG', 'a.jfif', 'a.mpo', 'a.ppm', 'a.Pgm', 'a.jp2', 'a.webp', '#1.tga')),
    *((name, False) for name in ('.a.jpg', '._a.jpg', 'a', 'a.', 'a.txt', 'a.jpg.part', 'Thumbs.db', 'desktop.ini',
                                 'a.eps', 'a.ps', 'a.pdf', 'a.mpg', 'a.wmf', 'a.h5', 'a.heic')),
])
def test_which_files_are_images(name, expected):
    assert is_image(name) is expected


def test_images_that_pillow_writes_are_read(tmp_path):
    image, read = Image.effect_mandelbrot((64, 64), (-2, -2, 2, 2), 50), set()
    for extension, kind in Image.registered_extensions().items():
        if is_image(f'x{extension}') and kind in Image.SAVE and kind != 'ICNS':  # its largest icon is the image
            mode = {'BLP': 'P', 'MSP': '1', 'XBM': '1'}.get(kind, 'RGB')
            image.convert(mode).save(tmp_path / f'x{extension}')
            assert read_image(str(tmp_path / f'x{extension}')).size == (64, 64), extension
            read.add(kind)
    assert read >= {'BMP', 'GIF', 'JPEG', 'MPO', 'PCX', 'PNG', 'PPM', 'SGI', 'TGA', 'TIFF'}


def test_find_images(tmp_path):
    """Images are found at any depth, each once, and other files are reported with a reason."""
    root = tmp_path / 'root'
    for name in ('a/1.jpg', 'a/deep/er/2.ppm', 'b/3.TIF', '.Trash-0/x.jpg', 'a/.ipynb_checkpoints/1.jpg',
                 'a/@eaDir/1.jpg/thumb.jpg', '__MACOSX/a/x.jpg', 'a/._1.jpg', 'a/Thumbs.db', 'b/note.txt', 'b/README',
                 'b/run/config.yaml', 'b/run/log.jsonl', 'b/run/curves.png', 'c/run/config.yaml', 'c/run/best.pdparams',
                 'c/run/x.png', 'report/report.html',
                 'report/images.csv', 'report/worst.png', 'd/config.yaml', 'd/4.png', '0.jpg', '../apart/7.gif',
                 '../elsewhere/5.gif', '../elsewhere/sub/6.gif'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('')
    os.mkfifo(root / 'b/pipe.jpg')
    for link, target in (('b/outside', '../../elsewhere'), ('b/again', '../../elsewhere/sub'), ('b/0', '../a/deep'),
                         ('a/self', '../a'), ('a/deep/up', '../..'), ('b/loop.jpg', 'loop.jpg'), ('b/gone', 'x'),
                         ('b/file.png', '../a/1.jpg'), ('a/0.png', '../d/4.png'), ('a/7.gif', '../../apart/7.gif'),
                         ('b/7.gif', '../a/7.gif'), ('b/9.jpg', '../0.jpg')):
        (root / link).symlink_to(target)
    (root / 'b/8.jpg').write_text('')
    listed = {str(root / 'b/8.jpg')}
    found, left_out = find_images(root, listed)
    assert found == ['a/1.jpg', 'a/7.gif', 'a/deep/er/2.ppm', 'b/3.TIF', 'b/9.jpg', 'b/again/6.gif',
                     'b/outside/5.gif', 'd/4.png']
    assert len(listed) == 9 and listed >= {str(root / 'd/4.png'), str(tmp_path / 'apart/7.gif')}
    assert left_out == {
        'hidden or system files and folders': ['.Trash-0', '__MACOSX', 'a/._1.jpg', 'a/.ipynb_checkpoints', 'a/@eaDir',
                                               'a/Thumbs.db'],
        '.txt files, which Pillow cannot read': ['b/note.txt'],
        '.yaml files, which Pillow cannot read': ['d/config.yaml'],
        'files without an extension': ['b/README'],
        'folders of runs or reports': ['b/run', 'c/run', 'report'],
        'folders already searched': ['b/0', 'b/outside/sub'],
        'images already listed under another path': ['0.jpg', 'a/0.png', 'b/7.gif', 'b/8.jpg', 'b/file.png'],
        'broken links, pipes, devices': ['b/gone', 'b/loop.jpg', 'b/pipe.jpg'],
        'links to a parent folder': ['a/deep/up', 'a/self']}


def png(width, height, depth, color, pixels=b''):
    """Build a PNG file by hand. color: 0 gray, 2 RGB, 4 gray and alpha; pixels: big-endian rows, each after a 0."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


def tiff(array, order, sample_format=1, samples=1, packed=None):
    """Build an uncompressed gray TIFF file by hand. order: '<' or '>'; sample_format: 1 unsigned, 2 signed, 3 float.

    packed: (bits per pixel, bytes) to use instead of the array's own.
    """
    bits, data = packed or (8 * array.itemsize, array.astype(array.dtype.newbyteorder(order)).tobytes())
    height, width = array.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, samples),
            (278, height), (279, len(data)), (339, sample_format)]
    directory = b''.join(struct.pack(f'{order}HHII', tag, 4, 1, value) for tag, value in tags)
    return (struct.pack(f'{order}2sHI', b'II' if order == '<' else b'MM', 42, 8 + len(data)) + data
            + struct.pack(f'{order}H', len(tags)) + directory + bytes(4))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_palette(transparency):
    image = Image.fromarray(np.arange(12, dtype='uint8').reshape(3, 4), 'P')
    image.putpalette([channel for color in range(12) for channel in (20 * color, 7, 255 - 20 * color)])
    return encoded(image, 'PNG', transparency=transparency)


def stored(folder, content, name='photo'):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def region_reader(backend):
    """Return a function like `read_image` that reads regions, as training does."""
    def read(path, exif_transpose=False, bit_depth=0):
        source = open_image(path, exif_transpose, bit_depth, find_backend(backend))
        width, height = source.size
        side = math.lcm(width, height)  # so that nearest repeats each pixel equally often
        pixels = source.region((0, 0, width, height), side, Image.Resampling.NEAREST)
        return Image.fromarray(pixels[::side // height, ::side // width])
    return read


@pytest.fixture(params=['evaluation', 'pillow', 'fast'])
def read(request):
    """A function that reads a whole image: as in evaluation, or as in training with either backend."""
    return read_image if request.param == 'evaluation' else region_reader(request.param)


@pytest.fixture(params=['pillow', 'fast'])
def backend(request):
    """A value of DATA.IMAGE_BACKEND."""
    return request.param


COLORS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype='uint8')


@pytest.mark.parametrize('content', [
    encoded(Image.fromarray(COLORS), 'JPEG'),
    encoded(Image.fromarray(COLORS).convert('L'), 'JPEG'),
    encoded(Image.fromarray(COLORS).convert('CMYK'), 'JPEG'),
    encoded(Image.fromarray(COLORS).convert('1'), 'PNG'),
    encoded(Image.fromarray(COLORS).convert('LA'), 'PNG'),
    encoded(Image.fromarray(COLORS).convert('RGBA'), 'PNG'),
    encoded(Image.new('L', (1, 1), 9), 'PNG'),
    with_palette(3),
], ids=['rgb', 'gray', 'cmyk', 'two colors', 'gray and alpha', 'rgb and alpha', 'one pixel', 'palette'])
def test_8_bit_images_are_converted_as_by_pillow(content, tmp_path, read):
    with Image.open(io.BytesIO(content)) as image:
        expected = image.convert('RGB')
    image = read(stored(tmp_path, content))
    assert (image.mode, image.size, image.tobytes()) == ('RGB', expected.size, expected.tobytes())


def test_transparency_is_dropped(tmp_path, read):
    pixels = np.asarray(read(stored(tmp_path, with_palette(bytes([0, 128, 255] * 4)))))
    assert pixels.reshape(12, 3).tolist() == [[20 * color, 7, 255 - 20 * color] for color in range(12)]


@pytest.mark.parametrize('content', [
    png(256, 256, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in RAMP)),
    png(256, 256, 16, 2, b''.join(b'\0' + row.repeat(3).astype('>u2').tobytes() for row in RAMP)),
    b'P5 256 256 65535\n' + RAMP.astype('>u2').tobytes(),
    tiff(RAMP, '<'), tiff(RAMP, '>'),
], ids=['png', 'rgb png', 'pgm', 'tiff', 'big-endian tiff'])
@pytest.mark.parametrize('bit_depth', [0, 16])
def test_16_bit_images_are_scaled(content, bit_depth, tmp_path, read):
    pixels = np.asarray(read(stored(tmp_path, content), bit_depth=bit_depth))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[:, :, None] >> 8, 3, axis=2))


def gray_png(array):
    height, width = array.shape
    return png(width, height, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in array))


def twelve_bit_tiff(array):
    """Two 12-bit pixels in three bytes."""
    first, second = array.reshape(-1, 2).astype('uint16').T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype('uint8')
    return tiff(array, '<', packed=(12, packed.tobytes()))


def values(depth):
    """64 x 64 pixels from 0 to 2**depth - 1."""
    return (np.arange(4096) * (2 ** depth - 1) // 4095).reshape(64, 64)


@pytest.mark.parametrize('content', [
    twelve_bit_tiff(values(12)), b'P5 64 64 4095\n' + values(12).astype('>u2').tobytes(),
    b'P2 64 64 4095\n' + ' '.join(map(str, values(12).ravel())).encode(),
], ids=['tiff', 'pgm', 'text pgm'])
def test_declared_12_bit_images_are_scaled(content, tmp_path, read):
    pixels = np.asarray(read(stored(tmp_path, content)))
    np.testing.assert_array_equal(pixels, np.repeat(values(12)[:, :, None] >> 4, 3, axis=2))


@pytest.mark.parametrize('depth', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('encode', [
    gray_png, lambda array: b'P5 64 64 65535\n' + array.astype('>u2').tobytes(),
    lambda array: tiff(array.astype('uint16'), '<'), lambda array: tiff(array.astype('uint16'), '>'),
    lambda array: tiff(array.astype('uint32'), '<'), lambda array: tiff(array.astype('float32'), '>', 3),
], ids=['png', 'pgm', 'tiff', 'big-endian tiff', '32-bit tiff', 'float tiff'])
def test_bit_depth_scales_gray_pixels(encode, depth, tmp_path, read):
    pixels = np.asarray(read(stored(tmp_path, encode(values(depth))), bit_depth=depth))
    np.testing.assert_array_equal(pixels, np.repeat(values(depth)[:, :, None] >> (depth - 8), 3, axis=2))


@pytest.mark.parametrize('depth', range(1, 8))
def test_bit_depths_below_eight_reach_white(depth, tmp_path, read):
    """A depth of 1 is for floating-point images with a range from 0 to 1."""
    array = np.array([[0, 0.5, 1]], 'float32') * (2 ** depth - 1)
    path = stored(tmp_path, tiff(array, '<', 3))
    assert np.asarray(read(path, bit_depth=depth))[0, :, 0].tolist() == [0, 127, 255]
    path = stored(tmp_path, tiff(np.array([[0, 2 ** depth - 1]], 'uint32'), '<'))
    assert np.asarray(read(path, bit_depth=depth))[0, :, 0].tolist() == [0, 255]


def test_bit_depth_does_not_change_8_bit_images(tmp_path, read):
    for content in (JPEG, with_palette(3), encoded(Image.fromarray(COLORS).convert('1'), 'PNG')):
        path = stored(tmp_path, content)
        assert read(path, bit_depth=12).tobytes() == read(path).tobytes()


@pytest.mark.parametrize('content, message', [
    (gray_png(np.array([[0, 4096]])), r'pixels from 0 to 4096, but 12 bits \(DATA.BIT_DEPTH\) allow 0 to 4095'),
    (tiff(np.array([[-1, 9]], 'int16'), '<', 2), r'pixels from -1 to 9, but 12 bits \(DATA.BIT_DEPTH\) allow 0 to'),
    (tiff(np.array([[0, 4095.5]], 'float32'), '<', 3), r'pixels from 0 to 4095.5, but 12 bits'),
    (tiff(np.array([[0, np.inf]], 'float32'), '<', 3), r'pixels from 0 to inf, but 12 bits'),
    (tiff(np.array([[0, np.nan]], 'float32'), '<', 3), 'NaN pixels'),
    (png(1, 1, 16, 2, bytes(7)), '16-bit color, of which Pillow reads only the upper 8 bits: DATA.BIT_DEPTH 12 cannot'),
    (png(1, 1, 16, 4, bytes(5)), '16-bit color'),
], ids=['above', 'below', 'float', 'infinite', 'nan', 'color', 'transparency'])
def test_images_that_do_not_fit_the_bit_depth_are_refused(content, message, tmp_path, read):
    path = stored(tmp_path, content)
    with pytest.raises(UserError, match=rf'^{re.escape(path)}: cannot read the image \({message}'):
        read(path, bit_depth=12)


def test_bit_depth_applies_to_training_and_evaluation(config, tmp_path, backend):
    stored(tmp_path, gray_png(values(12)), 'x')
    for split in ('train', 'val'):
        (tmp_path / f'{split}_list.txt').write_text('x 0\n')
    config.DATA.DATA_PATH, config.DATA.CROP_PCT, config.DATA.BIT_DEPTH = str(tmp_path), 1.0, 12
    config.DATA.IMAGE_BACKEND = backend
    image = Image.fromarray((values(12) >> 4).astype('uint8')).convert('RGB')
    np.testing.assert_array_equal(get_dataset(config, False)[0][0], EvalTransform(32, 1.0, 'bicubic')(image))
    rng = np.random.default_rng([config.SEED, 1, 0])
    np.testing.assert_array_equal(get_dataset(config)[1, 0][0],
                                  TrainTransform(32, config.DATA.CROP_SCALE, 'bicubic')(InMemory(image), rng))


@pytest.mark.parametrize('content, expected', [
    (gray_png(np.array([[7, 4000]])), (7, 4000)), (tiff(RAMP, '>'), (0, 65535)),
    (png(2, 1, 16, 2, b'\0' + np.array([300, 600, 800, 900, 700, 4000], '>u2').tobytes()), (256, 4095)),
    (png(1, 1, 16, 4, b'\0' + np.array([600, 65535], '>u2').tobytes()), (512, 767)),
    (twelve_bit_tiff(values(12)), None), (encoded(Image.fromarray(COLORS), 'JPEG'), None),
    (tiff(RAMP.astype('uint32'), '<'), None), (tiff(np.ones((2, 3), 'float32'), '<', 3), None),
], ids=['png', 'tiff', 'rgb png', 'transparency', '12 bits', 'jpeg', '32 bits', 'float'])
def test_range_of_16_bit_images(content, expected, tmp_path):
    assert read_range(stored(tmp_path, content)) == expected


JPEG = encoded(Image.fromarray(COLORS), 'JPEG')
PNG = encoded(Image.fromarray(COLORS), 'PNG')


@pytest.mark.parametrize('content, message', [
    (None, r'No such file or directory\); fix the file, or leave it out'),
    (b'', 'not an image in a format that Pillow reads'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', 'an EPS file is a program'),
    (b'not an image', 'not an image in a format that Pillow reads'),
    (JPEG[:len(JPEG) // 2], 'image file is truncated'),
    (JPEG[:300], ''),
    (PNG[:len(PNG) // 2], 'image file is truncated'),
    (PNG[:8] + JPEG, ''),
    (tiff(np.array([[0, 65535]], 'uint32'), '<'), '32-bit pixels from 0 to 65535, whose range is unknown without '
                                                  'DATA.BIT_DEPTH'),
    (tiff(np.array([[0.25, 1]], 'float32'), '<', 3), 'floating-point pixels from 0.25 to 1, whose range is unknown'),
    (tiff(np.array([[-1, 9]], 'int16'), '<', 2), r'pixels from -1 to 9, but 16 bits \(declared by the file\) allow 0'),
    (png(20000, 20000, 8, 2), r'Image size \(400000000 pixels\) exceeds limit of 178956970 pixels.*; scale it down$'),
], ids=['missing', 'empty', 'eps', 'text', 'cut jpeg', 'header', 'cut png', 'two formats', '32 bits', 'float', 'signed',
        'bomb'])
def test_errors_name_unreadable_images(content, message, tmp_path, read):
    path = str(tmp_path / 'photo')
    if content is not None:
        stored(tmp_path, content)
    with pytest.raises(UserError, match=rf'^{re.escape(path)}: cannot read the image \({message}') as error:
        read(path)
    assert '\n' not in str(error.value) and '()' not in str(error.value)


@pytest.mark.parametrize('error, message', [
    (EOFError, 'EOFError); fix the file, or leave it out'),
    (MemoryError, 'not enough memory); scale it down'),
])
def test_exceptions_without_a_message_get_a_reason(monkeypatch, tmp_path, error, message, read):
    def fail(path):
        raise error
    path = stored(tmp_path, encoded(Image.fromarray(COLORS), 'PNG'))
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(UserError, match=re.escape(f'{path}: cannot read the image ({message}')):
        read(path)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('reader', ['evaluation', 'pillow', 'fast'])
@pytest.mark.parametrize('content', [b'', JPEG[:len(JPEG) // 2], png(20000, 20000, 8, 2)],
                         ids=['empty', 'cut', 'bomb'])
def test_the_loader_names_a_bad_image(content, reader, workers, config, tmp_path):
    """The loader neither skips nor replaces the image."""
    write_images(tmp_path / 'x', 3)
    stored(tmp_path, content, 'x/photo 1.jpg')
    is_train = reader != 'evaluation'
    name = 'train_list.txt' if is_train else 'val_list.txt'
    (tmp_path / name).write_text(''.join(f'x/photo {index}.jpg 0\n' for index in range(3)))
    config.DATA.DATA_PATH, config.DATA.NUM_WORKERS = str(tmp_path), workers
    config.DATA.IMAGE_BACKEND = reader if is_train else 'auto'
    with pytest.raises(UserError, match='x/photo 1.jpg: cannot read the image'):
        list(get_dataloader(config, get_dataset(config, is_train), is_train))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(kind, orientation, config, tmp_path, backend):
    """False leaves pixels as stored, except that Pillow itself rotates TIFF images, as their format specifies."""
    pixels = np.zeros((40, 60, 3), 'uint8')
    pixels[:20, :30] = 255  # the upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored(tmp_path, encoded(Image.fromarray(pixels), kind, exif=exif), 'x')
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
              6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)}[orientation]
    (tmp_path / 'val_list.txt').write_text('x 0\n')
    config.DATA.DATA_PATH, config.DATA.CROP_PCT, config.DATA.IMAGE_BACKEND = str(tmp_path), 1.0, backend
    for on in (False, True):
        expected = turned if on or kind == 'TIFF' else pixels
        image = read_image(str(tmp_path / 'x'), on)
        assert image.size == expected.shape[1::-1]
        assert (abs(np.asarray(image).astype(int) - expected) > 100).mean() < 0.01  # JPEG and WebP lose some
        config.DATA.EXIF_TRANSPOSE = on
        config.DATA.INTERPOLATION = 'bicubic'
        np.testing.assert_array_equal(get_dataset(config, False)[0][0], EvalTransform(32, 1.0, 'bicubic')(image))
        config.DATA.INTERPOLATION = 'nearest'  # the same before and after a rotation, and on both backends
        (tmp_path / 'train_list.txt').write_text('x 0\n')
        rng = np.random.default_rng([config.SEED, 1, 0])
        np.testing.assert_array_equal(get_dataset(config)[1, 0][0],
                                      TrainTransform(32, config.DATA.CROP_SCALE, 'nearest')(InMemory(image), rng))


@pytest.mark.parametrize('exif', [b'no TIFF', b'MM\0*\0\0', b'MM\0*\xff\xff\xff\xff',
                                  b'MM\0*\0\0\0\x08\0\x01\x01\x12\xff\xff\0\0\0\x01\0\x06\0\0\0\0\0\0',
                                  b'MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0'])
def test_broken_exif_data(exif, tmp_path, read):
    """The image is returned as stored, or an error names the file."""
    path = stored(tmp_path, encoded(Image.fromarray(COLORS), 'PNG', exif=b'Exif\0\0' + exif))
    assert read(path).tobytes() == COLORS.tobytes()
    try:
        assert read(path, True).tobytes() == COLORS.tobytes()
    except UserError as error:
        assert str(error).startswith(f'{path}: cannot read the image (')


def photo(width, height, **options):
    """Encode a JPEG image in which red increases from left to right and green from top to bottom."""
    pixels = np.zeros((height, width, 3), 'uint8')
    pixels[:, :, 0] = np.linspace(0, 255, width)
    pixels[:, :, 1] = np.linspace(0, 255, height)[:, None]
    return encoded(Image.fromarray(pixels), 'JPEG', quality=95, **options)


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('side', [25, 50, 100, 150, 300])  # decoded at scales of 8, 8, 4, 2 and 1
def test_scaled_decoding_keeps_the_position(side, orientation, tmp_path, backend):
    """Accurate to a fraction of a pixel: at a scale of 8, half a pixel would be four pixels, two levels here."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = stored(tmp_path, photo(517, 513, exif=exif))
    for box in ((3, 9, 425, 437), (90, 70, 513, 500)):
        source = open_image(path, True, fast=find_backend(backend))
        out = source.region(box, side, Image.Resampling.BICUBIC).astype(int)
        mirrored = source.region(box, side, Image.Resampling.BICUBIC, flip=True)
        expected = InMemory(read_image(path, True)).region(box, side, Image.Resampling.BICUBIC)
        assert abs((out - expected).mean(axis=(0, 1))).max() < 0.3 and abs(out - expected).max() <= 3
        np.testing.assert_array_equal(mirrored, out[:, ::-1])


def test_decoding_scale_of_regions(tmp_path, monkeypatch):
    """Regions are never decoded smaller than the side, and at full size for nearest, which must not average pixels."""
    asked = []
    draft = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, 'draft', lambda self, mode, size: asked.append(draft(self, mode, size)))
    path = stored(tmp_path, photo(517, 513))
    for side, scaled in ((300, None), (251, None), (250, 2), (126, 2), (125, 4), (62, 8), (9, 8)):
        asked.clear()
        open_image(path).region((7, 7, 507, 517), side, Image.Resampling.BICUBIC)
        assert asked == ([('RGB', (0, 0, 517 / scaled, 513 / scaled))] if scaled else []), side
    asked.clear()
    open_image(path).region((7, 7, 507, 517), 9, Image.Resampling.NEAREST)
    assert not asked


@pytest.mark.parametrize('name, largest', [('nearest', 0), ('bilinear', 1.7), ('bicubic', 1.7), ('lanczos', 0)])
@pytest.mark.parametrize('side', [90, 110, 130, 300])  # crops have sides of 127 to 178 pixels: shrunk and enlarged
def test_fast_filters_are_close_to_pillow(name, largest, side, tmp_path):
    path = stored(tmp_path, encoded(Image.fromarray(COLORS).resize((240, 180), Image.Resampling.BICUBIC), 'JPEG'))
    for seed in range(5):
        expected, out = (TrainTransform(side, (0.5, 0.7), name)(image, np.random.default_rng(seed)).astype(int)
                         for image in (InMemory(read_image(path)), open_image(path, fast=find_backend('fast'))))
        assert abs(out - expected).mean() <= largest


def jpeg_reads(monkeypatch):
    """Return a list that gets an entry for every file that simplejpeg decodes."""
    calls = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, 'decode_jpeg', lambda *args, **options: calls.append(1) or decode(*args, **options))
    return calls


@pytest.mark.parametrize('mode, kind, count', [
    ('RGB', 'JPEG', 1), ('L', 'JPEG', 1), ('CMYK', 'JPEG', 0), ('RGB', 'PNG', 0)])
def test_which_files_the_fast_backend_reads(mode, kind, count, config, tmp_path, monkeypatch):
    """The backend reads RGB and gray JPEG files, and only in training."""
    stored(tmp_path, encoded(Image.fromarray(COLORS).convert(mode), kind), 'x')
    for split in ('train', 'val'):
        (tmp_path / f'{split}_list.txt').write_text('x 0\n')
    config.DATA.DATA_PATH = str(tmp_path)
    calls = jpeg_reads(monkeypatch)
    for name, expected in (('auto', count), ('fast', count), ('pillow', 0)):
        config.DATA.IMAGE_BACKEND = name
        calls.clear()
        get_dataset(config, False)[0]
        assert not calls
        get_dataset(config)[1, 0]
        assert len(calls) == expected


def test_pillow_reads_what_simplejpeg_refuses(tmp_path):
    """Bytes between segments make libjpeg warn."""
    path = stored(tmp_path, JPEG[:20] + b'\xff\0' + JPEG[20:])
    with pytest.raises(ValueError, match='extraneous bytes'):
        simplejpeg.decode_jpeg(pathlib.Path(path).read_bytes())
    assert region_reader('fast')(path).tobytes() == read_image(path).tobytes()


def test_images_need_neither_paddle_nor_opencv():
    run('-c', 'import sys, transforms, images; assert not {"paddle", "cv2", "simplejpeg"} & {*sys.modules}', fork=False)


@pytest.mark.parametrize('missing', ['simplejpeg', 'cv2'])
def test_missing_backends(missing, monkeypatch):
    assert describe_backend('auto').endswith('auto: JPEG files for training are read by simplejpeg and OpenCV')
    monkeypatch.setitem(sys.modules, missing, None)
    assert not find_backend('auto') and not find_backend('pillow')
    assert describe_backend('auto').endswith('by Pillow; for speed, pip install -r requirements-fast.txt')
    with pytest.raises(UserError, match="^DATA.IMAGE_BACKEND is 'fast', but simplejpeg or OpenCV is missing .*; pip "
                                        'install -r requirements-fast.txt, or set it to auto$'):
        find_backend('fast')


# prints the mode and size of each image or its error, then the growth of peak memory in MiB
READ = '''
import resource, sys
from runtime.program import prepare_runtime
from utils import UserError
prepare_runtime()
import numpy as np
from PIL import Image
from images import find_backend, open_image, read_image
from transforms import AutoAugment, ColorJitter, EvalTransform, RandAugment, TrainTransform

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

backend, limit, *paths = sys.argv[1:]
Image.MAX_IMAGE_PIXELS = int(limit)
fast = find_backend(backend)
before = peak()
for path in paths:
    try:
        image = read_image(path, True)
        for name in ('nearest', 'bicubic'):
            EvalTransform(224, 0.875, name)(image)
            train = TrainTransform(224, [0.08, 1.0], name, [AutoAugment(), RandAugment(2, 9), ColorJitter(0.4)])
            for seed in range(3):
                train(open_image(path, True, fast=fast), np.random.default_rng(seed))
        print(image.mode, *image.size)
    except UserError as error:
        print(error)
print(peak() - before)
'''


def test_large_and_elongated_images_do_not_exhaust_memory(tmp_path, backend):
    paths = [stored(tmp_path, png(20000, 20000, 8, 2), 'bomb')]
    for kind in ('PNG', 'JPEG'):
        for size in ((10000, 1), (1, 10000), (1, 1)):
            paths.append(stored(tmp_path, encoded(Image.new('RGB', size), kind), f'{kind} {size}'))
    lines = run('-c', READ, backend, Image.MAX_IMAGE_PIXELS, *paths).stdout.splitlines()
    assert lines[0].startswith(f'{paths[0]}: cannot read the image')
    assert lines[1:7] == 2 * ['RGB 10000 1', 'RGB 1 10000', 'RGB 1 1'] and int(lines[7]) < 100


def test_pillow_writes_nothing_to_the_console(tmp_path, caplog):
    """Images cause neither warnings nor log lines."""
    exif = b'Exif\0\0MM\0*\xff\xff\xff\xff'
    paths = [stored(tmp_path, content, name) for name, content in (
        ('palette', with_palette(bytes([0, 128, 255] * 4))),
        ('large', encoded(Image.new('RGB', (300, 300)), 'PNG')),  # above the limit, but less than twice
        ('exif', encoded(Image.new('RGB', (9, 9)), 'PNG', exif=exif)))]
    process = run('-c', READ, 'auto', 60000, *paths)
    assert process.stdout.splitlines()[:3] == ['RGB 4 3', 'RGB 300 300', 'RGB 9 9'] and process.stderr == ''
    with pytest.raises(UserError):
        read_image(stored(tmp_path, tiff(np.zeros((2, 3), 'uint8'), '<', samples=9)))
    assert not caplog.records


@pytest.mark.parametrize('size', [(900, 90), (90, 900), (513, 257), (300, 200)])
@pytest.mark.parametrize('crop_pct', [0.875, 1.0])
@pytest.mark.parametrize('name', ['nearest', 'bilinear', 'bicubic', 'lanczos'])
def test_resizing_only_the_crop_gives_the_same_pixels(size, crop_pct, name, monkeypatch):
    """Applies the code for elongated images to other images: the pixels are the same up to rounding."""
    small = Image.fromarray(COLORS[:9, :13])
    image, transform = small.resize(size, Image.Resampling.BICUBIC), EvalTransform(224, crop_pct, name)
    expected = transform(image).astype(int)
    monkeypatch.setattr(transforms, 'ELONGATED', 0)
    difference = abs(transform(image) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05


def test_which_images_are_resized_whole():
    """Images up to 100:1 are; beyond that, the crop shows the same part of the image."""
    strip = Image.fromarray(COLORS[:, :7]).resize((20, 2000), Image.Resampling.BICUBIC)
    transform = EvalTransform(224, 0.875, 'bicubic')
    whole = np.asarray(strip.resize((256, 25600), Image.Resampling.BICUBIC).crop((16, 12688, 240, 12912)))
    np.testing.assert_array_equal(transform(strip), whole)
    longer = Image.new('RGB', (20, 2400))
    longer.paste(strip, (0, 200))
    assert abs(transform(longer).astype(int) - whole).max() <= 2


def many(long):
    return settings(max_examples=20000 if long else 200, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


LINES = st.lists(st.tuples(st.text(min_size=1, max_size=8), st.sampled_from([' ', '\t', '  ', '']),
                           st.integers(0, 6).map(str) | st.text(max_size=3)).map(''.join), max_size=4)
LISTS = st.one_of(st.tuples(LINES, st.sampled_from(['\n', '\r\n', '\r']), st.sampled_from(
    ['utf-8', 'utf-8-sig', 'utf-16'])).map(lambda parts: parts[1].join(parts[0]).encode(parts[2])),
    st.binary(max_size=40))


def test_any_list_is_read_or_refused(long, tmp_path):
    path = str(tmp_path / 'list.txt')
    outcomes = set()

    @many(long)
    @given(LISTS)
    @example(b'\xef\xbb\xbfa 0\r\nb c 1\n\n')
    @example(b'\xff\xfea\0 \x000\0')
    @example(b'\xff\xfea\0 \x000')
    @example(b'\\a\\b\\ 0')
    def check(content):
        pathlib.Path(path).write_bytes(content)
        try:
            paths, labels = read_list(path, 5)
        except UserError as error:
            assert str(error).startswith(f'{path}:') and '\n' not in str(error) and str(error).isprintable()
            outcomes.add('refused')
            return
        outcomes.add('read')
        text = content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8')
        lines = re.split('\r\n|\r|\n', text.replace('\ufeff', '').replace('\\', '/'))
        assert len(paths) == len(labels) and not ''.join(lines[len(paths):]).strip()
        for name, label, line in zip(paths, labels.tolist(), lines):
            assert name and name == name.rstrip() and line.startswith(name)
            # whitespace, then the label
            rest = line[len(name):]
            assert rest != rest.lstrip() and re.fullmatch('[0-9]+', rest.strip()) and int(rest.strip()) == label < 5

    check()
    assert outcomes == {'read', 'refused'}


SEEDS = [encoded(Image.fromarray(COLORS[:7, :9]), kind) for kind in ('JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP')]
SEEDS += [with_palette(bytes([0, 128, 255] * 4)), png(2, 1, 16, 0, bytes(5)), png(1, 1, 16, 2, bytes(7)),
          tiff(RAMP[:2, :3], '>'), tiff(np.ones((2, 3), 'float32'), '<', 3), twelve_bit_tiff(values(12)[:2, :4])]


@st.composite
def mutated_images(draw):
    """A small image file with bytes changed, inserted and removed, and the end cut off."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for position, change in draw(st.lists(st.tuples(st.integers(0, len(content)), st.binary(max_size=4)), max_size=5)):
        content[position:position + draw(st.integers(0, 4))] = change
    return bytes(content[:draw(st.none() | st.integers(0, len(content)))])


def pixels_or_refused(path, open_function, *args):
    """Return a grid of pixels of the image that a function opens; None if it rejects the file."""
    try:
        image = open_function(path, *args)
        return image.region((0, 0, *image.size), 8, Image.Resampling.NEAREST).tolist()
    except UserError as error:
        assert str(error).startswith(f'{path}: cannot read the image (') and '\n' not in str(error)
        return None


def test_any_image_is_read_or_refused(long, tmp_path, capfd):
    """Training with either backend agrees with evaluation."""
    path = str(tmp_path / 'photo')
    outcomes = set()

    @many(long)
    @given(mutated_images(), st.booleans(), st.sampled_from([0, 12]))
    def check(content, exif_transpose, bit_depth):
        pathlib.Path(path).write_bytes(content)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            expected = pixels_or_refused(path, lambda *args: InMemory(read_image(*args)), exif_transpose, bit_depth)
            for fast in (False, True):
                assert pixels_or_refused(path, open_image, exif_transpose, bit_depth, fast) == expected
            outcomes.add('read' if expected else 'refused')
        # only Pillow's own warnings, which are not shown
        assert {os.path.basename(os.path.dirname(warning.filename)) for warning in seen} <= {'PIL'}

    check()
    assert outcomes == {'read', 'refused'} and capfd.readouterr().err == ''
