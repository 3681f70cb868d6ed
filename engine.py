"""The training step (`train_step`), evaluation (`evaluate`) and one epoch of training (`train_one_epoch`).

The same code serves one process and many. Whether training ends early (a bad loss, a stop request) depends only on
values that are the same on every rank. The loop over epochs is `Run.train` in run.py.
"""
import contextlib
import datetime
import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F

import optim
from mixup import Mixup
from transforms import Normalize, RandomErase
from utils import LOG, Progress, UserError, mean_over_ranks, rank, reduce_over_ranks, world_size


class NotFiniteError(UserError):
    """A value computed in training is infinite or NaN."""


def check_finite(value, what):
    """Raise NotFiniteError unless `value` is finite. what: its name in the message."""
    if not math.isfinite(value):
        raise NotFiniteError(f'{what} is {value}: lower TRAIN.BASE_LR, or check MODEL.PRETRAINED and the labels')


def check_tensors(groups, what):
    """Raise NotFiniteError, on every rank, unless all tensors are finite. groups: {name: {name: tensor}}."""
    finite = [paddle.stack([tensor.isfinite().all() for tensor in group.values()]).numpy()
              for group in groups.values() if group]
    good = reduce_over_ranks(np.concatenate(finite), 'MIN').all()
    check_finite(0.0 if good else np.nan, what)


class Precision:
    """Mixed precision (AMP, AMP_LEVEL and AMP_DTYPE of a config). Has an effect only on GPUs.

    auto_cast(): context manager for the forward pass. Weights stay float32 even at O2: they are small next to the
    activations, and the optimizer, the EMA and checkpoints need no second copy. scaler: loss scaling for float16.
    Raises: UserError for a GPU that does not support AMP_DTYPE.
    """

    def __init__(self, config):
        dtype = config.AMP_DTYPE.lower()
        enabled = config.AMP and paddle.device.get_device().startswith('gpu')
        if config.AMP and not enabled:
            LOG.info('mixed precision (AMP) has no effect on a CPU')
        if enabled and not getattr(paddle.amp, f'is_{dtype}_supported')():
            raise UserError(f'AMP_DTYPE is {config.AMP_DTYPE!r}, which this GPU does not support; use the other one '
                            '(float16 or bfloat16), or turn AMP off')
        # Paddle's own list has only dense convolutions (2.6.2, 3.3.1): depthwise ones would stay in float32
        self.auto_cast = functools.partial(paddle.amp.auto_cast, enable=enabled, level=config.AMP_LEVEL.upper(),
                                           dtype=dtype, custom_white_list={'depthwise_conv2d'})
        self.scaler = paddle.amp.GradScaler(enable=enabled and dtype == 'float16')


@dataclass
class Training:
    """Everything `train_step` needs."""
    model: paddle.nn.Layer
    # the model itself; with several processes, a DataParallel around it
    network: paddle.nn.Layer
    criterion: paddle.nn.Layer
    optimizer: paddle.optimizer.Optimizer
    schedule: optim.Schedule
    ema: Optional[optim.ModelEma]
    normalize: Normalize
    erase: Optional[RandomErase]
    mixup: Optional[Mixup]
    precision: Precision
    # batches per optimizer step
    accum_iter: int
    grad_clip: float
    seed: int
    # expected duration of the run's remaining evaluations, for the ETA
    evaluation_seconds: float = 0.0


@dataclass
class EpochPart:
    """The finished part of an epoch.

    epoch: from 1; steps: optimizer steps done; sums: total of `batch_sums`, and n: number of images, both on this rank;
    seconds: time taken.
    """
    epoch: int
    steps: int
    sums: paddle.Tensor
    n: int
    seconds: float

    @classmethod
    def none(cls, epoch):
        return cls(epoch, 0, paddle.zeros([3], dtype='float64'), 0, 0.0)

    def state(self, schedule):
        """Return plain numbers and an array of every rank's sums and n, [ranks, 4], for a checkpoint.

        Waits for the other ranks.
        """
        sums = np.zeros([world_size(), 4])
        sums[rank()] = [*self.sums.tolist(), self.n]
        return {'steps': self.steps, 'seconds': self.seconds, 'sums': reduce_over_ranks(sums),
                'steps_per_epoch': schedule.steps_per_epoch, 'total_batch': schedule.total_batch}

    @classmethod
    def resumed(cls, epoch, state, schedule):
        """Restore the part from its `state`. Returns None for an incomplete epoch if the steps or ranks differ now."""
        steps, keys = state['steps'], ('steps_per_epoch', 'total_batch')
        if len(state['sums']) == world_size() and all(state[key] == getattr(schedule, key) for key in keys):
            *sums, n = state['sums'][rank()].tolist()
        elif steps == state['steps_per_epoch']:
            steps = schedule.steps_per_epoch
            *sums, n = state['sums'].sum(axis=0).tolist() if rank() == 0 else np.zeros(4)
        else:
            return None
        return cls(epoch, steps, paddle.to_tensor(sums, dtype='float64'), round(n), state['seconds'])


@dataclass
class Metrics:
    """Means over n images of all ranks, and the time they took in seconds. acc1, acc5: percent."""
    loss: float
    acc1: float
    acc5: float
    n: int
    seconds: float

    @classmethod
    def from_sums(cls, sums, n, seconds):
        """sums: three floats, the `batch_sums` of n images."""
        loss, correct1, correct5 = (float(value) / max(1, n) for value in sums)
        return cls(loss, 100 * correct1, 100 * correct5, round(n), seconds)

    def record(self):
        return {'loss': self.loss, 'acc1': self.acc1, 'acc5': self.acc5, 'n': self.n,
                'seconds': round(self.seconds, 3), 'images_per_second': round(self.n / self.seconds, 2)}

    def describe(self, num_classes):
        """Return the text for a log line, without acc5 for five or fewer classes, where it would always be 100%."""
        acc5 = f' acc5 {self.acc5:.2f}%' if num_classes > 5 else ''
        return (f'loss {self.loss:.4f} acc1 {self.acc1:.2f}%{acc5} on {self.n} images in {self.seconds:.1f} s '
                f'({self.n / self.seconds:.1f} images/s)')


def batch_sums(logits, labels, loss):
    """Return sums over a batch, float64 [3] on the device: loss, top-1 hits, top-5 hits.

    logits: [N, C]; labels: [N]; loss: mean over the batch. With fewer than five classes, the top 5 are all classes.
    """
    best = logits.topk(min(5, logits.shape[1]), axis=1)[1]
    hits = (best == labels.unsqueeze(1)).astype('float64')
    return paddle.stack([loss.astype('float64') * len(labels), hits[:, 0].sum(), hits.sum()])


def train_step(training, batches, step):
    """Run one optimizer step on a window of batches (uint8 [N, H, W, 3], int64 [N]). step: global step, from 0.

    The gradient is the mean over the window's batches and over the ranks, which synchronize only at the last batch.
    Returns: `batch_sums` of the window, on the device. Nothing here waits for the device, except Paddle's scaler for
    float16.
    """
    rng = np.random.default_rng([training.seed, step, rank()])
    scaler, optimizer = training.precision.scaler, training.optimizer
    sums = paddle.zeros([3], dtype='float64')
    for index, (images, labels) in enumerate(batches):
        is_last = index + 1 == len(batches)
        inputs, targets = training.normalize(images), labels
        if training.erase:
            inputs = training.erase(inputs, rng)
        if training.mixup:
            inputs, targets = training.mixup(inputs, labels, rng)
            labels = targets.argmax(axis=1)
        with contextlib.nullcontext() if is_last or world_size() == 1 else training.network.no_sync():
            with training.precision.auto_cast():
                logits = training.network(inputs)
                loss = training.criterion(inputs, logits, targets)
            scaler.scale(loss / len(batches)).backward()
        sums += batch_sums(logits.detach(), labels, loss.detach())
    if training.grad_clip:
        scaler.unscale_(optimizer)
        paddle.nn.utils.clip_grad_norm_(training.model.parameters(), training.grad_clip)
    optimizer.set_lr(training.schedule.lr(step))
    optim.set_weight_decay(optimizer, training.schedule.weight_decay(step))
    scaler.step(optimizer)
    scaler.update()
    optimizer.clear_grad(set_to_zero=False)
    if training.ema:
        training.ema.update(training.schedule.ema_decay(step))
    return sums


@paddle.no_grad()
def evaluate(networks, loader, normalize, report_freq=50, auto_cast=contextlib.nullcontext, after_batch=lambda: None,
             predictions=None):
    """Evaluate networks on a loader's dataset, in one pass in which every image counts exactly once.

    With several processes, each evaluates its share of the images, and all return the metrics over all images.
    networks: [(name, network)], left in evaluation mode; report_freq: batches between progress lines when there is no
    terminal for a bar; auto_cast: see `Precision`; after_batch(): called after each batch; predictions: `Predictions`
    to collect the outputs of a single network.
    Returns: {name: Metrics}. Raises: RuntimeError if the loader skips images.
    """
    for _, network in networks:
        network.eval()
    start, n = time.perf_counter(), 0
    sums = paddle.zeros([len(networks), 3], dtype='float64')
    progress = Progress('evaluation', len(loader), report_freq)
    with contextlib.closing(iter(loader)) as batches:
        for images, labels in batches:
            inputs, rows = normalize(images), []
            for _, network in networks:
                with auto_cast():
                    logits = network(inputs)
                logits = logits.astype('float32')
                rows.append(batch_sums(logits, labels, F.cross_entropy(logits, labels)))
                if predictions:
                    predictions.add(logits, labels)
            sums += paddle.stack(rows)
            n += len(labels)
            if progress.step():
                progress.show(f'{world_size() * n / (time.perf_counter() - start):.1f} images/s')
            after_batch()
    progress.close()
    *sums, n = reduce_over_ranks([*sums.flatten().tolist(), n]).tolist()
    if n != len(loader.dataset):
        raise RuntimeError(f'evaluated {n:.0f} of {len(loader.dataset)} images')
    seconds = time.perf_counter() - start
    return {name: Metrics.from_sums(row, n, seconds) for (name, _), row in zip(networks, np.reshape(sums, [-1, 3]))}


class Predictions:
    """Per-image results of an evaluation: the top classes, their probabilities and the label's probability."""

    def __init__(self, num_classes):
        self.count = min(5, num_classes)
        self.rows = []

    def add(self, logits, labels):
        """Add a batch: logits float32 [N, C], labels [N]. Does not wait for the device."""
        best = logits.topk(self.count, axis=1)[1]
        classes = paddle.concat([best, labels.unsqueeze(1)], axis=1)
        probabilities = paddle.take_along_axis(F.softmax(logits), classes, axis=1)
        self.rows.append(paddle.concat([best.astype('float64'), probabilities.astype('float64')], axis=1))

    def gather(self, sampler, length):
        """Return the results of all ranks in dataset order, on every rank. sampler: this rank's `EvalSampler`.

        Returns: top classes, int64 [length, k]; their probabilities, [length, k]; the labels' probabilities, [length].
        """
        table = np.zeros([length, 2 * self.count + 1])
        if self.rows:
            table[np.array(sampler.indices)] = paddle.concat(self.rows).numpy()
        best, probabilities, of_labels = np.split(reduce_over_ranks(table), [self.count, 2 * self.count], axis=1)
        return best.astype('int64'), probabilities, of_labels[:, 0]


def time_left(seconds, steps_done, steps_left, evaluation_seconds=0.0):
    """Estimate the time left in a run, as a timedelta.

    seconds: time that steps_done steps took; evaluation_seconds: expected time of the remaining evaluations.
    """
    left = seconds / steps_done * steps_left + evaluation_seconds
    return datetime.timedelta(seconds=round(min(left, 1e10)))  # a timedelta overflows at about 1e14 seconds


def describe_part(part, metrics, training, data_share):
    """Return (text for the progress bar, text that a log line appends to it) for a part of an epoch.

    data_share: fraction of the time spent waiting for images.
    """
    schedule = training.schedule
    step = (part.epoch - 1) * schedule.steps_per_epoch + part.steps
    left = time_left(metrics.seconds, part.steps, schedule.total_steps - step, training.evaluation_seconds)
    return (f'loss {metrics.loss:.4f} {metrics.n / metrics.seconds:.1f} images/s ETA {left}',
            f' lr {schedule.lr(step - 1):.6g} data {data_share:.0%}')


def windows(batches, size):
    """Yield lists of `size` batches; the last may be shorter."""
    batches = iter(batches)
    while window := list(itertools.islice(batches, size)):
        yield window


# the ranks agree on whether to stop about this often: main_multi_gpu.py, Paddle's launcher and SLURM kill a process 30
# seconds after they tell it to stop
AGREEMENT_SECONDS = 5.0


def agree(part, start, should_stop):
    """Return (Metrics so far over all ranks, whether any rank should stop), the same on all ranks.

    start: `time.perf_counter()` at the epoch's first step, as if the run had never been interrupted. Waits for the
    device, then for the other ranks, in one reduction.
    """
    sums = part.sums.tolist()
    own = [*sums, part.n, time.perf_counter() - start, should_stop]
    *sums, n, seconds, stops = reduce_over_ranks(own).tolist()
    return Metrics.from_sums(sums, n, seconds / world_size()), stops > 0


def train_one_epoch(training, loader, part, report_freq=50, should_stop=lambda: False,
                    after_step=lambda part, stopping: None):
    """Train on the remaining batches of an epoch. part: the EpochPart that is already done.

    The ranks exchange metrics and stop requests after the first step, at log lines (every report_freq steps and at the
    last), and about every AGREEMENT_SECONDS in between; a single process checks for a stop request after every step.
    should_stop(): whether this rank was told to stop; after_step(part, stopping): called after each step with the part
    done so far and whether any rank should stop, which all ranks learn after the same step.
    Returns: Metrics of the training batches of all ranks.
    Raises: NotFiniteError, on every rank, for a loss that is not finite.
    """
    schedule, epoch = training.schedule, part.epoch
    steps, first = schedule.steps_per_epoch, (epoch - 1) * schedule.steps_per_epoch
    training.model.train()
    loader.batch_sampler.set_epoch(epoch, part.steps * training.accum_iter)
    began, waited = time.perf_counter(), loader.waited
    start = began - part.seconds
    progress = Progress(f'epoch {epoch}/{schedule.total_steps // steps}', steps, report_freq, part.steps)
    metrics, agreed, seconds, interval = None, part.steps, part.seconds, 1
    with contextlib.closing(iter(loader)) as batches:
        for window in windows(batches, training.accum_iter):
            sums = part.sums + train_step(training, window, first + part.steps)
            n = part.n + sum(len(labels) for _, labels in window)
            part = EpochPart(epoch, part.steps + 1, sums, n, time.perf_counter() - start)
            is_line, stopping = progress.step() or part.steps == steps, False
            if is_line or part.steps - agreed >= interval or (world_size() == 1 and should_stop()):
                metrics, stopping = agree(part, start, should_stop())
                check_finite(metrics.loss, f'the training loss in epoch {epoch}, steps {agreed + 1} to {part.steps},')
                interval = max(1, int(AGREEMENT_SECONDS * (part.steps - agreed) / (metrics.seconds - seconds)))
                agreed, seconds = part.steps, metrics.seconds
            if is_line:
                share = (loader.waited - waited) / (time.perf_counter() - began)
                progress.show(*describe_part(part, metrics, training, share))
            after_step(part, stopping)
    progress.close()
    average_statistics(training)
    return metrics or agree(part, start, False)[0]  # if the epoch was already complete


def average_statistics(training):
    """Average the batch-norm statistics over the ranks, each of which has seen only its own images."""
    if world_size() == 1:
        return
    networks = [training.model, *([training.ema.network] if training.ema else [])]
    tensors = [tensor for network in networks for name, tensor in network.state_dict().items()
               if name.endswith(('._mean', '._variance'))]
    for tensor, mean in zip(tensors, mean_over_ranks([tensor.numpy() for tensor in tensors])):
        tensor.set_value(mean)
