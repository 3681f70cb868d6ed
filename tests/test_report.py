"""Evaluation reports: numbers, figures and page, with one and with several processes."""
import csv
import html.parser
import re

import numpy as np
import pytest
from conftest import fails, options, records, run, with_lists
from PIL import Image

from config import get_config
from deploy import report
from deploy.predictor import Predictor

pytest.importorskip('matplotlib', reason='drawing is an optional extra')
MAIN = 'main_multi_gpu.py'
FILES = ['accuracy.png', 'calibration.png', 'confusion.png', 'images.csv', 'report.html', 'worst.png']
# HTML, a formula, characters missing from fonts, control characters, commas and quotes
NAMES = ['<script>alert(1)</script>', '$x_1$ & "y"', '猫', 'a\x07b\u202ec', 'one, "two"']


def make_outcome(labels, predictions, probabilities, num_classes, class_names=()):
    """Return an Outcome with two classes per image: the prediction, and the class with the next number."""
    labels, first = np.array(labels), np.array(predictions)
    probabilities = np.array(probabilities)
    best = np.stack([first, (first + 1) % num_classes], axis=1)
    return report.Outcome([f'val/<{index}>.jpg' for index in range(len(labels))], labels, best,
                          np.stack([probabilities, 1 - probabilities], axis=1),
                          np.where(first == labels, probabilities, (1 - probabilities) / 2), num_classes, class_names)


@pytest.fixture
def outcome():
    """Class 3 has no images, class 2 is never predicted."""
    return make_outcome([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 0, 0], [0.9, 0.6, 0.8, 0.5, 0.8, 0.7], 4)


def test_classes_and_confusions(outcome):
    assert report.find_confusions(outcome).tolist() == [[0, 1, 2], [1, 0, 1], [2, 0, 1]]
    results = report.rank_classes(outcome)
    assert [(result.number, result.images, result.rival, result.mistakes) for result in results] == [
        (2, 1, 0, 1), (0, 3, 1, 2), (1, 2, 0, 1), (3, 0, None, 0)]
    np.testing.assert_allclose([result.accuracy for result in results], [0, 1 / 3, 1 / 2, np.nan])
    np.testing.assert_allclose([result.precision for result in results], [np.nan, 1 / 3, 1 / 3, np.nan])


def test_calibration(outcome):
    error, bins = report.find_calibration(outcome)
    # the bin edges are 7/15, 8/15, ...: 0.5 | 0.6 (9/15) | 0.7 | 0.8, 0.8 (12/15) | 0.9
    assert bins[:, 0].tolist() == [0] * 7 + [1, 1, 0, 1, 2, 0, 1, 0]
    np.testing.assert_allclose(bins[11, 1:], [0.8, 0])
    assert error == pytest.approx((0.5 + 0.6 + 0.7 + 1.6 + 0.1) / 6)
    perfect = make_outcome([0, 1], [0, 1], [1.0, 1.0], 2)
    assert report.find_calibration(perfect)[0] == 0


def test_worst_images_are_the_most_confident_mistakes(outcome, monkeypatch):
    assert report.find_worst(outcome) == [2, 4, 5, 1]
    monkeypatch.setattr(report, 'WORST', 2)
    assert report.find_worst(outcome) == [2, 4]


@pytest.mark.parametrize('num_classes, numbers, names', [
    (8, {(5, 5): '1', (5, 7): '2', (7, 6): '1'}, [str(number) for number in range(8)]),
    (40, {(0, 0): '1', (0, 1): '2', (1, 2): '1'}, ['5', '7', 'any other class']),
])
def test_confusion_matrix(monkeypatch, num_classes, numbers, names):
    """With many classes, it shows those with the most frequent mistakes, and a column for all others.

    numbers: {(row, column): count}.
    """
    figures = []
    monkeypatch.setattr(report, 'SHOWN', 8 if num_classes == 8 else 2)
    monkeypatch.setattr(report, 'save_figure', lambda figure, path: figures.append(figure))
    outcome = make_outcome([5, 5, 5, 7], [7, 7, 5, 6], [0.9] * 4, num_classes)
    report.draw_confusion(outcome, report.find_confusions(outcome), '')
    axis, = figures[0].axes
    assert {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axis.texts} == numbers
    assert [text.get_text() for text in axis.get_xticklabels()] == names


class Page(html.parser.HTMLParser):
    """The links and tags of a page, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.links, self.tags, self.cells, self.open = [], set(), [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ('src', 'href')]
        self.open = tag == 'td'
        self.cells += [''] if self.open else []

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self.open = False


@pytest.mark.parametrize('num_classes', [5, 40])
def test_report_page_is_self_contained(tmp_path, num_classes):
    rng = np.random.default_rng(0)
    names = tuple(NAMES + [f'class {number}' for number in range(5, num_classes)])
    labels = rng.integers(0, num_classes, 400)
    predictions = np.where(rng.random(400) < 0.7, labels, (labels + 1) % num_classes)
    outcome = make_outcome(labels, predictions, rng.uniform(0.5, 1, 400), num_classes, names)
    read = []
    report.write_report(tmp_path, 'a <b>', {'weights': 'x & y'}, outcome,
                        lambda index: read.append(index) or Image.new('RGB', (900, 300), (index % 255, 9, 9)))
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES and read == report.find_worst(outcome)
    page = Page((tmp_path / 'report.html').read_text('utf-8'))
    assert [link for link in page.links if not link.startswith('data:image/png;base64,')] == ['images.csv']
    assert len(page.links) == 5 and not {'script', 'link', 'b'} & page.tags
    shown = ['0 <script>alert(1)</script>', '1 $x_1$ & "y"', '2 猫', '3 a\\x07b\\u202ec', '4 one, "two"']
    assert set(shown) < set(page.cells) and {outcome.paths[index] for index in read} < set(page.cells)
    assert f'{outcome.right.mean():.2%} ({outcome.right.sum()} images)' in page.cells and 'x & y' in page.cells
    for path in tmp_path.glob('*.png'):
        assert Image.open(path).convert('L').getextrema()[0] < 100, path


def test_report_without_mistakes(tmp_path):
    (tmp_path / 'worst.png').write_text('from an earlier report')
    report.write_report(tmp_path, '', {}, make_outcome([0, 1], [0, 1], [0.9, 1.0], 40), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[:-1]
    assert (tmp_path / 'report.html').read_text('utf-8').count('<p>None.</p>') == 2


@pytest.fixture(scope='module')
def trained(fashion, tmp_path_factory):
    """The folder of a run of one epoch, and the options that evaluate it."""
    folder = tmp_path_factory.mktemp('runs') / 'first'
    run(MAIN, '-output', folder, *options(fashion, 'TRAIN.NUM_EPOCHS', '1', 'TRAIN.BASE_LR', '0.05'))
    return folder, ['-eval', '-pretrained', folder / 'best.pdparams', *options(fashion, 'DATA.BATCH_SIZE_EVAL', '4')]


@pytest.mark.parametrize('images', [35, 2])
def test_report_is_the_same_for_any_number_of_processes(trained, fashion, tmp_path, images):
    """With only two images, the third process has none."""
    lines = (fashion / 'val_list.txt').read_text().splitlines()[:images]
    data = with_lists(fashion, tmp_path / 'data', val=lines)
    files = []
    for count in (1, 2, 3):
        folder = tmp_path / f'report-{count}'
        out = run(MAIN, '-nproc', count, *trained[1], '-data_path', data, '-output', tmp_path / str(count), '-report',
                  folder).stdout
        assert f'report: {folder}/report.html' in out
        files.append((folder / 'images.csv').read_bytes())
    assert files[0] == files[1] == files[2]
    rows = list(csv.DictReader(files[0].decode().splitlines()))
    assert [f'{row["path"]} {row["label"]}' for row in rows] == lines
    record, = records(tmp_path / '1')
    shares = [np.mean([row['prediction'] == row['label'] for row in rows]),
              np.mean([row['label'] in row['top5'].split() for row in rows])]
    np.testing.assert_allclose([record['acc1'], record['acc5']], 100 * np.array(shares))
    predicted = Predictor(trained[0] / 'best.pdparams')([f'{fashion}/{row["path"]}' for row in rows], 10)
    for row, prediction in zip(rows, predicted):
        of_class = dict(zip(prediction.ids, prediction.probabilities))
        assert row['top5'].split() == [str(number) for number in prediction.ids[:5]]
        assert float(row['probability']) == pytest.approx(of_class[int(row['prediction'])], abs=1e-5)
        assert float(row['label_probability']) == pytest.approx(of_class[int(row['label'])], abs=1e-5)


def test_names_and_facts_of_a_report(trained, fashion, tmp_path):
    names = (fashion / 'class_names.txt').read_text().splitlines()
    run(MAIN, *trained[1], '-output', tmp_path / 'run', '-report', tmp_path / 'deep/report')
    text = (tmp_path / 'deep/report/report.html').read_text()
    assert f'{trained[0]}/best.pdparams (ema)' in text and f'{fashion}/val_list.txt' in text
    row = next(csv.DictReader((tmp_path / 'deep/report/images.csv').read_text().splitlines()))
    assert row['label_name'] == names[int(row['label'])] and row['prediction_name'] == names[int(row['prediction'])]
    assert re.search(rf'loss</td><td>{records(tmp_path / "run")[0]["loss"]:.4f}<', text)
    assert get_config(str(tmp_path / 'run/config.yaml')).REPORT == ''  # so that other runs can use the config


def test_class_names_of_the_dataset_take_precedence(tmp_path):
    for folder, names in (('data', 'a\nb'), ('run', 'c\nd')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'class_names.txt').write_text(names)
    weights = str(tmp_path / 'run/w.pdparams')
    assert report.find_names(str(tmp_path / 'data'), weights, 2) == ('a', 'b')
    assert report.find_names(str(tmp_path), weights, 2) == ('c', 'd')


def test_report_errors(trained, fashion, tmp_path):
    """Each error is one line, reported before the evaluation."""
    output = ['-output', tmp_path / 'run', '-report', tmp_path / 'report']
    line = fails(MAIN, *options(fashion), *output)
    assert 'REPORT is ' in line and 'but only an evaluation writes a report: add -eval or drop -report' in line
    (tmp_path / 'matplotlib.py').write_text('raise ImportError("none here")')
    for count in (1, 2):
        line = fails(MAIN, '-nproc', count, *trained[1], *output, env={'PYTHONPATH': str(tmp_path)})
        assert 'drawing needs matplotlib: pip install matplotlib' in line
    assert not (tmp_path / 'run').exists() and not (tmp_path / 'report').exists()
    (tmp_path / 'report').write_text('')
    assert f'{tmp_path}/report: File exists; ' in fails(MAIN, *trained[1], *output)
    (tmp_path / 'worst.png').write_text('')
    assert 'worst.png: would be replaced' in fails(MAIN, *trained[1], *output[:3], tmp_path)
    assert not (tmp_path / 'run/log.jsonl').exists()


@pytest.mark.parametrize('name', sorted({*FILES} - {'report.html'}))
def test_files_from_outside_a_report_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("a user's")
    with pytest.raises(report.UserError, match=f'{name}: would be replaced, but is not part of a report; choose'):
        report.prepare_folder(tmp_path)
    (tmp_path / 'report.html').write_text('an earlier report')
    report.prepare_folder(tmp_path)


@pytest.mark.parametrize('name', FILES)
def test_a_full_disk_leaves_the_old_file(outcome, tmp_path, name):
    (tmp_path / name).write_text('an earlier report')
    (tmp_path / f'{name}.partial').symlink_to('/dev/full')
    with pytest.raises(report.UserError, match=f'{name}: cannot write .No space left on device.; free up disk space'):
        report.write_report(tmp_path, '', {}, outcome, lambda index: Image.new('RGB', (9, 9)))
    assert (tmp_path / name).read_text() == 'an earlier report'
