"""Batches from worker processes: how their errors reach the program, and how they end."""
import atexit
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import weakref

import numpy as np
from paddle.io import DataLoader, Dataset

from runtime.program import STOP_SIGNALS, end_with_parent
from utils import UserError, blocked


class _Caught(Dataset):
    """The items of a dataset, an exception being returned in place of its item.

    Paddle's loader (2.6.2, 3.3.1) hangs when an item raises in the main process, and loses the message when it raises
    in a worker: so errors travel as batches, and `Loader` raises them.
    """

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        try:
            return self.dataset[item]
        except UserError as error:
            return error
        except Exception:
            return RuntimeError(f'while reading item {item}:\n{traceback.format_exc()}')


def _collate(items):
    """Batch of the items: uint8 [N, H, W, 3] and int64 [N], or of an exception: its pickle, uint8 [bytes], and [-1]."""
    for item in items:
        if isinstance(item, Exception):
            return np.frombuffer(pickle.dumps(item), dtype='uint8'), np.array([-1])
    images, labels = zip(*items)
    return np.stack(images), np.array(labels, dtype='int64')


def _start_worker(parent, worker):
    """Let a worker live as long as its parent: the parent alone answers STOP_SIGNALS, which all processes may get."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(_END, lambda number, frame: sys.exit())
    end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*STOP_SIGNALS, _END])


# what ends a worker: a signal that nobody else sends. Windows has none, nor workers that are forked
_END = getattr(signal, 'SIGRTMIN', None)
_WORKERS = weakref.WeakSet()  # of the loaders of this process


@atexit.register
def _end_workers():
    """End the workers of loaders that were left, before multiprocessing waits for them: its SIGTERM they ignore."""
    for process in multiprocessing.active_children():
        if process in _WORKERS:
            os.kill(process.pid, _END)


def _name_the_dead(paddles_handler):
    """A handler of SIGCHLD which, where Paddle's says that a worker has died, names it and what may be the cause."""
    causes = {'SIGKILL': 'memory may not suffice: use fewer data workers or smaller batches',
              'SIGBUS': '/dev/shm may be full: use fewer data workers, or start the container with a larger --shm-size'}

    def handler(number, frame):
        try:
            paddles_handler(number, frame)
        except Exception as error:
            for worker in list(_WORKERS):
                if worker.exitcode and worker.exitcode < 0:
                    name = signal.Signals(-worker.exitcode).name
                    raise UserError(f'data worker {worker.pid} was ended by {name}; '
                                    f'{causes.get(name, "see what sent it")}') from None
            raise error
    handler.is_ours = True
    return handler


def shared_memory(num_workers, batch_bytes, kept=1):
    """Bytes of /dev/shm that the loaders of this machine's processes need, and that are free; (0, 0) without workers.

    kept: batches that their user holds at a time. Paddle's loader (2.6.2, 3.3.1) has two for each worker on their way.
    """
    if not num_workers or not os.path.isdir('/dev/shm'):
        return 0, 0
    space = os.statvfs('/dev/shm')
    processes = int(os.environ.get('PADDLE_LOCAL_SIZE', 1))
    return processes * (2 * num_workers + kept) * batch_bytes, space.f_bavail * space.f_frsize


def _end_at_once(batches):
    """End an iterator of Paddle's loader (2.6.2, 3.3.1) that is not read to its end: its own thread keeps it alive."""
    batches._exit_thread_expectedly()
    for worker in batches._workers:
        if worker.is_alive():
            os.kill(worker.pid, _END)  # it may be in the middle of a batch
    batches._try_shutdown_all(1)


class Loader:
    """Iterates over batches of tensors (uint8 [N, H, W, 3], int64 [N]); `waited` adds up the seconds this took.

    Raises: UserError for an image that cannot be read, when it is read.
    """

    def __init__(self, dataset, batch_sampler, num_workers):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        # a worker whose parent is killed may wait for ever for what that was writing
        self.loader = DataLoader(_Caught(dataset), batch_sampler=batch_sampler, num_workers=num_workers,
                                 collate_fn=_collate, worker_init_fn=functools.partial(_start_worker, os.getpid()))
        self.waited = 0.0

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        others = set(multiprocessing.active_children())
        with blocked([*STOP_SIGNALS, _END]):  # in the workers too, until each has said what it does about them
            batches = iter(self.loader)
        _WORKERS.update(set(multiprocessing.active_children()) - others)
        if self.loader.num_workers and not hasattr(signal.getsignal(signal.SIGCHLD), 'is_ours'):
            signal.signal(signal.SIGCHLD, _name_the_dead(signal.getsignal(signal.SIGCHLD)))
        try:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - start
                if batch is None:
                    return
                images, labels = batch
                if images.ndim == 1:
                    raise pickle.loads(images.numpy().tobytes())
                yield images, labels
        finally:
            if self.loader.num_workers and not batches._shutdown:
                _end_at_once(batches)
