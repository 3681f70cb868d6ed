"""Measure how fast networks, training and its loading of images are.

  python -m tools.benchmark ddp -h
  python -m tools.benchmark latency -h
  python -m tools.benchmark loader -h
  python -m tools.benchmark train -h

ddp: how training speeds up with processes. latency: how long a network takes, by every engine that is installed.
loader: how many images a second are loaded for training. train: how fast a network trains.
"""
import importlib
import sys

from runtime.program import run_program
from runtime.settings import ArgumentParser

COMMANDS = ('ddp', 'latency', 'loader', 'train')


def main():
    sys.argv[0] = 'tools.benchmark'  # how the user called it, for help and errors
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('command', choices=COMMANDS, help='what to measure; its own -h explains its flags')
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f'tools.benchmark {command}']
    importlib.import_module(f'tools.benchmark.{command}').main()


if __name__ == '__main__':
    run_program(main)
