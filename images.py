"""The RGB image in a file, by Pillow.

Importing this module does not import Paddle.
"""
import logging
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.files import check_regular
from utils import UserError, one_line

# an image either is read or raises; what Pillow remarks besides does not say of which file
warnings.filterwarnings('ignore', module='PIL')
logging.getLogger('PIL').setLevel(logging.CRITICAL)

BITS_PER_SAMPLE = 258  # TIFF's tag


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


def _read(path, function):
    """function(image) of the image in a file, the first of several. Raises: as `read_image`."""
    check_regular(path)
    try:
        with Image.open(path) as image:
            if image.format == 'EPS':
                raise ValueError('EPS, a program, which Pillow gives to Ghostscript')
            return function(image)
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
