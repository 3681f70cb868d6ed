"""The folder of a run: its name, pruning of checkpoints, and run.json."""
import hashlib
import json
import os
import subprocess

import pytest

from runtime import folder
from utils import UserError, program_name


def test_runs_that_start_together_get_separate_folders(tmp_path):
    folders = [folder._new_folder(str(tmp_path / 'run')) for _ in range(3)]
    assert folders == [str(tmp_path / name) for name in ('run', 'run-2', 'run-3')]


def test_prune(tmp_path):
    for name in ('epoch_2', 'epoch_10', 'epoch_9', 'epoch_1', 'epoch_x', 'latest', 'best'):
        (tmp_path / f'{name}.pdparams').write_text('')
    folder.prune(str(tmp_path), 0)
    assert len(os.listdir(tmp_path)) == 7
    folder.prune(str(tmp_path), 2)
    kept = ('best', 'epoch_10', 'epoch_9', 'epoch_x', 'latest')
    assert sorted(os.listdir(tmp_path)) == [f'{name}.pdparams' for name in kept]


def test_an_evaluation_has_its_own_files_in_a_training_folder(tmp_path):
    assert folder.path_beside(str(tmp_path), 'run.json', True) == str(tmp_path / 'run.json')
    (tmp_path / 'config.yaml').write_text('DATA: {}\nEVAL: true\n')  # an evaluation's
    assert folder.path_beside(str(tmp_path), 'run.json', True) == str(tmp_path / 'run.json')
    (tmp_path / 'config.yaml').write_text('DATA: {}\nEVAL: false\n')
    assert folder.path_beside(str(tmp_path), 'run.json', True) == str(tmp_path / 'run-eval.json')
    assert folder.path_beside(str(tmp_path), 'run.json', False) == str(tmp_path / 'run.json')


@pytest.mark.parametrize('error, status, line', [
    (None, 'finished', None),
    (SystemExit(75), 'stopped', None),
    (KeyboardInterrupt(), 'stopped', None),
    (UserError('x is 1, but must be 2'), 'failed', 'x is 1, but must be 2'),
    (SystemExit(f'{program_name()}: error: lost a rank'), 'failed', 'lost a rank'),
    (RuntimeError('two\nlines'), 'failed', 'RuntimeError: two lines'),
], ids=str)
def test_every_start_is_recorded(tmp_path, error, status, line):
    path = tmp_path / 'run.json'
    with folder.recorded(str(path), {'command': 'first'}):
        first, = json.loads(path.read_text())
        assert (first['status'], first['end']) == ('running', None)
    try:
        with folder.recorded(str(path), {'command': 'second'}):
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    first, second = json.loads(path.read_text())
    assert (first['command'], first['status']) == ('first', 'finished') and first['start'] <= first['end']
    assert (second['command'], second['status'], second['error']) == ('second', status, line) and second['end']


def test_concurrent_runs_keep_their_records(tmp_path, monkeypatch):
    """Even if they run the same command in the same second."""
    path = tmp_path / 'run.json'
    monkeypatch.setattr(folder, '_now', lambda: 'now')
    monkeypatch.setattr(os, 'getpid', iter([7, 8]).__next__)

    def statuses():
        return [(start['pid'], start['status']) for start in json.loads(path.read_text())]
    with folder.recorded(str(path), {}):
        with pytest.raises(UserError), folder.recorded(str(path), {}):
            assert statuses() == [(7, 'running'), (8, 'running')]
            raise UserError('the mistake')
        assert statuses() == [(7, 'running'), (8, 'failed')]
    assert statuses() == [(7, 'finished'), (8, 'failed')]


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path):
    path = tmp_path / 'run.json'
    with pytest.raises(UserError, match='^the mistake$'), folder.recorded(str(path), {}):
        (tmp_path / 'run.json.partial').symlink_to('/dev/full')
        raise UserError('the mistake')
    assert json.loads(path.read_text())[0]['status'] == 'running'
    (tmp_path / 'run.json.partial').symlink_to('/dev/full')
    with pytest.raises(UserError, match='run.json: cannot write .No space left'), folder.recorded(str(path), {}):
        pass


@pytest.mark.parametrize('text', ['', '{}', '[{]'])
def test_a_broken_record_is_not_replaced(tmp_path, text):
    path = tmp_path / 'run.json'
    path.write_text(text)
    with pytest.raises(UserError, match='run.json: not a JSON list of a run.s starts; fix it, or move it away'), \
            folder.recorded(str(path), {}):
        pass
    assert path.read_text() == text


def test_revision_of_a_clone(tmp_path, monkeypatch):
    def git(*args):
        return subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=x', '-c', 'user.email=x', *args], check=True,
                              capture_output=True, text=True).stdout.strip()
    assert folder.find_revision(str(tmp_path)) is None
    git('init')
    assert folder.find_revision(str(tmp_path)) is None  # no commit yet
    (tmp_path / 'run.py').write_text('one')
    git('add', 'run.py')
    git('commit', '-m', 'one')
    revision = git('rev-parse', 'HEAD')
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/1.jpg').write_text('not tracked')
    assert folder.find_revision(str(tmp_path)) == {'revision': revision, 'clean': True}
    assert folder.find_revision(str(tmp_path / 'photos')) is None  # a folder inside an unrelated clone
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'nowhere'))  # as in a hook of another repository
    assert folder.find_revision(str(tmp_path)) == {'revision': revision, 'clean': True}
    monkeypatch.delenv('GIT_DIR')
    (tmp_path / 'run.py').write_text('two')
    assert folder.find_revision(str(tmp_path)) == {'revision': revision, 'clean': False}
    monkeypatch.setenv('PATH', '')
    assert folder.find_revision(str(tmp_path)) is None


def test_describe_start(tmp_path, monkeypatch):
    (tmp_path / 'list.txt').write_text('a 0\n')
    monkeypatch.setattr('sys.argv', ['main.py', '-data_path', 'a b'])
    start = folder.describe_start([str(tmp_path / 'list.txt')])
    assert start['command'].endswith(" main.py -data_path 'a b'") and start['directory'] == os.getcwd()
    assert start['sha256'] == {str(tmp_path / 'list.txt'): hashlib.sha256(b'a 0\n').hexdigest()}
    assert start['device'] == 'cpu' and start['processes'] == 1 and start['cores'] >= 1
    assert {'python', 'paddlepaddle', 'numpy', 'pillow'} <= set(start['versions'])
    assert json.loads(json.dumps(start)) == start
