"""Process groups on one machine: output while they run, exit status, srun tasks."""
import os
import time

import pytest
from conftest import ROOT, fails
from forked import Program

from runtime.launcher import check_srun

GROUP = ('import sys, runtime.launcher as l; l.HELD = 0.5; '
         'sys.exit(l.run_processes([sys.executable, *sys.argv[1:]], 2))')


def test_stderr_of_a_process_is_shown_while_it_runs(tmp_path):
    """Shown for each process. The error that ends one is shown once, whatever the others report after it."""
    script = tmp_path / 'script.py'
    script.write_text("""
import os, pathlib, sys, time
rank, folder = int(os.environ['PADDLE_TRAINER_ID']), pathlib.Path(sys.argv[1])
print(f'a warning of {rank}', file=sys.stderr, flush=True)
while not (folder / 'go').exists():
    time.sleep(0.05)
print('a mistake', file=sys.stderr, flush=True)
sys.exit(2)
""")
    errors = open(tmp_path / 'errors', 'w+')  # noqa: SIM115  open until the end
    process = Program(['-c', GROUP, script, tmp_path], stderr=errors.fileno(), env={
        **os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
    deadline = time.monotonic() + 20
    while len((tmp_path / 'errors').read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (tmp_path / 'go').touch()
    assert process.wait(20) == 2
    assert sorted((tmp_path / 'errors').read_text().splitlines()) == ['a mistake', 'a warning of 0', 'a warning of 1']


def test_a_stopped_group_returns_the_status_of_a_clean_stop(tmp_path):
    """Gloo aborts a process that waits for one that has stopped."""
    script = tmp_path / 'script.py'
    script.write_text("""
import os, pathlib, signal, sys, time
rank, folder = int(os.environ['PADDLE_TRAINER_ID']), pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75) if rank else os.abort())
(folder / f'ready {rank}').touch()
time.sleep(60)
""")
    process = Program(['-c', GROUP, script, tmp_path], env={**os.environ, 'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}'})
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob('ready *'))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 75


@pytest.mark.parametrize('tasks, nodes, command', [
    ('8', '1', 'srun --ntasks=1 python main_multi_gpu.py ... (for'),
    ('2', '2', "srun --ntasks=2 --ntasks-per-node=1 sh -c 'exec python -m paddle.distributed.launch --nnodes 2 --rank "
               '$SLURM_NODEID --master $SLURM_LAUNCH_NODE_IPADDR:8090 --log_dir log/$SLURM_NODEID main_multi_gpu.py '
               "...' (for"),
])
def test_srun_tasks_that_would_be_separate_runs_are_refused(tasks, nodes, command):
    line = fails('main_multi_gpu.py', env={'SLURM_STEP_NUM_TASKS': tasks, 'SLURM_STEP_NUM_NODES': nodes})
    assert line.startswith(f'main_multi_gpu.py: error: srun started {tasks} tasks, each of which would be ')
    assert command in line and line.endswith('(for separate runs, give -nproc 1)')


@pytest.mark.parametrize('processes, env', [
    (None, {}), (None, {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_STEP_NUM_NODES': '1'}),
    (1, {'SLURM_STEP_NUM_TASKS': '8'}), (None, {'SLURM_STEP_NUM_TASKS': '2', 'PADDLE_TRAINER_ID': '3'})])
def test_intended_srun_tasks_are_allowed(monkeypatch, processes, env):
    """These are a single task, -nproc 1, and tasks that Paddle's launcher has joined."""
    for name in ('SLURM_STEP_NUM_TASKS', 'SLURM_STEP_NUM_NODES', 'PADDLE_TRAINER_ID'):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    check_srun(processes)
