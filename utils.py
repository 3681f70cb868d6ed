"""Helpers that every room may use: the user's errors, the process group, logging.

Importing this module does not import Paddle.
"""
# Paddle 2.6.2 crashes when zlib (PNG, gzip, npz) is used for the first time after `import paddle`:
# its library exports symbols of its own zlib. Loaded before it, all is well. 3.x is not affected.
import zlib  # noqa: F401  isort: skip
import contextlib
import logging
import os
import signal
import sys

from tqdm import tqdm


@contextlib.contextmanager
def blocked(signals):
    """Hold back signals of this thread, and of what it starts, while it is open, where the system can (not Windows)."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# NumPy starts threads. They must leave SIGTERM to the main thread, which blocks it while it imports Paddle
# (runtime/program.py)
with blocked([signal.SIGTERM]):
    import numpy as np


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line that names the value and the remedy."""


def silence_stdout():
    """For when what read it has ended: nothing more can be written, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    # under a debugger, under a profiler and in a notebook `__main__` is theirs, or has no __spec__
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    is_module = spec and spec.origin and os.path.realpath(spec.origin) == os.path.realpath(sys.argv[0])
    return spec.name if is_module else os.path.basename(sys.argv[0])


def rank():
    """This process's number in the process group, from 0; 0 without a group."""
    from paddle import distributed
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    """Processes in the process group; 1 without a group."""
    from paddle import distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1


def reduce_over_ranks(values, op='SUM'):
    """Numbers, reduced entry by entry over all processes: float64 NumPy array. op: SUM or MIN."""
    reduced = np.asarray(values, 'float64')
    if world_size() > 1:
        import paddle
        from paddle import distributed
        tensor = paddle.to_tensor(reduced)
        distributed.all_reduce(tensor, op=getattr(distributed.ReduceOp, op))
        reduced = tensor.numpy()
    return reduced


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


def check_agreement(find_facts):
    """Raises: UserError, on all ranks, when one has other facts than rank 0. find_facts() -> {name: value}."""
    if world_size() == 1:
        return
    first = from_main(find_facts)
    own = first if rank() == 0 else find_facts()
    differing = [f'{name} is {own.get(name)!r}, not {first[name]!r}' for name in first if own.get(name) != first[name]]
    if reduce_over_ranks([-len(differing)], 'MIN')[0] < 0:
        raise UserError(f'not as on rank 0: {first_few(differing)}; start all processes alike' if differing else
                        'another rank has another config or other lists than rank 0; see its message')


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
            silence_stdout()
            with contextlib.suppress(OSError):
                print(f'nobody reads the output any more; it goes on in {self.log}', file=sys.stderr)


@contextlib.contextmanager
def naming(path):
    """Let an OSError in it say which file it is about."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


class _FileHandler(logging.FileHandler):
    """Fails when it cannot write, where logging's own prints a traceback and goes on without a log."""

    def handleError(self, record):
        with naming(self.baseFilename):
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
        # the bar is as wide as the rest, which fits 80 columns, leaves it
        self.bar = tqdm(total=steps, initial=done, desc=name, leave=False, file=sys.stdout,
                        bar_format='{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}',
                        disable=rank() > 0 or not sys.stdout.isatty())

    def step(self):
        """Count a step. Returns: whether it is time to `show` how it goes."""
        self.done += 1
        self.bar.update()
        return self.done % self.every == 0

    def show(self, text, more=''):
        """Show a text on the bar, or both in a log line; on a terminal log.txt alone takes that."""
        self.bar.set_postfix_str(text)
        LOG.log(logging.INFO if self.bar.disable else logging.DEBUG,
                f'{self.name} step {self.done}/{self.steps} {text}{more}')

    def close(self):
        self.bar.close()


def blend(targets, sources, keep):
    """target = keep * target + (1 - keep) * source for each pair of float32 tensors, in place, in one operator.

    That is Momentum at a learning rate of 0: its velocity is such a sum, and its weights, here the sources, stay.
    """
    import paddle
    with paddle.no_grad():
        rate = paddle.zeros([1], dtype=targets[0].dtype)
        paddle._C_ops.merged_momentum_(sources, sources, targets, [rate], None, keep, False, [], [], False, 1 - keep)
