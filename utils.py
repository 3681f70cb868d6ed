"""Helpers for all modules: user errors, the process group, logging.

Importing this module does not import Paddle.
"""
# Paddle 2.6.2 crashes when zlib (PNG, gzip, npz) is first used after `import paddle`, because its library exports the
# symbols of its own zlib. Importing zlib first avoids that. 3.x is not affected.
import zlib  # noqa: F401  isort: skip
import contextlib
import logging
import os
import signal
import sys

from tqdm import tqdm


@contextlib.contextmanager
def blocked(signals):
    """Block signals in this thread, and in threads and processes it starts, where the system can (not on Windows)."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# NumPy starts threads. They must leave SIGTERM to the main thread, which blocks it while importing Paddle
# (runtime/program.py)
with blocked([signal.SIGTERM]):
    import numpy as np


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line that names the value and the remedy."""


def silence_stdout():
    """Redirect stdout to os.devnull, because its reader has exited and any write, even at exit, would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_few(problems, count=5):
    """Join a list of problems into one line: the first `count`, and the number of the rest."""
    more = f' and {len(problems) - count} more' if len(problems) > count else ''
    return '; '.join(problems[:count]) + more


def one_line(text, length=300):
    """Make text from a file, an error or the command line safe for a message: one printable line, cut at `length`."""
    text = ' '.join(text.split())
    text = ''.join(char if char.isprintable() else repr(char)[1:-1] for char in text[:length + 1])
    return text if len(text) <= length else f'{text[:length]}...'


def describe_error(error, length=300):
    """Return an exception's type and message; `one_line` cuts the message at `length`."""
    return f'{type(error).__name__}: {one_line(str(error), length)}'


def mismatches(expected, found):
    """List, one line each, what is missing, unexpected or different in `found`, a dictionary like `expected`."""
    problems = [f'missing {name}' for name in expected if name not in found]
    problems += [f'unexpected {name}' for name in found if name not in expected]
    return problems + [f'{name} is {found[name]}, not {expected[name]}' for name in expected
                       if name in found and found[name] != expected[name]]


def program_name():
    """Return the program's name as the user typed it: main_single_gpu.py, or tools.fuse for `python -m tools.fuse`."""
    # under a debugger, a profiler or a notebook, `__main__` is theirs or has no __spec__
    spec = getattr(sys.modules['__main__'], '__spec__', None)
    is_module = spec and spec.origin and os.path.realpath(spec.origin) == os.path.realpath(sys.argv[0])
    return spec.name if is_module else os.path.basename(sys.argv[0])


def rank():
    """Return this process's rank in the process group, from 0; 0 without a group."""
    from paddle import distributed
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    """Return the number of processes in the process group; 1 without a group."""
    from paddle import distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1


def reduce_over_ranks(values, op='SUM'):
    """Reduce numbers elementwise over all processes, to a float64 NumPy array. op: SUM or MIN."""
    reduced = np.asarray(values, 'float64')
    if world_size() > 1:
        import paddle
        from paddle import distributed
        tensor = paddle.to_tensor(reduced)
        distributed.all_reduce(tensor, op=getattr(distributed.ReduceOp, op))
        reduced = tensor.numpy()
    return reduced


def mean_over_ranks(arrays):
    """Return the means over all processes of a list of float arrays, with a single reduction."""
    if not arrays:
        return []
    flat = reduce_over_ranks(np.concatenate([array.ravel() for array in arrays])) / world_size()
    ends = np.cumsum([array.size for array in arrays])
    return [part.reshape(array.shape).astype(array.dtype) for array, part in zip(arrays, np.split(flat, ends[:-1]))]


def from_main(function):
    """Call function() only on rank 0 and return its result on every rank; a UserError or OSError is raised on all."""
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
    """Raise a UserError on all ranks if any rank's facts differ from rank 0's. find_facts() -> {name: value}."""
    if world_size() == 1:
        return
    first = from_main(find_facts)
    own = first if rank() == 0 else find_facts()
    differing = [f'{name} is {own.get(name)!r}, not {first[name]!r}' for name in first if own.get(name) != first[name]]
    if reduce_over_ranks([-len(differing)], 'MIN')[0] < 0:
        raise UserError(f'differs from rank 0: {first_few(differing)}; start all processes with the same config and '
                        'data' if differing else
                        'the config or data of another rank differs from that of rank 0; see its message')


LOG = logging.getLogger('mobileone')


class _ConsoleHandler(logging.Handler):
    """Writes to stdout without breaking a progress bar, except errors, which end the program and go to stderr.

    log: file that also gets the messages, if any. With one, a run continues after the reader of stdout has exited.
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
        except BrokenPipeError:  # Ctrl-C, which only asks the run to stop, kills `tee` at once
            if not self.log:
                raise
            silence_stdout()
            with contextlib.suppress(OSError):
                print(f'the program that reads the output has ended; the log continues in {self.log}', file=sys.stderr)


@contextlib.contextmanager
def naming(path):
    """Context manager that adds `path` to an OSError that names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


class _FileHandler(logging.FileHandler):
    """Raises when it cannot write; logging's own handler would print a traceback and continue without a log."""

    def handleError(self, record):
        with naming(self.baseFilename):
            raise  # logging calls this inside its except block


def setup_logger(folder=None):
    """Make LOG write to the console and, if a folder is given, to `folder`/log.txt, including debug messages.

    In a process group only rank 0 writes, except for errors of the other ranks, which go to the same log.txt.
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
        os.makedirs(folder, exist_ok=True)  # nodes may have separate disks
        handlers.append(_FileHandler(log, encoding='utf-8'))
    for handler in handlers:
        handler.setFormatter(logging.Formatter('%(asctime)s %(message)s' if is_main else
                                               f'%(asctime)s rank {rank()}: %(message)s', '%Y-%m-%d %H:%M:%S'))
        LOG.addHandler(handler)


class Progress:
    """Progress of a loop of `steps` steps: a bar on a terminal, otherwise a log line every `every` steps."""

    def __init__(self, name, steps, every, done=0):
        self.name = name
        self.steps = steps
        self.every = every
        self.done = done
        # the text fits into 80 columns; the bar fills the rest
        self.bar = tqdm(total=steps, initial=done, desc=name, leave=False, file=sys.stdout,
                        bar_format='{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}',
                        disable=rank() > 0 or not sys.stdout.isatty())

    def step(self):
        """Count a step. Returns: whether it is time to call `show`."""
        self.done += 1
        self.bar.update()
        return self.done % self.every == 0

    def show(self, text, more=''):
        """Show `text` on the bar, and `text` and `more` in a log line, which on a terminal goes only to log.txt."""
        self.bar.set_postfix_str(text)
        LOG.log(logging.INFO if self.bar.disable else logging.DEBUG,
                f'{self.name} step {self.done}/{self.steps} {text}{more}')

    def close(self):
        self.bar.close()


def blend(targets, sources, keep):
    """Set target = keep * target + (1 - keep) * source for each pair of float32 tensors, in place, in one operator.

    This is Momentum with a learning rate of 0: the velocity becomes this sum, and the weights (sources) do not change.
    """
    import paddle
    with paddle.no_grad():
        rate = paddle.zeros([1], dtype=targets[0].dtype)
        paddle._C_ops.merged_momentum_(sources, sources, targets, [rate], None, keep, False, [], [], False, 1 - keep)
