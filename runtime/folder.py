"""The folder of a run: its run.json, log.jsonl and checkpoints, and what of them a resumed run goes on from."""
import contextlib
import datetime
import glob
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time

import paddle

from runtime import checkpoint, files
from runtime.program import usable_cores
from utils import LOG, UserError, describe_error, naming, program_name, rank, world_size

# whose versions run.json has, of those that are installed
PACKAGES = ('paddlepaddle', 'paddlepaddle-gpu', 'numpy', 'pillow', 'pyyaml', 'yacs', 'simplejpeg',
            'opencv-python-headless', 'opencv-python')


def prepare_folder(save, resume, name, is_evaluation):
    """Make the folder of a run.

    save: its path; where that is empty, the folder of the checkpoint that the run resumes, or a new one below output/.
    resume: that checkpoint, 'auto' for the newest in `save`, '' for none; name: begins the name of a new folder.
    Returns: its path.
    Raises: UserError for a training in a folder that holds the results of another run.
    """
    if resume != 'auto':
        checkpoint.check_exists(resume)
    folder = save or (os.path.dirname(resume) or '.' if resume else '')
    if not folder:
        folder = _new_folder(os.path.join('output', f'{name}-{time.strftime("%Y%m%d-%H%M%S")}'))
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, 'log.jsonl')
    results = glob.glob(os.path.join(glob.escape(folder), '*.pdparams'))
    results += [log] if os.path.exists(log) and os.path.getsize(log) else []
    goes_on = resume == 'auto' or (resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder))
    if results and not (is_evaluation or goes_on):
        raise UserError(f'{folder}: holds the results of another run ({os.path.basename(min(results))}); choose '
                        'another -output, go on with it by -resume auto, or remove it')
    return folder


@contextlib.contextmanager
def locked(folder):
    """Keep other trainings out of a folder while it is open: by a lock on its log.txt, which ends with the process.

    Network disks have such locks or say that they have none, which is logged.
    Raises: UserError when another training has it.
    """
    with open(os.path.join(folder, 'log.txt'), 'ab') as file:
        deadline = time.monotonic() + 2
        while True:
            try:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f'{folder}: another training is writing there; wait until it has ended, or choose '
                                    'another -output') from None
                time.sleep(0.1)  # the workers of one that was killed have it for a moment
            except (ImportError, OSError) as error:  # Windows has no fcntl
                reason = getattr(error, 'strerror', error)
                LOG.info(f'{folder}: cannot be locked ({reason}); see to it that one training uses it')
                break
        yield


def _new_folder(path):
    """Make a folder that was not there: `path`, or with -2, -3, ... appended, for runs that start together."""
    for number in itertools.count(1):
        try:
            folder = path if number == 1 else f'{path}-{number}'
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue


def differences(first, second):
    """Lines on the values that two dictionaries differ in, of the names in both."""
    return [f'{name} was {value!r} and is {second[name]!r}' for name, value in first.items()
            if name in second and second[name] != value]


def find_checkpoint(folder, resume):
    """(path, state) of the checkpoint that `resume` means, as in `prepare_folder`; None when there is none."""
    if not resume:
        return None
    if resume != 'auto':
        return resume, checkpoint.load_training(resume)
    found = checkpoint.find_newest(folder)
    if not found:
        LOG.info(f'{folder}: no checkpoint to resume, so the run starts afresh')
    return found


def put_aside(folder, last):
    """Append .past to the names of a folder's checkpoints that are past `last`, a `checkpoint.position`; say so."""
    past = [path for path, state in checkpoint.find_all(folder) if checkpoint.position(state) > last]
    for path in past:
        names = itertools.chain([f'{path}.past'], (f'{path}.past-{number}' for number in itertools.count(2)))
        new = next(name for name in names if not os.path.exists(name))
        os.replace(path, new)
        LOG.info(f'{path}: is past the checkpoint to resume; put aside as {new}')


def write_checkpoints(folder, state, save_freq, keep):
    """Write a state to the files that are due; latest.pdparams last, as the mark that the others are.

    After an epoch these are best.pdparams, if it was the best, and every save_freq epochs (0: never) epoch_N.pdparams,
    of which the newest `keep` stay.
    """
    epoch = state['epoch']
    if not state['progress']:
        if state['best']['epoch'] == epoch:
            checkpoint.save(state, os.path.join(folder, checkpoint.BEST))
        if save_freq and epoch % save_freq == 0:
            checkpoint.save(state, os.path.join(folder, f'epoch_{epoch}.pdparams'))
            prune(folder, keep)
    checkpoint.save(state, os.path.join(folder, checkpoint.LATEST))


def prune(folder, keep):
    """Remove all but the newest `keep` epoch_N.pdparams of a folder; 0 keeps all."""
    pattern = re.compile(r'epoch_(\d+)\.pdparams')
    epochs = {int(match[1]): path for path in glob.glob(os.path.join(glob.escape(folder), 'epoch_*.pdparams'))
              for match in [pattern.fullmatch(os.path.basename(path))] if match}
    for epoch in sorted(epochs)[:-keep] if keep else []:
        os.remove(epochs[epoch])


def path_beside(folder, name, is_evaluation):
    """The path of a run's file in a folder; with -eval in its name for an evaluation in the folder of a training."""
    stem, extension = os.path.splitext(name)
    config = pathlib.Path(folder, 'config.yaml')
    is_guest = is_evaluation and config.exists() and b'EVAL: true' not in config.read_bytes().splitlines()
    return os.path.join(folder, f'{stem}-eval{extension}' if is_guest else name)


def describe_start(paths):
    """What `recorded` is to keep of the start of a run, as values of JSON. paths: of its lists and weights."""
    device, versions = paddle.device.get_device(), {'python': platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if device.startswith('gpu'):
        device += f' ({paddle.device.cuda.get_device_name()})'
    return {'command': shlex.join([sys.executable, *sys.argv]), 'directory': os.getcwd(),
            'git': find_revision(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), 'versions': versions,
            'device': device, 'cores': usable_cores(), 'processes': world_size(),
            'sha256': {path: checkpoint.sha256(path) for path in paths}}


def find_revision(root):
    """{'revision': of a folder that is a git clone, 'clean': whether no file that git tracks is changed}.

    None where the folder is no clone, and where git is missing or fails.
    """
    # a git hook's name its own repository
    env = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}

    def git(*args):
        return subprocess.run(['git', '--no-optional-locks', '-C', root, *args], check=True, capture_output=True,
                              text=True, timeout=10, env=env).stdout.splitlines()
    try:
        top, revision = git('rev-parse', '--show-toplevel', 'HEAD')
        if not os.path.samefile(top, root):
            return None
        return {'revision': revision, 'clean': not git('status', '--porcelain', '--untracked-files=no')}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


@contextlib.contextmanager
def recorded(path, start):
    """Keep a record of this start of a run in the JSON list at `path`, newest last: `start`, pid, times, status, error.

    The status is running, and stays so if the process is killed; then finished, stopped (it was asked to) or failed.
    Raises: UserError for a file that is no such list, or cannot be written.
    """
    record = {**start, 'pid': os.getpid(), 'start': _now(), 'end': None, 'status': 'running', 'error': None}

    def write(**values):
        starts, before = _read_starts(path), dict(record)  # another run may have written meanwhile
        record.update(values)
        place = starts.index(before) if before in starts else len(starts)
        starts[place:place + 1] = [record]
        files.write_text(path, json.dumps(starts, indent=1) + '\n')
    write()
    try:
        yield
    except BaseException as error:
        is_exit = isinstance(error, SystemExit)
        stopped = isinstance(error, KeyboardInterrupt) or (is_exit and isinstance(error.code, int))
        line = str(error) if is_exit or isinstance(error, UserError) else describe_error(error)
        line = line.removeprefix(f'{program_name()}: error: ')
        with contextlib.suppress(UserError):  # a full disk may be what ends the run: that is the error to show
            write(end=_now(), status='stopped' if stopped else 'failed', error=None if stopped else line)
        raise
    write(end=_now(), status='finished')


def _now():
    return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def _read_starts(path):
    """The list of records at a path; empty where there is no file."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8') as file:
            starts = json.load(file)
    except ValueError:
        starts = None
    if not isinstance(starts, list):
        raise UserError(f'{path}: is no JSON list of the starts of a run; fix it, or move it away')
    return starts


class RunLog:
    """The records of a run, dictionaries with an 'epoch', as lines of its log.jsonl; of a process group, rank 0's."""

    def __init__(self, folder):
        self.path = os.path.join(folder, 'log.jsonl')

    def write(self, record):
        if rank() == 0:
            with naming(self.path), open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record, allow_nan=False) + '\n')

    def drop_after(self, epoch):
        """Keep the records up to an epoch, for a run that is resumed there; what is left of a broken line goes too."""
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding='utf-8', errors='replace') as file:
            lines = file.readlines()
        kept = [line for line in lines if _epoch_of(line) <= epoch]
        if kept != lines:
            files.write_text(self.path, ''.join(kept))
            LOG.info(f'{self.path}: dropped {len(lines) - len(kept)} records from epoch {epoch + 1} on')


def _epoch_of(line):
    """The epoch of a record's line; beyond all epochs for what is no whole record."""
    try:
        return int(json.loads(line)['epoch']) if line.endswith('\n') else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def message_of_another_rank(folder):
    """The newest error in a folder's log.txt of another rank than 0, or where else to look for it."""
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8', errors='replace') as file:
        messages = re.findall(r' (rank [1-9]\d*: error: .*)', file.read())
    return messages[-1] if messages else 'its message is in its workerlog, on its machine'
