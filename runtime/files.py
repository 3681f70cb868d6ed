"""Files: atomic writes, reads of regular files only, and text from any operating system.

Importing this module does not import Paddle.
"""
import codecs
import os
import pathlib
import shutil

from runtime.program import remedy
from utils import UserError, describe_error, one_line

# the names of the classes, one per line, next to the lists of a dataset and the weights of a run
CLASS_NAMES = 'class_names.txt'


def check_regular(path, key=''):
    """Raise a UserError if `path` exists but is not a regular file: reading a pipe or a device may never end.

    key: its config key, for the message.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = 'a folder' if os.path.isdir(path) else 'a pipe, a socket or a device'
        raise UserError(f'{one_line(str(path))}: is {kind}, not a regular file; '
                        f'{f"set {key} to a file" if key else "give a file"}')


def replace(path, write):
    """Write the file `path` atomically: write(temporary path) makes a new file, which then replaces `path`.

    Raises: UserError, naming `path`, if it cannot be written or is not a regular file.
    """
    if '\0' in str(path):
        raise UserError(f'{path!r}: a path cannot contain a NUL character; choose another')
    check_regular(path)
    partial = f'{path}.partial'
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
        sync(os.path.dirname(path) or '.')
    except OSError as error:
        raise UserError(f'{path}: cannot write ({error.strerror}); {remedy(error)}') from None
    finally:
        if os.path.lexists(partial):
            os.remove(partial)


def write_text(path, text):
    """Write a UTF-8 text file with `replace`."""
    replace(path, lambda partial: pathlib.Path(partial).write_text(text, 'utf-8'))


def copy(source, path):
    """Copy a file with `replace`."""
    replace(path, lambda partial: shutil.copyfile(source, partial))


def to_plain(content, path):
    """Convert the bytes of a text file to UTF-8 with line feeds and without byte-order marks.

    Raises: UserError for invalid UTF-16.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = bytearray(content.decode('utf-16').encode())
        except UnicodeDecodeError as error:
            raise UserError(f'{path}: is not valid UTF-16 at byte {error.start}; save it as UTF-8') from None
    if codecs.BOM_UTF8[:1] in content:  # searching for one byte is much faster than for three
        # concatenated lists have marks in the middle, too
        content = content.replace(codecs.BOM_UTF8, b'')
    if b'\r' in content:
        content = content.replace(b'\r\n', b'\n').replace(b'\r', b'\n')
    return content


def read_names(path):
    """Read a text file with one name per line. Returns: a tuple of names, without trailing empty lines.

    Raises: UserError for a file that cannot be read, is neither UTF-8 nor UTF-16 with a byte-order mark, or has an
    empty line before its end.
    """
    check_regular(path)
    try:
        names = tuple(to_plain(pathlib.Path(path).read_bytes(), path).decode().rstrip().split('\n'))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read ({describe_error(error, 80)}); save it as UTF-8') from None
    for number, name in enumerate(names, 1):
        if not name.strip() or '\0' in name:  # NUL: UTF-16 without a byte-order mark
            raise UserError(f'{path}:{number}: {name!r} is not a name; write one name per line, in UTF-8')
    return names


def sync(path):
    """Wait until a file, or the entries of a folder, are on disk."""
    is_folder = os.path.isdir(path)
    if is_folder and not hasattr(os, 'O_DIRECTORY'):
        return  # Windows cannot open folders, and syncs only files that are open for writing
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
