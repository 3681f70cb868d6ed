"""Write the report of an evaluation: per-class accuracy, confusion, calibration and the worst images on one page.

Importing this module does not import Paddle.
"""
import base64
import csv
import dataclasses
import html
import io
import os
import pathlib
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from deploy.predictor import find_class_names
from runtime.files import CLASS_NAMES, replace, write_text
from utils import UserError, one_line

# files of a report besides report.html
FILES = ('accuracy.png', 'confusion.png', 'calibration.png', 'worst.png', 'images.csv')
# most classes in a figure, and most rows in the table of confused pairs
SHOWN = 30
# number of worst images that are drawn
WORST = 24
# number of equal-width bins in the reliability diagram, as in Guo et al. (arXiv 1706.04599)
BINS = 15
# largest width and height of a drawn image, in pixels
THUMBNAIL = (256, 256)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A network's predictions for the N images of a list, in the order of the list.

    best: the k most probable classes of each image, in descending order; probabilities: their probabilities.
    """
    paths: Sequence
    labels: np.ndarray  # int [N]
    best: np.ndarray  # int [N, k]
    probabilities: np.ndarray  # float [N, k]
    label_probabilities: np.ndarray  # float [N]
    num_classes: int
    class_names: tuple  # empty if the classes have no names

    @property
    def predictions(self):
        return self.best[:, 0]

    @property
    def right(self):
        """bool [N]: whether each prediction equals the label."""
        return self.predictions == self.labels

    def name(self, number):
        """Return the name of a class, or its number if it has no name."""
        return self.class_names[number] if self.class_names else str(number)

    def title(self, number):
        """Return the number of a class, followed by its name if it has one."""
        return f'{number} {self.class_names[number]}' if self.class_names else str(number)


class ClassResult(NamedTuple):
    """How the images of a class were classified."""
    number: int
    images: int
    # accuracy: fraction of the class's images that are predicted correctly; precision: fraction of the images predicted
    # as this class that belong to it; nan without such images
    accuracy: float
    precision: float
    # the class that its images are most often mistaken for, and how often; None and 0 without mistakes
    rival: Optional[int]
    mistakes: int


class Drawn(NamedTuple):
    """An image to draw, next to bars for the probabilities of some classes."""
    title: str
    image: Image.Image
    names: list
    probabilities: list
    # index of the label in names, if it is known
    label: Optional[int] = None


def prepare_folder(folder):
    """Create the folder of a report. Raises: UserError if a file that is not part of a report would be replaced."""
    os.makedirs(folder, exist_ok=True)
    for name in () if os.path.lexists(os.path.join(folder, 'report.html')) else FILES:
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            raise UserError(f'{path}: would be replaced, but is not part of a report; choose another -report folder, '
                            'or move the file')


def import_figure():
    """Return matplotlib's Figure, which needs no display. Raises: UserError if matplotlib (optional) is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install matplotlib') from None
    return Figure


def find_names(data_path, weights, num_classes):
    """Return the dataset's class names or, if it has none, those that `find_class_names` finds for the weights."""
    own = os.path.join(data_path, CLASS_NAMES)
    return find_class_names(own if os.path.lexists(own) else weights, num_classes)


def find_confusions(outcome):
    """Return the mistakes as int [P, 3], rows of (label, prediction, count) in descending order of the count."""
    wrong, count = ~outcome.right, outcome.num_classes
    codes, times = np.unique(outcome.labels[wrong] * count + outcome.predictions[wrong], return_counts=True)
    order = np.argsort(-times, kind='stable')
    return np.stack([codes // count, codes % count, times], axis=1)[order]


def rank_classes(outcome):
    """Return a ClassResult for every class, the least accurate first and those without images last.

    Among equally accurate classes, those with more images come first.
    """
    images, taken, right = (np.bincount(numbers, minlength=outcome.num_classes) for numbers in (
        outcome.labels, outcome.predictions, outcome.labels[outcome.right]))
    with np.errstate(invalid='ignore'):
        accuracy, precision = right / images, right / taken
    rivals = {label: (rival, times) for label, rival, times in find_confusions(outcome)[::-1].tolist()}
    order = np.lexsort([-images, accuracy])  # nan comes last
    return [ClassResult(number, int(images[number]), float(accuracy[number]), float(precision[number]),
                        *rivals.get(number, (None, 0))) for number in order.tolist()]


def find_calibration(outcome):
    """Compare the probabilities of the predictions with their accuracy (arXiv 1706.04599, section 2).

    Returns: (expected calibration error, float [BINS, 3] with the columns images, mean probability and accuracy; the
    latter two are nan in an empty bin).
    """
    probabilities = outcome.probabilities[:, 0]
    bins = np.clip(np.ceil(probabilities * BINS).astype(int) - 1, 0, BINS - 1)
    images, confidence, right = (np.bincount(bins, weights, BINS) for weights in (None, probabilities, outcome.right))
    error = np.abs(confidence - right).sum() / len(bins)
    with np.errstate(invalid='ignore'):
        return error, np.stack([images, confidence / images, right / images], axis=1)


def find_worst(outcome):
    """Return the indices of the WORST images: the most probable wrong predictions, ties in the order of the list."""
    wrong = np.flatnonzero(~outcome.right)
    return wrong[np.argsort(-outcome.probabilities[wrong, 0], kind='stable')][:WORST].tolist()


def _short(name):
    """Shorten the name of a class to fit into a figure."""
    return one_line(name, 40)


def save_figure(figure, path):
    """Write a figure to a PNG file, completely or not at all."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph ')  # characters missing from the font are drawn as boxes
        replace(path, lambda partial: figure.savefig(partial, dpi=120, format='png'))


def draw_images(drawn, path, columns=1):
    """Draw a list of Drawn into a PNG file, `columns` per row. The label is bold, and its bar is green."""
    rows, bars = -(-len(drawn) // columns), max(len(shown.names) for shown in drawn)
    height = 0.4 + max(1.2, 0.17 * bars)
    figure = import_figure()(figsize=(4.4 * columns, height * rows))
    axes = figure.subplots(rows, 2 * columns, squeeze=False, gridspec_kw={
        'width_ratios': [1, 1.8] * columns, 'left': 0.01, 'right': 0.99, 'bottom': 0.1 / height / rows,
        'top': 1 - 0.3 / height / rows, 'hspace': 0.4 / (height - 0.4), 'wspace': 0.05})
    for axis in axes.flat:
        axis.set_axis_off()
    for shown, left, right in zip(drawn, axes.flat[::2], axes.flat[1::2]):
        left.imshow(shown.image)
        left.set_anchor('NW')
        left.set_title(one_line(shown.title, 60), fontsize='small', loc='left', y=1.02, parse_math=False)
        colors = ['lightgreen' if place == shown.label else 'lightblue' for place in range(len(shown.names))]
        right.barh(range(len(shown.names)), shown.probabilities, color=colors)
        for place, (name, probability) in enumerate(zip(shown.names, shown.probabilities)):
            right.text(0.01, place, f'{probability:.1%}  {_short(name)}', va='center', fontsize='small',
                       weight='bold' if place == shown.label else 'normal', clip_on=True, parse_math=False)
        right.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    save_figure(figure, path)


def draw_worst(outcome, worst, read, path):
    """Draw the images at the indices `worst` into a PNG file, with their top classes. read: see `write_report`."""
    drawn = []
    for place, index in enumerate(worst, 1):
        image, label = read(index), int(outcome.labels[index])
        image.thumbnail(THUMBNAIL)
        numbers, probabilities = outcome.best[index].tolist(), outcome.probabilities[index].tolist()
        if label not in numbers:
            numbers, probabilities = [*numbers, label], [*probabilities, float(outcome.label_probabilities[index])]
        drawn.append(Drawn(f'{place}: {"/".join(outcome.paths[index].split("/")[-2:])}', image,
                           [outcome.title(number) for number in numbers], probabilities, numbers.index(label)))
    draw_images(drawn, path, columns=3)


def draw_accuracy(outcome, results, path):
    """Draw the accuracy of the SHOWN worst classes, and a sorted curve of all if there are more, into a PNG file."""
    results = [result for result in results if result.images]
    worst, overall = results[:SHOWN], outcome.right.mean()
    figure = import_figure()(figsize=(10, 1.4 + 0.24 * len(worst)), layout='constrained')
    left, *others = np.atleast_1d(figure.subplots(1, 1 + (len(results) > SHOWN))).tolist()
    left.barh(range(len(worst)), [result.accuracy for result in worst], color='lightblue')
    left.axvline(overall, color='gray', linestyle='--')
    left.set_yticks(range(len(worst)), [_short(outcome.title(result.number)) for result in worst], parse_math=False)
    left.set(xlim=(0, 1), ylim=(len(worst) - 0.5, -0.5), xlabel=f'accuracy (dashed: all images, {overall:.2%})',
             title=f'the {len(worst)} worst of {len(results)} classes' if others else 'accuracy per class')
    for axis in others:
        axis.plot(range(1, len(results) + 1), [result.accuracy for result in results])
        axis.axhline(overall, color='gray', linestyle='--')
        axis.set(ylim=(0, 1), xlabel='classes, worst first', ylabel='accuracy', title='all classes')
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_confusion(outcome, confusions, path):
    """Draw the confusion matrix into a PNG file: a row per label, colored by share and annotated with counts.

    With more than SHOWN classes, only those with the most frequent mistakes are drawn, and a last column counts all
    other predictions.
    """
    are_all, confused = outcome.num_classes <= SHOWN, dict.fromkeys(confusions[:, :2].ravel().tolist())
    shown = sorted(list(range(outcome.num_classes) if are_all or not confused else confused)[:SHOWN])
    place = np.full(outcome.num_classes, len(shown))
    place[shown] = range(len(shown))
    matrix = np.zeros([len(shown) + 1, len(shown) + 1], int)
    np.add.at(matrix, (place[outcome.labels], place[outcome.predictions]), 1)
    matrix = matrix[:-1, :len(shown)] if are_all else matrix[:-1]
    share = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    names = [_short(outcome.title(number)) for number in shown]
    side = 1.5 + 0.32 * len(shown) + 0.085 * max(map(len, names))
    figure = import_figure()(figsize=(side, side), layout='constrained')
    axis = figure.subplots()
    axis.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for row, column in np.argwhere(matrix).tolist():
        axis.text(column, row, matrix[row, column], ha='center', va='center', fontsize='x-small',
                  color='white' if share[row, column] > 0.5 else 'black')
    axis.set_xticks(range(matrix.shape[1]), names if are_all else [*names, 'any other class'], rotation=90,
                    parse_math=False)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    axis.set(xlabel='prediction', ylabel='label')
    figure.suptitle('confusion matrix' if are_all else f'the {len(shown)} classes with the most frequent mistakes')
    save_figure(figure, path)


def draw_calibration(error, bins, path):
    """Draw the results of `find_calibration` into a PNG file: a reliability diagram and the images per bin."""
    images, confidence, accuracy = bins.T
    edges, width = np.arange(BINS) / BINS, 1 / BINS
    figure = import_figure()(figsize=(6, 6.4), layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={'height_ratios': [3, 1]})
    upper.bar(edges, np.nan_to_num(accuracy), width, align='edge', color='lightblue', edgecolor='white',
              label='accuracy')
    upper.plot(confidence, accuracy, 'o', color='tab:blue', label='at the mean probability')
    upper.plot([0, 1], [0, 1], color='gray', linestyle='--', label='perfect calibration')
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel='accuracy', title=f'expected calibration error {error:.2%}')
    upper.legend(loc='upper left')
    lower.bar(edges, images, width, align='edge', color='lightblue', edgecolor='white')
    lower.set(xlabel='probability of the prediction', ylabel='images')
    save_figure(figure, path)


def to_csv(outcome):
    """Return the text of images.csv: one line per image, in the order of the list."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['path', 'label', 'label_name', 'prediction', 'prediction_name', 'probability', 'label_probability',
                     f'top{outcome.best.shape[1]}'])
    for path, label, best, probability, of_label in zip(
            outcome.paths, outcome.labels.tolist(), outcome.best.tolist(), outcome.probabilities[:, 0].tolist(),
            outcome.label_probabilities.tolist()):
        writer.writerow([path, label, outcome.name(label), best[0], outcome.name(best[0]), f'{probability:.6f}',
                         f'{of_label:.6f}', ' '.join(map(str, best))])
    return file.getvalue()


def write_report(folder, title, facts, outcome, read):
    """Write report.html, its figures as PNG files, and images.csv into an existing folder.

    title: of the page; facts: {name: text}, the first rows of the page; outcome: an `Outcome`; read(index): returns the
    Pillow image at an index, and is called only for the worst images.
    Raises: UserError for an image that cannot be read, a file that cannot be written, and if matplotlib is missing.
    """
    def path(name):
        return os.path.join(folder, name)
    results, confusions, worst = rank_classes(outcome), find_confusions(outcome), find_worst(outcome)
    error, bins = find_calibration(outcome)
    draw_accuracy(outcome, results, path('accuracy.png'))
    draw_confusion(outcome, confusions, path('confusion.png'))
    draw_calibration(error, bins, path('calibration.png'))
    if worst:
        draw_worst(outcome, worst, read, path('worst.png'))
    elif os.path.exists(path('worst.png')):
        os.remove(path('worst.png'))  # from an earlier report
    write_text(path('images.csv'), to_csv(outcome))
    pictures = {name: base64.b64encode(pathlib.Path(path(f'{name}.png')).read_bytes()).decode()
                for name in ('accuracy', 'confusion', 'calibration', *(['worst'] if worst else []))}
    write_text(path('report.html'), to_page(title, facts, outcome, results, confusions, worst, error, pictures))


STYLE = '''
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; display: block; margin: 1rem 0 }
table { border-collapse: collapse; font-size: 0.9rem }
th, td { padding: 0.15rem 0.8rem 0.15rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd;
         overflow-wrap: anywhere }
th { position: sticky; top: 0; background: white }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.table { max-height: 30rem; overflow: auto; margin: 1rem 0 }
@media print { .table { max-height: none } }
'''


def to_page(title, facts, outcome, results, confusions, worst, error, pictures):
    """Return the self-contained HTML of a report. pictures: {name: a PNG in base64}; the rest as in `write_report`."""
    share, largest = outcome.right.mean(), max(results, key=lambda result: result.images)
    seen = [result for result in results if result.images]
    facts = {**facts, 'images': f'{len(outcome.labels):,}', 'classes': f'{outcome.num_classes:,}'}
    if len(seen) < len(results):
        facts['classes'] += f', {len(results) - len(seen):,} without images here'
    facts['top-1 accuracy'] = f'{share:.2%} ({outcome.right.sum():,} images)'
    if outcome.num_classes > outcome.best.shape[1]:
        hits = (outcome.best == outcome.labels[:, None]).any(axis=1).mean()
        facts[f'top-{outcome.best.shape[1]} accuracy'] = f'{hits:.2%}'
    facts['mean per-class accuracy'] = f'{np.mean([result.accuracy for result in seen]):.2%}'
    facts['share of the largest class'] = (f'{largest.images / len(outcome.labels):.2%} '
                                           f'({outcome.title(largest.number)}), the accuracy of always guessing it')
    facts['expected calibration error'] = (f'{error:.2%}, mean probability of the predictions '
                                           f'{outcome.probabilities[:, 0].mean():.2%}')
    classes = [(outcome.title(result.number), f'{result.images:,}', _percent(result.accuracy),
                _percent(result.precision), '' if result.rival is None else outcome.title(result.rival),
                f'{result.mistakes:,}') for result in results]
    images_of = {result.number: result.images for result in results}
    pairs = [(outcome.title(label), outcome.title(rival), f'{times:,}', _percent(times / images_of[label]))
             for label, rival, times in confusions[:SHOWN].tolist()]
    images = [(str(place), outcome.paths[index], outcome.title(outcome.labels[index]),
               outcome.title(outcome.predictions[index]), _percent(outcome.probabilities[index, 0]),
               _percent(outcome.label_probabilities[index])) for place, index in enumerate(worst, 1)]
    more = f'Only the classes with the most frequent mistakes are shown, out of {outcome.num_classes:,}. '
    heading = html.escape(one_line(title))
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{heading}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{heading}</h1>
{_table(None, facts.items())}
<p><a href="images.csv">images.csv</a> lists the prediction for each image, in the order of the list file.</p>

<h2>Accuracy per class</h2>
{_picture(pictures, 'accuracy', 'accuracy per class')}
<p>The least accurate classes come first. Accuracy is the share of a class's images that are predicted correctly
(recall). Precision is the share of the images predicted as a class that belong to it.</p>
{_table(['class', 'images', 'accuracy', 'precision', 'most often mistaken for', 'times'], classes)}

<h2>Confusion</h2>
{_picture(pictures, 'confusion', 'confusion matrix')}
<p>{more if outcome.num_classes > SHOWN else ''}Each row shows the
predictions for the images of one label; the darker the cell, the larger its share of the row. The most frequent
mistakes:</p>
{_table(['label', 'prediction', 'times', "share of the label's images"], pairs) if pairs else '<p>None.</p>'}

<h2>The worst images</h2>
<p>The wrong predictions with the highest probability: hard images, or wrong labels. The label is bold, and its bar is
green.</p>
{_picture(pictures, 'worst', 'the worst images') + _table(
    ['', 'path', 'label', 'prediction', 'probability', "the label's probability"], images) if worst else '<p>None.</p>'}

<h2>Calibration</h2>
<p>Of the predictions with a probability of 80%, 80% should be right; bars below the diagonal mean that the network is
overconfident. The expected calibration error is the distance from the diagonal, averaged over the images.</p>
{_picture(pictures, 'calibration', 'reliability diagram')}
</body>
</html>
'''


def _percent(share):
    return '–' if np.isnan(share) else f'{share:.1%}'


def _picture(pictures, name, text):
    return f'<img src="data:image/png;base64,{pictures[name]}" alt="{text}">'


def _table(head, rows):
    """Return an HTML table of texts. head: the column titles, or None. Titled columns of numbers are right-aligned."""
    rows = [[one_line(cell, 1000) for cell in row] for row in rows]
    kinds = [' class="number"' if head and all(re.fullmatch('[0-9.,%–]+', cell) for cell in column) else ''
             for column in zip(*rows)]

    def line(tag, cells):
        return f'<tr>{"".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells))}</tr>'
    return '\n'.join(['<div class="table"><table>', *([line('th', head)] if head else []),
                      *(line('td', row) for row in rows), '</table></div>'])
