"""Run the rows of a benchmark in turns, each row in its own process, with a pause before each turn.

Taking turns spreads slow moments of the machine over all rows. `measure` starts the processes; the worker modules that
they run call `serve_turns`.
"""
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from runtime.program import end_with_parent, shortage
from utils import UserError, describe_error, one_line

# seconds before a turn, because OpenMP threads keep spinning for 0.2 s after their work
PAUSE = 0.3


def describe_cpu():
    """Return the name of the CPU, and whether it supports bfloat16."""
    text = ''
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
        text = file.read()
    name = re.search(r'^model name\s*: (.*)', text, re.M)
    return (name[1] if name else platform.processor() or platform.machine(),
            bool(re.search(r'\b(avx512_bf16|amx_bf16)\b', text)))


def find_versions(*packages):
    """Return {package: version} for the installed packages."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


class Worker:
    """A process that runs a worker module for a row, on row['threads'] threads, until the end of the `with` block."""

    def __init__(self, module, row, folder):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, '-m', module, json.dumps([row, folder, os.getpid()])], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            env={**os.environ, 'OMP_NUM_THREADS': str(row['threads'])})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self.errors, self.process:
            pass

    def turn(self, length):
        """Run a turn of this length and return its measurement. Raises: UserError that says why the process ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f'{json.dumps(length)}\n'.encode())
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        last = one_line(self.errors.read().decode(errors='replace').strip().rpartition('\n')[2])
        if status == -signal.SIGKILL:
            last = f'(killed, perhaps for lack of memory) {last}'
        # the process's own error message, unless it crashed or was killed
        raise UserError(last.partition(': error: ')[2] or f'its process ended with status {status} {last}'.strip())


def serve_turns(load):
    """Serve a Worker: for each line on stdin, the length of a turn, run the turn and print its measurement in JSON.

    load(row, folder) -> turn; turn(length) -> a value that JSON can represent.
    """
    row, folder, parent = json.loads(sys.argv[1])
    end_with_parent(parent)
    results = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # keep the output of engines separate from the measurements
    try:
        turn = load(row, folder)
        for line in sys.stdin:
            print(json.dumps(turn(json.loads(line))), file=results)
    except UserError:
        raise
    except Exception as error:  # engines raise their own types
        raise UserError(shortage(error) or describe_error(error)) from None


def measure(module, rows, folder, turns, length):
    """Run `turns` turns of this length for each row, after one turn to warm up.

    Adds to each row 'turns', the list of measurements, or 'error', the reason why it has none.
    """
    results = [[] for _ in rows]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(module, row, folder)) for row in rows]
        for _ in range(1 + turns):
            for row, worker, measured in zip(rows, workers, results):
                if 'error' not in row:
                    time.sleep(PAUSE)
                    try:
                        measured.append(worker.turn(length))
                    except UserError as error:
                        row['error'] = str(error)
    for row, measured in zip(rows, results):
        if 'error' not in row:
            row['turns'] = measured[1:]  # without the warm-up


def compare(rows, choose):
    """Add to each measured row the median 'milliseconds' of its turns and the 'ratio' of its times to a base row's.

    The ratio is the median of the ratios turn by turn. choose(rows): returns the base row, or None for no ratios.
    """
    measured = [row for row in rows if 'turns' in row]
    for row in measured:
        row['milliseconds'] = statistics.median(row['turns'])
    base = choose(measured)
    for row in measured:
        row['ratio'] = base and statistics.median(own / other for own, other in zip(row['turns'], base['turns']))


def with_range(values, digits):
    """Format the median of some numbers, right-aligned, and their range."""
    return f'{statistics.median(values):10.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'
