"""Worker processes that read dataset items into memory shared with the main process.

Paddle's own loader (2.6.2, 3.3.1) passes each batch in a new file in /dev/shm, whose pages the system clears and
maps each time; a container has 64 MB of it by default. Here, batches reuse memory that is shared from the start and not
limited by the size of /dev/shm. Nothing here imports Paddle.
"""
import atexit
import collections
import contextlib
import gc
import math
import mmap
import multiprocessing
import os
import signal
import traceback
import weakref

import numpy as np

from runtime.program import STOP_SIGNALS, cores_per_process, end_with_parent
from utils import UserError, blocked

# batches per worker that are queued or waiting to be used
PREFETCH = 2
_WORKERS = weakref.WeakSet()


@atexit.register
def _end_workers():
    """Kill leftover workers before multiprocessing waits for them: they ignore the SIGTERM that it sends."""
    for process in _WORKERS:
        process.kill()


def default_workers():
    """Return the default number of data workers: this process's share of the cores minus one, from 1 to 8."""
    return max(1, min(8, cores_per_process() - 1))


def _shared_array(shape, dtype):
    """Return an array of zeros in memory shared with processes forked later. Raises: UserError if memory is short."""
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, max(1, size))
    except OSError as error:
        raise UserError(f'not enough memory for the batches of the data workers, {size >> 20} MiB ({error.strerror}); '
                        'use fewer workers or smaller batches') from None
    return np.frombuffer(memory, dtype, count).reshape(shape)


def read_items(dataset, items, images, labels, place):
    """Read dataset items into arrays of images, [N, H, W, 3], and labels, [N]. place: receives the current index.

    Returns: None, or the exception that an item raised: a UserError as it is, others as a RuntimeError with traceback.
    """
    for number, item in enumerate(items):
        place[...] = item[1] if isinstance(item, tuple) else item
        try:
            images[number], labels[number] = dataset[item]
        except UserError as error:
            return error
        except Exception:
            return RuntimeError(f'while reading item {item}:\n{traceback.format_exc()}')
    return None


@contextlib.contextmanager
def _without_collection():
    """Disable garbage collection.

    In a forked process it would destroy Paddle objects (2.6.2, 3.3.1) that wait for threads of the parent.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _start_worker(parent):
    """Tie a worker's life to its parent: only the parent handles STOP_SIGNALS, which all processes may receive.

    Garbage inherited from the parent is never collected (see `_without_collection`).
    """
    end_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()
    gc.enable()


def _work(dataset, images, labels, place, connection, parent):
    """Run a worker: for each (slot, items) received, read the items into the slot and send back an error or None."""
    _start_worker(parent)
    while True:
        slot, items = connection.recv()
        connection.send(read_items(dataset, items, images[slot], labels[slot], place))


def _exit_error(worker):
    """Return the error for a worker that has ended, with the likely cause."""
    worker.join()
    if worker.exitcode == -signal.SIGKILL:
        cause = 'probably out of memory: use fewer data workers or smaller batches'
    else:
        cause = 'find out what ended it'
    how = (f'was killed by {signal.Signals(-worker.exitcode).name}' if worker.exitcode < 0 else
           f'ended with exit status {worker.exitcode}')
    return UserError(f'data worker {worker.pid} {how}; {cause}')


class Workers:
    """`count` processes (0: this one) that read batches of dataset items, until `end`.

    batch_size: the largest number of items in a batch. dataset.shape: shape of its uint8 images, (H, W, 3).
    places: the index of the item that each worker is reading.
    """

    def __init__(self, dataset, batch_size, count):
        self.dataset = dataset
        self.places = _shared_array([max(1, count)], 'int64')
        self.images = _shared_array([PREFETCH * count, batch_size, *dataset.shape], 'uint8')
        self.labels = _shared_array([PREFETCH * count, batch_size], 'int64')
        self.workers, self.connections = [], []
        for number in range(count):
            ours, theirs = multiprocessing.get_context('fork').Pipe()
            worker = multiprocessing.get_context('fork').Process(
                target=_work, daemon=True,
                args=[dataset, self.images, self.labels, self.places[number:number + 1], theirs, os.getpid()])
            with blocked(STOP_SIGNALS), _without_collection():  # in the worker too, until `_start_worker`
                worker.start()
            theirs.close()  # so that the parent notices when the worker ends
            _WORKERS.add(worker)
            self.workers.append(worker)
            self.connections.append(ours)

    def end(self):
        for worker in self.workers:
            worker.kill()  # may interrupt the reading of an image; nothing needs cleanup
        for worker in self.workers:
            worker.join(1)  # not forever: a worker stuck on a dead disk does not end
        self.images = None  # Paddle's loader (2.6.2, 3.3.1) keeps its last iterator, and thus this object, alive

    def read(self, batches):
        """Yield (uint8 [N, H, W, 3], int64 [N]) for each batch of items, in order.

        Raises: what an item raises; UserError if a worker has ended.
        """
        return self._read_by_workers(batches) if self.workers else self._read_here(batches)

    def _read_here(self, batches):
        for items in batches:
            images, labels = np.empty([len(items), *self.dataset.shape], 'uint8'), np.empty(len(items), 'int64')
            error = read_items(self.dataset, items, images, labels, self.places)
            if error:
                raise error
            yield images, labels

    def _read_by_workers(self, batches):
        sent, slots = collections.deque(), PREFETCH * len(self.workers)
        for number, items in enumerate(batches):
            done = self._receive(*sent.popleft()) if len(sent) == slots else None
            slot = number % slots  # free by now; a slot always belongs to the same worker
            with self._watching(slot) as connection:
                connection.send((slot, items))
            sent.append((slot, len(items)))
            if done:
                yield done
        while sent:
            yield self._receive(*sent.popleft())

    def _receive(self, slot, length):
        """Wait until a worker has filled a slot, and return copies of its images and labels."""
        with self._watching(slot) as connection:
            error = connection.recv()
        if error:
            raise error
        return self.images[slot, :length].copy(), self.labels[slot, :length].copy()

    @contextlib.contextmanager
    def _watching(self, slot):
        """Yield the connection to a slot's worker. Raises: UserError if that worker has ended."""
        number = slot % len(self.workers)
        try:
            yield self.connections[number]
        except (EOFError, OSError):
            raise _exit_error(self.workers[number]) from None
