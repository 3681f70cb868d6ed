"""The runtime's settings and the errors before Paddle is there."""
import importlib.metadata
import os

import pytest
from conftest import run

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
