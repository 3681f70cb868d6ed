"""Settings of a program: keys from YAML files and flags, by a table of defaults.

The order of precedence is: defaults < files named in BASE < the YAML file < flags < `-opts`.
Nothing here imports Paddle, so a wrong command line is answered at once.
"""
import argparse
import ast
import copy
import dataclasses
import difflib
import math
import os
import re

import yaml
from yacs.config import CfgNode

from runtime.files import check_regular
from utils import UserError, one_line, program_name


def refusal(name, value, why):
    """The UserError of a key whose value cannot be. why: what goes on after "but", with the remedy."""
    return UserError(f'{name} is {one_line(repr(value))}, but {why}')


@dataclasses.dataclass(frozen=True)
class Key:
    """What a key is by default, which decides its type, and what else it may be.

    low, high: inclusive bounds of a number, or of each number of a list; high only with low
    choices: what a text may be, compared without regard to case
    length: of a list
    null: what `null` of older YAML files means; without it `null` is refused
    fields: of each mapping in a list of mappings, {name: Key}
    """
    default: object  # bool, int, float, str, a list of one of them, or [] for a list of mappings
    low: float = -math.inf
    high: float = math.inf
    choices: tuple = ()
    length: int = None
    null: object = None
    fields: dict = None

    @property
    def entry(self):
        """The key of each entry of a list."""
        if self.fields:
            return Key({name: key.default for name, key in self.fields.items()}, fields=self.fields)
        return Key(self.default[0], self.low, self.high)

    def read(self, value, name):
        """A value as the type of the key. name: the key's, for errors.

        Text is read as a Python literal where a number, a list or a truth value is meant: PyYAML takes `1e-4` for text,
        and the command line has nothing else.
        Raises: UserError for a value of another type, an infinite one, or one that is not a number.
        """
        kind = type(self.default)
        if isinstance(value, str) and kind is not str:
            value = _literal(value)
        if value is None and self.null is not None:
            return copy.copy(self.null)
        if kind is list and isinstance(value, (list, tuple)):
            return [self.entry.read(item, f'{name}[{index}]') for index, item in enumerate(value)]
        if kind is dict and isinstance(value, dict) and set(value) == set(self.fields):
            return {field: key.read(value[field], f'{name}.{field}') for field, key in self.fields.items()}
        if kind is str and not isinstance(value, (bool, dict, list, tuple, set, type(None))) and _is_text(str(value)):
            return str(value)
        if kind is float and isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value):
            return float(value)
        if kind in (bool, int) and type(value) is kind:
            return value
        example = self.default if self.default != [] else [self.entry.default]
        described = f'a list of {type(example[0]).__name__}' if kind is list else kind.__name__
        raise refusal(name, value, f'must be {described}, like {example!r}')

    def check(self, value, name):
        """Raise a UserError for a value, of the key's type, that it may not be. name: the key's."""
        if isinstance(value, list):
            if self.length not in (None, len(value)):
                raise refusal(name, value, f'must have {self.length} entries')
            for index, item in enumerate(value):
                self.entry.check(item, f'{name}[{index}]')
        elif isinstance(value, dict):
            for field, key in self.fields.items():
                key.check(value[field], f'{name}.{field}')
        elif isinstance(value, str):
            if self.choices and value.lower() not in map(str.lower, self.choices):
                raise refusal(name, value, f'must be one of {", ".join(self.choices)}')
        elif not self.low <= value <= self.high:
            bounds = f'at least {self.low}' if self.high == math.inf else f'between {self.low} and {self.high}'
            raise refusal(name, value, f'must be {bounds}')


def _literal(text):
    """What a text means as a Python literal; the text itself where it is none."""
    text = text.strip()
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False', 'null': 'None'}.get(text.lower(), text))
    except (ValueError, TypeError, SyntaxError):
        return text


def _is_text(value):
    """Whether a value is text that can be the name of a file and be written to one."""
    return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)


def leaves(node, prefix=''):
    """Yield (dotted name, value) of every key below a config node."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


class Settings:
    """The keys and flags of a program. Its configs are CfgNodes.

    keys: {dotted name: Key}; BASE, YAML files that are merged before the one that names them, is one of them
    flags: {flag: (name of its key, placeholder or None, help)}; a truth value has no placeholder, for it takes no
        argument
    unsupported: names of older YAML files whose feature is not there: False is ignored, anything else an error
    """

    def __init__(self, keys, flags, unsupported=()):
        self.keys = keys
        self.flags = flags
        self.unsupported = unsupported
        self.sections = {name[:dot.start()] for name in keys for dot in re.finditer(r'\.', name)}

    def defaults(self):
        """A config of the defaults, not frozen: what is changed in it changes no other."""
        config = CfgNode()
        for name, key in self.keys.items():
            _put(config, name, copy.copy(key.default))
        return config

    def set(self, config, name, value, source):
        """Set a key by its dotted name. source: where the value is from, for errors.

        Raises: UserError for an unknown key or a value of the wrong type.
        """
        if name in self.unsupported:
            if value not in (False, 'False', 'false'):
                raise refusal(f'{source}: {name}', value, 'is not supported: remove it')
            return
        if name == 'BASE':
            raise refusal(f'{source}: BASE', value, 'takes effect only at the top of a YAML file')
        if name not in self.keys:
            name = one_line(name)
            raise UserError(f'{source}: unknown key {name}; the nearest known key is {self._nearest(name)}')
        _put(config, name, self.keys[name].read(value, f'{source}: {name}'))

    def _nearest(self, name):
        """The key most like a name, without regard to case; the last part counts most, for sections are mixed up.

        The first key of which that is a whole word goes first: of the keys that end in LR, LR means the main one.
        """
        word = re.escape(name.rpartition('.')[2].upper().removesuffix('S'))
        for known in self.keys if word else ():
            if re.search(rf'[._]{word}S?([._]|$)', f'.{known.partition(".")[2] or known}'):
                return known

        def likeness(known):
            pairs = [(name, known), (name.rpartition('.')[2], known.rpartition('.')[2])]
            whole, last = (difflib.SequenceMatcher(None, a.upper(), b).ratio() for a, b in pairs)
            return last + 0.5 * whole
        return max(self.keys, key=likeness)

    def merge_file(self, config, path, parents=()):
        """Merge a YAML file into a config, the files of its BASE first. parents: the files whose BASE led to it.

        Raises: UserError for a file that cannot be read, and as `set`.
        """
        source = one_line(str(path))
        if '\0' in str(path):
            raise UserError(f'{source}: no file can have this name; give one with -cfg')
        if os.path.realpath(path) in parents:
            raise UserError(f'{source}: BASE leads back to this file; remove the circle')
        tree = _read_yaml(path, source)
        base = tree.pop('BASE', None) or []
        base = [base] if isinstance(base, str) else base
        if not isinstance(base, list) or not all(map(_is_text, base)):
            raise refusal(f'{source}: BASE', base, 'must be a list of file names')
        for name in filter(None, base):
            self.merge_file(config, os.path.join(os.path.dirname(path), name), (*parents, os.path.realpath(path)))
        self._merge_tree(config, tree, source)

    def _merge_tree(self, config, tree, source, prefix=''):
        for part, value in tree.items():
            name = f'{prefix}{part}'
            if name not in self.sections:
                self.set(config, name, value, source)
            elif isinstance(value, dict):
                self._merge_tree(config, value, source, f'{name}.')
            elif value is not None:  # a section without keys
                raise refusal(f'{source}: {name}', value, 'is a section: write its keys below it')

    def merge_args(self, config, args):
        """Merge what `parser` has parsed into a config, -cfg first and -opts last. args may lack any of the flags.

        Raises: UserError as `merge_file`, and for a key of -opts without a value.
        """
        config.defrost()
        if getattr(args, 'cfg', None):
            self.merge_file(config, args.cfg)
        for flag, (name, _, _) in self.flags.items():
            value = getattr(args, flag, None)
            if value is not None and value is not False:
                self.set(config, name, value, f'-{flag}')
        for pairs in getattr(args, 'opts', None) or []:
            if len(pairs) % 2:
                raise UserError(f'-opts: no value after {one_line(pairs[-1])}; give pairs KEY VALUE')
            for name, value in zip(pairs[::2], pairs[1::2]):
                self.set(config, name, value, '-opts')

    def parser(self, description, flags, example):
        """An ArgumentParser of -cfg, -opts and the named flags. -h shows description, and example as pairs of -opts."""
        parser = ArgumentParser(self._meanings(flags), description=description)
        parser.add_argument('-cfg', metavar='FILE', help='YAML config file, see configs/')
        for flag in flags:
            _, metavar, text = self.flags[flag]
            kind = {'metavar': metavar} if metavar else {'action': 'store_true'}
            parser.add_argument(f'-{flag}', help=text, **kind)
        parser.add_argument('-opts', metavar='KEY VALUE', nargs='*', action='append',
                            help=f'set any key of config.py, e.g. -opts {example} (repeatable)')
        return parser

    def _meanings(self, flags):
        """{-name: what sets its key}, with the names that users may take for flags, for the error of an unknown one."""
        flag_of, meanings = {self.flags[flag][0]: f'-{flag}' for flag in flags}, {}
        for key in self.keys:
            name = key.rpartition('.')[2].lower()
            for part in () if key == 'BASE' else (name, re.sub('^(num|base)_', '', name)):
                meanings.setdefault(f'-{part}', flag_of.get(key, f'-opts {key} VALUE'))
        return meanings

    def checked(self, config):
        """A frozen copy of a config in which each value is of its key's type and one that it may be; BASE is emptied.

        Raises: UserError that names key, value and remedy.
        """
        values = {name: value for name, value in leaves(config) if name != 'BASE'}
        checked = self.with_values(self.defaults(), values)
        for name, value in leaves(checked):
            self.keys[name].check(value, name)
        return checked

    def with_values(self, config, values):
        """A frozen copy of a config with other values. values: {dotted name: value}. Raises: UserError as `set`."""
        changed = config.clone()
        for name, value in values.items():
            self.set(changed, name, value, 'config')
        changed.freeze()
        return changed


def _put(config, name, value):
    """Set a dotted name in a config, its sections made where they are missing."""
    *sections, leaf = name.split('.')
    for section in sections:
        config = config.setdefault(section, CfgNode())
    config[leaf] = value


def _read_yaml(path, source):
    """The mapping that a YAML file holds; an empty one has none. source: the path, for errors."""
    check_regular(path)
    try:
        with open(path, encoding='utf-8') as file:
            tree = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise UserError(f'{source}: cannot read the config file ({error.strerror}); give one with -cfg') from None
    # PyYAML's own, and what else it raises, for values like the date 2022-02-30 or `!!int ""`
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f'{source}: not a YAML file ({one_line(str(error))}); fix it, or give another with '
                        '-cfg') from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f'{source}: holds {one_line(repr(tree))}, but a config file is a mapping of keys to values')
    return tree


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of two equal keys win without a word."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'{name} stands there twice', node.start_mark)
        return super().construct_mapping(node, deep)


def add_device_flag(parser):
    """Give a parser the flag -device, for `prepare_runtime` and `use_device` of runtime/program.py."""
    parser.add_argument('-device', choices=['gpu', 'cpu'], help='gpu: an error if there is none; cpu: even if there is '
                        'a GPU (default: the GPU, or the CPU where there is none)')


class ArgumentParser(argparse.ArgumentParser):
    """argparse with exact single-dash flags, values that may start with a minus, and errors of one line.

    meanings: {what may be taken for a flag: what to give instead}, for the error of an unknown flag.
    """

    def __init__(self, meanings=(), **kwargs):
        super().__init__(prog=program_name(), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.meanings = dict(meanings)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f'unrecognized arguments: {one_line(" ".join(unknown))}{self._suggestion(unknown[0])}')
        return args

    def _suggestion(self, argument):
        """What an unknown flag may have been meant for; '' for what is none, or like none."""
        name = '-' + argument.lstrip('-').partition('=')[0].lower()
        if not argument.startswith('-') or name == '-':
            return ''
        flags = self._option_string_actions
        known = {**self.meanings, **{flag: flag for flag in flags}}
        near = (difflib.get_close_matches(name, known, 1, 0.8)
                or [other for other in known if other.startswith(f'{name}_') or name.startswith(f'{other}_')]
                or difflib.get_close_matches(name, flags, 1, 0.7))
        return f'; did you mean {known[near[0]]}?' if near else ''

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
