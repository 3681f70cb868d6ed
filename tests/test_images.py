"""Every kind of image file that is converted or refused, and the readers of lists and images on random bytes."""
import io
import os
import pathlib
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from conftest import run, write_images
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import transforms
from datasets import get_dataloader, get_dataset, read_list
from images import read_image, read_range
from transforms import EvalTransform, TrainTransform
from utils import UserError

# as datasets.py asks, but pytest does not keep
pytestmark = pytest.mark.filterwarnings('ignore:::PIL')

RAMP = np.arange(65536, dtype='uint16').reshape(256, 256)


def png(width, height, depth, color, pixels=b''):
    """A PNG file by hand. color: 0 grey, 2 RGB; pixels: rows in big-endian, each after a byte of 0."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    header = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


def tiff(array, order, sample_format=1, samples=1, packed=None):
    """A grey TIFF file by hand, uncompressed. order: '<' or '>'; sample_format: 1 unsigned, 3 floating-point.

    packed: (bits per pixel, the pixels) in place of those of the array.
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
], ids=['rgb', 'grey', 'cmyk', 'two colours', 'grey and alpha', 'rgb and alpha', 'one pixel', 'palette'])
def test_eight_bits_are_converted_as_pillow_does(content, tmp_path):
    with Image.open(io.BytesIO(content)) as image:
        expected = image.convert('RGB')
    image = read_image(stored(tmp_path, content))
    assert (image.mode, image.size, image.tobytes()) == ('RGB', expected.size, expected.tobytes())


def test_transparency_is_dropped(tmp_path):
    pixels = np.asarray(read_image(stored(tmp_path, with_palette(bytes([0, 128, 255] * 4)))))
    assert pixels.reshape(12, 3).tolist() == [[20 * color, 7, 255 - 20 * color] for color in range(12)]


@pytest.mark.parametrize('content', [
    png(256, 256, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in RAMP)),
    png(256, 256, 16, 2, b''.join(b'\0' + row.repeat(3).astype('>u2').tobytes() for row in RAMP)),
    b'P5 256 256 65535\n' + RAMP.astype('>u2').tobytes(),
    tiff(RAMP, '<'), tiff(RAMP, '>'),
], ids=['png', 'rgb png', 'pgm', 'tiff', 'big-endian tiff'])
@pytest.mark.parametrize('bit_depth', [0, 16])
def test_sixteen_bits_are_scaled(content, bit_depth, tmp_path):
    pixels = np.asarray(read_image(stored(tmp_path, content), bit_depth=bit_depth))
    np.testing.assert_array_equal(pixels, np.repeat(RAMP[:, :, None] >> 8, 3, axis=2))


def gray_png(array):
    height, width = array.shape
    return png(width, height, 16, 0, b''.join(b'\0' + row.astype('>u2').tobytes() for row in array))


def twelve_bit_tiff(array):
    """Two pixels of 12 bits in three bytes."""
    first, second = array.reshape(-1, 2).astype('uint16').T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype('uint8')
    return tiff(array, '<', packed=(12, packed.tobytes()))


def values(depth):
    """64 x 64 pixels from 0 to 2**depth - 1."""
    return (np.arange(4096) * (2 ** depth - 1) // 4095).reshape(64, 64)


@pytest.mark.parametrize('content', [
    twelve_bit_tiff(values(12)), b'P5 64 64 4095\n' + values(12).astype('>u2').tobytes(),
    b'P2 64 64 4095\n' + ' '.join(map(str, values(12).ravel())).encode(),
], ids=['tiff', 'pgm', 'pgm of text'])
def test_twelve_bits_that_a_file_declares_are_scaled(content, tmp_path):
    pixels = np.asarray(read_image(stored(tmp_path, content)))
    np.testing.assert_array_equal(pixels, np.repeat(values(12)[:, :, None] >> 4, 3, axis=2))


@pytest.mark.parametrize('depth', [8, 10, 12, 14, 16])
@pytest.mark.parametrize('encode', [
    gray_png, lambda array: b'P5 64 64 65535\n' + array.astype('>u2').tobytes(),
    lambda array: tiff(array.astype('uint16'), '<'), lambda array: tiff(array.astype('uint16'), '>'),
    lambda array: tiff(array.astype('uint32'), '<'), lambda array: tiff(array.astype('float32'), '>', 3),
], ids=['png', 'pgm', 'tiff', 'big-endian tiff', '32-bit tiff', 'float tiff'])
def test_bit_depth_scales_gray_pixels(encode, depth, tmp_path):
    pixels = np.asarray(read_image(stored(tmp_path, encode(values(depth))), bit_depth=depth))
    np.testing.assert_array_equal(pixels, np.repeat(values(depth)[:, :, None] >> (depth - 8), 3, axis=2))


@pytest.mark.parametrize('depth', range(1, 8))
def test_bit_depths_below_eight_reach_white(depth, tmp_path):
    """One bit is the range of floating-point images from 0 to 1."""
    array = np.array([[0, 0.5, 1]], 'float32') * (2 ** depth - 1)
    path = stored(tmp_path, tiff(array, '<', 3))
    assert np.asarray(read_image(path, bit_depth=depth))[0, :, 0].tolist() == [0, 127, 255]
    path = stored(tmp_path, tiff(np.array([[0, 2 ** depth - 1]], 'uint32'), '<'))
    assert np.asarray(read_image(path, bit_depth=depth))[0, :, 0].tolist() == [0, 255]


def test_bit_depth_is_for_more_than_eight_bits(tmp_path):
    for content in (JPEG, with_palette(3), encoded(Image.fromarray(COLORS).convert('1'), 'PNG')):
        path = stored(tmp_path, content)
        assert read_image(path, bit_depth=12).tobytes() == read_image(path).tobytes()


@pytest.mark.parametrize('content, message', [
    (gray_png(np.array([[0, 4096]])), r'pixels from 0 to 4096, but 12 bits \(DATA.BIT_DEPTH\) are 0 to 4095'),
    (tiff(np.array([[-1, 9]], 'int16'), '<', 2), r'pixels from -1 to 9, but 12 bits \(DATA.BIT_DEPTH\) are 0 to 4095'),
    (tiff(np.array([[0, 4095.5]], 'float32'), '<', 3), r'pixels from 0 to 4095.5, but 12 bits'),
    (tiff(np.array([[0, np.inf]], 'float32'), '<', 3), r'pixels from 0 to inf, but 12 bits'),
    (tiff(np.array([[0, np.nan]], 'float32'), '<', 3), 'pixels that are not numbers'),
    (png(1, 1, 16, 2, bytes(7)), 'color of 16 bits, of which only the upper 8 can be read: DATA.BIT_DEPTH 12 cannot'),
    (png(1, 1, 16, 4, bytes(5)), 'color of 16 bits'),
], ids=['above', 'below', 'float', 'infinite', 'nan', 'color', 'transparency'])
def test_what_is_not_of_the_bit_depth_is_named(content, message, tmp_path):
    path = stored(tmp_path, content)
    with pytest.raises(UserError, match=rf'^{re.escape(path)}: cannot read the image \({message}'):
        read_image(path, bit_depth=12)


def test_a_data_set_has_a_bit_depth(config, tmp_path):
    """In training and evaluation alike."""
    stored(tmp_path, gray_png(values(12)), 'x')
    for split in ('train', 'val'):
        (tmp_path / f'{split}_list.txt').write_text('x 0\n')
    config.DATA.DATA_PATH, config.DATA.CROP_PCT, config.DATA.BIT_DEPTH = str(tmp_path), 1.0, 12
    image = Image.fromarray((values(12) >> 4).astype('uint8')).convert('RGB')
    np.testing.assert_array_equal(get_dataset(config, False)[0][0], EvalTransform(32, 1.0, 'bicubic')(image))
    rng = np.random.default_rng([config.SEED, 1, 0])
    np.testing.assert_array_equal(get_dataset(config)[1, 0][0],
                                  TrainTransform(32, config.DATA.CROP_SCALE, 'bicubic')(image, rng))


@pytest.mark.parametrize('content, expected', [
    (gray_png(np.array([[7, 4000]])), (7, 4000)), (tiff(RAMP, '>'), (0, 65535)),
    (png(2, 1, 16, 2, b'\0' + np.array([300, 600, 800, 900, 700, 4000], '>u2').tobytes()), (256, 4095)),
    (png(1, 1, 16, 4, b'\0' + np.array([600, 65535], '>u2').tobytes()), (512, 767)),
    (twelve_bit_tiff(values(12)), None), (encoded(Image.fromarray(COLORS), 'JPEG'), None),
    (tiff(RAMP.astype('uint32'), '<'), None), (tiff(np.ones((2, 3), 'float32'), '<', 3), None),
], ids=['png', 'tiff', 'rgb png', 'transparency', '12 bits', 'jpeg', '32 bits', 'float'])
def test_the_range_of_images_of_sixteen_bits(content, expected, tmp_path):
    assert read_range(stored(tmp_path, content)) == expected


JPEG = encoded(Image.fromarray(COLORS), 'JPEG')
PNG = encoded(Image.fromarray(COLORS), 'PNG')


@pytest.mark.parametrize('content, message', [
    (None, r'No such file or directory\); fix the file, or leave it out'),
    (b'', 'no image in a format that Pillow knows'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', 'EPS, a program'),
    (b'not an image', 'no image in a format that Pillow knows'),
    (JPEG[:len(JPEG) // 2], 'image file is truncated'),
    (JPEG[:300], ''),
    (PNG[:len(PNG) // 2], 'image file is truncated'),
    (PNG[:8] + JPEG, ''),
    (tiff(np.array([[0, 65535]], 'uint32'), '<'), '32-bit pixels from 0 to 65535, whose range is not known without '
                                                  'DATA.BIT_DEPTH'),
    (tiff(np.array([[0.25, 1]], 'float32'), '<', 3), 'floating-point pixels from 0.25 to 1, whose range is not known'),
    (tiff(np.array([[-1, 9]], 'int16'), '<', 2), r'pixels from -1 to 9, but 16 bits \(as the file declares\) are 0 to'),
    (png(20000, 20000, 8, 2), r'Image size \(400000000 pixels\) exceeds limit of 178956970 pixels.*; scale it down$'),
], ids=['missing', 'empty', 'eps', 'text', 'cut jpeg', 'header', 'cut png', 'two formats', '32 bits', 'float', 'signed',
        'bomb'])
def test_what_cannot_be_read_is_named(content, message, tmp_path):
    path = str(tmp_path / 'photo')
    if content is not None:
        stored(tmp_path, content)
    with pytest.raises(UserError, match=rf'^{re.escape(path)}: cannot read the image \({message}') as error:
        read_image(path)
    assert '\n' not in str(error.value) and '()' not in str(error.value)


@pytest.mark.parametrize('error, message', [
    (EOFError, 'EOFError); fix the file, or leave it out'),
    (MemoryError, 'memory does not suffice); scale it down'),
])
def test_an_error_without_a_message_has_a_reason(monkeypatch, error, message):
    def fail(path):
        raise error
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(UserError, match=re.escape(f'x: cannot read the image ({message}')):
        read_image('x')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('content', [b'', JPEG[:len(JPEG) // 2], png(20000, 20000, 8, 2)],
                         ids=['empty', 'cut', 'bomb'])
def test_the_loader_names_a_bad_image(content, workers, config, tmp_path):
    """No batch without it, and none with another in its place."""
    write_images(tmp_path / 'x', 3)
    stored(tmp_path, content, 'x/photo 1.jpg')
    (tmp_path / 'val_list.txt').write_text(''.join(f'x/photo {index}.jpg 0\n' for index in range(3)))
    config.DATA.DATA_PATH, config.DATA.NUM_WORKERS = str(tmp_path), workers
    with pytest.raises(UserError, match='x/photo 1.jpg: cannot read the image'):
        list(get_dataloader(config, get_dataset(config, False), False))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(kind, orientation, config, tmp_path):
    """Off leaves the pixels as they are stored; but Pillow itself turns TIFF images, as their format says."""
    pixels = np.zeros((40, 60, 3), 'uint8')
    pixels[:20, :30] = 255  # the upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored(tmp_path, encoded(Image.fromarray(pixels), kind, exif=exif), 'x')
    turned = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
              6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)}[orientation]
    (tmp_path / 'val_list.txt').write_text('x 0\n')
    config.DATA.DATA_PATH, config.DATA.CROP_PCT = str(tmp_path), 1.0
    for on in (False, True):
        expected = turned if on or kind == 'TIFF' else pixels
        image = read_image(str(tmp_path / 'x'), on)
        assert image.size == expected.shape[1::-1]
        assert (abs(np.asarray(image).astype(int) - expected) > 100).mean() < 0.01  # JPEG and WebP lose some
        config.DATA.EXIF_TRANSPOSE = on
        np.testing.assert_array_equal(get_dataset(config, False)[0][0], EvalTransform(32, 1.0, 'bicubic')(image))
        config.TRAIN.AUTO_AUGMENT = False
        (tmp_path / 'train_list.txt').write_text('x 0\n')
        rng = np.random.default_rng([config.SEED, 1, 0])
        np.testing.assert_array_equal(get_dataset(config)[1, 0][0],
                                      TrainTransform(32, config.DATA.CROP_SCALE, 'bicubic')(image, rng))


@pytest.mark.parametrize('exif', [b'no TIFF', b'MM\0*\0\0', b'MM\0*\xff\xff\xff\xff',
                                  b'MM\0*\0\0\0\x08\0\x01\x01\x12\xff\xff\0\0\0\x01\0\x06\0\0\0\0\0\0',
                                  b'MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0'])
def test_broken_exif_data(exif, tmp_path):
    """An image, as it is stored, or an error that names the file."""
    path = stored(tmp_path, encoded(Image.fromarray(COLORS), 'PNG', exif=b'Exif\0\0' + exif))
    assert read_image(path).tobytes() == COLORS.tobytes()
    try:
        assert read_image(path, True).tobytes() == COLORS.tobytes()
    except UserError as error:
        assert str(error).startswith(f'{path}: cannot read the image (')


# prints what became of each file, then by how much the peak of the memory rose, in MiB
READ = '''
import resource, sys
from runtime.program import prepare_runtime
from utils import UserError
prepare_runtime()
import numpy as np
from PIL import Image
from images import read_image
from transforms import AutoAugment, ColorJitter, EvalTransform, RandAugment, TrainTransform

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

limit, *paths = sys.argv[1:]
Image.MAX_IMAGE_PIXELS = int(limit)
before = peak()
for path in paths:
    try:
        image = read_image(path, True)
        for name in ('nearest', 'bicubic'):
            EvalTransform(224, 0.875, name)(image)
            train = TrainTransform(224, [0.08, 1.0], name, [AutoAugment(), RandAugment(2, 9), ColorJitter(0.4)])
            for seed in range(3):
                train(image, np.random.default_rng(seed))
        print(image.mode, *image.size)
    except UserError as error:
        print(error)
print(peak() - before)
'''


def test_large_and_long_images_take_no_gigabytes(tmp_path):
    paths = [stored(tmp_path, png(20000, 20000, 8, 2), 'bomb')]
    for name, size in (('wide', (10000, 1)), ('tall', (1, 10000)), ('one', (1, 1))):
        paths.append(stored(tmp_path, encoded(Image.new('RGB', size), 'PNG'), name))
    lines = run('-c', READ, Image.MAX_IMAGE_PIXELS, *paths).stdout.splitlines()
    assert lines[0].startswith(f'{paths[0]}: cannot read the image') and lines[1:4] == ['RGB 10000 1', 'RGB 1 10000',
                                                                                       'RGB 1 1']
    assert int(lines[4]) < 100


def test_pillow_writes_nothing_on_the_console(tmp_path, caplog):
    """What it remarks on images, in warnings and in its log."""
    exif = b'Exif\0\0MM\0*\xff\xff\xff\xff'
    paths = [stored(tmp_path, content, name) for name, content in (
        ('palette', with_palette(bytes([0, 128, 255] * 4))),
        ('large', encoded(Image.new('RGB', (300, 300)), 'PNG')),  # above the limit, but not twice
        ('exif', encoded(Image.new('RGB', (9, 9)), 'PNG', exif=exif)))]
    process = run('-c', READ, 60000, *paths)
    assert process.stdout.splitlines()[:3] == ['RGB 4 3', 'RGB 300 300', 'RGB 9 9'] and process.stderr == ''
    with pytest.raises(UserError):
        read_image(stored(tmp_path, tiff(np.zeros((2, 3), 'uint8'), '<', samples=9)))
    assert not caplog.records


@pytest.mark.parametrize('size', [(900, 90), (90, 900), (513, 257), (300, 200)])
@pytest.mark.parametrize('crop_pct', [0.875, 1.0])
@pytest.mark.parametrize('name', ['nearest', 'bilinear', 'bicubic', 'lanczos'])
def test_a_resized_crop_is_the_crop_of_the_resized(size, crop_pct, name, monkeypatch):
    """What evaluation does to long images, on others: the same but for roundings."""
    small = Image.fromarray(COLORS[:9, :13])
    image, transform = small.resize(size, Image.Resampling.BICUBIC), EvalTransform(224, crop_pct, name)
    expected = transform(image).astype(int)
    monkeypatch.setattr(transforms, 'ELONGATED', 0)
    difference = abs(transform(image) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05


def test_which_images_are_resized_whole():
    """Up to 100 : 1, as ever; beyond, the same part of the image."""
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
LISTS = st.one_of(st.tuples(LINES, st.sampled_from(['\n', '\r\n', '\r'])).map(
    lambda pair: pair[1].join(pair[0]).encode()), st.binary(max_size=40))


def test_any_list_is_read_or_refused(long, tmp_path):
    path = str(tmp_path / 'list.txt')
    outcomes = set()

    @many(long)
    @given(LISTS)
    @example(b'\xef\xbb\xbfa 0\r\nb c 1\n\n')
    @example(b'\xff\xfea\0 \x000\0')
    def check(content):
        pathlib.Path(path).write_bytes(content)
        try:
            paths, labels = read_list(path, 5)
        except UserError as error:
            assert str(error).startswith(f'{path}:') and '\n' not in str(error) and str(error).isprintable()
            outcomes.add('refused')
            return
        outcomes.add('read')
        lines = re.split('\r\n|\r|\n', content.decode('utf-8-sig'))
        assert len(paths) == len(labels) and not ''.join(lines[len(paths):]).strip()
        for name, label, line in zip(paths, labels.tolist(), lines):
            assert name and name == name.rstrip() and line.startswith(name)
            # a blank, and the label
            rest = line[len(name):]
            assert rest != rest.lstrip() and re.fullmatch('[0-9]+', rest.strip()) and int(rest.strip()) == label < 5

    check()
    assert outcomes == {'read', 'refused'}


SEEDS = [encoded(Image.fromarray(COLORS[:7, :9]), kind) for kind in ('JPEG', 'PNG', 'GIF', 'BMP', 'TIFF', 'WEBP')]
SEEDS += [with_palette(bytes([0, 128, 255] * 4)), png(2, 1, 16, 0, bytes(5)), png(1, 1, 16, 2, bytes(7)),
          tiff(RAMP[:2, :3], '>'), tiff(np.ones((2, 3), 'float32'), '<', 3), twelve_bit_tiff(values(12)[:2, :4])]


@st.composite
def mutated_images(draw):
    """A small image file of which bytes are changed, put in, left out, and the end cut off."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for position, change in draw(st.lists(st.tuples(st.integers(0, len(content)), st.binary(max_size=4)), max_size=5)):
        content[position:position + draw(st.integers(0, 4))] = change
    return bytes(content[:draw(st.none() | st.integers(0, len(content)))])


def test_any_image_is_read_or_refused(long, tmp_path, capfd):
    path = str(tmp_path / 'photo')
    outcomes = set()

    @many(long)
    @given(mutated_images(), st.booleans(), st.sampled_from([0, 12]))
    def check(content, exif_transpose, bit_depth):
        pathlib.Path(path).write_bytes(content)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            try:
                image = read_image(path, exif_transpose, bit_depth)
            except UserError as error:
                assert str(error).startswith(f'{path}: cannot read the image (') and '\n' not in str(error)
                outcomes.add('refused')
            else:
                assert image.mode == 'RGB' and min(image.size) > 0
                assert len(image.tobytes()) == 3 * image.width * image.height
                outcomes.add('read')
        # Pillow's own, which are not shown
        assert {os.path.basename(os.path.dirname(warning.filename)) for warning in seen} <= {'PIL'}

    check()
    assert outcomes == {'read', 'refused'} and capfd.readouterr().err == ''
