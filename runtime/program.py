"""How a program starts, handles stop signals, and ends: Paddle's runtime, signals, errors on the console.

Importing this module does not import Paddle.
"""
import contextlib
import ctypes
import errno
import glob
import importlib.metadata
import io
import os
import re
import signal
import sys
import threading
import warnings

from utils import UserError, blocked, program_name, silence_stdout

# signals that request a stop: Ctrl-C, a closed terminal, a system or scheduler that needs the machine back
STOP_SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
                     if hasattr(signal, name))  # Windows has the first two
# exit status of a training run that stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h
STOPPED = 75


def prepare_runtime(device=None):
    """Set up the environment for Paddle and import it. Call this before anything else imports Paddle.

    Without a GPU, or with `device` 'cpu', Paddle computes on all cores that the process may use.
    Raises: UserError if the installed Paddle is missing or crashes with the installed NumPy, and for a launcher's
    environment variable that is not a number.
    """
    for name in _LOWEST:
        environment_number(name)  # Paddle parses them its own way
    if _check_versions() == 'paddlepaddle' or device == 'cpu' or not _has_driver():
        _prepare_cpu()
    # On SIGTERM, Paddle (2.6.2, 3.3.1) prints a stack trace, in which a newly forked data worker may deadlock, and it
    # leaves its batches in shared memory unless Python exits cleanly. So hold the signal back until Python can handle
    # it, and Ctrl-C, which would look like a failed import
    with blocked([signal.SIGTERM, signal.SIGINT]):
        _import_paddle()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # printed whenever training starts, about what batch norms do anyway
    warnings.filterwarnings('ignore', 'When training, we now always track global mean and variance')


def _import_paddle():
    # the import warns about the number of threads set here and about a missing ccache: nothing a user can fix
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            import paddle
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # from the initialization of a C++ module
            raise error.__cause__ from None
        raise UserError(f'PaddlePaddle cannot be imported ({error}); if libgomp.so.1 is missing, install it (on '
                        'Debian: apt install libgomp1), otherwise reinstall PaddlePaddle') from None
    if 'PADDLE_TRAINER_ID' in os.environ:
        # when a rank ends, gloo aborts the others: their C++ stack traces add nothing
        paddle.disable_signal_handler()


def _check_versions():
    """Return the installed distribution of Paddle, 'paddlepaddle' or 'paddlepaddle-gpu'. Raises: UserError."""
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


def _prepare_cpu():
    # a GPU build warns about CUDA libraries that this machine lacks
    os.environ.setdefault('GLOG_minloglevel', '2')
    # Paddle's default is one thread
    os.environ.setdefault('OMP_NUM_THREADS', str(cores_per_process()))
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            amd = 'AuthenticAMD' in file.read()
    except OSError:
        amd = False
    if amd:
        # the MKL inside Paddle (2.6.2, 3.3.1) takes its slowest path on AMD; 5 is AVX2
        os.environ.setdefault('MKL_DEBUG_CPU_TYPE', '5')
    if sys.platform == 'linux':
        # glibc returns large freed blocks to the system, and every step would fault their pages in again
        with contextlib.suppress(AttributeError):  # another C library
            no_mmap, keep_all = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
            for option in (no_mmap, keep_all):
                ctypes.CDLL(None).mallopt(*option)


# environment variables set by Paddle's launcher, main_multi_gpu.py or srun -> their lowest values
_LOWEST = {'PADDLE_TRAINERS_NUM': 1, 'PADDLE_LOCAL_SIZE': 1, 'PADDLE_TRAINER_ID': 0, 'FLAGS_selected_gpus': 0,
           'RUN_PROCESSES_PID': 1, 'SLURM_STEP_NUM_TASKS': 1, 'SLURM_STEP_NUM_NODES': 1}


def environment_number(name, default=None):
    """Return the number in a launcher's environment variable, the first of a list of GPUs; `default` if it is unset.

    Raises: UserError for any other value.
    """
    if name not in os.environ:
        return default
    text = os.environ[name]
    try:
        numbers = [int(part) for part in (text.split(',') if name == 'FLAGS_selected_gpus' else [text])]
    except ValueError:
        numbers = [-1]
    if min(numbers) < _LOWEST[name]:
        raise UserError(f'environment variable {name} is {text[:100]!r}, but must be an integer of at least '
                        f'{_LOWEST[name]}: unset it, or let a launcher set it')
    return numbers[0]


def _has_driver():
    return bool(glob.glob('/dev/nvidia[0-9]*'))


def count_gpus(device=None):
    """Return the number of GPUs to compute on: all that Paddle finds, or 0 if `device` is 'cpu'.

    Raises: UserError if `device` is 'gpu' and Paddle finds none.
    """
    import paddle
    count = 0 if device == 'cpu' else paddle.device.cuda.device_count()
    if device == 'gpu' and not count:
        raise UserError(f'-device is gpu, but PaddlePaddle finds no GPU: {_why_no_gpu()}')
    return count


def _why_no_gpu():
    """Return the likely reason why Paddle finds no GPU, and the remedy."""
    import paddle
    if not paddle.is_compiled_with_cuda():
        return 'it is a CPU build; README.md has the commands that install a GPU build'
    if not _has_driver():
        return 'no NVIDIA driver found (no /dev/nvidia0); install it, or start the container with --gpus all'
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return (f'CUDA_VISIBLE_DEVICES is {os.environ["CUDA_VISIBLE_DEVICES"]!r}; unset it, or name GPUs that '
                '`nvidia-smi -L` lists')
    return (f'the NVIDIA driver may be too old for CUDA {paddle.version.cuda()}; compare the CUDA version that '
            '`nvidia-smi` shows')


def use_device(device=None, index=0):
    """Compute on GPU `index`, or on the CPU if `device` is 'cpu' or if it is None and Paddle finds no GPU.

    A GPU build that finds no GPU prints a warning on stderr, once per process group.
    Returns: the device's name. Raises: UserError as `count_gpus`.
    """
    import paddle
    count = count_gpus(device)
    paddle.set_device(f'gpu:{index}' if count else 'cpu')
    is_main = os.environ.get('PADDLE_TRAINER_ID', '0') == '0'
    if not count and device is None and paddle.is_compiled_with_cuda() and is_main:
        with contextlib.suppress(OSError):  # stderr may have no reader
            print(f'{program_name()}: warning: computing on the CPU because PaddlePaddle finds no GPU: '
                  f'{_why_no_gpu()}; if you want the CPU, give -device cpu', file=sys.stderr)
    return paddle.device.get_device()


def usable_cores():
    """Return the number of cores that this process may use; not every system reports a process's affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def cores_per_process():
    """Return this process's share of the usable cores, at least 1; the local processes of a group share equally."""
    return max(1, usable_cores() // environment_number('PADDLE_LOCAL_SIZE', 1))


def join_process_group():
    """Join the process group that Paddle's launcher or main_multi_gpu.py started, if any.

    Call `use_device` first: processes on GPUs communicate through NCCL, others through gloo.
    """
    import paddle
    if 'PADDLE_TRAINER_ID' in os.environ:
        end_with_parent(environment_number('RUN_PROCESSES_PID'))
    if environment_number('PADDLE_TRAINERS_NUM', 1) == 1:
        return
    if not paddle.device.get_device().startswith('gpu'):
        os.environ['PADDLE_DISTRI_BACKEND'] = 'gloo'
    with contextlib.redirect_stderr(io.StringIO()):  # a banner about flags that Paddle (3.3.1) itself sets
        paddle.distributed.init_parallel_env()


def end_with_parent(parent=None):
    """Have the system kill this process when its parent ends for any reason (Linux only).

    parent: the parent's process ID, if the parent may already have ended.
    """
    if sys.platform == 'linux':
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if parent not in (None, os.getppid()):
            os._exit(1)


def handle_stop_signals(handler):
    """Install a handler for STOP_SIGNALS, except SIGHUP under nohup. Returns: {signal: previous handler}."""
    ignored = [number for number in STOP_SIGNALS
               if number.name == 'SIGHUP' and signal.getsignal(number) == signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}


class StopRequest:
    """Context manager that records the name of the first of STOP_SIGNALS, for the program to act on when it can.

    A second Ctrl-C interrupts at once. Does nothing outside the main thread, the only one that receives signals.
    """

    def __init__(self):
        self.name = ''
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = handle_stop_signals(self._remember)
        return self

    def _remember(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        is_first, self.name = not self.name, self.name or signal.Signals(number).name
        if is_first and os.environ.get('PADDLE_TRAINER_ID', '0') == '0':
            # not print, which the signal may have interrupted; the reader of stderr may have received the signal too
            with contextlib.suppress(OSError):
                os.write(2, b'stop requested: saving a checkpoint first; Ctrl-C again stops at once\n')

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_program(main):
    """Call a program's main(). A user's mistake or a system limit ends it with one line on stderr and status 2."""
    try:
        _prepare_streams()
        _call(main)
    except SystemExit as error:
        # a requested stop: a second request, which launchers send, must not change the status
        if error.code in (STOPPED, 128 + signal.SIGTERM):
            handle_stop_signals(signal.SIG_IGN)
        raise
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except BrokenPipeError:
        silence_stdout()
        sys.exit(_fail('the program that reads the output has ended', 1))
    except OSError as error:
        _drop_output()
        name = error.filename or 'stdout or another file'
        sys.exit(_fail(f'{name}: {error.strerror or error}; {remedy(error)}', 2))
    except KeyboardInterrupt:
        sys.exit(_fail('interrupted', 130))
    except Exception as error:
        limit = shortage(error)
        if not limit:
            raise
        sys.exit(_fail(limit, 2))


def _prepare_streams():
    """Escape characters that the console cannot show, and keep files from taking the descriptor of a closed stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
    if sys.stdout is None:
        raise UserError('stdout is closed: redirect it to a file or to /dev/null')
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a notebook's streams lack it
            stream.reconfigure(errors='backslashreplace')


def _call(main):
    """Call main() and flush stdout, because an error while flushing at exit would print a traceback."""
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise
    sys.stdout.flush()


def _drop_output():
    """Silence stdout if it cannot be written to, so that it does not fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()


# what to do about a system error
_REMEDIES = {
    'EMFILE': 'the process may not open more files: raise the limit with `ulimit -n`',
    'ENFILE': 'the system may not open more files: close other programs, or raise fs.file-max',
    'EAGAIN': 'the system cannot start more processes, or the output accepts no more data now: raise `ulimit -u`, or '
              'write to a file',
    'ENOMEM': 'out of memory: close other programs, or use a machine with more memory',
    'ENOSPC': 'free up disk space (`df -h`, and `df -i` for the number of files), or choose another location',
    'EDQUOT': 'your quota is used up (`quota -s`): remove files, or choose another location',
    'EFBIG': 'the file would exceed the size limit: raise it with `ulimit -f`, or choose another file system',
    'ENAMETOOLONG': 'names are limited to 255 bytes and paths to 4,096: choose a shorter one',
    'EROFS': 'the file system is read-only: choose another location',
    'EIO': 'the disk, or the network connection to it, is failing: see `dmesg`',
}


def remedy(error):
    """Return what a user can do about an OSError."""
    return _REMEDIES.get(errno.errorcode.get(error.errno), 'check the path and its permissions')


def shortage(error):
    """Return one line about the system limit behind an exception; '' if there is none."""
    text = str(error)
    # also by name: a data worker's traceback is text
    names = 'MemoryError|ResourceExhausted|bad_alloc|out of memory'
    if isinstance(error, MemoryError) or re.search(names, text, re.IGNORECASE):
        found = re.search('(out of memory error|fail to alloc|unable to allocate)[^\n]*', text, re.IGNORECASE)
        detail = f' ({found[0][:150]})' if found else ''
        return f'out of memory{detail}: use smaller batches, images or networks, or a machine with more memory'
    if isinstance(error, OverflowError):
        return f'a number is too large to compute with ({text[:150]}): lower it in the config or on the command line'
    if "can't start new thread" in text:
        return 'the system cannot start more threads: raise the limit with `ulimit -u`, or use fewer workers'
    return ''


def _fail(message, status):
    rank = os.environ.get('PADDLE_TRAINER_ID', '0')
    with contextlib.suppress(OSError):  # stderr may have no reader
        print(f'{program_name()}: error: {message if rank == "0" else f"rank {rank}: {message}"}', file=sys.stderr)
    return status
