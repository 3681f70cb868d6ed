"""The loader and its data workers: batches, errors, signals, memory, waiting, and how workers end."""
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
from conftest import ROOT, options, run
from paddle.io import Dataset

import runtime.loader
import runtime.workers
from datasets import get_dataloader, get_dataset
from runtime.loader import Loader, StoppedWaiting, Waits, warn_of_waiting
from runtime.program import STOP_SIGNALS, cores_per_process
from runtime.workers import PREFETCH, default_workers
from utils import LOG, UserError


def test_workers_ignore_stop_signals(config, fashion, monkeypatch):
    """The signals are blocked until a new worker ignores them."""
    start = runtime.workers._start_worker

    def checked(parent):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= set(STOP_SIGNALS)
        start(parent)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in STOP_SIGNALS)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOP_SIGNALS)
    monkeypatch.setattr(runtime.workers, '_start_worker', checked)
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.NUM_WORKERS = 1
    loader = get_dataloader(config, get_dataset(config))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(list(loader)) == len(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_other_processes_are_left_alone_at_the_end(tmp_path):
    """Processes that other parts of the program started are left to multiprocessing."""
    code = f"""
import multiprocessing, pathlib, signal, time
import datasets

def work(ready):
    signal.signal(signal.SIGRTMIN, lambda number, frame: pathlib.Path({str(tmp_path / 'signalled')!r}).touch())
    ready.set()
    time.sleep(600)
context = multiprocessing.get_context('fork')
ready = context.Event()
context.Process(target=work, args=[ready], daemon=True).start()
ready.wait()"""
    run('-c', code)
    assert not (tmp_path / 'signalled').exists()


class Images(Dataset):
    """A thousand images that each take some seconds to read."""

    def __init__(self, seconds, side=2):
        super().__init__()
        self.seconds = seconds
        self.shape = side, side, 3

    def __len__(self):
        return 1000

    def name_of(self, index):
        return f'image {index}'

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return np.full(self.shape, index % 256, 'uint8'), index


class Batches(list):
    """Lists of items."""

    @property
    def batch_size(self):
        return max(map(len, self))


def test_busy_workers_end_immediately():
    loader = Loader(Images(1), Batches([[index] for index in range(3)] + [list(range(100))] * 20), num_workers=3)
    with contextlib.closing(iter(loader)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 3
        began = time.monotonic()
    assert time.monotonic() - began < 3 and multiprocessing.active_children() == []


def test_starting_workers_end_immediately(monkeypatch):
    start = runtime.workers._start_worker

    def late(parent):
        time.sleep(2)
        start(parent)
    loader = Loader(Images(0), Batches([index] for index in range(100)), num_workers=2)
    monkeypatch.setattr(runtime.workers, '_start_worker', late)
    loader.should_stop = lambda: True
    began = time.monotonic()
    with pytest.raises(StoppedWaiting):
        next(iter(loader))
    assert time.monotonic() - began < 1.5 and multiprocessing.active_children() == []


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_batches_match_the_sampler_even_if_kept(workers):
    """Batches come in order, have any length, and are not overwritten by later ones that reuse shared memory."""
    batches = Batches(list(range(start, start + 1 + start % 5)) for start in range(0, 60, 3))
    loader = Loader(Images(0), batches, workers)
    for _ in range(2):
        read = list(loader)
        assert [labels.tolist() for _, labels in read] == batches
        for images, labels in read:
            assert images.dtype == paddle.uint8 and images.shape == [len(labels), 2, 2, 3]
            assert (images.numpy() == labels.numpy()[:, None, None, None]).all()


def test_large_batches():
    """Their lists of items and labels exceed the buffer of a connection."""
    loader = Loader(Images(0, 1), Batches([[index % 1000 for index in range(50000)]] * 3), 1)
    assert [len(labels) for _, labels in loader] == [50000] * 3


def test_batches_that_do_not_fit_into_memory():
    loader = Loader(Images(0, 10 ** 6), Batches([[0] * 100]), 1)
    with pytest.raises(UserError, match='not enough memory for the batches .*, 572204589 MiB .*; use fewer'):
        next(iter(loader))


class Faulty(Images):
    """Reading one of its images fails."""

    def __getitem__(self, index):
        if index == 7:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('error, message', [
    (UserError('image 7: is bad'), 'image 7: is bad'),
    (KeyError('x'), "(?s)while reading item 7:\nTraceback.*KeyError: 'x'"),
])
def test_errors_come_after_earlier_batches(workers, error, message):
    dataset = Faulty(0)
    dataset.error = error
    batches, read = iter(Loader(dataset, Batches([index] for index in range(20)), workers)), []
    with pytest.raises(UserError if isinstance(error, UserError) else RuntimeError, match=message):
        for _, labels in batches:
            read.append(int(labels))
    assert read == list(range(7)) and multiprocessing.active_children() == []


class Knot:
    """A reference cycle that data workers must not collect: see `_without_collection`."""

    def __init__(self, pid):
        self.pid = pid
        self.knot = self

    def __del__(self):
        if os.getpid() != self.pid:
            os.kill(os.getpid(), signal.SIGKILL)


class Collecting(Images):
    """Reading an image collects garbage."""

    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


def test_workers_do_not_collect_garbage_of_their_parent(monkeypatch):
    after_fork = multiprocessing.process.BaseProcess._after_fork
    monkeypatch.setattr(multiprocessing.process.BaseProcess, '_after_fork',
                        staticmethod(lambda: gc.isenabled() and gc.collect() or after_fork()))
    gc.disable()
    Knot(os.getpid())
    gc.enable()
    assert len(list(Loader(Collecting(0), Batches([[0], [1]]), 2))) == 2 and gc.isenabled()


def test_a_worker_without_work_may_end():
    loader = Loader(Images(0), Batches([[0], [1]]), 3)
    batches = iter(loader)
    assert int(next(batches)[1]) == 0
    last = max(multiprocessing.active_children(), key=lambda process: process.pid)
    last.kill()
    assert [int(labels) for _, labels in batches] == [1] and multiprocessing.active_children() == []


@pytest.mark.parametrize('workers', [0, 1])
def test_loading_and_steps_overlap(workers):
    """If a step takes 1.2 times as long as loading a batch, it hardly waits."""
    loader = Loader(Images(0.02), Batches([list(range(8))] * 15), workers)
    batches = iter(loader)
    next(batches)
    began, before = time.perf_counter(), loader.waited
    for _ in batches:
        time.sleep(1.2 * 8 * 0.02)
    assert (loader.waited - before) / (time.perf_counter() - began) < 0.1


def shared_by_workers():
    """Return the bytes of anonymous shared memory that a data worker has mapped."""
    worker = multiprocessing.active_children()[0]
    with open(f'/proc/{worker.pid}/maps', encoding='utf-8') as file:
        spans = [line.split()[0].split('-') for line in file if '/dev/zero (deleted)' in line]
    return sum(int(high, 16) - int(low, 16) for low, high in spans)


@pytest.mark.parametrize('workers', [1, 3])
def test_shared_memory_of_workers_is_bounded(workers):
    """It depends neither on the number of batches nor on how fast they are read."""
    loader = Loader(Images(0, 512), Batches([list(range(16))] * 100), workers)
    with contextlib.closing(iter(loader)) as batches:
        next(batches)
        time.sleep(0.5)
        assert shared_by_workers() == pytest.approx(workers * PREFETCH * 16 * 512 * 512 * 3, rel=0.01)
    assert multiprocessing.active_children() == []


def can_mount():
    return subprocess.run(['unshare', '-m', 'mount', '-t', 'tmpfs', 'tmpfs', '/dev/shm'],
                          capture_output=True).returncode == 0 if shutil.which('unshare') else False


@pytest.mark.skipif(not can_mount(), reason='needs permission to mount')
@pytest.mark.parametrize('count', [1, 2])
def test_a_small_dev_shm_is_enough(fashion, tmp_path, count):
    """/dev/shm has 1 MB here, and an image 147 KiB; a container has 64 MB by default."""
    command = [sys.executable, 'main_multi_gpu.py', '-nproc', count, '-output', tmp_path / 'run', *options(
        fashion, 'DATA.IMAGE_SIZE', '224', 'DATA.NUM_WORKERS', '2', 'TRAIN.NUM_EPOCHS', '1')]
    process = subprocess.run(['unshare', '-m', 'sh', '-c', 'mount -t tmpfs -o size=1m tmpfs /dev/shm; exec "$@"', 'sh',
                              *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / 'run' / 'latest.pdparams').exists()


@pytest.mark.parametrize('workers', [0, 2])
def test_long_waits_report_the_images_being_read_and_end(workers, monkeypatch, caplog):
    monkeypatch.setattr(runtime.loader, 'PATIENCE', 0.5)
    monkeypatch.setattr(LOG, 'propagate', True)
    caplog.set_level('INFO', LOG.name)
    places = ', '.join(f'worker {worker} is reading image {7 + worker}' for worker in range(max(1, workers)))
    loader = Loader(Images(1000), Batches([[7], [8]]), workers, timeout=2)
    began = time.monotonic()
    with pytest.raises(UserError, match=f'no batch for 2 seconds, {places}; check the disk and the file'):
        next(iter(loader))
    assert 2 <= time.monotonic() - began < 5 and multiprocessing.active_children() == []
    said = [record.message for record in caplog.records if record.message.startswith('no batch')]
    assert len(said) >= 2 and said[0].endswith(f' seconds, {places}')
    loader = Loader(Images(1000), Batches([[7], [8]]), workers)
    loader.should_stop = lambda: time.monotonic() - began > 1
    began = time.monotonic()
    with pytest.raises(StoppedWaiting):
        next(iter(loader))
    assert time.monotonic() - began < 3.5 and multiprocessing.active_children() == []


@pytest.mark.parametrize('workers', [0, 2])
def test_a_program_can_end_while_an_image_is_read(workers):
    code = f"""
import time
import test_loader
loader = test_loader.Loader(test_loader.Images(1000), test_loader.Batches([[7], [8]]), {workers})
loader.should_stop = lambda: True
try:
    next(iter(loader))
except test_loader.StoppedWaiting:
    print(time.time())"""
    stopped = float(run('-c', code, env={'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}).stdout)
    assert time.time() - stopped < 5


@pytest.mark.parametrize('cores, processes, workers', [
    (1, 1, 1), (2, 1, 1), (4, 1, 3), (9, 1, 8), (64, 1, 8), (64, 8, 7), (24, 8, 2), (8, 8, 1), (4, 8, 1)])
def test_default_number_of_workers(monkeypatch, cores, processes, workers):
    """It is one less than this process's share of the usable cores, between 1 and 8."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 1000)
    if processes > 1:
        monkeypatch.setenv('PADDLE_LOCAL_SIZE', str(processes))
    assert cores_per_process() == max(1, cores // processes) and default_workers() == workers
    assert [Loader(Images(0), Batches([[0]]), number).num_workers for number in (-1, 0, 3)] == [workers, 0, 3]


def test_a_slow_iteration_is_reported_once():
    """A simulated clock counts a first wait, then a step of 10 s and a wait for each batch."""
    def shares(first, *waits):
        said, now = [], first
        counted = Waits(said.append)
        counted.add(0, first)
        for wait in waits:
            now += 10 + wait
            counted.add(now - wait, now)
        return said

    assert shares(1000, *[2] * 50) == []  # the start of the workers does not count; waits take a sixth of the time
    assert shares(1, *[3] * 50) == [pytest.approx(3 / 13)]  # after 12 s of waiting
    assert shares(1, 9, 0.5) == []  # a large share, but less than 10 s
    assert shares(1, 30, 30) == [pytest.approx(30 / 40)]
    assert shares(1, *[0] * 100, 300) == [pytest.approx(300 / 1310)]


def test_a_slow_loader_calls_on_slow(monkeypatch):
    monkeypatch.setattr(runtime.loader, 'SLOW_SECONDS', 0)
    loader, said = Loader(Images(0.01), Batches([[0]] * 5), 0), []
    assert len(list(loader)) == 5  # without on_slow, nothing is reported
    loader.on_slow = said.append
    for iteration in (1, 2):
        assert len(list(loader)) == 5 and len(said) == iteration
    assert all(0.2 < share <= 1 for share in said)


@pytest.mark.parametrize('workers, cores, remedy', [
    (0, 4, 'set DATA.NUM_WORKERS 3 (now 0; cores: 4)'),
    (0, 64, 'set DATA.NUM_WORKERS 8 (now 0; cores: 64)'),
    (8, 64, 'set DATA.NUM_WORKERS 16 (now 8; cores: 64)'),
    (8, 12, 'set DATA.NUM_WORKERS 11 (now 8; cores: 12)'),
    (7, 8, 'use more cores, a faster disk, or images resized in advance; more than 7 data workers would '
           'hardly help (cores: 8)'),
])
def test_the_remedy_for_slow_loading_depends_on_the_cores(monkeypatch, workers, cores, remedy):
    said = []
    monkeypatch.setattr(runtime.loader, 'cores_per_process', lambda: cores)
    monkeypatch.setattr(LOG, 'warning', said.append)
    warn_of_waiting(workers, 0.436)
    assert said == [f'warning: 44% of the time is spent waiting for images: {remedy}']
