"""Settings of a program: keys from YAML files and flags, checked against a table of defaults.

Precedence: defaults < files named in BASE < the YAML file < flags < `-opts`.
Nothing here imports Paddle, so a mistake on the command line is reported at once.
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


def invalid(name, value, why):
    """Return the UserError for a key with an invalid value. why: continues after "but", with the remedy."""
    return UserError(f'{name} is {one_line(repr(value))}, but {why}')


@dataclasses.dataclass(frozen=True)
class Key:
    """The default of a key, which determines its type, and the limits on its values.

    low, high: inclusive bounds of a number, or of each number in a list; high requires low
    choices: valid strings, compared without regard to case
    length: required length of a list
    null: what `null` in older YAML files means; None: `null` is an error
    fields: {name: Key} of each mapping in a list of mappings
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
        """The Key for each entry of a list."""
        if self.fields:
            return Key({name: key.default for name, key in self.fields.items()}, fields=self.fields)
        return Key(self.default[0], self.low, self.high)

    def read(self, value, name):
        """Convert a value to the key's type. name: the key's name, for errors.

        A string is parsed as a Python literal if the key takes a number, list or bool: PyYAML reads `1e-4` as a string,
        and every value on the command line is one.
        Raises: UserError for a value with a different type, and for infinity and NaN.
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
        raise invalid(name, value, f'must be {described}, like {example!r}')

    def check(self, value, name):
        """Raise a UserError for a value of the right type that is not valid. name: the key's name."""
        if isinstance(value, list):
            if self.length not in (None, len(value)):
                raise invalid(name, value, f'must have {self.length} entries')
            for index, item in enumerate(value):
                self.entry.check(item, f'{name}[{index}]')
        elif isinstance(value, dict):
            for field, key in self.fields.items():
                key.check(value[field], f'{name}.{field}')
        elif isinstance(value, str):
            if self.choices and value.lower() not in map(str.lower, self.choices):
                raise invalid(name, value, f'must be one of {", ".join(self.choices)}')
        elif not self.low <= value <= self.high:
            bounds = f'at least {self.low}' if self.high == math.inf else f'between {self.low} and {self.high}'
            raise invalid(name, value, f'must be {bounds}')


def _literal(text):
    """Parse a string as a Python literal; return the string itself if it is not one."""
    text = text.strip()
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False', 'null': 'None'}.get(text.lower(), text))
    except (ValueError, TypeError, SyntaxError):
        return text


def _is_text(value):
    """Whether a value is a string that can name a file and be written to one."""
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

    keys: {dotted name: Key}; includes BASE, a list of YAML files that are merged before the one that names them
    flags: {flag: (name of its key, placeholder or None, help)}; a boolean flag takes no argument and has no placeholder
    unsupported: {key of older YAML files whose feature does not exist: values, in lower case, that are ignored}; any
        other value is an error
    """

    def __init__(self, keys, flags, unsupported):
        self.keys = keys
        self.flags = flags
        self.unsupported = unsupported
        self.sections = {name[:dot.start()] for name in keys for dot in re.finditer(r'\.', name)}

    def defaults(self):
        """Return a new config with the defaults, not frozen. It shares no values with other configs."""
        config = CfgNode()
        for name, key in self.keys.items():
            _put(config, name, copy.copy(key.default))
        return config

    def set(self, config, name, value, source):
        """Set a key by its dotted name. source: where the value comes from, for errors.

        Raises: UserError for an unknown key or a value of the wrong type.
        """
        if name in self.unsupported:
            if str(value).lower() not in self.unsupported[name]:
                raise invalid(f'{source}: {name}', value, 'is not supported: remove it')
            return
        if name == 'BASE':
            raise invalid(f'{source}: BASE', value, 'takes effect only at the top of a YAML file')
        if name not in self.keys:
            name = one_line(name)
            raise UserError(f'{source}: unknown key {name}; the nearest known key is {self._nearest(name)}')
        _put(config, name, self.keys[name].read(value, f'{source}: {name}'))

    def _nearest(self, name):
        """Return the key most similar to a name, ignoring case. The last part counts most: users mix up sections.

        The first key that contains that part as a whole word wins: LR means the first key that ends in LR.
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
        """Merge a YAML file into a config, after the files in its BASE. parents: files whose BASE led to this one.

        Raises: UserError for a file that cannot be read, and as `set`.
        """
        source = one_line(str(path))
        if '\0' in str(path):
            raise UserError(f'{source}: a path cannot contain a NUL character; give another with -cfg')
        if os.path.realpath(path) in parents:
            raise UserError(f'{source}: BASE leads back to this file; remove the cycle')
        tree = _read_yaml(path, source)
        base = tree.pop('BASE', None) or []
        base = [base] if isinstance(base, str) else base
        if not isinstance(base, list) or not all(map(_is_text, base)):
            raise invalid(f'{source}: BASE', base, 'must be a list of file names')
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
                raise invalid(f'{source}: {name}', value, 'is a section: write its keys below it')

    def merge_args(self, config, args):
        """Merge arguments parsed by `parser` into a config, -cfg first and -opts last. args may lack any of the flags.

        Raises: UserError as `merge_file`, and for a key in -opts without a value.
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
                raise UserError(f'-opts: no value after {one_line(pairs[-1])}; give KEY VALUE pairs')
            for name, value in zip(pairs[::2], pairs[1::2]):
                self.set(config, name, value, '-opts')

    def parser(self, description, flags, example):
        """Return an ArgumentParser with -cfg, -opts and the named flags. example: KEY VALUE pairs of -opts for -h."""
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
        """Return {flag that a user may guess from a key: how to set the key}, for the error about an unknown flag."""
        flag_of, meanings = {self.flags[flag][0]: f'-{flag}' for flag in flags}, {}
        for key in self.keys:
            name = key.rpartition('.')[2].lower()
            for part in () if key == 'BASE' else (name, re.sub('^(num|base)_', '', name)):
                meanings.setdefault(f'-{part}', flag_of.get(key, f'-opts {key} VALUE'))
        return meanings

    def checked(self, config):
        """Return a frozen, validated copy of a config, with values converted to the types of their keys and BASE empty.

        Raises: UserError that names key, value and remedy.
        """
        values = {name: value for name, value in leaves(config) if name != 'BASE'}
        checked = self.with_values(self.defaults(), values)
        for name, value in leaves(checked):
            self.keys[name].check(value, name)
        return checked

    def with_values(self, config, values):
        """Return a frozen copy of a config with changes. values: {dotted name: value}. Raises: UserError as `set`."""
        changed = config.clone()
        for name, value in values.items():
            self.set(changed, name, value, 'config')
        changed.freeze()
        return changed


def _put(config, name, value):
    """Set a dotted name in a config, creating missing sections."""
    *sections, leaf = name.split('.')
    for section in sections:
        config = config.setdefault(section, CfgNode())
    config[leaf] = value


def _read_yaml(path, source):
    """Read the mapping in a YAML file; {} for an empty file. source: the path, for errors."""
    check_regular(path)
    try:
        with open(path, encoding='utf-8') as file:
            tree = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise UserError(f'{source}: cannot read the config file ({error.strerror}); give one with -cfg') from None
    # PyYAML's own errors, and others that it raises for values like the date 2022-02-30 or `!!int ""`
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f'{source}: not a YAML file ({one_line(str(error))}); fix it, or give another with '
                        '-cfg') from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(f'{source}: contains {one_line(repr(tree))}, but must be a mapping of keys to values')
    return tree


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but duplicate keys are errors: PyYAML would silently use the last one."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'duplicate key {name}', node.start_mark)
        return super().construct_mapping(node, deep)


def add_device_flag(parser):
    """Add the flag -device to a parser, for `prepare_runtime` and `use_device` of runtime/program.py."""
    parser.add_argument('-device', choices=['gpu', 'cpu'], help='gpu: fail if no GPU is found; cpu: use the CPU '
                        'even if a GPU is found (default: the GPU if one is found, otherwise the CPU)')


class ArgumentParser(argparse.ArgumentParser):
    """argparse with exact single-dash flags, values that may start with a minus, and one-line errors.

    meanings: {flag that a user may guess: what to give instead}, for the error about an unknown flag.
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
        """Return what an unknown flag may have meant; '' if it is not a flag or resembles none."""
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
        """Disable abbreviations: `allow_abbrev=False` affects only double-dash flags (Python 3.9 to 3.13)."""
        return []

    def _parse_optional(self, arg_string):
        """Treat a number or list of numbers that starts with a minus, like `-1e-5`, as a value, never as a flag."""
        try:
            float(arg_string.strip('[](),').split(',')[0])
            return None
        except ValueError:
            return super()._parse_optional(arg_string)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())} (see -h)\n')
