"""The folder of a run: config.yaml, log.jsonl, the checkpoints, and what of it a resumed run goes on from."""
import glob
import itertools
import json
import math
import os
import re
import time

from config import UNRELATED, get_config, leaves, with_values
from datasets import get_stage
from runtime import checkpoint
from utils import LOG, UserError, append_json, rank


def prepare_folder(config):
    """Make the folder of a run.

    A run without a SAVE gets the folder of the checkpoint that it resumes, or a new one below output/.
    Returns: the config, frozen, with the folder as SAVE.
    Raises: UserError for a training in a folder that holds the results of another run.
    """
    resume = config.MODEL.RESUME
    if resume != 'auto':
        checkpoint.check_exists(resume)
    folder = config.SAVE or (os.path.dirname(resume) or '.' if resume else '')
    if not folder:
        folder = _new_folder(os.path.join('output', f'{config.MODEL.NAME}-{time.strftime("%Y%m%d-%H%M%S")}'))
    os.makedirs(folder, exist_ok=True)
    log = os.path.join(folder, 'log.jsonl')
    results = glob.glob(os.path.join(glob.escape(folder), '*.pdparams'))
    results += [log] if os.path.exists(log) and os.path.getsize(log) else []
    goes_on = resume == 'auto' or (resume and os.path.realpath(os.path.dirname(resume)) == os.path.realpath(folder))
    if results and not (config.EVAL or goes_on):
        raise UserError(f'{folder}: holds the results of another run ({os.path.basename(min(results))}); choose '
                        'another -output, go on with it by -resume auto, or remove it')
    return with_values(config, {'SAVE': folder})


def _new_folder(path):
    """Make a folder that was not there: `path`, or with -2, -3, ... appended, for runs that start together."""
    for number in itertools.count(1):
        try:
            folder = path if number == 1 else f'{path}-{number}'
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue


def save_config(config):
    """Write the config of a run to its folder; an evaluation in the folder of a training does not replace that one's.

    Says in which keys the run differs from the one that it goes on with.
    """
    path = os.path.join(config.SAVE, 'config.yaml')
    if config.EVAL and os.path.exists(path):
        path = os.path.join(config.SAVE, 'config-eval.yaml')
    saved = with_values(config, {'MODEL.RESUME': ''})  # it says how this process began, not what the run is
    if config.MODEL.RESUME and os.path.exists(path):
        for line in config_differences(get_config(path), saved):
            LOG.info(f'not as in {path}, so the run does not go on bitwise as it would have: {line}')
    _write(path, saved.dump(default_flow_style=None))


def config_differences(first, second):
    """Lines on the keys that two configs differ in, but for those that make no difference to the weights."""
    values = dict(leaves(second))
    return [f'{key} was {value!r} and is {values[key]!r}' for key, value in leaves(first)
            if key not in UNRELATED and values[key] != value]


def find_checkpoint(config):
    """(path, state) of the checkpoint that MODEL.RESUME means; None when there is none."""
    path = config.MODEL.RESUME
    if not path:
        return None
    if path != 'auto':
        return path, checkpoint.load_training(path)
    found = checkpoint.find_newest(config.SAVE)
    if not found:
        LOG.info(f'{config.SAVE}: no checkpoint to resume, so the run starts afresh')
    return found


def take_over(config, resumed, epoch):
    """Make the folder what it was when the checkpoint of an epoch was written, for the run that goes on from there."""
    save_config(config)
    if not config.MODEL.RESUME:
        return
    RunLog(config).drop_after(epoch)
    if not resumed:
        return
    path, state = resumed
    if config.MODEL.PRETRAINED:
        LOG.info(f'{config.MODEL.PRETRAINED} is not used: the run goes on from {path}')
    if config.MODEL.RESUME != 'auto':  # which takes the newest: nothing is past it
        for old, new in checkpoint.put_aside(config.SAVE, checkpoint.position(state)):
            LOG.info(f'{old}: is past the checkpoint to resume; put aside as {new}')
    latest = os.path.realpath(os.path.join(config.SAVE, checkpoint.LATEST))
    path = os.path.realpath(path)
    if os.path.dirname(path) == os.path.realpath(config.SAVE) and path != latest:
        write_checkpoints(config, state)  # the run may have ended between the files of a save


def write_checkpoints(config, state):
    """Write a state to the files that are due; latest.pdparams last, as the mark that the others are.

    After an epoch these are best.pdparams, if it was the best, and at its epochs epoch_N.pdparams.
    """
    epoch = state['epoch']
    if state['best']['epoch'] == epoch and not state['progress']:
        checkpoint.save(state, os.path.join(config.SAVE, checkpoint.BEST))
    if config.SAVE_FREQ and epoch % config.SAVE_FREQ == 0 and not state['progress']:
        checkpoint.save(state, os.path.join(config.SAVE, f'epoch_{epoch}.pdparams'))
        checkpoint.prune(config.SAVE, config.KEEP_CHECKPOINTS)
    checkpoint.save(state, os.path.join(config.SAVE, checkpoint.LATEST))


def check_finite(value, what, last_checkpoint=''):
    """Raises: UserError unless a value is finite. what: the value's name; last_checkpoint: what the run has left."""
    if not math.isfinite(value):
        raise UserError(f'{what} is {value}: lower TRAIN.BASE_LR, or check MODEL.PRETRAINED and the labels; the last '
                        f'good checkpoint is {last_checkpoint or "none: no epoch was saved yet"}')


class RunLog:
    """Writes the records of a run's log.jsonl and says them; of a process group, on rank 0."""

    def __init__(self, config, schedule=None):
        self.path = os.path.join(config.SAVE, 'log.jsonl')
        self.config = config
        self.schedule = schedule

    def write(self, epoch, step, split, weights, metrics, last_checkpoint=''):
        """step: optimizer steps done so far; its learning rate and weight decay are those of the last one.

        Raises: UserError for a loss that is not finite: a run does not go on, nor save, from there.
        """
        check_finite(metrics.loss, f'the loss of {split} images with {weights} weights, epoch {epoch}', last_checkpoint)
        lr, weight_decay = None, None
        if self.schedule:
            lr, weight_decay = self.schedule.lr(step - 1), self.schedule.weight_decay(step - 1)
        size = get_stage(self.config, epoch).image_size if split == 'train' else self.config.DATA.IMAGE_SIZE
        if rank() == 0:
            append_json(self.path, {'epoch': epoch, 'step': step, 'split': split, 'weights': weights,
                                    **metrics.record(), 'lr': lr, 'weight_decay': weight_decay,
                                    'image_size': size})
        LOG.info(f'epoch {epoch} {split} {weights}: {metrics}')

    def drop_after(self, epoch):
        """Keep the records up to an epoch, for a run that is resumed there; what is left of a broken line goes too."""
        if rank() > 0 or not os.path.exists(self.path):
            return
        with open(self.path, encoding='utf-8', errors='replace') as file:
            lines = file.readlines()
        kept = [line for line in lines if _epoch_of(line) <= epoch]
        if kept != lines:
            checkpoint.replace(self.path, lambda path: _write(path, ''.join(kept)))
            LOG.info(f'{self.path}: dropped {len(lines) - len(kept)} records past epoch {epoch}')


def _epoch_of(line):
    """The epoch of a record's line; beyond all epochs for what is no whole record."""
    try:
        return int(json.loads(line)['epoch']) if line.endswith('\n') else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _write(path, text):
    with open(path, 'w', encoding='utf-8') as file:
        file.write(text)


def message_of_another_rank(folder):
    """The newest error in a folder's log.txt of another rank than 0, or where else to look for it."""
    with open(os.path.join(folder, 'log.txt'), encoding='utf-8', errors='replace') as file:
        messages = re.findall(r' (rank [1-9]\d*: error: .*)', file.read())
    return messages[-1] if messages else 'its message is in its workerlog, on its machine'
