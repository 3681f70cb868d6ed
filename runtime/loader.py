"""Batches of a dataset as tensors on the device: how they are waited for, and how their errors reach the program."""
import contextlib
import queue
import sys
import threading
import time

import paddle
from paddle.io import DataLoader, IterableDataset
from paddle.utils.dlpack import from_dlpack

from runtime.program import cores_per_process
from runtime.workers import Workers, default_workers
from utils import LOG, UserError

# seconds of waiting for a batch after which it is said, and again
PATIENCE = 60
# what makes an iteration slow: waits of more than this share of its time, and of more than these seconds
SLOW_SHARE, SLOW_SECONDS = 0.2, 10


class StoppedWaiting(Exception):
    """Raised by a loader that waits for a batch when its user should stop."""


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


def warn_of_waiting(num_workers, share):
    """Log that waiting for images takes this share of the time, and what to do about it."""
    cores = cores_per_process()
    if num_workers < cores - 1:
        more = min(cores - 1, 2 * num_workers or 8)
        remedy = f'set DATA.NUM_WORKERS {more} (now {num_workers}; cores: {cores})'
    else:
        remedy = (f'use more cores, a faster disk, or images that are resized beforehand; more than {num_workers} data '
                  f'workers would hardly help (cores: {cores})')
    LOG.warning(f'warning: {share:.0%} of the time is spent waiting for images: {remedy}')


class _Stream(IterableDataset):
    """The batches of `Workers` for Paddle's loader, which copies them to the device while the device computes.

    It hangs when its dataset raises (2.6.2, 3.3.1): an error ends the stream and is kept as `error`. thread: Paddle's,
    which reads it.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.error = self.thread = None

    def __iter__(self):
        self.thread = threading.current_thread()
        try:
            for images, labels in self.batches:
                # to_tensor would copy the images (as this does on 2.6.2), and hold up Python's other threads for it
                yield from_dlpack(images.__dlpack__()), labels
        except Exception as error:
            self.error = error


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

    dataset: of (uint8 [H, W, 3], label); has `shape`, (H, W, 3), and name_of(index).
    batch_sampler: yields lists of items; has `batch_size`, the length of the longest.
    num_workers: processes that read images; 0: none, this one does; -1: `default_workers`. As an attribute, how many
    there are.
    timeout: seconds after which a wait for a batch is an error; 0: never.
    should_stop(): whether a wait is to end by StoppedWaiting, asked a few times a second.
    on_slow(share): called at most once in an iteration, when waiting for batches takes too much of the time (`Waits`).
    Raises: UserError for an image that cannot be read, when it is read, and after the timeout.
    """

    def __init__(self, dataset, batch_sampler, num_workers, timeout=0):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        # elsewhere there is no fork, or it breaks the system's libraries (macOS)
        self.num_workers = 0 if sys.platform != 'linux' else default_workers() if num_workers < 0 else num_workers
        self.timeout = timeout
        self.should_stop = lambda: False
        self.on_slow = lambda share: None
        self.waited = 0.0

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        workers = Workers(self.dataset, self.batch_sampler.batch_size, self.num_workers)
        stream = _Stream(workers.read(self.batch_sampler))
        batches = iter(DataLoader(stream, batch_size=None))
        requests, results = queue.SimpleQueue(), queue.SimpleQueue()
        place = paddle.framework._current_expected_place()
        thread = threading.Thread(target=_fetch, args=[batches, place, requests, results], daemon=True)
        thread.start()
        waits = Waits(self.on_slow)
        try:
            while True:
                start = time.perf_counter()
                requests.put(True)
                batch = self._wait(results, workers)
                end = time.perf_counter()
                self.waited += end - start
                waits.add(start, end)
                if stream.error and not batch:
                    raise stream.error
                if batch is None:
                    return
                if isinstance(batch, Exception):
                    raise batch
                yield tuple(batch)
        finally:
            requests.put(None)
            batches._shutdown = True  # or it would wait, at exit too, for its thread, which may read from a dead disk
            batches._exit_thread_expectedly()
            workers.end()
            # one in C++ code when Python ends would abort the process; one that ends while it forks may stop a worker
            for ending in filter(None, [thread, stream.thread]):
                ending.join(1)

    def _wait(self, results, workers):
        """What is put into results next. Says after a minute at which items the workers are."""
        start = said = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return results.get(timeout=0.2)
            if self.should_stop():
                raise StoppedWaiting
            now = time.monotonic()
            if self.timeout and now - start > self.timeout:
                raise UserError(f'no batch for {self.timeout} seconds, {self._places(workers)}; check the disk and the '
                                'file')
            if now - said > PATIENCE:
                said = now
                LOG.info(f'no batch for {now - start:.0f} seconds, {self._places(workers)}')

    def _places(self, workers):
        return ', '.join(f'worker {worker} is at {self.dataset.name_of(index)}'
                         for worker, index in enumerate(workers.places))
