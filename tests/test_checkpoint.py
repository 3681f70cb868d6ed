"""Weight files and checkpoints: which are read or rejected, and writing them completely or not at all."""
import errno
import math
import os
import pathlib
import unittest.mock

import numpy as np
import paddle
import pytest
from conftest import fails, options

from runtime import checkpoint
from runtime.folder import set_aside
from utils import UserError


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / 'c.pdparams')
    checkpoint.save({'epoch': 1}, path)

    def full_disk(state, target):
        pathlib.Path(target).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(paddle, 'save', full_disk)
    with pytest.raises(UserError, match='c.pdparams: cannot write .No space left on device'):
        checkpoint.save({'epoch': 2}, path)
    assert checkpoint.load(path) == {'epoch': 1}
    assert os.listdir(tmp_path) == ['c.pdparams']
    monkeypatch.undo()

    def no_rename(source, target):  # the last step replaces the old file with the complete new one
        assert checkpoint.load(source) == {'epoch': 3} and checkpoint.load(target) == {'epoch': 1}
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(os, 'replace', no_rename)
    with pytest.raises(UserError, match='Input/output error'):
        checkpoint.save({'epoch': 3}, path)
    assert checkpoint.load(path) == {'epoch': 1} and os.listdir(tmp_path) == ['c.pdparams']


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    """The folder is synced before the run continues."""
    calls, fsync, replace = [], os.fsync, os.replace

    def logged_fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}')))
        fsync(descriptor)

    def logged_replace(source, target):
        calls.append('replace')
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', logged_fsync)
    monkeypatch.setattr(os, 'replace', logged_replace)
    checkpoint.save({'epoch': 1}, str(tmp_path / 'c.pdparams'))
    assert calls == ['c.pdparams.partial', 'replace', tmp_path.name]


BEST = {'acc1': 50.0, 'epoch': 1}
PROGRESS = {'steps': 2, 'seconds': 1.5, 'sums': np.zeros([1, 4]), 'steps_per_epoch': 5, 'total_batch': 8}

SCALER = {'scale': np.ones([1], 'float32'), 'incr_ratio': 2.0, 'decr_ratio': 0.5, 'incr_every_n_steps': 2000,
          'decr_every_n_nan_or_inf': 1, 'incr_count': 0, 'decr_count': 0, 'use_dynamic_loss_scaling': True}


def write_checkpoint(path, epoch, **parts):
    state = {name: kind() for name, kind in checkpoint.PARTS.items()}
    checkpoint.save({**state, 'model': {'x': np.zeros(2, 'float32')}, 'epoch': epoch, 'world_size': 1,
                     'best': BEST, **parts}, str(path))


def test_newest_and_past_checkpoints(tmp_path, caplog):
    assert checkpoint.find_newest(str(tmp_path)) is None
    # more epochs with fewer steps, as after resuming with larger batches
    for name, epoch, step in (('best', 2, 5), ('epoch_1', 1, 20), ('epoch_2', 2, 5), ('latest', 2, 5),
                              ('epoch_2 copy', 2, 5)):
        write_checkpoint(tmp_path / f'{name}.pdparams', epoch, step=step)
    checkpoint.save({'stages.x': np.zeros(2)}, str(tmp_path / 'weights.pdparams'))
    path, state = checkpoint.find_newest(str(tmp_path))
    assert os.path.basename(path) == 'latest.pdparams' and state['epoch'] == 2
    # a checkpoint within an epoch is newer than one at its start, and is put aside when the run resumes before it
    for steps in (3, 2):
        write_checkpoint(tmp_path / f'part-{steps}.pdparams', 2, progress={**PROGRESS, 'steps': steps})
    assert os.path.basename(checkpoint.find_newest(str(tmp_path))[0]) == 'part-3.pdparams'
    for position, name in (((2, 2), 'part-3'), ((2, 0), 'part-2')):
        set_aside(str(tmp_path), position)
        assert not (tmp_path / f'{name}.pdparams').exists() and (tmp_path / f'{name}.pdparams.past').exists()
    write_checkpoint(path, 2)
    os.truncate(path, 100)
    assert os.path.basename(checkpoint.find_newest(str(tmp_path))[0]) != 'latest.pdparams'
    (tmp_path / 'best.pdparams.past').touch()
    set_aside(str(tmp_path), (1, 0))
    for old, new in (('best', 'best.pdparams.past-2'), ('epoch_2 copy', 'epoch_2 copy.pdparams.past'),
                     ('epoch_2', 'epoch_2.pdparams.past')):
        assert not (tmp_path / f'{old}.pdparams').exists() and (tmp_path / new).exists()
    assert os.path.basename(checkpoint.find_newest(str(tmp_path))[0]) == 'epoch_1.pdparams'
    assert (tmp_path / 'weights.pdparams').exists()
    (tmp_path / 'epoch_1.pdparams').unlink()
    with pytest.raises(UserError, match='latest.pdparams: cannot be resumed .* no other checkpoint'):
        checkpoint.find_newest(str(tmp_path))


@pytest.mark.parametrize('parts, message', [
    ({'step': 1.5}, 'no step'), ({'best': 3, 'epoch': 'x'}, 'no epoch, best'),
    ({'model': np.zeros(2)}, 'contains only weights'), ({'best': {'epoch': 1}}, 'no best.acc1'),
    ({'model_ema': {'x': 3}}, 'x is int, not an array of floats'),
    ({'model_ema': {'x': np.zeros(2, 'uint16')}}, 'x is an array of uint16, not .* floats; save bfloat16 as float32'),
    *(({part: {'x': np.array([1, value])}}, 'x.pdparams: non-finite numbers in x')
      for part, value in (('model', math.nan), ('model_ema', math.inf), ('optimizer', -math.inf), ('model', 1e300))),
    ({'optimizer': {'x': {}}}, 'x is dict, not an array of floats'),
    ({'progress': {'steps': 1}}, 'no progress.seconds, progress.sums'),
    ({'amp_grad_scaler': {'scale': 1.0}}, 'no amp_grad_scaler.scale, amp_grad_scaler.incr_ratio'),
    *(({part: {**parts, key: value}}, f'x.pdparams: non-finite numbers in {part}.{key}')
      for part, parts, key, value in (
          ('best', BEST, 'acc1', math.nan), ('best', BEST, 'acc1', math.inf),
          ('progress', PROGRESS, 'seconds', math.nan), ('progress', PROGRESS, 'sums', np.full([1, 4], math.inf)),
          ('amp_grad_scaler', SCALER, 'incr_ratio', math.inf),
          ('amp_grad_scaler', SCALER, 'scale', np.full([1], math.nan, 'float32')))),
    ({'progress': {**PROGRESS, 'sums': np.zeros([2, 4])}},
     r'is corrupt: progress.sums is float64 \[2, 4\], not float64 \[1, 4\]'),
    ({'progress': {**PROGRESS, 'sums': np.zeros([1, 4], 'float32')}}, 'is corrupt: progress.sums is float32'),
    ({'progress': PROGRESS, 'world_size': 2}, r'is corrupt: progress.sums is float64 \[1, 4\], not float64 \[2, 4\]'),
    *(({'amp_grad_scaler': {**SCALER, 'scale': np.array(scale)}}, 'is corrupt: amp_grad_scaler.scale is ')
      for scale in ([1.0], np.float32(1), [[np.float32(1)]]))])
def test_invalid_training_checkpoints_are_refused(tmp_path, parts, message):
    write_checkpoint(tmp_path / 'x.pdparams', **{'epoch': 1, **parts})
    with pytest.raises(UserError, match=message):
        checkpoint.load_training(str(tmp_path / 'x.pdparams'))


def test_parts_of_a_training_checkpoint(tmp_path, monkeypatch):
    """The parts include the state of PaddlePaddle's GradScaler; anything else in the file is dropped."""
    # a GradScaler works only on a GPU; this one takes the CPU for a GPU
    monkeypatch.setattr(paddle.amp.grad_scaler, '_dygraph_tracer', unittest.mock.MagicMock())
    scaler = paddle.amp.GradScaler()
    assert {key: type(value) for key, value in checkpoint.to_arrays(scaler.state_dict()).items()
            } == checkpoint.PARTS_OF['amp_grad_scaler']
    write_checkpoint(tmp_path / 'x.pdparams', 1, progress=PROGRESS, amp_grad_scaler=scaler.state_dict(), other=[1])
    state = checkpoint.load_training(str(tmp_path / 'x.pdparams'))
    assert state.keys() == checkpoint.PARTS.keys() and state['progress']['steps'] == 2
    scaler.load_state_dict(state['amp_grad_scaler'])


def test_a_file_that_does_not_fit_into_memory(tmp_path, monkeypatch, fashion):
    """A file larger than the machine's memory is not read; running out of memory is not reported as a broken file."""
    path = str(tmp_path / 'sparse.pdparams')
    with open(path, 'wb') as file:
        file.truncate(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') + 1)
    line = fails('main_single_gpu.py', '-eval', '-pretrained', path, '-output', tmp_path / 'run', *options(fashion))
    message = f'{path}: its {os.path.getsize(path):,} bytes do not fit into memory; check that it is the right file'
    assert message in line and not (tmp_path / 'run').exists()

    def read(data):
        raise MemoryError
    path = str(tmp_path / 'small.pdparams')
    checkpoint.save({'a': np.zeros(3)}, path)
    monkeypatch.setattr(checkpoint, 'read_pickle', read)
    with pytest.raises(UserError, match='small.pdparams: its .* bytes do not fit into memory'):
        checkpoint.load(path)


@pytest.mark.parametrize('number, message', [
    (errno.ENOSPC, 'free up disk space'), (errno.EFBIG, 'raise it with `ulimit -f`'), (errno.EDQUOT, 'quota'),
    (errno.EROFS, 'the file system is read-only'), (errno.EACCES, 'check the path and its permissions')])
def test_write_errors_name_the_remedy(tmp_path, number, message):
    def write(path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(UserError, match=rf'a: cannot write \({os.strerror(number)}\); .*{message}'):
        checkpoint.replace(str(tmp_path / 'a'), write)
