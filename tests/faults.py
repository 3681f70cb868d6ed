"""Run a program with a fault at the NUMBER-th call of a function: python faults.py FAULT NUMBER PROGRAM [ARGUMENT ...].
"""
import functools
import multiprocessing
import os
import runpy
import signal
import sys
import time

from runtime.program import prepare_runtime

prepare_runtime()

import paddle  # noqa: E402

import engine  # noqa: E402
from runtime.workers import Workers  # noqa: E402


def on_call(owner, name, number, fault, counts=lambda *args: True):
    """Call fault(original, *arguments) before the number-th call for which counts(*arguments) is true."""
    original, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        if counts(*args):
            calls.append(None)
            if len(calls) == number:
                fault(original, *args)
        return original(*args, **kwargs)
    setattr(owner, name, call)


def slow_down(owner, name, seconds):
    original = getattr(owner, name)

    def call(*args):
        time.sleep(seconds)
        return original(*args)
    setattr(owner, name, call)


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(save, state, path):
    save(state, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def kill_worker(*args):
    worker = max(multiprocessing.active_children(), key=lambda process: process.pid)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(1)


def kill_first_worker(*args):
    """Kill the first worker before the others start."""
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(1)


def send(name):
    return lambda *args: os.kill(os.getpid(), getattr(signal, name))


def terminate_all(*args):
    """Terminate all processes of a group once the others have run as far as they can without this one."""
    time.sleep(2)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(1)


def raise_error(*args):
    raise RuntimeError('boom')


FAULTS = {
    # within a step, between the optimizer and the EMA
    'step': lambda number: on_call(engine.optim.ModelEma, 'update', number, die),
    'write': lambda number: on_call(paddle, 'save', number, die_half_written),
    'rename': lambda number: on_call(os, 'replace', number, die, lambda source, path: path.endswith('.pdparams')),
    'evaluation': lambda number: on_call(engine, 'batch_sums', number, die, lambda *args: not paddle.is_grad_enabled()),
    'terminate': lambda number: on_call(engine, 'train_step', number, send('SIGTERM')),
    **{name: functools.partial(lambda name, number: on_call(engine, 'train_step', number, send(name)), name)
       for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')},
    'worker': lambda number: on_call(engine, 'train_step', number, kill_worker),
    'worker_before_first_batch': lambda number: on_call(Workers, '_receive', number, kill_worker),
    'first_worker': lambda number: on_call(
        multiprocessing.context.ForkProcess, 'start', number + 1, kill_first_worker),
    'worker_evaluation': lambda number: on_call(engine, 'batch_sums', number, kill_worker,
                                                lambda *args: not paddle.is_grad_enabled()),
    'interrupt': lambda number: on_call(engine, 'train_step', number, send('SIGINT')),
    'terminate_evaluation': lambda number: on_call(engine, 'batch_sums', number, send('SIGTERM'),
                                                   lambda *args: not paddle.is_grad_enabled()),
    'terminate_all_in_evaluation': lambda number: on_call(engine, 'batch_sums', number, terminate_all,
                                                          lambda *args: not paddle.is_grad_enabled()),
    # delays each step by NUMBER seconds
    'slow': lambda number: slow_down(engine, 'train_step', number),
    'raise': lambda number: on_call(engine, 'train_step', number, raise_error),
}


if __name__ == '__main__':
    # with several processes, only in the last one
    if int(os.environ.get('PADDLE_TRAINER_ID', 0)) == int(os.environ.get('PADDLE_TRAINERS_NUM', 1)) - 1:
        FAULTS[sys.argv[1]](int(sys.argv[2]))
    program = sys.argv[3]
    sys.argv = sys.argv[3:]
    runpy.run_path(program, run_name='__main__')
