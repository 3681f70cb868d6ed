"""Find image files and read them as RGB: whole with Pillow; regions, for training, with Pillow or simplejpeg + OpenCV.

Importing this module does not import Paddle.
"""
import collections
import contextlib
import functools
import io
import logging
import math
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from runtime.files import check_regular
from utils import UserError, one_line

# images that cannot be read raise errors; Pillow's warnings and log lines do not name the file
warnings.filterwarnings('ignore', module='PIL')
logging.getLogger('PIL').setLevel(logging.CRITICAL)

BITS_PER_SAMPLE = 258  # TIFF tag
ORIENTATION = 0x0112  # EXIF tag
JPEG = b'\xff\xd8\xff'  # first bytes of a JPEG file
# EXIF orientation -> operation that makes the stored image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow filters that OpenCV has too, and computes faster
OPENCV = {Image.Resampling.BILINEAR: 'INTER_LINEAR', Image.Resampling.BICUBIC: 'INTER_CUBIC'}

# files and folders that file managers, network storage and archives create, in addition to names that start with a dot
SYSTEM_NAMES = {'@eadir', '@recycle', '@tmp', '#recycle', '#snapshot', '$recycle.bin', '__macosx', '__pycache__',
                'desktop.ini', 'ehthumbs.db', 'lost+found', 'system volume information', 'thumbs.db'}
RUNS = 'folders of runs or reports'  # a reason that `find_images` returns


def is_hidden(name):
    """Whether a file or folder with this name is hidden or a system file, not user data."""
    return name.startswith('.') or name.lower() in SYSTEM_NAMES


@functools.cache
def _extensions():
    """Return the extensions of formats that Pillow reads by itself: not EPS, MPEG, or formats with only a stub."""
    kinds = Image.registered_extensions()
    readers = {kind for kind, (reader, _) in Image.OPEN.items()
               if not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))}
    readers |= {'MPO'}  # opened by the JPEG reader
    return frozenset(extension for extension, kind in kinds.items() if kind in readers - {'EPS', 'MPEG'})


def is_image(name):
    """Whether a file is an image, judged by its name: not hidden, with the extension of a format that Pillow reads."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in _extensions()


def _reason_to_skip(entry):
    """Return why an `os.scandir` entry is skipped, worded for several files; '' for an image."""
    if is_hidden(entry.name):
        return 'hidden or system files and folders'
    # entry.is_file() raises an error for some broken links
    if not (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()):
        return 'broken links, pipes, devices'
    extension = os.path.splitext(entry.name)[1].lower()
    if not is_image(entry.name):
        return f'{extension} files, which Pillow cannot read' if extension else 'files without an extension'
    return ''


def _is_run(names):
    """Whether a folder that contains these names belongs to a run or is the report of an evaluation."""
    return ({'report.html', 'images.csv'} <= set(names) or 'config.yaml' in names
            and any(name == 'log.jsonl' or name.endswith('.pdparams') for name in names))


def find_images(root, listed=None):
    """Search a folder and its subfolders, including linked ones, for images (`is_image`), each found only once.

    listed: set of real paths of images to leave out; the ones found are added to it.
    Returns: (sorted paths, {reason: sorted paths that were left out}), relative to root, with slashes.
    Raises: OSError for a folder that cannot be read.
    """
    images, left_out = [], collections.defaultdict(list)
    folders, seen = [''], set()
    while folders:
        folder = folders.pop()
        target, *parents = (os.path.realpath(os.path.join(root, path))
                            for path in ([folder, '', os.path.dirname(folder)] if folder else ['']))
        with os.scandir(target) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        if any(os.path.join(parent, '').startswith(os.path.join(target, '')) for parent in parents):
            left_out['links to a parent folder'].append(folder)
        elif target in seen:
            left_out['folders already searched'].append(folder)
        elif folder and _is_run([entry.name for entry in entries]):
            left_out[RUNS].append(folder)
        else:
            seen.add(target)
            for entry in entries:
                path = f'{folder}/{entry.name}' if folder else entry.name
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                if is_folder and not is_hidden(entry.name):
                    # folders are popped from the end, so links wait until all other folders have been searched
                    folders.insert(0 if entry.is_symlink() else len(folders), path)
                else:
                    reason = _reason_to_skip(entry)
                    if reason:
                        left_out[reason].append(path)
                    else:
                        images.append((not folder, entry.is_symlink(), path, entry.path))
    found, listed = [], set() if listed is None else listed
    for _, is_link, path, real in sorted(images):  # images in subfolders first, and files before links to them
        real = os.path.realpath(real) if is_link else real
        (left_out['images already listed under another path'] if real in listed else found).append(path)
        listed.add(real)
    return sorted(found), {reason: sorted(paths) for reason, paths in left_out.items()}


def _declared_depth(image):
    """Return the bits per pixel that the file of a gray image declares; None if its range is unknown."""
    if image.format == 'TIFF':
        depth = image.tag_v2[BITS_PER_SAMPLE][0]
        return depth if depth <= 16 else None
    # 16 bits are mode I or I;16*, depending on Pillow's version and the format. If the file declares fewer, they were
    # scaled to 16: by Pillow for PGM and JPEG 2000, by the writer of the file, as the format demands, for PNG (sBIT)
    return 16 if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')) else None


def _loses_low_bits(image):
    """Whether Pillow reads only the upper 8 of 16 bits (color or transparency). The image must not be loaded yet."""
    return not image.mode.startswith('I') and bool(re.search(';16[BLN]', str(getattr(image, 'tile', ''))))


def _to_eight_bits(image, bit_depth):
    """Scale a gray image of integers or floats to 8 bits; from 8 or more bits, the upper 8 are kept."""
    is_float = image.mode == 'F'
    depth = bit_depth or _declared_depth(image)
    image = image if is_float else image.convert('I')
    low, high = image.getextrema()
    if is_float and np.isnan(np.asarray(image)).any():
        raise ValueError('NaN pixels')
    if not depth:
        raise ValueError(f'{"floating-point" if is_float else "32-bit"} pixels from {low:.10g} to {high:.10g}, whose '
                         'range is unknown without DATA.BIT_DEPTH')
    if low < 0 or high > 2 ** depth - 1:
        raise ValueError(f'pixels from {low:.10g} to {high:.10g}, but {depth} bits '
                         f'({"DATA.BIT_DEPTH" if bit_depth else "declared by the file"}) allow 0 to {2 ** depth - 1}')
    factor = 2 ** (8 - depth) if depth >= 8 else 255 / (2 ** depth - 1)
    return image.point(lambda value: value * factor).convert('L')


def _to_rgb(image, bit_depth):
    """Convert an image to RGB, dropping transparency."""
    if _loses_low_bits(image) and bit_depth not in (0, 16):
        raise ValueError(f'16-bit color, of which Pillow reads only the upper 8 bits: DATA.BIT_DEPTH {bit_depth} '
                         'cannot scale it')
    if image.mode == 'F' or image.mode.startswith('I'):
        image = _to_eight_bits(image, bit_depth)
    return image.convert('RGB')


def convert(image, exif_transpose=False, bit_depth=0):
    """Convert a Pillow image as `read_image` does. Raises: ValueError for pixels out of range or of unknown range."""
    image = _to_rgb(image, bit_depth)
    # after the conversion, during which Pillow rotates a TIFF image and drops the orientation from its EXIF data
    return ImageOps.exif_transpose(image) if exif_transpose else image


@contextlib.contextmanager
def _reading(path):
    """Turn any exception inside into a UserError that names the file."""
    try:
        yield
    except Exception as error:  # Pillow's readers raise nearly every type on a broken file
        if isinstance(error, UnidentifiedImageError):
            reason = 'not an image in a format that Pillow reads'
        elif isinstance(error, MemoryError):
            reason = 'not enough memory'
        else:
            reason = getattr(error, 'strerror', None) or one_line(str(error)) or type(error).__name__
        too_large = isinstance(error, (Image.DecompressionBombError, MemoryError))
        remedy = 'scale it down' if too_large else 'fix the file, or leave it out'
        raise UserError(f'{one_line(str(path))}: cannot read the image ({reason}); {remedy}') from None


def _read(path, function):
    """Return function(image) for the first image in a file. Raises: as `read_image`."""
    check_regular(path)
    with _reading(path), Image.open(path) as image:
        if image.format == 'EPS':
            raise ValueError('an EPS file is a program, which Pillow would run in Ghostscript')
        return function(image)


def read_image(path, exif_transpose=False, bit_depth=0):
    """Read the first image in a file as RGB.

    exif_transpose: rotate it as its EXIF data specify.
    bit_depth: bits used in gray images stored with more than 8 bits per pixel, which then range from 0 to
        2**bit_depth - 1, regardless of what the file declares. 0: as the file declares. The upper 8 bits are kept.
    Returns: Pillow image.
    Raises: UserError that names the file if it is missing, not a regular file, unreadable, or above Pillow's limit on
        pixels, or if its pixels are out of range or of unknown range.
    """
    return _read(path, lambda image: convert(image, exif_transpose, bit_depth))


def read_range(path):
    """Return the (smallest, largest) pixel value, from 0 to 65535, if an image file declares 16 bits, else None.

    Only the upper 8 bits of a color image are known, so its largest value may be up to 255 below the one returned.
    Raises: as `read_image`.
    """
    def find(image):
        if _loses_low_bits(image):
            low, high = zip(*image.convert('RGB').getextrema())
            return 256 * min(low), 256 * max(high) + 255
        is_gray = image.mode.startswith('I') and _declared_depth(image) == 16
        return image.convert('I').getextrema() if is_gray else None
    return _read(path, find)


def find_backend(name):
    """Whether DATA.IMAGE_BACKEND selects simplejpeg and OpenCV for JPEG files in training. Imports them if so.

    Raises: UserError if DATA.IMAGE_BACKEND requires them and they are not installed.
    """
    if name.lower() == 'pillow':
        return False
    try:
        import cv2
        import simplejpeg  # noqa: F401
    except ImportError as error:
        if name.lower() == 'auto':
            return False
        raise UserError(f'DATA.IMAGE_BACKEND is {name!r}, but simplejpeg or OpenCV is missing '
                        f'({one_line(str(error))}); pip install -r requirements-fast.txt, or set it to auto') from None
    cv2.setNumThreads(1)  # each data worker has one core
    return True


def describe_backend(name):
    """Describe in one line how a DATA.IMAGE_BACKEND reads JPEG files in training. Raises: as `find_backend`."""
    line = f'DATA.IMAGE_BACKEND {name}: JPEG files for training are read by '
    if find_backend(name):
        return line + 'simplejpeg and OpenCV'
    return line + 'Pillow' + ('; for speed, pip install -r requirements-fast.txt' if name.lower() == 'auto' else '')


def open_image(path, exif_transpose=False, bit_depth=0, fast=False):
    """Open an image to read regions of it: a `Jpeg`, decoded again for each region, or else an `InMemory`.

    exif_transpose, bit_depth: as in `read_image`. fast: let simplejpeg and OpenCV read what they can (`find_backend`).
    Raises: as `read_image`.
    """
    check_regular(path)
    with _reading(path):
        with open(path, 'rb') as file:
            start = file.read(len(JPEG))
            data = start + file.read() if start == JPEG else b''
        size = _plain_size(data) if data and fast and not exif_transpose else None
        if size:
            return Jpeg(path, data, size, fast=True)
        image = Image.open(io.BytesIO(data)) if data else None
        if image and image.format in ('JPEG', 'MPO'):
            orientation = image.getexif().get(ORIENTATION) if exif_transpose else 1
            return Jpeg(path, data, image.size, orientation if orientation in UPRIGHT else 1,
                        fast and image.mode in ('RGB', 'L'), image)
    return InMemory(read_image(path, exif_transpose, bit_depth))


def _plain_size(data):
    """Return (width, height) from the header of a JPEG file that both simplejpeg and Pillow read; None for others."""
    import simplejpeg
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    too_large = Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS  # Pillow's own limit
    return (width, height) if color in ('YCbCr', 'RGB', 'Gray') and not too_large else None


class InMemory:
    """An RGB Pillow image. size: (width, height)."""

    def __init__(self, image):
        self.image = image
        self.size = image.size

    def region(self, box, side, resample, flip=False):
        """Resize a box (left, top, right, bottom) in whole pixels to a square: uint8 [side, side, 3].

        resample: Pillow filter; flip: whether to mirror it left to right.
        """
        image = self.image.crop(box).resize((side, side), resample)
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


class Jpeg:
    """The bytes of a JPEG file. Each region is decoded at the smallest scale at which it is large enough.

    path: for error messages.
    stored_size: (width, height) in the file; the attribute `size` is that of the upright image.
    orientation: EXIF orientation, from 1 to 8.
    fast: let simplejpeg and OpenCV read it; Pillow reads what they cannot.
    opened: the Pillow image, if already open.
    """

    def __init__(self, path, data, stored_size, orientation=1, fast=False, opened=None):
        self.path = path
        self.data = data
        self.stored_size = stored_size
        self.orientation = orientation
        self.fast = fast and orientation == 1
        self.opened = opened
        self.size = stored_size if orientation < 5 else stored_size[::-1]

    def region(self, box, side, resample, flip=False):
        """As `InMemory.region`. Raises: UserError as `read_image`."""
        # scaled decoding averages pixels, which "nearest" must not do
        scale = 1 if resample == Image.Resampling.NEAREST else _decoding_scale(box, side)
        box = [edge / scale for edge in _stored_box(box, self.stored_size, self.orientation)]
        # the pixels that the box touches, and the box relative to them
        outer = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
        inner = box[0] - outer[0], box[1] - outer[1], box[2] - outer[0], box[3] - outer[1]
        with _reading(self.path):
            pixels = self._decode_fast(scale) if self.fast else None
            if pixels is None:
                image = self._decode(scale).crop(outer).convert('RGB')
            else:
                pixels = pixels[outer[1]:outer[3], outer[0]:outer[2]]
                if scale == 1 and resample in OPENCV:
                    return _resize_fast(pixels, side, resample, flip)
                image = Image.fromarray(np.ascontiguousarray(pixels))  # Pillow copies strided arrays slowly
        image = image.resize((side, side), resample, inner)
        if self.orientation > 1:
            image = image.transpose(UPRIGHT[self.orientation])
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)

    def _decode(self, scale):
        """Decode the stored image with Pillow, its sides divided by scale and rounded up."""
        # an open image decodes at one scale only
        image, self.opened = self.opened or Image.open(io.BytesIO(self.data)), None
        if scale > 1:
            image.draft('RGB', tuple(side // scale for side in self.stored_size))
        return image

    def _decode_fast(self, scale):
        """The same with simplejpeg, as uint8 [height, width, 3]; None if it rejects the file or warns about it."""
        import simplejpeg
        width, height = (-(-side // scale) if scale > 1 else 0 for side in self.stored_size)
        try:
            return simplejpeg.decode_jpeg(self.data, min_width=width, min_height=height)
        except ValueError:
            return None


def _decoding_scale(box, side):
    """Return the factor (1, 2, 4 or 8) by which a JPEG decoder may shrink a box without going below `side` pixels."""
    left, top, right, bottom = box
    return max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(right - left, bottom - top) >= scale * side)


def _stored_box(box, stored_size, orientation):
    """Convert a box of an upright image to the pixels of its file. stored_size: (width, height) in the file."""
    left, top, right, bottom = box
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    width, height = stored_size
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _resize_fast(pixels, side, resample, flip):
    """uint8 [height, width, 3] -> [side, side, 3] with OpenCV, whose filters do not widen when they shrink an image.

    From a factor of 1.5 they would skip pixels between the samples, so the image is blurred slightly first. INTER_AREA
    is closer to Pillow's filters, but takes six times as long as bilinear.
    """
    import cv2
    shrink = math.sqrt(pixels.shape[0] * pixels.shape[1]) / side
    if shrink >= 1.5:
        pixels = cv2.GaussianBlur(pixels, (3, 3), 0.5)
    name = OPENCV[resample] if shrink <= 1 else 'INTER_LINEAR'
    resized = cv2.resize(pixels, (side, side), interpolation=getattr(cv2, name))
    return cv2.flip(resized, 1) if flip else resized
