"""A run: the one training step, the one evaluation, and what happens around them. See `run`."""
import datetime
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Optional

import numpy as np
import paddle
import paddle.nn.functional as F
from tqdm import tqdm

import checkpoint
import optim
from config import check_config, frozen
from datasets import get_dataloader, get_dataset
from losses import LabelSmoothingCrossEntropyLoss
from mobileone import build_mobileone, model_convert
from transforms import Normalize
from utils import UserError, append_json, setup_logger


@dataclass
class Training:
    """What a training step works on."""
    model: paddle.nn.Layer
    criterion: paddle.nn.Layer
    optimizer: paddle.optimizer.Optimizer
    schedule: optim.Schedule
    ema: Optional[optim.ModelEma]
    normalize: Normalize


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
def evaluate(model, loader, normalize):
    """Metrics of a model over every image of a loader, once. Leaves the model in evaluation mode."""
    model.eval()
    start, n = time.perf_counter(), 0
    sums = paddle.zeros([3], dtype='float64')
    for images, labels in tqdm(loader, 'evaluate', leave=False, file=sys.stdout, disable=not sys.stdout.isatty()):
        logits = model(normalize(images)).astype('float32')
        sums += batch_sums(logits, labels, F.cross_entropy(logits, labels))
        n += len(labels)
    if n != len(loader.dataset):
        raise RuntimeError(f'evaluated {n} images of {len(loader.dataset)}')
    return Metrics.from_sums(sums.numpy(), n, time.perf_counter() - start)


def train_one_epoch(training, loader, epoch, config, logger):
    """Train on every batch of epoch `epoch` (from 1). Returns Metrics of the training batches."""
    training.model.train()
    loader.batch_sampler.set_epoch(epoch)
    steps, first_step = len(loader), (epoch - 1) * len(loader)
    start, waited, n = time.perf_counter(), loader.waited, 0
    sums = paddle.zeros([3], dtype='float64')
    name = f'epoch {epoch}/{config.TRAIN.NUM_EPOCHS}'
    bar = tqdm(total=steps, desc=name, leave=False, file=sys.stdout, disable=not sys.stdout.isatty())
    for index, (images, labels) in enumerate(loader, 1):
        sums += train_step(training, images, labels, first_step + index - 1)
        n += len(labels)
        bar.update()
        if index % config.REPORT_FREQ == 0 or index == steps:
            loss = float(sums[0]) / n
            if not math.isfinite(loss):
                raise UserError(f'the loss is {loss} at epoch {epoch}, step {first_step + index}: lower TRAIN.BASE_LR '
                                'or check the labels')
            seconds = time.perf_counter() - start
            done = first_step + index
            left = datetime.timedelta(seconds=round(seconds / index * (training.schedule.total_steps - done)))
            line = (f'loss {loss:.4f} lr {training.schedule.lr(done - 1):.6g} {n / seconds:.1f} images/s '
                    f'data {(loader.waited - waited) / seconds:.0%} ETA {left}')
            bar.set_postfix_str(line)
            # on a terminal the bar shows it, and only log.txt takes the line
            logger.log(logging.INFO if bar.disable else logging.DEBUG, f'{name} step {index}/{steps} {line}')
    bar.close()
    return Metrics.from_sums(sums.numpy(), n, time.perf_counter() - start)


def load_model(config, logger):
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
    try:
        model = build_mobileone(network)
    except ValueError as error:
        raise UserError(f'MODEL: {error}') from None
    if path:
        left_out = checkpoint.load_into(model, weights, path, allow_other_classifier=not config.EVAL)
        logger.info(f'loaded {"EMA " if is_ema else ""}weights ({"fused" if is_fused else "unfused"}) from {path}')
        if left_out:
            logger.info(f'left out {", ".join(left_out)}, made for {weights[left_out[-1]].shape[-1]} classes, not '
                        f'{config.MODEL.NUM_CLASSES}: the classifier starts from random weights')
    if config.MODEL.DEPLOY and not is_fused:
        model = model_convert(model)
        logger.info('fused the branches')
    return model, is_ema


def build_training(config, model, loader, logger):
    """The Training of a model on the batches of a loader."""
    optimizer = optim.build_optimizer(config, model)
    decayed, rest = ((len(group), sum(int(np.prod(p.shape)) for p in group)) for group in optim.parameter_groups(model))
    logger.info(f'weight decay on {decayed[0]} tensors ({decayed[1]:,} parameters), none on {rest[0]} tensors '
                f'({rest[1]:,} parameters)')
    schedule = optim.Schedule(config, len(loader), loader.batch_sampler.total_batch)
    logger.info(f'{schedule.total_steps} steps of {loader.batch_sampler.total_batch} images, {len(loader)} per epoch; '
                f'learning rate up to {schedule.base:g}')
    ema = optim.ModelEma(model, config.TRAIN.MODEL_EMA_FORCE_CPU) if config.TRAIN.MODEL_EMA else None
    criterion = LabelSmoothingCrossEntropyLoss(config.TRAIN.SMOOTHING)
    normalize = Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)
    return Training(model, criterion, optimizer, schedule, ema, normalize)


class RunLog:
    """Writes the records of a run's log.jsonl and says them."""

    def __init__(self, config, logger, schedule=None):
        self.path = os.path.join(config.SAVE, 'log.jsonl')
        self.image_size = config.DATA.IMAGE_SIZE
        self.logger = logger
        self.schedule = schedule

    def write(self, epoch, step, split, weights, metrics):
        """step: optimizer steps done so far; its learning rate and weight decay are those of the last one."""
        lr, weight_decay = None, None
        if self.schedule:
            lr, weight_decay = self.schedule.lr(step - 1), self.schedule.weight_decay(step - 1)
        append_json(self.path, {'epoch': epoch, 'step': step, 'split': split, 'weights': weights, **metrics.record(),
                                'lr': lr, 'weight_decay': weight_decay, 'image_size': self.image_size})
        self.logger.info(f'epoch {epoch} {split} {weights}: {metrics}')


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


def run_evaluation(config, logger, loader):
    model, is_ema = load_model(config, logger)
    metrics = evaluate(model, loader, Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD))
    RunLog(config, logger).write(0, 0, 'val', 'ema' if is_ema else 'raw', metrics)


def run_training(config, logger, train_loader, val_loader):
    model, _ = load_model(config, logger)
    training = build_training(config, model, train_loader, logger)
    log = RunLog(config, logger, training.schedule)
    best = {'acc1': -1.0, 'epoch': 0}
    for epoch in range(config.TRAIN.LAST_EPOCH + 1, config.TRAIN.NUM_EPOCHS + 1):
        step = epoch * len(train_loader)
        log.write(epoch, step, 'train', 'raw', train_one_epoch(training, train_loader, epoch, config, logger))
        if epoch % config.VALIDATE_FREQ == 0 or epoch == config.TRAIN.NUM_EPOCHS:
            metrics = evaluate(model, val_loader, training.normalize)
            log.write(epoch, step, 'val', 'raw', metrics)
            if training.ema:
                with training.ema.applied():
                    metrics = evaluate(model, val_loader, training.normalize)
                log.write(epoch, step, 'val', 'ema', metrics)
            if metrics.acc1 > best['acc1']:
                best = {'acc1': metrics.acc1, 'epoch': epoch}
        save_checkpoints(config, training, epoch, step, best)
    logger.info(f'best top-1 {best["acc1"]:.2f}% ({"EMA" if training.ema else "raw"} weights) at epoch '
                f'{best["epoch"]}: {os.path.join(config.SAVE, checkpoint.BEST)}')


def prepare_folder(config):
    """Make the run's folder and save the config in it. Raises: UserError if it holds another run's checkpoints."""
    folder = config.SAVE
    holds_run = os.path.exists(os.path.join(folder, checkpoint.LATEST))
    if holds_run and not config.EVAL:
        raise UserError(f'{folder}: holds the checkpoints of another run; choose another -output, or remove it')
    try:
        os.makedirs(folder, exist_ok=True)
        name = 'config-eval.yaml' if holds_run else 'config.yaml'
        with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
            file.write(config.dump(default_flow_style=None))
        if not config.EVAL:
            with open(os.path.join(folder, 'log.jsonl'), 'w'):
                pass  # what a run that never reached a checkpoint left behind
    except OSError as error:
        raise UserError(f'{folder}: cannot write the run here ({error.strerror}); choose another -output') from None


def run(config):
    """Train, or with EVAL evaluate, as the config says, on the current device.

    Makes the run's folder (SAVE) with config.yaml, log.txt, log.jsonl and, in training, checkpoints.
    Raises: UserError for what the user can mend.
    """
    check_config(config)
    config = config.clone()
    config.defrost()
    config.SAVE = config.SAVE or os.path.join('output', f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}')
    config = frozen(config)
    # the lists are read first: a wrong path leaves no folder behind
    loaders = [get_dataloader(config, get_dataset(config, is_train), is_train)
               for is_train in ([False] if config.EVAL else [True, False])]
    prepare_folder(config)
    logger = setup_logger(config.SAVE)
    logger.info(f'PaddlePaddle {paddle.__version__} on {paddle.device.get_device()}, folder {config.SAVE}, config:\n'
                f'{config.dump(default_flow_style=None).rstrip()}')
    paddle.seed(config.SEED)
    if config.EVAL:
        run_evaluation(config, logger, *loaders)
    else:
        run_training(config, logger, *loaders)
