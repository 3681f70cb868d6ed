"""What MobileOne can be told: the table of its keys, its flags, and the checks that need several keys.

How YAML files and flags are read is in runtime/settings.py. Nothing here imports Paddle.
"""
import copy

from runtime.settings import Key, Settings, leaves, refusal
from utils import UserError

KEYS = {
    # YAML files, relative to this one, that are merged before it
    'BASE': Key(['']),

    # images per step and device, training
    'DATA.BATCH_SIZE': Key(32, low=1),
    # images per step and device, evaluation; 0: as BATCH_SIZE
    'DATA.BATCH_SIZE_EVAL': Key(0, low=0, null=0),
    # folder that holds train_list.txt and val_list.txt; their paths are relative to it
    'DATA.DATA_PATH': Key('/dataset/imagenet/'),
    # layout of the data set: imagenet2012 (list files)
    'DATA.DATASET': Key('imagenet2012', choices=('imagenet2012',)),
    # side of the square that the network sees, in pixels; in training, TRAIN.CURRICULUM's where there is one
    'DATA.IMAGE_SIZE': Key(224, low=1),
    # channels that the network expects; images are read as RGB, so a run needs 3
    'DATA.IMAGE_CHANNELS': Key(3, low=1),
    # evaluation resizes the shorter side to IMAGE_SIZE / CROP_PCT, then crops the center
    'DATA.CROP_PCT': Key(0.875, low=0.01, high=1),
    # resampling filter in training and evaluation: nearest, bilinear, bicubic or lanczos. In training the fast backend
    # has bilinear and bicubic where it enlarges a crop, and filters that are close to both where it shrinks one
    'DATA.INTERPOLATION': Key('bicubic', choices=('nearest', 'bilinear', 'bicubic', 'lanczos')),
    # what reads JPEG files for training: pillow; fast, simplejpeg and OpenCV (pip install -r requirements-fast.txt);
    # auto, fast where it is installed. Crops and flips are the same, pixels differ a little. Evaluation is Pillow's
    'DATA.IMAGE_BACKEND': Key('auto', choices=('auto', 'pillow', 'fast')),
    # smallest and largest share of the image's area that a random crop in training covers
    'DATA.CROP_SCALE': Key([0.08, 1.0], low=1e-4, high=1, length=2),
    # turn images as their EXIF data say, as viewers do; ImageNet models are trained on images as they are stored
    'DATA.EXIF_TRANSPOSE': Key(False),
    # bits that gray pixels of more than 8 use, which are scaled from 0 to 2**BIT_DEPTH - 1; 0: as the file declares
    'DATA.BIT_DEPTH': Key(0, low=0, high=16),
    # data workers, processes that read images; 0: the training process reads them itself; -1: its share of the
    # machine's cores less one, but at least 1 and at most 8
    'DATA.NUM_WORKERS': Key(-1, low=-1),
    # seconds that a batch may take to come, of a dead network disk for example; 0: for ever
    'DATA.WORKER_TIMEOUT': Key(600, low=0),
    # mean per channel (R, G, B) of pixels in [0, 1]; the bounds catch means of pixels from 0 to 255
    'DATA.IMAGENET_MEAN': Key([0.485, 0.456, 0.406], low=-10, high=10, length=3),
    # their standard deviation per channel
    'DATA.IMAGENET_STD': Key([0.229, 0.224, 0.225], low=1e-6, high=10, length=3),

    # the only architecture here: MobileOne
    'MODEL.TYPE': Key('MobileOne', choices=('MobileOne',)),
    # label of the run's folder and of the log
    'MODEL.NAME': Key('mobileone_s0'),
    # weights to start from or to evaluate: a released .pdparams, a .safetensors of the same names, or a checkpoint of
    # this project
    'MODEL.PRETRAINED': Key('', null=''),
    # checkpoint of this project to continue, before PRETRAINED; auto: the newest whole one in SAVE, if any
    'MODEL.RESUME': Key('', null=''),
    # labels go from 0 to this less one; 0: as many as the weights have, where weights are evaluated or exported, and in
    # training as the class_names.txt of DATA_PATH has lines, or else as its lists have
    'MODEL.NUM_CLASSES': Key(1000, low=0),
    # the five lists have an entry for the stem and for each of four stages of (depthwise 3x3, pointwise 1x1) pairs:
    # pairs per stage; the stem is one dense 3x3 layer
    'MODEL.NUM_BLOCKS': Key([1, 2, 8, 10, 1], low=1),
    # base widths; a stage's width is int(CHANNELS * EXPANSIONS)
    'MODEL.CHANNELS': Key([64, 64, 128, 256, 512], low=1),
    # stride of the first block of each stage
    'MODEL.STRIDES': Key([2, 2, 2, 2, 2], low=1),
    # width multipliers
    'MODEL.EXPANSIONS': Key([0.75, 0.75, 1.0, 1.0, 2.0], low=0.001),
    # k, the parallel conv branches of a stage's layers; entry 0 has no effect: the stem always has one
    'MODEL.NUM_BRANCHES': Key([4, 4, 4, 4, 4], low=0),
    # evaluation: fuse the branches into plain convolutions after the weights are loaded
    'MODEL.DEPLOY': Key(False),
    # squeeze-and-excitation on the last half of stage 3's blocks and on all of stage 4's
    'MODEL.USE_SE': Key(False),
    # training on several GPUs: batch-norm statistics over the batches of all of them, not of each
    'MODEL.SYNC_BN': Key(False),

    # TRAIN: these defaults and configs/mobileone_s*.yaml are the paper's recipe; what no source that could be read
    # confirms is marked so

    # epochs of the whole run, counted from 1
    'TRAIN.NUM_EPOCHS': Key(300, low=1),
    # epochs that count as done: the run starts with the next, at its place in the schedules
    'TRAIN.LAST_EPOCH': Key(0, low=0),
    # what keeps its pretrained weights and batch-norm statistics: none, or the backbone, all but the classifier
    'TRAIN.FREEZE': Key('none', choices=('none', 'backbone')),
    # the lr rises linearly for this many epochs, at most all but the last (not confirmed: MMPretrain's)
    'TRAIN.WARMUP_EPOCHS': Key(5, low=0),
    # decay of weights with two or more dimensions, at the first step; none on batch norm and biases (not confirmed:
    # MMPretrain's, for batch norm)
    'TRAIN.WEIGHT_DECAY': Key(1e-4, low=0),
    # what it falls to, on a cosine over all steps, after the last one; -1: it stays as it is
    'TRAIN.END_WEIGHT_DECAY': Key(-1.0, low=-1, null=-1.0),
    # the lr after the warm-up
    'TRAIN.BASE_LR': Key(0.1, low=0),
    # the lr of the warm-up's first step (not confirmed)
    'TRAIN.WARMUP_START_LR': Key(0.0002, low=0),
    # the lr that the cosine reaches after the last step (not confirmed)
    'TRAIN.END_LR': Key(0.0002, low=0),
    # total batch that the three lrs and MODEL_EMA_DECAY are meant for: with r = total batch / this, the lrs are
    # multiplied by r, the EMA decay is raised to the power r; 0: neither
    'TRAIN.LINEAR_SCALED_LR': Key(256, low=0, null=0),
    # largest L2 norm of all gradients together; larger ones are scaled down to it; 0: no clipping
    'TRAIN.GRAD_CLIP': Key(0.0, low=0, null=0.0),
    # batches per device whose mean gradient makes one optimizer step
    'TRAIN.ACCUM_ITER': Key(1, low=1),
    # evaluate and save an exponential moving average of the weights
    'TRAIN.MODEL_EMA': Key(True),
    # share of the old average kept at each optimizer step (ramped up over the first steps)
    'TRAIN.MODEL_EMA_DECAY': Key(0.9995, low=0, high=1),
    # label smoothing of the training loss
    'TRAIN.SMOOTHING': Key(0.1, low=0, high=1),
    # brightness, contrast and color are multiplied by factors from 1 - this to 1 + this; 0: left as they are
    'TRAIN.COLOR_JITTER': Key(0.0, low=0, high=1),
    # AutoAugment's ImageNet policy; the paper's for S2 to S4
    'TRAIN.AUTO_AUGMENT': Key(False),
    # RandAugment
    'TRAIN.RAND_AUGMENT': Key(False),
    # RandAugment: operations per image
    'TRAIN.RAND_AUGMENT_LAYERS': Key(2, low=1),
    # RandAugment: their magnitude, from 0 to 10
    'TRAIN.RAND_AUGMENT_MAGNITUDE': Key(9, low=0, high=10),
    # random erasing: probability that an image is erased
    'TRAIN.RANDOM_ERASE_PROB': Key(0.0, low=0, high=1),
    # random erasing: what fills a box: const (the mean color), rand (one random color), pixel (noise)
    'TRAIN.RANDOM_ERASE_MODE': Key('pixel', choices=('const', 'rand', 'pixel')),
    # random erasing: largest number of boxes in an image
    'TRAIN.RANDOM_ERASE_COUNT': Key(1, low=1),
    # stages of training, as a list of {EPOCH, IMAGE_SIZE, AUTO_AUGMENT_STRENGTH}: from EPOCH on (the first is 1) images
    # have sides of IMAGE_SIZE and AutoAugment this strength, from 0 to 1; []: DATA.IMAGE_SIZE and full strength
    # throughout
    'TRAIN.CURRICULUM': Key([], null=[], fields={
        'EPOCH': Key(1, low=1), 'IMAGE_SIZE': Key(160, low=1), 'AUTO_AUGMENT_STRENGTH': Key(0.3, low=0, high=1)}),
    # mixup: share of an image in a mix is drawn from Beta(alpha, alpha); 0: no mixup
    'TRAIN.MIXUP_ALPHA': Key(0.0, low=0),
    # CutMix: share of the image outside the pasted box, likewise; 0: no CutMix
    'TRAIN.CUTMIX_ALPHA': Key(0.0, low=0),
    # CutMix: smallest and largest side of the box as shares of the image's, in place of CUTMIX_ALPHA; [0, 0]: not used
    'TRAIN.CUTMIX_MINMAX': Key([0.0, 0.0], low=0, high=1, length=2, null=[0.0, 0.0]),
    # probability that a mix happens at all
    'TRAIN.MIXUP_PROB': Key(1.0, low=0, high=1),
    # probability of CutMix rather than mixup where both are on
    'TRAIN.MIXUP_SWITCH_PROB': Key(0.5, low=0, high=1),
    # what is drawn once: batch (all images alike), pair (image i and N - 1 - i alike), elem (each image its own)
    'TRAIN.MIXUP_MODE': Key('batch', choices=('batch', 'pair', 'elem')),

    # what the loss takes from a teacher: none (there is none), soft (its probabilities), hard (its best class)
    'TRAIN.DISTILLATION.TYPE': Key('none', choices=('none', 'soft', 'hard')),
    # YAML file of the teacher, any MobileOne
    'TRAIN.DISTILLATION.TEACHER_CFG': Key(''),
    # its weights
    'TRAIN.DISTILLATION.TEACHER_WEIGHTS': Key(''),
    # share of the teacher's loss; the rest is the loss on the labels
    'TRAIN.DISTILLATION.ALPHA': Key(0.5, low=0, high=1),
    # temperature of soft distillation
    'TRAIN.DISTILLATION.TAU': Key(1.0, low=0.01),

    # SGD or AdamW
    'TRAIN.OPTIMIZER.NAME': Key('SGD', choices=('SGD', 'AdamW')),
    # SGD: momentum (the value is not confirmed: all ports use it)
    'TRAIN.OPTIMIZER.MOMENTUM': Key(0.9, low=0, high=0.9999),
    # SGD: whether the momentum is Nesterov's (not confirmed)
    'TRAIN.OPTIMIZER.NESTEROV': Key(False),
    # AdamW: added to the root of the second moment; above 0, for a weight without a gradient is divided by it
    'TRAIN.OPTIMIZER.EPS': Key(1e-8, low=1e-20),
    # AdamW: decay of the first and second moment
    'TRAIN.OPTIMIZER.BETAS': Key([0.9, 0.999], low=0, high=0.999999, length=2),

    # the run's folder; '': output/<MODEL.NAME>-<time>
    'SAVE': Key('', null=''),
    # epochs between epoch_N.pdparams files; 0: none (latest and best are always written)
    'SAVE_FREQ': Key(10, low=0),
    # optimizer steps between saves of latest.pdparams within an epoch; 0: none, a killed epoch is trained again
    'SAVE_FREQ_STEPS': Key(0, low=0),
    # how many epoch_N.pdparams stay, newest first; 0: all
    'KEEP_CHECKPOINTS': Key(3, low=0),
    # steps between log lines
    'REPORT_FREQ': Key(50, low=1),
    # epochs between evaluations (the last epoch is always evaluated)
    'VALIDATE_FREQ': Key(1, low=1),
    # with the epoch and the index of an image, decides every random choice of a run
    'SEED': Key(0, low=0, high=2 ** 32 - 1),
    # evaluate MODEL.PRETRAINED and stop
    'EVAL': Key(False),
    # folder that the report of an evaluation is written to; '': no report
    'REPORT': Key('', null=''),
    # mixed precision in training and evaluation; no effect on a CPU
    'AMP': Key(False),
    # O1: convolutions and products in half precision, what lies between follows, reductions do not; O2: they do.
    # Weights and loss stay float32
    'AMP_LEVEL': Key('O1', choices=('O1', 'O2')),
    # float16 (with loss scaling) or bfloat16
    'AMP_DTYPE': Key('float16', choices=('float16', 'bfloat16')),
}

# flag -> (key, placeholder, help); a flag takes its type from its key, a truth value takes no argument
FLAGS = {
    'dataset': ('DATA.DATASET', 'NAME', 'layout of the data set: imagenet2012'),
    'data_path': ('DATA.DATA_PATH', 'DIR', 'folder with train_list.txt and val_list.txt'),
    'output': ('SAVE', 'DIR', 'folder of the run (default: output/<MODEL.NAME>-<time>)'),
    'batch_size': ('DATA.BATCH_SIZE', 'N', 'images per step and device (sets -batch_size_eval too)'),
    'batch_size_eval': ('DATA.BATCH_SIZE_EVAL', 'N', 'images per step and device in evaluation'),
    'image_size': ('DATA.IMAGE_SIZE', 'N', 'side of the square that the network sees, in pixels; in training, '
                                           'TRAIN.CURRICULUM decides where there is one (S2 to S4)'),
    'pretrained': ('MODEL.PRETRAINED', 'FILE', 'weights to start from or to evaluate: a released .pdparams, a '
                                               '.safetensors, or a checkpoint of training'),
    'resume': ('MODEL.RESUME', 'FILE', 'checkpoint to continue; auto: the newest in -output, if there is one'),
    'accum_iter': ('TRAIN.ACCUM_ITER', 'N', 'batches per device that make one optimizer step'),
    'amp': ('AMP', None, 'mixed precision (AMP_LEVEL, AMP_DTYPE); no effect on a CPU'),
    'last_epoch': ('TRAIN.LAST_EPOCH', 'N', 'epochs that count as done; the run starts with the next'),
    'eval': ('EVAL', None, 'evaluate -pretrained on the val list, then stop'),
    'deploy': ('MODEL.DEPLOY', None, 'with -eval: fuse the branches after loading'),
    'report': ('REPORT', 'DIR', 'with -eval: write report.html (accuracy per class, confusion, calibration, the worst '
                                'images) and images.csv to this folder; needs matplotlib'),
}

# keys of older YAML files whose feature is not there: False is ignored, anything else an error
UNSUPPORTED = ('TRAIN.MODEL_EMA_FORCE_CPU', 'TRAIN.MULTI_SCALE_SAMPLER_DDP', 'TRAIN.RANDOM_ERASE_SPLIT')

# keys that make no difference to the weights that a run ends with (SAVE_FREQ_STEPS does to the batch-norm statistics of
# several processes, which a save averages)
UNRELATED = ('BASE', 'SAVE', 'SAVE_FREQ', 'SAVE_FREQ_STEPS', 'KEEP_CHECKPOINTS', 'REPORT_FREQ', 'VALIDATE_FREQ',
             'DATA.NUM_WORKERS', 'DATA.WORKER_TIMEOUT', 'DATA.DATA_PATH', 'DATA.BATCH_SIZE_EVAL', 'MODEL.NAME',
             'TRAIN.LAST_EPOCH', 'REPORT')

SETTINGS = Settings(KEYS, FLAGS, UNSUPPORTED)


def get_config(path=None):
    """The default config, merged with the YAML file at `path` if given.

    Returns: CfgNode, not frozen: edit it, then give it to `build_mobileone`.
    Raises: UserError for an unreadable file, an unknown key or a value of the wrong type.
    """
    config = SETTINGS.defaults()
    if path:
        SETTINGS.merge_file(config, path)
    return config


def update_config(config, args):
    """Merge parsed flags (those of `get_parser`; missing ones do not count) into config, in place; returns it.

    `-cfg` is merged first, `-opts` last. `-batch_size` sets the evaluation's batch too, unless `-batch_size_eval` is
    given. Values of 0 count.
    Raises: UserError as `get_config`, and for a key of -opts without a value.
    """
    batch_size = getattr(args, 'batch_size', None)
    if batch_size is not None and getattr(args, 'batch_size_eval', None) is None:
        args = copy.copy(args)
        args.batch_size_eval = batch_size
    SETTINGS.merge_args(config, args)
    return config


def get_parser(description, flags=tuple(FLAGS)):
    """A parser of -cfg, -opts and the named flags, for `update_config`. description: str, shown by -h."""
    return SETTINGS.parser(description, flags, 'TRAIN.BASE_LR 0.05 SEED 1')


def resolve_config(config):
    """A frozen copy of a config that a run can rely on: every value of its key's type, in its range, combinations too.

    BASE is emptied: the copy says everything about a run. Called before any file of the data set is opened.
    Raises: UserError that names key, value and remedy.
    """
    resolved = SETTINGS.checked(config)
    _check_combinations(resolved)
    return resolved


def get_teacher_config(config):
    """The config of TRAIN.DISTILLATION's teacher, to be loaded fused; None without one, and with EVAL.

    Raises: UserError for a config that cannot be read, and for a teacher that does not fit the student.
    """
    options = config.TRAIN.DISTILLATION
    if config.EVAL or options.TYPE.lower() == 'none':
        return None
    try:
        teacher = get_config(options.TEACHER_CFG)
        teacher = resolve_config(with_values(teacher, {
            'MODEL.PRETRAINED': options.TEACHER_WEIGHTS, 'MODEL.RESUME': '', 'MODEL.DEPLOY': True, 'EVAL': True,
            'MODEL.NUM_CLASSES': teacher.MODEL.NUM_CLASSES or config.MODEL.NUM_CLASSES}))
    except UserError as error:
        raise UserError(f'the teacher (TRAIN.DISTILLATION): {error}') from None
    for section, key in (('MODEL', 'NUM_CLASSES'), ('DATA', 'IMAGENET_MEAN'), ('DATA', 'IMAGENET_STD')):
        theirs, ours = teacher[section][key], config[section][key]
        if theirs != ours:
            raise UserError(f'{options.TEACHER_CFG}: {section}.{key} is {theirs} for the teacher, {ours} for the '
                            'student; make them equal: both see the same images and classes')
    return teacher


def changes(config):
    """{dotted key: value} of what a config says otherwise than the defaults."""
    defaults = dict(leaves(get_config()))
    return {key: value for key, value in leaves(config) if value != defaults[key]}


def with_values(config, values):
    """A frozen copy of a config with other values. values: {dotted key: value}.

    Raises: UserError for an unknown key or a value of the wrong type.
    """
    return SETTINGS.with_values(config, values)


def stage_widths(num_blocks, num_branches, channels, strides, expansions):
    """The widths of the five stages of a network. Raises: UserError for lists (MODEL.*) that do not describe one."""
    lists = {'NUM_BLOCKS': num_blocks, 'NUM_BRANCHES': num_branches, 'CHANNELS': channels, 'STRIDES': strides,
             'EXPANSIONS': expansions}
    for name, values in lists.items():
        counted = values[1:] if name == 'NUM_BRANCHES' else values  # the stem's has no effect
        if len(values) != 5 or min(counted) <= 0:
            raise refusal(f'MODEL.{name}', list(values), 'must be five numbers above 0: stem, 4 stages')
    if num_blocks[0] != 1:
        raise refusal('MODEL.NUM_BLOCKS', list(num_blocks), 'the stem (entry 0) is one block')
    widths = [int(c * e) for c, e in zip(channels, expansions)]
    if min(widths) < 1:
        raise UserError(f'MODEL.CHANNELS {list(channels)} times MODEL.EXPANSIONS {list(expansions)} makes stages of '
                        f'the widths {widths}, but each must be at least 1')
    return widths


def _check_combinations(config):
    data, model, train = config.DATA, config.MODEL, config.TRAIN
    stage_widths(model.NUM_BLOCKS, model.NUM_BRANCHES, model.CHANNELS, model.STRIDES, model.EXPANSIONS)
    if data.IMAGE_CHANNELS != 3:
        raise refusal('DATA.IMAGE_CHANNELS', data.IMAGE_CHANNELS, 'images are read as RGB: a run needs 3')
    _check_order('DATA.CROP_SCALE', data.CROP_SCALE)
    if config.EVAL:
        if not model.PRETRAINED:
            raise UserError("EVAL is True, but MODEL.PRETRAINED is '': without weights a random network would be "
                            'measured; give them with -pretrained')
        if model.RESUME:
            raise refusal('MODEL.RESUME', model.RESUME, 'EVAL takes its weights from -pretrained: leave it out')
        return
    if config.REPORT:
        raise refusal('REPORT', config.REPORT, 'a report is of an evaluation: add -eval or drop -report')
    if model.DEPLOY:
        raise refusal('MODEL.DEPLOY', True, 'a fused network cannot be trained: add -eval or drop -deploy')
    if train.LAST_EPOCH >= train.NUM_EPOCHS:
        raise refusal('TRAIN.LAST_EPOCH', train.LAST_EPOCH,
                      f'must be below TRAIN.NUM_EPOCHS, {train.NUM_EPOCHS}: nothing is left to train')
    if -1 < train.END_WEIGHT_DECAY < 0:
        raise refusal('TRAIN.END_WEIGHT_DECAY', train.END_WEIGHT_DECAY,
                      'must be at least 0, or -1: the decay stays as it is')
    _check_stages(train)
    if train.AUTO_AUGMENT and train.RAND_AUGMENT:
        raise UserError('TRAIN.AUTO_AUGMENT and TRAIN.RAND_AUGMENT are both True: choose one')
    distillation = train.DISTILLATION
    if distillation.TYPE.lower() != 'none' and not (distillation.TEACHER_CFG and distillation.TEACHER_WEIGHTS):
        raise refusal('TRAIN.DISTILLATION.TYPE', distillation.TYPE,
                      'there is no teacher: set TEACHER_CFG and TEACHER_WEIGHTS')
    if train.FREEZE.lower() != 'none' and not model.PRETRAINED and model.RESUME in ('', 'auto'):
        raise refusal('TRAIN.FREEZE', train.FREEZE, 'there are no weights to keep: give them with -pretrained')
    if model.RESUME == 'auto' and not config.SAVE:
        raise UserError("MODEL.RESUME is 'auto', the newest checkpoint of a folder: name the folder with -output")
    _check_order('TRAIN.CUTMIX_MINMAX', train.CUTMIX_MINMAX)
    if train.OPTIMIZER.NESTEROV and train.OPTIMIZER.MOMENTUM == 0:
        raise UserError('TRAIN.OPTIMIZER.NESTEROV is True, but TRAIN.OPTIMIZER.MOMENTUM is 0.0: raise it')


def _check_order(name, shares):
    if shares[0] > shares[1]:
        raise refusal(name, shares, 'the smaller share comes first: swap them')


def _check_stages(train):
    """TRAIN.CURRICULUM: from epoch 1, in order."""
    for number, stage in enumerate(train.CURRICULUM):
        name = f'TRAIN.CURRICULUM[{number}]'
        before = train.CURRICULUM[number - 1]['EPOCH'] if number else 0
        if number == 0 and stage['EPOCH'] != 1:
            raise refusal(name, stage, 'the first stage starts at EPOCH 1')
        if stage['EPOCH'] <= before:
            raise refusal(name, stage, f'the stage before starts at EPOCH {before}: order them')
        if stage['AUTO_AUGMENT_STRENGTH'] > 0 and not train.AUTO_AUGMENT:
            raise refusal(name, stage, 'TRAIN.AUTO_AUGMENT is False: turn it on, or set the strength to 0.0')
