"""Files on the disk: written whole or not at all, and read only where they are regular files.

Importing this module does not import Paddle.
"""
import os
import pathlib

from runtime.program import remedy
from utils import UserError, one_line


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
