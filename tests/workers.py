"""The code that test_distributed.py runs in each process of a group: python workers.py FUNCTION FOLDER [ARGUMENT ...].
"""
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from runtime.program import prepare_runtime, run_program

prepare_runtime()

import numpy as np  # noqa: E402
import paddle  # noqa: E402
from conftest import NARROW  # noqa: E402

import engine  # noqa: E402
import mobileone  # noqa: E402
from config import get_config, get_parser, resolve_config, update_config  # noqa: E402
from datasets import get_dataloader, get_dataset  # noqa: E402
from mobileone import build_mobileone  # noqa: E402
from run import Run, build_training, find_facts  # noqa: E402
from runtime import checkpoint, folder  # noqa: E402
from runtime.program import join_process_group  # noqa: E402
from utils import (  # noqa: E402
    UserError,
    check_agreement,
    from_main,
    mean_over_ranks,
    rank,
    reduce_over_ranks,
    world_size,
)

SYNCS = ['numpy', 'item', 'tolist', '__float__', '__int__', '__bool__', '__array__', '__index__', 'cpu', 'tobytes']
COLLECTIVES = ['all_reduce', 'broadcast', 'broadcast_object_list', 'all_gather', 'all_gather_object', 'barrier',
               'reduce', 'scatter', 'alltoall']


class Plain(paddle.nn.Layer):
    """A model without batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = paddle.nn.Conv2D(3, 4, 3, stride=2)
        self.fc = paddle.nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(paddle.nn.functional.relu(self.conv(x)).mean([2, 3]))


def say(text):
    """Print a line in a single write, so that the lines of different processes do not mix."""
    os.write(1, f'{text}\n'.encode())


def build(folder, network, *options):
    """Return (Training, loader, config) for the dataset in a folder. network: makes the model; None for MobileOne."""
    args = get_parser('').parse_args(['-data_path', folder, '-opts', *NARROW, 'MODEL.NUM_CLASSES', '10',
                                      'DATA.NUM_WORKERS', '0', *options])
    config = resolve_config(update_config(get_config(), args))
    paddle.seed(0)
    model = network() if network else build_mobileone(config)
    loader = get_dataloader(config, get_dataset(config), True, rank(), world_size())
    return build_training(config, model, loader), loader, config


def train_epoch(training, loader, config, epoch=1):
    return engine.train_one_epoch(training, loader, engine.EpochPart.none(epoch), config.REPORT_FREQ)


def train_plain(folder, target, *options):
    """Train a model without batch norm for two epochs, and save its weights, EMA and metrics."""
    training, loader, config = build(folder, Plain, *options)
    metrics = [train_epoch(training, loader, config, epoch) for epoch in (1, 2)]
    if rank() == 0:
        np.savez(target, loss=[m.loss for m in metrics], acc5=[m.acc5 for m in metrics], n=[m.n for m in metrics],
                 **{name: tensor.numpy() for name, tensor in training.model.state_dict().items()},
                 **{f'ema.{name}': tensor.numpy() for name, tensor in training.ema.network.state_dict().items()})


def count(folder, *options):
    """Print the number of synchronizing calls before each step of an epoch, and the names of all these calls."""
    training, loader, config = build(folder, None, *options)
    train_epoch(training, loader, config)  # one-time initialization happens here
    calls = []

    def counted(owner, name):
        original = getattr(owner, name, None)

        def call(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)
        if original:
            setattr(owner, name, call)
    for name in SYNCS:
        counted(paddle.Tensor, name)
    for name in COLLECTIVES:
        counted(paddle.distributed, name)
    at_steps = []
    step = engine.train_step

    def train_step(*args):
        at_steps.append(list(calls))
        return step(*args)
    engine.train_step = train_step
    train_epoch(training, loader, config, 2)
    say(f'rank {rank()}: {[len(before) for before in at_steps]} then {" ".join(calls)}')


def windows(folder, *options):
    """Print the number of batches in an epoch, and of those for which DataParallel does not synchronize."""
    training, loader, config = build(folder, None, *options)
    no_sync, entered = training.network.no_sync, []

    def counted():
        entered.append(None)
        return no_sync()
    training.network.no_sync = counted
    train_epoch(training, loader, config)
    say(f'rank {rank()}: {len(loader)} batches, {len(entered)} without synchronization')


def disagree(folder, key, value):
    """Start rank 1 with a different value for a key."""
    _, loader, config = build(folder, Plain, *([key, value] if rank() else []))
    check_agreement(lambda: find_facts(config, [loader]))


def disagree_on_weights(folder, *folders):
    """Name a weight file by the same relative path on both ranks, in different folders."""
    os.chdir(folders[rank()])
    _, loader, config = build(folder, Plain, 'MODEL.PRETRAINED', 'w.pdparams')
    check_agreement(lambda: find_facts(config, [loader]))
    say(f'rank {rank()}: agreed')


def not_finite(folder, *options):
    """Train with a loss that is infinite from step 4 on, only on the last rank."""
    training, loader, config = build(folder, Plain, *options)
    criterion, losses = training.criterion, []

    def broken(inputs, logits, labels):
        losses.append(None)
        bad = len(losses) >= 4 and rank() == world_size() - 1
        return criterion(inputs, logits, labels) * (float('inf') if bad else 1.0)
    training.criterion = broken
    train_epoch(training, loader, config)


def helpers():
    size = world_size()
    assert reduce_over_ranks([rank(), 1]).tolist() == [size * (size - 1) / 2, size]
    assert reduce_over_ranks(paddle.to_tensor([rank() + 3.0]), 'MIN').tolist() == [3]
    means = mean_over_ranks([np.full([2, 2], rank(), 'float32'), np.array([1.0, rank()])])
    assert means[0].dtype == np.float32 and (means[0] == (size - 1) / 2).all()
    assert means[1].tolist() == [1, (size - 1) / 2]
    assert from_main(lambda: {'from': rank()}) == {'from': 0}

    def mistake():
        raise UserError(f'raised by {rank()}')
    try:
        from_main(mistake)
    except UserError as error:
        assert str(error) == 'raised by 0'
    else:
        raise AssertionError
    say(f'rank {rank()} of {size} ok')


def statistics(folder):
    """Check that every rank ends an epoch with the same batch-norm statistics, the mean over the ranks."""
    training, loader, config = build(folder, None, 'DATA.BATCH_SIZE', '5')
    average, own = engine.average_statistics, {}

    def spy(training):
        own.update({name: tensor.numpy() for name, tensor in training.model.state_dict().items()})
        own.update({f'ema.{name}': tensor.numpy() for name, tensor in training.ema.network.state_dict().items()})
        average(training)
    engine.average_statistics = spy
    train_epoch(training, loader, config)
    state = {name: tensor.numpy() for name, tensor in training.model.state_dict().items()}
    state.update({f'ema.{name}': tensor.numpy() for name, tensor in training.ema.network.state_dict().items()})
    differed = 0
    for name, value in state.items():
        mean = mean_over_ranks([own[name]])[0]
        differed += (own[name] != mean).any()
        if name.endswith(('._mean', '._variance')):
            assert (value == mean).all(), name
        else:
            assert (value == own[name]).all() and np.allclose(own[name], mean, rtol=1e-6), name
    say(f'rank {rank()}: {differed} differed')


def save(data, output):
    """Check that all ranks wait for a checkpoint within an epoch, and continue with its batch-norm statistics."""
    training, _, config = build(data, None, 'SAVE', output)
    name = next(name for name in training.model.state_dict() if name.endswith('._mean'))
    tensor = training.model.state_dict()[name]
    tensor.set_value(np.full(tensor.shape, rank(), 'float32'))
    part = engine.EpochPart(1, 1, paddle.zeros([3], dtype='float64'), 8, 1.0)
    write = folder.write_checkpoints

    def slowly(*args):
        time.sleep(1)
        write(*args)
    folder.write_checkpoints = slowly
    Run(config, training, part=part).save()
    mean = checkpoint.load(os.path.join(output, 'latest.pdparams'))['model'][name]
    assert (mean == (world_size() - 1) / 2).all() and (tensor.numpy() == mean).all()
    say(f'rank {rank()} continued')


def fail(folder, how):
    """Fail on rank 1 while the others wait for it, fail on all ranks together, or sleep until terminated."""
    reduce_over_ranks([0])  # if a rank ended while others still connect to it, they would wait for half a minute
    if how == 'end':
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    Path(folder, f'{os.getpid()}.pid').touch()
    if how in ('sleep', 'end'):
        time.sleep(600)
    if rank() == 1 or how == 'together':
        if how == 'raise':
            raise RuntimeError('boom')
        if how == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        raise UserError('a mistake')
    reduce_over_ranks([0])


def merged(folder):
    """Check that training steps with merged and with separate branches give the same statistics."""
    states = []
    for apart in (False, True):
        if apart:
            mobileone.MobileOneBlock.mergeable_branches = lambda block, name: []
        training, loader, _ = build(folder, None, 'TRAIN.BASE_LR', '0.01')
        assert isinstance(training.network, paddle.DataParallel) == (world_size() > 1)
        training.model.train()
        for step, batch in zip(range(3), loader):
            engine.train_step(training, [batch], step)
        states.append({name: tensor.numpy() for name, tensor in training.model.state_dict().items()})
    for name, array in states[0].items():
        np.testing.assert_allclose(array, states[1][name], rtol=0, atol=1e-4, err_msg=name)
    say(f'rank {rank()}: {sum("_mean" in name for name in states[0])} norms')


class _GPUTracer:
    """Paddle's tracer, but reporting a GPU."""

    def __getattr__(self, name):
        if name == '_expected_place':
            return SimpleNamespace(is_gpu_place=lambda: True, is_xpu_place=lambda: False,
                                   is_custom_place=lambda: False)
        return getattr(paddle.base.framework._dygraph_tracer(), name)

    def __setattr__(self, name, value):
        setattr(paddle.base.framework._dygraph_tracer(), name, value)


def amp(folder, level):
    """Run the forward pass of training as on a GPU with AMP. Prints the number of depthwise and dense convolutions."""
    training, loader, config = build(folder, None, 'AMP', 'True', 'AMP_LEVEL', level, 'AMP_DTYPE', 'bfloat16')
    auto_cast = sys.modules['paddle.amp.auto_cast']
    auto_cast._dygraph_tracer = _GPUTracer
    auto_cast._is_gpu_bfloat16_supported = lambda: True
    paddle.device.get_device = lambda: 'gpu:0'
    mobileone._is_on_cpu = lambda x: False
    images, _ = next(iter(loader))
    training.model.train()
    with engine.Precision(config).auto_cast():
        training.model(training.normalize(images))
    convs = [conv for stage in training.model.stages for block in stage for conv in block.convs.values()]
    depthwise = sum(conv.get('groups', 1) > 1 for conv in convs)
    gates = sum(isinstance(layer, mobileone.SEBlock) for layer in training.model.sublayers())
    say(f'{depthwise} {len(convs) - depthwise + 2 * gates}')


if __name__ == '__main__':
    join_process_group()
    run_program(lambda: globals()[sys.argv[1]](*sys.argv[2:]))
