"""Data workers: which signals they answer, and how they end."""
import contextlib
import multiprocessing
import signal
import time

import numpy as np
from conftest import run
from paddle.io import Dataset

import runtime.loader
from datasets import get_dataloader, get_dataset
from runtime.loader import Loader
from runtime.program import STOP_SIGNALS


def test_a_worker_never_answers_a_signal_that_stops_a_run(config, fashion, monkeypatch):
    """Nor before it ignores them: they are blocked while it is made."""
    start = runtime.loader._start_worker

    def checked(parent, worker):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= set(STOP_SIGNALS)
        start(parent, worker)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
    monkeypatch.setattr(runtime.loader, '_start_worker', checked)
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.NUM_WORKERS = 1
    loader = get_dataloader(config, get_dataset(config))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(list(loader)) == len(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_other_processes_are_left_alone_at_the_end(tmp_path):
    """Those that another part of the program has made, and multiprocessing ends."""
    code = f"""
import multiprocessing, pathlib, signal, time
import datasets

def work(ready):
    signal.signal(signal.SIGUSR1, lambda number, frame: pathlib.Path({str(tmp_path / 'signalled')!r}).touch())
    ready.set()
    time.sleep(600)
context = multiprocessing.get_context('fork')
ready = context.Event()
context.Process(target=work, args=[ready], daemon=True).start()
ready.wait()"""
    run('-c', code)
    assert not (tmp_path / 'signalled').exists()


class Images(Dataset):
    """A thousand images, each of which takes some seconds."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return np.zeros([2, 2, 3], 'uint8'), index


def test_busy_workers_end_at_once():
    loader = Loader(Images(1), [[index] for index in range(3)] + [list(range(100))] * 20, num_workers=3)
    with contextlib.closing(iter(loader)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 3
        began = time.monotonic()
    assert time.monotonic() - began < 3 and multiprocessing.active_children() == []


def test_workers_that_have_hardly_started_end_at_once(monkeypatch):
    """A signal that finds them without an answer to it would be an error of the loader's."""
    start = runtime.loader._start_worker

    def late(parent, worker):
        time.sleep(worker)
        start(parent, worker)
    monkeypatch.setattr(runtime.loader, '_start_worker', late)
    with contextlib.closing(iter(Loader(Images(0), [[index] for index in range(100)], num_workers=2))) as batches:
        next(batches)
    time.sleep(0.1)
    assert multiprocessing.active_children() == []
