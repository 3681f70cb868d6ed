"""Batches from worker processes: how their errors reach the program, and how they end."""
import atexit
import contextlib
import functools
import mmap
import multiprocessing
import os
import pickle
import queue
import re
import signal
import sys
import threading
import time
import traceback
import weakref

import numpy as np
import paddle
from paddle.io import DataLoader, Dataset, get_worker_info
from paddle.io.dataloader.dataloader_iter import _DataLoaderIterMultiProcess, _set_SIGCHLD_handler

from runtime.program import STOP_SIGNALS, cores_per_process, end_with_parent, environment_number
from utils import LOG, UserError, blocked

# seconds of waiting for a batch after which it is said, and again
PATIENCE = 60
# what makes an iteration slow: waits of more than this share of its time, and of more than these seconds
SLOW_SHARE, SLOW_SECONDS = 0.2, 10


class StoppedWaiting(Exception):
    """Raised by a loader that waits for a batch when its user should stop."""


class _Caught(Dataset):
    """The items of a dataset, an exception being returned in place of its item; `places` says at which each worker is.

    Paddle's loader (2.6.2, 3.3.1) hangs when an item raises in the main process, and loses the message when it raises
    in a worker: so errors travel as batches, and `Loader` raises them.
    """

    def __init__(self, dataset, num_workers):
        super().__init__()
        self.dataset = dataset
        # memory that the workers share, of each: the index of the item that it reads
        self.places = np.frombuffer(mmap.mmap(-1, 8 * max(1, num_workers)), 'int64')

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        worker = get_worker_info()
        self.places[worker.id if worker else 0] = item[1] if isinstance(item, tuple) else item
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


# one that fails while it is made has nothing to shut down that `_end_workers` does not end; 2.6.2 asks nevertheless
_DataLoaderIterMultiProcess._shutdown = True
# what ends a worker: a signal that nobody else sends. Windows has none, nor workers that are forked
_END = getattr(signal, 'SIGRTMIN', None)
_WORKERS = weakref.WeakSet()  # of the loaders of this process


@atexit.register
def _end_workers():
    """End the workers of loaders that were left, before multiprocessing waits for them: its SIGTERM they ignore."""
    for process in multiprocessing.active_children():
        if process in _WORKERS:
            os.kill(process.pid, _END)


def _death(pid, name):
    """The error that a worker was ended by the signal of this name, and what may be the cause."""
    causes = {'SIGKILL': 'memory may not suffice: use fewer data workers or smaller batches',
              'SIGBUS': '/dev/shm may be full: use fewer data workers, or start the container with a larger --shm-size'}
    return UserError(f'data worker {pid} was ended by {name}; {causes.get(name, "see what sent it")}')


def _name_the_dead():
    """Let Paddle's handler of SIGCHLD, which raises when a worker has died, name it (2.6.2, 3.3.1)."""
    _set_SIGCHLD_handler()
    paddles_handler = signal.getsignal(signal.SIGCHLD)
    if hasattr(paddles_handler, 'is_ours'):
        return
    names = {signal.strsignal(number): number.name for number in signal.Signals}

    def handler(number, frame):
        try:
            paddles_handler(number, frame)
        except Exception as error:
            found = re.search(r'pid (\d+)\) exited is killed by signal: ([^.]+)', str(error))
            if found and found[2] in names:
                raise _death(found[1], names[found[2]]) from None
            raise
    handler.is_ours = True
    signal.signal(signal.SIGCHLD, handler)


def default_workers():
    """Data workers of this process where nobody says how many: its share of the cores less one, from 1 to 8."""
    return max(1, min(8, cores_per_process() - 1))


class Waits:
    """Adds up an iteration's waits for batches, and calls on_slow(their share of the time) once when it is slow.

    The first wait does not count, for the workers start in it.
    """

    def __init__(self, on_slow):
        self.on_slow = on_slow
        self.began = None
        self.seconds = 0.0

    def add(self, start, end):
        """Count a wait from start to end, in seconds of one clock."""
        if self.began is None:
            self.began = end
            return
        self.seconds += end - start
        if self.on_slow and self.seconds > max(SLOW_SECONDS, SLOW_SHARE * (end - self.began)):
            self.on_slow(self.seconds / (end - self.began))
            self.on_slow = None


def shared_memory(num_workers, batch_bytes, kept=1):
    """Bytes of /dev/shm that the loaders of this machine's processes need, and that are free; (0, 0) without workers.

    kept: batches that their user holds at a time. Paddle's loader (2.6.2, 3.3.1) has two for each worker on their way.
    """
    if not num_workers or not os.path.isdir('/dev/shm'):
        return 0, 0
    space = os.statvfs('/dev/shm')
    processes = environment_number('PADDLE_LOCAL_SIZE', 1)
    return processes * (2 * num_workers + kept) * batch_bytes, space.f_bavail * space.f_frsize


def _end_at_once(batches):
    """End an iterator of Paddle's loader (2.6.2, 3.3.1) that is not read to its end: its own thread keeps it alive."""
    if not hasattr(batches, '_workers'):
        batches._shutdown = True  # or it would wait, at exit too, for its thread, which may read from a dead disk
        batches._exit_thread_expectedly()
        return
    batches._exit_thread_expectedly()
    workers = batches._workers
    for worker in workers:
        if worker.is_alive():
            os.kill(worker.pid, _END)  # it may be in the middle of a batch
    batches._try_shutdown_all(0)
    deadline = time.monotonic() + 1
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join(1)


def _fetch(batches, place, requests, results):
    """Put the next batch, None at the end, or the error into results for each request, until there is one of None.

    In a thread, for who waits for a batch in Paddle's own code (2.6.2, 3.3.1) cannot answer a signal.
    """
    paddle.framework._set_expected_place(place)  # which a thread does not inherit
    while requests.get():
        try:
            results.put(next(batches, None))
        except Exception as error:
            results.put(error)


class Loader:
    """Iterates over batches of tensors (uint8 [N, H, W, 3], int64 [N]); `waited` adds up the seconds this took.

    num_workers: processes that read images; 0: none, this one does; -1: `default_workers`. As an attribute, how many
    there are.
    timeout: seconds after which a wait for a batch is an error; 0: never.
    should_stop(): whether a wait is to end by StoppedWaiting, asked a few times a second.
    on_slow(share): called at most once in an iteration, when waiting for batches takes too much of the time (`Waits`).
    Raises: UserError for an image that cannot be read, when it is read, and after the timeout.
    """

    def __init__(self, dataset, batch_sampler, num_workers, timeout=0):
        num_workers = default_workers() if num_workers < 0 else num_workers
        self.dataset = dataset
        self.timeout = timeout
        self.should_stop = lambda: False
        self.on_slow = lambda share: None
        self.caught = _Caught(dataset, num_workers)
        self.batch_sampler = batch_sampler
        # a worker whose parent is killed may wait for ever for what that was writing
        self.loader = DataLoader(self.caught, batch_sampler=batch_sampler, num_workers=num_workers,
                                 collate_fn=_collate, worker_init_fn=functools.partial(_start_worker, os.getpid()))
        self.num_workers = self.loader.num_workers  # Paddle has none where they cannot be forked
        self.waited = 0.0

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        others = set(multiprocessing.active_children())
        if self.num_workers:
            _name_the_dead()
        try:
            with blocked([*STOP_SIGNALS, _END]):  # in the workers too, until each has said what it does about them
                batches = iter(self.loader)
        finally:  # one may have died by now
            _WORKERS.update(set(multiprocessing.active_children()) - others)
        requests, results = queue.SimpleQueue(), queue.SimpleQueue()
        place = paddle.framework._current_expected_place()
        thread = threading.Thread(target=_fetch, args=[batches, place, requests, results], daemon=True)
        thread.start()
        waits = Waits(self.on_slow)
        try:
            while True:
                start = time.perf_counter()
                requests.put(True)
                batch = self._wait(results)
                end = time.perf_counter()
                self.waited += end - start
                waits.add(start, end)
                if batch is None:
                    return
                if isinstance(batch, Exception):
                    # of a worker that dies before Paddle knows its number there is no signal
                    for worker in getattr(batches, '_workers', []):
                        if worker.exitcode and worker.exitcode < 0:
                            raise _death(worker.pid, signal.Signals(-worker.exitcode).name) from None
                    raise batch
                images, labels = batch
                if images.ndim == 1:
                    raise pickle.loads(images.numpy().tobytes())
                yield images, labels
        finally:
            requests.put(None)
            if not batches._shutdown:
                _end_at_once(batches)
            if self.num_workers:
                thread.join(1)  # it may be waiting for the workers' end too, of which only one of two waits learns

    def _wait(self, results):
        """What is put into results next. Says after a minute at which items the workers are."""
        start = said = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return results.get(timeout=0.2)
            if self.should_stop():
                raise StoppedWaiting
            now = time.monotonic()
            if self.timeout and now - start > self.timeout:
                raise UserError(f'no batch for {self.timeout} seconds, {self._places()}; check the disk and the file')
            if now - said > PATIENCE:
                said = now
                LOG.info(f'no batch for {now - start:.0f} seconds, {self._places()}')

    def _places(self):
        return ', '.join(f'worker {worker} is at {self.dataset.name_of(index)}'
                         for worker, index in enumerate(self.caught.places))
