"""Helpers that every room may use: the user's errors, the runtime's settings, logging.

Importing this module does not import Paddle.
"""
# Paddle 2.6.2 crashes when zlib (PNG, gzip, npz) is used for the first time after `import paddle`:
# its library exports symbols of its own zlib. Loaded before it, all is well. 3.x is not affected.
import zlib  # noqa: F401  isort: skip
import contextlib
import glob
import importlib.metadata
import io
import json
import logging
import os
import sys
import warnings

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend. The message is one line that names the value and the remedy."""


def prepare_runtime():
    """Set what must be set before Paddle is imported, and import it: call it before anything else that does.

    On a machine without a GPU, Paddle computes on all cores that the process may use.

    Raises: UserError when the installed NumPy is one that the installed Paddle crashes on.
    """
    _check_versions()
    if glob.glob('/dev/nvidia[0-9]*'):
        return
    # a GPU build warns of the CUDA libraries that this machine lacks
    os.environ.setdefault('GLOG_minloglevel', '2')
    # Paddle computes on one thread unless told otherwise
    os.environ.setdefault('OMP_NUM_THREADS', str(len(os.sched_getaffinity(0))))
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            amd = 'AuthenticAMD' in file.read()
    except OSError:
        amd = False
    if amd:
        # the MKL inside Paddle (2.6.2, 3.3.1) takes its slowest path on AMD; 5 is AVX2
        os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')
    # the import warns of the number of threads chosen here and of a missing ccache: nothing a user could mend
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import paddle  # noqa: F401
    # said at every start of a training, of what batch norms do anyway
    warnings.filterwarnings('ignore', 'When training, we now always track global mean and variance')


def _check_versions():
    numpy = importlib.metadata.version('numpy')
    for name in ('paddlepaddle-gpu', 'paddlepaddle'):
        try:
            paddle = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if paddle.startswith('2.') and not numpy.startswith('1.'):
            raise UserError(f'numpy {numpy} crashes {name} {paddle}: pip install "numpy<2"')
        return
    raise UserError('PaddlePaddle is not installed: pip install paddlepaddle==3.3.1 (CPU), or see README.md for GPUs')


def run_program(main):
    """Call a program's main(); a user's mistake ends in one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_fail('interrupted', 130))


def program_name():
    """How the user called the running program: main_single_gpu.py, or tools.fuse for `python -m tools.fuse`."""
    spec = sys.modules['__main__'].__spec__
    return spec.name if spec else os.path.basename(sys.argv[0])


def _fail(message, status):
    print(f'{program_name()}: error: {message}', file=sys.stderr)
    return status


class _ConsoleHandler(logging.Handler):
    """Writes to stdout without tearing a progress bar."""

    def emit(self, record):
        tqdm.write(self.format(record))


def setup_logger(folder=None):
    """The logger 'mobileone', writing to the console and, if a folder is given, to `folder`/log.txt.

    log.txt takes debug messages too.
    """
    logger = logging.getLogger('mobileone')
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers = [_ConsoleHandler(logging.INFO)]
    if folder:
        handlers.append(logging.FileHandler(os.path.join(folder, 'log.txt'), encoding='utf-8'))
    for handler in handlers:
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%Y-%m-%d %H:%M:%S'))
        logger.addHandler(handler)
    return logger


def append_json(path, record):
    """Append one record to a file of JSON lines."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')
