"""Several processes with gloo: ways to start them, exact evaluation, equivalent training, failures."""
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, STAGES, assert_same, fails, options, records, run, with_lists, without_times
from forked import Program

from runtime import checkpoint
from runtime.program import STOPPED

MAIN = 'main_multi_gpu.py'
GROUP = ('import sys, runtime.launcher as l; '
         'sys.exit(l.run_processes([sys.executable, *sys.argv[2:]], int(sys.argv[1])))')


def group(count, *args, status=0):
    """Run a function of workers.py in `count` processes."""
    start = ['-c', GROUP, count] if count > 1 else []
    return run(*start, ROOT / 'tests/workers.py', *args, status=status,
               env={'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})


# a run with augmentations and a curriculum of image sizes
FOUR_EPOCHS = ['TRAIN.NUM_EPOCHS', '4', 'SAVE_FREQ', '1', 'KEEP_CHECKPOINTS', '0', 'DATA.BATCH_SIZE', '8',
               'TRAIN.END_WEIGHT_DECAY', '1e-5', 'TRAIN.AUTO_AUGMENT', 'True', 'TRAIN.RANDOM_ERASE_PROB', '0.5',
               'TRAIN.CURRICULUM', str(STAGES)]


@pytest.fixture(scope='module')
def trained(fashion, tmp_path_factory):
    """Two processes train for 4 epochs."""
    folder = tmp_path_factory.mktemp('runs') / 'two'
    process = run(MAIN, '-nproc', '2', '-output', folder, *options(
        fashion, *FOUR_EPOCHS))
    return folder, process


def test_a_run_of_two_processes(trained):
    folder, process = trained
    rows = records(folder)
    assert [(row['epoch'], row['split'], row['weights'], row['n']) for row in rows] == [
        (epoch, *rest) for epoch in range(1, 5)
        for rest in (('train', 'raw', 48), ('val', 'raw', 35), ('val', 'ema', 35))]
    assert [row['image_size'] for row in rows if row['split'] == 'train'] == [24, 24, 32, 32]
    assert process.stderr == '' and process.stdout == (folder / 'log.txt').read_text()
    assert ('processes 2 x DATA.BATCH_SIZE 8 x TRAIN.ACCUM_ITER 1: 12 steps of 16 images, 3 per epoch; learning '
            'rate up to ') in process.stdout
    assert checkpoint.load(str(folder / 'latest.pdparams'))['world_size'] == 2


def test_two_processes_tune_only_the_classifier(trained, fashion, tmp_path):
    """The run first evaluates the initial weights; a resumed run does not repeat that."""
    folder, flags = tmp_path / 'run', ['-pretrained', trained[0] / 'best.pdparams', '-output', tmp_path / 'run']
    for epochs, extra in (('1', []), ('2', ['-resume', 'auto'])):
        process = run(MAIN, '-nproc', '2', *flags, *extra, *options(
            fashion, 'DATA.BATCH_SIZE', '8', 'TRAIN.FREEZE', 'backbone', 'TRAIN.NUM_EPOCHS', epochs))
        assert 'weight decay on 1 tensors (80 parameters), none on 1 tensors (10 parameters)' in process.stdout
    assert [row['epoch'] for row in records(folder)] == [0, 1, 1, 1, 2, 2, 2]
    start = checkpoint.load(str(trained[0] / 'best.pdparams'))['model_ema']
    state = checkpoint.load(str(folder / 'latest.pdparams'))
    assert state['epoch'] == 2 and list(state['optimizer']) == ['fc.weight.velocity', 'fc.bias.velocity']
    for part in ('model', 'model_ema'):
        changed = [name for name, value in state[part].items() if value.tobytes() != start[name].tobytes()]
        assert changed == ['fc.weight', 'fc.bias']


def test_two_processes_resume_bitwise(trained, fashion, tmp_path):
    folder, _ = trained
    again = tmp_path / 'again'
    again.mkdir()
    # the files of a run killed while it was writing the third epoch's checkpoints
    os.link(folder / 'epoch_2.pdparams', again / 'latest.pdparams')
    best = checkpoint.load(str(again / 'latest.pdparams'))['best']['epoch']
    os.link(folder / f'epoch_{best}.pdparams', again / 'best.pdparams')
    lines = (folder / 'log.jsonl').read_text().splitlines(True)
    (again / 'log.jsonl').write_text(''.join(lines[:8]) + '{"epoch": 3, "s')
    out = run(MAIN, '-nproc', '2', '-output', again, '-resume', 'auto', *options(
        fashion, *FOUR_EPOCHS)).stdout
    assert 'resumed' in out and 'after epoch 2, step 6' in out and 'bitwise' not in out
    assert 'dropped 3 records from epoch 3 on' in out
    assert without_times(records(again)) == without_times(records(folder))
    assert_same(*(checkpoint.load(str(path / 'latest.pdparams')) for path in (folder, again)))
    assert_same(*(checkpoint.load(str(path / 'best.pdparams')) for path in (folder, again)))
    assert (again / 'config.yaml').read_text().replace(str(again), str(folder)) == (folder / 'config.yaml').read_text()


def test_another_world_size_resumes_and_logs_it(trained, fashion, tmp_path):
    folder, _ = trained
    out = run(MAIN, '-output', tmp_path / 'one', '-resume', folder / 'epoch_2.pdparams', *options(
        fashion, 'TRAIN.NUM_EPOCHS', '4')).stdout
    assert 'processes: 2 in the checkpoint, 1 in this run; resuming after epoch 2, but the result will not be' in out
    assert 'counts 6 steps' not in out  # the total batch size is the same
    assert [row['epoch'] for row in records(tmp_path / 'one')] == [3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize('images', [7, 2])
def test_evaluation_counts_every_image_once(trained, fashion, tmp_path, images):
    lines = (fashion / 'val_list.txt').read_text().splitlines()[:images]
    data = with_lists(fashion, tmp_path / 'data', val=lines)
    rows = []
    for count in (1, 2, 3):
        output = tmp_path / f'eval-{count}'
        run(MAIN, '-nproc', count, '-eval', '-pretrained', trained[0] / 'latest.pdparams', '-output', output, *options(
            fashion, 'DATA.BATCH_SIZE_EVAL', '2'), '-data_path', data)
        rows.append(records(output)[0])
    for row in rows:
        assert row['n'] == images and (row['acc1'], row['acc5']) == (rows[0]['acc1'], rows[0]['acc5'])
        assert row['loss'] == pytest.approx(rows[0]['loss'], rel=1e-6)


@pytest.mark.parametrize('count', [1, 2, 3])
def test_helpers(count):
    out = group(count, 'helpers').stdout
    assert sorted(out.splitlines()) == [f'rank {rank} of {count} ok' for rank in range(count)]


def test_world_size_and_accumulation_make_no_difference(fashion, tmp_path):
    """The model has no batch norm; processes x batch size x accumulated batches is 20 in all four cases."""
    results = []
    for count, batch, accumulated in ((1, 20, 1), (2, 10, 1), (1, 10, 2), (2, 5, 2)):
        target = tmp_path / f'{count}-{accumulated}.npz'
        args = ['train_plain', fashion, target, 'DATA.BATCH_SIZE', batch, 'TRAIN.ACCUM_ITER', accumulated,
                'TRAIN.GRAD_CLIP', '0.2', 'TRAIN.LINEAR_SCALED_LR', '10', 'REPORT_FREQ', '100']
        group(count, *args)
        results.append(np.load(target))
    assert results[0]['n'].tolist() == [60, 60] and results[0]['loss'][1] < results[0]['loss'][0]
    for other in results[1:]:
        for name in results[0].files:
            np.testing.assert_allclose(other[name], results[0][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_statistics_are_averaged_at_the_end_of_an_epoch(fashion):
    out = group(2, 'statistics', fashion).stdout
    counts = {int(line.split()[2]) for line in out.splitlines()}
    assert len(counts) == 1 and counts.pop() > 20


def test_merged_branches_with_data_parallel(fashion):
    lines = group(2, 'merged', fashion).stdout.splitlines()
    assert sorted(line.split(':')[0] for line in lines) == ['rank 0', 'rank 1'] and 'norms' in lines[0]


def test_all_ranks_wait_for_a_save_within_an_epoch(fashion, tmp_path):
    assert group(2, 'save', fashion, tmp_path).stdout.count('continued') == 2


@pytest.mark.parametrize('count', [1, 2])
def test_nothing_synchronizes_between_log_lines(fashion, count):
    args = ['count', fashion, 'DATA.BATCH_SIZE', 12 // count, 'REPORT_FREQ', '2', 'TRAIN.ACCUM_ITER', '1',
            'TRAIN.RANDOM_ERASE_PROB', '1', 'TRAIN.MIXUP_ALPHA', '1', 'TRAIN.CUTMIX_ALPHA', '1']
    out = group(count, *args).stdout
    lines = [line for line in out.splitlines() if line.startswith('rank')]
    assert len(lines) == count
    for line in lines:
        steps = eval(line.split(': ')[1].split(' then ')[0])
        calls = line.split(' then ')[1].split()
        # five steps; the ranks synchronize after the first, and for the log lines after the second, fourth and fifth
        once = steps[1]
        assert steps == [0, once, 2 * once, 2 * once, 3 * once] and once <= len(calls[:once])
        assert calls[:once].count('tolist') == 1 and calls[:once].count('all_reduce') == count - 1
        assert calls.count('all_reduce') == (5 if count > 1 else 0)  # one is for the batch-norm statistics


def test_gradients_are_synchronized_once_per_window(fashion):
    """DataParallel synchronizes only at the last batch of each accumulation window."""
    out = group(2, 'windows', fashion, 'DATA.BATCH_SIZE', '6', 'TRAIN.ACCUM_ITER', '2').stdout
    assert sorted(out.splitlines()) == [f'rank {rank}: 5 batches, 2 without synchronization' for rank in range(2)]


@pytest.mark.parametrize('option', [('SEED', '7'), ('DATA.BATCH_SIZE', '3'), ('TRAIN.BASE_LR', '0.3')])
def test_ranks_that_disagree_are_refused(fashion, option):
    process = group(2, 'disagree', fashion, *option, status=2)
    assert f'rank 1: differs from rank 0: {option[0]} is {option[1]}, not ' in process.stderr or (
        'config or data of another rank differ' in process.stderr)


def test_ranks_with_different_data_are_refused(fashion, tmp_path):
    """The paths of lists and the folders of weight files may differ, but not the contents."""
    lines = (fashion / 'train_list.txt').read_text().splitlines()
    shorter = with_lists(fashion, tmp_path / 'shorter', train=lines[:50])
    process = group(2, 'disagree', fashion, 'DATA.DATA_PATH', shorter, status=2)
    assert 'images of train_list.txt is 50, not 60; start all processes with the same' in process.stderr or (
        'config or data of another rank differ' in process.stderr)
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'w.pdparams').write_text('x')
    args = ['disagree_on_weights', fashion, tmp_path / 'a', tmp_path / 'b']
    assert group(2, *args).stdout.count('agreed') == 2
    (tmp_path / 'b/w.pdparams').write_text('y')
    process = group(2, *args, status=2)
    assert 'rank 1: differs from rank 0: the SHA-256 of w.pdparams is ' in process.stderr or (
        'config or data of another rank differ' in process.stderr)


@pytest.mark.parametrize('count', [1, 2])
def test_a_non_finite_loss_ends_all_ranks_together(fashion, count):
    args = ['not_finite', fashion, 'DATA.BATCH_SIZE', 10 // count, 'REPORT_FREQ', '5']
    process = group(count, *args, status=2)
    # the sum over the steps so far: inf at step 4, and nan after the next step, with the weights from step 4
    assert process.stderr.replace('inf', 'nan') == (
        'workers.py: error: the training loss in epoch 1, steps 2 to 5, is nan: lower TRAIN.BASE_LR, or check '
        'MODEL.PRETRAINED and the labels\n')


def ended(folder):
    """Whether the processes with a PID file in a folder have ended."""
    pids = [int(path.stem) for path in folder.glob('*.pid')]
    return pids and not any(os.path.exists(f'/proc/{pid}') for pid in pids)


@pytest.mark.parametrize('how, status, message', [
    ('raise', 1, 'RuntimeError: boom'),
    ('kill', 128 + signal.SIGKILL, 'rank 1 was killed by SIGKILL'),
    ('mistake', 2, 'workers.py: error: rank 1: a mistake'),
    ('together', 2, 'workers.py: error: a mistake'),
])
def test_a_failed_rank_ends_all(tmp_path, how, status, message):
    start = time.monotonic()
    process = group(3, 'fail', tmp_path, how, status=status)
    assert process.stderr.splitlines()[-1] == message and ended(tmp_path)
    assert how == 'raise' or len(process.stderr.splitlines()) == 1
    assert time.monotonic() - start < 60


@pytest.mark.parametrize('how, status', [('sleep', 128 + signal.SIGTERM), ('end', 0)])
def test_a_terminated_parent_ends_its_processes(tmp_path, how, status):
    process = Program(['-c', GROUP, '2', ROOT / 'tests/workers.py', 'fail', tmp_path, how],
                      env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
    while len(list(tmp_path.glob('*.pid'))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(40) == status and ended(tmp_path)


def test_an_image_that_one_rank_cannot_read(trained, fashion, tmp_path):
    """Its name is shown on the console and in log.txt, and the other ranks do not hang."""
    lines = (fashion / 'val_list.txt').read_text().splitlines()[:6]
    data = with_lists(fashion, tmp_path / 'data', val=[*lines, 'val/no such.png 3'])
    # the last of seven images belongs to the first of three ranks, the last of six to the second of two
    args = ['-eval', '-pretrained', trained[0] / 'latest.pdparams', *options(fashion), '-data_path', data, '-output']
    line = fails(MAIN, '-nproc', '3', *args, tmp_path / 'three')
    assert line.startswith(f'main_multi_gpu.py: error: {data}/val/no such.png: cannot read the image')
    line = fails(MAIN, '-nproc', '2', *args, tmp_path / 'two', '-opts', 'DATA.NUM_WORKERS', '0')
    assert 'no such.png' in line
    (data / 'val_list.txt').write_text('\n'.join([*lines[:5], 'val/no such.png 3']))
    line = fails(MAIN, '-nproc', '2', *args, tmp_path / 'odd')
    assert line.startswith(f'main_multi_gpu.py: error: rank 1: {data}/val/no such.png: cannot read the image')
    assert 'rank 1: error: ' in (tmp_path / 'odd/log.txt').read_text()


@pytest.mark.parametrize('args, message', [
    (['-data_path', 'nowhere'], 'nowhere/train_list.txt: cannot read the list'),
    (['-opts', 'TRAIN.NUM_EPOCHS', '0'], 'TRAIN.NUM_EPOCHS is 0'),
    (['-opts', 'MODEL.SYNC_BN', 'True'], 'MODEL.SYNC_BN is True, but PaddlePaddle synchronizes batch norms only on'),
    (['-opts', 'TRAIN.ACCUM_ITER', '9'], 'TRAIN.ACCUM_ITER is 9, but an epoch has only'),
    (['-nproc', '0'], '-nproc is 0, but must be at least 1'),
    (['-output', '/dev/null/x'], '/dev/null/x: Not a directory'),
])
def test_mistakes_are_reported_once(fashion, tmp_path, args, message):
    line = fails(MAIN, '-nproc', '2', '-output', tmp_path / 'run', *options(fashion), *args)
    assert line.startswith('main_multi_gpu.py: error: ') and message in line


def test_one_process_matches_main_single_gpu(fashion, tmp_path):
    for main in (MAIN, 'main_single_gpu.py'):
        run(main, '-output', tmp_path / main, *options(fashion, 'TRAIN.NUM_EPOCHS', '1'))
    assert without_times(records(tmp_path / MAIN)) == without_times(records(tmp_path / 'main_single_gpu.py'))


def test_commands_of_the_first_readme(trained, fashion, tmp_path):
    """They name missing devices and use quotes, equals signs and -amp. Only the paths differ here."""
    narrow = ' '.join(map(str, options(fashion, 'TRAIN.NUM_EPOCHS', '1')[5:]))
    for task in ('', f"-eval -pretrained='{trained[0]}/best.pdparams'"):
        command = (f"CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 {sys.executable} main_multi_gpu.py "
                   f"-cfg='./configs/mobileone_s0.yaml' -dataset='imagenet2012' -batch_size=16 -data_path='{fashion}' "
                   f"{task} -amp -output='{tmp_path / 'run'}' -opts {narrow}")
        process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0 and process.stderr == '', process.stderr
        assert process.stdout.count('mixed precision (AMP) has no effect on a CPU') == 1
    assert [row['split'] for row in records(tmp_path / 'run')] == ['train', 'val', 'val', 'val']


def script(name, *args, status=0, **variables):
    process = subprocess.run(['sh', name, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, env={
        **os.environ, 'PYTHON': sys.executable, 'PADDLE_NPROC_PER_NODE': '2',
        **{name: str(value) for name, value in variables.items()}})
    assert process.returncode == status, process.stdout + process.stderr
    return process.stdout


def test_scripts(trained, fashion, tmp_path):
    narrow = options(fashion)[4:]
    folder = tmp_path / 'run'
    shutil.copytree(trained[0], folder)
    variables = {'DATA_PATH': fashion, 'OUTPUT': folder, 'BATCH_SIZE': '8', 'CFG': 'configs/mobileone_s4.yaml'}
    out = script('run_train_multi.sh', *narrow, 'TRAIN.NUM_EPOCHS', '5', **variables)
    assert 'resumed' in out and 'after epoch 4' in out and '\n  MODEL.NAME mobileone_s4\n' in out
    assert 'processes: 2, data workers per process: 1, folder' in out
    assert [row['epoch'] for row in records(folder)] == [epoch for epoch in range(1, 6) for _ in range(3)]

    variables.update(PRETRAINED=folder / 'best.pdparams', OUTPUT=tmp_path / 'eval')
    out = script('run_eval_multi.sh', '-deploy', *narrow, **variables)
    row, = records(tmp_path / 'eval')
    best = max((row for row in records(folder) if row['weights'] == 'ema'), key=lambda row: row['acc1'])
    assert 'fused the branches' in out and row['acc1'] == best['acc1'] and row['n'] == 35


@pytest.mark.parametrize('variables, flags, command', [
    ({}, [], 'main_multi_gpu.py -output OUT -amp REST'),
    ({'GPUS': '4,6', 'NNODES': '1', 'RANK': '0'}, ['-nproc', '1'],
     'devices 4,6: main_multi_gpu.py -output OUT -amp REST -nproc 1'),
    ({'PADDLE_NPROC_PER_NODE': '2'}, [], 'main_multi_gpu.py -nproc 2 -output OUT -amp REST'),
    ({'GPUS': '0,1', 'NNODES': '2', 'RANK': '1', 'MASTER': 'a:80'}, ['-x'],
     '-m paddle.distributed.launch --devices 0,1 --nnodes 2 --master a:80 --rank 1 --log_dir OUT/launch-1 '
     'main_multi_gpu.py -output OUT -amp REST -x'),
    # the launcher on the first machine serves the others, whatever name they use for it
    ({'NNODES': '2', 'RANK': '0', 'MASTER': '10.0.0.1:80'}, [],
     '-m paddle.distributed.launch --host 10.0.0.1 --nnodes 2 --master 127.0.0.1:80 --rank 0 --log_dir OUT/launch-0 '
     'main_multi_gpu.py -output OUT -amp REST'),
    ({'NNODES': '2', 'RANK': '0', 'MASTER': 'a-0.b:80'}, [],
     '-m paddle.distributed.launch --nnodes 2 --master 127.0.0.1:80 --rank 0 --log_dir OUT/launch-0 '
     'main_multi_gpu.py -output OUT -amp REST'),
])
def test_commands_that_the_scripts_start(tmp_path, variables, flags, command):
    """On one machine, they start main_multi_gpu.py itself."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho ${CUDA_VISIBLE_DEVICES:+devices $CUDA_VISIBLE_DEVICES:} "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != 'CUDA_VISIBLE_DEVICES'}
    for name, own, rest in (
            ('train', {}, '-cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet -resume auto'),
            ('train', {'CFG': 'c.yaml', 'DATA_PATH': 'd', 'BATCH_SIZE': '8', 'PRETRAINED': 'w'},
             '-cfg c.yaml -data_path d -resume auto -batch_size 8 -pretrained w'),
            ('eval', {}, '-cfg configs/mobileone_s0.yaml -data_path /dataset/imagenet -eval -batch_size 256 '
                         '-pretrained ./mobileone_s0.pdparams')):
        out = subprocess.run(['sh', f'run_{name}_multi.sh', *flags], cwd=ROOT, capture_output=True, text=True, env={
            **environment, 'PYTHON': str(python), 'OUTPUT': 'o', **variables, **own}).stdout
        assert out == command.replace('OUT', 'o').replace('REST', rest) + '\n'


def test_gpus_must_be_visible(tmp_path):
    process = subprocess.run(['sh', 'run_train_multi.sh'], cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, 'CUDA_VISIBLE_DEVICES': '4,15', 'GPUS': '4,5', 'PYTHON': 'false'})
    assert process.returncode == 2
    assert process.stderr == 'launch.sh: error: GPUS is 4,5, but CUDA_VISIBLE_DEVICES allows only 4,15\n'


def test_several_machines_need_an_address_and_a_rank(tmp_path):
    process = subprocess.run(['sh', 'run_train_multi.sh'], cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, 'NNODES': '2', 'RANK': '0', 'OUTPUT': str(tmp_path / 'run')})
    assert process.returncode == 2 and not (tmp_path / 'run').exists()
    assert process.stderr == ("launch.sh: error: NNODES is 2: set MASTER (the first machine's address:port) and RANK "
                              '(from 0) too\n')


def command_lines(folder):
    """Return the command lines that contain a folder: of Paddle's launcher and its ranks, which are in other sessions.
    """
    out = subprocess.run(['ps', '-ww', '-eo', 'args='], capture_output=True, text=True).stdout
    return [line for line in out.splitlines() if str(folder) in line]


def test_stopping_a_script_stops_python(fashion, tmp_path):
    narrow = map(str, options(fashion, 'TRAIN.NUM_EPOCHS', '3000')[4:])
    process = subprocess.Popen(['sh', 'run_train_multi.sh', *narrow], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={
        **os.environ, 'PYTHON': sys.executable, 'PADDLE_NPROC_PER_NODE': '2', 'DATA_PATH': str(fashion),
        'OUTPUT': str(tmp_path / 'run'), 'BATCH_SIZE': '8'})
    while not (tmp_path / 'run/latest.pdparams').exists():
        assert process.poll() is None
        time.sleep(0.1)
    assert len(command_lines(tmp_path)) >= 3  # main_multi_gpu.py, which replaced the shell, and two ranks
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == STOPPED
    assert f'stopped by SIGTERM; {tmp_path}/run/latest.pdparams (' in (tmp_path / 'run/log.txt').read_text()
    deadline = time.monotonic() + 30
    while command_lines(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert command_lines(tmp_path) == []
