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
from utils import UserError


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
    signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit())
    end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WORKERS_SIGNALS)


# a worker inherits their block, until it has said what it does about them
_WORKERS_SIGNALS = (*STOP_SIGNALS, signal.SIGUSR1)
_WORKERS = weakref.WeakSet()  # of the loaders of this process


@atexit.register
def _end_workers():
    """End the workers of loaders that were left, before multiprocessing waits for them: its SIGTERM they ignore."""
    for process in multiprocessing.active_children():
        if process in _WORKERS:
            os.kill(process.pid, signal.SIGUSR1)


def _end_at_once(batches):
    """End an iterator of Paddle's loader (2.6.2, 3.3.1) that is not read to its end: its own thread keeps it alive."""
    batches._exit_thread_expectedly()
    for worker in batches._workers:
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGUSR1)  # it may be in the middle of a batch
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
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _WORKERS_SIGNALS)
        others = set(multiprocessing.active_children())
        try:
            batches = iter(self.loader)
            _WORKERS.update(set(multiprocessing.active_children()) - others)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
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
