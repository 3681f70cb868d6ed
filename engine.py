"""A run: the one training step, the one evaluation, and what happens around them. See `run`.

The same code serves one process and many. Of many, rank 0 alone writes; what is decided (an error, the best epoch) is
decided from values that are the same on every rank.
"""
import contextlib
import datetime
import functools
import itertools
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F

import optim
from config import get_config, leaves, resolve_config, with_values
from datasets import get_dataloader, get_dataset, get_stage
from losses import DistillationLoss, LabelSmoothingCrossEntropyLoss, SoftTargetCrossEntropyLoss
from mixup import Mixup
from mobileone import build_mobileone
from runtime import checkpoint
from runtime.folder import (
    RunLog,
    check_finite,
    find_checkpoint,
    message_of_another_rank,
    prepare_folder,
    save_config,
    take_over,
    write_checkpoints,
)
from runtime.program import STOPPED, StopRequest
from transforms import Normalize, RandomErase
from utils import (
    LOG,
    Progress,
    UserError,
    describe_error,
    first_few,
    from_main,
    mean_over_ranks,
    program_name,
    rank,
    reduce_over_ranks,
    setup_logger,
    world_size,
)
from weights import is_fused, load_into, load_model


class Precision:
    """Mixed precision as a config's AMP, AMP_LEVEL and AMP_DTYPE say, on a GPU; elsewhere its parts do nothing.

    auto_cast: makes the context of a forward pass. Weights stay float32 at O2 too: they are few beside the activations,
    and so the optimizer, the EMA and checkpoints need no second copy of them. scaler: scales the loss of float16.
    Raises: UserError for a GPU that cannot compute in AMP_DTYPE.
    """

    def __init__(self, config):
        dtype = config.AMP_DTYPE.lower()
        enabled = config.AMP and paddle.device.get_device().startswith('gpu')
        if config.AMP and not enabled:
            LOG.info('mixed precision (AMP) has no effect on a CPU')
        if enabled and not getattr(paddle.amp, f'is_{dtype}_supported')():
            raise UserError(f'AMP_DTYPE is {config.AMP_DTYPE!r}, which this GPU cannot compute in; choose the other of '
                            'float16 and bfloat16, or leave AMP out')
        self.auto_cast = functools.partial(paddle.amp.auto_cast, enable=enabled, level=config.AMP_LEVEL.upper(),
                                           dtype=dtype)
        self.scaler = paddle.amp.GradScaler(enable=enabled and dtype == 'float16')


@dataclass
class EpochPart:
    """What has been done of an epoch (from 1): its first optimizer steps, and this rank's images in them.

    sums: their `batch_sums`, n: their number, seconds: how long it took.
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
        """For a checkpoint, as plain numbers and an array of the sums and n of all ranks. Waits for the other ranks."""
        sums = np.zeros([world_size(), 4])
        sums[rank()] = [*self.sums.tolist(), self.n]
        return {'steps': self.steps, 'seconds': self.seconds, 'sums': reduce_over_ranks(sums),
                'steps_per_epoch': schedule.steps_per_epoch, 'total_batch': schedule.total_batch}

    @classmethod
    def resumed(cls, epoch, state, schedule):
        """The part whose `state` a checkpoint holds; None if the steps of this run are others, or its ranks."""
        keys = ('steps_per_epoch', 'total_batch')
        if (len(state['sums']) != world_size()
                or [state[key] for key in keys] != [getattr(schedule, key) for key in keys]):
            return None
        *sums, n = state['sums'][rank()].tolist()
        return cls(epoch, state['steps'], paddle.to_tensor(sums, dtype='float64'), round(n), state['seconds'])


# a process that is asked to stop is killed after 30 seconds, by main_multi_gpu.py, Paddle's launcher and SLURM alike
MEETING_SECONDS = 5.0


@dataclass
class Meetings:
    """How many steps the ranks train at most before they meet: about MEETING_SECONDS, as many on every rank.

    step_seconds: what a step took this rank between its last two meetings.
    """
    steps: int = 1
    step_seconds: float = math.inf

    def plan(self, mean, own):
        """mean: of the ranks' step_seconds before this meeting; own: this rank's since, which the next one reduces."""
        self.steps = max(1, int(MEETING_SECONDS / max(mean, 1e-6)))
        self.step_seconds = own


@dataclass
class Training:
    """What a training step works on, and how far the run is."""
    model: paddle.nn.Layer
    # the model, or with several processes its DataParallel
    network: paddle.nn.Layer
    criterion: paddle.nn.Layer
    optimizer: paddle.optimizer.Optimizer
    schedule: optim.Schedule
    ema: Optional[optim.ModelEma]
    normalize: Normalize
    erase: Optional[RandomErase]
    mixup: Optional[Mixup]
    precision: Precision
    grad_clip: float
    seed: int
    # the epoch that was trained on last; whole once it has been
    part: Optional[EpochPart] = None
    # the optimizer's state in the checkpoint that was resumed: before the first step PaddlePaddle 2.6.2 does not say it
    resumed_optimizer: dict = field(default_factory=dict)
    # the best evaluation so far, by the EMA weights if there are any
    best: dict = field(default_factory=lambda: {'acc1': -1.0, 'epoch': 0})
    # what the last evaluation took, for the estimate of the time left
    evaluation_seconds: float = 0.0
    # the newest checkpoint of this run, for the error that ends it
    last_checkpoint: str = ''
    stop: StopRequest = field(default_factory=StopRequest)
    meetings: Meetings = field(default_factory=Meetings)


@dataclass
class Metrics:
    """Sums over images, made into means once, at the end."""
    loss: float
    acc1: float
    acc5: float
    n: int
    seconds: float
    # whether a process has been asked to stop
    stopping: bool = False
    # mean of the ranks' Meetings.step_seconds
    step_seconds: float = 0.0

    @classmethod
    def reduced(cls, sums, n, start, stop, step_seconds=0.0):
        """Of the images of all ranks: `batch_sums` of this rank's n images, which have been looked at since `start`.

        Waits for the device and for the other ranks. stop, step_seconds: this rank's StopRequest, Meetings.step_seconds
        """
        own = paddle.to_tensor([n, bool(stop.name), step_seconds], dtype='float64')
        *sums, n, stops, step_seconds = reduce_over_ranks(paddle.concat([sums, own])).tolist()
        loss, correct1, correct5 = (value / max(1, n) for value in sums)
        return cls(loss, 100 * correct1, 100 * correct5, round(n), time.perf_counter() - start, stops > 0,
                   step_seconds / world_size())

    def record(self):
        return {'loss': self.loss, 'acc1': self.acc1, 'acc5': self.acc5, 'n': self.n,
                'seconds': round(self.seconds, 3), 'images_per_second': round(self.n / self.seconds, 2)}

    def __str__(self):
        return (f'loss {self.loss:.4f} acc1 {self.acc1:.2f}% acc5 {self.acc5:.2f}% of {self.n} images in '
                f'{self.seconds:.1f} s ({self.n / self.seconds:.1f} images/s)')


def batch_sums(logits, labels, loss):
    """Sums of a batch, float64 [3] on the device: loss, correct among the best one, among the best five.

    logits [N, C], labels [N], loss: the mean over the batch. With fewer than five classes, among all.
    """
    best = logits.topk(min(5, logits.shape[1]), axis=1)[1]
    hits = (best == labels.unsqueeze(1)).astype('float64')
    return paddle.stack([loss.astype('float64') * len(labels), hits[:, 0].sum(), hits.sum()])


def train_step(training, batches, step):
    """One optimizer step on a window of batches (uint8 [N, H, W, 3], int64 [N]); step counts from 0 over the run.

    The gradient is the mean over the window's batches and over the ranks, which meet at the last batch alone.
    Returns `batch_sums` of the window on the device: nothing here waits for it (but Paddle's scaler of float16).
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
    optimizer.clear_grad()
    if training.ema:
        training.ema.update(training.schedule.ema_decay(step))
    return sums


@paddle.no_grad()
def evaluate(model, loader, normalize, report_freq=50, auto_cast=contextlib.nullcontext, stop=None):
    """Metrics of a model over every image of a loader's data set, once. Leaves the model in evaluation mode.

    With several processes each has its share of the images, and all return the metrics of all.
    report_freq: batches between progress lines, where there is no terminal for a bar; auto_cast: see `Precision`;
    stop: a StopRequest, which ends the evaluation: the Metrics, of a part of the images, are `stopping` then.
    """
    model.eval()
    stop = stop or StopRequest()
    start, n = time.perf_counter(), 0
    sums = paddle.zeros([3], dtype='float64')
    progress = Progress('evaluation', len(loader), report_freq)
    for images, labels in loader:
        with auto_cast():
            logits = model(normalize(images))
        logits = logits.astype('float32')
        sums += batch_sums(logits, labels, F.cross_entropy(logits, labels))
        n += len(labels)
        if progress.step():
            progress.show(f'{world_size() * n / (time.perf_counter() - start):.1f} images/s')
        if stop.name:
            break
    progress.close()
    metrics = Metrics.reduced(sums, n, start, stop)
    if metrics.n != len(loader.dataset) and not metrics.stopping:
        raise RuntimeError(f'evaluated {metrics.n} images of {len(loader.dataset)}')
    return metrics


def time_left(seconds, steps_done, steps_left, evaluation_seconds=0.0):
    """Estimate of what remains of a run, from the seconds that steps_done steps took and what evaluations will take."""
    left = seconds / steps_done * steps_left + evaluation_seconds
    return datetime.timedelta(seconds=round(min(left, 1e10)))  # which a timedelta can hold


def is_validated(config, epoch):
    """Whether an epoch (from 1) ends in an evaluation."""
    return epoch % config.VALIDATE_FREQ == 0 or epoch == config.TRAIN.NUM_EPOCHS


def windows(batches, size):
    """Yield lists of `size` batches; the last one may be shorter."""
    batches = iter(batches)
    while window := list(itertools.islice(batches, size)):
        yield window


def train_one_epoch(training, loader, epoch, config):
    """Train on every batch of epoch `epoch` (from 1), or on what `training.part` leaves of it.

    Returns: Metrics of the training batches of all ranks.
    Ends the program when it was asked to stop, with a checkpoint (`end_run`): alone after this step, with several ranks
    where they meet: at the next log line, or before (`Meetings`).
    """
    done = training.part if training.part and training.part.epoch == epoch else EpochPart.none(epoch)
    training.model.train()
    loader.batch_sampler.set_epoch(epoch, done.steps * config.TRAIN.ACCUM_ITER)
    steps = training.schedule.steps_per_epoch
    evaluations = sum(is_validated(config, later) for later in range(epoch, config.TRAIN.NUM_EPOCHS + 1))
    began, waited, n = time.perf_counter(), loader.waited, done.n
    start = began - done.seconds
    sums = done.sums
    never = paddle.full([1], math.inf, dtype='float64')
    first_bad = never  # step of the first loss that is not finite, remembered on the device
    progress = Progress(f'epoch {epoch}/{config.TRAIN.NUM_EPOCHS}', steps, config.REPORT_FREQ, done.steps)
    metrics, meetings = None, training.meetings
    met, met_time = done.steps, began
    for step, batches in enumerate(windows(loader, config.TRAIN.ACCUM_ITER), (epoch - 1) * steps + done.steps):
        losses = train_step(training, batches, step)
        sums = sums + losses
        first_bad = paddle.minimum(first_bad, paddle.where(losses[:1].isfinite(), never, paddle.full_like(never, step)))
        n += sum(len(labels) for _, labels in batches)
        is_line = progress.step() or progress.done == steps
        is_meeting = is_line or (progress.done - met >= meetings.steps if world_size() > 1 else training.stop.name)
        if is_meeting:
            metrics = Metrics.reduced(sums, n, start, training.stop, meetings.step_seconds)
            if not math.isfinite(metrics.loss):  # on all ranks alike
                bad = int(reduce_over_ranks(first_bad, 'MIN')[0]) + 1
                check_finite(metrics.loss, f'the loss of training, epoch {epoch}, step {bad},',
                             training.last_checkpoint)
            now = time.perf_counter()
            meetings.plan(metrics.step_seconds, (now - met_time) / (progress.done - met))
            met, met_time = progress.done, now
        if is_line:
            left = time_left(metrics.seconds, progress.done, training.schedule.total_steps - step - 1,
                             evaluations * training.evaluation_seconds)
            progress.show(f'loss {metrics.loss:.4f} lr {training.schedule.lr(step):.6g} '
                          f'{metrics.n / metrics.seconds:.1f} images/s '
                          f'data {(loader.waited - waited) / (time.perf_counter() - began):.0%} ETA {left}')
        training.part = EpochPart(epoch, progress.done, sums, n, time.perf_counter() - start)
        if is_meeting and metrics.stopping:
            end_run(config, training)
        if config.SAVE_FREQ_STEPS and (step + 1) % config.SAVE_FREQ_STEPS == 0:
            save_within_epoch(config, training)
    progress.close()
    average_statistics(training)
    return metrics or Metrics.reduced(sums, n, start, training.stop)  # of an epoch that is resumed at its end


def end_run(config, training):
    """End the program, as it was asked to: with a checkpoint of `training.part` and the status STOPPED."""
    save_within_epoch(config, training)
    LOG.info(f'stopped by {training.stop.name or "a signal to another process"}; -resume auto goes on from '
             f'{training.last_checkpoint}')
    sys.exit(STOPPED)


def average_statistics(training):
    """Give all ranks the mean of their batch-norm statistics, which each gathered from its own images."""
    if world_size() == 1:
        return
    tensors = {name: tensor for name, tensor in training.model.state_dict().items()
               if name.endswith(('._mean', '._variance'))}
    averages = [training.ema.average[name] for name in tensors] if training.ema else []
    means = mean_over_ranks([tensor.numpy() for tensor in [*tensors.values(), *averages]])
    for tensor, mean in zip(tensors.values(), means):
        tensor.set_value(mean)
    if training.ema:
        training.ema.load(dict(zip(tensors, means[len(tensors):])))


def build_loader(config, is_train, epoch=1):
    """The loader of this rank's share of the training images, as they are in an epoch, or of the validation images."""
    return get_dataloader(config, get_dataset(config, is_train, epoch), is_train, rank(), world_size())


def build_training(config, model, loader):
    """The Training of a model on the batches of a loader. Its EMA starts from the model's present weights."""
    if config.MODEL.SYNC_BN and world_size() > 1:
        if not paddle.device.get_device().startswith('gpu'):
            raise UserError('MODEL.SYNC_BN is True, but PaddlePaddle synchronises batch norms on GPUs only: leave it '
                            'out')
        model = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = paddle.DataParallel(model) if world_size() > 1 else model
    optimizer = optim.build_optimizer(config, model)
    decayed, rest = ((len(group), sum(p.size for p in group)) for group in optim.parameter_groups(model))
    LOG.info(f'weight decay on {decayed[0]} tensors ({decayed[1]:,} parameters), none on {rest[0]} tensors '
             f'({rest[1]:,} parameters)')
    schedule = build_schedule(config, loader.batch_sampler)
    LOG.info(f'{schedule.total_steps} steps of {schedule.total_batch} images (processes {world_size()} x '
             f'DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x TRAIN.ACCUM_ITER {config.TRAIN.ACCUM_ITER}), '
             f'{schedule.steps_per_epoch} per epoch; learning rate up to {schedule.base:g}, weight decay '
             f'{schedule.decay:g} to {schedule.end_decay:g}, EMA decay up to {schedule.max_ema_decay:g}')
    ema = optim.ModelEma(model, config.TRAIN.MODEL_EMA_FORCE_CPU) if config.TRAIN.MODEL_EMA else None
    mixup = build_mixup(config)
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    return Training(model, network, build_criterion(config, bool(mixup)), optimizer, schedule, ema, normalize,
                    build_erase(config.TRAIN), mixup, Precision(config), config.TRAIN.GRAD_CLIP, config.SEED)


def build_schedule(config, sampler):
    """The Schedule of a config. An optimizer step is a window of TRAIN.ACCUM_ITER batches of a TrainSampler.

    The last window of an epoch may be shorter. Raises: UserError for a window longer than an epoch.
    """
    window = config.TRAIN.ACCUM_ITER
    if window > len(sampler):
        raise UserError(f'TRAIN.ACCUM_ITER is {window}, but an epoch has only {len(sampler)} batches of '
                        f'{sampler.total_batch} images; lower it, or DATA.BATCH_SIZE')
    return optim.Schedule(config, -(-len(sampler) // window), sampler.total_batch * window)


def build_erase(train):
    """The RandomErase of a config's TRAIN, or None where it is off."""
    if not train.RANDOM_ERASE_PROB:
        return None
    return RandomErase(train.RANDOM_ERASE_PROB, train.RANDOM_ERASE_MODE.lower(), train.RANDOM_ERASE_COUNT)


def get_teacher_config(config):
    """The config of TRAIN.DISTILLATION's teacher, to be loaded fused, or None without one.

    Raises: UserError for files that are not there, and for a teacher that does not fit the student.
    """
    options = config.TRAIN.DISTILLATION
    if options.TYPE.lower() == 'none':
        return None
    try:
        teacher = resolve_config(with_values(get_config(options.TEACHER_CFG), {
            'MODEL.PRETRAINED': options.TEACHER_WEIGHTS, 'MODEL.RESUME': '', 'MODEL.DEPLOY': True, 'EVAL': True}))
        checkpoint.check_exists(options.TEACHER_WEIGHTS)
    except UserError as error:
        raise UserError(f'the teacher (TRAIN.DISTILLATION): {error}') from None
    for section, key in (('MODEL', 'NUM_CLASSES'), ('DATA', 'IMAGENET_MEAN'), ('DATA', 'IMAGENET_STD')):
        theirs, ours = teacher[section][key], config[section][key]
        if theirs != ours:
            raise UserError(f'{options.TEACHER_CFG}: {section}.{key} is {theirs} for the teacher, {ours} for the '
                            'student; make them equal: both see the same images and classes')
    return teacher


def build_criterion(config, has_mixup):
    """The DistillationLoss of a config: around the loss on the labels, with the teacher, if there is one, fused."""
    criterion = SoftTargetCrossEntropyLoss() if has_mixup else LabelSmoothingCrossEntropyLoss(config.TRAIN.SMOOTHING)
    teacher_config = get_teacher_config(config)
    if not teacher_config:
        return DistillationLoss(criterion)
    options = config.TRAIN.DISTILLATION
    LOG.info(f'the teacher is {teacher_config.MODEL.NAME}:')
    teacher, _ = load_model(teacher_config, teacher_config.MODEL.PRETRAINED)
    return DistillationLoss(criterion, teacher, options.TYPE.lower(), options.ALPHA, options.TAU)


def build_mixup(config):
    """The Mixup of a config, or None where both kinds are off."""
    train = config.TRAIN
    if max(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, *train.CUTMIX_MINMAX) == 0 or train.MIXUP_PROB == 0:
        return None
    return Mixup(train.MIXUP_ALPHA, train.CUTMIX_ALPHA, train.CUTMIX_MINMAX, train.MIXUP_PROB, train.MIXUP_SWITCH_PROB,
                 train.MIXUP_MODE.lower(), train.SMOOTHING, config.MODEL.NUM_CLASSES)


def check_weights(training, when):
    """Raises: UserError, on all ranks alike, for numbers that are not finite: they must not be saved.

    Of the weights, their averages and what the optimizer has gathered.
    """
    finite = [paddle.stack([tensor.isfinite().all() for tensor in tensors.values()]).numpy()
              for tensors in (training.model.state_dict(), training.ema.average if training.ema else {},
                              optim.optimizer_state(training.optimizer, training.model)) if tensors]
    good = reduce_over_ranks(np.concatenate(finite), 'MIN').all()
    check_finite(0.0 if good else math.nan, f'a weight, or a number of the optimizer, after {when}',
                 training.last_checkpoint)


def save_within_epoch(config, training):
    """Write latest.pdparams for `training.part`: in the middle of an epoch, or at its end before it is evaluated.

    Of several ranks the batch-norm statistics are averaged. Raises: UserError, on all ranks, as `save_checkpoints`, and
    for a loss that is not finite.
    """
    average_statistics(training)
    part, schedule = training.part, training.schedule
    state = part.state(schedule)
    check_finite(state['sums'].sum(), f'the loss of training, epoch {part.epoch}, step {part.steps},',
                 training.last_checkpoint)
    save_checkpoints(config, training, part.epoch - 1, (part.epoch - 1) * schedule.steps_per_epoch + part.steps, state)


def save_checkpoints(config, training, epoch, step, progress=None):
    """Write the state after `epoch` epochs, `step` optimizer steps, to the files of `write_checkpoints`.

    progress: of an epoch that is not done, `EpochPart.state`.
    Raises: UserError, on all ranks, for weights that are not finite and for a file that cannot be written.
    """
    when = f'epoch {epoch + 1}, step {progress["steps"]}' if progress else f'epoch {epoch}'
    check_weights(training, when)
    state = {
        'model': training.model.state_dict(),
        'model_ema': training.ema.average if training.ema else {},
        'optimizer': optim.optimizer_state(training.optimizer, training.model) or training.resumed_optimizer,
        'epoch': epoch,
        'step': step,
        'lr_scheduler': {'last_epoch': epoch, 'last_lr': training.schedule.lr(step - 1)},
        'amp_grad_scaler': training.precision.scaler.state_dict(),
        'best': training.best,
        'world_size': world_size(),
        'progress': progress or {},
    }
    # all wait for it: none may end the run before it is written
    from_main(lambda: write_checkpoints(config, checkpoint.to_arrays(state)))
    training.last_checkpoint = f'{os.path.join(config.SAVE, checkpoint.LATEST)} ({when})'


def run_evaluation(config, loader):
    model, is_ema = load_model(config, config.MODEL.PRETRAINED)
    metrics = evaluate(model, loader, Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD),
                       config.REPORT_FREQ, Precision(config).auto_cast)
    RunLog(config).write(0, 0, 'val', 'ema' if is_ema else 'raw', metrics)


def validate(config, training, loader, log, epoch, step):
    """Evaluate and log the raw weights, then the EMA. Returns the Metrics that choose the best: the EMA's, if any.

    Metrics that are `stopping` are not logged.
    """
    def of_present_weights(name):
        metrics = evaluate(training.model, loader, training.normalize, config.REPORT_FREQ,
                           training.precision.auto_cast, training.stop)
        if not metrics.stopping:
            log.write(epoch, step, 'val', name, metrics, training.last_checkpoint)
        return metrics

    start = time.perf_counter()
    metrics = of_present_weights('raw')
    if training.ema and not metrics.stopping:
        with training.ema.applied():
            metrics = of_present_weights('ema')
    training.evaluation_seconds = time.perf_counter() - start
    return metrics


def start_training(config, loader):
    """A new Training, its weights random or MODEL.PRETRAINED's."""
    path = config.MODEL.PRETRAINED
    if path:
        model, _ = load_model(config, path, allow_other_classifier=True)
        if is_fused(model.state_dict()):
            raise UserError(f'{path}: holds fused weights, which cannot be trained; give the unfused ones')
    else:
        model = build_mobileone(config)
    return build_training(config, model, loader)


def resume_training(config, loader, path, state):
    """The Training that a checkpoint (`checkpoint.load_training`) left.

    Raises: UserError for a checkpoint of another network or optimizer.
    """
    epoch, progress = state['epoch'], state['progress']
    if config.TRAIN.LAST_EPOCH > epoch:
        raise UserError(f'TRAIN.LAST_EPOCH is {config.TRAIN.LAST_EPOCH}, but {path} ends at epoch {epoch}: leave it '
                        'out')
    model = build_mobileone(config)
    # the EMA starts from the weights that the model has when it is built
    load_into(model, state['model_ema'] or state['model'], path)
    training = build_training(config, model, loader)
    load_into(training.model, state['model'], path)
    optim.load_optimizer_state(training.optimizer, training.model, state['optimizer'], path)
    if state['amp_grad_scaler']:
        training.precision.scaler.load_state_dict(state['amp_grad_scaler'])
    training.resumed_optimizer, training.best = state['optimizer'], state['best']
    when = f'epoch {epoch}'
    if progress:
        when += f' and {progress["steps"]} of {progress["steps_per_epoch"]} steps of the next'
    training.last_checkpoint = f'{path} ({when})'
    LOG.info(f'resumed {path} after {when}, step {state["step"]}')
    if config.TRAIN.MODEL_EMA and not state['model_ema']:
        LOG.info('the checkpoint holds no EMA: the average starts from its weights')
    if progress:
        training.part = EpochPart.resumed(epoch + 1, progress, training.schedule)
        if not training.part:
            LOG.info(f'the checkpoint is within epoch {epoch + 1}, of {progress["total_batch"]} images in a step and '
                     f'{state["world_size"]} processes, this run has {training.schedule.total_batch} and '
                     f'{world_size()}: that epoch begins again')
    step = epoch * training.schedule.steps_per_epoch + (training.part.steps if training.part else 0)
    for name, then, now in (('processes', state['world_size'], world_size()), ('steps', state['step'], step)):
        if then != now:
            LOG.info(f'the checkpoint counts {then} {name}, this run {now}: it goes on after epoch {epoch}, but not '
                     'bitwise as it would have')
    return training


def run_training(config, train_loader, val_loader, resumed=None):
    """resumed: (path, state) of the checkpoint to go on from."""
    if resumed:
        training = resume_training(config, train_loader, *resumed)
        done = resumed[1]['epoch']
    else:
        training = start_training(config, train_loader)
        done = config.TRAIN.LAST_EPOCH
    # nothing of an earlier run is touched before the checkpoint has proved to fit
    from_main(lambda: take_over(config, resumed, done))
    log = RunLog(config, training.schedule)
    with training.stop:
        train_epochs(config, training, train_loader, val_loader, log, done)
    if done >= config.TRAIN.NUM_EPOCHS:
        LOG.info(f'all {config.TRAIN.NUM_EPOCHS} epochs are done: nothing is left to train')
    path = os.path.join(config.SAVE, checkpoint.BEST)
    best = training.best
    LOG.info(f'best top-1 {best["acc1"]:.2f}% ({"EMA" if training.ema else "raw"} weights) at epoch {best["epoch"]}: '
             f'{path if os.path.exists(path) else "its file is not in this folder"}')


def train_epochs(config, training, train_loader, val_loader, log, done):
    """Train, evaluate and save the epochs after `done`."""
    stage = get_stage(config, 1)  # that of the loader
    for epoch in range(done + 1, config.TRAIN.NUM_EPOCHS + 1):
        step = epoch * training.schedule.steps_per_epoch
        if stage != get_stage(config, epoch):
            stage = get_stage(config, epoch)
            train_loader = build_loader(config, True, epoch)
            LOG.info(f'epoch {epoch}: images of {stage.image_size} pixels, AutoAugment '
                     f'{stage.auto_augment_strength:g}')
        metrics = train_one_epoch(training, train_loader, epoch, config)
        log.write(epoch, step, 'train', 'raw', metrics, training.last_checkpoint)
        if is_validated(config, epoch):
            metrics = validate(config, training, val_loader, log, epoch, step)
            if metrics.stopping:
                end_run(config, training)
            if metrics.acc1 > training.best['acc1']:
                training.best = {'acc1': metrics.acc1, 'epoch': epoch}
        save_checkpoints(config, training, epoch, step)


def check_agreement(config, loaders):
    """Raises: UserError, on all ranks, when one has another config or other lists than rank 0.

    Machines may keep the data in different places, and weights in files of their own that must be equal.
    """
    if world_size() == 1:
        return

    def facts():
        keys = {key: value for key, value in leaves(config) if key not in ('DATA.DATA_PATH', 'SAVE')}
        teacher = None if config.EVAL else get_teacher_config(config)
        files = [config.MODEL.PRETRAINED, teacher.MODEL.PRETRAINED if teacher else '']
        return {**keys, **{f'the SHA-256 of {path}': checkpoint.sha256(path) for path in files if path},
                **{f'images of {os.path.basename(loader.dataset.list_path)}': len(loader.dataset)
                   for loader in loaders}}
    first = from_main(facts)
    own = first if rank() == 0 else facts()
    differing = [f'{key} is {own[key]!r}, not {first[key]!r}' for key in first if own[key] != first[key]]
    if reduce_over_ranks([-len(differing)], 'MIN')[0] < 0:
        raise UserError(f'not as on rank 0: {first_few(differing)}; start all processes alike' if differing else
                        'another rank has another config or other lists than rank 0; see its message')


def describe(dataset, num_classes):
    """A line on a data set: its list, images and classes, and whether the network has more classes than the list."""
    used = int(dataset.labels.max()) + 1
    line = f'{dataset.list_path}: {len(dataset)} images, labels 0 to {used - 1}'
    return line if used == num_classes else f'{line}: {num_classes - used} of MODEL.NUM_CLASSES {num_classes} unused'


def describe_curriculum(config):
    """A line on the stages of TRAIN.CURRICULUM, and on those that a run so short never reaches."""
    stages = config.TRAIN.CURRICULUM
    parts = [f'from epoch {stage["EPOCH"]} {stage["IMAGE_SIZE"]} pixels, AutoAugment '
             f'{stage["AUTO_AUGMENT_STRENGTH"]:g}' for stage in stages]
    parts.append(f'evaluation at {config.DATA.IMAGE_SIZE} pixels')
    late = [stage['EPOCH'] for stage in stages if stage['EPOCH'] > config.TRAIN.NUM_EPOCHS]
    if late:
        parts.append(f'TRAIN.NUM_EPOCHS is {config.TRAIN.NUM_EPOCHS}, so the stages from epoch {late[0]} on are not '
                     'reached')
    return f'curriculum: {"; ".join(parts)}'


def run(config):
    """Train, or with EVAL evaluate, as the config says, on the current device, in this process or its process group.

    Makes the run's folder (SAVE) with config.yaml, log.txt, log.jsonl and, in training, checkpoints.
    Raises: UserError for what the user can mend; OSError for a folder that cannot be written.
    """
    config = resolve_config(config)
    # the lists are read first: a wrong path leaves no folder behind
    loaders = [build_loader(config, is_train) for is_train in ([False] if config.EVAL else [True, False])]
    checkpoint.check_exists(config.MODEL.PRETRAINED)
    if not config.EVAL:
        build_schedule(config, loaders[0].batch_sampler)  # all epochs have as many batches
        get_teacher_config(config)
    check_agreement(config, loaders)
    config = from_main(lambda: prepare_folder(config))
    setup_logger(config.SAVE)
    LOG.info(f'PaddlePaddle {paddle.__version__} on {paddle.device.get_device()}, processes: {world_size()}, folder '
             f'{config.SAVE}, config:\n{config.dump(default_flow_style=None).rstrip()}')
    for loader in loaders:
        LOG.info(describe(loader.dataset, config.MODEL.NUM_CLASSES))
    if config.TRAIN.CURRICULUM and not config.EVAL:
        LOG.info(describe_curriculum(config))
    paddle.seed(config.SEED)
    try:
        if config.EVAL:
            from_main(lambda: save_config(config))
            run_evaluation(config, *loaders)
        else:
            run_training(config, *loaders, from_main(lambda: find_checkpoint(config)))
    except UserError as error:
        LOG.error(f'error: {error}')  # for log.txt; the program says it on stderr
        raise
    except Exception as error:
        LOG.exception(f'error: {describe_error(error)}')
        if world_size() > 1 and re.search('gloo|nccl', str(error), re.IGNORECASE):
            sys.exit(f'{program_name()}: error: lost the connection to another process: '
                     f'{message_of_another_rank(config.SAVE)}')
        raise
