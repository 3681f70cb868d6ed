"""The metrics, the training step, the epoch and the evaluation, in one process."""
import contextlib
import fcntl
import multiprocessing
import os
import re
import struct
import termios
from types import SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from conftest import ROOT, run, variant_config

import engine
from datasets import TrainSampler, get_dataloader, get_dataset
from losses import LabelSmoothingCrossEntropyLoss
from mobileone import build_mobileone
from optim import Schedule, build_schedule
from run import build_training
from tools.benchmark.launches import count_launches
from transforms import Normalize
from utils import Progress, UserError
from weights import load_into


def test_batch_sums():
    falling = [9, 8, 7, 6, 5, 4, 3]
    logits = paddle.to_tensor(np.array([falling, falling, falling[::-1]], 'float32'))
    labels = paddle.to_tensor(np.array([0, 4, 1]))  # best, fifth, sixth
    sums = engine.batch_sums(logits, labels, paddle.to_tensor(0.5))
    assert sums.dtype == paddle.float64 and sums.numpy().tolist() == [1.5, 1, 2]
    sums = engine.batch_sums(logits[:, :2], paddle.to_tensor(np.array([0, 1, 0])), paddle.to_tensor(1.0))
    assert sums.numpy().tolist() == [3, 1, 3]  # with two classes, all images are correct in the top 2


@pytest.fixture
def loaders(config, fashion):
    config.DATA.DATA_PATH = str(fashion)
    config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL, config.DATA.NUM_WORKERS = 16, 8, 0
    return [get_dataloader(config, get_dataset(config, is_train), is_train) for is_train in (True, False)]


def test_evaluation_counts_every_image_once(config, loaders):
    model, normalize = build_mobileone(config), Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    with paddle.no_grad():  # collect batch-norm statistics of these images, so that the logits differ between images
        for images, _ in loaders[0]:
            model(normalize(images))
    metrics = engine.evaluate([('raw', model)], loaders[1], normalize)['raw']
    with paddle.no_grad():
        images, labels = map(paddle.concat, zip(*loaders[1]))
        logits = model(normalize(images))
    best = np.argsort(-logits.numpy(), axis=1)
    hits = best == labels.numpy()[:, None]
    assert metrics.n == 35 and not model.training
    assert metrics.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert metrics.acc1 == pytest.approx(100 * hits[:, 0].mean())
    assert metrics.acc5 == pytest.approx(100 * hits[:, :5].any(1).mean())
    assert {type(value) for value in metrics.record().values()} == {float, int}  # acc1 is saved in checkpoints
    assert set(metrics.record()) == {'loss', 'acc1', 'acc5', 'n', 'seconds', 'images_per_second'}


def test_evaluation_fails_if_an_image_is_missing(config, loaders):
    loaders[1].batch_sampler.indices = range(34)
    with pytest.raises(RuntimeError, match='evaluated 34 of 35 images'):
        engine.evaluate([('raw', build_mobileone(config))], loaders[1],
                        Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD))


def test_networks_are_evaluated_in_one_pass(config, loaders):
    normalize, read = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD), []
    networks = [(name, build_mobileone(config)) for name in ('raw', 'ema')]
    alone = [engine.evaluate([network], loaders[1], normalize) for network in networks]
    transform = loaders[1].dataset.transform
    loaders[1].dataset.transform = lambda *args: read.append(None) or transform(*args)
    together = engine.evaluate(networks, loaders[1], normalize)
    assert len(read) == 35 and list(together) == ['raw', 'ema']
    for name, metrics in together.items():
        expected = {**alone[0], **alone[1]}[name]
        assert (metrics.loss, metrics.acc1, metrics.acc5, metrics.n) == (
            expected.loss, expected.acc1, expected.acc5, expected.n)
    assert together['raw'].loss != together['ema'].loss


@pytest.mark.parametrize('training_too', [False, True])
def test_workers_end_when_an_exception_leaves_the_loop(config, fashion, training_too):
    """For example `sys.exit`. The workers end although the exception keeps the loop's frame alive."""
    config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.DATA.NUM_WORKERS = str(fashion), 4, 2
    loader = get_dataloader(config, get_dataset(config, training_too), training_too)

    def leave(*args):
        assert len(multiprocessing.active_children()) == 2
        raise SystemExit
    model = build_mobileone(config)
    with pytest.raises(SystemExit) as error:
        if training_too:
            engine.train_one_epoch(build_training(config, model, loader), loader, engine.EpochPart.none(1),
                                   after_step=leave)
        else:
            engine.evaluate([('raw', model)], loader, Normalize([0.5] * 3, [0.5] * 3), after_batch=leave)
    assert error.value.__traceback__ and multiprocessing.active_children() == []


def test_training_step(config, loaders):
    """A step is: forward, smoothed loss, backward, optimizer step at this step's lr, EMA update."""
    config.TRAIN.NUM_EPOCHS, config.TRAIN.WARMUP_EPOCHS = 4, 2
    schedule = Schedule(config, len(loaders[0]), 16)
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    criterion = LabelSmoothingCrossEntropyLoss(0.2)
    config.TRAIN.SMOOTHING = 0.2
    models = [build_mobileone(config), build_mobileone(config)]
    models[1].set_state_dict(models[0].state_dict())
    trainings = [build_training(config, model, loaders[0]) for model in models]
    images, labels = next(iter(loaders[0]))
    for step in (0, 1, 5):
        sums = engine.train_step(trainings[0], [(images, labels)], step)
        model, optimizer = models[1], trainings[1].optimizer
        loss = criterion(model(normalize(images)), labels)
        assert float(sums[0]) == pytest.approx(16 * float(loss), rel=1e-6)
        loss.backward()
        optimizer.set_lr(schedule.lr(step))
        optimizer.step()
        optimizer.clear_grad()
        before = trainings[1].ema.network.fc.weight.numpy()
        decay = schedule.ema_decay(step)
        trainings[1].ema.update(decay)
        np.testing.assert_allclose(trainings[1].ema.network.fc.weight.numpy(),
                                   decay * before + (1 - decay) * model.fc.weight.numpy(), rtol=1e-5, atol=1e-7)
    for first, second in (models, [training.ema.network for training in trainings]):
        for name, tensor in first.state_dict().items():
            np.testing.assert_allclose(tensor.numpy(), second.state_dict()[name].numpy(), rtol=1e-5, atol=1e-6)
    assert trainings[0].optimizer.get_lr() == schedule.lr(5) != schedule.lr(1)


def test_time_left():
    assert str(engine.time_left(10, 20, 60)) == '0:00:30'
    assert str(engine.time_left(10, 20, 60, evaluation_seconds=3600)) == '1:00:30'
    assert engine.time_left(1e9, 1, 2 ** 53).days > 100_000


def test_a_shorter_last_window_is_averaged_too(config, loaders):
    """The gradient of a window is the mean over the batches it actually has, here two or one."""
    config.TRAIN.ACCUM_ITER, config.TRAIN.MODEL_EMA, config.TRAIN.OPTIMIZER.MOMENTUM = 2, False, 0.0
    config.TRAIN.WARMUP_EPOCHS, config.TRAIN.WEIGHT_DECAY = 0, 0.0
    batches = list(loaders[0])
    assert [len(window) for window in engine.windows(batches, 2)] == [2, 1] and len(batches) == 3
    assert build_schedule(config, loaders[0].batch_sampler).steps_per_epoch == 2
    for window in engine.windows(batches, 2):
        model = build_mobileone(config)
        training = build_training(config, model, loaders[0])
        start = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        gradients = []
        for images, labels in window:
            inputs = training.normalize(images)
            training.criterion(inputs, model(inputs), labels).backward()
            gradients.append(model.fc.weight.grad.numpy())
            model.clear_gradients()
        model.set_state_dict(start)
        engine.train_step(training, window, 0)
        np.testing.assert_allclose(start['fc.weight'] - model.fc.weight.numpy(),
                                   training.schedule.lr(0) * np.mean(gradients, axis=0), rtol=1e-3, atol=1e-7)


def test_gradients_are_clipped_by_their_global_norm(config, loaders):
    config.TRAIN.OPTIMIZER.MOMENTUM = config.TRAIN.WEIGHT_DECAY = 0.0
    config.TRAIN.WARMUP_EPOCHS = 0
    moved = []
    for clip in (0.0, 1e6, 0.01):
        config.TRAIN.GRAD_CLIP = clip
        paddle.seed(0)
        model = build_mobileone(config)
        start = [parameter.numpy() for parameter in model.parameters()]
        training = build_training(config, model, loaders[0])
        engine.train_step(training, [next(iter(loaders[0]))], 0)
        moved.append([(after.numpy() - before).ravel() for before, after in zip(start, model.parameters())
                      if not after.stop_gradient])
    free, loose, tight = map(np.concatenate, moved)
    np.testing.assert_allclose(loose, free, rtol=1e-4, atol=1e-7)
    lr = training.schedule.lr(0)
    assert np.linalg.norm(tight) == pytest.approx(0.01 * lr, rel=1e-3)
    np.testing.assert_allclose(tight / np.linalg.norm(tight), free / np.linalg.norm(free), atol=1e-3)


def test_mixup_depends_only_on_seed_step_and_rank(config, loaders, monkeypatch):
    config.TRAIN.MIXUP_ALPHA = 1.0
    batch = next(iter(loaders[0]))

    def mixed(seed, step, rank=0):
        config.SEED = seed
        monkeypatch.setattr(engine, 'rank', lambda: rank)
        paddle.seed(0)
        training = build_training(config, build_mobileone(config), loaders[0])
        return float(engine.train_step(training, [batch], step)[0])
    first = mixed(1, 5)
    assert mixed(1, 5) == first and len({first, mixed(2, 5), mixed(1, 6), mixed(1, 5, rank=1)}) == 4


class FakeScaler:
    def __init__(self, enable, calls):
        self.enable, self.calls = enable, calls

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            if name == 'step':
                args[0].step()
            return args[0] if args else None
        return call


@pytest.mark.parametrize('dtype, level', [('float16', 'O1'), ('bfloat16', 'o2')])
def test_mixed_precision_is_used_in_training_and_evaluation(config, loaders, monkeypatch, dtype, level):
    """Checks, on a simulated GPU, the arguments passed to Paddle and the order of the scaler's calls."""
    contexts, calls = [], []

    @contextlib.contextmanager
    def auto_cast(**kwargs):
        contexts.append(kwargs)
        yield
    config.AMP, config.AMP_DTYPE, config.AMP_LEVEL, config.TRAIN.GRAD_CLIP = True, dtype, level, 1.0
    training = build_training(config, build_mobileone(config), loaders[0])
    monkeypatch.setattr(paddle.device, 'get_device', lambda: 'gpu:0')
    monkeypatch.setattr(paddle.amp, f'is_{dtype}_supported', lambda: True)
    monkeypatch.setattr(paddle.amp, 'auto_cast', auto_cast)
    monkeypatch.setattr(paddle.amp, 'GradScaler', lambda enable: FakeScaler(enable, calls))
    training.precision = engine.Precision(config)
    assert training.precision.scaler.enable == (dtype == 'float16')
    engine.train_step(training, [next(iter(loaders[0]))], 0)
    expected = {'enable': True, 'level': level.upper(), 'dtype': dtype, 'custom_white_list': {'depthwise_conv2d'}}
    gathering = {'enable': False}  # merged branches gather their tensors in float32
    assert contexts == [expected, gathering] and calls == ['scale', 'unscale_', 'step', 'update']
    contexts.clear()
    engine.evaluate([('raw', training.model)], loaders[1], training.normalize, auto_cast=training.precision.auto_cast)
    assert contexts == [expected] * len(loaders[1])
    monkeypatch.setattr(paddle.amp, f'is_{dtype}_supported', lambda: False)
    with pytest.raises(UserError, match=f"AMP_DTYPE is '{dtype}', which this GPU does not support"):
        engine.Precision(config)


@pytest.mark.parametrize('level', ['O1', 'O2'])
def test_every_convolution_is_in_half_precision(fashion, level):
    """Traces GPU training on a CPU: Paddle logs the type that it chooses before it notices that there is no GPU.

    The types of batch norms and sums are not checked: these follow their inputs, which stay float32 on a CPU.
    """
    # Paddle reads its environment variables when it is imported
    process = run(ROOT / 'tests/workers.py', 'amp', fashion, level, fork=False, env={
        'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'GLOG_v': '6', 'GLOG_minloglevel': '0', 'GLOG_logtostderr': '1'})
    depthwise, dense = map(int, process.stdout.split())
    wanted = re.findall(r"Change (\w+)'s AMP type from (\w+) to FP32", process.stderr)
    types = re.findall(r'AMP GetAmpDestDtype: op\((\w+)\)', process.stderr)
    for operator, count in (('conv2d', dense), ('depthwise_conv2d', depthwise)):
        assert count and types.count(operator) == count and wanted.count((operator, 'bfloat16')) == count
    assert types.count('batch_norm') > 0 and not any(operator == 'batch_norm' for operator, _ in wanted)


def test_train_step_never_waits_for_the_device(config, loaders, monkeypatch):
    config.TRAIN.GRAD_CLIP, config.TRAIN.RANDOM_ERASE_PROB = 1.0, 0.5
    training = build_training(config, build_mobileone(config), loaders[0])
    batch = next(iter(loaders[0]))
    engine.train_step(training, [batch], 0)  # the first step allocates state

    def wait(tensor, *args):
        raise AssertionError('waits for the device')
    for name in ('numpy', 'item', 'tolist', '__float__', '__int__', '__bool__', '__array__'):
        monkeypatch.setattr(paddle.Tensor, name, wait)
    sums = engine.train_step(training, [batch, batch], 1)
    with pytest.raises(AssertionError, match='waits for the device'):
        float(sums[0])


@pytest.mark.parametrize('on_cpu, most', [(True, 1200), (False, 950)])
def test_launches_of_a_step(monkeypatch, on_cpu, most):
    """Tests S0 with EMA, label smoothing and SGD, with CPU and with GPU operators."""
    monkeypatch.setattr('mobileone._is_on_cpu', lambda x: on_cpu)
    config = variant_config('s0')
    assert config.TRAIN.MODEL_EMA and config.TRAIN.SMOOTHING and config.TRAIN.OPTIMIZER.NAME == 'SGD'
    model = build_mobileone(config)
    training = build_training(config, model, SimpleNamespace(batch_sampler=TrainSampler(8, 2, seed=0)))
    model.train()
    batch = paddle.zeros([2, 64, 64, 3], 'uint8'), paddle.zeros([2], 'int64')

    def step():
        engine.train_step(training, [batch], 0)
    step()
    assert count_launches(step) <= most
    # tensors must not share a buffer: Tensor.numpy() would return all of it
    tensors = [*model.state_dict().values(), *training.ema.network.state_dict().values()]
    assert not any(tensor._is_shared_buffer_with(following) for tensor, following in zip(tensors, tensors[1:]))


def test_synchronized_batch_norms_keep_names_and_weights(config):
    """Only the conversion is tested: synchronized batch norms have no CPU kernel."""
    model = build_mobileone(config)
    converted = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(build_mobileone(config))
    assert [(name, tensor.shape) for name, tensor in converted.state_dict().items()] == [
        (name, tensor.shape) for name, tensor in model.state_dict().items()]
    kinds = {type(layer).__name__ for layer in converted.sublayers()}
    assert 'SyncBatchNorm' in kinds and 'BatchNorm2D' not in kinds
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert load_into(converted, weights, 'x') == []
    np.testing.assert_array_equal(converted.state_dict()['fc.weight'].numpy(), weights['fc.weight'])


class TimesScaler:
    """Scales the loss by 1024, as Paddle's float16 scaler does on a GPU."""

    def __init__(self, model):
        self.parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]

    def scale(self, loss):
        return loss * 1024

    def unscale_(self, optimizer):
        for parameter in self.parameters:
            parameter.grad = parameter.grad / 1024

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass


def test_gradients_are_clipped_after_they_are_unscaled(config, loaders):
    config.TRAIN.OPTIMIZER.MOMENTUM = config.TRAIN.WEIGHT_DECAY = 0.0
    config.TRAIN.WARMUP_EPOCHS = 0

    def gradient(scaled, clip):
        """Return all gradients of a step, computed from the change of the weights."""
        config.TRAIN.GRAD_CLIP = clip
        paddle.seed(0)
        model = build_mobileone(config)
        training = build_training(config, model, loaders[0])
        parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
        start = [parameter.numpy() for parameter in parameters]
        if scaled:
            training.precision.scaler = TimesScaler(model)
        engine.train_step(training, [next(iter(loaders[0]))], 0)
        return np.concatenate([(before - after.numpy()).ravel() for before, after in zip(start, parameters)]
                              ) / training.schedule.lr(0)
    free = gradient(False, 0.0)
    norm = float(np.linalg.norm(free))
    for clip, expected in ((2 * norm, norm), (norm / 2, norm / 2)):  # the first is far below the scaled norm
        assert np.linalg.norm(gradient(True, clip)) == pytest.approx(expected, rel=1e-3)


def test_training_accuracy_under_mixup_counts_the_larger_share(config, loaders):
    """If CutMix boxes cover most of an image, the class of the pasted image is the correct one."""
    config.TRAIN.CUTMIX_MINMAX, config.TRAIN.MODEL_EMA = [0.9, 0.9], False
    training = build_training(config, build_mobileone(config), loaders[0])
    training.network = lambda images: paddle.nn.functional.one_hot(labels.flip(axis=0), 10).detach() + 0 * (
        training.model(images))
    images, labels = next(iter(loaders[0]))
    assert engine.train_step(training, [(images, labels)], 0)[1].item() == len(labels)


def test_part_of_an_epoch_is_the_same_after_a_resume(config, loaders):
    training = build_training(config, build_mobileone(config), loaders[0])
    part = engine.EpochPart(3, 2, paddle.to_tensor([1.5, 2.0, 4.0], dtype='float64'), 16, 12.5)
    state = part.state(training.schedule)
    again = engine.EpochPart.resumed(3, state, training.schedule)
    assert (again.epoch, again.steps, again.n, again.seconds) == (3, 2, 16, 12.5)
    assert again.sums.tolist() == part.sums.tolist()
    # a finished epoch is kept even if steps, images per step and number of processes differ
    whole = {**state, 'steps': 3, 'steps_per_epoch': 3, 'sums': np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])}
    again = engine.EpochPart.resumed(3, whole, training.schedule)
    assert (again.steps, again.n, again.sums.tolist()) == (training.schedule.steps_per_epoch, 12, [6, 8, 10])
    for key, value in (('steps_per_epoch', 50), ('total_batch', 3), ('sums', np.zeros([2, 4]))):
        assert engine.EpochPart.resumed(3, {**state, key: value}, training.schedule) is None


@pytest.mark.parametrize('seconds, steps', [(0.01, [1, 12]), (1.0, [1, 6, 11, 12]), (2.0, [1, 3, 5, 7, 9, 11, 12]),
                                            (7.0, list(range(1, 13)))])
def test_ranks_agree_every_five_seconds(config, loaders, monkeypatch, seconds, steps):
    """Ranks also agree after the first step of an epoch and at log lines; here, only the last step logs."""
    config.DATA.BATCH_SIZE = 5
    loader = get_dataloader(config, get_dataset(config))
    training = build_training(config, build_mobileone(config), loader)
    now, agreed, stopped, agree = [0.0], [], [], engine.agree
    monkeypatch.setattr(engine.time, 'perf_counter', lambda: now[0])

    def step(training, batches, step):
        now[0] += seconds
        return paddle.zeros([3], dtype='float64')

    def counted(part, *args):
        agreed.append(part.steps)
        return agree(part, *args)
    monkeypatch.setattr(engine, 'train_step', step)
    monkeypatch.setattr(engine, 'agree', counted)
    metrics = engine.train_one_epoch(training, loader, engine.EpochPart.none(1), 100)
    assert agreed == steps and metrics.seconds == pytest.approx(12 * seconds)
    # a single process stops without waiting for the next agreement
    engine.train_one_epoch(training, loader, engine.EpochPart.none(2), 100, lambda: now[0] > 15 * seconds,
                           lambda part, stopping: stopped.append((part.steps, stopping)))
    assert [step for step, stopping in stopped if stopping] == list(range(4, 13))


def test_log_line_omits_acc5_for_five_classes():
    metrics = engine.Metrics(1.0, 50.0, 100.0, 20, 2.0)
    assert metrics.describe(5) == 'loss 1.0000 acc1 50.00% on 20 images in 2.0 s (10.0 images/s)'
    assert metrics.describe(6) == 'loss 1.0000 acc1 50.00% acc5 100.00% on 20 images in 2.0 s (10.0 images/s)'


def test_progress_bar_of_a_long_training_fits_80_columns(config, monkeypatch):
    config.TRAIN.NUM_EPOCHS = 300
    training = SimpleNamespace(schedule=Schedule(config, 5004, 256), evaluation_seconds=0.0)
    part = engine.EpochPart(150, 5004, None, 0, 0.0)
    text, _ = engine.describe_part(part, engine.Metrics(6.9078, 0, 0, 1281024, 1000.0), training, 0.05)
    outer, inner = os.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack('HHHH', 25, 80, 0, 0))
    with os.fdopen(inner, 'w') as screen:
        monkeypatch.setattr('sys.stdout', screen)
        progress = Progress('epoch 150/300', 5004, 50, done=5003)
        progress.step()
        progress.show(text)
        shown = b''
        while not shown.endswith(b'40:00'):  # a terminal delivers the text in pieces
            shown += os.read(outer, 4096)
    os.close(outer)
    shown = shown.decode().split('\r')[-1]
    assert re.fullmatch(r'epoch 150/300 \|.+\| 5004/5004, loss 6.9078 1281.0 images/s ETA 1 day, 17:40:00', shown)
    assert len(shown) <= 80
