"""Shared test code: runtime settings, a narrow config, small datasets of real images, helpers to run programs."""
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from runtime.program import prepare_runtime

os.environ.setdefault('OMP_NUM_THREADS', '1')  # pytest-xdist starts a worker per core
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
prepare_runtime()

import forked  # noqa: E402
import numpy as np  # noqa: E402
import paddle  # noqa: E402
from PIL import Image  # noqa: E402

from config import get_config  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
VARIANTS = ['s0', 's1', 's2', 's3', 's4']
# config of a model that trains in seconds, with SE and every kind of branch
NARROW = ['MODEL.NUM_BLOCKS', '[1,1,1,2,1]', 'MODEL.CHANNELS', '[4,4,8,8,8]', 'MODEL.EXPANSIONS', '[1,1,1,1,1]',
          'MODEL.NUM_BRANCHES', '[1,2,1,1,2]', 'MODEL.USE_SE', 'True', 'DATA.IMAGE_SIZE', '32', 'DATA.CROP_PCT', '1',
          'TRAIN.LINEAR_SCALED_LR', '0', 'TRAIN.WARMUP_EPOCHS', '0', 'DATA.NUM_WORKERS', '1']
# a two-stage curriculum for runs of four epochs
STAGES = [{'EPOCH': 1, 'IMAGE_SIZE': 24, 'AUTO_AUGMENT_STRENGTH': 0.3},
          {'EPOCH': 3, 'IMAGE_SIZE': 32, 'AUTO_AUGMENT_STRENGTH': 1.0}]


def pytest_addoption(parser):
    parser.addoption('--long', action='store_true', help='more random faults and mutations; may take an hour')


@pytest.fixture(scope='session')
def long(request):
    """Whether the tests may take an hour."""
    return request.config.getoption('--long')


def variant_config(variant):
    return get_config(str(ROOT / f'configs/mobileone_{variant}.yaml'))


@pytest.fixture
def config():
    """An editable config like NARROW, with 10 classes."""
    config = get_config()
    config.DATA.IMAGE_SIZE = 32
    config.DATA.NUM_WORKERS = 1
    config.MODEL.NUM_CLASSES = 10
    config.MODEL.NUM_BLOCKS = [1, 1, 1, 2, 1]
    config.MODEL.CHANNELS = [4, 4, 8, 8, 8]
    config.MODEL.EXPANSIONS = [1.0] * 5
    config.MODEL.NUM_BRANCHES = [1, 2, 1, 1, 2]
    config.MODEL.USE_SE = True
    return config


@pytest.fixture(autouse=True)
def _seed():
    paddle.seed(0)


@pytest.fixture(autouse=True)
def _no_program_is_left():
    yield
    forked.Program.kill_all()  # left over from a failed test


def run(*args, status=0, cwd=ROOT, env=(), fork=True):
    """Run `python *args` from the top level, check its exit status, and return the finished process.

    fork: start it with forked.py; False for tests of how a program starts.
    """
    start = forked.run if fork else subprocess.run
    process = start([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=500,
                    env={**os.environ, **dict(env)})
    assert process.returncode == status, process.stdout + process.stderr
    return process


def fails(*args, cwd=ROOT, env=()):
    """Run a program that must fail as for a user's mistake. Returns: its one line on stderr."""
    process = run(*args, status=2, cwd=cwd, env=env)
    lines = process.stderr.splitlines()
    assert len(lines) == 1 and ': error: ' in lines[0], process.stderr
    return lines[0]


def records(folder):
    return [json.loads(line) for line in (pathlib.Path(folder) / 'log.jsonl').read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ('seconds', 'images_per_second')} for row in rows]


def options(fashion, *more):
    """Return the flags of a run with a narrow model. more: KEY VALUE pairs for -opts."""
    return ['-data_path', fashion, '-batch_size', '16', '-opts', *NARROW, 'MODEL.NUM_CLASSES', '10', 'REPORT_FREQ', '2',
            *more]


def assert_same(first, second, path=''):
    """Check that two checkpoints are bit-identical."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            assert_same(first[key], second[key], f'{path}/{key}')
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype and first.tobytes() == second.tobytes(), path
    else:
        assert first == second, path


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Call a tool's main() with forked Python programs and an empty stderr. Returns: its lines on stdout."""
    def call(tool, *args):
        monkeypatch.setattr(tool, 'subprocess', forked)
        monkeypatch.setattr(sys, 'argv', [tool.__name__, *map(str, args)])
        capsys.readouterr()  # discard what this process has logged
        tool.main()
        out, error = capsys.readouterr()
        assert error == ''
        return out.splitlines()
    return call


def with_lists(fashion, folder, **lists):
    """Create a dataset of the images in `fashion` with other list files. lists: {split: lines}."""
    folder.mkdir()
    for split in ('train', 'val'):
        (folder / split).symlink_to(fashion / split)
        lines = lists.get(split, (fashion / f'{split}_list.txt').read_text().splitlines())
        (folder / f'{split}_list.txt').write_text('\n'.join(lines))
    return folder


@pytest.fixture(scope='session')
def fashion(tmp_path_factory):
    """The demo dataset as image files, with lists of the first 60 training and 35 validation images."""
    folder = tmp_path_factory.mktemp('fashion')
    run('-m', 'tools.make_fashion_mnist', '-source', 'demo', '-output', folder)
    for split, count in (('train', 60), ('val', 35)):
        path = folder / f'{split}_list.txt'
        path.write_text(''.join(path.read_text().splitlines(keepends=True)[:count]))
    return folder


def write_images(folder, count, size=(40, 30), seed=0):
    """Write `count` random JPEG images to a new folder. size: (width, height)."""
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng([seed, index]).integers(0, 256, (*size[::-1], 3), dtype='uint8')
        Image.fromarray(pixels).save(folder / f'photo {index}.jpg')
