"""MobileOne's settings: the table of keys with their defaults, the flags, and the checks that involve several keys.

The training recipe is the defaults here plus a variant's configs/mobileone_s*.yaml; `python -m tools.show_recipe`
prints it. YAML files and flags are parsed in runtime/settings.py. Nothing here imports Paddle.
"""
import copy

from runtime.settings import Key, Settings, invalid, leaves
from utils import UserError

KEYS = {
    # YAML files, relative to this one, that are merged before it
    'BASE': Key(['']),

    # training images per batch and device
    'DATA.BATCH_SIZE': Key(32, low=1),
    # evaluation images per batch and device; 0: same as BATCH_SIZE
    'DATA.BATCH_SIZE_EVAL': Key(0, low=0, null=0),
    # folder with train_list.txt and val_list.txt; the paths in them are relative to it
    'DATA.DATA_PATH': Key('/dataset/imagenet/'),
    # layout of the dataset: imagenet2012 (list files)
    'DATA.DATASET': Key('imagenet2012', choices=('imagenet2012',)),
    # side of the square input image in pixels; TRAIN.CURRICULUM, if set, overrides it in training
    'DATA.IMAGE_SIZE': Key(224, low=1),
    # input channels of the network; images are read as RGB, so a run needs 3
    'DATA.IMAGE_CHANNELS': Key(3, low=1),
    # evaluation resizes the shorter side to IMAGE_SIZE / CROP_PCT, then crops the center
    'DATA.CROP_PCT': Key(0.875, low=0.01, high=1),
    # resampling filter in training and evaluation: nearest, bilinear, bicubic or lanczos. In training, the fast backend
    # has bilinear and bicubic for enlarging a crop, and filters close to these two for shrinking one
    'DATA.INTERPOLATION': Key('bicubic', choices=('nearest', 'bilinear', 'bicubic', 'lanczos')),
    # decoder of JPEG files in training: pillow; fast (simplejpeg and OpenCV, pip install -r requirements-fast.txt);
    # auto (fast if installed). Crops and flips are the same, pixels differ slightly. Evaluation always uses Pillow
    'DATA.IMAGE_BACKEND': Key('auto', choices=('auto', 'pillow', 'fast')),
    # smallest and largest area of a random training crop, as fractions of the image area
    'DATA.CROP_SCALE': Key([0.08, 1.0], low=1e-4, high=1, length=2),
    # apply the EXIF rotation of images, as viewers do; ImageNet models are trained on images as stored
    'DATA.EXIF_TRANSPOSE': Key(False),
    # bits actually used in gray images with more than 8 bits per pixel: values are scaled from the range 0 to
    # 2**BIT_DEPTH - 1; 0: as the file declares
    'DATA.BIT_DEPTH': Key(0, low=0, high=16),
    # data workers (processes that read images); 0: the training process reads them itself; -1: its share of the
    # machine's cores minus one, but at least 1 and at most 8
    'DATA.NUM_WORKERS': Key(-1, low=-1),
    # seconds to wait for a batch (for example, on a dead network disk) before the run fails; 0: forever
    'DATA.WORKER_TIMEOUT': Key(600, low=0),
    # mean per channel (R, G, B) of pixels in [0, 1]; the bounds catch means of pixels from 0 to 255
    'DATA.IMAGENET_MEAN': Key([0.485, 0.456, 0.406], low=-10, high=10, length=3),
    # standard deviation per channel of pixels in [0, 1]
    'DATA.IMAGENET_STD': Key([0.229, 0.224, 0.225], low=1e-6, high=10, length=3),

    # architecture: only MobileOne
    'MODEL.TYPE': Key('MobileOne', choices=('MobileOne',)),
    # name of the model, used for the run's folder and in the log
    'MODEL.NAME': Key('mobileone_s0'),
    # weights to start from or to evaluate: a released .pdparams, a .safetensors with the same names, or a checkpoint of
    # this project
    'MODEL.PRETRAINED': Key('', null=''),
    # checkpoint of this project to resume, which takes precedence over PRETRAINED; auto: the newest complete one in
    # SAVE, if any
    'MODEL.RESUME': Key('', null=''),
    # labels are 0 to NUM_CLASSES - 1; 0: in evaluation and export, take the number from the weights; in training, from
    # the data: the lines of DATA_PATH's class_names.txt or, without one, the largest label in its lists + 1
    'MODEL.NUM_CLASSES': Key(1000, low=0),
    # the next five lists have one entry for the stem and one for each of the four stages

    # blocks, each a depthwise 3x3 and a pointwise 1x1 layer; the stem is a single dense 3x3 layer
    'MODEL.NUM_BLOCKS': Key([1, 2, 8, 10, 1], low=1),
    # base widths; a stage has int(CHANNELS * EXPANSIONS) channels
    'MODEL.CHANNELS': Key([64, 64, 128, 256, 512], low=1),
    # stride of the first block of each stage
    'MODEL.STRIDES': Key([2, 2, 2, 2, 2], low=1),
    # width multipliers
    'MODEL.EXPANSIONS': Key([0.75, 0.75, 1.0, 1.0, 2.0], low=0.001),
    # k, the number of parallel conv branches in each layer of a stage; entry 0 has no effect: the stem always has one
    'MODEL.NUM_BRANCHES': Key([4, 4, 4, 4, 4], low=0),
    # evaluation: fuse the branches into plain convolutions after loading the weights
    'MODEL.DEPLOY': Key(False),
    # squeeze-and-excitation in the last half of stage 3's blocks and in all of stage 4's
    'MODEL.USE_SE': Key(False),
    # training on several GPUs: compute batch-norm statistics over the batches of all GPUs instead of each GPU's own
    'MODEL.SYNC_BN': Key(False),

    # TRAIN: these defaults and configs/mobileone_s*.yaml are the paper's recipe. "not confirmed" marks values that no
    # available source confirms

    # epochs of the whole run, counted from 1
    'TRAIN.NUM_EPOCHS': Key(300, low=1),
    # number of epochs to count as done: the run starts with the next one, at its place in the schedules
    'TRAIN.LAST_EPOCH': Key(0, low=0),
    # layers that keep their pretrained weights and batch-norm statistics: none, or backbone (all but the classifier)
    'TRAIN.FREEZE': Key('none', choices=('none', 'backbone')),
    # epochs in which the lr rises linearly, at most NUM_EPOCHS - 1 (not confirmed: from MMPretrain)
    'TRAIN.WARMUP_EPOCHS': Key(5, low=0),
    # weight decay at the first step, for weights with two or more dimensions; batch norms and biases have none (not
    # confirmed: from MMPretrain, for batch norm)
    'TRAIN.WEIGHT_DECAY': Key(1e-4, low=0),
    # weight decay reached after the last step, on a cosine over all steps; -1: constant
    'TRAIN.END_WEIGHT_DECAY': Key(-1.0, low=-1, null=-1.0),
    # lr after the warm-up
    'TRAIN.BASE_LR': Key(0.1, low=0),
    # lr at the first step of the warm-up (not confirmed)
    'TRAIN.WARMUP_START_LR': Key(0.0002, low=0),
    # lr that the cosine reaches after the last step (not confirmed)
    'TRAIN.END_LR': Key(0.0002, low=0),
    # total batch that the three lrs and MODEL_EMA_DECAY are meant for: with r = total batch / this, the lrs are
    # multiplied by r and the EMA decay is raised to the power r; 0: no scaling
    'TRAIN.LINEAR_SCALED_LR': Key(256, low=0, null=0),
    # largest L2 norm of all gradients together; larger ones are scaled down to it; 0: no clipping
    'TRAIN.GRAD_CLIP': Key(0.0, low=0, null=0.0),
    # batches per device and optimizer step, which uses their mean gradient
    'TRAIN.ACCUM_ITER': Key(1, low=1),
    # evaluate and save an exponential moving average of the weights
    'TRAIN.MODEL_EMA': Key(True),
    # fraction of the old average kept at each optimizer step (ramped up over the first steps)
    'TRAIN.MODEL_EMA_DECAY': Key(0.9995, low=0, high=1),
    # label smoothing of the training loss
    'TRAIN.SMOOTHING': Key(0.1, low=0, high=1),
    # brightness, contrast and color are multiplied by factors from 1 - this to 1 + this; 0: no jitter
    'TRAIN.COLOR_JITTER': Key(0.0, low=0, high=1),
    # AutoAugment with its ImageNet policy; the paper uses it for S2 to S4
    'TRAIN.AUTO_AUGMENT': Key(False),
    # RandAugment
    'TRAIN.RAND_AUGMENT': Key(False),
    # RandAugment: operations per image
    'TRAIN.RAND_AUGMENT_LAYERS': Key(2, low=1),
    # RandAugment: magnitude of the operations, from 0 to 10
    'TRAIN.RAND_AUGMENT_MAGNITUDE': Key(9, low=0, high=10),
    # random erasing: probability per image
    'TRAIN.RANDOM_ERASE_PROB': Key(0.0, low=0, high=1),
    # random erasing: fill of a box: const (the mean color), rand (one random color), pixel (noise)
    'TRAIN.RANDOM_ERASE_MODE': Key('pixel', choices=('const', 'rand', 'pixel')),
    # random erasing: largest number of boxes per image
    'TRAIN.RANDOM_ERASE_COUNT': Key(1, low=1),
    # stages of training, a list of {EPOCH, IMAGE_SIZE, AUTO_AUGMENT_STRENGTH}: from EPOCH on (1 for the first stage),
    # images have sides of IMAGE_SIZE pixels and AutoAugment has this strength, from 0 to 1; []: DATA.IMAGE_SIZE and
    # full strength throughout
    'TRAIN.CURRICULUM': Key([], null=[], fields={
        'EPOCH': Key(1, low=1), 'IMAGE_SIZE': Key(160, low=1), 'AUTO_AUGMENT_STRENGTH': Key(0.3, low=0, high=1)}),
    # mixup: an image's share in the mix is drawn from Beta(alpha, alpha); 0: no mixup
    'TRAIN.MIXUP_ALPHA': Key(0.0, low=0),
    # CutMix: the share of the image outside the pasted box, likewise; 0: no CutMix
    'TRAIN.CUTMIX_ALPHA': Key(0.0, low=0),
    # CutMix: smallest and largest side of the box as fractions of the image side, instead of CUTMIX_ALPHA; [0, 0]: not
    # used
    'TRAIN.CUTMIX_MINMAX': Key([0.0, 0.0], low=0, high=1, length=2, null=[0.0, 0.0]),
    # probability of mixing at all
    'TRAIN.MIXUP_PROB': Key(1.0, low=0, high=1),
    # probability of CutMix instead of mixup when both are on
    'TRAIN.MIXUP_SWITCH_PROB': Key(0.5, low=0, high=1),
    # what shares one random draw: batch (all images), pair (images i and N - 1 - i), elem (nothing: one draw per image)
    'TRAIN.MIXUP_MODE': Key('batch', choices=('batch', 'pair', 'elem')),

    # what the loss takes from a teacher: none (no teacher), soft (its probabilities), hard (its top class)
    'TRAIN.DISTILLATION.TYPE': Key('none', choices=('none', 'soft', 'hard')),
    # YAML file of the teacher, any MobileOne
    'TRAIN.DISTILLATION.TEACHER_CFG': Key(''),
    # weights of the teacher
    'TRAIN.DISTILLATION.TEACHER_WEIGHTS': Key(''),
    # fraction of the loss that comes from the teacher; the rest is the loss on the labels
    'TRAIN.DISTILLATION.ALPHA': Key(0.5, low=0, high=1),
    # temperature of soft distillation
    'TRAIN.DISTILLATION.TAU': Key(1.0, low=0.01),

    # SGD or AdamW
    'TRAIN.OPTIMIZER.NAME': Key('SGD', choices=('SGD', 'AdamW')),
    # SGD: momentum (not confirmed, but used by all ports)
    'TRAIN.OPTIMIZER.MOMENTUM': Key(0.9, low=0, high=0.9999),
    # SGD: Nesterov momentum (not confirmed)
    'TRAIN.OPTIMIZER.NESTEROV': Key(False),
    # AdamW: added to the square root of the second moment before dividing by it; above 0, because the second moment of
    # a weight without a gradient is 0
    'TRAIN.OPTIMIZER.EPS': Key(1e-8, low=1e-20),
    # AdamW: decay rates of the first and second moment
    'TRAIN.OPTIMIZER.BETAS': Key([0.9, 0.999], low=0, high=0.999999, length=2),

    # folder of the run; '': output/<MODEL.NAME>-<time>
    'SAVE': Key('', null=''),
    # epochs between epoch_N.pdparams files; 0: none (latest and best are always written)
    'SAVE_FREQ': Key(10, low=0),
    # optimizer steps between saves of latest.pdparams within an epoch; 0: none, and a killed run repeats its epoch
    'SAVE_FREQ_STEPS': Key(0, low=0),
    # number of epoch_N.pdparams files to keep, newest first; 0: all
    'KEEP_CHECKPOINTS': Key(3, low=0),
    # steps between log lines
    'REPORT_FREQ': Key(50, low=1),
    # epochs between evaluations (the last epoch is always evaluated)
    'VALIDATE_FREQ': Key(1, low=1),
    # seed of every random choice, together with the epoch and the image (in mixup and erasing, the step and the rank)
    'SEED': Key(0, low=0, high=2 ** 32 - 1),
    # evaluate MODEL.PRETRAINED and stop
    'EVAL': Key(False),
    # folder for the report of an evaluation; '': no report
    'REPORT': Key('', null=''),
    # mixed precision in training and evaluation; no effect on a CPU
    'AMP': Key(False),
    # O1: convolutions and matrix products run in half precision, operations between them follow their inputs, and
    # reductions stay float32. O2: reductions follow their inputs too. Weights and loss are float32 at both
    'AMP_LEVEL': Key('O1', choices=('O1', 'O2')),
    # float16 (with loss scaling) or bfloat16
    'AMP_DTYPE': Key('float16', choices=('float16', 'bfloat16')),
}

# flag -> (key, placeholder, help); a flag has the type of its key, and a boolean flag takes no argument
FLAGS = {
    'dataset': ('DATA.DATASET', 'NAME', 'layout of the dataset: imagenet2012'),
    'data_path': ('DATA.DATA_PATH', 'DIR', 'folder with train_list.txt and val_list.txt'),
    'output': ('SAVE', 'DIR', 'folder of the run (default: output/<MODEL.NAME>-<time>)'),
    'batch_size': ('DATA.BATCH_SIZE', 'N', 'images per batch and device (also sets -batch_size_eval)'),
    'batch_size_eval': ('DATA.BATCH_SIZE_EVAL', 'N', 'images per batch and device in evaluation'),
    'image_size': ('DATA.IMAGE_SIZE', 'N', 'side length of the square input image in pixels; TRAIN.CURRICULUM, if '
                                           'set (S2 to S4), overrides it in training'),
    'pretrained': ('MODEL.PRETRAINED', 'FILE', 'weights to start from or to evaluate: a released .pdparams, a '
                                               '.safetensors, or a training checkpoint'),
    'resume': ('MODEL.RESUME', 'FILE', 'checkpoint to resume; auto: the newest one in -output, if any'),
    'accum_iter': ('TRAIN.ACCUM_ITER', 'N', 'batches per device in one optimizer step'),
    'amp': ('AMP', None, 'mixed precision (AMP_LEVEL, AMP_DTYPE); no effect on a CPU'),
    'last_epoch': ('TRAIN.LAST_EPOCH', 'N', 'number of epochs to count as done; the run starts with the next one'),
    'eval': ('EVAL', None, 'evaluate -pretrained on the val list, then stop'),
    'deploy': ('MODEL.DEPLOY', None, 'with -eval: fuse the branches after loading'),
    'report': ('REPORT', 'DIR', 'with -eval: write report.html (accuracy per class, confusion, calibration, worst '
                                'images) and images.csv to this folder; needs matplotlib'),
}

# keys of older YAML files whose features are not supported, with the values that are ignored; others are an error.
# MODEL_EMA_FORCE_CPU kept the EMA in the CPU's memory, which changes no result
UNSUPPORTED = {'TRAIN.MODEL_EMA_FORCE_CPU': ('true', 'false'), 'TRAIN.MULTI_SCALE_SAMPLER_DDP': ('false',),
               'TRAIN.RANDOM_ERASE_SPLIT': ('false',)}

# keys that do not affect the final weights of a run (SAVE_FREQ_STEPS only affects batch-norm statistics, and only with
# several processes, because a save averages them)
UNRELATED = ('BASE', 'SAVE', 'SAVE_FREQ', 'SAVE_FREQ_STEPS', 'KEEP_CHECKPOINTS', 'REPORT_FREQ', 'VALIDATE_FREQ',
             'DATA.NUM_WORKERS', 'DATA.WORKER_TIMEOUT', 'DATA.DATA_PATH', 'DATA.BATCH_SIZE_EVAL', 'MODEL.NAME',
             'TRAIN.LAST_EPOCH', 'REPORT')

SETTINGS = Settings(KEYS, FLAGS, UNSUPPORTED)


def get_config(path=None):
    """Return the default config, merged with the YAML file at `path` if given.

    Returns: CfgNode, not frozen: edit it, then pass it to `build_mobileone`.
    Raises: UserError for an unreadable file, an unknown key or a value of the wrong type. `resolve_config` checks more.
    """
    config = SETTINGS.defaults()
    if path:
        SETTINGS.merge_file(config, path)
    return config


def update_config(config, args):
    """Merge flags parsed by `get_parser` into config, in place; args may lack any of them. Returns: config.

    `-cfg` is merged first, `-opts` last. `-batch_size` also sets the evaluation batch size, unless `-batch_size_eval`
    is given. A flag with the value 0 counts as given.
    Raises: UserError like `get_config`, and for a key of -opts without a value.
    """
    batch_size = getattr(args, 'batch_size', None)
    if batch_size is not None and getattr(args, 'batch_size_eval', None) is None:
        args = copy.copy(args)
        args.batch_size_eval = batch_size
    SETTINGS.merge_args(config, args)
    return config


def get_parser(description, flags=tuple(FLAGS)):
    """Return a parser for -cfg, -opts and the named flags, for `update_config`. description: text that -h shows."""
    return SETTINGS.parser(description, flags, 'TRAIN.BASE_LR 0.05 SEED 1')


def resolve_config(config):
    """Return a frozen copy of a config after checking the type and range of each value, and all combinations.

    BASE is emptied, because the copy describes the whole run. Opens no file of the dataset.
    Raises: UserError that names the key, the value and the remedy.
    """
    resolved = SETTINGS.checked(config)
    _check_combinations(resolved)
    return resolved


def get_teacher_config(config):
    """Return the config of TRAIN.DISTILLATION's teacher, to be loaded fused; None without a teacher or with EVAL.

    Raises: UserError for a config that cannot be read, or a teacher that does not match the student.
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
    """Return {dotted key: value} for the values that differ from the defaults."""
    defaults = dict(leaves(get_config()))
    return {key: value for key, value in leaves(config) if value != defaults[key]}


def with_values(config, values):
    """Return a frozen copy of a config with some values replaced. values: {dotted key: value}.

    Raises: UserError for an unknown key or a value of the wrong type.
    """
    return SETTINGS.with_values(config, values)


def stage_widths(num_blocks, num_branches, channels, strides, expansions):
    """Return the widths of the five stages. Raises: UserError for lists (MODEL.*) that do not describe a network."""
    lists = {'NUM_BLOCKS': num_blocks, 'NUM_BRANCHES': num_branches, 'CHANNELS': channels, 'STRIDES': strides,
             'EXPANSIONS': expansions}
    for name, values in lists.items():
        counted = values[1:] if name == 'NUM_BRANCHES' else values  # the stem's entry has no effect
        if len(values) != 5 or min(counted) <= 0:
            raise invalid(f'MODEL.{name}', list(values), 'must be five numbers above 0, for the stem and 4 stages')
    if num_blocks[0] != 1:
        raise invalid('MODEL.NUM_BLOCKS', list(num_blocks), 'the stem (entry 0) is one block: set it to 1')
    widths = [int(c * e) for c, e in zip(channels, expansions)]
    if min(widths) < 1:
        raise UserError(f'MODEL.CHANNELS {list(channels)} times MODEL.EXPANSIONS {list(expansions)} gives stage widths '
                        f'{widths}, but each must be at least 1')
    return widths


def _check_combinations(config):
    data, model, train = config.DATA, config.MODEL, config.TRAIN
    stage_widths(model.NUM_BLOCKS, model.NUM_BRANCHES, model.CHANNELS, model.STRIDES, model.EXPANSIONS)
    if data.IMAGE_CHANNELS != 3:
        raise invalid('DATA.IMAGE_CHANNELS', data.IMAGE_CHANNELS, 'images are read as RGB: a run needs 3')
    _check_order('DATA.CROP_SCALE', data.CROP_SCALE)
    if config.EVAL:
        if not model.PRETRAINED:
            raise UserError("EVAL is True, but MODEL.PRETRAINED is '', so random weights would be evaluated: give "
                            'weights with -pretrained')
        if model.RESUME:
            raise invalid('MODEL.RESUME', model.RESUME, 'EVAL takes its weights from -pretrained: drop -resume')
        return
    if config.REPORT:
        raise invalid('REPORT', config.REPORT, 'only an evaluation writes a report: add -eval or drop -report')
    if model.DEPLOY:
        raise invalid('MODEL.DEPLOY', True, 'a fused network cannot be trained: add -eval or drop -deploy')
    if train.LAST_EPOCH >= train.NUM_EPOCHS:
        raise invalid('TRAIN.LAST_EPOCH', train.LAST_EPOCH,
                      f'must be below TRAIN.NUM_EPOCHS, {train.NUM_EPOCHS}: nothing is left to train')
    if -1 < train.END_WEIGHT_DECAY < 0:
        raise invalid('TRAIN.END_WEIGHT_DECAY', train.END_WEIGHT_DECAY,
                      'must be at least 0, or -1 for a constant decay')
    _check_stages(train)
    if train.AUTO_AUGMENT and train.RAND_AUGMENT:
        raise UserError('TRAIN.AUTO_AUGMENT and TRAIN.RAND_AUGMENT are both True: choose one')
    distillation = train.DISTILLATION
    if distillation.TYPE.lower() != 'none' and not (distillation.TEACHER_CFG and distillation.TEACHER_WEIGHTS):
        raise invalid('TRAIN.DISTILLATION.TYPE', distillation.TYPE,
                      'there is no teacher: set TEACHER_CFG and TEACHER_WEIGHTS')
    if train.FREEZE.lower() != 'none' and not model.PRETRAINED and model.RESUME in ('', 'auto'):
        raise invalid('TRAIN.FREEZE', train.FREEZE, 'there are no weights to keep: give them with -pretrained')
    if model.RESUME == 'auto' and not config.SAVE:
        raise UserError("MODEL.RESUME is 'auto', which takes the newest checkpoint of a folder: name the folder with "
                        '-output')
    _check_order('TRAIN.CUTMIX_MINMAX', train.CUTMIX_MINMAX)
    if train.OPTIMIZER.NESTEROV and train.OPTIMIZER.MOMENTUM == 0:
        raise UserError('TRAIN.OPTIMIZER.NESTEROV is True, but TRAIN.OPTIMIZER.MOMENTUM is 0.0: raise the momentum')


def _check_order(name, values):
    if values[0] > values[1]:
        raise invalid(name, values, 'the smaller value comes first: swap them')


def _check_stages(train):
    """Check that the stages of TRAIN.CURRICULUM start at epoch 1 and are in order."""
    for number, stage in enumerate(train.CURRICULUM):
        name = f'TRAIN.CURRICULUM[{number}]'
        before = train.CURRICULUM[number - 1]['EPOCH'] if number else 0
        if number == 0 and stage['EPOCH'] != 1:
            raise invalid(name, stage, 'the first stage starts at EPOCH 1')
        if stage['EPOCH'] <= before:
            raise invalid(name, stage, f'the previous stage starts at EPOCH {before}: sort the stages')
        if stage['AUTO_AUGMENT_STRENGTH'] > 0 and not train.AUTO_AUGMENT:
            raise invalid(name, stage, 'TRAIN.AUTO_AUGMENT is False: turn it on, or set the strength to 0.0')
