"""Load batches of a dataset as tensors on the device, wait for them, and pass worker errors to the program."""
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

# seconds between log lines while waiting for a batch
PATIENCE = 60
# an iteration is slow when its waits exceed this share of its time and this many seconds
SLOW_SHARE, SLOW_SECONDS = 0.2, 10


class StoppedWaiting(Exception):
    """Raised by a loader if `should_stop` returns true while it waits for a batch."""


class Waits:
    """Adds up the time an iteration waits for batches, and calls on_slow(share of the total time) once if it is slow.

    The first wait does not count, because it includes the start of the workers.
    """

    def __init__(self, on_slow):
        self.on_slow = on_slow
        self.began = None
        self.seconds = 0.0

    def add(self, start, end):
        """Count a wait from start to end, in seconds of the same clock."""
        if self.began is None:
            self.began = end
            return
        self.seconds += end - start
        if self.on_slow and self.seconds > max(SLOW_SECONDS, SLOW_SHARE * (end - self.began)):
            self.on_slow(self.seconds / (end - self.began))
            self.on_slow = None


def warn_of_waiting(num_workers, share):
    """Log the share of the time spent waiting for images, and what to do about it."""
    cores = cores_per_process()
    if num_workers < cores - 1:
        more = min(cores - 1, 2 * num_workers or 8)
        remedy = f'set DATA.NUM_WORKERS {more} (now {num_workers}; cores: {cores})'
    else:
        remedy = (f'use more cores, a faster disk, or images resized in advance; more than {num_workers} data workers '
                  f'would hardly help (cores: {cores})')
    LOG.warning(f'warning: {share:.0%} of the time is spent waiting for images: {remedy}')


class _Stream(IterableDataset):
    """Feeds the batches of `Workers` to Paddle's DataLoader, which copies them to the device while it computes.

    The DataLoader hangs when its dataset raises (2.6.2, 3.3.1), so an error ends the stream and is kept as `error`.
    thread: the DataLoader's thread that reads the stream.
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.error = self.thread = None

    def __iter__(self):
        self.thread = threading.current_thread()
        try:
            for images, labels in self.batches:
                # to_tensor would copy the images (2.6.2 does so here too) while holding the GIL
                yield from_dlpack(images.__dlpack__()), labels
        except Exception as error:
            self.error = error


def _fetch(batches, place, requests, results):
    """For each request, put the next batch, None at the end, or the error into results. None ends the thread.

    Runs in a thread, because a thread that waits for a batch in Paddle's code (2.6.2, 3.3.1) cannot handle signals.
    """
    paddle.framework._set_expected_place(place)  # threads do not inherit it
    while requests.get():
        try:
            results.put(next(batches, None))
        except Exception as error:
            results.put(error)


class Loader:
    """Iterates over batches of tensors (uint8 [N, H, W, 3], int64 [N]); `waited` counts the seconds spent waiting.

    dataset: yields (uint8 [H, W, 3], label); has `shape`, (H, W, 3), and name_of(index).
    batch_sampler: yields lists of items; has `batch_size`, the length of the longest list.
    num_workers: processes that read images; 0: read in this process; -1: `default_workers`, which the
        attribute then contains.
    timeout: longest wait for a batch in seconds, after which it is an error; 0: no limit.
    should_stop(): polled a few times a second while waiting; if true, the wait ends with StoppedWaiting.
    on_slow(share): called at most once per iteration, if waiting for batches takes too much of the time (`Waits`).
    Raises: UserError when it reaches an image that cannot be read, and after the timeout.
    """

    def __init__(self, dataset, batch_sampler, num_workers, timeout=0):
        self.dataset = dataset
        self.batch_sampler = batch_sampler
        # other systems have no fork, or it breaks system libraries (macOS)
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
            batches._shutdown = True  # or it waits, even at exit, for its thread, which may be stuck on a dead disk
            batches._exit_thread_expectedly()
            workers.end()
            # a thread in C++ code when Python exits would abort the process; one that ends during a fork may block the
            # new worker
            for ending in filter(None, [thread, stream.thread]):
                ending.join(1)

    def _wait(self, results, workers):
        """Return the next entry of results; after PATIENCE seconds, log which items the workers are reading."""
        start = logged = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                return results.get(timeout=0.2)
            if self.should_stop():
                raise StoppedWaiting
            now = time.monotonic()
            if self.timeout and now - start > self.timeout:
                raise UserError(f'no batch for {self.timeout} seconds, {self._places(workers)}; check the disk and the '
                                'file')
            if now - logged > PATIENCE:
                logged = now
                LOG.info(f'no batch for {now - start:.0f} seconds, {self._places(workers)}')

    def _places(self, workers):
        return ', '.join(f'worker {worker} is reading {self.dataset.name_of(index)}'
                         for worker, index in enumerate(workers.places))
