"""A run: which epoch is the best, what is not saved, how a stop request ends it, what it logs."""
import json
import math
import os

import numpy as np
import paddle
import pytest

import engine
import optim
import runtime.loader
from datasets import get_dataloader, get_dataset
from mobileone import build_mobileone
from run import Run, build_training, save_config
from run import run as train
from runtime import checkpoint
from runtime.loader import StoppedWaiting
from utils import LOG, UserError


@pytest.fixture
def loaders(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL, config.DATA.NUM_WORKERS = 16, 8, 0
    return [get_dataloader(config, get_dataset(config, is_train), is_train) for is_train in (True, False)]


def scripted(monkeypatch, accuracies, loss=1.0):
    """Make evaluations return these accuracies in turn."""
    results = iter(accuracies)
    monkeypatch.setattr(engine, 'evaluate', lambda networks, *args: {
        name: engine.Metrics(loss, next(results), 50.0, 35, 1.0) for name, _ in networks})


@pytest.mark.parametrize('ema, best', [(True, {'acc1': 40.0, 'epoch': 2}), (False, {'acc1': 60.0, 'epoch': 3})])
def test_ema_decides_on_the_best_epoch(config, fashion, tmp_path, monkeypatch, ema, best):
    config.DATA.DATA_PATH, config.SAVE = str(fashion), str(tmp_path)
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.TRAIN.MODEL_EMA = 3, 0, ema
    config.DATA.NUM_WORKERS = 0
    # the raw weights improve until the last epoch, the EMA is best in the second
    scripted(monkeypatch, [50.0, 30.0, 55.0, 40.0, 60.0, 20.0] if ema else [50.0, 55.0, 60.0])
    train(config)
    state = checkpoint.load(str(tmp_path / 'best.pdparams'))
    assert state['best'] == best and state['epoch'] == best['epoch']
    assert checkpoint.load(str(tmp_path / 'latest.pdparams'))['best'] == best


def test_a_diverged_evaluation_ends_the_run_and_is_not_saved(config, fashion, tmp_path, monkeypatch):
    config.DATA.DATA_PATH, config.SAVE = str(fashion), str(tmp_path)
    config.TRAIN.WARMUP_EPOCHS = config.DATA.NUM_WORKERS = 0
    scripted(monkeypatch, [3.0, 3.0], loss=float('nan'))
    with pytest.raises(UserError, match='the val loss with raw weights in epoch 1 is nan: lower TRAIN.BASE_LR'):
        train(config)
    assert [path.name for path in tmp_path.glob('*.pdparams')] == ['latest.pdparams']
    assert checkpoint.load(str(tmp_path / 'latest.pdparams'))['progress']  # saved before the evaluation
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [row['split'] for row in rows] == ['train']
    assert 'error: the val loss' in (tmp_path / 'log.txt').read_text()


def test_weights_that_are_not_finite_are_not_saved(config, loaders, tmp_path):
    config.SAVE = str(tmp_path)
    training = build_training(config, build_mobileone(config), loaders[0])
    engine.train_step(training, [next(iter(loaders[0]))], 0)
    run = Run(config, training, done=1)
    run.save()
    before = (tmp_path / 'latest.pdparams').read_bytes()
    run.done = 2
    velocity = optim.optimizer_state(training.optimizer, training.model)['fc.bias.velocity']
    for tensor in (training.ema.network.fc.bias, training.model.fc.bias, velocity):
        tensor.set_value(np.full([10], np.inf, 'float32'))
        with pytest.raises(engine.NotFiniteError, match='a weight or optimizer value after epoch 2 is nan'):
            run.save()
        tensor.set_value(np.zeros([10], 'float32'))
    assert (tmp_path / 'latest.pdparams').read_bytes() == before and run.last_checkpoint.endswith('(epoch 1)')


def test_a_loss_that_is_not_finite_is_not_saved(config, loaders, tmp_path):
    config.SAVE = str(tmp_path)
    run = Run(config, build_training(config, build_mobileone(config), loaders[0]))
    run.part = engine.EpochPart(1, 2, paddle.to_tensor([math.inf, 0, 0], dtype='float64'), 16, 1.0)
    with pytest.raises(engine.NotFiniteError, match='the training loss in epoch 1, step 2, is inf: lower TRAIN.BASE_'):
        run.save()
    assert os.listdir(tmp_path) == []
    run.part.sums = paddle.zeros([3], dtype='float64')
    run.save()
    assert os.listdir(tmp_path) == ['latest.pdparams']


def test_error_of_a_bad_loss_names_the_last_checkpoint(config, fashion, tmp_path, monkeypatch):
    config.DATA.DATA_PATH, config.SAVE, config.DATA.BATCH_SIZE = str(fashion), str(tmp_path), 20
    config.TRAIN.WARMUP_EPOCHS = config.DATA.NUM_WORKERS = 0
    batch_sums, calls = engine.batch_sums, []

    def broken(*args):
        calls.append(None)
        return batch_sums(*args) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(engine, 'batch_sums', broken)
    for freq, last in ((0, 'none, because nothing is saved yet'),
                       (1, f'{tmp_path}/1/latest.pdparams (epoch 1, step 2)')):
        calls.clear()
        config.SAVE_FREQ_STEPS, config.SAVE = freq, str(tmp_path / str(freq))
        with pytest.raises(UserError) as error:
            train(config)
        assert str(error.value) == (
            'the training loss in epoch 1, steps 2 to 3, is nan: lower TRAIN.BASE_LR, or check MODEL.PRETRAINED and '
            f'the labels; last good checkpoint: {last}')


def test_waiting_for_images_is_reported_once_per_epoch(config, fashion, tmp_path, monkeypatch):
    """Only training reports it: in evaluation, reading images normally takes most of the time."""
    monkeypatch.setattr(runtime.loader, 'SLOW_SECONDS', 0)
    monkeypatch.setattr(runtime.loader, 'SLOW_SHARE', 0)
    monkeypatch.setattr(runtime.loader, 'cores_per_process', lambda: 1)
    config.DATA.DATA_PATH, config.SAVE, config.TRAIN.NUM_EPOCHS = str(fashion), str(tmp_path), 2
    config.TRAIN.WARMUP_EPOCHS, config.DATA.NUM_WORKERS, config.DATA.BATCH_SIZE = 0, 0, 16
    train(config)
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    warned = [number for number, line in enumerate(lines) if 'warning: ' in line]
    ends = [number for number, line in enumerate(lines) if ' train raw: ' in line]
    assert len(warned) == 2 and warned[0] < ends[0] < warned[1] < ends[1]
    assert 'of the time is spent waiting for images: use more cores' in lines[warned[0]]


def test_default_workers_are_logged(config, fashion, tmp_path, monkeypatch):
    """The saved config keeps the -1, so that a run resumed on another machine uses that machine's default."""
    monkeypatch.setattr(runtime.loader, 'default_workers', lambda: 3)
    config.DATA.DATA_PATH, config.SAVE = str(fashion), str(tmp_path)
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.DATA.NUM_WORKERS = 1, 0, -1
    train(config)
    assert ', data workers per process: 3, folder ' in (tmp_path / 'log.txt').read_text()
    assert 'NUM_WORKERS: -1' in (tmp_path / 'config.yaml').read_text()


def test_backend_is_logged_and_may_change_on_resume(config, fashion, tmp_path, monkeypatch):
    config.DATA.DATA_PATH, config.SAVE = str(fashion), str(tmp_path)
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.DATA.NUM_WORKERS = 2, 0, 0
    line = 'DATA.IMAGE_BACKEND {}: JPEG files for training are read by {}\n'
    scripted(monkeypatch, [50.0] * 8)
    train(config)
    log = (tmp_path / 'log.txt').read_text()
    assert line.format('auto', 'simplejpeg and OpenCV') in log
    assert 'IMAGE_BACKEND: auto' in (tmp_path / 'config.yaml').read_text()
    config.DATA.IMAGE_BACKEND, config.MODEL.RESUME, config.TRAIN.NUM_EPOCHS = 'pillow', 'auto', 3
    train(config)
    log = (tmp_path / 'log.txt').read_text()[len(log):]
    assert line.format('pillow', 'Pillow') in log
    assert 'DATA.IMAGE_BACKEND' in next(text for text in log.splitlines() if 'differs from' in text and 'IMAGE' in text)


def test_number_of_workers_may_change_on_resume(config, fashion, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(LOG, 'propagate', True)
    caplog.set_level('INFO', LOG.name)
    config.DATA.DATA_PATH, config.SAVE, config.MODEL.RESUME = str(fashion), str(tmp_path), 'auto'
    for workers in (2, -1, 0):
        config.DATA.NUM_WORKERS = workers
        save_config(config)
    assert caplog.records == []
    config.SEED = 5
    save_config(config)
    assert 'differs from' in caplog.text and 'SEED' in caplog.text


def test_fine_tuning_evaluates_its_start_once(config, fashion, tmp_path, monkeypatch):
    """It does if the classifier is new or the backbone frozen, and not again when the run is resumed."""
    config.DATA.DATA_PATH, config.DATA.NUM_WORKERS, config.TRAIN.NUM_EPOCHS = str(fashion), 0, 1
    paths = {}
    for classes in (10, 12):
        config.MODEL.NUM_CLASSES, paths[classes] = classes, str(tmp_path / f'{classes}.pdparams')
        checkpoint.save(build_mobileone(config).state_dict(), paths[classes])
    config.MODEL.NUM_CLASSES = 10
    scripted(monkeypatch, [50.0] * 20)
    for path, freeze, first in ((paths[10], 'none', 1), ('', 'none', 1), (paths[10], 'backbone', 0),
                                (paths[12], 'none', 0)):
        folder = tmp_path / f'run-{os.path.basename(path)}-{freeze}'
        config.MODEL.PRETRAINED, config.TRAIN.FREEZE, config.SAVE = path, freeze, str(folder)
        train(config)
        rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
        assert [row['epoch'] for row in rows] == [0][first:] + [1, 1, 1]
    assert rows[0]['lr'] is None and rows[0]['split'] == 'val' and rows[0]['weights'] == 'raw'
    config.MODEL.RESUME, config.TRAIN.NUM_EPOCHS = 'auto', 2
    train(config)
    rows = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert [row['epoch'] for row in rows] == [0, 1, 1, 1, 2, 2, 2]
    config.TRAIN.FREEZE = 'backbone'
    with pytest.raises(UserError, match='its optimizer state does not match: .*; resume with the .*, TRAIN.FREEZE and'):
        train(config)


@pytest.mark.parametrize('done', [0, 1])
def test_restarted_fine_tuning_records_its_start_once(config, fashion, tmp_path, monkeypatch, done):
    """The run failed before its first checkpoint."""
    config.DATA.DATA_PATH, config.DATA.NUM_WORKERS, config.TRAIN.NUM_EPOCHS = str(fashion), 0, done + 1
    config.SAVE, config.MODEL.RESUME, config.TRAIN.LAST_EPOCH = str(tmp_path), 'auto', done
    config.TRAIN.FREEZE, config.MODEL.PRETRAINED = 'backbone', str(tmp_path / 'start/w.pdparams')
    checkpoint.save(build_mobileone(config).state_dict(), config.MODEL.PRETRAINED)
    scripted(monkeypatch, [50.0] * 8)

    def fail(*args):
        raise UserError('the mistake')

    def epochs():
        return [json.loads(line)['epoch'] for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    with monkeypatch.context() as patch, pytest.raises(UserError, match='the mistake'):
        patch.setattr(engine, 'train_one_epoch', fail)
        train(config)
    assert epochs() == [done]
    train(config)
    assert epochs() == [done] + [done + 1] * 3


@pytest.mark.parametrize('evaluation', [False, True])
def test_class_names_are_copied_to_the_run(config, tmp_path, evaluation):
    """An evaluation does not replace existing class names."""
    config.DATA.DATA_PATH, config.SAVE, config.EVAL = str(tmp_path), str(tmp_path / 'run'), evaluation
    (tmp_path / 'run').mkdir()
    for names in ('cat', 'dog'):
        (tmp_path / 'class_names.txt').write_text(names)
        save_config(config)
    assert (tmp_path / 'run/class_names.txt').read_text() == ('cat' if evaluation else 'dog')


def test_stop_during_the_first_evaluation_of_fine_tuning(config, loaders, tmp_path, monkeypatch, caplog):
    """The message is logged, and no checkpoint is written, because there is nothing to save."""
    monkeypatch.setattr(LOG, 'propagate', True)
    caplog.set_level('INFO', LOG.name)
    config.SAVE = str(tmp_path)
    run = Run(config, build_training(config, build_mobileone(config), loaders[0]), evaluates_start=True)
    run.stop.name = 'SIGTERM'
    with pytest.raises(SystemExit):
        run.train(*loaders)
    assert caplog.messages[-1] == ('stopped by SIGTERM; nothing is saved yet: the same command with -output '
                                   f'{tmp_path} -resume auto starts from scratch')
    assert os.listdir(tmp_path) == []

    def wait(*args):
        raise StoppedWaiting
    monkeypatch.setattr(engine, 'evaluate', wait)
    with pytest.raises(SystemExit):
        run.train(*loaders)
