"""Files on the disk: written whole or not at all, and read only where they are regular files; text of any system.

Importing this module does not import Paddle.
"""
import codecs
import os
import pathlib
import shutil

from runtime.program import remedy
from utils import UserError, describe_error, one_line

# the names of the classes, one per line, next to the lists of a data set and the weights of a run
CLASS_NAMES = 'class_names.txt'


def check_regular(path, key=''):
    """Raises: UserError if `path` is there and is no regular file: a folder, a device, a pipe, which may never end.

    key: the config's that names it, for the message.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        kind = 'a folder' if os.path.isdir(path) else 'a pipe, a socket or a device'
        raise UserError(f'{one_line(str(path))}: is {kind}, not a regular file; give a file{f", {key}" if key else ""}')


def replace(path, write):
    """Let write(path of a new file) make the file `path`, whole or not at all.

    Raises: UserError, naming `path`, where it cannot be written, and where it is no regular file.
    """
    if '\0' in str(path):
        raise UserError(f'{path!r}: no file can have this name; choose another')
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
    """Write a text file in UTF-8 as `replace` does."""
    replace(path, lambda partial: pathlib.Path(partial).write_text(text, 'utf-8'))


def copy(source, path):
    """Copy a file as `replace` does."""
    replace(path, lambda partial: shutil.copyfile(source, partial))


def to_plain(content, path):
    """The bytes of a text file as UTF-8 text with line feeds, without byte-order marks. Raises: UserError."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = bytearray(content.decode('utf-16').encode())
        except UnicodeDecodeError as error:
            raise UserError(f'{path}: is not valid UTF-16 from byte {error.start} on; save it as UTF-8') from None
    if codecs.BOM_UTF8[:1] in content:  # one byte is found much faster than three
        # where lists were joined, within it too
        content = content.replace(codecs.BOM_UTF8, b'')
    if b'\r' in content:
        content = content.replace(b'\r\n', b'\n').replace(b'\r', b'\n')
    return content


def read_names(path):
    """The lines of a text file, each a name, as a tuple; empty ones at its end do not count.

    Raises: UserError for a file that cannot be read, is not UTF-8 nor UTF-16 with its mark, or has another empty line.
    """
    check_regular(path)
    try:
        names = tuple(to_plain(pathlib.Path(path).read_bytes(), path).decode().rstrip().split('\n'))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path}: cannot be read ({describe_error(error, 80)}); save it as UTF-8') from None
    for number, name in enumerate(names, 1):
        if not name.strip() or '\0' in name:  # of UTF-16 without its mark
            raise UserError(f'{path}:{number}: {name!r} is no name; write one in each line, in UTF-8')
    return names


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    is_folder = os.path.isdir(path)
    if is_folder and not hasattr(os, 'O_DIRECTORY'):
        return  # Windows opens no folders, and syncs only what is open for writing
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
