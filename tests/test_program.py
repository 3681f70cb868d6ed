"""How programs start, are asked to stop, and end; the errors before Paddle is there."""
import contextlib
import glob
import importlib.metadata
import os
import signal
import sys
import threading

import pytest
from conftest import run

from runtime import program
from utils import UserError


@pytest.mark.parametrize('installed, message', [
    ({'numpy': '2.1.0', 'paddlepaddle': '2.6.2'}, 'numpy 2.1.0 crashes paddlepaddle 2.6.2: pip install "numpy<2"'),
    ({'numpy': '2.1.0', 'paddlepaddle-gpu': '2.6.2'}, 'numpy 2.1.0 crashes paddlepaddle-gpu 2.6.2'),
    ({'numpy': '2.1.0'}, 'PaddlePaddle is not installed: pip install paddlepaddle'),
    ({'numpy': '1.26.4', 'paddlepaddle': '2.6.2'}, None),
    ({'numpy': '2.3.5', 'paddlepaddle': '3.3.1'}, None),
])
def test_versions_that_crash_are_refused(monkeypatch, installed, message):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)
    if message is None:
        program._check_versions()
    else:
        with pytest.raises(UserError, match=message):
            program._check_versions()


def test_threads_are_set_only_where_unset():
    code = 'import os; from runtime import program; program.prepare_runtime(); print(os.environ.get("OMP_NUM_THREADS"))'
    assert run('-c', code, env={'OMP_NUM_THREADS': '1'}, fork=False).stdout == '1\n'
    if not glob.glob('/dev/nvidia[0-9]*'):
        unset = 'import os; os.environ.pop("OMP_NUM_THREADS", None); ' + code
        process = run('-c', unset, fork=False)
        assert process.stdout == f'{len(os.sched_getaffinity(0))}\n' and process.stderr == ''


def test_some_modules_import_no_paddle():
    code = 'import sys, config, utils, runtime.program, tools.make_list; assert "paddle" not in sys.modules'
    run('-c', code, fork=False)


def test_a_request_to_stop_is_remembered_while_it_is_open():
    """And handlers are as before then, after an exception too: a notebook goes on."""
    before = [signal.getsignal(number) for number in program.STOP_SIGNALS]
    with pytest.raises(SystemExit), program.StopRequest() as stop:
        assert [signal.getsignal(number) for number in program.STOP_SIGNALS] != before
        for number in (signal.SIGTERM, signal.SIGINT):
            assert stop.name in ('', 'SIGTERM')
            with pytest.raises(KeyboardInterrupt) if stop.name else contextlib.nullcontext():
                signal.raise_signal(number)
        sys.exit()
    assert [signal.getsignal(number) for number in program.STOP_SIGNALS] == before and stop.name == 'SIGTERM'


def test_another_thread_cannot_be_asked_to_stop():
    names = []

    def work():
        with program.StopRequest() as stop:
            names.append(stop.name)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == ['']


def test_a_program_that_stops_is_not_ended_otherwise():
    """A launcher may ask again while Python ends."""
    code = """
import atexit, os, signal, sys
from runtime import program
program.prepare_runtime()
atexit.register(lambda: [os.kill(os.getpid(), number) for number in program.STOP_SIGNALS])
program.run_program(lambda: sys.exit(int(sys.argv[1])))"""
    for status in (program.STOPPED, 128 + signal.SIGTERM):
        assert run('-c', code, status, status=status).stderr == ''
    assert 'KeyboardInterrupt' in run('-c', code, 3, status=3).stderr  # as after any other end


@pytest.mark.parametrize('when', ['paddle.vision', 'later'])
@pytest.mark.parametrize('group', [False, True])
def test_a_signal_while_a_program_starts(when, group):
    """PaddlePaddle's own answer, a stack trace, is not seen: not while it is imported, nor in a process of a group."""
    code = """
import os, signal, sys
from runtime import program

class Finder:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder)
program.prepare_runtime()
Finder.find_spec('later')
print('not ended')"""
    # NumPy's threads may get it too
    env = {'OMP_NUM_THREADS': '2', **({'PADDLE_TRAINER_ID': '0'} if group else {})}
    process = run('-c', code, when, status=128 + signal.SIGTERM, env=env, fork=False)
    assert process.stdout == process.stderr == ''
