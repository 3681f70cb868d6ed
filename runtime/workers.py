"""Processes that read the items of a dataset into memory that they share with the process that uses them.

Paddle's own loader (2.6.2, 3.3.1) passes each batch on in a new file of /dev/shm, whose pages the system clears and
maps each time, and of which a container has 64 MB by default. Here batches take turns in memory that is shared from the
start and that the size of /dev/shm does not limit. Nothing here imports Paddle.
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

# batches that each worker has to read, or has read, at a time
PREFETCH = 2
_WORKERS = weakref.WeakSet()


@atexit.register
def _end_workers():
    """End workers that were left, before multiprocessing waits for them: the SIGTERM that it sends is ignored."""
    for process in _WORKERS:
        process.kill()


def default_workers():
    """Data workers of this process where nobody says how many: its share of the cores less one, from 1 to 8."""
    return max(1, min(8, cores_per_process() - 1))


def _shared_array(shape, dtype):
    """Zeros in memory that processes forked from now on share. Raises: UserError where there is not so much."""
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, max(1, size))
    except OSError as error:
        raise UserError(f'no memory for the batches of data workers, {size >> 20} MiB ({error.strerror}); use fewer '
                        'workers or smaller batches') from None
    return np.frombuffer(memory, dtype, count).reshape(shape)


def read_items(dataset, items, images, labels, place):
    """Put the images and labels of a dataset's items into arrays, [N, H, W, 3] and [N]. place: where to say which one.

    Returns: the exception that one has raised, with its traceback unless it is a UserError; None otherwise.
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
    """While it is open, no garbage is collected.

    A new process would end objects of Paddle (2.6.2, 3.3.1) that wait for threads, which it does not have.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _start_worker(parent):
    """Let a worker live as long as its parent: the parent alone answers STOP_SIGNALS, which all processes may get.

    What the parent has left as garbage stays.
    """
    end_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()
    gc.enable()


def _work(dataset, images, labels, place, connection, parent):
    """What a worker does: for each (slot, items) that it receives, read the items into the slot, send what came of it.
    """
    _start_worker(parent)
    while True:
        slot, items = connection.recv()
        connection.send(read_items(dataset, items, images[slot], labels[slot], place))


def _death(worker):
    """The error that a worker has ended, and what may be the cause."""
    worker.join()
    if worker.exitcode == -signal.SIGKILL:
        cause = 'memory may not suffice: use fewer data workers or smaller batches'
    else:
        cause = 'see what ended it'
    how = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f'exit status {worker.exitcode}'
    return UserError(f'data worker {worker.pid} was ended by {how}; {cause}')


class Workers:
    """`count` processes (0: this one) that read batches of a dataset's items, until `end`.

    batch_size: the largest number of items in a batch. dataset.shape: that of its images, (H, W, 3), uint8.
    places: of each worker, the index of the item that it reads.
    """

    def __init__(self, dataset, batch_size, count):
        self.dataset = dataset
        self.places = _shared_array([max(1, count)], 'int64')
        self.images = _shared_array([PREFETCH * count, batch_size, *dataset.shape], 'uint8')
        self.labels = _shared_array([PREFETCH * count, batch_size], 'int64')
        self.workers, self.connections = [], []
        for number in range(count):
            mine, its = multiprocessing.get_context('fork').Pipe()
            worker = multiprocessing.get_context('fork').Process(
                target=_work, daemon=True,
                args=[dataset, self.images, self.labels, self.places[number:number + 1], its, os.getpid()])
            with blocked(STOP_SIGNALS), _without_collection():  # in the worker too, until `_start_worker`
                worker.start()
            its.close()  # its end of the connection is seen here then
            _WORKERS.add(worker)
            self.workers.append(worker)
            self.connections.append(mine)

    def end(self):
        for worker in self.workers:
            worker.kill()  # it may be in the middle of an image, and has nothing to clean up
        for worker in self.workers:
            worker.join(1)  # not for ever: one that waits for a dead disk does not end
        self.images = None  # Paddle's loader (2.6.2, 3.3.1) keeps its last iterator, and with it this object

    def read(self, batches):
        """Yield (uint8 [N, H, W, 3], int64 [N]) of batches of items, in their order.

        Raises: what an item raises; UserError when a worker has ended.
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
            slot = number % slots  # which is free now; a slot always has the same worker
            with self._watching(slot) as connection:
                connection.send((slot, items))
            sent.append((slot, len(items)))
            if done:
                yield done
        while sent:
            yield self._receive(*sent.popleft())

    def _receive(self, slot, length):
        """Copies of the images and labels that a worker has in a slot, when they are read."""
        with self._watching(slot) as connection:
            error = connection.recv()
        if error:
            raise error
        return self.images[slot, :length].copy(), self.labels[slot, :length].copy()

    @contextlib.contextmanager
    def _watching(self, slot):
        """Gives the connection to the worker of a slot. Raises: UserError when it turns out that it has ended."""
        number = slot % len(self.workers)
        try:
            yield self.connections[number]
        except (EOFError, OSError):
            raise _death(self.workers[number]) from None
