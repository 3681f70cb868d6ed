"""The process that measures one row of tools.benchmark.train."""
import contextlib
import itertools
import os
import re
import time
import types
from dataclasses import dataclass
from typing import Callable, Optional

from config import get_config, resolve_config, with_values
from runtime.program import prepare_runtime, run_program, use_device
from tools.benchmark.turns import serve_turns
from utils import UserError

# size of ImageNet's training set, for the schedules of a run on synthetic images
IMAGENET = 1281167


@dataclass
class Trainer:
    """What a turn runs: step(window) for each window from windows(), an endless generator of lists of batches."""
    windows: Callable
    step: Callable
    # paddle.device.cuda or torch.cuda, whose functions have the same names; None on a CPU
    cuda: Optional[types.ModuleType]
    # resident bytes of this process before the training was built
    memory_before: Optional[int]
    # None for synthetic images
    loader: object = None
    # count(window) -> operator launches of step(window); None: not counted
    count: Optional[Callable] = None
    launches: Optional[int] = None


def turn(trainer, steps):
    """Measure some steps. The host waits for the device only before the first and after the last one.

    Returns: {milliseconds: per step, images_per_second, waiting: share of the time that the host waited for images,
    workers: of the loader, launches: operators per step, memory: peak in bytes, of tensors on a GPU or of the growth of
    the process on a CPU}
    """
    wait, loader = trainer.cuda.synchronize if trainer.cuda else lambda: None, trainer.loader
    with contextlib.closing(trainer.windows()) as windows:
        # the first step after a pause is slow, and the workers' first batches, two each, arrive all at once
        for window in itertools.islice(windows, 1 + 2 * (loader.num_workers if loader else 0)):
            trainer.step(window)
        wait()
        waited, images, start = loader.waited if loader else 0, 0, time.perf_counter()
        for window in itertools.islice(windows, steps):
            trainer.step(window)
            images += sum(len(labels) for _, labels in window)
        wait()
        seconds = time.perf_counter() - start
        result = {'milliseconds': 1000 * seconds / steps, 'images_per_second': images / seconds,
                  'waiting': (loader.waited - waited) / seconds if loader else None, 'memory': peak_memory(trainer),
                  'workers': loader.num_workers if loader else None}
        if trainer.count and trainer.launches is None:
            trainer.launches = trainer.count(next(windows))
    if trainer.cuda:
        trainer.cuda.empty_cache()  # for the other rows
    return {**result, 'launches': trainer.launches}


def peak_memory(trainer):
    if trainer.cuda:
        return trainer.cuda.max_memory_allocated()
    return trainer.memory_before and resident_memory('VmHWM') - trainer.memory_before


def resident_memory(kind):
    """Return the resident bytes of this process: VmRSS now, VmHWM at the peak. None if the system has no /proc."""
    with contextlib.suppress(OSError), open('/proc/self/status', encoding='utf-8') as file:
        return 1024 * int(re.search(rf'{kind}:\s*(\d+)', file.read())[1])


def repeated(value):
    while True:
        yield value


class SyntheticLoader:
    """The parts of a loader that training uses, repeating one random batch on the device."""

    def __init__(self, config):
        import paddle

        from datasets import TrainSampler
        n, size = config.DATA.BATCH_SIZE, config.DATA.IMAGE_SIZE
        self.batch_sampler = TrainSampler(IMAGENET, n, config.SEED)
        self.batch = (paddle.randint(0, 256, [n, size, size, 3], 'int32').astype('uint8'),
                      paddle.randint(0, config.MODEL.NUM_CLASSES, [n], 'int64'))

    def __iter__(self):
        return repeated(self.batch)


def load_paddle(row, config):
    """Return the Trainer for this project's training."""
    prepare_runtime()
    import paddle

    import engine
    from mobileone import build_mobileone
    from run import build_loader, build_training
    from tools.benchmark.launches import count_launches

    def windows():
        for epoch in epochs:
            loader.batch_sampler.set_epoch(epoch)
            with contextlib.closing(iter(loader)) as batches:
                yield from engine.windows(batches, config.TRAIN.ACCUM_ITER)

    def step(window):
        engine.train_step(training, window, next(numbers))

    cuda = paddle.device.cuda if use_device().startswith('gpu') else None
    paddle.seed(config.SEED)
    memory, is_synthetic = resident_memory('VmRSS'), row['workers'] is None
    # every turn gets different images, which are not in the page cache yet
    numbers, epochs = itertools.count(), itertools.count(1)
    loader = SyntheticLoader(config) if is_synthetic else build_loader(config, True)
    training = build_training(config, build_mobileone(config), loader)
    training.model.train()
    return Trainer(windows, step, cuda, memory, None if is_synthetic else loader,
                   lambda window: count_launches(lambda: step(window)))


def load_timm(row, config):
    """Return the Trainer for timm's network of the same name, with timm's optimizer, loss and EMA.

    Raises: UserError if timm has no such network, or PyTorch finds no GPU.
    """
    import timm
    import torch
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3
    name, train = config.MODEL.NAME, config.TRAIN
    if not timm.is_model(name):
        raise UserError(f'timm has no network {name}')
    if row['device'] == 'cuda' and not torch.cuda.is_available():
        raise UserError('PyTorch finds no GPU')
    torch.set_num_threads(row['threads'])
    torch.backends.cudnn.benchmark = True  # as timm's train.py does
    memory, size, device = resident_memory('VmRSS'), config.DATA.IMAGE_SIZE, row['device']
    model = timm.create_model(name, num_classes=config.MODEL.NUM_CLASSES).to(device).train()
    ema = ModelEmaV3(model, decay=train.MODEL_EMA_DECAY) if train.MODEL_EMA else None
    optimizer = create_optimizer_v2(model, train.OPTIMIZER.NAME.lower(), lr=train.BASE_LR,
                                    weight_decay=train.WEIGHT_DECAY)
    criterion = LabelSmoothingCrossEntropy(train.SMOOTHING)
    dtype = getattr(torch, config.AMP_DTYPE.lower())
    scaler = torch.amp.GradScaler(device, enabled=config.AMP and dtype == torch.float16)
    batch = (torch.randn([row['batch'], 3, size, size], device=device),
             torch.randint(config.MODEL.NUM_CLASSES, [row['batch']], device=device))

    def step(window):
        for images, labels in window:
            with torch.autocast(device, dtype, enabled=config.AMP):
                loss = criterion(model(images), labels)
            scaler.scale(loss / len(window)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if ema:
            ema.update(model)
    return Trainer(lambda: repeated([batch] * train.ACCUM_ITER), step, torch.cuda if device == 'cuda' else None, memory)


def config_of(row, config):
    """Return the config of a row. config: shared by all rows. Raises: UserError for an invalid value."""
    return resolve_config(with_values(config, {
        'DATA.BATCH_SIZE': row['batch'], 'DATA.NUM_WORKERS': row['workers'] or 0, 'AMP': row['precision'] != 'float32',
        'AMP_LEVEL': 'O2' if row['precision'] == 'O2' else 'O1'}))


def start(row, folder):
    """Return turn(steps) for a row. folder: contains config.yaml, shared by all rows."""
    config = config_of(row, get_config(os.path.join(folder, 'config.yaml')))
    trainer = (load_timm if row['framework'] == 'timm' else load_paddle)(row, config)
    return lambda steps: turn(trainer, steps)


if __name__ == '__main__':
    run_program(lambda: serve_turns(start))
