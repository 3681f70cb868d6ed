"""The folder of a run: names, what stays of checkpoints and records."""
import os

from runtime import folder


def test_runs_that_start_together_have_folders_of_their_own(tmp_path):
    folders = [folder._new_folder(str(tmp_path / 'run')) for _ in range(3)]
    assert folders == [str(tmp_path / name) for name in ('run', 'run-2', 'run-3')]


def test_prune(tmp_path):
    for name in ('epoch_2', 'epoch_10', 'epoch_9', 'epoch_1', 'epoch_x', 'latest', 'best'):
        (tmp_path / f'{name}.pdparams').write_text('')
    folder.prune(str(tmp_path), 0)
    assert len(os.listdir(tmp_path)) == 7
    folder.prune(str(tmp_path), 2)
    kept = ('best', 'epoch_10', 'epoch_9', 'epoch_x', 'latest')
    assert sorted(os.listdir(tmp_path)) == [f'{name}.pdparams' for name in kept]
