"""A run: what decides on the best epoch, what is not saved, how it is asked to stop."""
import json
import math
import os

import numpy as np
import paddle
import pytest

import engine
import optim
from datasets import get_dataloader, get_dataset
from mobileone import build_mobileone
from run import Run, build_training
from run import run as train
from runtime import checkpoint
from utils import UserError


@pytest.fixture
def loaders(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL, config.DATA.NUM_WORKERS = 16, 8, 0
    return [get_dataloader(config, get_dataset(config, is_train), is_train) for is_train in (True, False)]


def scripted(monkeypatch, accuracies, loss=1.0):
    """Let evaluations return these accuracies, one after the other."""
    results = iter(accuracies)
    monkeypatch.setattr(engine, 'evaluate', lambda networks, *args: {
        name: engine.Metrics(loss, next(results), 50.0, 35, 1.0) for name, _ in networks})


@pytest.mark.parametrize('ema, best', [(True, {'acc1': 40.0, 'epoch': 2}), (False, {'acc1': 60.0, 'epoch': 3})])
def test_best_is_chosen_by_the_ema(config, fashion, tmp_path, monkeypatch, ema, best):
    config.DATA.DATA_PATH, config.SAVE = str(fashion), str(tmp_path)
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS, config.TRAIN.MODEL_EMA = 3, 0, ema
    config.DATA.NUM_WORKERS = 0
    # raw weights improve to the last epoch, their average is best in the second
    scripted(monkeypatch, [50.0, 30.0, 55.0, 40.0, 60.0, 20.0] if ema else [50.0, 55.0, 60.0])
    train(config)
    state = checkpoint.load(str(tmp_path / 'best.pdparams'))
    assert state['best'] == best and state['epoch'] == best['epoch']
    assert checkpoint.load(str(tmp_path / 'latest.pdparams'))['best'] == best


def test_a_diverged_evaluation_ends_the_run_and_is_not_saved(config, fashion, tmp_path, monkeypatch):
    config.DATA.DATA_PATH, config.SAVE = str(fashion), str(tmp_path)
    config.TRAIN.WARMUP_EPOCHS = config.DATA.NUM_WORKERS = 0
    scripted(monkeypatch, [3.0, 3.0], loss=float('nan'))
    with pytest.raises(UserError, match='the loss of val images with raw weights, epoch 1 is nan: lower TRAIN.BASE_LR'):
        train(config)
    assert [path.name for path in tmp_path.glob('*.pdparams')] == ['latest.pdparams']
    assert checkpoint.load(str(tmp_path / 'latest.pdparams'))['progress']  # that before the evaluation
    rows = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [row['split'] for row in rows] == ['train']
    assert 'error: the loss of val images' in (tmp_path / 'log.txt').read_text()


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
        with pytest.raises(engine.NotFiniteError, match='a weight, or a number of the optimizer, after epoch 2 is nan'):
            run.save()
        tensor.set_value(np.zeros([10], 'float32'))
    assert (tmp_path / 'latest.pdparams').read_bytes() == before and run.last_checkpoint.endswith('(epoch 1)')


def test_a_loss_that_is_not_finite_is_not_saved(config, loaders, tmp_path):
    config.SAVE = str(tmp_path)
    run = Run(config, build_training(config, build_mobileone(config), loaders[0]))
    run.part = engine.EpochPart(1, 2, paddle.to_tensor([math.inf, 0, 0], dtype='float64'), 16, 1.0)
    with pytest.raises(engine.NotFiniteError, match='the loss of training, epoch 1, step 2, is inf: lower TRAIN.BASE_'):
        run.save()
    assert os.listdir(tmp_path) == []
    run.part.sums = paddle.zeros([3], dtype='float64')
    run.save()
    assert os.listdir(tmp_path) == ['latest.pdparams']


def test_the_error_of_a_bad_loss_names_the_last_checkpoint(config, fashion, tmp_path, monkeypatch):
    config.DATA.DATA_PATH, config.SAVE, config.DATA.BATCH_SIZE = str(fashion), str(tmp_path), 20
    config.TRAIN.WARMUP_EPOCHS = config.DATA.NUM_WORKERS = 0
    batch_sums, calls = engine.batch_sums, []

    def broken(*args):
        calls.append(None)
        return batch_sums(*args) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setattr(engine, 'batch_sums', broken)
    for freq, last in ((0, 'none: no epoch was saved yet'), (1, f'{tmp_path}/1/latest.pdparams (epoch 1, step 2)')):
        calls.clear()
        config.SAVE_FREQ_STEPS, config.SAVE = freq, str(tmp_path / str(freq))
        with pytest.raises(UserError) as error:
            train(config)
        assert str(error.value) == (
            'the loss of training, epoch 1, steps 2 to 3, is nan: lower TRAIN.BASE_LR, or check MODEL.PRETRAINED and '
            f'the labels; the last good checkpoint is {last}')
