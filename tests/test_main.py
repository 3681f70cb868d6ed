"""main_single_gpu.py as a user runs it: training, its folder, evaluation, fusion, fine-tuning, mistakes."""
import fcntl
import json
import os
import re
import shutil
import struct
import termios

import numpy as np
import pytest
from conftest import ROOT, assert_same, fails, options, records, run, with_lists, without_times
from forked import Program

from config import get_config
from datasets import get_dataset
from mobileone import build_mobileone
from runtime import checkpoint
from utils import UserError
from weights import load_model

MAIN = 'main_single_gpu.py'
KEYS = ['epoch', 'step', 'split', 'weights', 'loss', 'acc1', 'acc5', 'n', 'seconds', 'images_per_second', 'lr',
        'weight_decay', 'image_size']


@pytest.fixture(scope='module')
def trained(fashion, tmp_path_factory):
    """A run of 4 epochs."""
    folder = tmp_path_factory.mktemp('runs') / 'first'
    process = run(MAIN, '-output', folder, *options(fashion, 'TRAIN.NUM_EPOCHS', '4', 'SAVE_FREQ', '1',
                                                    'KEEP_CHECKPOINTS', '2', 'VALIDATE_FREQ', '3'))
    return folder, process


def test_folder_of_a_run(trained):
    folder, process = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        'best.pdparams', 'class_names.txt', 'config.yaml', 'epoch_3.pdparams', 'epoch_4.pdparams', 'latest.pdparams',
        'log.jsonl', 'log.txt', 'run.json']
    config = get_config(str(folder / 'config.yaml'))
    assert config.DATA.BATCH_SIZE == 16 and config.SAVE == str(folder) and config.TRAIN.NUM_EPOCHS == 4
    assert process.stderr == ''
    assert (folder / 'log.txt').read_text() == process.stdout


def test_record_of_a_run(trained, fashion):
    folder, _ = trained
    start, = json.loads((folder / 'run.json').read_text())
    assert (start['status'], start['error'], start['processes']) == ('finished', None, 1)
    assert f'{MAIN} -output {folder} ' in start['command']
    assert list(start['sha256']) == [str(fashion / f'{split}_list.txt') for split in ('train', 'val')]


def test_log(trained, fashion):
    folder, process = trained
    rows = records(folder)
    assert [list(row) for row in rows] == [KEYS] * len(rows)
    assert [(r['epoch'], r['split'], r['weights']) for r in rows] == [
        (1, 'train', 'raw'), (2, 'train', 'raw'), (3, 'train', 'raw'), (3, 'val', 'raw'), (3, 'val', 'ema'),
        (4, 'train', 'raw'), (4, 'val', 'raw'), (4, 'val', 'ema')]
    for row in rows:
        assert row['step'] == 3 * row['epoch'] and row['image_size'] == 32 and row['weight_decay'] == 1e-4
        assert row['n'] == (48 if row['split'] == 'train' else 35)
        assert 0 <= row['acc1'] <= row['acc5'] <= 100 and row['seconds'] > 0 and row['images_per_second'] > 0
    assert rows[0]['lr'] > rows[-1]['lr'] > 2e-4
    lines = process.stdout.splitlines()
    config = get_config(str(folder / 'config.yaml'))
    decayed = [p for p in build_mobileone(config).parameters() if not p.stop_gradient and p.ndim > 1]
    assert any(f'weight decay on {len(decayed)} tensors ({sum(p.size for p in decayed):,} parameters)' in line
               for line in lines)
    assert any(line.endswith('train_list.txt: 60 images, labels 0 to 9, 16.7% of them in the largest class')
               for line in lines)
    assert '  DATA.BATCH_SIZE 16' in lines and 'TRAIN.ACCUM_ITER 1:' in process.stdout
    assert not any('WEIGHT_DECAY' in line for line in lines)  # has its default value
    assert len(lines[:lines.index(next(line for line in lines if ' step 2/3 ' in line))]) < 35
    assert any(line.endswith('12 of 60 training images, different ones each epoch, are dropped: they do not fill a '
                             'batch of 16') for line in lines)
    steps = [line for line in lines if ' step ' in line and 'loss' in line]
    assert len(steps) == 8  # REPORT_FREQ 2: steps 2 and 3 of 3
    assert sum('evaluation step 2/3' in line for line in lines) == 2  # two evaluations; raw and EMA in one pass
    assert all(word in steps[0] for word in ('epoch 1/4', 'step 2/3', 'loss', 'lr', 'images/s', 'data', 'ETA'))


def test_checkpoint_content(trained):
    folder, _ = trained
    state = checkpoint.load(str(folder / 'latest.pdparams'))
    assert sorted(state) == ['amp_grad_scaler', 'best', 'epoch', 'lr_scheduler', 'model', 'model_ema', 'optimizer',
                             'progress', 'step', 'world_size']
    assert (state['epoch'], state['step']) == (4, 12)
    rows = [row for row in records(folder) if row['weights'] == 'ema']
    best = max(rows, key=lambda row: row['acc1'])
    assert state['best'] == {'acc1': best['acc1'], 'epoch': best['epoch']}
    assert checkpoint.load(str(folder / 'best.pdparams'))['epoch'] == best['epoch']
    assert list(state['model']) == list(state['model_ema'])
    assert any((state['model'][name] != value).any() for name, value in state['model_ema'].items())

    def plain(value):
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return type(value) in (np.ndarray, int, float, str, bool)
    assert plain(state)


def test_the_number_of_workers_does_not_change_the_weights(trained, fashion, tmp_path):
    folder, _ = trained
    run(MAIN, '-output', tmp_path / 'again', *options(
        fashion, 'TRAIN.NUM_EPOCHS', '4', 'VALIDATE_FREQ', '3', 'DATA.NUM_WORKERS', '0', 'SAVE_FREQ', '0'))
    assert without_times(records(tmp_path / 'again')) == without_times(records(folder))
    first, again = (checkpoint.load(str(path / 'latest.pdparams')) for path in (folder, tmp_path / 'again'))
    assert_same(first, again)
    assert not (tmp_path / 'again/epoch_4.pdparams').exists()


def test_evaluation_of_fused_and_unfused_checkpoints(trained, fashion, tmp_path):
    folder, _ = trained
    expected = {row['weights']: row for row in records(folder) if row['epoch'] == 4 and row['split'] == 'val'}
    accuracy = []
    for name, extra in (('plain', []), ('deployed', ['-deploy'])):
        out = run(MAIN, '-eval', '-pretrained', folder / 'latest.pdparams', '-output', tmp_path / name, *extra,
                  *options(fashion)).stdout
        row, = records(tmp_path / name)
        assert list(row) == KEYS and (row['split'], row['weights'], row['n']) == ('val', 'ema', 35)
        assert ('fused the branches' in out) == bool(extra)
        accuracy.append((row['loss'], row['acc1'], row['acc5']))
    assert accuracy[0] == tuple(expected['ema'][key] for key in ('loss', 'acc1', 'acc5'))
    np.testing.assert_allclose(accuracy[1], accuracy[0], rtol=1e-4)

    fused = tmp_path / 'fused.pdparams'
    out = run('-m', 'tools.fuse', '-cfg', folder / 'config.yaml', '-pretrained', folder / 'latest.pdparams',
              '-save', fused).stdout
    assert 'top-1 accuracy' in out and 'latency, batch 1' in out and '35 val images' in out
    assert (tmp_path / 'class_names.txt').read_text() == (folder / 'class_names.txt').read_text()
    difference = float(out.split('largest logit difference ')[1].split()[0])
    assert 0 < difference < 1e-4 < 1e-3 < float(out.split(' of logits up to ')[1].split()[0])
    counts = [int(x.replace(',', '')) for x in
              next(line for line in out.splitlines() if line.startswith('parameters')).split()[1:]]
    config = get_config(str(folder / 'config.yaml'))
    sizes = []
    for deploy in (False, True):
        config.MODEL.DEPLOY = deploy
        sizes.append(sum(p.size for p in build_mobileone(config).parameters() if not p.stop_gradient))
    assert counts == sizes and sizes[0] > sizes[1]
    assert '8 random images' in run('-m', 'tools.fuse', '-cfg', folder / 'config.yaml', '-pretrained',
                                    folder / 'latest.pdparams', '-no_data', '-data_path', 'nowhere').stdout
    for extra in ([], ['-deploy']):  # fused weights build the fused model even without the flag
        target = tmp_path / f'fused-eval{len(extra)}'
        out = run(MAIN, '-eval', '-pretrained', fused, '-output', target, *extra, *options(fashion)).stdout
        row, = records(target)
        assert '(fused)' in out and row['weights'] == 'raw'
        np.testing.assert_allclose((row['loss'], row['acc1'], row['acc5']), accuracy[0], rtol=1e-4)
    line = fails(MAIN, '-pretrained', fused, '-output', tmp_path / 'x', *options(fashion))
    assert 'fused.pdparams' in line and 'cannot be trained' in line
    assert '-pretrained is needed' in fails('-m', 'tools.fuse', '-cfg', folder / 'config.yaml')
    assert 'already fused' in fails('-m', 'tools.fuse', '-cfg', folder / 'config.yaml', '-pretrained', fused)


def test_raw_weights_are_evaluated_without_ema(fashion, tmp_path):
    run(MAIN, '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.MODEL_EMA', 'False',
                                                    'TRAIN.OPTIMIZER.NAME', 'AdamW', 'TRAIN.BASE_LR', '0.001'))
    rows = records(tmp_path / 'run')
    assert [(row['split'], row['weights']) for row in rows] == [('train', 'raw'), ('val', 'raw')]
    assert checkpoint.load(str(tmp_path / 'run/latest.pdparams'))['best']['acc1'] == rows[1]['acc1']
    run(MAIN, '-eval', '-pretrained', tmp_path / 'run/best.pdparams', '-output', tmp_path / 'run', *options(fashion))
    rows = records(tmp_path / 'run')  # an evaluation in a run's folder adds to its log and leaves its config
    assert [row['weights'] for row in rows] == ['raw'] * 3 and rows[2]['acc1'] == rows[1]['acc1']
    assert get_config(str(tmp_path / 'run/config.yaml')).EVAL is False
    assert get_config(str(tmp_path / 'run/config-eval.yaml')).EVAL is True
    training, = json.loads((tmp_path / 'run/run.json').read_text())
    evaluation, = json.loads((tmp_path / 'run/run-eval.json').read_text())
    assert ' -eval ' not in training['command'] and ' -eval ' in evaluation['command']
    assert f'{tmp_path}/run/best.pdparams' in evaluation['sha256']


def test_fine_tuning_with_other_classes(trained, fashion, tmp_path):
    """Their number comes from the data. The run first evaluates the initial weights, which do not change here."""
    folder, _ = trained
    data = tmp_path / 'data'
    shutil.copytree(fashion / 'train', data / 'train')
    for split in ('train', 'val'):
        lines = (fashion / 'train_list.txt').read_text().splitlines()
        (data / f'{split}_list.txt').write_text('\n'.join(line for line in lines if int(line.split()[-1]) < 3))
    args = ['-pretrained', folder / 'best.pdparams', '-data_path', data, '-last_epoch', '1']
    still = ['MODEL.NUM_CLASSES', '0', 'TRAIN.NUM_EPOCHS', '2', 'TRAIN.BASE_LR', '0', 'TRAIN.END_LR', '0']
    out = run(MAIN, *args, '-output', tmp_path / 'tuned', *options(fashion, *still)[2:]).stdout
    assert f'MODEL.NUM_CLASSES 3, from {data}/train_list.txt\n' in out and '\n  MODEL.NUM_CLASSES 3\n' in out
    assert 'skipped fc.weight, fc.bias, made for 10 classes, not 3' in out and 'unused' not in out
    assert 'acc1' in out and 'acc5' not in out
    rows = records(tmp_path / 'tuned')
    assert [(row['epoch'], row['split'], row['weights']) for row in rows] == [
        (1, 'val', 'raw'), (2, 'train', 'raw'), (2, 'val', 'raw'), (2, 'val', 'ema')]
    assert all(row['acc5'] == 100 for row in rows)  # top-3 of 3 classes
    # evaluation and fusion take the number from the weights
    weights = tmp_path / 'tuned/latest.pdparams'
    out = run(MAIN, '-eval', '-pretrained', weights, '-data_path', data, '-output', tmp_path / 'eval',
              *options(fashion, 'MODEL.NUM_CLASSES', '0')[2:]).stdout
    assert f'MODEL.NUM_CLASSES 3, from {weights}\n' in out
    assert records(tmp_path / 'eval')[0]['loss'] == rows[-1]['loss']
    assert get_config(str(tmp_path / 'eval/config.yaml')).MODEL.NUM_CLASSES == 3
    out = run('-m', 'tools.fuse', '-pretrained', weights, '-data_path', data, *options(
        fashion, 'MODEL.NUM_CLASSES', '0')[4:]).stdout
    assert 'top-1 accuracy' in out and 'top-5' not in out
    tuned = checkpoint.load(str(tmp_path / 'tuned/latest.pdparams'))['model']
    start = checkpoint.load(str(folder / 'best.pdparams'))['model_ema']
    name = 'stages.1.0.dw_1x1.conv.weight'  # with a learning rate of 0 it stays as loaded, from the EMA
    assert np.array_equal(tuned[name], start[name]) and tuned['fc.weight'].shape[1] == 3
    line = fails(MAIN, '-eval', *args, '-output', tmp_path / 'x', *options(fashion, 'MODEL.NUM_CLASSES', '3')[2:])
    assert 'fc.weight' in line and 'MODEL.NUM_CLASSES' in line


@pytest.mark.parametrize('args, message', [
    (['-data_path', 'nowhere'], 'nowhere/train_list.txt: cannot read the list'),
    (['-cfg', 'nowhere.yaml'], 'nowhere.yaml: cannot read the config'),
    (['-eval'], "EVAL is True, but MODEL.PRETRAINED is ''"),
    (['-deploy'], 'MODEL.DEPLOY is True, but a fused network cannot be trained'),
    (['-accum_iter', '4'], 'TRAIN.ACCUM_ITER is 4, but an epoch has only 3 batches of 16 images; lower it'),
    (['-pretrained', 'nowhere.pdparams'], 'nowhere.pdparams: no such weight file'),
    (['-opts', 'MODEL.NUM_CLASSES', '9'], 'label 9 is out of range for MODEL.NUM_CLASSES 9; this list needs 10'),
    (['-opts', 'MODEL.NUM_BLOCKS', '[1,1]'], 'NUM_BLOCKS'),
    (['-opts', 'TRAIN.LR', '1'], 'unknown key TRAIN.LR'),
    (['-batch', '3'], 'unrecognized arguments: -batch 3'),
    (['-output', '/dev/null/x'], '/dev/null/x: Not a directory; check the path'),
])
def test_mistakes_end_in_one_line(fashion, tmp_path, args, message):
    line = fails(MAIN, '-output', tmp_path / 'run', *options(fashion), *args)
    assert line.startswith('main_single_gpu.py: error: ') and message in line
    assert not (tmp_path / 'run').exists()


def test_a_nul_in_a_path_given_in_python(config, tmp_path):
    path = f'{tmp_path}/a\0b'
    config.DATA.DATA_PATH = path
    for function in (get_config, lambda path: load_model(config, path), lambda path: get_dataset(config),
                     lambda path: checkpoint.save({'a': np.zeros(3)}, path)):
        with pytest.raises(UserError, match='a(\0|.x00)b'):
            function(path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_run_is_not_overwritten(trained, fashion):
    folder, _ = trained
    before = (folder / 'latest.pdparams').read_bytes(), (folder / 'log.jsonl').read_bytes()
    assert 'contains the results of another run (best.pdparams)' in fails(MAIN, '-output', folder, *options(fashion))
    assert before == ((folder / 'latest.pdparams').read_bytes(), (folder / 'log.jsonl').read_bytes())
    assert 'would replace the unfused weights' in fails(
        '-m', 'tools.fuse', '-cfg', folder / 'config.yaml', '-pretrained', folder / 'latest.pdparams', '-save',
        folder / '../first/latest.pdparams')
    assert before[0] == (folder / 'latest.pdparams').read_bytes()


def test_a_log_that_cannot_be_written_ends_the_run(fashion, tmp_path):
    for name in ('log.txt', 'log.jsonl'):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).symlink_to('/dev/full')
        assert 'No space left on device' in fails(MAIN, '-output', tmp_path / name, *options(fashion))
    (tmp_path / 'run/log.txt').mkdir(parents=True)
    assert 'log.txt: Is a directory' in fails(MAIN, '-output', tmp_path / 'run', *options(fashion))


def test_progress_bars_on_a_terminal(fashion, tmp_path):
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 200, 0, 0))
    process = Program([MAIN, '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '1')], stdout=inner)
    os.close(inner)
    shown = b''
    while True:
        try:
            shown += os.read(outer, 4096)
        except OSError:  # the program has ended
            break
    os.close(outer)
    assert process.wait() == 0
    shown = shown.decode()
    assert re.search(r'epoch 1/1 \|.+\| 3/3, loss ', shown) and re.search(r'evaluation \|.+\| 2/3, \d', shown)
    assert ' step 3/3 ' not in shown and ' step 3/3 ' in (tmp_path / 'run/log.txt').read_text()


def test_output_without_a_reader(fashion, tmp_path):
    """Without a reader, a run continues and writes to log.txt; a program without a log ends."""
    def without_reader(*args):
        reader, writer = os.pipe()
        os.close(reader)
        process = Program(args, stdout=writer)
        os.close(writer)
        return process.communicate(60)[1], process.returncode
    error, status = without_reader(MAIN, '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '1'))
    log = tmp_path / 'run/log.txt'
    assert error == f'the program that reads the output has ended; the log continues in {log}\n' and status == 0
    assert ' best top-1 ' in log.read_text().splitlines()[-1]
    error, status = without_reader('-m', 'tools.show_recipe', '-cfg', 'configs/mobileone_s0.yaml')
    assert error == 'tools.show_recipe: error: the program that reads the output has ended\n' and status == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_named(fashion, tmp_path, workers):
    data = with_lists(fashion, tmp_path / 'data', val=['val/no such.png 3'])
    line = fails(MAIN, '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '1', 'DATA.NUM_WORKERS',
                                                            workers)[2:], '-data_path', data)
    assert line == (f'main_single_gpu.py: error: {data}/val/no such.png: cannot read the image (No such file or '
                    'directory); fix the file, or leave it out')


def test_a_non_finite_loss_is_reported(fashion, tmp_path):
    line = fails(MAIN, '-output', tmp_path / 'run', *options(
        fashion, 'TRAIN.BASE_LR', '1000', 'TRAIN.WEIGHT_DECAY', '1', 'DATA.BATCH_SIZE', '2', 'TRAIN.NUM_EPOCHS', '1'))
    assert 'the training loss in epoch 1, steps ' in line and 'is nan: lower TRAIN.BASE_LR' in line
    assert not list((tmp_path / 'run').glob('*.pdparams'))


def test_default_folder_is_named_after_the_model(fashion, tmp_path):
    run(ROOT / MAIN, *options(fashion, 'TRAIN.NUM_EPOCHS', '1', 'MODEL.NAME', 'tiny'), cwd=tmp_path)
    folder, = (tmp_path / 'output').iterdir()
    assert folder.name.startswith('tiny-20') and (folder / 'best.pdparams').exists()


def test_validation_set_is_the_val_list(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    assert get_dataset(config, is_train=False).paths[0].startswith('val/')
    assert get_dataset(config).paths[0].startswith('train/')
