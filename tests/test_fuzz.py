"""Random mutations of the YAML files and of command lines, and arbitrary text in place of a YAML file.

Whatever comes runs, or is refused in one line; a case is drawn from its number alone.
"""
import datetime
import itertools
import random
import re

import pytest
import yaml
from conftest import NARROW, ROOT, with_lists
from hypothesis import example, given, settings
from hypothesis import strategies as st

import config as config_module
import engine
from config import get_config, get_parser, leaves, resolve_config, update_config, with_values
from datasets import get_stage
from run import build_loader, start_run
from runtime import checkpoint
from utils import UserError

PATHS = sorted((ROOT / 'configs').glob('*.yaml'))
DEFAULTS = config_module._DEFAULTS
SECTIONS = sorted(config_module._SECTIONS)
WILD = [None, True, False, -1, 0, 1, 3, 2.5, -0.5, 10 ** 30, 10 ** 400, 1e300, float('nan'), float('inf'), '', '7',
        '1e-4', '0x10', '1' * 5000, 'x', 'None', '[1, 2]', 'a\nb', 'a\0b', [], [1], [0.5, 0.1], [1] * 5, [2.0] * 5,
        [[1]] * 5, [None], {}, {'A': 1}, [{}], [{'EPOCH': 1}], datetime.date(2022, 1, 1), b'x', {1, 2}]


def is_one_line(error):
    return len(str(error).splitlines()) == 1 and len(str(error)) < 1500


def likely(key, rng):
    """A value for a key that is often a good one, alone."""
    default = DEFAULTS[key]
    if key in config_module._CHOICES:
        return rng.choice(config_module._CHOICES[key])
    if key == 'TRAIN.CURRICULUM':
        epochs = sorted(rng.sample(range(2, 30), rng.randrange(3)))
        return [{'EPOCH': epoch, 'IMAGE_SIZE': rng.randrange(1, 65), 'AUTO_AUGMENT_STRENGTH': rng.choice([0, 0, 0.5])}
                for epoch in [1, *epochs]]

    def number(value):
        low, high = config_module._RANGE[key]
        if rng.random() < 0.1:
            return rng.choice([low, high])
        value = rng.choice([value, value * rng.uniform(0.5, 2), rng.uniform(0, 1), rng.randrange(1, 9)])
        return min(max(type(low)(value) if isinstance(default, int) else value, low), high)
    if isinstance(default, bool):
        return rng.random() < 0.5
    if isinstance(default, list) and key != 'BASE':
        return [int(number(item)) if isinstance(item, int) else number(item) for item in default]
    if isinstance(default, (int, float)):
        return int(number(default)) if isinstance(default, int) else number(default)
    return default


def node_of(tree, key):
    """The mapping that holds a dotted key, made where it is missing, and the last part of the key."""
    *parents, leaf = key.split('.')
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    return tree, leaf


def mutate_tree(tree, rng):
    key = rng.choice(sorted(DEFAULTS))
    node, leaf = node_of(tree, key)
    kind = rng.choice(['likely'] * 24 + ['outside'] * 3 + ['wild', 'delete', 'typo', 'section', 'swap', 'other key',
                                                           'length', 'move'])
    if kind == 'likely':
        node[leaf] = likely(key, rng)
    elif kind == 'outside':
        value, wrong = likely(key, rng), rng.choice([-1, 0, 10 ** 12, -0.5, 1e30])
        node[leaf] = [*value[:-1], wrong] if isinstance(value, list) else wrong
    elif kind == 'wild':
        node[leaf] = rng.choice(WILD)
    elif kind == 'delete':
        node.pop(leaf, None)
    elif kind == 'typo':
        at = rng.randrange(len(leaf))
        node[leaf[:at] + rng.choice(['', '_', 'X', leaf[at].lower(), '\n', '-']) + leaf[at + 1:]] = likely(key, rng)
    elif kind == 'section':
        node, leaf = node_of(tree, rng.choice(SECTIONS))
        node[leaf] = rng.choice([*WILD, {rng.choice(WILD[:10]): 1}])
    elif kind == 'swap':
        first, second = rng.sample([name for name in SECTIONS if '.' not in name], 2)
        tree[first], tree[second] = tree.get(second), tree.get(first)
    elif kind == 'other key':
        node[leaf] = likely(rng.choice(sorted(DEFAULTS)), rng)
    elif kind == 'length':
        value = likely(key, rng)
        node[leaf] = (value if isinstance(value, list) else [value]) * rng.randrange(3)
    else:
        node, name = node_of(tree, rng.choice(sorted(DEFAULTS)))
        node[leaf] = likely(key, rng)


def mutate_text(text, rng):
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.choice(['indent', 'double', 'drop', 'cut', 'noise', 'tab'])
    if kind == 'indent':
        lines[at] = ' ' * rng.randrange(1, 4) + lines[at]
    elif kind == 'double':
        lines.insert(at, lines[at])
    elif kind == 'drop':
        del lines[at]
    elif kind == 'tab':
        lines[at] = '\t' + lines[at]
    else:
        end = rng.randrange(len(lines[at]))
        lines[at] = lines[at][:end] + (rng.choice('{}[]:,&*!|>\'"%@`#-\x07\u2028é') + lines[at][end:]
                                       if kind == 'noise' else '\n')
    return ''.join(lines)


def mutated(number):
    """(path of a config, the text of a mutation of it)."""
    rng = random.Random(number)
    path = rng.choice(PATHS)
    tree = yaml.safe_load(path.read_text())
    for _ in range(rng.choice([1, 1, 2, 2, 3, 6])):
        mutate_tree(tree, rng)
    text = yaml.safe_dump(tree, sort_keys=False)
    return path, mutate_text(text, rng) if rng.random() < 0.15 else text


# what a test cannot pay, by time and memory alone: larger values than these have passed every check when they are cut
LARGEST = {'MODEL.NUM_CLASSES': 1000, 'MODEL.NUM_BLOCKS': 2, 'MODEL.CHANNELS': 16, 'MODEL.EXPANSIONS': 4.0,
           'MODEL.NUM_BRANCHES': 4, 'DATA.BATCH_SIZE': 8, 'DATA.BATCH_SIZE_EVAL': 8, 'DATA.IMAGE_SIZE': 64,
           'TRAIN.CURRICULUM.IMAGE_SIZE': 64, 'DATA.NUM_WORKERS': 0, 'TRAIN.RAND_AUGMENT_LAYERS': 10,
           'TRAIN.RANDOM_ERASE_COUNT': 10}


def cut(key, value):
    if isinstance(value, list):
        return [cut(key, item) for item in value]
    if isinstance(value, dict):
        return {name: cut(f'{key}.{name}', item) for name, item in value.items()}
    return min(value, LARGEST[key]) if key in LARGEST else value


def two_steps(config):
    """Do with a config what `run.run` does, but for its folder: two optimizer steps, then an evaluation."""
    config = resolve_config(config)
    config = with_values(config, {'DATA.CROP_PCT': max(config.DATA.CROP_PCT, 0.1), **{
        key: cut(key, value) for key, value in leaves(config) if key.rpartition('.')[0] and key in LARGEST
        or key == 'TRAIN.CURRICULUM'}})
    loaders = [build_loader(config, is_train, config.TRAIN.LAST_EPOCH + 1) for is_train in (True, False)]
    for path in (config.MODEL.PRETRAINED, config.MODEL.RESUME):
        checkpoint.check_exists(path)
    training, done = start_run(config, loaders[0]).training, config.TRAIN.LAST_EPOCH
    batches = itertools.chain.from_iterable(itertools.repeat(loaders[0]))
    before = training.model.fc.weight.numpy()
    first = done * training.schedule.steps_per_epoch
    for step, window in zip((first, first + 1), engine.windows(batches, config.TRAIN.ACCUM_ITER)):
        assert window[0][0].shape[1] == get_stage(config, done + 1).image_size
        sums = engine.train_step(training, window, step)
    assert (training.model.fc.weight.numpy() != before).any() or training.schedule.lr(first) < 1e-6
    metrics = engine.evaluate([('raw', training.model)], loaders[1], training.normalize)['raw']
    for loss in (float(sums[0]), metrics.loss):
        engine.check_finite(loss, 'the loss')


def test_mutations_of_the_yaml_files(fashion, long, tmp_path):
    """Each trains two steps on a narrow network, or is refused in a line that names a key or the place in the file."""
    lines = {split: (fashion / f'{split}_list.txt').read_text().splitlines() for split in ('train', 'val')}
    data = with_lists(fashion, tmp_path / 'data', train=lines['train'][:8], val=lines['val'][:4])
    own = {**dict(zip(NARROW[::2], NARROW[1::2])), 'DATA.DATA_PATH': str(data), 'DATA.BATCH_SIZE': 4,
           'DATA.NUM_WORKERS': 0, 'MODEL.NUM_CLASSES': 10, 'TRAIN.CURRICULUM': [
               {'EPOCH': 1, 'IMAGE_SIZE': 24, 'AUTO_AUGMENT_STRENGTH': 0.0}]}
    for path in PATHS:
        (tmp_path / path.name).write_text(path.read_text())
    file, ran, refused = tmp_path / 'mutated.yaml', [], {}
    count = 500 if long else 50
    for number in range(count):
        path, text = mutated(number)
        file.write_text(text)
        try:
            before, config = dict(leaves(get_config(str(path)))), get_config(str(file))
            two_steps(with_values(config, {key: value for key, value in own.items()
                                           if before[key] == dict(leaves(config))[key]}))
            ran.append(number)
        except UserError as error:
            assert is_one_line(error), f'case {number}: {error}\n{text}'
            names = '|'.join(sorted({part for key in DEFAULTS for part in key.split('.')}))
            assert re.search(rf'\b({names})\b|mutated.yaml: (not a YAML file|holds)', str(error)), (
                f'case {number}: {error}\n{text}')
            refused[number] = str(error)
        except Exception as error:
            raise AssertionError(f'case {number}: {type(error).__name__}: {error}\n{text}') from error
    print(f'{len(ran)} of {count} mutations ran, {len(refused)} were refused: {refused}')
    assert len(ran) >= count / 4 and len(refused) >= count / 4


def flag_cases(count):
    """Command lines: flags and -opts with values that may be meant for others, and what is no flag at all."""
    rng = random.Random(0)
    values = ['', '0', '-1', '1e-4', '1' * 5000, '0x' + 'f' * 9000, '1e999999', 'nan', 'x', 'auto', '[1,2', '(' * 3000,
              '-', '--', '-x', '-opts', 'a\nb', '\udce9', 'None', '{[]: 1}', '~', str(ROOT), '[1, 1, 1, 1, 1]', 'True']
    keys = [*sorted(DEFAULTS), *SECTIONS, 'A', '', 'TRAIN.', '.', 'a\nb', 'x' * 50000, '\udce9', 'BASE.x']
    for _ in range(count):
        argv = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            flag = rng.choice([*config_module._FLAGS, 'cfg', 'opts', 'opts', 'opts', 'opts', 'optss', '-eval', ''])
            if flag == 'opts':
                argv.append('-opts')
                for _ in range(rng.choice([1, 1, 1, 2])):
                    key = rng.choice(keys)
                    argv += [key, str(likely(key, rng)) if key in DEFAULTS and rng.random() < 0.4 else
                             rng.choice(values)]
                if rng.random() < 0.1:
                    argv.pop()
            else:
                value = rng.choice(values)
                argv += rng.choice([[f'-{flag}', value], [f'-{flag}={value}'], [f'-{flag}']])
        yield argv


def test_mutations_of_the_command_line(long, capfd):
    outcomes = []
    for argv in flag_cases(5000 if long else 500):
        try:
            resolve_config(update_config(get_config(), get_parser('test').parse_args(argv)))
            outcomes.append('config')
        except UserError as error:
            assert is_one_line(error), (argv, str(error))
            outcomes.append('UserError')
        except SystemExit as error:
            assert error.code == 2 and len(capfd.readouterr().err.splitlines()) == 1, argv
            outcomes.append('usage')
    assert min(map(outcomes.count, ('config', 'UserError', 'usage'))) >= len(outcomes) / 20


def check_file(path, content):
    """get_config and resolve_config on a file give a config, or a UserError of one line. Returns the error, if any."""
    path.write_bytes(content)
    try:
        assert resolve_config(get_config(str(path))).is_frozen()
    except UserError as error:
        assert is_one_line(error), repr(str(error))
        return str(error)


def test_a_config_file_of_any_text(long, tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'x.yaml'
    words = st.sampled_from(['DATA', 'MODEL', 'SEED', 'BASE', 'TRAIN', 'CURRICULUM', 'NAME', 'BASE_LR', ': ', ':\n  ',
                             '\n', '- ', '[', ']', '{', '}', ', ', '&a ', '*a', '<<: ', '"', "'", '!!', 'int', 'float',
                             'set ', 'binary ', 'timestamp ', 'omap ', 'python/name:os.system ', '|', '>', '%YAML',
                             '---', '0x', '1', '1e9', ':30', '.nan', '-', '~', '? ', '=', '2022-02-30', '\\ud800',
                             '\t', '# '])

    @settings(max_examples=3000 if long else 300, derandomize=True, deadline=None, database=None)
    @given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode()),
                     st.lists(words, max_size=25).map(lambda parts: ''.join(parts).encode())))
    @example(b'')
    def check(content):
        check_file(path, content)
    check()


def test_a_config_file_of_any_values(long, tmp_path_factory):
    path = tmp_path_factory.mktemp('values') / 'x.yaml'
    scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(),
                        st.datetimes(), st.binary(max_size=4), st.sampled_from(['1e-4', 'None', '[1, 2]', 'O1']))
    values = st.recursive(scalars, lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.one_of(st.text(max_size=5), st.integers(), st.dates()), inner,
                                                     max_size=4)), max_leaves=8)
    keys = sorted(DEFAULTS)

    @settings(max_examples=1500 if long else 150, derandomize=True, deadline=None, database=None)
    @given(st.dictionaries(st.one_of(st.sampled_from(keys), st.sampled_from(keys), st.sampled_from(SECTIONS),
                                     st.text(max_size=6)), values, min_size=1, max_size=3))
    def check(changes):
        tree = {}
        for key, value in changes.items():
            node, leaf = node_of(tree, key)
            node[leaf] = value
        check_file(path, yaml.safe_dump(tree, allow_unicode=True).encode('utf-8', 'surrogatepass'))
    check()


def bomb(pattern):
    """YAML of ten anchors, each with ten aliases of the one before. pattern: what makes one, of the aliases."""
    lines = ['a0: &a0 {x: y}']
    lines += [f'a{n}: &a{n} ' + pattern.format(', '.join([f'*a{n - 1}'] * 10)) for n in range(1, 10)]
    return '\n'.join(lines)


@pytest.mark.parametrize('content, message', [
    (bomb('[{}]'), 'its aliases stand for more than 100,000 characters'),
    (bomb('{{<<: [{}]}}'), 'its aliases stand for more than 100,000 characters'),
    (f'SAVE: &a {"x" * 50000}\nDATA: [*a, *a]', 'its aliases stand for more than 100,000 characters'),
    ('DATA: &a [*a]', 'its aliases stand for more'),
    ('DATA: &a {DATA_PATH: *a}', 'its aliases stand for more'),
    ('SEED: 1\n' * 20000, 'more than 100,000 bytes'),
    ('[' * 50000, 'nested too deep'),
    ('DATA: ' + '[' * 900 + ']' * 900, 'nested too deep'),
    ('{SEED: ' * 9000, 'nested too deep'),
    ('- ' * 40000, 'nested too deep'),
    ('TRAIN: {BASE_LR: ' + '[' * 60 + ']' * 60 + '}', 'TRAIN.BASE_LR is .*, but must be float'),
    ('SEED: ' + '9' * 10 ** 4, 'digits'),
    ('SEED: 0x' + 'f' * 90000, 'SEED is a number of too many digits, but must be between'),
    ('MODEL: {NAME: 0x' + 'f' * 90000 + '}', 'MODEL.NAME is a number of too many digits, but must be str'),
    ('? 0x' + 'f' * 90000 + '\n: 1', 'unknown key a number of too many digits'),
    ('TRAIN: {BASE_LR: 0x' + 'f' * 90000 + '}', 'TRAIN.BASE_LR is a number of too many digits, but must be float'),
    ('TRAIN: {BASE_LR: 1e999999}', 'TRAIN.BASE_LR is inf, but must be float'),
    ('TRAIN: {BASE_LR: 1.0e+999999}', 'TRAIN.BASE_LR is inf, but must be float'),
    ('TRAIN: {BASE_LR: 1' + ':30' * 9000 + '.5}', 'not a YAML file'),
    ('SEED: !!int ""', 'not a YAML file'),
    ('EVAL: !!bool x', 'not a YAML file'),
    ('MODEL: {NAME: !!timestamp x}', 'not a YAML file'),
    ('? [a]\n: 1', 'not a YAML file'),
    ('? ' + 'a' * 90000 + '\n: 1', 'unknown key a+...; the nearest known key is'),
    ('"a\\nb": 1', 'unknown key a b; the nearest'),
    ('SAVE: "a\\u2028b"', 'SAVE is .*, but must be str'),
    ('SAVE: "a\\nb"', 'SAVE is .*, but must be str'),
    ('SAVE: "\\ud800"', 'SAVE is .*, but must be str'),
    ('SAVE: !!set {a, b}', 'SAVE is .*, but must be str'),
    ('MODEL: {TYPE: ' + 'x' * 90000 + '}', "MODEL.TYPE is 'x+..., but must be one of MobileOne"),
    ('DATA: {CROP_SCALE: [' + '0.5, ' * 15000 + ']}', 'DATA.CROP_SCALE is .*..., but must have 2 entries'),
    ('MODEL: {STRIDES: [' + '1, ' * 30000 + ']}', 'MODEL.STRIDES is .*..., but must be five numbers'),
], ids=lambda text: text[:24])
def test_files_that_are_traps(tmp_path, content, message):
    assert re.search(message, check_file(tmp_path / 'x.yaml', content.encode()))


def test_aliases_and_merge_keys_work(tmp_path):
    assert check_file(tmp_path / 'x.yaml', b'MODEL: {NUM_BRANCHES: &a [2, 2, 2, 2, 2], STRIDES: *a}\n'
                                           b'DATA: &b {IMAGE_SIZE: 64}\nTRAIN: {OPTIMIZER: {<<: {EPS: 1e-7}}}') is None
    config = get_config(str(tmp_path / 'x.yaml'))
    assert config.MODEL.STRIDES == [2] * 5 and config.TRAIN.OPTIMIZER.EPS == 1e-7
