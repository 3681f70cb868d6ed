"""A run from start to finish: build, load or resume, train and evaluate the epochs, save. The entry point is `run`.

Where to look: the training step is engine.train_step, its schedules are optim.Schedule, the network and its fusion are
in mobileone.py, and the recipe is configs/*.yaml on top of the defaults in config.py.

With several processes only rank 0 writes files. Decisions (an error, the best epoch) depend only on values that are the
same on every rank.
"""
import contextlib
import functools
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from typing import Optional

import paddle
from yacs.config import CfgNode

import engine
import optim
from config import UNRELATED, changes, get_config, get_teacher_config, resolve_config, with_values
from datasets import count_classes, describe_curriculum, describe_dataset, get_dataloader, get_dataset, get_stage
from deploy import report
from images import describe_backend
from losses import DistillationLoss, LabelSmoothingCrossEntropyLoss, SoftTargetCrossEntropyLoss
from mixup import build_mixup
from mobileone import build_mobileone
from runtime import checkpoint, files, folder
from runtime.loader import StoppedWaiting, warn_of_waiting
from runtime.program import STOPPED, StopRequest
from runtime.settings import leaves
from transforms import Normalize, RandomErase
from utils import (
    LOG,
    UserError,
    check_agreement,
    describe_error,
    from_main,
    program_name,
    rank,
    setup_logger,
    world_size,
)
from weights import load_into, load_model, load_start, with_classes_of


def build_loader(config, is_train, epoch=1):
    """Return the loader for this rank's share of the training images (as in that epoch) or the validation images."""
    return get_dataloader(config, get_dataset(config, is_train, epoch), is_train, rank(), world_size())


def build_normalize(config):
    return Normalize(config.DATA.IMAGENET_MEAN, config.DATA.IMAGENET_STD)


def build_erase(train):
    """Return the RandomErase of a config's TRAIN section, or None if it is off."""
    if not train.RANDOM_ERASE_PROB:
        return None
    return RandomErase(train.RANDOM_ERASE_PROB, train.RANDOM_ERASE_MODE.lower(), train.RANDOM_ERASE_COUNT)


def build_criterion(config, has_mixup):
    """Return a DistillationLoss around the loss on the targets, with a fused teacher if the config has one."""
    criterion = SoftTargetCrossEntropyLoss() if has_mixup else LabelSmoothingCrossEntropyLoss(config.TRAIN.SMOOTHING)
    teacher_config, options = get_teacher_config(config), config.TRAIN.DISTILLATION
    if not teacher_config:
        return DistillationLoss(criterion)
    LOG.info(f'loading the teacher, {teacher_config.MODEL.NAME}:')
    teacher, _ = load_model(teacher_config, options.TEACHER_WEIGHTS)
    return DistillationLoss(criterion, teacher, options.TYPE.lower(), options.ALPHA, options.TAU)


def build_training(config, model, loader):
    """Return the Training for a model and a loader. The EMA starts from the model's current weights."""
    if config.MODEL.SYNC_BN and world_size() > 1:
        if not paddle.device.get_device().startswith('gpu'):
            raise UserError('MODEL.SYNC_BN is True, but PaddlePaddle synchronizes batch norms only on GPUs: set it to '
                            'False')
        model = paddle.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.TRAIN.FREEZE.lower() == 'backbone':
        model.freeze_backbone()
        LOG.info('TRAIN.FREEZE backbone: only the classifier is trained')
    ema = optim.ModelEma(model) if config.TRAIN.MODEL_EMA else None
    network = paddle.DataParallel(model) if world_size() > 1 else model
    optimizer = optim.build_optimizer(config, model)
    LOG.info(optim.describe_groups(model))
    schedule = optim.build_schedule(config, loader.batch_sampler)
    LOG.info(f'processes {world_size()} x DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} x TRAIN.ACCUM_ITER '
             f'{config.TRAIN.ACCUM_ITER}: {schedule}')
    if dropped := loader.batch_sampler.describe_dropped():
        LOG.info(dropped)
    mixup = build_mixup(config)
    return engine.Training(model, network, build_criterion(config, bool(mixup)), optimizer, schedule, ema,
                           build_normalize(config), build_erase(config.TRAIN), mixup, engine.Precision(config),
                           config.TRAIN.ACCUM_ITER, config.TRAIN.GRAD_CLIP, config.SEED)


@dataclass
class Run:
    """A training run and its progress."""
    config: CfgNode
    training: engine.Training
    # number of finished epochs
    done: int = 0
    # whether to evaluate the initial weights as a baseline, for a new classifier or a frozen backbone
    evaluates_start: bool = False
    # the finished part of the next epoch
    part: Optional[engine.EpochPart] = None
    # optimizer state of the resumed checkpoint: PaddlePaddle 2.6.2 does not return it before the first step
    resumed_optimizer: dict = field(default_factory=dict)
    # the best evaluation so far: of the EMA weights if the run has any
    best: dict = field(default_factory=lambda: {'acc1': -1.0, 'epoch': 0})
    # the newest checkpoint of this run, for messages, and the part of an epoch it contains
    last_checkpoint: str = ''
    saved_part: Optional[engine.EpochPart] = None
    stop: StopRequest = field(default_factory=StopRequest)

    def train(self, train_loader, val_loader):
        """Train, evaluate and save the remaining epochs. A stop request ends the program."""
        config = self.config
        if self.evaluates_start:
            metrics = self.evaluate([('raw', self.training.model)], val_loader)['raw']
            write_record(config, None, self.done, 'val', 'raw', metrics)
        stage = get_stage(config, 1)  # train_loader is that of epoch 1, also after a resume
        for epoch in range(self.done + 1, config.TRAIN.NUM_EPOCHS + 1):
            if stage != get_stage(config, epoch):
                stage = get_stage(config, epoch)
                train_loader = build_loader(config, True, epoch)
                LOG.info(f'epoch {epoch}: {stage.image_size}-pixel images, AutoAugment strength '
                         f'{stage.auto_augment_strength:g}')
            self.part = self.part or engine.EpochPart.none(epoch)
            train_loader.on_slow = functools.partial(warn_of_waiting, train_loader.num_workers)
            with self.interruptible(train_loader):
                metrics = engine.train_one_epoch(self.training, train_loader, self.part, config.REPORT_FREQ,
                                                 self.should_stop, self.after_step)
            write_record(config, self.training.schedule, epoch, 'train', 'raw', metrics)
            if is_validated(config, epoch):
                self.validate(val_loader, epoch)
            self.done, self.part = epoch, None
            self.save()

    def should_stop(self):
        """Whether this process was told to stop."""
        return bool(self.stop.name)

    @contextlib.contextmanager
    def interruptible(self, loader):
        """Context manager in which a stop request ends the program even while it waits for a batch.

        A single process saves first. One of several cannot, because the others may be waiting for it in the middle of
        a step: they all end, and the run resumes from the last checkpoint.
        """
        loader.should_stop = self.should_stop
        try:
            yield
        except StoppedWaiting:
            if world_size() == 1 and self.part and self.part.steps and self.part is not self.saved_part:
                self.save()
            self.end()
        except RuntimeError:
            # if all ranks were told to stop, waiting for one that has already ended fails
            if world_size() == 1 or not self.should_stop():
                raise
            self.end()

    def after_step(self, part, stopping):
        """Save if a save is due. If any rank was told to stop, save and end the program."""
        self.part = part
        steps, freq = self.done * self.training.schedule.steps_per_epoch + part.steps, self.config.SAVE_FREQ_STEPS
        if stopping or (freq and steps % freq == 0):
            self.save()
        if stopping:
            self.end()

    def evaluate(self, networks, loader):
        """Evaluate networks, [(name, network)]. Returns: {name: Metrics}. A stop request ends the program."""
        training = self.training
        with self.interruptible(loader):
            return engine.evaluate(networks, loader, training.normalize, self.config.REPORT_FREQ,
                                   training.precision.auto_cast, lambda: self.should_stop() and self.end())

    def validate(self, loader, epoch):
        """Evaluate and log the raw weights and the EMA. The EMA, if any, decides whether this epoch is the best so far.

        Saves first, because a rank that is told to stop during an evaluation ends without waiting for the others.
        """
        config, training = self.config, self.training
        self.save()
        networks = [('raw', training.model)] + ([('ema', training.ema.network)] if training.ema else [])
        results = self.evaluate(networks, loader)
        for name, metrics in results.items():
            write_record(config, training.schedule, epoch, 'val', name, metrics)
        metrics = results[networks[-1][0]]
        if metrics.acc1 > self.best['acc1']:
            self.best = {'acc1': metrics.acc1, 'epoch': epoch}
        # one every VALIDATE_FREQ epochs, and one after the last epoch
        later = -(-config.TRAIN.NUM_EPOCHS // config.VALIDATE_FREQ) - epoch // config.VALIDATE_FREQ
        training.evaluation_seconds = later * metrics.seconds

    def end(self):
        """End the program after a stop request, and log how to resume."""
        saved, does = 'nothing is saved yet', 'starts from scratch'
        if self.last_checkpoint:
            saved, does = f'{self.last_checkpoint} is saved', 'resumes from it'
        LOG.info(f'stopped by {self.stop.name or "a signal to another process"}; {saved}: the same command with '
                 f'-output {shlex.quote(self.config.SAVE)} -resume auto {does}')
        sys.exit(STOPPED)

    def save(self):
        """Write the current state to the checkpoint files that are due, at the end of an epoch or within one.

        Within an epoch, the batch-norm statistics are averaged over the ranks first.
        Raises: UserError, on every rank, for values that are not finite or a file that cannot be written.
        """
        config, training, schedule, part = self.config, self.training, self.training.schedule, self.part
        step, when, progress = self.done * schedule.steps_per_epoch, f'epoch {self.done}', {}
        if part:
            engine.average_statistics(training)
            step, when = step + part.steps, f'epoch {part.epoch}, step {part.steps}'
            progress = part.state(schedule)
            engine.check_finite(progress['sums'].sum(), f'the training loss in {when},')
        tensors = {
            'model': training.model.state_dict(),
            'model_ema': training.ema.network.state_dict() if training.ema else {},
            'optimizer': optim.optimizer_state(training.optimizer, training.model),
        }
        engine.check_tensors(tensors, f'a weight or optimizer value after {when}')
        tensors['optimizer'] = tensors['optimizer'] or self.resumed_optimizer
        state = {
            **tensors,
            'epoch': self.done,
            'step': step,
            'lr_scheduler': {'last_epoch': self.done, 'last_lr': schedule.lr(step - 1)},
            'amp_grad_scaler': training.precision.scaler.state_dict(),
            'best': self.best,
            'world_size': world_size(),
            'progress': progress,
        }
        # every rank waits here: none may end the run before the file is written
        from_main(lambda: folder.write_checkpoints(config.SAVE, checkpoint.to_arrays(state), config.SAVE_FREQ,
                                                   config.KEEP_CHECKPOINTS))
        self.last_checkpoint, self.saved_part = f'{os.path.join(config.SAVE, checkpoint.LATEST)} ({when})', part


def write_record(config, schedule, epoch, split, weights, metrics):
    """Log the Metrics of an epoch, with the lr and weight decay of its last step. schedule: None without training.

    Raises: NotFiniteError for a loss that is not finite: a run must neither continue nor save after that.
    """
    engine.check_finite(metrics.loss, f'the {split} loss with {weights} weights in epoch {epoch}')
    step = epoch * schedule.steps_per_epoch if schedule else 0
    size = get_stage(config, epoch).image_size if split == 'train' else config.DATA.IMAGE_SIZE
    folder.RunLog(config.SAVE).write({
        'epoch': epoch, 'step': step, 'split': split, 'weights': weights, **metrics.record(),
        'lr': schedule and schedule.lr(step - 1), 'weight_decay': schedule and schedule.weight_decay(step - 1),
        'image_size': size})
    when = '' if config.EVAL else f'epoch {epoch} '
    LOG.info(f'{when}{split} {weights}: {metrics.describe(config.MODEL.NUM_CLASSES)}')


def is_validated(config, epoch):
    """Whether an epoch (from 1) ends with an evaluation."""
    return epoch % config.VALIDATE_FREQ == 0 or epoch == config.TRAIN.NUM_EPOCHS


def start_run(config, loader):
    """Return a new Run, with random weights or those of MODEL.PRETRAINED."""
    path = config.MODEL.PRETRAINED
    model, has_new_classifier = load_start(config, path) if path else (build_mobileone(config), False)
    return Run(config, build_training(config, model, loader), config.TRAIN.LAST_EPOCH,
               has_new_classifier or config.TRAIN.FREEZE.lower() != 'none')


def resume_run(config, loader, path, state):
    """Return the Run that continues from a checkpoint. state: from `checkpoint.load_training`.

    Raises: UserError for a checkpoint of a different network or optimizer.
    """
    epoch, progress = state['epoch'], state['progress']
    if config.TRAIN.LAST_EPOCH > epoch:
        raise UserError(f'TRAIN.LAST_EPOCH is {config.TRAIN.LAST_EPOCH}, but {path} ends at epoch {epoch}: remove '
                        'TRAIN.LAST_EPOCH')
    training = build_training(config, build_mobileone(config), loader)
    schedule = training.schedule
    load_into(training.model, state['model'], path)
    if training.ema:
        load_into(training.ema.network, state['model_ema'] or state['model'], path)
    optim.load_optimizer_state(training.optimizer, training.model, state['optimizer'], path)
    if state['amp_grad_scaler']:
        training.precision.scaler.load_state_dict(state['amp_grad_scaler'])
    part = engine.EpochPart.resumed(epoch + 1, progress, schedule) if progress else None
    when = f'epoch {epoch}'
    if progress:
        when += f' and {progress["steps"]} of {progress["steps_per_epoch"]} steps of the next'
    LOG.info(f'resumed {path} after {when}, step {state["step"]}')
    if training.ema and not state['model_ema']:
        LOG.info('the checkpoint has no EMA: the average starts from its weights')
    if progress and not part:
        LOG.info(f'the checkpoint was saved within epoch {epoch + 1}, with {progress["total_batch"]} images per step '
                 f'and world size {state["world_size"]}; this run has {schedule.total_batch} and {world_size()}, so '
                 'that epoch starts over')
    step = epoch * schedule.steps_per_epoch + (part.steps if part else 0)
    for name, then, now in (('processes', state['world_size'], world_size()), ('steps', state['step'], step)):
        if then != now:
            LOG.info(f'{name}: {then} in the checkpoint, {now} in this run; resuming after epoch {epoch}, but the '
                     'result will not be bitwise identical')
    return Run(config, training, epoch, False, part, state['optimizer'], state['best'], f'{path} ({when})')


def save_config(config):
    """Write the config of a run to its folder; an evaluation does not overwrite a training run's config there.

    Also copies class_names.txt, for predictions, and logs the keys in which a resumed run differs from that config.
    """
    path = folder.path_beside(config.SAVE, 'config.yaml', config.EVAL)
    # these two keys describe this process, not the run
    saved = with_values(config, {'MODEL.RESUME': '', 'REPORT': ''})
    if config.MODEL.RESUME and os.path.exists(path):
        try:
            before = {key: value for key, value in leaves(get_config(path)) if key not in UNRELATED}
            for line in folder.differences(before, dict(leaves(saved))):
                LOG.info(f'differs from {path}, so the result will not be bitwise identical: {line}')
        except UserError as error:  # for example, a key of an earlier version
            LOG.info(f'cannot compare the saved config with this run: {error}')
    files.write_text(path, saved.dump(default_flow_style=None))
    source, target = (os.path.join(path, files.CLASS_NAMES) for path in (config.DATA.DATA_PATH, config.SAVE))
    if os.path.isfile(source) and not (config.EVAL and os.path.exists(target)):
        files.copy(source, target)


def restore_folder(run, resumed):
    """Save the config and, for a resumed run, restore the folder to its state at the checkpoint.

    resumed: (path, state) of the checkpoint; None if MODEL.RESUME found none.
    """
    config = run.config
    save_config(config)
    if not config.MODEL.RESUME:
        return
    folder.RunLog(config.SAVE).drop_after(run.done - run.evaluates_start)  # fine-tuning logs its baseline again
    if not resumed:
        return
    path, state = resumed
    if config.MODEL.PRETRAINED:
        LOG.info(f'{config.MODEL.PRETRAINED} is not used: the run resumes from {path}')
    if config.MODEL.RESUME != 'auto':  # 'auto' takes the newest, so none is further along
        folder.set_aside(config.SAVE, checkpoint.position(state))
    parent, name = os.path.split(os.path.realpath(path))
    if parent == os.path.realpath(config.SAVE) and name != checkpoint.LATEST:
        # the run may have ended before all files of a save were written
        folder.write_checkpoints(config.SAVE, state, config.SAVE_FREQ, config.KEEP_CHECKPOINTS)


def run_training(config, train_loader, val_loader):
    resumed = from_main(lambda: folder.find_checkpoint(config.SAVE, config.MODEL.RESUME))
    run = resume_run(config, train_loader, *resumed) if resumed else start_run(config, train_loader)
    # leave an earlier run's files alone until the checkpoint is known to fit
    from_main(lambda: restore_folder(run, resumed))
    if run.done >= config.TRAIN.NUM_EPOCHS:
        LOG.info(f'all {config.TRAIN.NUM_EPOCHS} epochs are done: nothing is left to train')
    try:
        with run.stop:
            run.train(train_loader, val_loader)
    except engine.NotFiniteError as error:
        raise UserError(f'{error}; last good checkpoint: '
                        f'{run.last_checkpoint or "none, because nothing is saved yet"}') from None
    path, best = os.path.join(config.SAVE, checkpoint.BEST), run.best
    LOG.info(f'best top-1 {best["acc1"]:.2f}% ({"EMA" if run.training.ema else "raw"} weights) at epoch '
             f'{best["epoch"]}: {path if os.path.exists(path) else "its file is not in this folder"}')


def run_evaluation(config, loader):
    from_main(lambda: save_config(config))
    class_names = from_main(lambda: prepare_report(config)) if config.REPORT else ()
    model, is_ema = load_model(config, config.MODEL.PRETRAINED)
    name = 'ema' if is_ema else 'raw'
    predictions = engine.Predictions(config.MODEL.NUM_CLASSES) if config.REPORT else None
    results = engine.evaluate([(name, model)], loader, build_normalize(config), config.REPORT_FREQ,
                              engine.Precision(config).auto_cast, predictions=predictions)
    write_record(config, None, 0, 'val', name, results[name])
    if config.REPORT:
        facts = {'weights': f'{config.MODEL.PRETRAINED} ({name})', 'list': loader.dataset.list_path,
                 'loss': f'{results[name].loss:.4f}'}
        report_evaluation(config, loader, class_names, predictions, facts)


def prepare_report(config):
    """Create the folder of a report and return the class names."""
    report.prepare_folder(config.REPORT)
    return report.find_names(config.DATA.DATA_PATH, config.MODEL.PRETRAINED, config.MODEL.NUM_CLASSES)


def report_evaluation(config, loader, class_names, predictions, facts):
    dataset = loader.dataset
    gathered = predictions.gather(loader.batch_sampler, len(dataset))
    outcome = report.Outcome(dataset.paths, dataset.labels, *gathered, config.MODEL.NUM_CLASSES, class_names)
    from_main(lambda: report.write_report(config.REPORT, config.MODEL.NAME, facts, outcome,
                                          lambda index: dataset.read(dataset.name_of(index))))
    LOG.info(f'report: {os.path.join(config.REPORT, "report.html")}')


def find_facts(config, loaders):
    """Return {name: value} that must be equal on all ranks. Paths may differ: a machine may have its own copies."""
    facts = {key: value for key, value in leaves(config) if key not in ('DATA.DATA_PATH', 'SAVE')}
    facts.update({f'the SHA-256 of {path}': checkpoint.sha256(path) for path in weight_files(config).values()})
    facts.update({f'images of {os.path.basename(loader.dataset.list_path)}': len(loader.dataset) for loader in loaders})
    return facts


def weight_files(config):
    """Return {key: path} of the weight files that a run starts from: its own and the teacher's, if any."""
    teacher = get_teacher_config(config)
    paths = {'MODEL.PRETRAINED': config.MODEL.PRETRAINED,
             'TRAIN.DISTILLATION.TEACHER_WEIGHTS': teacher and teacher.MODEL.PRETRAINED}
    return {key: path for key, path in paths.items() if path}


def with_num_classes(config):
    """Replace MODEL.NUM_CLASSES 0 with the number from the weights (with EVAL) or from the dataset.

    Returns: (config, the file that determined the number, or '' if it was not 0).
    Raises: UserError for a file that cannot be read.
    """
    if config.MODEL.NUM_CLASSES:
        return config, ''
    if config.EVAL:
        return with_classes_of(config, config.MODEL.PRETRAINED), config.MODEL.PRETRAINED
    number, path = count_classes(config.DATA.DATA_PATH)
    return with_values(config, {'MODEL.NUM_CLASSES': number}), path


def record_start(config, loaders):
    """Return the context manager that records this start of a run in run.json."""
    resume = [] if config.MODEL.RESUME in ('', 'auto') else [config.MODEL.RESUME]
    paths = [*(loader.dataset.list_path for loader in loaders), *weight_files(config).values(), *resume]
    return folder.recorded(folder.path_beside(config.SAVE, 'run.json', config.EVAL), folder.describe_start(paths))


def run(config):
    """Train, or evaluate with EVAL, on the current device, alone or as a member of the process group.

    Creates the run's folder (SAVE) with config.yaml, run.json, log.txt, log.jsonl and, in training, checkpoints.
    Raises: UserError for mistakes that the user can fix; OSError for a folder that cannot be written.
    """
    config = resolve_config(config)
    if config.REPORT:
        report.import_figure()  # reports need matplotlib: fail before the evaluation, not after it
    # read data and weights first, so that a wrong path leaves no folder behind
    config, source = with_num_classes(config)
    loaders = [build_loader(config, is_train) for is_train in ([False] if config.EVAL else [True, False])]
    for key, path in weight_files(config).items():
        checkpoint.check_exists(path, key)
    if not config.EVAL:
        optim.build_schedule(config, loaders[0].batch_sampler)  # checks it; all epochs have the same number of batches
    check_agreement(lambda: find_facts(config, loaders))
    config = with_values(config, {'SAVE': from_main(lambda: folder.prepare_folder(
        config.SAVE, config.MODEL.RESUME, config.MODEL.NAME, config.EVAL))})
    setup_logger(config.SAVE)
    with contextlib.ExitStack() as stack:
        if not config.EVAL:
            from_main(lambda: stack.enter_context(folder.locked(config.SAVE)))
        from_main(lambda: stack.enter_context(record_start(config, loaders)))
        _run_in_folder(config, loaders, source)


def _run_in_folder(config, loaders, source):
    """source: the file that determined MODEL.NUM_CLASSES, or ''."""
    LOG.info(f'PaddlePaddle {paddle.__version__} on {paddle.device.get_device()}, processes: {world_size()}, data '
             f'workers per process: {loaders[0].num_workers}, folder {config.SAVE}; its config.yaml lists all keys; '
             'these differ from the defaults:'
             + ''.join(f'\n  {key} {value}' for key, value in changes(config).items()))
    if source:
        LOG.info(f'MODEL.NUM_CLASSES {config.MODEL.NUM_CLASSES}, from {source}')
    for loader in loaders:
        LOG.info(describe_dataset(loader.dataset, config.MODEL.NUM_CLASSES, not config.EVAL))
    if not config.EVAL:
        LOG.info(describe_backend(config.DATA.IMAGE_BACKEND))
    if config.TRAIN.CURRICULUM and not config.EVAL:
        LOG.info(describe_curriculum(config))
    paddle.seed(config.SEED)
    try:
        (run_evaluation if config.EVAL else run_training)(config, *loaders)
    except UserError as error:
        LOG.error(f'error: {error}')  # for log.txt; run_program prints it to stderr
        raise
    except Exception as error:
        LOG.exception(f'error: {describe_error(error)}')
        if world_size() > 1 and re.search('gloo|nccl', str(error), re.IGNORECASE):
            sys.exit(f'{program_name()}: error: lost the connection to another process: '
                     f'{folder.message_of_another_rank(config.SAVE)}')
        raise
