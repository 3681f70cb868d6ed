"""Plot the curves of one or more runs into one PNG file: loss, accuracy, learning rate, weight decay, image size.

  python -m tools.plot_log output/s0                               # writes output/s0/curves.png
  python -m tools.plot_log output/a output/b -save compare.png

The legend shows how the runs' configs differ. Needs matplotlib (pip install matplotlib).
"""
import json
import os
import textwrap

from config import UNRELATED, get_config
from runtime.files import replace
from runtime.program import run_program
from runtime.settings import ArgumentParser, leaves
from tools import import_pyplot
from utils import UserError

# panel title -> (field of the records, [(split, weights) of each curve])
PANELS = {
    'training loss': ('loss', [('train', 'raw')]),
    'training top-1 (%)': ('acc1', [('train', 'raw')]),
    'validation loss': ('loss', [('val', 'raw'), ('val', 'ema')]),
    'validation top-1 (%)': ('acc1', [('val', 'raw'), ('val', 'ema')]),
    'learning rate': ('lr', [('train', 'raw')]),
    'weight decay': ('weight_decay', [('train', 'raw')]),
    'training image size (pixels)': ('image_size', [('train', 'raw')]),
}
# largest number of keys whose values are shown in the legend
FEW = 4
FIELDS = {'epoch', 'split', 'weights', *(field for field, _ in PANELS.values())}


def read_log(folder):
    """Return the records of a run's training epochs, without those of separate evaluations (epoch 0).

    Raises: UserError for a log that cannot be read or has no such record.
    """
    path = os.path.join(folder, 'log.jsonl')
    try:
        with open(path, encoding='utf-8') as file:
            lines = file.readlines()
    except OSError as error:
        raise UserError(f'{path}: cannot read the log ({error.strerror}); give the folder of a run') from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith('\n'):  # the run is writing this line, or was killed while writing it
            break
        try:
            row = json.loads(line)
            rows += [{field: row[field] for field in FIELDS}] if row['epoch'] > 0 else []
        except (ValueError, TypeError, KeyError):
            raise UserError(f'{path}:{number}: is not an epoch record: {line.strip()[:80]!r}; remove '
                            'it') from None
    if not rows:
        raise UserError(f'{path}: contains no training epoch yet')
    return rows


def label_runs(folders):
    """Return a label per run, and a table of the keys in which the runs' configs differ.

    With up to FEW keys, the labels are their values, plus the folder where a label is not unique, and the table is ''.
    With more, the labels are the folders.
    """
    configs = [dict(leaves(get_config(os.path.join(folder, 'config.yaml')))) for folder in folders]
    keys = [key for key, value in configs[0].items()
            if key not in UNRELATED and any(config[key] != value for config in configs)]
    names = [os.path.normpath(folder) for folder in folders]
    if len(keys) > FEW:
        return names, tabulate([['', *names], *([key, *(str(config[key]) for config in configs)] for key in keys)])
    labels = ['\n'.join(textwrap.fill(f'{key} {config[key]}', 45) for key in keys) for config in configs]
    return [label if label and labels.count(label) == 1 else '\n'.join(filter(None, [name, label]))
            for name, label in zip(names, labels)], ''


def tabulate(rows):
    """Align rows of texts in columns. Texts over 30 characters keep their end, the most telling part of a path."""
    rows = [[text if len(text) <= 30 else f'...{text[-27:]}' for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(text.ljust(width) for text, width in zip(row, widths)) for row in rows)


def draw(runs, path, table=''):
    """Draw the PANELS into a PNG file, sized to fit the legend and the table. runs: pairs of (label, records)."""
    pyplot = import_pyplot()
    lines = table.splitlines()
    widths = [8 + len(line) for line in '\n'.join(label for label, _ in runs).split('\n')]
    columns = max(1, min(3, len(runs), 170 // max(widths)))
    height = len(lines) + max(sum(label.count('\n') + 2 for label, _ in runs[first::columns])
                              for first in range(columns))
    size = max(13, 0.08 * max(map(len, lines), default=0), 0.08 * max(widths)), 5.5 + 0.15 * height
    figure, axes = pyplot.subplots(2, 4, figsize=size, layout='constrained')
    axes.flat[-1].set_axis_off()
    runs = [(label.replace('$', r'\$'), rows) for label, rows in runs]  # $ would start a formula
    for axis, (title, (field, curves)) in zip(axes.flat, PANELS.items()):
        for number, (label, rows) in enumerate(runs):
            for split, weights in curves:
                points = [(row['epoch'], row[field]) for row in rows
                          if (row['split'], row['weights']) == (split, weights)]
                if points:
                    axis.plot(*zip(*points), color=f'C{number % 10}', alpha=0.8, label=label,
                              linestyle='--' if (split, weights) == ('val', 'raw') else '-',
                              drawstyle='steps-post' if field == 'image_size' else 'default',
                              marker='.' if len(points) < 30 else None)
        axis.set(title=title, xlabel='epoch')
        axis.xaxis.get_major_locator().set_params(integer=True)
        if field in ('lr', 'weight_decay', 'image_size'):
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc='outside lower center', ncols=columns, fontsize='small',
                           title='validation: raw weights dashed, EMA solid' + f'\n\n{table}' * bool(table),
                           title_fontproperties={'family': 'monospace', 'size': 'small'})
    legend.get_title().set(multialignment='left', parse_math=False)
    replace(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('folders', metavar='RUN', nargs='+', help='folder of a run, with log.jsonl and config.yaml')
    parser.add_argument('-save', metavar='FILE', help='PNG file to write (default: curves.png in the first RUN)')
    args = parser.parse_args()
    path = args.save or os.path.join(args.folders[0], 'curves.png')
    logs = [read_log(folder) for folder in args.folders]
    labels, table = label_runs(args.folders)
    draw(list(zip(labels, logs)), path, table)
    for folder, rows in zip(args.folders, logs):
        print(f'{folder}: {rows[-1]["epoch"]} epochs')
    print(f'{path}: drew {", ".join(PANELS)}')


if __name__ == '__main__':
    run_program(main)
