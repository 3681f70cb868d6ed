"""Configuration of MobileOne: defaults, YAML files, command-line flags and the checks that need several keys.

The order of precedence is: defaults below < files named in BASE < the YAML file < flags < `-opts`.
Nothing here imports Paddle, so a wrong command line is answered at once.
"""
import argparse
import ast
import collections
import copy
import difflib
import itertools
import math
import os
import re

import yaml
from yacs.config import CfgNode as CN

from utils import UserError, one_line, program_name

_C = CN()
# YAML files, relative to this one, that are merged before it
_C.BASE = ['']

_C.DATA = CN()
# images per step and device, training
_C.DATA.BATCH_SIZE = 32
# images per step and device, evaluation; 0: as BATCH_SIZE
_C.DATA.BATCH_SIZE_EVAL = 0
# folder that holds train_list.txt and val_list.txt; their paths are relative to it
_C.DATA.DATA_PATH = '/dataset/imagenet/'
# layout of the data set: imagenet2012 (list files)
_C.DATA.DATASET = 'imagenet2012'
# side of the square that the network sees, in pixels; in training, TRAIN.CURRICULUM's where there is one
_C.DATA.IMAGE_SIZE = 224
# channels that the network expects; images are read as RGB, so a run needs 3
_C.DATA.IMAGE_CHANNELS = 3
# evaluation resizes the shorter side to IMAGE_SIZE / CROP_PCT, then crops the centre
_C.DATA.CROP_PCT = 0.875
# resampling filter in training and evaluation: nearest, bilinear, bicubic or lanczos
_C.DATA.INTERPOLATION = 'bicubic'
# smallest and largest share of the image's area that a random crop in training covers
_C.DATA.CROP_SCALE = [0.08, 1.0]
# turn images as their EXIF data say, as viewers do; ImageNet models are trained on images as they are stored
_C.DATA.EXIF_TRANSPOSE = False
# processes that read images; 0: read in the main process
_C.DATA.NUM_WORKERS = 2
# mean per channel (R, G, B) of pixels in [0, 1]
_C.DATA.IMAGENET_MEAN = [0.485, 0.456, 0.406]
# their standard deviation per channel
_C.DATA.IMAGENET_STD = [0.229, 0.224, 0.225]

_C.MODEL = CN()
# the only architecture here: MobileOne
_C.MODEL.TYPE = 'MobileOne'
# label of the run's folder and of the log
_C.MODEL.NAME = 'mobileone_s0'
# weights to start from or to evaluate: a released .pdparams, a .safetensors of the same names, or a checkpoint of this
# project
_C.MODEL.PRETRAINED = ''
# checkpoint of this project to continue, before PRETRAINED; auto: the newest whole one in SAVE, if any
_C.MODEL.RESUME = ''
# labels go from 0 to this less one
_C.MODEL.NUM_CLASSES = 1000
# the five lists have an entry for the stem and for each of four stages of (depthwise 3x3, pointwise 1x1) pairs:
# pairs per stage; the stem is one dense 3x3 layer
_C.MODEL.NUM_BLOCKS = [1, 2, 8, 10, 1]
# base widths; a stage's width is int(CHANNELS * EXPANSIONS)
_C.MODEL.CHANNELS = [64, 64, 128, 256, 512]
# stride of the first block of each stage
_C.MODEL.STRIDES = [2, 2, 2, 2, 2]
# width multipliers
_C.MODEL.EXPANSIONS = [0.75, 0.75, 1.0, 1.0, 2.0]
# k, the parallel conv branches of a stage's layers; entry 0 has no effect: the stem always has one
_C.MODEL.NUM_BRANCHES = [4, 4, 4, 4, 4]
# evaluation: fuse the branches into plain convolutions after the weights are loaded
_C.MODEL.DEPLOY = False
# squeeze-and-excitation on the last half of stage 3's blocks and on all of stage 4's
_C.MODEL.USE_SE = False
# training on several GPUs: batch-norm statistics over the batches of all of them, not of each
_C.MODEL.SYNC_BN = False

# these defaults and configs/mobileone_s*.yaml are the paper's recipe; what no source that could be read confirms is
# marked so
_C.TRAIN = CN()
# epochs that count as done: the run starts with the next, at its place in the schedules
_C.TRAIN.LAST_EPOCH = 0
# epochs of the whole run, counted from 1
_C.TRAIN.NUM_EPOCHS = 300
# the lr rises linearly for this many epochs (not confirmed: MMPretrain's)
_C.TRAIN.WARMUP_EPOCHS = 5
# decay of weights with two or more dimensions, at the first step; none on batch norm and biases (not confirmed:
# MMPretrain's, for batch norm)
_C.TRAIN.WEIGHT_DECAY = 1e-4
# what it falls to, on a cosine over all steps, after the last one; -1: it stays as it is
_C.TRAIN.END_WEIGHT_DECAY = -1.0
# the lr after the warm-up
_C.TRAIN.BASE_LR = 0.1
# the lr of the warm-up's first step (not confirmed)
_C.TRAIN.WARMUP_START_LR = 0.0002
# the lr that the cosine reaches after the last step (not confirmed)
_C.TRAIN.END_LR = 0.0002
# total batch that the three lrs and MODEL_EMA_DECAY are meant for: with r = total batch / this, the lrs are
# multiplied by r, the EMA decay is raised to the power r; 0: neither
_C.TRAIN.LINEAR_SCALED_LR = 256
# largest L2 norm of all gradients together; larger ones are scaled down to it; 0: no clipping
_C.TRAIN.GRAD_CLIP = 0.0
# batches per device whose mean gradient makes one optimizer step
_C.TRAIN.ACCUM_ITER = 1
# evaluate and save an exponential moving average of the weights
_C.TRAIN.MODEL_EMA = True
# share of the old average kept at each optimizer step (ramped up over the first steps)
_C.TRAIN.MODEL_EMA_DECAY = 0.9995
# keep the average in main memory: saves device memory, costs a transfer per step
_C.TRAIN.MODEL_EMA_FORCE_CPU = False
# label smoothing of the training loss
_C.TRAIN.SMOOTHING = 0.1
# brightness, contrast and colour are multiplied by factors from 1 - this to 1 + this; 0: left as they are
_C.TRAIN.COLOR_JITTER = 0.0
# AutoAugment's ImageNet policy; the paper's for S2 to S4
_C.TRAIN.AUTO_AUGMENT = False
# RandAugment
_C.TRAIN.RAND_AUGMENT = False
# RandAugment: operations per image
_C.TRAIN.RAND_AUGMENT_LAYERS = 2
# RandAugment: their magnitude, from 0 to 10
_C.TRAIN.RAND_AUGMENT_MAGNITUDE = 9
# random erasing: probability that an image is erased
_C.TRAIN.RANDOM_ERASE_PROB = 0.0
# random erasing: what fills a box: const (the mean colour), rand (one random colour), pixel (noise)
_C.TRAIN.RANDOM_ERASE_MODE = 'pixel'
# random erasing: largest number of boxes in an image
_C.TRAIN.RANDOM_ERASE_COUNT = 1
# stages of training, as a list of {EPOCH, IMAGE_SIZE, AUTO_AUGMENT_STRENGTH}: from EPOCH on (the first is 1) images
# have sides of IMAGE_SIZE and AutoAugment this strength, from 0 to 1; []: DATA.IMAGE_SIZE and full strength throughout
_C.TRAIN.CURRICULUM = []
# mixup: share of an image in a mix is drawn from Beta(alpha, alpha); 0: no mixup
_C.TRAIN.MIXUP_ALPHA = 0.0
# CutMix: share of the image outside the pasted box, likewise; 0: no CutMix
_C.TRAIN.CUTMIX_ALPHA = 0.0
# CutMix: smallest and largest side of the box as shares of the image's, in place of CUTMIX_ALPHA; [0, 0]: not used
_C.TRAIN.CUTMIX_MINMAX = [0.0, 0.0]
# probability that a mix happens at all
_C.TRAIN.MIXUP_PROB = 1.0
# probability of CutMix rather than mixup where both are on
_C.TRAIN.MIXUP_SWITCH_PROB = 0.5
# what is drawn once: batch (all images alike), pair (image i and N - 1 - i alike), elem (each image its own)
_C.TRAIN.MIXUP_MODE = 'batch'

_C.TRAIN.DISTILLATION = CN()
# what the loss takes from a teacher: none (there is none), soft (its probabilities), hard (its best class)
_C.TRAIN.DISTILLATION.TYPE = 'none'
# YAML file of the teacher, any MobileOne
_C.TRAIN.DISTILLATION.TEACHER_CFG = ''
# its weights
_C.TRAIN.DISTILLATION.TEACHER_WEIGHTS = ''
# share of the teacher's loss; the rest is the loss on the labels
_C.TRAIN.DISTILLATION.ALPHA = 0.5
# temperature of soft distillation
_C.TRAIN.DISTILLATION.TAU = 1.0

_C.TRAIN.OPTIMIZER = CN()
# SGD or AdamW
_C.TRAIN.OPTIMIZER.NAME = 'SGD'
# SGD: momentum (the value is not confirmed: all ports use it)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9
# SGD: whether the momentum is Nesterov's (not confirmed)
_C.TRAIN.OPTIMIZER.NESTEROV = False
# AdamW: added to the root of the second moment
_C.TRAIN.OPTIMIZER.EPS = 1e-8
# AdamW: decay of the first and second moment
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]

# the run's folder; '': output/<MODEL.NAME>-<time>
_C.SAVE = ''
# epochs between epoch_N.pdparams files; 0: none (latest and best are always written)
_C.SAVE_FREQ = 10
# optimizer steps between saves of latest.pdparams within an epoch; 0: none, an epoch that is killed is trained again
_C.SAVE_FREQ_STEPS = 0
# how many epoch_N.pdparams stay, newest first; 0: all
_C.KEEP_CHECKPOINTS = 3
# steps between log lines
_C.REPORT_FREQ = 50
# epochs between evaluations (the last epoch is always evaluated)
_C.VALIDATE_FREQ = 1
# with the epoch and the index of an image, decides every random choice of a run
_C.SEED = 0
# evaluate MODEL.PRETRAINED and stop
_C.EVAL = False
# mixed precision in training and evaluation; no effect on a CPU
_C.AMP = False
# O1: convolutions and products in half precision; O2: all but batch norm, softmax and their like. Weights stay float32
_C.AMP_LEVEL = 'O1'
# float16 (with loss scaling) or bfloat16
_C.AMP_DTYPE = 'float16'

# keys of older YAML files whose feature was never there: False is ignored, anything else an error
_UNSUPPORTED = ('TRAIN.MULTI_SCALE_SAMPLER_DDP', 'TRAIN.RANDOM_ERASE_SPLIT')

# keys that make no difference to the weights that a run ends with (SAVE_FREQ_STEPS does to the batch-norm statistics of
# several processes, which a save averages)
UNRELATED = ('BASE', 'SAVE', 'SAVE_FREQ', 'SAVE_FREQ_STEPS', 'KEEP_CHECKPOINTS', 'REPORT_FREQ', 'VALIDATE_FREQ',
             'DATA.NUM_WORKERS', 'DATA.DATA_PATH', 'DATA.BATCH_SIZE_EVAL', 'MODEL.NAME', 'TRAIN.LAST_EPOCH')

# `null` of older YAML files, for the keys where "none" means something
_NULL = {
    'DATA.BATCH_SIZE_EVAL': 0,
    'MODEL.PRETRAINED': '',
    'MODEL.RESUME': '',
    'TRAIN.GRAD_CLIP': 0.0,
    'TRAIN.CURRICULUM': [],
    'TRAIN.CUTMIX_MINMAX': [0.0, 0.0],
    'TRAIN.LINEAR_SCALED_LR': 0,
    'TRAIN.END_WEIGHT_DECAY': -1.0,
    'SAVE': '',
}

# inclusive bounds of every number, and of each one in a list. The upper ones are beyond all use: they stand before the
# end of memory or of a number's type
_RANGE = {
    'DATA.BATCH_SIZE': (1, 65536),
    'DATA.BATCH_SIZE_EVAL': (0, 65536),
    'DATA.IMAGE_SIZE': (1, 4096),
    'DATA.IMAGE_CHANNELS': (1, 1024),
    'DATA.CROP_PCT': (0.01, 1),
    'DATA.CROP_SCALE': (1e-4, 1),
    'DATA.NUM_WORKERS': (0, 512),
    # of pixels in [0, 1]: means of 0 to 255 are refused
    'DATA.IMAGENET_MEAN': (-10, 10),
    'DATA.IMAGENET_STD': (1e-6, 10),
    'MODEL.NUM_CLASSES': (1, 10 ** 6),
    'MODEL.NUM_BLOCKS': (1, 256),
    'MODEL.CHANNELS': (1, 8192),
    'MODEL.STRIDES': (1, 64),
    'MODEL.EXPANSIONS': (0.001, 64),
    'MODEL.NUM_BRANCHES': (0, 64),
    'TRAIN.LAST_EPOCH': (0, 10 ** 5),
    'TRAIN.NUM_EPOCHS': (1, 10 ** 5),
    'TRAIN.WARMUP_EPOCHS': (0, 10 ** 5),
    'TRAIN.WEIGHT_DECAY': (0, 10),
    'TRAIN.END_WEIGHT_DECAY': (-1, 10),
    'TRAIN.BASE_LR': (0, 1000),
    'TRAIN.WARMUP_START_LR': (0, 1000),
    'TRAIN.END_LR': (0, 1000),
    'TRAIN.LINEAR_SCALED_LR': (0, 10 ** 7),
    'TRAIN.GRAD_CLIP': (0, 10 ** 9),
    'TRAIN.ACCUM_ITER': (1, 10 ** 5),
    'TRAIN.MODEL_EMA_DECAY': (0, 1),
    'TRAIN.SMOOTHING': (0, 1),
    'TRAIN.COLOR_JITTER': (0, 1),
    'TRAIN.RAND_AUGMENT_LAYERS': (1, 100),
    'TRAIN.RAND_AUGMENT_MAGNITUDE': (0, 10),
    'TRAIN.RANDOM_ERASE_PROB': (0, 1),
    'TRAIN.RANDOM_ERASE_COUNT': (1, 100),
    'TRAIN.CURRICULUM.EPOCH': (1, 10 ** 5),
    'TRAIN.CURRICULUM.IMAGE_SIZE': (1, 4096),
    'TRAIN.CURRICULUM.AUTO_AUGMENT_STRENGTH': (0, 1),
    'TRAIN.MIXUP_ALPHA': (0, 1000),
    'TRAIN.CUTMIX_ALPHA': (0, 1000),
    'TRAIN.CUTMIX_MINMAX': (0, 1),
    'TRAIN.MIXUP_PROB': (0, 1),
    'TRAIN.MIXUP_SWITCH_PROB': (0, 1),
    'TRAIN.DISTILLATION.ALPHA': (0, 1),
    'TRAIN.DISTILLATION.TAU': (0.01, 1000),
    'TRAIN.OPTIMIZER.MOMENTUM': (0, 0.9999),
    # above 0, for a weight without a gradient is divided by it
    'TRAIN.OPTIMIZER.EPS': (1e-20, 1),
    'TRAIN.OPTIMIZER.BETAS': (0, 0.999999),
    'SAVE_FREQ': (0, 10 ** 9),
    'SAVE_FREQ_STEPS': (0, 10 ** 9),
    'KEEP_CHECKPOINTS': (0, 10 ** 9),
    'REPORT_FREQ': (1, 10 ** 9),
    'VALIDATE_FREQ': (1, 10 ** 9),
    'SEED': (0, 2 ** 32 - 1),
}

# the widest stage, and the longest side to which evaluation resizes the shorter side of an image
_MAX_WIDTH, _MAX_RESIZE = 8192, 8192

# characters of a config file, its aliases written out
_MAX_FILE = 100_000

# what a string may be, compared without regard to case
_CHOICES = {
    'DATA.DATASET': ['imagenet2012'],
    'DATA.INTERPOLATION': ['nearest', 'bilinear', 'bicubic', 'lanczos'],
    'MODEL.TYPE': ['MobileOne'],
    'TRAIN.OPTIMIZER.NAME': ['SGD', 'AdamW'],
    'TRAIN.MIXUP_MODE': ['batch', 'pair', 'elem'],
    'TRAIN.RANDOM_ERASE_MODE': ['const', 'rand', 'pixel'],
    'TRAIN.DISTILLATION.TYPE': ['none', 'soft', 'hard'],
    'AMP_LEVEL': ['O1', 'O2'],
    'AMP_DTYPE': ['float16', 'bfloat16'],
}

# how many entries a list has
_LENGTH = {
    'DATA.CROP_SCALE': 2,
    'DATA.IMAGENET_MEAN': 3,
    'DATA.IMAGENET_STD': 3,
    'TRAIN.OPTIMIZER.BETAS': 2,
    'TRAIN.CUTMIX_MINMAX': 2,
}


def leaves(node, prefix=''):
    """Yield (dotted name, value) of every key below a config node."""
    for name, value in node.items():
        if isinstance(value, CN):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


# the default of each key; for TRAIN.CURRICULUM, a stage to tell what is one
_DEFAULTS = {**dict(leaves(_C)),
             'TRAIN.CURRICULUM': [{'EPOCH': 1, 'IMAGE_SIZE': 160, 'AUTO_AUGMENT_STRENGTH': 0.3}]}
_SECTIONS = {key[:dot.start()] for key in _DEFAULTS for dot in re.finditer(r'\.', key)}


def _show(value):
    """A value as a message shows it, in one line."""
    try:
        return one_line(repr(value))
    except ValueError:  # Python writes out no more than some thousand digits
        return 'a number of too many digits'


def _coerce(value, default, key, source):
    """`value` as the type of `default`, or a UserError that names `key`.

    Text is read as a Python literal where a number, a list or a truth value is meant: PyYAML takes `1e-4` for
    text, and `-opts` has nothing else.
    """
    def fail():
        kind = f'a list of {type(default[0]).__name__}' if isinstance(default, list) else type(default).__name__
        return UserError(f'{source}: {key} is {_show(value)}, but must be {kind}, like {default!r}')

    if isinstance(default, str) and value is not None:
        if isinstance(value, (dict, list, tuple, set, bool)):
            raise fail()
        try:
            text = str(value)
        except ValueError:  # see _show
            raise fail() from None
        # what ends a line, or is no character
        if re.search('[\0\n\r\v\f\x1c-\x1e\x85\u2028\u2029\ud800-\udfff]', text):
            raise fail()
        return text
    if isinstance(value, str):
        literal = value.strip()
        try:
            value = ast.literal_eval({'true': 'True', 'false': 'False', 'null': 'None'}.get(literal.lower(), literal))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise fail() from None
    if value is None:
        if key in _NULL:
            return copy.copy(_NULL[key])
        raise fail()
    if isinstance(default, list):
        if not isinstance(value, (list, tuple)):
            raise fail()
        return [_coerce(item, default[0], f'{key}[{index}]', source) for index, item in enumerate(value)]
    if isinstance(default, dict):
        if not isinstance(value, dict) or set(value) != set(default):
            raise fail()
        return {name: _coerce(value[name], default[name], f'{key}.{name}', source) for name in default}
    if isinstance(default, bool) or isinstance(value, bool):
        if type(value) is not type(default):
            raise fail()
        return value
    if isinstance(default, float) and isinstance(value, (int, float)):
        try:
            value = float(value)
        except OverflowError:
            raise fail() from None
        if not math.isfinite(value):
            raise fail()
        return value
    if type(value) is not type(default):
        raise fail()
    return value


def _nearest_key(key):
    """The known key most like `key`, without regard to case; the last part counts most, for sections are mixed up."""
    def likeness(known):
        pairs = [(key, known), (key.rpartition('.')[2], known.rpartition('.')[2])]
        whole, last = (difflib.SequenceMatcher(None, a.upper(), b).ratio() for a, b in pairs)
        return last + 0.5 * whole
    return max(_DEFAULTS, key=likeness)


def _set(config, key, value, source):
    """Set one dotted key, checked against the defaults."""
    if key in _UNSUPPORTED:
        if value not in (False, 'False', 'false'):
            raise UserError(f'{source}: {key} is {_show(value)}, but is not supported: remove it')
        return
    if key == 'BASE':
        raise UserError(f'{source}: BASE is {_show(value)}, but takes effect only at the top of a YAML file')
    if key not in _DEFAULTS:
        key = one_line(key)
        raise UserError(f'{source}: unknown key {key}; the nearest known key is {_nearest_key(key)}')
    value = _coerce(value, _DEFAULTS[key], key, source)
    node = config
    *parents, leaf = key.split('.')
    for parent in parents:
        node = node[parent]
    node[leaf] = value


def _merge(config, tree, source, prefix=''):
    """Merge a dictionary read from YAML into config."""
    for name, value in tree.items():
        key = prefix + (name if isinstance(name, str) else _show(name))
        if key in _SECTIONS:
            value = {} if value is None else value
            if not isinstance(value, dict):
                raise UserError(f'{source}: {key} is {_show(value)}, but is a section: write its keys below it')
            _merge(config, value, source, f'{key}.')
        else:
            _set(config, key, value, source)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of two equal keys win without a word, and a few aliases of
    aliases take all memory.
    """

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and self._length(node, {}) > _MAX_FILE:
            raise yaml.YAMLError(f'its aliases stand for more than {_MAX_FILE:,} characters: write them out')
        return node

    def _length(self, node, lengths):
        """Characters of a node, those of its aliases included. lengths: of the nodes done, {id: characters}."""
        if isinstance(node, yaml.ScalarNode):
            return len(node.value) + 1
        if id(node) not in lengths:
            lengths[id(node)] = math.inf  # until it is done: a node inside itself has no end
            children = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
            lengths[id(node)] = 1 + sum(self._length(child, lengths) for child in children)
        return lengths[id(node)]

    def construct_mapping(self, node, deep=False):
        counts = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f'{key} stands there twice', node.start_mark)
        return super().construct_mapping(node, deep)


def _merge_file(config, path, parents=()):
    """Merge a YAML file into config, the files of its BASE first."""
    source = one_line(str(path))
    if os.path.realpath(path) in parents:
        raise UserError(f'{source}: BASE leads back to this file; remove the circle')
    try:
        if os.path.getsize(path) > _MAX_FILE:
            raise yaml.YAMLError(f'more than {_MAX_FILE:,} bytes')
        with open(path, encoding='utf-8') as file:
            tree = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise UserError(f'{source}: cannot read the config file ({error.strerror}); give one with -cfg') from None
    # PyYAML's own, and what else it raises, for values like the date 2022-02-30 or `!!int ""`
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = 'nested too deep' if isinstance(error, RecursionError) else one_line(str(error))
        raise UserError(f'{source}: not a YAML file ({reason}); mend it, or give another with -cfg') from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f'{source}: holds {_show(tree)}, but a config file is a mapping of keys to values')
    base = tree.pop('BASE', None) or []
    base = [base] if isinstance(base, str) else base
    if not isinstance(base, list) or not all(isinstance(name, str) and '\0' not in name for name in base):
        raise UserError(f'{source}: BASE is {_show(base)}, but must be a list of file names')
    for name in filter(None, base):
        _merge_file(config, os.path.join(os.path.dirname(path), name), (*parents, os.path.realpath(path)))
    _merge(config, tree, source)


def get_config(path=None):
    """The default config, merged with the YAML file at `path` if given.

    Returns: CfgNode, not frozen: edit it, then give it to `build_mobileone`.
    Raises: UserError for an unreadable file, an unknown key or a value of the wrong type.
    """
    config = _C.clone()
    if path:
        _merge_file(config, path)
    return config


# flag -> (key, placeholder, help); a flag takes its type from its key, a truth value takes no argument
_FLAGS = {
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
}


def update_config(config, args):
    """Merge parsed flags (those of `get_parser`; missing ones do not count) into config, in place; returns it.

    `-cfg` is merged first, `-opts` last. `-batch_size` sets the evaluation's batch too, unless
    `-batch_size_eval` is given. Values of 0 count.
    """
    config.defrost()
    if getattr(args, 'cfg', None):
        _merge_file(config, args.cfg)
    for flag, (key, _, _) in _FLAGS.items():
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            _set(config, key, value, f'-{flag}')
            if flag == 'batch_size':
                config.DATA.BATCH_SIZE_EVAL = config.DATA.BATCH_SIZE
    for pairs in getattr(args, 'opts', None) or []:
        if len(pairs) % 2:
            raise UserError(f'-opts: no value after {one_line(pairs[-1])}; give pairs KEY VALUE')
        for key, value in zip(pairs[::2], pairs[1::2]):
            _set(config, key, value, '-opts')
    return config


class ArgumentParser(argparse.ArgumentParser):
    """argparse with exact single-dash flags, values that may start with a minus, and errors of one line."""

    def __init__(self, **kwargs):
        super().__init__(prog=program_name(), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def _get_option_tuples(self, option_string):
        """No abbreviations: `allow_abbrev=False` spares only double-dash flags (Python 3.9 to 3.13)."""
        return []

    def _parse_optional(self, arg_string):
        """What starts with a minus and is a number or a list of numbers is a value, `-1e-5` too, never a flag."""
        try:
            float(arg_string.strip('[](),').split(',')[0])
            return None
        except ValueError:
            return super()._parse_optional(arg_string)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())} (-h explains)\n')


def get_parser(description, flags=tuple(_FLAGS)):
    """A parser of -cfg, -opts and the named flags, for `update_config`. description: str, shown by -h."""
    parser = ArgumentParser(description=description)
    parser.add_argument('-cfg', metavar='FILE', help='YAML config file, see configs/')
    for flag in flags:
        _, metavar, text = _FLAGS[flag]
        if metavar:
            parser.add_argument(f'-{flag}', metavar=metavar, help=text)
        else:
            parser.add_argument(f'-{flag}', action='store_true', help=text)
    parser.add_argument('-opts', metavar='KEY VALUE', nargs='*', action='append',
                        help='set any key of config.py, e.g. -opts TRAIN.BASE_LR 0.05 SEED 1 (repeatable)')
    return parser


def resolve_config(config):
    """A frozen copy of a config that a run can rely on: every value of its key's type, in its range, combinations too.

    BASE is emptied: the copy says everything about a run. Called before any file of the data set is opened.
    Raises: UserError that names key, value and remedy.
    """
    resolved = _C.clone()
    for key, value in leaves(config):
        if key != 'BASE':
            _set(resolved, key, value, 'config')
    for key, value in leaves(resolved):
        _check_value(key, value)
    _check_combinations(resolved)
    resolved.freeze()
    return resolved


def with_values(config, values):
    """A frozen copy of a config with other values. values: {dotted key: value}."""
    changed = config.clone()
    changed.defrost()
    for key, value in values.items():
        _set(changed, key, value, 'config')
    changed.freeze()
    return changed


def _check_value(key, value):
    if key in _CHOICES and value.lower() not in map(str.lower, _CHOICES[key]):
        raise UserError(f'{key} is {_show(value)}, but must be one of {", ".join(_CHOICES[key])}')
    if key in _LENGTH and len(value) != _LENGTH[key]:
        raise UserError(f'{key} is {_show(value)}, but must have {_LENGTH[key]} entries')
    _check_range(key, value, key)


def _check_range(key, value, name):
    """name: the key, with the index of an entry where the value is one of a list."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _check_range(key, item, f'{name}[{index}]')
    elif isinstance(value, dict):
        for part, item in value.items():
            _check_range(f'{key}.{part}', item, f'{name}.{part}')
    elif key in _RANGE:
        low, high = _RANGE[key]
        if not low <= value <= high:
            raise UserError(f'{name} is {_show(value)}, but must be between {low} and {high}')


def stage_widths(num_blocks, num_branches, channels, strides, expansions):
    """The widths of the five stages of a network. Raises: UserError for lists (MODEL.*) that do not describe one."""
    lists = {'NUM_BLOCKS': num_blocks, 'NUM_BRANCHES': num_branches, 'CHANNELS': channels, 'STRIDES': strides,
             'EXPANSIONS': expansions}
    for name, values in lists.items():
        counted = values[1:] if name == 'NUM_BRANCHES' else values  # the stem's has no effect
        if len(values) != 5 or min(counted) <= 0:
            raise UserError(f'MODEL.{name} is {_show(list(values))}, but must be five numbers above 0: stem, 4 stages')
    if num_blocks[0] != 1:
        raise UserError(f'MODEL.NUM_BLOCKS is {list(num_blocks)}, but the stem (entry 0) is one block')
    widths = [int(c * e) for c, e in zip(channels, expansions)]
    if not 1 <= min(widths) <= max(widths) <= _MAX_WIDTH:
        raise UserError(f'MODEL.CHANNELS {list(channels)} times MODEL.EXPANSIONS {list(expansions)} makes stages of '
                        f'the widths {widths}, but each must be between 1 and {_MAX_WIDTH}')
    return widths


def _check_combinations(config):
    data, model, train = config.DATA, config.MODEL, config.TRAIN
    stage_widths(model.NUM_BLOCKS, model.NUM_BRANCHES, model.CHANNELS, model.STRIDES, model.EXPANSIONS)
    if data.IMAGE_CHANNELS != 3:
        raise UserError(f'DATA.IMAGE_CHANNELS is {data.IMAGE_CHANNELS}, but images are read as RGB: a run needs 3')
    if data.CROP_SCALE[0] > data.CROP_SCALE[1]:
        raise UserError(f'DATA.CROP_SCALE is {data.CROP_SCALE}, but the smaller share comes first: swap them')
    if data.IMAGE_SIZE / data.CROP_PCT > _MAX_RESIZE:
        raise UserError(f'DATA.CROP_PCT is {data.CROP_PCT}, but DATA.IMAGE_SIZE {data.IMAGE_SIZE} divided by it, to '
                        f'which evaluation resizes images, must be at most {_MAX_RESIZE}')
    if config.EVAL:
        if not model.PRETRAINED:
            raise UserError("EVAL is True, but MODEL.PRETRAINED is '': without weights a random network would be "
                            'measured; give them with -pretrained')
        if model.RESUME:
            raise UserError(f'MODEL.RESUME is {_show(model.RESUME)}, but EVAL takes its weights from -pretrained: '
                            'leave it out')
        return
    if model.DEPLOY:
        raise UserError('MODEL.DEPLOY is True, but a fused network cannot be trained: add -eval or drop -deploy')
    if train.LAST_EPOCH >= train.NUM_EPOCHS:
        raise UserError(f'TRAIN.LAST_EPOCH is {train.LAST_EPOCH}, but must be below TRAIN.NUM_EPOCHS, '
                        f'{train.NUM_EPOCHS}: nothing is left to train')
    if -1 < train.END_WEIGHT_DECAY < 0:
        raise UserError(f'TRAIN.END_WEIGHT_DECAY is {train.END_WEIGHT_DECAY}, but must be at least 0, or -1: the decay '
                        'stays as it is')
    _check_stages(train)
    if train.AUTO_AUGMENT and train.RAND_AUGMENT:
        raise UserError('TRAIN.AUTO_AUGMENT and TRAIN.RAND_AUGMENT are both True: choose one')
    distillation = train.DISTILLATION
    if distillation.TYPE.lower() != 'none' and not (distillation.TEACHER_CFG and distillation.TEACHER_WEIGHTS):
        raise UserError(f'TRAIN.DISTILLATION.TYPE is {distillation.TYPE!r}, but there is no teacher: set TEACHER_CFG '
                        'and TEACHER_WEIGHTS')
    if train.WARMUP_EPOCHS >= train.NUM_EPOCHS:
        raise UserError(f'TRAIN.WARMUP_EPOCHS is {train.WARMUP_EPOCHS}, but must be below TRAIN.NUM_EPOCHS, '
                        f'{train.NUM_EPOCHS}')
    if model.RESUME == 'auto' and not config.SAVE:
        raise UserError("MODEL.RESUME is 'auto', the newest checkpoint of a folder: name the folder with -output")
    if train.CUTMIX_MINMAX[0] > train.CUTMIX_MINMAX[1]:
        raise UserError(f'TRAIN.CUTMIX_MINMAX is {train.CUTMIX_MINMAX}, but the smaller share comes first: swap them')
    if train.OPTIMIZER.NESTEROV and train.OPTIMIZER.MOMENTUM == 0:
        raise UserError('TRAIN.OPTIMIZER.NESTEROV is True, but TRAIN.OPTIMIZER.MOMENTUM is 0.0: raise it')


def _check_stages(train):
    """TRAIN.CURRICULUM: from epoch 1, in order."""
    for number, stage in enumerate(train.CURRICULUM):
        def fail(why, number=number, stage=stage):
            return UserError(f'TRAIN.CURRICULUM[{number}] is {_show(stage)}, but {why}')
        before = train.CURRICULUM[number - 1]['EPOCH'] if number else 0
        if number == 0 and stage['EPOCH'] != 1:
            raise fail('the first stage starts at EPOCH 1')
        if stage['EPOCH'] <= before:
            raise fail(f'the stage before starts at EPOCH {before}: order them')
        if stage['AUTO_AUGMENT_STRENGTH'] > 0 and not train.AUTO_AUGMENT:
            raise fail('TRAIN.AUTO_AUGMENT is False: turn it on, or set the strength to 0.0')
