"""A run: the one training step, the one evaluation, and what happens around them. See `run`."""
import datetime
import glob
import itertools
import math
import os
import time
from dataclasses import dataclass
from typing import Optional

import paddle
import paddle.nn.functional as F

import checkpoint
import optim
from config import resolve_config
from datasets import get_dataloader, get_dataset
from losses import LabelSmoothingCrossEntropyLoss
from mobileone import build_mobileone, model_convert
from transforms import Normalize
from utils import LOG, Progress, UserError, append_json, setup_logger


@dataclass
class Training:
    """What a training step works on."""
    model: paddle.nn.Layer
    criterion: paddle.nn.Layer
    optimizer: paddle.optimizer.Optimizer
    schedule: optim.Schedule
    ema: Optional[optim.ModelEma]
    normalize: Normalize
    # what the last evaluation took, for the estimate of the time left
    evaluation_seconds: float = 0.0


@dataclass
class Metrics:
    """Sums over images, made into means once, at the end."""
    loss: float
    acc1: float
    acc5: float
    n: int
    seconds: float

    @classmethod
    def from_sums(cls, sums, n, seconds):
        loss, correct1, correct5 = (float(value) / n for value in sums)
        return cls(loss, 100 * correct1, 100 * correct5, n, seconds)

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


def train_step(training, images, labels, step):
    """One optimizer step on images uint8 [N, H, W, 3] and labels int64 [N]; step counts from 0 over the run.

    Returns `batch_sums` on the device: nothing here waits for it.
    """
    logits = training.model(training.normalize(images))
    loss = training.criterion(logits, labels)
    loss.backward()
    training.optimizer.set_lr(training.schedule.lr(step))
    training.optimizer.step()
    training.optimizer.clear_grad()
    if training.ema:
        training.ema.update(training.schedule.ema_decay(step))
    return batch_sums(logits.detach(), labels, loss.detach())


@paddle.no_grad()
def evaluate(model, loader, normalize, report_freq=50):
    """Metrics of a model over every image of a loader, once. Leaves the model in evaluation mode.

    report_freq: batches between progress lines, where there is no terminal for a bar.
    """
    model.eval()
    start, n = time.perf_counter(), 0
    sums = paddle.zeros([3], dtype='float64')
    progress = Progress('evaluation', len(loader), report_freq)
    for images, labels in loader:
        logits = model(normalize(images)).astype('float32')
        sums += batch_sums(logits, labels, F.cross_entropy(logits, labels))
        n += len(labels)
        if progress.step():
            progress.show(f'{n / (time.perf_counter() - start):.1f} images/s')
    progress.close()
    if n != len(loader.dataset):
        raise RuntimeError(f'evaluated {n} images of {len(loader.dataset)}')
    return Metrics.from_sums(sums.numpy(), n, time.perf_counter() - start)


def check_finite(loss, where):
    """Raises: UserError unless the loss is a number; where: str, which loss it is."""
    if not math.isfinite(loss):
        raise UserError(f'the loss of {where} is {loss}: lower TRAIN.BASE_LR, or check MODEL.PRETRAINED and the labels')


def time_left(seconds, steps_done, steps_left, evaluation_seconds=0.0):
    """Estimate of what remains of a run, from the seconds that steps_done steps took and what evaluations will take."""
    return datetime.timedelta(seconds=round(seconds / steps_done * steps_left + evaluation_seconds))


def is_validated(config, epoch):
    """Whether an epoch (from 1) ends in an evaluation."""
    return epoch % config.VALIDATE_FREQ == 0 or epoch == config.TRAIN.NUM_EPOCHS


def train_one_epoch(training, loader, epoch, config):
    """Train on every batch of epoch `epoch` (from 1). Returns Metrics of the training batches."""
    training.model.train()
    loader.batch_sampler.set_epoch(epoch)
    first_step = (epoch - 1) * len(loader)
    evaluations = sum(is_validated(config, later) for later in range(epoch, config.TRAIN.NUM_EPOCHS + 1))
    start, waited, n = time.perf_counter(), loader.waited, 0
    sums = paddle.zeros([3], dtype='float64')
    progress = Progress(f'epoch {epoch}/{config.TRAIN.NUM_EPOCHS}', len(loader), config.REPORT_FREQ)
    for step, (images, labels) in enumerate(loader, first_step):
        sums += train_step(training, images, labels, step)
        n += len(labels)
        if progress.step() or progress.done == len(loader):
            loss = float(sums[0]) / n  # waits for the device
            check_finite(loss, f'training, epoch {epoch}, step {step + 1}')
            seconds = time.perf_counter() - start
            left = time_left(seconds, progress.done, training.schedule.total_steps - step - 1,
                             evaluations * training.evaluation_seconds)
            progress.show(f'loss {loss:.4f} lr {training.schedule.lr(step):.6g} {n / seconds:.1f} images/s '
                          f'data {(loader.waited - waited) / seconds:.0%} ETA {left}')
    progress.close()
    return Metrics.from_sums(sums.numpy(), n, time.perf_counter() - start)


def load_model(config):
    """The network of a config with its MODEL.PRETRAINED weights, if any, strictly loaded.

    Fused weights build the fused network. With MODEL.DEPLOY, unfused ones are fused after loading. In training, a
    classifier of another size is left out.
    Returns: (model, whether the weights are an EMA).
    """
    path, weights, is_ema, is_fused = config.MODEL.PRETRAINED, None, False, False
    if path:
        weights, is_ema = checkpoint.load_weights(path)
        is_fused = checkpoint.is_fused(weights)
        if is_fused and not config.EVAL:
            raise UserError(f'{path}: holds fused weights, which cannot be trained; give the unfused ones')
    network = config.clone()
    network.defrost()
    network.MODEL.DEPLOY = is_fused
    model = build_mobileone(network)
    if path:
        left_out = checkpoint.load_into(model, weights, path, allow_other_classifier=not config.EVAL)
        LOG.info(f'loaded {"EMA " if is_ema else ""}weights ({"fused" if is_fused else "unfused"}) from {path}')
        if left_out:
            LOG.info(f'left out {", ".join(left_out)}, made for {weights[left_out[-1]].shape[-1]} classes, not '
                     f'{config.MODEL.NUM_CLASSES}: the classifier starts from random weights')
    if config.MODEL.DEPLOY and not is_fused:
        model = model_convert(model)
        LOG.info('fused the branches')
    return model, is_ema


def build_training(config, model, loader):
    """The Training of a model on the batches of a loader."""
    optimizer = optim.build_optimizer(config, model)
    decayed, rest = ((len(group), sum(p.size for p in group)) for group in optim.parameter_groups(model))
    LOG.info(f'weight decay on {decayed[0]} tensors ({decayed[1]:,} parameters), none on {rest[0]} tensors '
             f'({rest[1]:,} parameters)')
    schedule = optim.Schedule(config, len(loader), loader.batch_sampler.total_batch)
    LOG.info(f'{schedule.total_steps} steps of {loader.batch_sampler.total_batch} images, {len(loader)} per epoch; '
             f'learning rate up to {schedule.base:g}')
    ema = optim.ModelEma(model, config.TRAIN.MODEL_EMA_FORCE_CPU) if config.TRAIN.MODEL_EMA else None
    criterion = LabelSmoothingCrossEntropyLoss(config.TRAIN.SMOOTHING)
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    return Training(model, criterion, optimizer, schedule, ema, normalize)


class RunLog:
    """Writes the records of a run's log.jsonl and says them."""

    def __init__(self, config, schedule=None):
        self.path = os.path.join(config.SAVE, 'log.jsonl')
        self.image_size = config.DATA.IMAGE_SIZE
        self.schedule = schedule

    def write(self, epoch, step, split, weights, metrics):
        """step: optimizer steps done so far; its learning rate and weight decay are those of the last one.

        Raises: UserError for a loss that is not finite: a run does not go on, nor save, from there.
        """
        check_finite(metrics.loss, f'{split} images with {weights} weights, epoch {epoch}')
        lr, weight_decay = None, None
        if self.schedule:
            lr, weight_decay = self.schedule.lr(step - 1), self.schedule.weight_decay(step - 1)
        append_json(self.path, {'epoch': epoch, 'step': step, 'split': split, 'weights': weights, **metrics.record(),
                                'lr': lr, 'weight_decay': weight_decay, 'image_size': self.image_size})
        LOG.info(f'epoch {epoch} {split} {weights}: {metrics}')


def save_checkpoints(config, training, epoch, step, best):
    """Write latest.pdparams, at its epochs epoch_N.pdparams, and best.pdparams if this epoch is the best."""
    state = checkpoint.to_arrays({
        'model': training.model.state_dict(),
        'model_ema': training.ema.average if training.ema else {},
        'optimizer': training.optimizer.state_dict(),
        'epoch': epoch,
        'step': step,
        'lr_scheduler': {'last_epoch': epoch, 'last_lr': training.optimizer.get_lr()},
        'amp_grad_scaler': {},
        'best': best,
    })
    checkpoint.save(state, os.path.join(config.SAVE, checkpoint.LATEST))
    if best['epoch'] == epoch:
        checkpoint.save(state, os.path.join(config.SAVE, checkpoint.BEST))
    if config.SAVE_FREQ and epoch % config.SAVE_FREQ == 0:
        checkpoint.save(state, os.path.join(config.SAVE, f'epoch_{epoch}.pdparams'))
        checkpoint.prune(config.SAVE, config.KEEP_CHECKPOINTS)


def run_evaluation(config, loader):
    model, is_ema = load_model(config)
    metrics = evaluate(model, loader, Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD),
                       config.REPORT_FREQ)
    RunLog(config).write(0, 0, 'val', 'ema' if is_ema else 'raw', metrics)


def validate(config, training, loader, log, epoch, step):
    """Evaluate and log the raw weights, then the EMA. Returns the Metrics that choose the best: the EMA's, if any."""
    start = time.perf_counter()
    metrics = evaluate(training.model, loader, training.normalize, config.REPORT_FREQ)
    log.write(epoch, step, 'val', 'raw', metrics)
    if training.ema:
        with training.ema.applied():
            metrics = evaluate(training.model, loader, training.normalize, config.REPORT_FREQ)
        log.write(epoch, step, 'val', 'ema', metrics)
    training.evaluation_seconds = time.perf_counter() - start
    return metrics


def run_training(config, train_loader, val_loader):
    model, _ = load_model(config)
    training = build_training(config, model, train_loader)
    log = RunLog(config, training.schedule)
    best = {'acc1': -1.0, 'epoch': 0}
    for epoch in range(config.TRAIN.LAST_EPOCH + 1, config.TRAIN.NUM_EPOCHS + 1):
        step = epoch * len(train_loader)
        log.write(epoch, step, 'train', 'raw', train_one_epoch(training, train_loader, epoch, config))
        if is_validated(config, epoch):
            metrics = validate(config, training, val_loader, log, epoch, step)
            if metrics.acc1 > best['acc1']:
                best = {'acc1': metrics.acc1, 'epoch': epoch}
        save_checkpoints(config, training, epoch, step, best)
    LOG.info(f'best top-1 {best["acc1"]:.2f}% ({"EMA" if training.ema else "raw"} weights) at epoch '
             f'{best["epoch"]}: {os.path.join(config.SAVE, checkpoint.BEST)}')


def prepare_folder(config):
    """Make the folder of a run and save its config there; a run without a SAVE gets a new folder below output/.

    Returns: the config, frozen, with the folder as SAVE.
    Raises: UserError for a training in a folder that holds the results of another run.
    """
    folder = config.SAVE
    if not folder:
        folder = _new_folder(os.path.join('output', f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}'))
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, 'log.jsonl')
    results = glob.glob(os.path.join(glob.escape(folder), '*.pdparams'))
    results += [log] if os.path.exists(log) and os.path.getsize(log) else []
    if results and not config.EVAL:
        raise UserError(f'{folder}: holds the results of another run ({os.path.basename(min(results))}); choose '
                        'another -output, or remove it')
    config = config.clone()
    config.defrost()
    config.SAVE = folder
    config.freeze()
    path = os.path.join(folder, 'config.yaml')
    if config.EVAL and os.path.exists(path):
        path = os.path.join(folder, 'config-eval.yaml')  # a training's config stays
    with open(path, 'w', encoding='utf-8') as file:
        file.write(config.dump(default_flow_style=None))
    return config


def describe(dataset, num_classes):
    """A line on a data set: its list, images and classes, and whether the network has more classes than the list."""
    used = int(dataset.labels.max()) + 1
    line = f'{dataset.list_path}: {len(dataset)} images, labels 0 to {used - 1}'
    return line if used == num_classes else f'{line}: {num_classes - used} of MODEL.NUM_CLASSES {num_classes} unused'


def _new_folder(path):
    """Make a folder that was not there: `path`, or with -2, -3, ... appended, for runs that start together."""
    for number in itertools.count(1):
        try:
            folder = path if number == 1 else f'{path}-{number}'
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue


def run(config):
    """Train, or with EVAL evaluate, as the config says, on the current device.

    Makes the run's folder (SAVE) with config.yaml, log.txt, log.jsonl and, in training, checkpoints.
    Raises: UserError for what the user can mend; OSError for a folder that cannot be written.
    """
    config = resolve_config(config)
    # the lists are read first: a wrong path leaves no folder behind
    loaders = [get_dataloader(config, get_dataset(config, is_train), is_train)
               for is_train in ([False] if config.EVAL else [True, False])]
    checkpoint.check_exists(config.MODEL.PRETRAINED)
    config = prepare_folder(config)
    setup_logger(config.SAVE)
    LOG.info(f'PaddlePaddle {paddle.__version__} on {paddle.device.get_device()}, folder {config.SAVE}, config:\n'
             f'{config.dump(default_flow_style=None).rstrip()}')
    for loader in loaders:
        LOG.info(describe(loader.dataset, config.MODEL.NUM_CLASSES))
    paddle.seed(config.SEED)
    try:
        if config.EVAL:
            run_evaluation(config, *loaders)
        else:
            run_training(config, *loaders)
    except UserError as error:
        LOG.debug(f'error: {error}')  # for log.txt; the program says it on stderr
        raise
