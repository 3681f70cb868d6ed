"""The folder of a run: run.json, log.jsonl, the checkpoints, and the state to resume from."""
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

# run.json records the versions of these packages, where installed
PACKAGES = ('paddlepaddle', 'paddlepaddle-gpu', 'numpy', 'pillow', 'pyyaml', 'yacs', 'simplejpeg',
            'opencv-python-headless', 'opencv-python')


def prepare_folder(save, resume, name, is_evaluation):
    """Create the folder of a run if needed, and return its path.

    save: its path; if empty, the folder of the checkpoint to resume, or else a new folder below output/.
    resume: the checkpoint to resume, 'auto' for the newest one in `save`, or ''.
    name: prefix for the name of a new folder.
    Raises: UserError for a training run in a folder with the results of another run.
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
    continues = resume == 'auto' or (resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder))
    if results and not (is_evaluation or continues):
        raise UserError(f'{folder}: contains the results of another run ({os.path.basename(min(results))}); choose '
                        'another -output, continue that run with -resume auto, or remove the folder')
    return folder


@contextlib.contextmanager
def locked(folder):
    """Keep other training runs out of a folder with a lock on its log.txt; the system releases it with the process.

    Where the file system does not support locks, as some network disks do not, a line is logged instead.
    Raises: UserError if another training run holds the lock.
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
                    raise UserError(f'{folder}: another training run is writing here; wait until it ends, or choose '
                                    'another -output') from None
                time.sleep(0.1)  # the workers of a killed run hold it for a moment
            except (ImportError, OSError) as error:  # Windows has no fcntl
                reason = getattr(error, 'strerror', error)
                LOG.info(f'{folder}: cannot be locked ({reason}); make sure that only one training run uses it')
                break
        yield


def _new_folder(path):
    """Create a folder that did not exist: `path`, or `path`-2, -3, ... for runs that start at the same time."""
    for number in itertools.count(1):
        try:
            folder = path if number == 1 else f'{path}-{number}'
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue


def differences(first, second):
    """Describe, one line each, the values that differ between two dictionaries, for the names in both."""
    return [f'{name} was {value!r} and is now {second[name]!r}' for name, value in first.items()
            if name in second and second[name] != value]


def find_checkpoint(folder, resume):
    """Return (path, state) of the checkpoint to resume, or None. resume: as in `prepare_folder`."""
    if not resume:
        return None
    if resume != 'auto':
        return resume, checkpoint.load_training(resume)
    found = checkpoint.find_newest(folder)
    if not found:
        LOG.info(f'{folder}: no checkpoint to resume; starting from scratch')
    return found


def set_aside(folder, last):
    """Append .past to the names of checkpoints that are further along than `last`, a `checkpoint.position`."""
    past = [path for path, state in checkpoint.find_all(folder) if checkpoint.position(state) > last]
    for path in past:
        names = itertools.chain([f'{path}.past'], (f'{path}.past-{number}' for number in itertools.count(2)))
        new = next(name for name in names if not os.path.exists(name))
        os.replace(path, new)
        LOG.info(f'{path}: is further along than the checkpoint to resume; renamed to {new}')


def write_checkpoints(folder, state, save_freq, keep):
    """Write a state to each checkpoint file that is due; latest.pdparams comes last, to mark the others as complete.

    After an epoch, best.pdparams is due if the epoch was the best, and epoch_N.pdparams every save_freq epochs (0:
    never), of which the newest `keep` are kept.
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
    """Remove all but the newest `keep` epoch_N.pdparams files of a folder; 0 keeps all."""
    pattern = re.compile(r'epoch_(\d+)\.pdparams')
    epochs = {int(match[1]): path for path in glob.glob(os.path.join(glob.escape(folder), 'epoch_*.pdparams'))
              for match in [pattern.fullmatch(os.path.basename(path))] if match}
    for epoch in sorted(epochs)[:-keep] if keep else []:
        os.remove(epochs[epoch])


def path_beside(folder, name, is_evaluation):
    """Return the path of a run's file; an evaluation in the folder of a training run gets -eval in the name."""
    stem, extension = os.path.splitext(name)
    config = pathlib.Path(folder, 'config.yaml')
    is_guest = is_evaluation and config.exists() and b'EVAL: true' not in config.read_bytes().splitlines()
    return os.path.join(folder, f'{stem}-eval{extension}' if is_guest else name)


def describe_start(paths):
    """Describe the start of a run for `recorded`, as JSON values. paths: its list and weight files."""
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
    """Return {'revision': commit of a git clone, 'clean': whether no tracked file is modified}.

    None if the folder is not a clone, or if git is missing or fails.
    """
    # inside a git hook, GIT_* point to the hook's repository
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
    """Record this start of a run in the JSON list at `path`, newest last: `start`, pid, times, status, error.

    The status is running until the end, when it becomes finished, stopped (by a stop request) or failed. It stays
    running if the process is killed.
    Raises: UserError for a file that is not such a list or cannot be written.
    """
    record = {**start, 'pid': os.getpid(), 'start': _now(), 'end': None, 'status': 'running', 'error': None}

    def write(**values):
        starts, before = _read_starts(path), dict(record)  # another run may have written in the meantime
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
        with contextlib.suppress(UserError):  # if a full disk ended the run, that is the error to show
            write(end=_now(), status='stopped' if stopped else 'failed', error=None if stopped else line)
        raise
    write(end=_now(), status='finished')


def _now():
    return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def _read_starts(path):
    """Read the list of records at a path; empty if there is no file."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding='utf-8') as file:
            starts = json.load(file)
    except ValueError:
        starts = None
    if not isinstance(starts, list):
        raise UserError(f"{path}: not a JSON list of a run's starts; fix it, or move it away")
    return starts


class RunLog:
    """The records of a run, dictionaries with an 'epoch', as lines of its log.jsonl; only rank 0 writes."""

    def __init__(self, folder):
        self.path = os.path.join(folder, 'log.jsonl')

    def write(self, record):
        if rank() == 0:
            with naming(self.path), open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record, allow_nan=False) + '\n')

    def drop_after(self, epoch):
        """Drop the records after an epoch, for a run that resumes there, and any incomplete line."""
        if not os.path.exists(self.path):
            return
        with open(self.path, encoding='utf-8', errors='replace') as file:
            lines = file.readlines()
        kept = [line for line in lines if _epoch_of(line) <= epoch]
        if kept != lines:
            files.write_text(self.path, ''.join(kept))
            LOG.info(f'{self.path}: dropped {len(lines) - len(kept)} records from epoch {epoch + 1} on')


def _epoch_of(line):
    """Return the epoch of a record's line; infinity for anything that is not a complete record."""
    try:
        return int(json.loads(line)['epoch']) if line.endswith('\n') else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def message_of_another_rank(folder):
    """Return the newest error of a rank other than 0 from a folder's log.txt, or where to look for it."""
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8', errors='replace') as file:
        messages = re.findall(r' (rank [1-9]\d*: error: .*)', file.read())
    return messages[-1] if messages else 'its message is in its workerlog, on its machine'
