"""Random mistakes, several at once, of the kinds that people make in YAML files and on command lines.

Each case must run or be refused in one line. A case depends only on its number.
"""
import datetime
import itertools
import math
import random
import re

import yaml
from conftest import NARROW, ROOT, with_lists
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from config import FLAGS, KEYS, SETTINGS, get_config, get_parser, resolve_config, update_config, with_values
from datasets import get_stage
from run import build_loader, start_run
from runtime import checkpoint
from runtime.settings import leaves
from utils import UserError

PATHS = sorted((ROOT / 'configs').glob('*.yaml'))
SECTIONS = sorted(SETTINGS.sections)
# values that have the wrong type for most keys, or the right type in disguise
WRONG = [None, True, False, 1, 2.5, float('nan'), float('inf'), '', '7', '1e-4', 'x', 'None', '[1, 2]', [], [1],
         [0.5, 0.1], [1] * 5, [2.0] * 5, [[1]] * 5, [None], {}, {'A': 1}, [{}], [{'EPOCH': 1}],
         datetime.date(2022, 1, 1)]


def is_one_line(error):
    return len(str(error).splitlines()) == 1 and len(str(error)) < 1500


def likely(key, rng):
    """Draw a value for a key that is often valid by itself."""
    known, default = KEYS[key], KEYS[key].default
    if known.choices:
        return rng.choice(known.choices)
    if key == 'TRAIN.CURRICULUM':
        epochs = sorted(rng.sample(range(2, 30), rng.randrange(3)))
        return [{'EPOCH': epoch, 'IMAGE_SIZE': rng.randrange(1, 65), 'AUTO_AUGMENT_STRENGTH': rng.choice([0, 0, 0.5])}
                for epoch in [1, *epochs]]

    def number(value):
        bounds = [bound for bound in (known.low, known.high) if math.isfinite(bound)]
        if rng.random() < 0.1:
            return type(value)(rng.choice(bounds))
        drawn = rng.choice([value, value * rng.uniform(0.5, 2), rng.uniform(0, 1), rng.randrange(1, 9)])
        return type(value)(min(max(drawn, known.low), known.high))
    if isinstance(default, bool):
        return rng.random() < 0.5
    if isinstance(default, list) and key != 'BASE':
        return [number(item) for item in default]
    return number(default) if isinstance(default, (int, float)) else default


def outside(key, rng):
    """Draw a number just outside a key's bounds or with the wrong sign; for a list, it replaces the last entry."""
    known, value = KEYS[key], likely(key, rng)
    number = rng.choice([0, -1, -0.5, known.low - 1, known.low - 1e-3, known.high + 1, known.high + 1e-3])
    return [*value[:-1], number] if isinstance(value, list) else number


def node_of(tree, key):
    """Return the mapping that contains a dotted key, created if missing, and the last part of the key."""
    *parents, leaf = key.split('.')
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    return tree, leaf


def mutate_tree(tree, rng):
    key = rng.choice(sorted(KEYS))
    node, leaf = node_of(tree, key)
    kind = rng.choice(['likely'] * 24 + ['outside'] * 3 + ['type', 'delete', 'typo', 'section', 'swap', 'other key',
                                                           'length', 'move'])
    if kind == 'likely':
        node[leaf] = likely(key, rng)
    elif kind == 'outside':
        node[leaf] = outside(key, rng)
    elif kind == 'type':
        node[leaf] = rng.choice(WRONG)
    elif kind == 'delete':
        node.pop(leaf, None)
    elif kind == 'typo':
        at = rng.randrange(len(leaf))
        node[leaf[:at] + rng.choice(['', '_', 'X', leaf[at].lower(), '-']) + leaf[at + 1:]] = likely(key, rng)
    elif kind == 'section':
        node, leaf = node_of(tree, rng.choice(SECTIONS))
        node[leaf] = rng.choice([*WRONG, {rng.choice(WRONG[:12]): 1}])
    elif kind == 'swap':
        first, second = rng.sample([name for name in SECTIONS if '.' not in name], 2)
        tree[first], tree[second] = tree.get(second), tree.get(first)
    elif kind == 'other key':
        node[leaf] = likely(rng.choice(sorted(KEYS)), rng)
    elif kind == 'length':
        value = likely(key, rng)
        value = value if isinstance(value, list) else [value]
        node[leaf] = rng.choice([value[:-1], value + value[-1:], value * 2])
    else:
        node, name = node_of(tree, rng.choice(sorted(KEYS)))
        node[leaf] = likely(key, rng)


def mutate_text(text, rng):
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.choice(['indent', 'double', 'drop', 'cut', 'stray', 'tab'])
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
        lines[at] = lines[at][:end] + (rng.choice('{}[]:,\'"#-é') + lines[at][end:] if kind == 'stray' else '\n')
    return ''.join(lines)


def mutated(number):
    """Return (path of a config, text of a mutation of it)."""
    rng = random.Random(number)
    path = rng.choice(PATHS)
    tree = yaml.safe_load(path.read_text())
    for _ in range(rng.choice([1, 1, 2, 2, 3, 6])):
        mutate_tree(tree, rng)
    text = yaml.safe_dump(tree, sort_keys=False)
    return path, mutate_text(text, rng) if rng.random() < 0.15 else text


# limits that keep the tests fast and small; larger values are reduced only after passing every check
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
    """Run two optimizer steps and an evaluation with a config, as `run.run` does, but without a folder."""
    config = resolve_config(config)
    config = with_values(config, {'DATA.CROP_PCT': max(config.DATA.CROP_PCT, 0.1), **{
        key: cut(key, value) for key, value in leaves(config) if key.rpartition('.')[0] and key in LARGEST
        or key == 'TRAIN.CURRICULUM'}})
    loaders = [build_loader(config, is_train, config.TRAIN.LAST_EPOCH + 1) for is_train in (True, False)]
    for key in ('PRETRAINED', 'RESUME'):
        checkpoint.check_exists(config.MODEL[key], f'MODEL.{key}')
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
    """Each config trains a narrow network for two steps, or gives a one-line error that names a key or a place."""
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
            names = '|'.join(sorted({part for key in KEYS for part in key.split('.')}))
            named = rf'\b({names})\b|mutated.yaml: (not a YAML file|contains)|yaml: cannot read the config file'
            assert re.search(named, str(error)), f'case {number}: {error}\n{text}'
            refused[number] = str(error)
        except Exception as error:
            raise AssertionError(f'case {number}: {type(error).__name__}: {error}\n{text}') from error
    print(f'{len(ran)} of {count} mutations ran, {len(refused)} were refused: {refused}')
    assert len(ran) >= count / 4 and len(refused) >= count / 4


def flag_cases(count):
    """Yield command lines: flags and -opts, some with values meant for other keys, and arguments that are not flags."""
    rng = random.Random(0)
    values = ['', '0', '-1', '1e-4', '1e999', 'nan', 'x', 'auto', '[1,2', '-', '--', '-x', '-opts', '\udce9', 'None',
              '{[]: 1}', '~', str(ROOT), '[1, 1, 1, 1, 1]', 'True']
    keys = [*sorted(KEYS), *SECTIONS, 'A', '', 'TRAIN.', '.', 'TRAIN.LR', 'train.base_lr', '\udce9', 'BASE.x']
    for _ in range(count):
        argv = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            flag = rng.choice([*FLAGS, 'cfg', 'opts', 'opts', 'opts', 'opts', 'optss', '-eval', ''])
            if flag == 'opts':
                argv.append('-opts')
                for _ in range(rng.choice([1, 1, 1, 2])):
                    key = rng.choice(keys)
                    argv += [key, str(likely(key, rng)) if key in KEYS and rng.random() < 0.4 else
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


def test_values_with_random_types(long, tmp_path):
    """Any YAML value anywhere in a file gives a config or a one-line error."""
    path = tmp_path / 'x.yaml'
    scalars = st.one_of(st.booleans(), st.integers(-1000, 1000), st.floats(), st.dates(), st.sampled_from(WRONG))
    values = st.recursive(scalars, lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from(['A', 'EPOCH', 'NAME', 1, None]), inner,
                                                     max_size=3)), max_leaves=8)

    @settings(max_examples=1500 if long else 150, derandomize=True, deadline=None, database=None)
    @given(st.dictionaries(st.sampled_from([*sorted(KEYS) * 3, *SECTIONS]), values, min_size=1, max_size=3))
    def check(changes):
        tree = {}
        for key, value in changes.items():
            node, leaf = node_of(tree, key)
            node[leaf] = value
        path.write_text(yaml.safe_dump(tree))
        try:
            assert resolve_config(get_config(str(path))).is_frozen()
        except UserError as error:
            assert is_one_line(error), repr(str(error))
    check()
