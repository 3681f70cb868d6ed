"""How a program starts, is asked to stop, and ends: Paddle's runtime, signals, errors on the console.

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

# what asks a run to stop: Ctrl-C, a closed terminal, a system or a scheduler that wants its machine back
STOP_SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
                     if hasattr(signal, name))  # Windows has the first two
# exit status of a training that was asked to stop, and goes on with -resume: "try again later" of sysexits.h
STOPPED = 75


def prepare_runtime(device=None):
    """Set what must be set before Paddle is imported, and import it: call it before anything else that does.

    On a machine without a GPU, and with the `device` 'cpu', Paddle computes on all cores that the process may use.

    Raises: UserError when the installed NumPy is one that the installed Paddle crashes on, and for a launcher's
    environment variable that is no number.
    """
    for name in _LOWEST:
        environment_number(name)  # Paddle would read them its own way
    if _check_versions() == 'paddlepaddle' or device == 'cpu' or not _has_driver():
        _prepare_cpu()
    # Paddle (2.6.2, 3.3.1) answers SIGTERM with a stack trace, in which a data worker just forked may deadlock; and it
    # leaves its batches in shared memory, unless Python ends in order. So the signal waits until it can be answered,
    # and Ctrl-C, which would look like a failure of the import
    with blocked([signal.SIGTERM, signal.SIGINT]):
        _import_paddle()
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # said at every start of a training, of what batch norms do anyway
    warnings.filterwarnings('ignore', 'When training, we now always track global mean and variance')


def _import_paddle():
    # the import warns of the number of threads chosen here and of a missing ccache: nothing a user could fix
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            import paddle
    except ImportError as error:
        raise UserError(f'PaddlePaddle cannot be imported ({error}); libgomp.so.1 comes with the system (on Debian: '
                        'apt install libgomp1), for anything else install PaddlePaddle again') from None
    if 'PADDLE_TRAINER_ID' in os.environ:
        # when a rank has gone, gloo aborts the others: their C++ stack traces are no news
        paddle.disable_signal_handler()


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


def _prepare_cpu():
    # a GPU build warns of the CUDA libraries that this machine lacks
    os.environ.setdefault('GLOG_minloglevel', '2')
    # Paddle computes on one thread unless told otherwise
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
        # glibc returns large blocks to the system when they are freed, and every step would fault in their pages again
        with contextlib.suppress(AttributeError):  # another C library
            no_mmap, keep_all = (-4, 0), (-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
            for option in (no_mmap, keep_all):
                ctypes.CDLL(None).mallopt(*option)


# numbers in the environment that Paddle's launcher, main_multi_gpu.py or srun has put there, and their lowest values
_LOWEST = {'PADDLE_TRAINERS_NUM': 1, 'PADDLE_LOCAL_SIZE': 1, 'PADDLE_TRAINER_ID': 0, 'FLAGS_selected_gpus': 0,
           'RUN_PROCESSES_PID': 1, 'SLURM_STEP_NUM_TASKS': 1, 'SLURM_STEP_NUM_NODES': 1}


def environment_number(name, default=None):
    """The number in one of a launcher's environment variables, of a list of GPUs the first; `default` without it.

    Raises: UserError for anything else in it.
    """
    if name not in os.environ:
        return default
    text = os.environ[name]
    try:
        numbers = [int(part) for part in (text.split(',') if name == 'FLAGS_selected_gpus' else [text])]
    except ValueError:
        numbers = [-1]
    if min(numbers) < _LOWEST[name]:
        raise UserError(f'{name} is {text[:100]!r} in the environment, but must be a whole number from '
                        f'{_LOWEST[name]}: unset it, or leave it to a launcher')
    return numbers[0]


def _has_driver():
    return bool(glob.glob('/dev/nvidia[0-9]*'))


def count_gpus(device=None):
    """How many GPUs there are to compute on: all that Paddle finds; none where `device` is 'cpu'.

    Raises: UserError where it is 'gpu' and Paddle finds none.
    """
    import paddle
    count = 0 if device == 'cpu' else paddle.device.cuda.device_count()
    if device == 'gpu' and not count:
        raise UserError(f'-device is gpu, but PaddlePaddle finds no GPU: {_why_no_gpu()}')
    return count


def _why_no_gpu():
    """The likely reason why Paddle finds no GPU, and its remedy."""
    import paddle
    if not paddle.is_compiled_with_cuda():
        return 'it is a build for CPUs; README.md has the commands that install one for GPUs'
    if not _has_driver():
        return 'there is no NVIDIA driver here (no /dev/nvidia0); install it, or start the container with --gpus all'
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return (f'CUDA_VISIBLE_DEVICES is {os.environ["CUDA_VISIBLE_DEVICES"]!r}; unset it, or name GPUs that '
                '`nvidia-smi -L` lists')
    return (f'the NVIDIA driver may be too old for CUDA {paddle.version.cuda()}; compare the CUDA version that '
            '`nvidia-smi` shows')


def use_device(device=None, index=0):
    """Compute on this GPU, or on the CPU: where `device` is 'cpu', or it is None and Paddle finds no GPU.

    A GPU build that finds none says so on stderr, in a group of processes once.
    Returns: the device's name. Raises: UserError as `count_gpus`.
    """
    import paddle
    count = count_gpus(device)
    paddle.set_device(f'gpu:{index}' if count else 'cpu')
    is_main = os.environ.get('PADDLE_TRAINER_ID', '0') == '0'
    if not count and device is None and paddle.is_compiled_with_cuda() and is_main:
        with contextlib.suppress(OSError):  # nobody may read it
            print(f'{program_name()}: warning: computing on the CPU, as PaddlePaddle finds no GPU: {_why_no_gpu()}; if '
                  'the CPU is meant, give -device cpu', file=sys.stderr)
    return paddle.device.get_device()


def usable_cores():
    """Cores that this process may use; not every system knows a process's affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def cores_per_process():
    """This process's share of the usable cores, at least 1: a group's processes on a machine have equal shares."""
    return max(1, usable_cores() // environment_number('PADDLE_LOCAL_SIZE', 1))


def join_process_group():
    """Join the group that Paddle's launcher or main_multi_gpu.py has made of several processes, if one has.

    Call `use_device` before: processes on GPUs talk by NCCL, others by gloo.
    """
    import paddle
    if 'PADDLE_TRAINER_ID' in os.environ:
        end_with_parent(environment_number('RUN_PROCESSES_PID'))
    if environment_number('PADDLE_TRAINERS_NUM', 1) == 1:
        return
    if not paddle.device.get_device().startswith('gpu'):
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


def answer(handler):
    """Let a handler answer STOP_SIGNALS, but a closed terminal under nohup. Returns: {number: handler before}."""
    ignored = [number for number in STOP_SIGNALS
               if number.name == 'SIGHUP' and signal.getsignal(number) == signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in ignored}


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
            self._before = answer(self._remember)
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


def run_program(main):
    """Call a program's main(); a user's mistake, or a limit of the system, ends in one line on stderr and status 2."""
    try:
        _prepare_streams()
        _call(main)
    except SystemExit as error:
        # as it was asked to: who asks once more, as launchers do, gets that status too
        if error.code in (STOPPED, 128 + signal.SIGTERM):
            answer(signal.SIG_IGN)
        raise
    except UserError as error:
        sys.exit(_fail(str(error), 2))
    except BrokenPipeError:
        silence_stdout()
        sys.exit(_fail('the program that read the output has ended', 1))
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
    """Let a character that the console lacks raise nothing, and no file take the place of a stream that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        raise UserError('stdout is closed: redirect it to a file or to /dev/null')
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a notebook's are of another kind
            stream.reconfigure(errors='backslashreplace')


def _call(main):
    """Call main(), and write what it has printed: at exit, what goes wrong with that is shown as a traceback."""
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise
    sys.stdout.flush()


def _drop_output():
    """Let stdout, if that is what cannot be written, not fail once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()


# what to do about an error of the system
_REMEDIES = {
    'EMFILE': 'a process may not open more files: raise that limit, `ulimit -n`',
    'ENFILE': 'the system may not open more files: end other programs, or raise fs.file-max',
    'EAGAIN': 'the system starts no more processes, or the output takes no more at once: raise `ulimit -u`, or write '
              'to a file',
    'ENOMEM': 'memory does not suffice: end other programs, or use a machine with more of it',
    'ENOSPC': 'free the disk (`df -h`, and `df -i` for the number of files), or choose another place',
    'EDQUOT': 'your quota is used up (`quota -s`): remove files, or choose another place',
    'EFBIG': 'a file may not be so large: raise that limit, `ulimit -f`, or choose another file system',
    'ENAMETOOLONG': 'a name may have 255 bytes and a path 4,096: choose a shorter one',
    'EROFS': 'the file system is read-only: choose another place',
    'EIO': 'the disk, or the network to it, fails: `dmesg` may say more',
}


def remedy(error):
    """What a user can do about an OSError."""
    return _REMEDIES.get(errno.errorcode.get(error.errno), 'check the path and its permissions')


def shortage(error):
    """A line on the limit of the system that an exception has met; '' if it has met none."""
    text = str(error)
    # by its name in the traceback of a data worker, too
    names = 'MemoryError|ResourceExhausted|bad_alloc|out of memory'
    if isinstance(error, MemoryError) or re.search(names, text, re.IGNORECASE):
        found = re.search('(out of memory error|fail to alloc|unable to allocate)[^\n]*', text, re.IGNORECASE)
        detail = f' ({found[0][:150]})' if found else ''
        return f'memory does not suffice{detail}: use smaller batches, images or networks, or a machine with more of it'
    if isinstance(error, OverflowError):
        return f'a number is larger than can be computed with ({text[:150]}): lower it, in the config or its flag'
    if "can't start new thread" in text:
        return 'the system starts no more threads: raise that limit, `ulimit -u`, or use fewer workers'
    return ''


def _fail(message, status):
    rank = os.environ.get('PADDLE_TRAINER_ID', '0')
    with contextlib.suppress(OSError):  # nobody may read it
        print(f'{program_name()}: error: {message if rank == "0" else f"rank {rank}: {message}"}', file=sys.stderr)
    return status
