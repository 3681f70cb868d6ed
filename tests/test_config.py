"""Defaults, YAML files, flags, -opts, and the errors of each."""
import re
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, variant_config

import config as config_module
from config import get_config, get_parser, resolve_config, update_config
from utils import UserError


def parse(*argv):
    return update_config(get_config(), get_parser('test').parse_args(argv))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_every_key_has_a_comment_and_a_reader():
    text = (ROOT / 'config.py').read_text()
    code = '\n'.join(path.read_text() for path in [*ROOT.glob('*.py'), *ROOT.glob('*/*.py')]
                     if path.name != 'config.py')
    for key in config_module._DEFAULTS:
        if key != 'BASE':
            reader = {'MODEL.NAME': 'config.MODEL.NAME', 'TRAIN.OPTIMIZER.NAME': 'options.NAME'}.get(
                key, f'.{key.rsplit(".")[-1]}')
            assert re.search(rf'{re.escape(reader)}\b', code), f'{key} has no reader'
    lines = text[:text.index('_UNSUPPORTED')].splitlines()
    for previous, line in zip(lines, lines[1:]):
        if re.match(r'_C\.\S+ = (?!CN)', line):
            assert previous.startswith('#'), f'{line} has no comment'


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


def test_a_config_can_be_edited_and_is_a_copy():
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


def test_base_is_relative_and_merged_first(tmp_path):
    (tmp_path / 'sub').mkdir()
    write(tmp_path / 'base.yaml', 'SEED: 3\nTRAIN:\n  BASE_LR: 1\n')
    assert get_config(write(tmp_path / 'sub/a.yaml', "BASE: ['../base.yaml']\nSEED: 4\n")).SEED == 4
    assert get_config(str(tmp_path / 'sub/a.yaml')).TRAIN.BASE_LR == 1.0
    assert get_config(write(tmp_path / 'b.yaml', 'BASE: base.yaml\n')).SEED == 3
    assert get_config(write(tmp_path / 'old.yaml', "BASE: ['']\n")) == get_config()


def test_base_errors(tmp_path):
    write(tmp_path / 'a.yaml', 'BASE: b.yaml\n')
    write(tmp_path / 'b.yaml', 'BASE: a.yaml\n')
    with pytest.raises(UserError, match='circle'):
        get_config(str(tmp_path / 'a.yaml'))
    with pytest.raises(UserError, match='missing.yaml.*No such file'):
        get_config(write(tmp_path / 'c.yaml', 'BASE: missing.yaml\n'))
    write(tmp_path / 'd.yaml', 'SEEED: 1\n')
    with pytest.raises(UserError, match='d.yaml: unknown key SEEED; the nearest known key is SEED'):
        get_config(write(tmp_path / 'e.yaml', 'BASE: d.yaml\n'))


@pytest.mark.parametrize('text, message', [
    ('DATA:\n  IMAGE_SIZES: 3\n', 'unknown key DATA.IMAGE_SIZES; the nearest known key is DATA.IMAGE_SIZE$'),
    ('MODEL: 3\n', 'MODEL is 3, but is a section'),
    ('SEED:\n  A: 3\n', "SEED is {'A': 3}, but must be int, like 0"),
    ('SEED: 1.5\n', 'SEED is 1.5, but must be int'),
    ('SEED: true\n', 'SEED is True, but must be int'),
    ('EVAL: 1\n', 'EVAL is 1, but must be bool'),
    ('SEED: null\n', 'SEED is None, but must be int'),
    ('TRAIN:\n  BASE_LR: .inf\n', 'TRAIN.BASE_LR is inf, but must be float'),
    ('TRAIN:\n  BASE_LR: fast\n', "TRAIN.BASE_LR is 'fast', but must be float"),
    ('DATA:\n  DATA_PATH: [a]\n', 'DATA.DATA_PATH is .*, but must be str'),
    ('MODEL:\n  NUM_BLOCKS: [1, 2.5, 1, 1, 1]\n', r'MODEL.NUM_BLOCKS\[1\] is 2.5, but must be int'),
    ('MODEL:\n  NUM_BLOCKS: 4\n', 'MODEL.NUM_BLOCKS is 4, but must be a list of int'),
    ('TRAIN:\n  MULTI_SCALE_SAMPLER_DDP: True\n', 'TRAIN.MULTI_SCALE_SAMPLER_DDP is True, but is not supported'),
    ('TRAIN:\n  CURRICULUM: 3\n', 'TRAIN.CURRICULUM is 3, but must be a list of dict, like .*EPOCH'),
    ('TRAIN:\n  CURRICULUM: [3]\n', r'TRAIN.CURRICULUM\[0\] is 3, but must be dict, like .*AUTO_AUGMENT_STRENGTH'),
    ('TRAIN:\n  CURRICULUM: [{EPOCH: 1, IMAGE_SIZE: 8}]\n', r'TRAIN.CURRICULUM\[0\] is .*, but must be dict, like'),
    ('TRAIN:\n  CURRICULUM: [{EPOCH: 1, IMAGE_SIZE: 8, AUTO_AUGMENT_STRENGTH: 0, RATE: 1}]\n', r'CURRICULUM\[0\] is'),
    ('TRAIN:\n  CURRICULUM: [{EPOCH: 1.5, IMAGE_SIZE: 8, AUTO_AUGMENT_STRENGTH: 0}]\n',
     r'TRAIN.CURRICULUM\[0\].EPOCH is 1.5, but must be int'),
    ('TRAIN:\n  CURRICULUM: [{EPOCH: 1, IMAGE_SIZE: null, AUTO_AUGMENT_STRENGTH: 0}]\n',
     r'TRAIN.CURRICULUM\[0\].IMAGE_SIZE is None, but must be int'),
    ('TRAIN:\n  CURRICULUM: [{EPOCH: 1, IMAGE_SIZE: 8, AUTO_AUGMENT_STRENGTH: x}]\n',
     r"TRAIN.CURRICULUM\[0\].AUTO_AUGMENT_STRENGTH is 'x', but must be float"),
    ('- a\n- b\n', 'mapping'),
    ('SEED: 1\nSEED: 2\n', 'SEED stands there twice'),
    ('MODEL:\n  NAME: 2022-02-30\n', 'not a YAML file .day is out of range'),
    ('SAVE: "a\\0b"\n', 'SAVE is .*, but must be str'),
    ('BASE: "a\\0b"\n', 'BASE is .*, but must be a list of file names'),
    ('train:\n  base_lr: 1\n', 'unknown key train; the nearest known key is '),
    ('a: [\n', 'not a YAML file'),
])
def test_yaml_errors(tmp_path, text, message):
    path = write(tmp_path / 'x.yaml', text)
    with pytest.raises(UserError, match=message) as error:
        get_config(path)
    assert str(tmp_path) in str(error.value) and '\n' not in str(error.value)


def test_yaml_values_are_read_as_meant(tmp_path):
    config = get_config(write(tmp_path / 'x.yaml', '''
TRAIN:
  BASE_LR: 1
  WEIGHT_DECAY: 1e-5
  LINEAR_SCALED_LR: null
  GRAD_CLIP: null
  CUTMIX_MINMAX: None
  CURRICULUM:
    - {AUTO_AUGMENT_STRENGTH: 1, EPOCH: 1, IMAGE_SIZE: 96}
  MULTI_SCALE_SAMPLER_DDP: False
  OPTIMIZER:
DATA:
  BATCH_SIZE_EVAL: null
MODEL:
  PRETRAINED: null
  RESUME: null
  EXPANSIONS: [1, 2, 2.5, 3, 4]
'''))
    assert (config.TRAIN.BASE_LR, config.TRAIN.WEIGHT_DECAY, config.TRAIN.LINEAR_SCALED_LR) == (1.0, 1e-5, 0)
    assert all(type(value) is float for value in [config.TRAIN.BASE_LR, *config.MODEL.EXPANSIONS])
    assert (config.DATA.BATCH_SIZE_EVAL, config.MODEL.PRETRAINED, config.MODEL.RESUME) == (0, '', '')
    assert (config.TRAIN.GRAD_CLIP, config.TRAIN.CUTMIX_MINMAX) == (0.0, [0.0, 0.0])
    assert config.TRAIN.CURRICULUM == [{'EPOCH': 1, 'IMAGE_SIZE': 96, 'AUTO_AUGMENT_STRENGTH': 1.0}]
    assert type(config.TRAIN.CURRICULUM[0]['AUTO_AUGMENT_STRENGTH']) is float
    for _ in range(2):  # each has a list of its own
        config = get_config(write(tmp_path / 'y.yaml', 'TRAIN:\n  CURRICULUM: null\n  END_WEIGHT_DECAY: null\n'))
        assert config.TRAIN.CURRICULUM == [] and config.TRAIN.END_WEIGHT_DECAY == -1.0
        config.TRAIN.CURRICULUM.append({})


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


def test_flags_of_zero_count(tmp_path):
    config = get_config(write(tmp_path / 'x.yaml', 'TRAIN:\n  LAST_EPOCH: 5\n'))
    update_config(config, SimpleNamespace(last_epoch=0))  # a notebook's namespace, with one flag
    assert config.TRAIN.LAST_EPOCH == 0
    with pytest.raises(UserError, match='DATA.BATCH_SIZE is 0'):
        resolve_config(parse('-batch_size', '0'))


@pytest.mark.parametrize('argv', [
    ['-opts', 'DATA.IMAGENET_MEAN', '[-1, 0, -1e-3]', 'SEED', '3', '-batch_size', '4', '-opts', 'TRAIN.BASE_LR', '1',
     '-image_size', '64', '-opts', 'MODEL.NAME', 'x y'],
    ['-batch_size', '4', '-opts', 'DATA.IMAGENET_MEAN', '-1,0,-1e-3', '-image_size', '64', '-opts', 'SEED', '3',
     'TRAIN.BASE_LR', '1e0', 'MODEL.NAME', 'x y'],
])
def test_opts(argv):
    config = parse(*argv)
    assert config.DATA.IMAGENET_MEAN == [-1.0, 0.0, -0.001]
    assert (config.SEED, config.TRAIN.BASE_LR, config.MODEL.NAME) == (3, 1.0, 'x y')
    stages = "[{'EPOCH': 1, 'IMAGE_SIZE': 8, 'AUTO_AUGMENT_STRENGTH': 0.5}]"
    assert str(parse('-opts', 'TRAIN.CURRICULUM', stages).TRAIN.CURRICULUM) == stages
    assert (config.DATA.BATCH_SIZE, config.DATA.IMAGE_SIZE) == (4, 64)


def test_opts_take_negative_numbers_and_booleans():
    assert parse('-opts', 'TRAIN.END_LR', '-1e-5', 'EVAL', 'true').TRAIN.END_LR == -1e-5
    assert parse('-opts', 'TRAIN.MODEL_EMA', 'false').TRAIN.MODEL_EMA is False
    assert parse('-opts', 'TRAIN.LINEAR_SCALED_LR', 'None').TRAIN.LINEAR_SCALED_LR == 0


@pytest.mark.parametrize('argv, message', [
    (['-opts', 'TRAIN.LR', '3'], '-opts: unknown key TRAIN.LR; the nearest known key is TRAIN'),
    (['-opts', 'train.base_lr', '3'], 'unknown key train.base_lr; the nearest known key is TRAIN.BASE_LR$'),
    (['-opts', 'MODEL.IMAGE_SIZE', '3'], 'unknown key MODEL.IMAGE_SIZE; the nearest known key is DATA.IMAGE_SIZE$'),
    (['-opts', 'SEED', '{[]:1}'], 'SEED is'),
    (['-output', 'x\udce9'], 'SAVE is'),
    (['-opts', 'SEED'], 'no value after SEED'),
    (['-opts', 'SEED', 'x'], "-opts: SEED is 'x', but must be int, like 0"),
    (['-opts', 'TRAIN', '3'], 'unknown key TRAIN'),
    (['-opts', 'BASE', 'x.yaml'], 'BASE'),
    (['-batch_size', 'many'], "-batch_size: DATA.BATCH_SIZE is 'many', but must be int"),
])
def test_opts_and_flag_errors(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize('argv', [['-bat', '3'], ['-data', 'x'], ['-evaluate'], ['--eval'], ['-helpme'], ['stray']])
def test_flags_are_exact(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize('options, message', [
    ('DATA.CROP_PCT 1.5', 'DATA.CROP_PCT is 1.5, but must be between 0.01 and 1'),
    ('DATA.CROP_SCALE [0.5]', 'DATA.CROP_SCALE is .*2 entries'),
    ('DATA.CROP_SCALE [0.5,0.1]', 'smaller share comes first'),
    ('DATA.INTERPOLATION cubic', 'must be one of nearest, bilinear, bicubic, lanczos'),
    ('DATA.DATASET cifar10', 'DATA.DATASET'),
    ('DATA.IMAGE_CHANNELS 1', 'a run needs 3'),
    ('DATA.IMAGENET_STD [0.1,0.0,0.1]', 'DATA.IMAGENET_STD'),
    ('MODEL.TYPE ResNet', 'MODEL.TYPE'),
    ('MODEL.DEPLOY True', 'add -eval'),
    ('EVAL True', '-pretrained'),
    ('TRAIN.LAST_EPOCH 300', 'TRAIN.LAST_EPOCH is 300'),
    ('TRAIN.WARMUP_EPOCHS 300', 'TRAIN.WARMUP_EPOCHS is 300'),
    ('TRAIN.OPTIMIZER.NAME Adam', 'SGD, AdamW'),
    ('TRAIN.OPTIMIZER.NESTEROV True TRAIN.OPTIMIZER.MOMENTUM 0', 'NESTEROV'),
    ('TRAIN.OPTIMIZER.BETAS [1.0,0.9]', 'TRAIN.OPTIMIZER.BETAS'),
    ('TRAIN.SMOOTHING -0.1', 'TRAIN.SMOOTHING'),
    ('TRAIN.ACCUM_ITER 0', 'TRAIN.ACCUM_ITER is 0'),
    ('TRAIN.GRAD_CLIP -1', 'TRAIN.GRAD_CLIP is -1.0'),
    ('TRAIN.MIXUP_MODE half', 'must be one of batch, pair, elem'),
    ('TRAIN.MIXUP_PROB 2', 'TRAIN.MIXUP_PROB is 2.0'),
    ('TRAIN.CUTMIX_MINMAX [0.5,0.2]', 'TRAIN.CUTMIX_MINMAX is .* the smaller share comes first'),
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
    ('DATA.IMAGE_SIZE 4096 DATA.CROP_PCT 0.1', 'DATA.CROP_PCT is 0.1, but DATA.IMAGE_SIZE 4096 divided by it'),
    ('MODEL.NUM_BLOCKS [1,1]', 'MODEL.NUM_BLOCKS is .1, 1., but must be five numbers above 0'),
    ('MODEL.NUM_BRANCHES [1,0,1,1,1]', 'MODEL.NUM_BRANCHES is .*, but must be five numbers above 0'),
    ('MODEL.EXPANSIONS [0.01,1,1,1,1]', r'MODEL.EXPANSIONS .* makes stages of the widths \[0, 64, 128, .*\], but'),
    ('MODEL.EXPANSIONS [1,1,1,1,20]', 'but each must be between 1 and 8192'),
    ('EVAL True MODEL.PRETRAINED x MODEL.STRIDES [2]', 'MODEL.STRIDES is .2., but must be five numbers'),
    ('TRAIN.END_WEIGHT_DECAY -0.5', 'TRAIN.END_WEIGHT_DECAY is -0.5, but must be at least 0, or -1'),
    ('TRAIN.OPTIMIZER.EPS 0', 'TRAIN.OPTIMIZER.EPS is 0.0, but must be between 1e-20 and 1'),
])
def test_values_that_cannot_run(options, message):
    with pytest.raises(UserError, match=message):
        resolve_config(parse('-opts', *options.split()))


def numbers():
    """(key, default of one number) of every numeric key, the entries of lists and the fields of stages too."""
    for key, default in config_module._DEFAULTS.items():
        default = default[0] if isinstance(default, list) else default
        for name, value in default.items() if isinstance(default, dict) else [('', default)]:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield f'{key}.{name}' if name else key, value


def test_every_number_has_a_range():
    ranges = config_module._RANGE
    assert set(ranges) == {key for key, _ in numbers()}
    for key, default in numbers():
        low, high = ranges[key]
        assert low <= default <= high, key
        step = {int: 1, float: max(1e-9, abs(high) / 1e6)}[type(default)]
        for bound, outside in ((low, low - step), (high, high + step)):
            try:
                resolve_config(with_number(key, bound))
            except UserError as error:  # there may be more to say of it than its range
                assert f'{bound}, but must be between' not in str(error), key
            with pytest.raises(UserError) as error:
                resolve_config(with_number(key, outside))
            assert str(error.value).replace('[0]', '') == (
                f'{key} is {type(default)(outside)}, but must be between {low} and {high}')


def with_number(key, value):
    """The default config with one number; in a list the first."""
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
    ([(0, 160, 0.3)], r'TRAIN.CURRICULUM\[0\].EPOCH is 0, but must be between 1 and 100000'),
    ([(1, 160, 0.3), (1, 192, 0.3)], r'TRAIN.CURRICULUM\[1\] is .*, but the stage before starts at EPOCH 1: order'),
    ([(1, 160, 0.3), (40, 192, 0.3), (39, 224, 1.0)], r'\[2\] is .*, but the stage before starts at EPOCH 40'),
    ([(1, 0, 0.3)], r'TRAIN.CURRICULUM\[0\].IMAGE_SIZE is 0, but must be between 1 and 4096'),
    ([(1, 8, 0.3), (2, 8, 1.5)], r'\[1\].AUTO_AUGMENT_STRENGTH is 1.5, but must be between 0 and 1'),
    ([(1, 160, -0.1)], r'\[0\].AUTO_AUGMENT_STRENGTH is -0.1, but must be between 0 and 1'),
])
def test_curricula_that_cannot_run(stages, message):
    config = get_config()
    config.TRAIN.AUTO_AUGMENT = True
    config.TRAIN.CURRICULUM = [dict(zip(('EPOCH', 'IMAGE_SIZE', 'AUTO_AUGMENT_STRENGTH'), stage)) for stage in stages]
    with pytest.raises(UserError, match=message):
        resolve_config(config)


def test_strength_needs_auto_augment():
    config = get_config()
    config.TRAIN.CURRICULUM = [{'EPOCH': 1, 'IMAGE_SIZE': 160, 'AUTO_AUGMENT_STRENGTH': 0.3}]
    with pytest.raises(UserError, match='TRAIN.AUTO_AUGMENT is False: turn it on, or set the strength to 0.0'):
        resolve_config(config)
    config.TRAIN.CURRICULUM[0]['AUTO_AUGMENT_STRENGTH'] = 0.0
    resolve_config(config)


def test_a_config_edited_by_hand_is_checked_too():
    config = get_config()
    config.MODEL.NUM_CLASES = 3
    with pytest.raises(UserError, match='unknown key MODEL.NUM_CLASES; the nearest known key is MODEL.NUM_CLASSES'):
        resolve_config(config)
    config = get_config()
    config.MODEL.NUM_CLASSES = 'ten'
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES is 'ten', but must be int"):
        resolve_config(config)


def test_values_set_by_hand_get_their_types():
    config = get_config()
    config.TRAIN.BASE_LR, config.TRAIN.WEIGHT_DECAY, config.MODEL.PRETRAINED = 1, '1e-3', None
    config.BASE = ['x.yaml']
    resolved = resolve_config(config)
    assert (resolved.TRAIN.BASE_LR, resolved.TRAIN.WEIGHT_DECAY, resolved.MODEL.PRETRAINED) == (1.0, 1e-3, '')
    assert type(resolved.TRAIN.BASE_LR) is float and resolved.BASE == [''] and config.BASE == ['x.yaml']


def test_text_stays_text():
    assert parse('-output', 'none').SAVE == 'none'
