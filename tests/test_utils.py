"""The runtime's settings and the errors before Paddle is there."""
import importlib.metadata
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, run

import utils


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
        utils._check_versions()
    else:
        with pytest.raises(utils.UserError, match=message):
            utils._check_versions()


def test_threads_are_set_only_where_unset():
    code = 'import os, utils; utils.prepare_runtime(); print(os.environ.get("OMP_NUM_THREADS"))'
    assert run('-c', code, env={'OMP_NUM_THREADS': '1'}).stdout == '1\n'
    if not utils.glob.glob('/dev/nvidia[0-9]*'):
        unset = 'import os; os.environ.pop("OMP_NUM_THREADS", None); ' + code
        process = run('-c', unset)
        assert process.stdout == f'{len(os.sched_getaffinity(0))}\n' and process.stderr == ''


def test_config_and_utils_import_no_paddle():
    run('-c', 'import sys, config, utils, tools.make_list; assert "paddle" not in sys.modules')


def test_a_request_to_stop_is_remembered_while_it_is_open():
    """And handlers are as before then, after an exception too: a notebook goes on."""
    before = [signal.getsignal(number) for number in utils.STOP_SIGNALS]
    with pytest.raises(SystemExit), utils.StopRequest() as stop:
        assert [signal.getsignal(number) for number in utils.STOP_SIGNALS] != before
        for number in (signal.SIGTERM, signal.SIGINT):
            assert stop.name in ('', 'SIGTERM')
            with pytest.raises(KeyboardInterrupt) if stop.name else utils.contextlib.nullcontext():
                signal.raise_signal(number)
        sys.exit()
    assert [signal.getsignal(number) for number in utils.STOP_SIGNALS] == before and stop.name == 'SIGTERM'


def test_one_line():
    assert utils.one_line('a\tb\r\n\x1b[31m \x07c\udcff é') == r'a b \x1b[31m \x07c\udcff é'
    assert utils.one_line('a' * 301) == 'a' * 300 + '...' and utils.one_line('a' * 300) == 'a' * 300


def test_another_thread_cannot_be_asked_to_stop():
    names = []

    def work():
        with utils.StopRequest() as stop:
            names.append(stop.name)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == ['']


def test_a_program_that_stops_is_not_ended_otherwise():
    """A launcher may ask again while Python ends."""
    code = """
import atexit, os, signal, sys, utils
utils.prepare_runtime()
atexit.register(lambda: [os.kill(os.getpid(), number) for number in utils.STOP_SIGNALS])
utils.run_program(lambda: sys.exit(int(sys.argv[1])))"""
    assert run('-c', code, utils.STOPPED, status=utils.STOPPED).stderr == ''
    assert 'KeyboardInterrupt' in run('-c', code, 3, status=3).stderr  # as after any other end


def test_a_signal_while_a_program_starts():
    """PaddlePaddle's own answer, a stack trace, is not seen."""
    statuses = []
    for delay in [0.1 * step for step in range(1, 22, 3)]:
        process = subprocess.Popen([sys.executable, 'main_single_gpu.py', '-data_path', 'none'], cwd=ROOT,
                                   stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        process.terminate()
        _, error = process.communicate()
        assert len(error.splitlines()) <= 1 and 'Traceback' not in error, (delay, error)
        statuses.append(process.returncode)
    # before its handler, with it, and at the end, where the list is not found
    assert set(statuses) <= {-signal.SIGTERM, 128 + signal.SIGTERM, 2} and -signal.SIGTERM in statuses
    assert 128 + signal.SIGTERM in statuses


def test_what_a_launcher_is_told(tmp_path):
    """By another rank than 0, whatever its message holds."""
    code = 'import utils; utils._tell_launcher("a \\udcff name")'
    environment = {**os.environ, 'PADDLE_TRAINER_ID': '1'}
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {code!r}], stderr=subprocess.DEVNULL)'
    process = subprocess.run([sys.executable, '-c', parent], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stderr == '-c: error: rank 1: a \\udcff name\n'
