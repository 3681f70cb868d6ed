"""Which files are images; the RGB image in one, by Pillow; for training a region of it, by Pillow or by simplejpeg and
OpenCV.

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

# an image either is read or raises; what Pillow remarks besides does not say of which file
warnings.filterwarnings('ignore', module='PIL')
logging.getLogger('PIL').setLevel(logging.CRITICAL)

BITS_PER_SAMPLE = 258  # TIFF's tag
ORIENTATION = 0x0112  # EXIF's tag
JPEG = b'\xff\xd8\xff'  # how its files start
# EXIF's orientation -> what turns the image as it is stored into what is shown
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's filters that OpenCV has and is faster with
OPENCV = {Image.Resampling.BILINEAR: 'INTER_LINEAR', Image.Resampling.BICUBIC: 'INTER_CUBIC'}

# what file managers, disks of a network and archives leave between files, besides names that begin with a dot
SYSTEM_NAMES = {'@eadir', '@recycle', '@tmp', '#recycle', '#snapshot', '$recycle.bin', '__macosx', '__pycache__',
                'desktop.ini', 'ehthumbs.db', 'lost+found', 'system volume information', 'thumbs.db'}
RUNS = 'folders of runs or reports'  # left out by `find_images`


def is_hidden(name):
    """Whether a file or folder of this name is hidden, or the system's: no data of the user."""
    return name.startswith('.') or name.lower() in SYSTEM_NAMES


@functools.cache
def _extensions():
    """The extensions of what Pillow reads by itself: not EPS, MPEG, and what it only has a stub for."""
    kinds = Image.registered_extensions()
    readers = {kind for kind, (reader, _) in Image.OPEN.items()
               if not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))}
    readers |= {'MPO'}  # JPEG's reader opens it
    return frozenset(extension for extension, kind in kinds.items() if kind in readers - {'EPS', 'MPEG'})


def is_image(name):
    """Whether a file is an image by its name: not hidden, and of a format that Pillow reads."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in _extensions()


def _why_not(entry):
    """Why a file that `os.scandir` found is left out, for a message on several; '' for an image."""
    if is_hidden(entry.name):
        return "hidden, or the system's"
    # of a link Python's own answer raises errors
    if not (os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()):
        return 'links that lead nowhere, pipes, devices'
    extension = os.path.splitext(entry.name)[1].lower()
    if not is_image(entry.name):
        return f'{extension} files, which Pillow does not read' if extension else 'files without an extension'
    return ''


def _is_run(names):
    """Whether a folder of such names is a run's, or the report of an evaluation."""
    return ({'report.html', 'images.csv'} <= set(names) or 'config.yaml' in names
            and any(name == 'log.jsonl' or name.endswith('.pdparams') for name in names))


def find_images(root, listed=None):
    """Search a folder and its folders, linked ones too, for images as in `is_image`; each once, whatever links to it.

    listed: a set of real paths of images to leave out, to which those that are found are added.
    Returns: (sorted paths, {why others are left out: sorted paths}), relative to root, with slashes.
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
                    # the last is the next: links wait until all other folders are searched
                    folders.insert(0 if entry.is_symlink() else len(folders), path)
                else:
                    reason = _why_not(entry)
                    if reason:
                        left_out[reason].append(path)
                    else:
                        images.append((not folder, entry.is_symlink(), path, entry.path))
    found, listed = [], set() if listed is None else listed
    for _, is_link, path, real in sorted(images):  # those in folders first, links to them after them
        real = os.path.realpath(real) if is_link else real
        (left_out['images already listed under another path'] if real in listed else found).append(path)
        listed.add(real)
    return sorted(found), {reason: sorted(paths) for reason, paths in left_out.items()}


def _declared_depth(image):
    """Bits of the pixels of a gray image as its file declares them; None where their range is not known."""
    if image.format == 'TIFF':
        depth = image.tag_v2[BITS_PER_SAMPLE][0]
        return depth if depth <= 16 else None
    # 16 bits are I or I;16* by Pillow's version and the file's format. Where a PGM or JPEG 2000 file declares fewer,
    # Pillow has scaled them to 16; where a PNG file does (sBIT), its writer had to
    return 16 if image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM')) else None


def _is_cut(image):
    """Whether Pillow gives only the upper 8 of 16 bits: colored images, or with transparency. Asked before it loads."""
    return not image.mode.startswith('I') and bool(re.search(';16[BLN]', str(getattr(image, 'tile', ''))))


def _to_eight_bits(image, bit_depth):
    """A gray image of integers or floats, scaled to 8 bits: of 8 bits or more the upper 8."""
    is_float = image.mode == 'F'
    depth = bit_depth or _declared_depth(image)
    image = image if is_float else image.convert('I')
    low, high = image.getextrema()
    if is_float and np.isnan(np.asarray(image)).any():
        raise ValueError('pixels that are not numbers')
    if not depth:
        raise ValueError(f'{"floating-point" if is_float else "32-bit"} pixels from {low:.10g} to {high:.10g}, whose '
                         'range is not known without DATA.BIT_DEPTH')
    if low < 0 or high > 2 ** depth - 1:
        raise ValueError(f'pixels from {low:.10g} to {high:.10g}, but {depth} bits '
                         f'({"DATA.BIT_DEPTH" if bit_depth else "as the file declares"}) are 0 to {2 ** depth - 1}')
    factor = 2 ** (8 - depth) if depth >= 8 else 255 / (2 ** depth - 1)
    return image.point(lambda value: value * factor).convert('L')


def _to_rgb(image, bit_depth):
    """An image as RGB; transparency is dropped."""
    if _is_cut(image) and bit_depth not in (0, 16):
        raise ValueError(f'color of 16 bits, of which only the upper 8 can be read: DATA.BIT_DEPTH {bit_depth} cannot '
                         'scale it')
    if image.mode == 'F' or image.mode.startswith('I'):
        image = _to_eight_bits(image, bit_depth)
    return image.convert('RGB')


def convert(image, exif_transpose=False, bit_depth=0):
    """A Pillow image as `read_image` gives that of a file. Raises: ValueError for pixels whose range is not known."""
    image = _to_rgb(image, bit_depth)
    # after the conversion, for Pillow has turned a TIFF image then, and the result's EXIF data do not ask for more
    return ImageOps.exif_transpose(image) if exif_transpose else image


@contextlib.contextmanager
def _reading(path):
    """What fails while it is open is a UserError that names the file."""
    try:
        yield
    except Exception as error:  # Pillow's readers raise nearly every type on a broken file
        if isinstance(error, UnidentifiedImageError):
            reason = 'no image in a format that Pillow knows'
        elif isinstance(error, MemoryError):
            reason = 'memory does not suffice'
        else:
            reason = getattr(error, 'strerror', None) or one_line(str(error)) or type(error).__name__
        too_large = isinstance(error, (Image.DecompressionBombError, MemoryError))
        remedy = 'scale it down' if too_large else 'fix the file, or leave it out'
        raise UserError(f'{one_line(str(path))}: cannot read the image ({reason}); {remedy}') from None


def _read(path, function):
    """function(image) of the image in a file, the first of several. Raises: as `read_image`."""
    check_regular(path)
    with _reading(path), Image.open(path) as image:
        if image.format == 'EPS':
            raise ValueError('EPS, a program, which Pillow gives to Ghostscript')
        return function(image)


def read_image(path, exif_transpose=False, bit_depth=0):
    """The RGB image in a file, the first of several.

    exif_transpose: turn it as its EXIF data say.
    bit_depth: bits that gray pixels of more than 8 use, whatever the file declares: their range is 0 to
        2**bit_depth - 1; 0: as the file declares. Of a known range the upper 8 bits are kept.
    Raises: UserError that names the file when it is missing, no regular file, unreadable, larger than Pillow's limit of
        pixels, has pixels out of their range, or of none that is known.
    """
    return _read(path, lambda image: convert(image, exif_transpose, bit_depth))


def read_range(path):
    """(smallest, largest) pixel, from 0 to 65535, of an image whose file declares 16 bits; None for any other.

    Of a colored one only the upper 8 bits are known: its largest pixel may be smaller than this, by up to 255.
    Raises: as `read_image`.
    """
    def find(image):
        if _is_cut(image):
            low, high = zip(*image.convert('RGB').getextrema())
            return 256 * min(low), 256 * max(high) + 255
        is_gray = image.mode.startswith('I') and _declared_depth(image) == 16
        return image.convert('I').getextrema() if is_gray else None
    return _read(path, find)


def find_backend(name):
    """Whether simplejpeg and OpenCV read training's JPEG files, by DATA.IMAGE_BACKEND. Imports them if so.

    Raises: UserError where they are asked for and not installed.
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
    cv2.setNumThreads(1)  # each data worker has a core
    return True


def describe_backend(name):
    """A line on what reads training's JPEG files, by DATA.IMAGE_BACKEND. Raises: as `find_backend`."""
    line = f'DATA.IMAGE_BACKEND {name}: JPEG files for training are read by '
    if find_backend(name):
        return line + 'simplejpeg and OpenCV'
    return line + 'Pillow' + ('; pip install -r requirements-fast.txt is faster' if name.lower() == 'auto' else '')


def open_image(path, exif_transpose=False, bit_depth=0, fast=False):
    """The image in a file, of which a region is wanted: a `Jpeg`, which is decoded then, or else an `InMemory`.

    fast: let simplejpeg and OpenCV read what they can (`find_backend`).
    Raises: as `read_image`, which has the other arguments.
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
            return Jpeg(path, data, image.size, orientation if orientation in TURNS else 1,
                        fast and image.mode in ('RGB', 'L'), image)
    return InMemory(read_image(path, exif_transpose, bit_depth))


def _plain_size(data):
    """(width, height) by the header of a JPEG file that simplejpeg reads, and Pillow would too; None of any other."""
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
        """A box (left, top, right, bottom) of whole pixels, resized to a square: uint8 [side, side, 3].

        resample: Pillow's filter; flip: whether it is mirrored, left to right.
        """
        image = self.image.crop(box).resize((side, side), resample)
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)


class Jpeg:
    """The bytes of a JPEG file. What is asked of it comes scaled down from the decoder where it stays large enough.

    path: for errors.
    stored_size: (width, height) in the file; `size` is the image's, as its orientation shows it.
    orientation: EXIF's, from 1 to 8.
    fast: whether simplejpeg and OpenCV read it, which leave what they cannot to Pillow.
    opened: the image as Pillow has opened it, if it has.
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
        """As that of `InMemory`. Raises: UserError as `read_image`."""
        scale = 1 if resample == Image.Resampling.NEAREST else _decoding_scale(box, side)  # which takes means
        box = [edge / scale for edge in _stored_box(box, self.stored_size, self.orientation)]
        # the pixels that the box touches, and the box in them
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
                image = Image.fromarray(np.ascontiguousarray(pixels))  # of strided ones Pillow's copy is slow
        image = image.resize((side, side), resample, inner)
        if self.orientation > 1:
            image = image.transpose(TURNS[self.orientation])
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)

    def _decode(self, scale):
        """The stored image, 1 / scale as large, the sides rounded up: Pillow's."""
        image, self.opened = self.opened or Image.open(io.BytesIO(self.data)), None  # it is decoded at one scale only
        if scale > 1:
            image.draft('RGB', tuple(side // scale for side in self.stored_size))
        return image

    def _decode_fast(self, scale):
        """The same as uint8 [height, width, 3]; None where simplejpeg refuses the file or remarks on it."""
        import simplejpeg
        width, height = (-(-side // scale) if scale > 1 else 0 for side in self.stored_size)
        try:
            return simplejpeg.decode_jpeg(self.data, min_width=width, min_height=height)
        except ValueError:
            return None


def _decoding_scale(box, side):
    """By how much a JPEG decoder may scale an image down (1, 2, 4 or 8) for a box not to get smaller than side."""
    left, top, right, bottom = box
    return max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(right - left, bottom - top) >= scale * side)


def _stored_box(box, stored_size, orientation):
    """A box of an image in the pixels of its file, (width, height), which has an EXIF orientation."""
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
    """uint8 [height, width, 3] -> [side, side, 3] by OpenCV, whose filters do not widen when they shrink an image.

    From 1.5 on they would miss pixels between the samples, so the image is blurred a little before. INTER_AREA comes
    closer to Pillow's filters, but takes six times as long as bilinear.
    """
    import cv2
    shrink = math.sqrt(pixels.shape[0] * pixels.shape[1]) / side
    if shrink >= 1.5:
        pixels = cv2.GaussianBlur(pixels, (3, 3), 0.5)
    name = OPENCV[resample] if shrink <= 1 else 'INTER_LINEAR'
    resized = cv2.resize(pixels, (side, side), interpolation=getattr(cv2, name))
    return cv2.flip(resized, 1) if flip else resized
