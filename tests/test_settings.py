"""YAML files, flags and -opts for a small table of keys, and their errors."""
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.settings import Key, Settings, leaves
from utils import UserError

KEYS = {
    'BASE': Key(['']),
    'DATA.FOLDER': Key('/data'),
    'DATA.SIZE': Key(224, low=1),
    'DATA.MEAN': Key([0.5, 0.4], low=-1, high=1, length=2, null=[0.0, 0.0]),
    'DATA.COUNTS': Key([1, 2, 8], low=0),
    'TRAIN.LR': Key(0.1, low=0),
    'TRAIN.EMA': Key(True),
    'TRAIN.MODE': Key('pixel', choices=('pixel', 'Elem')),
    'TRAIN.STAGES': Key([], null=[], fields={'EPOCH': Key(1, low=1), 'RATE': Key(0.5, low=0, high=1)}),
    'TRAIN.OPTIMIZER.EPS': Key(1e-8, low=1e-20),
    'SAVE': Key('', null=''),
    'SEED': Key(3, low=0, high=9, null=0),
    'EVAL': Key(False),
}
FLAGS = {
    'folder': ('DATA.FOLDER', 'DIR', 'folder of the data'),
    'size': ('DATA.SIZE', 'N', 'size of an image'),
    'eval': ('EVAL', None, 'evaluate'),
}
SETTINGS = Settings(KEYS, FLAGS, unsupported={'TRAIN.OLD': ('false',)})


def read(path):
    config = SETTINGS.defaults()
    SETTINGS.merge_file(config, str(path))
    return config


def read_text(folder, text):
    path = folder / 'x.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path)


def parse(*argv):
    config = SETTINGS.defaults()
    SETTINGS.merge_args(config, SETTINGS.parser('test', FLAGS, 'SEED 1').parse_args(argv))
    return config


def test_defaults_are_copies_from_the_table():
    config = SETTINGS.defaults()
    assert dict(leaves(config)) == {name: key.default for name, key in KEYS.items()}
    assert list(dict(leaves(config))) == list(KEYS)
    config.SEED = 5
    config.DATA.MEAN[0] = 7.0
    config.TRAIN.STAGES.append({})
    assert dict(leaves(SETTINGS.defaults())) == {name: key.default for name, key in KEYS.items()}
    assert (KEYS['DATA.MEAN'].default, KEYS['TRAIN.STAGES'].default) == ([0.5, 0.4], [])


def test_base_is_relative_and_merged_first(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'base.yaml').write_text('SEED: 5\nTRAIN:\n  LR: 1\n')
    (tmp_path / 'sub/a.yaml').write_text("BASE: ['../base.yaml']\nSEED: 4\n")
    config = read(tmp_path / 'sub/a.yaml')
    assert (config.SEED, config.TRAIN.LR, config.BASE) == (4, 1.0, [''])
    (tmp_path / 'b.yaml').write_text('BASE: base.yaml\n')
    assert read(tmp_path / 'b.yaml').SEED == 5
    (tmp_path / 'old.yaml').write_text("BASE: ['']\n")
    assert read(tmp_path / 'old.yaml') == SETTINGS.defaults()


def test_base_errors(tmp_path):
    (tmp_path / 'a.yaml').write_text('BASE: b.yaml\n')
    (tmp_path / 'b.yaml').write_text('BASE: a.yaml\n')
    with pytest.raises(UserError, match='remove the cycle'):
        read(tmp_path / 'a.yaml')
    (tmp_path / 'c.yaml').write_text('BASE: missing.yaml\n')
    with pytest.raises(UserError, match='missing.yaml: cannot read the config file .No such file'):
        read(tmp_path / 'c.yaml')
    (tmp_path / 'd.yaml').write_text('SEEED: 1\n')
    (tmp_path / 'e.yaml').write_text('BASE: d.yaml\n')
    with pytest.raises(UserError, match='d.yaml: unknown key SEEED; the nearest known key is SEED'):
        read(tmp_path / 'e.yaml')


@pytest.mark.parametrize('text, message', [
    ('DATA:\n  SIZES: 3\n', 'unknown key DATA.SIZES; the nearest known key is DATA.SIZE$'),
    ('train:\n  lr: 1\n', 'unknown key train; the nearest known key is '),
    ('LR: 1\n', 'unknown key LR; the nearest known key is TRAIN.LR$'),
    ('DATA:\n  LR: 1\n', 'unknown key DATA.LR; the nearest known key is TRAIN.LR$'),
    ('3: 1\n', 'unknown key 3; the nearest known key is '),
    ('"a\\nb": 1', 'unknown key a b; the nearest known key is '),
    ('DATA: 3\n', 'DATA is 3, but is a section: write its keys below it$'),
    ('DATA:\n  BASE: [a]\n', 'unknown key DATA.BASE; the nearest known key is BASE$'),
    ('BASE: 3\n', 'BASE is 3, but must be a list of file names'),
    ('BASE: "a\\0b"\n', 'BASE is .*, but must be a list of file names'),
    ('SEED:\n  A: 3\n', "SEED is {'A': 3}, but must be int, like 3"),
    ('SEED: 1.5\n', 'SEED is 1.5, but must be int'),
    ('SEED: true\n', 'SEED is True, but must be int'),
    ('SEED: 2022-01-01\n', 'SEED is datetime.date.2022, 1, 1., but must be int'),
    ('EVAL: 1\n', 'EVAL is 1, but must be bool, like False'),
    ('EVAL: null\n', 'EVAL is None, but must be bool'),
    ('TRAIN:\n  LR: .inf\n', 'TRAIN.LR is inf, but must be float, like 0.1'),
    ('TRAIN:\n  LR: -.inf\n', 'TRAIN.LR is -inf, but must be float'),
    ('TRAIN:\n  LR: .nan\n', 'TRAIN.LR is nan, but must be float'),
    ('TRAIN:\n  LR: 1e999\n', 'TRAIN.LR is inf, but must be float'),
    ('TRAIN:\n  LR: fast\n', "TRAIN.LR is 'fast', but must be float"),
    ('TRAIN:\n  LR: true\n', 'TRAIN.LR is True, but must be float'),
    ('DATA:\n  FOLDER: [a]\n', 'DATA.FOLDER is .*, but must be str'),
    ('DATA:\n  FOLDER: true\n', 'DATA.FOLDER is True, but must be str'),
    ('DATA:\n  FOLDER: null\n', 'DATA.FOLDER is None, but must be str'),
    ('SAVE: "a\\0b"\n', 'SAVE is .*, but must be str'),
    ('SAVE: "\\ud800"', 'SAVE is .*, but must be str'),
    ('SAVE: !!set {a, b}', 'SAVE is .*, but must be str'),
    ('DATA:\n  COUNTS: [1, 2.5, 1]\n', r'DATA.COUNTS\[1\] is 2.5, but must be int, like 1$'),
    ('DATA:\n  COUNTS: 4\n', 'DATA.COUNTS is 4, but must be a list of int, like .1, 2, 8.'),
    ('DATA:\n  MEAN: [null, 1]\n', r'DATA.MEAN\[0\] is None, but must be float, like 0.5'),
    ('TRAIN:\n  OLD: True\n', 'TRAIN.OLD is True, but is not supported: remove it'),
    ('TRAIN:\n  STAGES: 3\n', "TRAIN.STAGES is 3, but must be a list of dict, like .{'EPOCH': 1, 'RATE': 0.5}.$"),
    ('TRAIN:\n  STAGES: [3]\n', r"TRAIN.STAGES\[0\] is 3, but must be dict, like {'EPOCH': 1, 'RATE': 0.5}$"),
    ('TRAIN:\n  STAGES: [{EPOCH: 1}]\n', r"TRAIN.STAGES\[0\] is {'EPOCH': 1}, but must be dict, like"),
    ('TRAIN:\n  STAGES: [{EPOCH: 1, RATE: 0, LR: 1}]\n', r'STAGES\[0\] is .*, but must be dict'),
    ('TRAIN:\n  STAGES: [{EPOCH: 1.5, RATE: 0}]\n', r'TRAIN.STAGES\[0\].EPOCH is 1.5, but must be int'),
    ('TRAIN:\n  STAGES: [{EPOCH: null, RATE: 0}]\n', r'TRAIN.STAGES\[0\].EPOCH is None, but must be int'),
    ('TRAIN:\n  STAGES: [{EPOCH: 1, RATE: x}]\n', r"TRAIN.STAGES\[0\].RATE is 'x', but must be float"),
    ('- a\n- b\n', r"contains \['a', 'b'\], but must be a mapping of keys to values"),
    ('SEED: 1\nSEED: 2\n', 'not a YAML file .duplicate key SEED.*line 1'),
    ('a: [\n', 'not a YAML file .*; fix it, or give another with -cfg$'),
    ('TRAIN:\n\tLR: 1\n', 'not a YAML file'),
    ('SAVE: 2022-02-30\n', 'not a YAML file .day is out of range'),
    ('SEED: !!int ""', 'not a YAML file'),
    ('EVAL: !!bool x', 'not a YAML file'),
    ('SAVE: !!timestamp x', 'not a YAML file'),
    ('? [a]\n: 1', 'not a YAML file'),
    (b'\x89PNG\r\n\x1a\n\0\0', 'not a YAML file'),
    (f'SEED: {"x" * 5000}\n', r"SEED is 'x+\.\.\., but must be int"),
], ids=lambda value: str(value)[:30])
def test_yaml_errors(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_text(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value).splitlines()) == 1


def test_yaml_values_are_read_as_meant(tmp_path):
    config = read_text(tmp_path, '''
TRAIN:
  LR: 1
  EMA: 'false'
  MODE: elem
  OLD: False
  STAGES:
    - {RATE: 1, EPOCH: 1}
  OPTIMIZER:
DATA:
  FOLDER: 2022-01-01
  MEAN: None
  COUNTS: ['0x10', 2]
SAVE: null
SEED: null
EVAL: yes
''')
    assert (config.TRAIN.LR, config.TRAIN.EMA, config.TRAIN.MODE, config.EVAL) == (1.0, False, 'elem', True)
    assert config.TRAIN.STAGES == [{'EPOCH': 1, 'RATE': 1.0}]
    assert type(config.TRAIN.LR) is float and type(config.TRAIN.STAGES[0]['RATE']) is float
    assert config.TRAIN.OPTIMIZER.EPS == 1e-8 and 'OLD' not in config.TRAIN
    assert (config.DATA.FOLDER, config.DATA.MEAN, config.DATA.COUNTS) == ('2022-01-01', [0.0, 0.0], [16, 2])
    assert (config.SAVE, config.SEED) == ('', 0)
    assert read_text(tmp_path, 'TRAIN:\n  LR: 1e-4\n').TRAIN.LR == 1e-4  # which PyYAML reads as text
    assert read_text(tmp_path, '') == SETTINGS.defaults()


def test_values_for_null_are_copies(tmp_path):
    for _ in range(2):
        config = read_text(tmp_path, 'TRAIN:\n  STAGES: null\nDATA:\n  MEAN: null\n')
        assert (config.TRAIN.STAGES, config.DATA.MEAN) == ([], [0.0, 0.0])
        config.TRAIN.STAGES.append({})
        config.DATA.MEAN[0] = 1.0


def test_aliases_and_merge_keys_work(tmp_path):
    config = read_text(tmp_path, 'DATA: {COUNTS: &a [2, 2], MEAN: *a}\nTRAIN: {OPTIMIZER: {<<: {EPS: 1e-7}}}')
    assert (config.DATA.COUNTS, config.DATA.MEAN, config.TRAIN.OPTIMIZER.EPS) == ([2, 2], [2.0, 2.0], 1e-7)


def test_precedence_of_files_flags_and_opts(tmp_path):
    (tmp_path / 'x.yaml').write_text('DATA:\n  SIZE: 1\n  FOLDER: a\nSEED: 1\nEVAL: true\n')
    config = parse('-opts', 'SEED', '3', '-cfg', str(tmp_path / 'x.yaml'), '-size', '2')
    assert (config.DATA.SIZE, config.DATA.FOLDER, config.SEED, config.EVAL) == (2, 'a', 3, True)
    assert parse('-eval').EVAL is True
    assert parse('-opts', 'DATA.SIZE', '3', '-size=2', '-opts', 'SEED', '4').DATA.SIZE == 3


def test_a_namespace_may_omit_flags():
    config = SETTINGS.defaults()
    config.freeze()
    SETTINGS.merge_args(config, SimpleNamespace(size=0))  # a 0 counts as given
    assert config.DATA.SIZE == 0 and config.DATA.FOLDER == '/data' and not config.is_frozen()


@pytest.mark.parametrize('argv', [
    ['-opts', 'DATA.MEAN', '[-1, -1e-3]', 'SEED', '4', '-size', '4', '-opts', 'TRAIN.LR', '1', '-opts', 'SAVE', 'x y'],
    ['-size', '4', '-opts', 'DATA.MEAN', '-1,-1e-3', '-opts', 'SEED', '4', 'TRAIN.LR', '1e0', 'SAVE', 'x y'],
])
def test_opts(argv):
    config = parse(*argv)
    assert config.DATA.MEAN == [-1.0, -0.001]
    assert (config.SEED, config.TRAIN.LR, config.SAVE, config.DATA.SIZE) == (4, 1.0, 'x y', 4)


def test_opts_take_all_types():
    assert parse('-opts', 'TRAIN.LR', '-1e-5', 'EVAL', 'true').TRAIN.LR == -1e-5
    assert parse('-opts', 'TRAIN.EMA', ' false ').TRAIN.EMA is False
    assert parse('-opts', 'SEED', 'None').SEED == 0
    assert parse('-opts', 'SAVE', 'none').SAVE == 'none'  # text stays text
    stages = "[{'EPOCH': 1, 'RATE': 0.25}]"
    assert str(parse('-opts', 'TRAIN.STAGES', stages).TRAIN.STAGES) == stages


@pytest.mark.parametrize('argv, message', [
    (['-opts', 'TRAIN.SIZE', '3'], '^-opts: unknown key TRAIN.SIZE; the nearest known key is DATA.SIZE$'),
    (['-opts', 'data.mean', '3'], 'unknown key data.mean; the nearest known key is DATA.MEAN$'),
    (['-opts', 'SEED', '{[]:1}'], r"SEED is '{\[\]:1}', but must be int"),
    (['-opts', 'SEED', '[1'], r"SEED is '\[1', but must be int"),
    (['-opts', 'SEED', ''], "SEED is '', but must be int"),
    (['-opts', 'SEED'], 'no value after SEED; give KEY VALUE pairs'),
    (['-opts', 'SEED', 'x'], "^-opts: SEED is 'x', but must be int, like 3$"),
    (['-opts', 'TRAIN', '3'], 'unknown key TRAIN'),
    (['-opts', 'BASE', 'x.yaml'], "BASE is 'x.yaml', but takes effect only at the top of a YAML file"),
    (['-opts', 'TRAIN.OLD', 'True'], "TRAIN.OLD is 'True', but is not supported: remove it"),
    (['-size', 'many'], "^-size: DATA.SIZE is 'many', but must be int"),
    (['-folder', 'x\udce9'], 'DATA.FOLDER is .*, but must be str'),
    (['-cfg', 'missing.yaml'], '^missing.yaml: cannot read the config file .*; give one with -cfg'),
])
def test_opts_and_flag_errors(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize('argv', [['-si', '3'], ['-fold', 'x'], ['-evaluate'], ['--eval'], ['-helpme'], ['stray']])
def test_flags_are_exact(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize('name, value, message', [
    ('SEED', -1, 'SEED is -1, but must be between 0 and 9'),
    ('SEED', 10, 'SEED is 10, but must be between 0 and 9'),
    ('DATA.SIZE', 0, 'DATA.SIZE is 0, but must be at least 1'),
    ('DATA.MEAN', [0, 2], 'DATA.MEAN[1] is 2.0, but must be between -1 and 1'),
    ('DATA.MEAN', [0], 'DATA.MEAN is [0.0], but must have 2 entries'),
    ('TRAIN.MODE', 'half', "TRAIN.MODE is 'half', but must be one of pixel, Elem"),
    ('TRAIN.STAGES', [{'EPOCH': 0, 'RATE': 1}], 'TRAIN.STAGES[0].EPOCH is 0, but must be at least 1'),
    ('TRAIN.STAGES', [{'EPOCH': 1, 'RATE': 2}], 'TRAIN.STAGES[0].RATE is 2.0, but must be between 0 and 1'),
    ('TRAIN.LR', 'fast', "config: TRAIN.LR is 'fast', but must be float, like 0.1"),
    ('TRAIN.RL', 1, 'config: unknown key TRAIN.RL; the nearest known key is TRAIN.LR'),
])
def test_checked_values(name, value, message):
    config = SETTINGS.defaults()
    section, _, leaf = name.rpartition('.')
    (config[section] if section else config)[leaf] = value
    with pytest.raises(UserError) as error:
        SETTINGS.checked(config)
    assert str(error.value) == message


def test_checked_returns_a_frozen_copy_with_the_types_of_the_keys():
    config = SETTINGS.defaults()
    config.BASE, config.TRAIN.LR, config.SAVE, config.TRAIN.MODE, config.DATA.SIZE = ['x'], 1, None, 'ELEM', '10000'
    checked = SETTINGS.checked(config)
    assert (checked.BASE, checked.TRAIN.LR, checked.SAVE, checked.DATA.SIZE) == ([''], 1.0, '', 10000)
    assert checked.TRAIN.MODE == 'ELEM' and type(checked.TRAIN.LR) is float
    assert checked.is_frozen() and checked.TRAIN.is_frozen() and not config.is_frozen() and config.BASE == ['x']


def test_with_values_returns_a_frozen_copy():
    config = SETTINGS.checked(SETTINGS.defaults())
    changed = SETTINGS.with_values(config, {'TRAIN.LR': 2, 'DATA.MEAN': [0, 0], 'TRAIN.OPTIMIZER.EPS': np.float64(0.5)})
    assert changed.TRAIN.OPTIMIZER.EPS == 0.5 and type(changed.TRAIN.OPTIMIZER.EPS) is float
    assert (changed.TRAIN.LR, changed.DATA.MEAN) == (2.0, [0.0, 0.0])
    assert (config.TRAIN.LR, config.DATA.MEAN) == (0.1, [0.5, 0.4])
    with pytest.raises(AttributeError):
        changed.TRAIN.LR = 3.0
