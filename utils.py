"""Helpers that every room may use: the user's errors, the runtime's settings, the process group, logging.

Importing this module does not import Paddle.
"""
# Paddle 2.6.2 crashes when zlib (PNG, gzip, npz) is used for the first time after `import paddle`:
# its library exports symbols of its own zlib. Loaded before it, all is well. 3.x is not affected.
import zlib  # noqa: F401  isort: skip
import contextlib
import ctypes
import glob
import importlib.metadata
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings

import numpy as np
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line that names the value and the remedy."""


# what asks a run to stop: Ctrl-C, and a system or a scheduler that wants its machine back
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# exit status of a training that was asked to stop, and goes on with -resume: "try again later" of sysexits.h
STOPPED = 75


def prepare_runtime():
    """Set what must be set before Paddle is imported, and import it: call it before anything else that does.

    On a machine without a GPU, Paddle computes on all cores that the process may use.

    Raises: UserError when the installed NumPy is one that the installed Paddle crashes on.
    """
    if _check_versions() == 'paddlepaddle' or not glob.glob('/dev/nvidia[0-9]*'):
        _prepare_cpu()
    # Paddle (2.6.2, 3.3.1) answers SIGTERM with a stack trace, in which a data worker just forked may deadlock; and it
    # leaves its batches in shared memory, unless Python ends in order. So the signal waits until it can be answered
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        _import_paddle()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    # said at every start of a training, of what batch norms do anyway
    warnings.filterwarnings('ignore', 'When training, we now always track global mean and variance')


def _import_paddle():
    # the import warns of the number of threads chosen here and of a missing ccache: nothing a user could mend
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            import paddle
    except ImportError as error:
        raise UserError(f'PaddlePaddle cannot be imported ({error}); libgomp.so.1 comes with the system (on Debian: '
                        'apt install libgomp1), for anything else install PaddlePaddle anew') from None
    if 'PADDLE_TRAINER_ID' in os.environ:
        # when a rank has gone, gloo aborts the others: their C++ stack traces are no news
        paddle.disable_signal_handler()


def use_device(index=0):
    """Compute on this GPU, or on the CPU where Paddle finds none (a GPU build too). Returns: the device's name."""
    import paddle
    paddle.set_device(f'gpu:{index}' if paddle.device.cuda.device_count() else 'cpu')
    return paddle.device.get_device()


def usable_cores():
    """Cores that this process may use; not every system knows a process's affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _prepare_cpu():
    # a GPU build warns of the CUDA libraries that this machine lacks
    os.environ.setdefault('GLOG_minloglevel', '2')
    # Paddle computes on one thread unless told otherwise
    processes = int(os.environ.get('PADDLE_LOCAL_SIZE', 1))
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, usable_cores() // processes)))
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            amd = 'AuthenticAMD' in file.read()
    except OSError:
        amd = False
    if amd:
        # the MKL inside Paddle (2.6.2, 3.3.1) takes its slowest path on AMD; 5 is AVX2
        os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')


def _check_versions():
    """The installed distribution of Paddle: 'paddlepaddle' or 'paddlepaddle-gpu'."""
    numpy = importlib.metadata.version('numpy')
    for name in ('paddlepaddle-gpu', 'paddlepaddle'):
        try:
            paddle = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if paddle.startswith('2.') and not numpy.startswith('1.'):
            raise UserError(f'numpy {numpy} crashes {name} {paddle}: pip install "numpy<2"')
        return name
    raise UserError('PaddlePaddle is not installed: pip install paddlepaddle==3.3.1 (CPU), or see README.md for GPUs')


def run_program(main):
    """Call a program's main(); a user's mistake ends in one line on stderr and exit status 2."""
    try:
        main()
    except SystemExit as error:
        if error.code == STOPPED:  # as it was asked to: who asks once more, as launchers do, gets that status too
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        raise
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except BrokenPipeError:
        _silence_stdout()
        sys.exit(_fail('the program that read the output has ended', 1))
    except OSError as error:
        name = error.filename or 'a file'
        sys.exit(_fail(f'{name}: {error.strerror or error}; check the path, its permissions and the free space', 2))
    except KeyboardInterrupt:
        sys.exit(_fail('interrupted', 130))
    except Exception as error:
        _tell_launcher(describe_error(error))
        raise


def _silence_stdout():
    """For when what read it has ended: nothing more can be written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class StopRequest:
    """While it is open, the first of STOP_SIGNALS is remembered as `name`, to be answered when it suits.

    A second Ctrl-C interrupts at once. Opened in another thread than the main one, which alone gets signals, it does
    nothing.
    """

    def __init__(self):
        self.name = ''
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def _remember(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_first, self.name = not self.name, self.name or signal.Signals(number).name
        if is_first and os.environ.get('PADDLE_TRAINER_ID', '0') == '0':
            # not by print, which the signal may have interrupted; and what shows it may have got the signal too
            with contextlib.suppress(OSError):
                os.write(2, b'asked to stop: a checkpoint comes first; Ctrl-C again stops at once\n')

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def first_few(problems, count=5):
    """A list of problems as one line: the first `count`, and how many more there are."""
    more = f' and {len(problems) - count} more' if len(problems) > count else ''
    return '; '.join(problems[:count]) + more


def one_line(text, length=300):
    """Text from a file, an error or the command line as a message shows it: cut where it is long, and plain."""
    text = ' '.join(text.split())
    text = ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text[:length + 1])
    return text if len(text) <= length else f'{text[:length]}...'


def describe_error(error, length=300):
    """An exception's type and message, as `one_line` cuts it."""
    return f'{type(error).__name__}: {one_line(str(error), length)}'


def misfits(expected, found):
    """What is missing, unexpected or other in one dictionary of shapes or sizes, compared with another: a line each."""
    problems = [f'missing {name}' for name in expected if name not in found]
    problems += [f'unexpected {name}' for name in found if name not in expected]
    return problems + [f'{name} is {found[name]}, not {expected[name]}' for name in expected
                       if name in found and found[name] != expected[name]]


def program_name():
    """How the user called the running program: main_single_gpu.py, or tools.fuse for `python -m tools.fuse`."""
    spec = sys.modules['__main__'].__spec__
    return spec.name if spec else os.path.basename(sys.argv[0])


def _fail(message, status):
    rank = os.environ.get('PADDLE_TRAINER_ID', '0')
    with contextlib.suppress(OSError):  # nobody may read it
        print(f'{program_name()}: error: {message if rank == "0" else f"rank {rank}: {message}"}', file=sys.stderr)
    _tell_launcher(message)
    return status


def _tell_launcher(message):
    """Write an error of another rank than 0 to the stderr of Paddle's launcher, which shows rank 0's alone (Linux)."""
    rank = os.environ.get('PADDLE_TRAINER_ID', '0')
    if rank != '0' and 'MOBILEONE_PARENT' not in os.environ:
        with contextlib.suppress(OSError), open(
                f'/proc/{os.getppid()}/fd/2', 'a', encoding='utf-8', errors='backslashreplace') as console:
            console.write(f'{program_name()}: error: rank {rank}: {message}\n')


def join_process_group():
    """Join the group that Paddle's launcher or main_multi_gpu.py has made of several processes, if one has."""
    import paddle
    if 'PADDLE_TRAINER_ID' in os.environ:
        end_with_parent(int(os.environ.get('MOBILEONE_PARENT', 0)) or None)
    if int(os.environ.get('PADDLE_TRAINERS_NUM', 1)) == 1:
        return
    if not paddle.device.cuda.device_count():
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'
    with contextlib.redirect_stderr(io.StringIO()):  # a banner on flags that Paddle (3.3.1) has set itself
        paddle.distributed.init_parallel_env()


def end_with_parent(parent=None):
    """Let the system kill this process when the one that started it has ended, however it ended (Linux only).

    parent: its process number, if it may have ended already.
    """
    if sys.platform == 'linux':
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if parent not in (None, os.getppid()):
            os._exit(1)


def rank():
    """This process's number in the process group, from 0; 0 without a group."""
    from paddle import distributed
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    """Processes in the process group; 1 without a group."""
    from paddle import distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1


def reduce_over_ranks(values, op='SUM'):
    """A tensor or array of numbers, reduced entry by entry over all processes: float64 NumPy array. op: SUM or MIN."""
    import paddle
    from paddle import distributed
    reduced = (values if isinstance(values, paddle.Tensor) else paddle.to_tensor(values)).astype('float64')
    if world_size() > 1:
        distributed.all_reduce(reduced, op=getattr(distributed.ReduceOp, op))
    return reduced.numpy()


def mean_over_ranks(arrays):
    """The means over all processes of some float arrays, in one reduction."""
    if not arrays:
        return []
    flat = reduce_over_ranks(np.concatenate([array.ravel() for array in arrays])) / world_size()
    ends = np.cumsum([array.size for array in arrays])
    return [part.reshape(array.shape).astype(array.dtype) for array, part in zip(arrays, np.split(flat, ends[:-1]))]


def from_main(function):
    """What function(), called by rank 0 alone, returned: on every rank; its UserError or OSError is raised on all."""
    result = None
    if rank() == 0:
        try:
            result = function()
        except (UserError, OSError) as error:
            result = error
    if world_size() > 1:
        from paddle import distributed
        results = [result]
        distributed.broadcast_object_list(results, src=0)
        result = results[0]
    if isinstance(result, (UserError, OSError)):
        raise result
    return result


LOG = logging.getLogger('mobileone')


class _ConsoleHandler(logging.Handler):
    """Writes to stdout without tearing a progress bar; not errors, which end the program and go to stderr.

    log: the file that has the messages too, if any. With one, a run goes on when nobody reads stdout any more.
    """

    def __init__(self, level, log=''):
        super().__init__(level)
        self.log = log

    def filter(self, record):
        return record.levelno < logging.ERROR

    def emit(self, record):
        try:
            tqdm.write(self.format(record))
            sys.stdout.flush()
        except BrokenPipeError:  # `tee` has ended, of a Ctrl-C that asks the run to stop
            if not self.log:
                raise
            _silence_stdout()
            with contextlib.suppress(OSError):
                print(f'nobody reads the output any more; it goes on in {self.log}', file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """Fails when it cannot write, where logging's own prints a traceback and goes on without a log."""

    def handleError(self, record):
        raise  # logging calls this while it handles the exception


def setup_logger(folder=None):
    """Let LOG write to the console and, if a folder is given, to `folder`/log.txt, which takes debug messages too.

    Of a process group only rank 0 writes; of the others errors go to the same log.txt.
    """
    is_main = rank() == 0
    LOG.setLevel(logging.DEBUG if is_main else logging.ERROR)
    LOG.propagate = False
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    log = os.path.join(folder, 'log.txt') if folder else ''
    handlers = [_ConsoleHandler(logging.INFO, log)]
    if folder:
        os.makedirs(folder, exist_ok=True)  # nodes need not share their disks
        handlers.append(_FileHandler(log, encoding='utf-8'))
    for handler in handlers:
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s' if is_main else
                                               f'%(asctime)s rank {rank()}: %(message)s', '%Y-%m-%d %H:%M:%S'))
        LOG.addHandler(handler)


class Progress:
    """How far a loop over `steps` steps is: a bar on a terminal, elsewhere a log line every `every` steps."""

    def __init__(self, name, steps, every, done=0):
        self.name = name
        self.steps = steps
        self.every = every
        self.done = done
        self.bar = tqdm(total=steps, initial=done, desc=name, leave=False, file=sys.stdout,
                        disable=rank() > 0 or not sys.stdout.isatty())

    def step(self):
        """Count a step. Returns: whether it is time to `show` how it goes."""
        self.done += 1
        self.bar.update()
        return self.done % self.every == 0

    def show(self, text):
        self.bar.set_postfix_str(text)
        # on a terminal the bar shows it, and only log.txt takes the line
        LOG.log(logging.INFO if self.bar.disable else logging.DEBUG,
                f'{self.name} step {self.done}/{self.steps} {text}')

    def close(self):
        self.bar.close()


def append_json(path, record):
    """Append one record to a file of JSON lines."""
    with open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record, allow_nan=False) + '\n')
