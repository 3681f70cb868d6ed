"""Rows of a benchmark that take turns, each in a process of its own, with a pause before each turn.

The processes live side by side, so that a slower moment of the machine weighs on all rows. `measure` runs them; a
module with a process's part calls `answer_turns`.
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

# seconds before a turn; threads of OpenMP go on waiting for 0.2 s after their work
PAUSE = 0.3


def describe_cpu():
    """The CPU's name, and whether it computes in bfloat16."""
    text = ''
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
        text = file.read()
    name = re.search(r'^model name\s*: (.*)', text, re.M)
    return (name[1] if name else platform.processor() or platform.machine(),
            bool(re.search(r'\b(avx512_bf16|amx_bf16)\b', text)))


def find_versions(*packages):
    """{package: version} of those that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


class Worker:
    """A process of a module for a row, which ends with this `with`. The row says its threads."""

    def __init__(self, module, row, folder):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  open until the end
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
        """What a turn of this length has measured. Raises: UserError that says why the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f'{json.dumps(length)}\n'.encode())
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.errors.seek(0)
        last = one_line(self.errors.read().decode(errors='replace').strip().rpartition('\n')[2])
        if status == -signal.SIGKILL:
            last = f'(killed: memory may not suffice) {last}'
        # its own words, unless it has crashed or was killed
        raise UserError(last.partition(': error: ')[2] or f'its process ended with status {status} {last}'.strip())


def answer_turns(load):
    """In a Worker's process: answer each line on stdin, the length of a turn, with a line of what it has measured.

    load(row, folder) -> turn(length) -> what JSON can hold.
    """
    row, folder, parent = json.loads(sys.argv[1])
    end_with_parent(parent)
    answers = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(2, 1)  # what an engine prints is no answer
    try:
        turn = load(row, folder)
        for line in sys.stdin:
            print(json.dumps(turn(json.loads(line))), file=answers)
    except UserError:
        raise
    except Exception as error:  # of an engine, of its own types
        raise UserError(shortage(error) or describe_error(error)) from None


def measure(module, rows, folder, turns, length):
    """Add 'turns' to each row, what its turns of this length have measured, or 'error', what it cannot do."""
    answers = [[] for _ in rows]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(module, row, folder)) for row in rows]
        for _ in range(1 + turns):
            for row, worker, measured in zip(rows, workers, answers):
                if 'error' not in row:
                    time.sleep(PAUSE)
                    try:
                        measured.append(worker.turn(length))
                    except UserError as error:
                        row['error'] = str(error)
    for row, measured in zip(rows, answers):
        if 'error' not in row:
            row['turns'] = measured[1:]  # the first one warms up


def compare(rows, choose):
    """Add the median 'milliseconds' of its turns to each row that has some, and the 'ratio' to one of these rows.

    choose(rows): that row, or None. The ratio is the median of those within a turn; None where no row is chosen.
    """
    measured = [row for row in rows if 'turns' in row]
    for row in measured:
        row['milliseconds'] = statistics.median(row['turns'])
    base = choose(measured)
    for row in measured:
        row['ratio'] = base and statistics.median(own / other for own, other in zip(row['turns'], base['turns']))


def with_range(values, digits):
    """The median of some numbers, aligned, and their range."""
    return f'{statistics.median(values):10.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})'
