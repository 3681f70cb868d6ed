"""The examples for several machines in docs/training.md, run as SLURM and Kubernetes would."""
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from conftest import NARROW, ROOT, assert_same, records, run, without_times

from config import get_config, get_parser, update_config
from runtime import checkpoint
from runtime.program import STOPPED

TRAINING = (ROOT / 'docs/training.md').read_text()


def block(heading, language):
    """Return the only code block of a language under a heading of docs/training.md."""
    section = TRAINING.split(f'\n### {heading}\n')[1].split('\n## ')[0].split('\n### ')[0]
    text, = re.findall(f'```{language}\n(.*?)```\n', section, re.DOTALL)
    return text


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


# starts the command once per node with a task's variables; returns the highest exit status
SRUN = f'''#!{sys.executable}
import os, subprocess, sys
args = sys.argv[1:]
while args[0].startswith('--'):
    args.pop(0)
nodes = int(os.environ['SLURM_JOB_NUM_NODES'])
step = {{'SLURM_STEP_ID': 0, 'SLURM_STEP_NUM_NODES': nodes, 'SLURM_STEP_NUM_TASKS': nodes,
        'SLURM_STEP_TASKS_PER_NODE': f'1(x{{nodes}})', 'SLURM_LAUNCH_NODE_IPADDR': '127.0.0.1'}}
tasks = []
for node in range(nodes):
    task = {{'SLURM_NODEID': node, 'SLURM_PROCID': node, 'SLURM_LOCALID': 0, 'SLURMD_NODENAME': f'node{{node}}'}}
    variables = {{name: str(value) for name, value in {{**step, **task}}.items()}}
    tasks.append(subprocess.Popen(args, env={{**os.environ, **variables}}))
with open(os.environ['TASKS'], 'w') as file:
    print(*[task.pid for task in tasks], file=file, flush=True)
statuses = [task.wait() for task in tasks]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
'''


class Slurm:
    """Run the page's script as a batch job: with a job's variables, and with stand-ins for srun and scontrol."""

    def __init__(self, folder):
        self.folder = folder
        (folder / 'job').write_text(block('SLURM', 'shell'))
        (folder / 'bin').mkdir()
        write_program(folder / 'bin/srun', SRUN)
        write_program(folder / 'bin/scontrol', f'#!/bin/sh\necho "$@" >> {folder}/scontrol\n')
        head = re.match(r'#!/bin/sh\n((#SBATCH .*\n)+)', block('SLURM', 'shell'))[1]
        words = shlex.split(head.replace('#SBATCH', ''))
        self.options = dict(word[2:].split('=', 1) for word in words if '=' in word)
        assert '--requeue' in words

    def submit(self, job, nodes=None, **variables):
        nodes = nodes or self.options['nodes']
        return subprocess.Popen(['sh', self.folder / 'job'], cwd=ROOT, start_new_session=True, env={
            **os.environ, 'PATH': f'{self.folder}/bin:{os.environ["PATH"]}', 'TASKS': str(self.folder / 'tasks'),
            'SLURM_JOB_ID': str(job), 'SLURM_JOB_NUM_NODES': nodes, 'SLURM_NNODES': nodes, 'SLURM_NODEID': '0',
            'SLURM_PROCID': '0', 'SLURM_CPUS_PER_TASK': self.options['cpus-per-task'],
            'SLURM_NTASKS_PER_NODE': self.options['ntasks-per-node'], **variables})

    def tasks(self):
        return [int(number) for number in (self.folder / 'tasks').read_text().split()]

    def scontrol(self):
        """The calls of scontrol, one line of arguments each."""
        path = self.folder / 'scontrol'
        return path.read_text().splitlines() if path.exists() else []


def expand(text, variables):
    """Replace $(NAME) as Kubernetes does in commands and in the values of variables."""
    return re.sub(r'\$\((\w+)\)', lambda match: variables.get(match[1], match[0]), text)


def start_pod(job, index, **substitutes):
    """Start the container of an indexed job as the kubelet does; `substitutes` replace variables or are added."""
    container, = job['spec']['template']['spec']['containers']
    variables = {}
    for entry in container['env']:
        variables[entry['name']] = substitutes.pop(entry['name'], None) or expand(entry['value'], variables)
    variables.update(JOB_COMPLETION_INDEX=str(index), HOSTNAME=f'{job["metadata"]["name"]}-{index}', **substitutes)
    command = [expand(word, variables) for word in (*container['command'], *container.get('args', ()))]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={
        'PATH': os.environ['PATH'], 'HOME': os.environ.get('HOME', '/'), 'OMP_NUM_THREADS': '1', **variables})


def free_port(low, high):
    """A free port in a range."""
    for port in range(low, high):
        with socket.socket() as trial:
            try:
                trial.bind(('', port))
                return port
            except OSError:
                continue
    raise AssertionError('no port is free')


def wait_for_steps(log, starts, *processes):
    """Wait until a run is training after `starts` starts."""
    deadline = time.monotonic() + 100
    text = ''
    while text.count(', processes: ') < starts or ' step ' not in text.rpartition(', processes: ')[2]:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), text
        time.sleep(0.05)
        text = log.read_text() if log.exists() else ''


@pytest.fixture
def end_all():
    """A list of processes. Those that a failed test leaves behind are killed, with their sessions."""
    processes = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_manifest_is_consistent():
    service, job = yaml.safe_load_all(block('Kubernetes', 'yaml'))
    spec, name = job['spec'], job['metadata']['name']
    pod = spec['template']['spec']
    container, = pod['containers']
    variables = {entry['name']: entry['value'] for entry in container['env']}
    assert service['spec'] == {'clusterIP': 'None', 'selector': {'batch.kubernetes.io/job-name': name}}
    assert pod['subdomain'] == service['metadata']['name']
    assert variables['MASTER'].split(':')[0] == f'{name}-0.{pod["subdomain"]}'
    assert spec['completionMode'] == 'Indexed'
    assert str(spec['completions']) == str(spec['parallelism']) == variables['NNODES']
    # what podFailurePolicy needs; the launcher kills its processes after 30 seconds
    assert pod['restartPolicy'] == 'Never' and pod['terminationGracePeriodSeconds'] > 60
    mount, = container['volumeMounts']
    assert mount['name'] == pod['volumes'][0]['name']
    assert all(variables[key].startswith(mount['mountPath'] + '/') for key in ('DATA_PATH', 'OUTPUT'))


def test_a_run_moves_from_slurm_to_kubernetes_and_back(fashion, tmp_path, end_all):
    """Each system stops the run on two machines; it finishes on one, with the weights of an uninterrupted run."""
    args = get_parser('').parse_args(['-opts', *NARROW, 'MODEL.NUM_CLASSES', '10', 'DATA.BATCH_SIZE', '8',
                                      'TRAIN.NUM_EPOCHS', '20', 'VALIDATE_FREQ', '20', 'REPORT_FREQ', '1'])
    narrow, output = tmp_path / 'narrow.yaml', tmp_path / 'run'
    narrow.write_text(update_config(get_config(), args).dump())
    variables = {'CFG': str(narrow), 'DATA_PATH': str(fashion), 'OUTPUT': str(output), 'PYTHON': sys.executable}
    latest = output / 'latest.pdparams'

    slurm = Slurm(tmp_path)
    port = free_port(20000, 30000)
    job = port + 1210000
    name, seconds = slurm.options['signal'].split('@')
    assert int(seconds) > 60 and slurm.options['ntasks-per-node'] == '1'
    script = slurm.submit(job, **variables)
    end_all.append(script)
    wait_for_steps(output / 'log.txt', 1, script)
    for task in slurm.tasks():  # slurmstepd signals the tasks, not the processes that they started
        os.kill(task, signal.Signals[f'SIG{name}'])
    assert script.wait(60) == signal.SIGTERM
    assert slurm.scontrol() == [f'requeue {job}']
    first = checkpoint.load_training(str(latest))['step']

    manifest = list(yaml.safe_load_all(block('Kubernetes', 'yaml')))[1]
    host = f'localhost:{free_port(30000, 32000)}'  # a name, as in the manifest
    pods = [start_pod(manifest, index, MASTER=host, **variables) for index in range(2)]
    end_all += pods
    wait_for_steps(output / 'log.txt', 2, *pods)
    pods[0].terminate()  # it is evicted
    statuses = [pod.wait(60) for pod in pods]
    assert statuses == [signal.SIGTERM, STOPPED]
    ignored = [rule['onExitCodes']['values'] for rule in manifest['spec']['podFailurePolicy']['rules']
               if rule['action'] == 'Ignore' and 'onExitCodes' in rule]
    assert ignored == [statuses]
    assert checkpoint.load_training(str(latest))['step'] > first

    # on one machine it needs no launcher
    script = slurm.submit(job, nodes='1', SLURM_RESTART_COUNT='1', PADDLE_NPROC_PER_NODE='2', **variables)
    end_all.append(script)
    assert script.wait(100) == 0 and slurm.scontrol() == [f'requeue {job}']

    log = (output / 'log.txt').read_text()
    assert log.count(', processes: 2,') == 3 and log.count(f' resumed {latest} after epoch ') == 2
    assert 'bitwise' not in log
    assert [start['status'] for start in json.loads((output / 'run.json').read_text())] == [
        'stopped', 'stopped', 'finished']
    plain = tmp_path / 'plain'
    run('main_multi_gpu.py', '-nproc', '2', '-cfg', narrow, '-data_path', fashion, '-output', plain)
    rows, plain_rows = (without_times(records(folder)) for folder in (output, plain))
    assert [(row['epoch'], row['split'], row['n']) for row in rows] == [
        *((epoch, 'train', 48) for epoch in range(1, 21)), (20, 'val', 35), (20, 'val', 35)]
    assert rows[:20] == plain_rows[:20]
    # except batch-norm statistics, which a save within an epoch averages
    states = [checkpoint.load(str(folder / 'latest.pdparams')) for folder in (output, plain)]
    for part in ('model', 'model_ema', 'optimizer'):
        assert_same(*({name: value for name, value in state[part].items() if '._mean' not in name and
                       '._variance' not in name} for state in states))


@pytest.mark.parametrize('status, is_requeued', [(0, False), (1, False), (2, False), (15, True), (75, True)])
def test_the_slurm_script_on_one_machine(tmp_path, status, is_requeued):
    """The task becomes main_multi_gpu.py. Only a stopped run is requeued."""
    slurm = Slurm(tmp_path)
    write_program(tmp_path / 'python', f'#!/bin/sh\necho $$ "$@" > {tmp_path}/command\nexit {status}\n')
    assert slurm.submit(7, nodes='1', PYTHON=str(tmp_path / 'python')).wait(20) == status
    task, program, *_ = (tmp_path / 'command').read_text().split()
    assert [int(task)] == slurm.tasks() and program == 'main_multi_gpu.py'
    assert slurm.scontrol() == (['requeue 7'] if is_requeued else [])
