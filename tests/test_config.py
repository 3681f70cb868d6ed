"""MobileOne's defaults, config files and flags, and the checks of their values."""
import math
import re
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, variant_config

from config import (
    KEYS,
    UNRELATED,
    changes,
    get_config,
    get_parser,
    get_teacher_config,
    resolve_config,
    stage_widths,
    update_config,
    with_values,
)
from utils import UserError


def parse(*argv):
    return update_config(get_config(), get_parser('test').parse_args(argv))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_every_key_has_a_comment_and_a_reader():
    code = '\n'.join(path.read_text() for pattern in ('*.py', 'runtime/*.py', 'tools/*.py')
                     for path in ROOT.glob(pattern) if path.name != 'config.py')
    table, functions = (ROOT / 'config.py').read_text().split('\nSETTINGS = ')
    code, lines = code + functions, table.splitlines()
    for key in KEYS:
        if key != 'BASE':
            reader = {'MODEL.NAME': 'config.MODEL.NAME', 'TRAIN.OPTIMIZER.NAME': 'options.NAME'}.get(
                key, f'.{key.rsplit(".")[-1]}')
            assert re.search(rf'{re.escape(reader)}\b', code), f'{key} has no reader'
        number, = [number for number, line in enumerate(lines) if line.startswith(f"    '{key}': Key(")]
        assert lines[number - 1].startswith('    # '), f'{key} has no comment'


def test_defaults_pass_their_own_checks():
    assert set(UNRELATED) < set(KEYS)
    for name, key in KEYS.items():
        assert key.read(key.default, name) == key.default and type(key.default) in (bool, int, float, str, list)
        key.check(key.default, name)
        if key.null is not None:
            assert key.read(None, name) == key.null == key.read(key.null, name)
            key.check(key.null, name)


@pytest.mark.parametrize('variant, expansions, branches, use_se', [
    ('s0', [.75, .75, 1, 1, 2], 4, False),
    ('s1', [1, 1.5, 1.5, 2, 2.5], 1, False),
    ('s2', [1, 1.5, 2, 2.5, 4], 1, False),
    ('s3', [1, 2, 2.5, 3, 4], 1, False),
    ('s4', [1, 3, 3.5, 3.5, 4], 1, True),
])
def test_variants(variant, expansions, branches, use_se):
    config = variant_config(variant)
    assert config.MODEL.NAME == f'mobileone_{variant}'
    assert config.MODEL.NUM_BLOCKS == [1, 2, 8, 10, 1]
    assert config.MODEL.CHANNELS == [64, 64, 128, 256, 512]
    assert config.MODEL.STRIDES == [2, 2, 2, 2, 2]
    assert config.MODEL.EXPANSIONS == expansions
    assert config.MODEL.NUM_BRANCHES[1:] == [branches] * 4
    assert config.MODEL.USE_SE is use_se
    assert (config.DATA.IMAGE_SIZE, config.DATA.CROP_PCT, config.DATA.INTERPOLATION) == (224, 0.875, 'bicubic')


def test_get_config_returns_an_editable_copy():
    config = get_config()
    config.MODEL.NUM_CLASSES = 7
    config.DATA.CROP_SCALE[0] = 0.5
    assert get_config().MODEL.NUM_CLASSES == 1000
    assert get_config().DATA.CROP_SCALE == [0.08, 1.0]


def test_saved_config_is_frozen_and_reads_back(tmp_path):
    config = resolve_config(get_config(str(ROOT / 'configs/demo.yaml')))
    with pytest.raises(AttributeError):
        config.SEED = 1
    path = write(tmp_path / 'config.yaml', config.dump(default_flow_style=None))
    assert get_config(path) == config
    assert yaml.safe_load((tmp_path / 'config.yaml').read_text())['MODEL']['NAME'] == 'demo'


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda path: path.name)
def test_every_config_is_valid_and_has_a_header(path):
    resolve_config(get_config(str(path)))
    header = path.read_text().split('\n\n')[0]
    assert header.startswith('#') and 'xpected result' in path.read_text()
    assert re.search(r'^#   ([A-Z_]+=\S+ )*(python|sh) ', path.read_text(), re.M)


def test_keys_of_older_files(tmp_path):
    """`null` for keys that accept "none", and keys of unsupported features."""
    config = get_config(write(tmp_path / 'x.yaml', '''
TRAIN:
  LINEAR_SCALED_LR: null
  GRAD_CLIP: null
  CUTMIX_MINMAX: None
  CURRICULUM: null
  END_WEIGHT_DECAY: null
  MULTI_SCALE_SAMPLER_DDP: False
  MODEL_EMA_FORCE_CPU: False
  RANDOM_ERASE_SPLIT: False
DATA:
  BATCH_SIZE_EVAL: null
MODEL:
  PRETRAINED: null
  RESUME: null
SAVE: null
'''))
    assert config == with_values(get_config(), {'TRAIN.LINEAR_SCALED_LR': 0})
    for key in ('MULTI_SCALE_SAMPLER_DDP', 'RANDOM_ERASE_SPLIT'):
        with pytest.raises(UserError, match=f'x.yaml: TRAIN.{key} is True, but is not supported: remove it'):
            get_config(write(tmp_path / 'x.yaml', f'TRAIN:\n  {key}: True\n'))


def test_values_of_paddlevits_configs(tmp_path):
    """Its five YAML files all keep the EMA on the CPU and train at 256 pixels."""
    config = get_config(write(tmp_path / 'x.yaml', '''
DATA: {IMAGE_SIZE: 256, CROP_PCT: 0.875}
TRAIN: {WARMUP_EPOCHS: 30, WARMUP_START_LR: 0.0002, END_LR: 0.0002, MODEL_EMA: True, MODEL_EMA_FORCE_CPU: True}
'''))
    resolve_config(config)
    assert config == with_values(get_config(), {'DATA.IMAGE_SIZE': 256, 'TRAIN.WARMUP_EPOCHS': 30,
                                                'TRAIN.WARMUP_START_LR': 0.0002, 'TRAIN.END_LR': 0.0002})


@pytest.mark.parametrize('text, message', [
    ('MODEL:\n  IMAGE_SIZE: 3\n', 'unknown key MODEL.IMAGE_SIZE; the nearest known key is DATA.IMAGE_SIZE$'),
    ('train:\n  base_lr: 1\n', 'unknown key train; the nearest known key is '),
    ('SEED: null\n', 'SEED is None, but must be int, like 0'),
    ('MODEL:\n  EXPANSIONS: [1, wide, 2, 3, 4]\n', r"MODEL.EXPANSIONS\[1\] is 'wide', but must be float"),
    ('TRAIN:\n  CURRICULUM: [{EPOCH: 1, IMAGE_SIZE: 8}]\n',
     r'TRAIN.CURRICULUM\[0\] is .*, but must be dict, like .*AUTO_AUGMENT_STRENGTH'),
])
def test_yaml_errors(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        get_config(write(tmp_path / 'x.yaml', text))
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_flags():
    config = parse('-cfg=' + str(ROOT / 'configs/mobileone_s4.yaml'), '-dataset=imagenet2012', '-data_path', 'a b',
                   '-output', 'out', '-batch_size', '16', '-image_size=160', '-pretrained', 'w.pdparams',
                   '-last_epoch', '3', '-eval', '-deploy', '-amp', '-accum_iter=4', '-resume', 'auto')
    assert config.AMP is True and config.TRAIN.ACCUM_ITER == 4 and config.MODEL.RESUME == 'auto'
    assert config.MODEL.USE_SE and config.EVAL and config.MODEL.DEPLOY
    assert (config.DATA.DATASET, config.DATA.DATA_PATH, config.SAVE) == ('imagenet2012', 'a b', 'out')
    assert (config.DATA.BATCH_SIZE, config.DATA.BATCH_SIZE_EVAL, config.DATA.IMAGE_SIZE) == (16, 16, 160)
    assert (config.MODEL.PRETRAINED, config.TRAIN.LAST_EPOCH) == ('w.pdparams', 3)
    assert parse('-batch_size', '16', '-batch_size_eval', '8').DATA.BATCH_SIZE_EVAL == 8


def test_flags_with_value_0_are_merged(tmp_path):
    config = get_config(write(tmp_path / 'x.yaml', 'TRAIN:\n  LAST_EPOCH: 5\n'))
    update_config(config, SimpleNamespace(last_epoch=0))  # as in a notebook, which sets a single flag
    assert config.TRAIN.LAST_EPOCH == 0
    with pytest.raises(UserError, match='DATA.BATCH_SIZE is 0'):
        resolve_config(parse('-batch_size', '0'))


@pytest.mark.parametrize('options, message', [
    ('DATA.CROP_PCT 1.5', 'DATA.CROP_PCT is 1.5, but must be between 0.01 and 1'),
    ('DATA.CROP_SCALE [0.5]', 'DATA.CROP_SCALE is .*2 entries'),
    ('DATA.CROP_SCALE [0.5,0.1]', 'smaller value comes first'),
    ('DATA.INTERPOLATION cubic', 'must be one of nearest, bilinear, bicubic, lanczos'),
    ('DATA.DATASET cifar10', 'DATA.DATASET'),
    ('DATA.IMAGE_CHANNELS 1', 'a run needs 3'),
    ('DATA.IMAGENET_STD [0.1,0.0,0.1]', 'DATA.IMAGENET_STD'),
    ('MODEL.TYPE ResNet', 'MODEL.TYPE'),
    ('MODEL.DEPLOY True', 'add -eval'),
    ('EVAL True', '-pretrained'),
    ('TRAIN.LAST_EPOCH 300', 'TRAIN.LAST_EPOCH is 300'),
    ('TRAIN.FREEZE all', "TRAIN.FREEZE is 'all', but must be one of none, backbone"),
    ('TRAIN.FREEZE backbone', "TRAIN.FREEZE is 'backbone', but there are no weights to keep: give them with -pretr"),
    ('TRAIN.FREEZE backbone MODEL.RESUME auto SAVE x', 'there are no weights to keep'),
    ('TRAIN.OPTIMIZER.NAME Adam', 'SGD, AdamW'),
    ('TRAIN.OPTIMIZER.NESTEROV True TRAIN.OPTIMIZER.MOMENTUM 0', 'NESTEROV'),
    ('TRAIN.OPTIMIZER.BETAS [1.0,0.9]', 'TRAIN.OPTIMIZER.BETAS'),
    ('TRAIN.SMOOTHING -0.1', 'TRAIN.SMOOTHING'),
    ('TRAIN.ACCUM_ITER 0', 'TRAIN.ACCUM_ITER is 0'),
    ('TRAIN.GRAD_CLIP -1', 'TRAIN.GRAD_CLIP is -1.0'),
    ('TRAIN.MIXUP_MODE half', 'must be one of batch, pair, elem'),
    ('TRAIN.MIXUP_PROB 2', 'TRAIN.MIXUP_PROB is 2.0'),
    ('TRAIN.CUTMIX_MINMAX [0.5,0.2]', 'TRAIN.CUTMIX_MINMAX is .* the smaller value comes first'),
    ('TRAIN.CUTMIX_MINMAX [0.5]', 'TRAIN.CUTMIX_MINMAX is .*2 entries'),
    ('TRAIN.END_WEIGHT_DECAY -2', 'TRAIN.END_WEIGHT_DECAY is -2.0'),
    ('TRAIN.COLOR_JITTER 1.5', 'TRAIN.COLOR_JITTER is 1.5, but must be between 0 and 1'),
    ('TRAIN.AUTO_AUGMENT True TRAIN.RAND_AUGMENT True', 'are both True: choose one'),
    ('TRAIN.RAND_AUGMENT_LAYERS 0', 'TRAIN.RAND_AUGMENT_LAYERS is 0'),
    ('TRAIN.RAND_AUGMENT_MAGNITUDE 11', 'TRAIN.RAND_AUGMENT_MAGNITUDE is 11, but must be between 0 and 10'),
    ('TRAIN.RANDOM_ERASE_PROB -0.5', 'TRAIN.RANDOM_ERASE_PROB is -0.5'),
    ('TRAIN.RANDOM_ERASE_MODE noise', 'must be one of const, rand, pixel'),
    ('TRAIN.RANDOM_ERASE_COUNT 0', 'TRAIN.RANDOM_ERASE_COUNT is 0'),
    ('TRAIN.DISTILLATION.TYPE warm', 'must be one of none, soft, hard'),
    ('TRAIN.DISTILLATION.TYPE hard', 'there is no teacher: set TEACHER_CFG and TEACHER_WEIGHTS'),
    ('TRAIN.DISTILLATION.TYPE soft TRAIN.DISTILLATION.TEACHER_CFG x', 'there is no teacher'),
    ('TRAIN.DISTILLATION.ALPHA 1.5', 'TRAIN.DISTILLATION.ALPHA is 1.5'),
    ('TRAIN.DISTILLATION.TAU 0', 'TRAIN.DISTILLATION.TAU is 0.0'),
    ('AMP_LEVEL O3', 'must be one of O1, O2'),
    ('AMP_DTYPE float32', 'must be one of float16, bfloat16'),
    ('MODEL.RESUME auto', "MODEL.RESUME is 'auto', .* name the folder with -output"),
    ('MODEL.RESUME x EVAL True MODEL.PRETRAINED y', "MODEL.RESUME is 'x', but EVAL takes its weights"),
    ('SEED -1', 'SEED is -1'),
    ('DATA.IMAGENET_MEAN [123.7,116.8,103.9]', r'DATA.IMAGENET_MEAN\[0\] is 123.7, but must be between -10 and 10'),
    ('MODEL.NUM_BLOCKS [1,1]', 'MODEL.NUM_BLOCKS is .1, 1., but must be five numbers above 0'),
    ('MODEL.NUM_BRANCHES [1,0,1,1,1]', 'MODEL.NUM_BRANCHES is .*, but must be five numbers above 0'),
    ('MODEL.EXPANSIONS [0.01,1,1,1,1]', r'MODEL.EXPANSIONS .* gives stage widths \[0, 64, 128, .*\], but each'),
    ('EVAL True MODEL.PRETRAINED x MODEL.STRIDES [2]', 'MODEL.STRIDES is .2., but must be five numbers'),
    ('TRAIN.END_WEIGHT_DECAY -0.5', 'TRAIN.END_WEIGHT_DECAY is -0.5, but must be at least 0, or -1 for a constant'),
    ('TRAIN.OPTIMIZER.EPS 0', 'TRAIN.OPTIMIZER.EPS is 0.0, but must be at least 1e-20'),
])
def test_invalid_values_are_rejected(options, message):
    with pytest.raises(UserError, match=message):
        resolve_config(parse('-opts', *options.split()))


@pytest.mark.parametrize('flag, meant', [
    ('-epochs', '-opts TRAIN.NUM_EPOCHS VALUE'), ('--epoch', '-opts TRAIN.NUM_EPOCHS VALUE'),
    ('-batchsize', '-batch_size'), ('--batch_size=16', '-batch_size'), ('-lr', '-opts TRAIN.BASE_LR VALUE'),
    ('-num_class', '-opts MODEL.NUM_CLASSES VALUE'), ('-workers', '-opts DATA.NUM_WORKERS VALUE'),
    ('-output_dir', '-output'), ('-config', '-cfg'), ('-save', '-output'), ('-data', '-data_path'),
    ('-batch', '-batch_size'), ('-eval_only', '-eval'), ('-evaluate', '-eval'),
    ('-mixup', '-opts TRAIN.MIXUP_ALPHA VALUE'), ('-LR', '-opts TRAIN.BASE_LR VALUE'),
    ('-base', '-opts TRAIN.BASE_LR VALUE'), ('-dropout', ''), ('-checkpoint', ''), ('-weights', ''), ('-bs', ''),
    ('-zzz', ''), ('stray', ''), ('-', ''),
])
def test_misspelled_flags_get_a_suggestion(flag, meant, capsys):
    with pytest.raises(SystemExit):
        parse(flag, '3')
    suggestion = f'; did you mean {meant}?' if meant else ''
    assert capsys.readouterr().err.endswith(f'unrecognized arguments: {flag} 3{suggestion} (see -h)\n')


def test_teacher_with_num_classes_0_takes_the_students():
    config = parse('-opts', 'MODEL.NUM_CLASSES', '7', 'TRAIN.DISTILLATION.TYPE', 'soft',
                   'TRAIN.DISTILLATION.TEACHER_WEIGHTS', 'w.pdparams', 'TRAIN.DISTILLATION.TEACHER_CFG',
                   str(ROOT / 'configs/finetune.yaml'))
    assert get_teacher_config(config).MODEL.NUM_CLASSES == 7


def test_changes_lists_the_values_that_differ_from_the_defaults():
    assert changes(get_config()) == {}
    config = resolve_config(parse('-cfg', str(ROOT / 'configs/finetune.yaml'), '-opts', 'DATA.CROP_PCT', '0.875'))
    found = changes(config)
    assert found['MODEL.NUM_CLASSES'] == 0 and found['DATA.CROP_SCALE'] == [0.35, 1.0]
    assert not {'BASE', 'DATA.CROP_PCT', 'DATA.BATCH_SIZE'} & set(found)
    assert with_values(get_config(), found) == config


def numbers():
    """Yield (name, Key) of every numeric key, including the fields of TRAIN.CURRICULUM."""
    for name, key in KEYS.items():
        for field, inner in (key.fields or {'': key}).items():
            default = inner.default[0] if isinstance(inner.default, list) else inner.default
            if type(default) in (int, float):
                yield f'{name}.{field}' if field else name, inner


@pytest.mark.parametrize('name, key', list(numbers()))
def test_every_number_has_bounds(name, key):
    """All have a lower bound, and an upper bound where larger numbers make no sense."""
    kind = type(key.default[0] if isinstance(key.default, list) else key.default)
    bounds = f'at least {key.low}' if key.high == math.inf else f'between {key.low} and {key.high}'
    assert key.low > -math.inf
    for bound, side in ((key.low, -1), (key.high, 1)):
        if bound == math.inf:
            continue
        try:
            resolve_config(with_number(name, bound))
        except UserError as error:  # another check may reject the value
            assert f'but must be {bounds}' not in str(error)
        outside = bound + side * (1 if kind is int else max(1e-9, abs(bound) / 1e6))
        with pytest.raises(UserError) as error:
            resolve_config(with_number(name, outside))
        assert str(error.value).replace('[0]', '') == f'{name} is {kind(outside)}, but must be {bounds}'


def with_number(key, value):
    """Return the default config with one number replaced (in a list, the first entry)."""
    config = get_config()
    config.TRAIN.CURRICULUM = [{'EPOCH': 1, 'IMAGE_SIZE': 160, 'AUTO_AUGMENT_STRENGTH': 0.0}]
    node, (*parents, leaf) = config, key.split('.')
    for parent in parents:
        node = node[parent]
        node = node[0] if isinstance(node, list) else node
    node[leaf] = [value, *node[leaf][1:]] if isinstance(node[leaf], list) else value
    return config


@pytest.mark.parametrize('stages, message', [
    ([(2, 160, 0.3)], r'TRAIN.CURRICULUM\[0\] is .*, but the first stage starts at EPOCH 1'),
    ([(0, 160, 0.3)], r'TRAIN.CURRICULUM\[0\].EPOCH is 0, but must be at least 1'),
    ([(1, 160, 0.3), (1, 192, 0.3)], r'TRAIN.CURRICULUM\[1\] is .*, but the previous stage starts at EPOCH 1: sort'),
    ([(1, 160, 0.3), (40, 192, 0.3), (39, 224, 1.0)], r'\[2\] is .*, but the previous stage starts at EPOCH 40'),
    ([(1, 0, 0.3)], r'TRAIN.CURRICULUM\[0\].IMAGE_SIZE is 0, but must be at least 1'),
    ([(1, 8, 0.3), (2, 8, 1.5)], r'\[1\].AUTO_AUGMENT_STRENGTH is 1.5, but must be between 0 and 1'),
    ([(1, 160, -0.1)], r'\[0\].AUTO_AUGMENT_STRENGTH is -0.1, but must be between 0 and 1'),
])
def test_invalid_curricula_are_rejected(stages, message):
    config = get_config()
    config.TRAIN.AUTO_AUGMENT = True
    config.TRAIN.CURRICULUM = [dict(zip(('EPOCH', 'IMAGE_SIZE', 'AUTO_AUGMENT_STRENGTH'), stage)) for stage in stages]
    with pytest.raises(UserError, match=message):
        resolve_config(config)


def test_strength_above_0_needs_auto_augment():
    config = get_config()
    config.TRAIN.CURRICULUM = [{'EPOCH': 1, 'IMAGE_SIZE': 160, 'AUTO_AUGMENT_STRENGTH': 0.3}]
    with pytest.raises(UserError, match='TRAIN.AUTO_AUGMENT is False: turn it on, or set the strength to 0.0'):
        resolve_config(config)
    config.TRAIN.CURRICULUM[0]['AUTO_AUGMENT_STRENGTH'] = 0.0
    resolve_config(config)


def test_config_edited_in_python_is_checked_too():
    config = get_config()
    config.MODEL.NUM_CLASES = 3
    with pytest.raises(UserError, match='unknown key MODEL.NUM_CLASES; the nearest known key is MODEL.NUM_CLASSES'):
        resolve_config(config)
    config = get_config()
    config.MODEL.NUM_CLASSES = 'ten'
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES is 'ten', but must be int"):
        resolve_config(config)


def test_stage_widths():
    lists = [1, 2, 8, 10, 1], [4] * 5, [64, 64, 128, 256, 512], [2] * 5, [0.75, 0.75, 1.0, 1.0, 2.0]
    assert stage_widths(*lists) == [48, 48, 128, 256, 1024]
    with pytest.raises(UserError, match='MODEL.NUM_BLOCKS is .2, 2, 8, 10, 1., but the stem .entry 0. is one block'):
        stage_widths([2, 2, 8, 10, 1], *lists[1:])
