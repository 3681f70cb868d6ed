"""Faults during a run: kills, signals, full disks. Covers the promises of docs/reliability.md."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, STAGES, assert_same, fails, options, records, run, without_times
from forked import Program
from test_distributed import GROUP, command_lines

from runtime import checkpoint
from runtime.program import STOPPED

MAIN = 'main_single_gpu.py'
FAULTS = ROOT / 'tests/faults.py'
PATHS = {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'}
# four epochs of five steps, with saves within each epoch
RUN = ['TRAIN.NUM_EPOCHS', '4', 'TRAIN.ACCUM_ITER', '2', 'DATA.BATCH_SIZE', '6', 'TRAIN.MIXUP_ALPHA', '0.5',
       'TRAIN.AUTO_AUGMENT', 'True', 'TRAIN.RANDOM_ERASE_PROB', '0.5', 'TRAIN.CURRICULUM', str(STAGES),
       'SAVE_FREQ', '2', 'SAVE_FREQ_STEPS', '2', 'DATA.NUM_WORKERS', '2']


LONG = ['TRAIN.NUM_EPOCHS', '3000', 'DATA.NUM_WORKERS', '2']
TWO = ['main_multi_gpu.py', '-nproc', '2']


@pytest.fixture(scope='module')
def uninterrupted(fashion, tmp_path_factory):
    """An uninterrupted run, and its options."""
    folder = tmp_path_factory.mktemp('faults') / 'uninterrupted'
    opts = options(fashion, *RUN)
    run(MAIN, '-output', folder, *opts)
    assert [row['step'] for row in records(folder) if row['split'] == 'train'] == [5, 10, 15, 20]
    return folder, opts


def assert_same_runs(first, second):
    assert without_times(records(first)) == without_times(records(second))
    for name in ('latest', 'best', 'epoch_2', 'epoch_4'):
        assert_same(*(checkpoint.load(str(folder / f'{name}.pdparams')) for folder in (first, second)))


def faulty(fault, number, *args, status):
    """Run with a fault from faults.py. Returns: the output."""
    return run(FAULTS, fault, number, MAIN, *args, status=status, env=PATHS).stdout


@pytest.mark.parametrize('faults', [
    # killed in step 4, when 2 of 5 steps are saved; after resuming, killed in the evaluation of epoch 2
    [('step', 4), ('evaluation', 9)],
    # killed with a half-written file, then with complete files that are not renamed yet
    [('write', 4), ('rename', 5), ('rename', 1)],
])
def test_killed_at_a_chosen_point(uninterrupted, tmp_path, faults):
    folder, opts = uninterrupted
    args = ['-output', tmp_path / 'run', '-resume', 'auto', *opts]
    for fault, number in faults:
        faulty(fault, number, *args, status=-signal.SIGKILL)
        assert fault not in ('write', 'rename') or list((tmp_path / 'run').glob('*.partial'))
    out = run(MAIN, *args).stdout
    assert ' resumed ' in out and 'bitwise' not in out
    assert_same_runs(folder, tmp_path / 'run')
    assert not list((tmp_path / 'run').glob('*.partial'))


@pytest.mark.parametrize('count', [1, 2, 3])
def test_killed_at_random(fashion, tmp_path, long, count):
    """Kill the parent, a rank or a data worker several times, at any point, and then let the run finish."""
    command = ['main_multi_gpu.py', '-nproc', count, '-resume', 'auto', *options(
        fashion, *RUN, 'DATA.BATCH_SIZE', 6 // count, 'REPORT_FREQ', '2'), '-output']
    run(*command, tmp_path / 'uninterrupted')
    for chain in range(25 if long else 1):
        chance = random.Random(chain)
        output = tmp_path / str(chain)
        for _ in range(4 if long else 3 if count == 1 else 1):
            process = Program([*command, output], start_new_session=True)
            # not before the run's first file: until then, nothing can be lost
            while not (output / 'log.txt').exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 3))
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(chance.choice(sorted(members(process))), signal.SIGKILL)
            process.wait(60)
            wait_until(lambda: not members(process))  # noqa: B023  called at once
        run(*command, output)
        assert_same_runs(tmp_path / 'uninterrupted', output)


@pytest.mark.parametrize('fault, number, where', [
    ('terminate', 8, 'epoch 2, step 3'), ('interrupt', 5, 'epoch 1, step 5'),
    ('terminate_evaluation', 2, 'epoch 1, step 5')])
def test_a_stop_request_saves_and_resumes_bitwise(uninterrupted, tmp_path, fault, number, where):
    """SIGTERM and Ctrl-C end a run after the current step, with a checkpoint from which it resumes bitwise."""
    folder, opts = uninterrupted
    args = ['-output', tmp_path / 'run', '-resume', 'auto', *opts, 'SAVE_FREQ_STEPS', '0', 'REPORT_FREQ', '1000']
    process = run(FAULTS, fault, number, MAIN, *args, status=STOPPED, env=PATHS)
    name = 'SIGINT' if fault == 'interrupt' else 'SIGTERM'
    latest = tmp_path / 'run/latest.pdparams'
    assert process.stdout.endswith(f'stopped by {name}; {latest} ({where}) is saved: the same command with -output '
                                   f'{tmp_path}/run -resume auto resumes from it\n')
    assert process.stderr == 'stop requested: saving a checkpoint first; Ctrl-C again stops at once\n'
    assert json.loads((tmp_path / 'run/run.json').read_text())[-1]['status'] == 'stopped'
    out = run(MAIN, *args).stdout
    done, step = (int(word) for word in where.replace(',', '').split()[1::2])
    assert (f'resumed {latest} after epoch {done - 1} and {step} of 5 steps of the next, step {5 * done - 5 + step}'
            in out)
    assert_same_runs(folder, tmp_path / 'run')


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU'])
def test_signals_that_precede_a_shutdown(uninterrupted, tmp_path, name):
    """For example from SLURM's --signal, a closed terminal or a CPU time limit."""
    _, opts = uninterrupted
    process = run(FAULTS, name, 3, MAIN, '-output', tmp_path / 'run', *opts, status=STOPPED, env=PATHS)
    assert f'stopped by {name}; {tmp_path}/run/latest.pdparams (epoch 1, step 3) is saved' in process.stdout
    assert checkpoint.load_training(str(tmp_path / 'run/latest.pdparams'))['step'] == 3


@pytest.mark.parametrize('fault', ['worker', 'worker_evaluation', 'worker_before_first_batch', 'first_worker'])
@pytest.mark.parametrize('count', [1, 2])
def test_a_killed_data_worker_ends_the_run(fashion, tmp_path, fault, count):
    """For example by the out-of-memory killer."""
    start = [FAULTS] if count == 1 else ['-c', GROUP, '2', FAULTS]
    began = time.monotonic()
    process = run(*start, fault, 1, TWO[0], '-output', tmp_path / 'run', *options(
        fashion, 'DATA.BATCH_SIZE', '2', 'DATA.BATCH_SIZE_EVAL', '1', 'DATA.NUM_WORKERS', '2'), status=2, env=PATHS)
    assert time.monotonic() - began < 60
    assert re.fullmatch(r'\S+: error: (rank 1: )?data worker \d+ was killed by SIGKILL; probably out of memory: use '
                        r'fewer data workers or smaller batches\n', process.stderr), process.stderr


def test_nohup_is_respected(uninterrupted, tmp_path):
    _, opts = uninterrupted
    code = ('import runpy, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[:1] = []; '
            'runpy.run_path(sys.argv[0], run_name="__main__")')
    process = run('-c', code, FAULTS, 'SIGHUP', 3, MAIN, '-output', tmp_path / 'run', *opts, 'TRAIN.NUM_EPOCHS', '1',
                  env=PATHS)
    assert 'stopped' not in process.stdout and process.stderr == ''


def test_two_training_runs_cannot_share_a_folder(fashion, tmp_path):
    """The lock is released however the run ends; an evaluation needs none."""
    opts = options(fashion, *LONG)
    process = start([MAIN, '-output', tmp_path / 'run', *opts], tmp_path / 'run')
    before = (tmp_path / 'run/config.yaml').read_bytes()
    for command in ([MAIN], TWO):
        line = fails(*command, '-output', tmp_path / 'run', '-resume', 'auto', *opts, 'SEED', '5')
        assert f'{tmp_path}/run: another training run is writing here; wait until it ends, or choose' in line
    run(MAIN, '-output', tmp_path / 'run', '-eval', '-pretrained', tmp_path / 'run/latest.pdparams', *opts)
    assert (tmp_path / 'run/config.yaml').read_bytes() == before and process.poll() is None
    process.kill()
    process.wait()
    out = run(MAIN, '-output', tmp_path / 'run', '-resume', 'auto', *opts, 'TRAIN.NUM_EPOCHS', '1').stdout
    assert 'resumed' in out


def test_another_batch_size_restarts_the_epoch(uninterrupted, tmp_path):
    _, opts = uninterrupted
    faulty('terminate', 8, '-output', tmp_path / 'run', *opts, status=STOPPED)
    out = run(MAIN, '-output', tmp_path / 'run', '-resume', 'auto', *opts, 'DATA.BATCH_SIZE', '5').stdout
    assert 'steps: 8 in the checkpoint, 6 in this run; resuming after epoch 1, but the result will not be' in out
    assert ('within epoch 2, with 12 images per step and world size 1; this run has 10 and 1, so that epoch starts over'
            in out)
    rows = [row for row in records(tmp_path / 'run') if row['split'] == 'train']
    assert [(row['epoch'], row['step']) for row in rows] == [(1, 5), (2, 12), (3, 18), (4, 24)]
    assert {row['n'] for row in rows} == {60}


def members(process):
    """Return the PIDs of the running processes in a forked program's session, oldest first."""
    out = subprocess.run(['ps', '-o', 'pid=,stat=', '--sort', 'start_time', '--sid', str(process.pid)],
                         capture_output=True, text=True).stdout
    return [int(number) for number, state in map(str.split, out.splitlines()) if not state.startswith('Z')]


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(args, folder, **kwargs):
    """Start a long-running program in its own session, and return once it has written its first checkpoint."""
    process = Program(args, start_new_session=True, **kwargs)
    wait_for_checkpoint(process, folder)
    return process


def wait_for_checkpoint(process, folder):
    wait_until(lambda: process.poll() is not None or (folder / 'latest.pdparams').exists(), 60)
    assert process.poll() is None


def test_a_signal_to_the_whole_process_group(fashion, tmp_path):
    """Launchers and terminals send such signals. Data workers ignore them, so the run can save."""
    process = start([MAIN, '-output', tmp_path / 'run', *options(fashion, *LONG)], tmp_path / 'run')
    wait_until(lambda: len(members(process)) == 3)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == STOPPED and time.monotonic() - began < 20
    assert 'stopped by SIGTERM' in out and members(process) == []
    assert checkpoint.load(str(tmp_path / 'run/latest.pdparams'))['progress']


@pytest.mark.parametrize('count', [1, 2])
def test_a_run_waiting_for_its_workers_can_be_stopped(fashion, tmp_path, count):
    """The data workers hang as on a dead network disk; with two processes, only those of one."""
    process = start(['main_multi_gpu.py', '-nproc', count, '-output', tmp_path / 'run', *options(
        fashion, *LONG, 'TRAIN.NUM_EPOCHS', '30000', 'VALIDATE_FREQ', '30000', 'SAVE_FREQ', '0')], tmp_path / 'run')
    wait_until(lambda: len(members(process)) == (3 if count == 1 else 7))
    stopped = []
    for number in members(process)[-2:]:
        os.kill(number, signal.SIGSTOP)
        stopped.append(number)
    time.sleep(2)
    began = time.monotonic()
    process.terminate()
    out, error = process.communicate(timeout=40)
    assert process.returncode == STOPPED and time.monotonic() - began < (5 if count == 1 else 35)
    assert members(process) == []
    checkpoint.load_training(str(tmp_path / 'run/latest.pdparams'))


def test_workers_do_not_outlive_their_parent(fashion, tmp_path):
    process = start([MAIN, '-output', tmp_path / 'run', *options(fashion, *LONG)], tmp_path / 'run')
    wait_until(lambda: len(members(process)) == 3)
    process.kill()
    process.wait()
    wait_until(lambda: members(process) == [], 10)


def test_a_second_interrupt_stops_at_once(fashion, tmp_path):
    """With two processes, the run would stop at the next log line, which REPORT_FREQ puts far away."""
    process = start([*TWO, '-output', tmp_path / 'run', *options(
        fashion, *LONG, 'SAVE_FREQ_STEPS', '1', 'REPORT_FREQ', '1000000', 'TRAIN.NUM_EPOCHS', '1', 'DATA.BATCH_SIZE',
        '1')], tmp_path / 'run')
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (130, STOPPED) and members(process) == []


@pytest.mark.parametrize('count', [1, 2])
def test_a_stop_without_a_reader_of_the_output(fashion, tmp_path, count):
    """In `python ... 2>&1 | tee log`, Ctrl-C also ends tee."""
    reader, writer = os.pipe()
    process = start(['main_multi_gpu.py', '-nproc', count, '-output', tmp_path / 'run', *options(
        fashion, *LONG, 'REPORT_FREQ', '1')], tmp_path / 'run', stdout=writer, stderr=writer)
    os.close(writer)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == STOPPED and members(process) == []
    assert 'stopped by SIG' in (tmp_path / 'run/log.txt').read_text().splitlines()[-1]
    assert checkpoint.load(str(tmp_path / 'run/latest.pdparams'))['progress']


@pytest.mark.parametrize('name, epoch', [('latest.pdparams', 1), ('epoch_4.pdparams', 3)])
def test_a_full_disk(uninterrupted, tmp_path, name, epoch):
    """The error names the path, the previous checkpoint is intact, and the run resumes from it."""
    folder, opts = uninterrupted
    output = tmp_path / 'run'
    args = ['-output', output, '-resume', 'auto', *opts, 'SAVE_FREQ_STEPS', '0']
    # at the fourth file: in epoch 1, latest is written before the evaluation, then best and latest
    faulty('rename', 4, *args, status=-signal.SIGKILL)
    before = (output / 'latest.pdparams').read_bytes()
    (output / f'{name}.partial').unlink(missing_ok=True)
    (output / f'{name}.partial').symlink_to('/dev/full')
    line = fails(MAIN, *args)
    assert f'{output}/{name}: cannot write (No space left on device); free up disk space' in line
    assert checkpoint.load(str(output / 'latest.pdparams'))['epoch'] == epoch
    assert name != 'latest.pdparams' or (output / name).read_bytes() == before
    assert not list(output.glob('*.partial'))
    run(MAIN, *args)
    assert_same_runs(folder, output)


@pytest.mark.parametrize('name', ['log.txt', 'log.jsonl'])
def test_a_full_disk_for_a_log(fashion, tmp_path, name):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).symlink_to('/dev/full')
    line = fails(MAIN, '-output', tmp_path / 'run', *options(fashion))
    assert f'{tmp_path}/run/{name}: No space left on device; free up disk space' in line


def test_a_folder_that_disappears(uninterrupted, tmp_path):
    """The error names the folder."""
    _, opts = uninterrupted
    process = start([MAIN, '-output', tmp_path / 'run', *opts, 'TRAIN.NUM_EPOCHS', '3000'], tmp_path / 'run')
    shutil.move(tmp_path / 'run', tmp_path / 'elsewhere')
    (tmp_path / 'run').write_text('')
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and len(error.splitlines()) == 1 and f'{tmp_path}/run/' in error
    checkpoint.load_training(str(tmp_path / 'elsewhere/latest.pdparams'))


# several processes: stop requests and kills

LAUNCHER = [sys.executable, '-m', 'paddle.distributed.launch', '--nproc_per_node', '2']
FAULTY_TWO = ['-c', GROUP, '2', FAULTS]
BOTH = ['DATA.BATCH_SIZE', '3', 'REPORT_FREQ', '2']


@pytest.fixture(scope='module')
def uninterrupted_pair(fashion, tmp_path_factory):
    folder = tmp_path_factory.mktemp('faults') / 'two'
    opts = options(fashion, *RUN, *BOTH)
    run(*TWO, '-output', folder, *opts)
    return folder, opts


def test_two_killed_processes_resume_bitwise(uninterrupted_pair, tmp_path):
    """Bitwise including the batch-norm statistics, because SAVE_FREQ_STEPS is the same."""
    folder, opts = uninterrupted_pair
    args = ['-output', tmp_path / 'run', '-resume', 'auto', *opts]
    process = run(*FAULTY_TWO, 'step', 9, TWO[0], *args, status=128 + signal.SIGKILL, env=PATHS)
    assert process.stderr == 'rank 1 was killed by SIGKILL\n'
    out = run(*TWO, *args).stdout
    assert 'after epoch 1 and 3 of 5 steps of the next, step 8' in out and 'bitwise' not in out
    assert_same_runs(folder, tmp_path / 'run')


def test_a_stop_request_to_one_of_two_processes(uninterrupted_pair, tmp_path):
    """Both stop at the next log line. The resume is bitwise, except for batch-norm statistics."""
    folder, opts = uninterrupted_pair
    args = ['-output', tmp_path / 'run', '-resume', 'auto', *opts]
    out = run(*FAULTY_TWO, 'terminate', 8, TWO[0], *args, status=STOPPED, env=PATHS).stdout
    assert f'stopped by a signal to another process; {tmp_path}/run/latest.pdparams (' in out
    # at the next log line, or earlier if steps are slow
    where = re.search(r'\(epoch 2, step ([34])\)', out.splitlines()[-1])
    out = run(*TWO, *args).stdout
    assert f'after epoch 1 and {where[1]} of 5 steps of the next' in out and 'bitwise' not in out
    states = [checkpoint.load(str(path / 'latest.pdparams')) for path in (folder, tmp_path / 'run')]
    statistics = [name for name in states[0]['model'] if name.endswith(('._mean', '._variance'))]
    for state in states:
        for part in ('model', 'model_ema'):
            state[part] = {name: value for name, value in state[part].items() if name not in statistics}
        del state['best']
    assert statistics
    assert_same(*states)


def test_a_stop_request_to_one_of_two_processes_in_an_evaluation(uninterrupted_pair, tmp_path):
    """It stops alone, which ends the other; the checkpoint was saved before. Even the statistics are bit-identical."""
    folder, opts = uninterrupted_pair
    args = ['-output', tmp_path / 'run', '-resume', 'auto', *opts]
    began = time.monotonic()
    process = run(*FAULTY_TWO, 'terminate_evaluation', 6, TWO[0], *args, status=STOPPED, env=PATHS)
    assert process.stderr.splitlines()[-1] == 'rank 1 received a stop request; resume with -resume auto'
    assert time.monotonic() - began < 60
    latest = checkpoint.load(str(tmp_path / 'run/latest.pdparams'))
    assert latest['epoch'] == 1 and latest['progress']['steps'] == latest['progress']['steps_per_epoch'] == 5
    assert [row['split'] for row in records(tmp_path / 'run') if row['epoch'] == 2] == ['train']
    # a single process with twice the batch size repeats no step of that epoch
    shutil.copytree(tmp_path / 'run', tmp_path / 'one')
    out = run(MAIN, '-output', tmp_path / 'one', '-resume', 'auto', *opts, 'DATA.BATCH_SIZE', '6', 'TRAIN.NUM_EPOCHS',
              '2').stdout
    assert 'starts over' not in out and 'epoch 2/2 step' not in out
    for row, other in zip(without_times(records(tmp_path / 'one')), without_times(records(folder))):
        assert row.pop('loss') == pytest.approx(other.pop('loss'), rel=1e-4) and row['n'] == other['n']
    out = run(*TWO, *args).stdout
    assert 'after epoch 1 and 5 of 5 steps of the next, step 10' in out and 'bitwise' not in out
    assert_same_runs(folder, tmp_path / 'run')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_to_the_parent(fashion, tmp_path, number):
    process = start([*TWO, '-output', tmp_path / 'run', *options(fashion, *LONG)], tmp_path / 'run')
    began = time.monotonic()
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == STOPPED and time.monotonic() - began < 20
    assert f'stopped by SIGTERM; {tmp_path}/run/latest.pdparams (' in out.splitlines()[-1]
    assert error.splitlines() == ['stop requested: saving a checkpoint first; Ctrl-C again stops at once']
    assert members(process) == []


def test_a_stop_request_to_all_while_they_wait_for_one(fashion, tmp_path):
    """The request comes at the end of an evaluation, while one process is late."""
    process = run(*FAULTY_TWO, 'terminate_all_in_evaluation', 4, TWO[0], '-output', tmp_path / 'run', *options(
        fashion, *RUN, *BOTH), status=STOPPED, env=PATHS)
    assert f'stopped by SIGTERM; {tmp_path}/run/latest.pdparams (' in process.stdout
    assert process.stderr == 'stop requested: saving a checkpoint first; Ctrl-C again stops at once\n'


def test_slow_steps_do_not_delay_a_stop(fashion, tmp_path):
    """Log lines are a minute apart, but the parent kills the processes after 30 seconds."""
    process = start([*FAULTY_TWO, 'slow', '1', TWO[0], '-output', tmp_path / 'run', *options(
        fashion, *LONG, 'SAVE_FREQ_STEPS', '1', 'REPORT_FREQ', '1000', 'DATA.BATCH_SIZE', '1')], tmp_path / 'run',
        env={**os.environ, **PATHS})
    time.sleep(8)  # until the processes know how long a step takes
    began = time.monotonic()
    process.terminate()
    out, _ = process.communicate(timeout=40)
    assert process.returncode == STOPPED and time.monotonic() - began < 20
    assert f'stopped by SIGTERM; {tmp_path}/run/latest.pdparams (' in out and members(process) == []


def test_a_stop_request_to_the_launcher(fashion, tmp_path):
    """The launcher exits with status 15, whatever the processes return."""
    command = [*LAUNCHER, '--log_dir', tmp_path / 'log', TWO[0], '-output', tmp_path / 'run', *options(fashion, *LONG)]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for_checkpoint(process, tmp_path / 'run')
    process.terminate()
    assert process.wait(timeout=40) == signal.SIGTERM and command_lines(tmp_path) == []
    assert f'stopped by SIGTERM; {tmp_path}/run/latest.pdparams (' in (tmp_path / 'run/log.txt').read_text()
    assert checkpoint.load(str(tmp_path / 'run/latest.pdparams'))['progress']


@pytest.mark.parametrize('launcher', [False, True])
def test_an_error_in_one_process_is_shown(fashion, tmp_path, launcher):
    """main_multi_gpu.py shows it on the console; Paddle's launcher, which shows only rank 0, in the rank's log."""
    args = [FAULTS, 'raise', '5', TWO[0], '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '3000')]
    env = {**os.environ, **PATHS}
    if launcher:
        process = subprocess.Popen([*map(str, [*LAUNCHER, '--log_dir', tmp_path / 'log', *args])], cwd=ROOT, env=env,
                                   text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    else:
        process = Program(['-c', GROUP, '2', *args], env=env, start_new_session=True)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and (command_lines(tmp_path) if launcher else members(process)) == []
    assert 'RuntimeError: boom' in ((tmp_path / 'log/workerlog.1').read_text() if launcher else error)
    assert 'rank 1: error: RuntimeError: boom' in (tmp_path / 'run/log.txt').read_text()
