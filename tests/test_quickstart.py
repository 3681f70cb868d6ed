"""The notebook runs from the first cell to the last."""
import json

from conftest import ROOT, run
from test_predictor import trained  # noqa: F401  a fixture


def test_cells_run(trained, fashion, tmp_path):  # noqa: F811
    """Runs in a copy of the top folder that contains the folder of a run."""
    for path in ROOT.iterdir():
        if path.name not in ('output', 'data', 'exported'):
            (tmp_path / path.name).symlink_to(path)
    for path, target in (('output/demo', trained[0]), ('data/fashion_mnist_demo', fashion)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).symlink_to(target)
    cells = [''.join(cell['source']) for cell in json.loads((ROOT / 'quickstart.ipynb').read_text())['cells']
             if cell['cell_type'] == 'code']
    (tmp_path / 'notebook.py').write_text('\n\n'.join(['import matplotlib', "matplotlib.use('Agg')", *cells]))
    (tmp_path / 'exported').mkdir()
    (tmp_path / 'exported/theirs').touch()
    out = run('notebook.py', cwd=tmp_path, fork=False).stdout
    assert (tmp_path / 'exported/theirs').exists(), "the notebook deleted the user's own export"
    assert 'raw weights' in out and out.count('stride ') == 5 and 'onnxruntime class ' in out
    assert float(out.split('largest difference of the logits: ')[1].split()[0]) < 1e-4
    assert out.count(' ms\n') == 3
