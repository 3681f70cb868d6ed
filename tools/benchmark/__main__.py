"""Measure the speed of networks, of training, and of data loading.

  python -m tools.benchmark ddp -h
  python -m tools.benchmark latency -h
  python -m tools.benchmark loader -h
  python -m tools.benchmark train -h

ddp: speedup of training with the number of processes. latency: time of a fused network in every installed engine.
loader: images per second loaded for training. train: speed of a training step.
"""
import importlib
import sys

from runtime.program import run_program
from runtime.settings import ArgumentParser

COMMANDS = ('ddp', 'latency', 'loader', 'train')


def main():
    sys.argv[0] = 'tools.benchmark'  # the name shown in help and errors
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('command', choices=COMMANDS, help='what to measure; add -h for its flags')
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f'tools.benchmark {command}']
    importlib.import_module(f'tools.benchmark.{command}').main()


if __name__ == '__main__':
    run_program(main)
