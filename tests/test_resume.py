"""An interrupted and resumed run is bit-identical to an uninterrupted one."""
import json
import os
import shutil
import signal
import time

import pytest
from conftest import ROOT, STAGES, assert_same, fails, options, records, run, without_times
from forked import Program

from runtime import checkpoint

MAIN = 'main_single_gpu.py'
# everything that has state or randomness
STATEFUL = ['TRAIN.NUM_EPOCHS', '4', 'TRAIN.MIXUP_ALPHA', '0.5', 'TRAIN.CUTMIX_ALPHA', '1', 'TRAIN.ACCUM_ITER', '2',
            'TRAIN.AUTO_AUGMENT', 'True', 'TRAIN.RANDOM_ERASE_PROB', '0.5', 'TRAIN.CURRICULUM', str(STAGES),
            'TRAIN.GRAD_CLIP', '1', 'SAVE_FREQ', '1', 'KEEP_CHECKPOINTS', '0', 'TRAIN.LINEAR_SCALED_LR', '16']
OPTIMIZERS = {'SGD': [], 'AdamW': ['TRAIN.OPTIMIZER.NAME', 'AdamW', 'TRAIN.BASE_LR', '0.001']}


@pytest.fixture(scope='module', params=OPTIMIZERS)
def uninterrupted(request, fashion, tmp_path_factory):
    """A run of 4 epochs, and its options."""
    folder = tmp_path_factory.mktemp('uninterrupted') / request.param
    opts = options(fashion, *STATEFUL, *OPTIMIZERS[request.param])
    out = run(MAIN, '-output', folder, *opts).stdout
    # two windows: two batches, then the last of the 60 // 16 batches
    assert '8 steps of 32 images' in out and '2 per epoch; learning rate up to ' in out
    assert [row['image_size'] for row in records(folder) if row['split'] == 'train'] == [24, 24, 32, 32]
    return folder, opts


def assert_same_runs(first, second):
    assert without_times(records(first)) == without_times(records(second))
    for name in ('latest', 'best'):
        assert_same(*(checkpoint.load(str(folder / f'{name}.pdparams')) for folder in (first, second)))


def test_a_killed_run_resumes_bitwise(uninterrupted, tmp_path):
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    process = Program([MAIN, '-output', again, '-resume', 'auto', *opts])
    while not (again / 'epoch_2.pdparams').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert f'{again}: no checkpoint to resume; starting from scratch' in process.communicate()[0]
    assert process.returncode == -signal.SIGKILL and not (again / 'epoch_4.pdparams').exists()
    out = run(MAIN, '-output', again, '-resume', 'auto', *opts).stdout
    assert ' resumed ' in out and 'bitwise' not in out
    assert_same_runs(folder, again)
    starts = json.loads((again / 'run.json').read_text())
    assert [start['status'] for start in starts] == ['running', 'finished']


def copy_until(folder, epoch, target):
    """Copy a run's folder as it was after the checkpoint of an epoch was written."""
    target.mkdir()
    shutil.copy(folder / f'epoch_{epoch}.pdparams', target / 'latest.pdparams')
    best = checkpoint.load(str(target / 'latest.pdparams'))['best']['epoch']
    shutil.copy(folder / f'epoch_{best}.pdparams', target / 'best.pdparams')
    shutil.copy(folder / 'log.jsonl', target)


def test_killed_between_the_files_of_a_save(uninterrupted, tmp_path):
    """best.pdparams is already from epoch 3, but latest.pdparams is not: the newer file is resumed."""
    folder, opts = uninterrupted
    copy_until(folder, 2, tmp_path / 'again')
    shutil.copy(folder / 'epoch_3.pdparams', tmp_path / 'again/best.pdparams')
    (tmp_path / 'again/latest.pdparams.partial').write_bytes(b'half')
    out = run(MAIN, '-output', tmp_path / 'again', '-resume', 'auto', *opts).stdout
    assert f'resumed {tmp_path}/again/best.pdparams after epoch 3, step 6' in out
    assert 'dropped 3 records from epoch 4 on' in out
    assert without_times(records(folder)) == without_times(records(tmp_path / 'again'))
    assert_same(*(checkpoint.load(str(path / 'latest.pdparams')) for path in (folder, tmp_path / 'again')))


def test_a_truncated_checkpoint_is_skipped(uninterrupted, tmp_path):
    folder, opts = uninterrupted
    copy_until(folder, 2, tmp_path / 'again')
    shutil.copy(folder / 'epoch_1.pdparams', tmp_path / 'again/epoch_1.pdparams')
    shutil.copy(folder / 'epoch_1.pdparams', tmp_path / 'again/best.pdparams')
    os.truncate(tmp_path / 'again/latest.pdparams', 1000)
    out = run(MAIN, '-output', tmp_path / 'again', '-resume', 'auto', *opts).stdout
    assert f'skipped: {tmp_path}/again/latest.pdparams: not a .pdparams file' in out
    assert 'after epoch 1, step 2' in out
    assert without_times(records(folder)) == without_times(records(tmp_path / 'again'))


def test_resuming_a_named_checkpoint_in_its_own_folder(uninterrupted, tmp_path):
    """Checkpoints that are further along are renamed; -output is not needed."""
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(folder, again)
    out = run(MAIN, '-resume', again / 'epoch_2.pdparams', *opts).stdout
    for name in ('latest', 'epoch_3', 'epoch_4'):
        assert f'{again}/{name}.pdparams: is further along than the checkpoint to resume' in out
        assert (again / f'{name}.pdparams.past').exists()
    assert without_times(records(folder)) == without_times(records(again))
    assert_same(*(checkpoint.load(str(path / 'latest.pdparams')) for path in (folder, again)))
    assert (again / 'config.yaml').read_text().replace(str(again), str(folder)) == (folder / 'config.yaml').read_text()


def test_a_finished_run_is_left_unchanged(uninterrupted, tmp_path):
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(folder, again)
    out = run(MAIN, '-output', again, '-resume', 'auto', *opts).stdout
    assert f'resumed {again}/latest.pdparams after epoch 4' in out and 'cannot compare' not in out
    for path in folder.iterdir():
        if path.name not in ('log.txt', 'config.yaml', 'run.json'):
            assert path.read_bytes() == (again / path.name).read_bytes(), path


def test_a_config_of_an_earlier_version_does_not_block_a_resume(uninterrupted, tmp_path):
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(folder, again)
    text = (again / 'config.yaml').read_text()
    (again / 'config.yaml').write_text(text.replace('  SMOOTHING:', '  RANDOM_ERASE_SPLIT: true\n  SMOOTHING:'))
    out = run(MAIN, '-output', again, '-resume', 'auto', *opts).stdout
    assert (f'cannot compare the saved config with this run: {again}/config.yaml: TRAIN.RANDOM_ERASE_SPLIT is True, '
            'but is not supported: remove it') in out and 'all 4 epochs are done' in out
    assert (again / 'config.yaml').read_text().replace(str(again), str(folder)) == text


def test_fewer_steps_do_not_make_a_checkpoint_older(uninterrupted, tmp_path):
    """Two epochs with small batches have more steps than four epochs whose last two use larger batches."""
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    again.mkdir()
    state = checkpoint.load(str(folder / 'epoch_2.pdparams'))
    checkpoint.save({**state, 'step': 1000}, str(again / 'epoch_2.pdparams'))
    run(MAIN, '-output', again, '-resume', 'auto', *opts)
    before = (again / 'latest.pdparams').read_bytes()
    assert 'after epoch 4' in run(MAIN, '-output', again, '-resume', 'auto', *opts).stdout
    assert (again / 'latest.pdparams').read_bytes() == before


def test_a_failed_resume_leaves_the_folder_unchanged(uninterrupted, tmp_path):
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(folder, again)
    assert 'does not fit' in fails(MAIN, '-resume', again / 'epoch_2.pdparams', *opts, 'MODEL.USE_SE', 'False')
    for path in folder.iterdir():
        assert path.name in ('log.txt', 'run.json') or path.read_bytes() == (again / path.name).read_bytes(), path
    assert len(list(again.iterdir())) == len(list(folder.iterdir()))


def test_killed_in_the_last_save(uninterrupted, tmp_path):
    """best.pdparams is from the last epoch, but epoch_4 and latest are missing: they are written from it."""
    folder, opts = uninterrupted
    again = tmp_path / 'again'
    shutil.copytree(folder, again)
    shutil.copy(folder / 'epoch_4.pdparams', again / 'best.pdparams')
    shutil.copy(folder / 'epoch_3.pdparams', again / 'latest.pdparams')
    (again / 'epoch_4.pdparams').unlink()
    assert 'all 4 epochs are done' in run(MAIN, '-output', again, '-resume', 'auto', *opts).stdout
    for name in ('epoch_4', 'latest'):
        assert (again / f'{name}.pdparams').read_bytes() == (folder / f'{name}.pdparams').read_bytes()


def test_checkpoints_that_cannot_be_resumed(uninterrupted, fashion, tmp_path):
    folder, opts = uninterrupted
    state = checkpoint.load(str(folder / 'epoch_2.pdparams'))
    ancestors = {**state, 'optimizer': {'conv2d_0.w_0_velocity_0': state['model']['fc.weight']}}
    for name in ('step', 'best', 'world_size'):
        del ancestors[name]
    checkpoint.save(ancestors, str(tmp_path / 'old.pdparams'))
    checkpoint.save(state['model'], str(tmp_path / 'weights.pdparams'))

    def message(*args):
        return fails(MAIN, '-output', tmp_path / 'run', *opts[:4], *args, *opts[4:])
    assert ('old.pdparams: not a checkpoint of this project (no step, best, world_size), so it cannot be resumed; '
            'start from its weights with -pretrained') in message('-resume', tmp_path / 'old.pdparams')
    assert 'contains only weights, which cannot be resumed; start from them with -pretrained' in message(
        '-resume', tmp_path / 'weights.pdparams')
    assert 'no such weight file' in message('-resume', tmp_path / 'nowhere.pdparams')
    assert "name the folder with -output" in fails(MAIN, '-resume', 'auto', *opts)
    assert "EVAL takes its weights from -pretrained" in message('-eval', '-pretrained', 'x', '-resume', 'auto')
    assert 'TRAIN.LAST_EPOCH is 3, but' in message('-last_epoch', '3', '-resume', folder / 'epoch_2.pdparams')
    assert 'does not fit the network of the config' in fails(
        MAIN, '-output', tmp_path / 'a', '-resume', folder / 'epoch_2.pdparams', *opts, 'MODEL.USE_SE', 'False')
    other = OPTIMIZERS['SGD' if 'AdamW' in opts else 'AdamW'] or ['TRAIN.OPTIMIZER.NAME', 'SGD']
    line = fails(MAIN, '-output', tmp_path / 'b', '-resume', folder / 'epoch_2.pdparams', *opts, *other)
    assert 'its optimizer state does not match: missing stages.0.' in line and 'unexpected' not in line.split(';')[0]
    line = fails(MAIN, '-output', folder, '-resume', tmp_path / 'old.pdparams', *opts)
    assert 'contains the results of another run' in line and '-resume auto' in line
    # but their weights can be used
    run(MAIN, '-output', tmp_path / 'tuned', '-pretrained', tmp_path / 'old.pdparams', *opts, 'TRAIN.NUM_EPOCHS', '1')


def test_other_batches_and_no_ema_resume_and_log_it(uninterrupted, tmp_path):
    folder, opts = uninterrupted
    out = run(MAIN, '-output', tmp_path / 'a', '-resume', folder / 'epoch_2.pdparams', *opts, 'TRAIN.ACCUM_ITER', '1',
              'TRAIN.MODEL_EMA', 'False').stdout
    assert 'steps: 4 in the checkpoint, 6 in this run; resuming after epoch 2, but the result will not be' in out
    assert 'TRAIN.ACCUM_ITER was' not in out  # configs are compared only within a folder
    assert [row['step'] for row in records(tmp_path / 'a')] == [9, 9, 12, 12]
    state = checkpoint.load(str(tmp_path / 'a/latest.pdparams'))
    assert state['model_ema'] == {}
    out = run(MAIN, '-output', tmp_path / 'a', '-resume', 'auto', *opts, 'TRAIN.NUM_EPOCHS', '5', 'TRAIN.ACCUM_ITER',
              '1').stdout
    assert 'the checkpoint has no EMA: the average starts from its weights' in out
    assert 'so the result will not be bitwise identical: TRAIN.MODEL_EMA was False and is now True' in out
    assert records(tmp_path / 'a')[-1]['epoch'] == 5


@pytest.mark.parametrize('name, where', [
    ('sgd', 'after epoch 2, step 10'), ('adamw', 'after epoch 1 and 3 of 5 steps of the next, step 8')])
def test_checkpoints_of_earlier_versions(name, where, fashion, tmp_path):
    """See checkpoints/README.md. Other versions of Paddle and other CPUs give the same results up to rounding.

    The images were read with Pillow.
    """
    past, again = ROOT / 'tests/checkpoints' / name, tmp_path / 'again'
    shutil.copytree(past, again)
    args = ['-cfg', past / 'config.yaml', '-data_path', fashion]
    out = run(MAIN, *args, '-output', again, '-resume', 'auto', '-opts', 'DATA.IMAGE_BACKEND', 'pillow').stdout
    assert f'resumed {again}/latest.pdparams {where}' in out and out.count('bitwise') == 1
    assert "so the result will not be bitwise identical: DATA.IMAGE_BACKEND was 'auto' and is now 'pillow'" in out
    run(MAIN, *args, '-output', tmp_path / 'evaluated', '-eval', '-pretrained', past / 'latest.pdparams')
    for first, second in ((past, again), (past / 'evaluation', tmp_path / 'evaluated')):
        expected, rows = without_times(records(first)), without_times(records(second))
        assert len(rows) == len(expected)
        for row, other in zip(rows, expected):
            assert row.pop('loss') == pytest.approx(other.pop('loss'), rel=1e-3)
            for key in ('acc1', 'acc5'):  # one image may be a borderline case
                assert row.pop(key) == pytest.approx(other.pop(key), abs=100 / row['n'] + 1e-9)
            assert row == other
