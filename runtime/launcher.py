"""A process group on one machine: start the processes, wait for them, end them together."""
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from runtime.program import STOPPED, environment_number, handle_stop_signals
from utils import UserError, program_name

# seconds to hold back the stderr of each process: when one fails, the errors that follow in the others are noise
HELD = 5.0


def check_srun(processes):
    """Raise a UserError if srun started several tasks that no launcher has joined: each would be a separate run.

    processes: the value of -nproc, or None; 1 allows separate runs.
    """
    tasks, nodes = (environment_number(f'SLURM_STEP_NUM_{what}', 1) for what in ('TASKS', 'NODES'))
    if tasks == 1 or processes == 1 or 'PADDLE_TRAINER_ID' in os.environ:
        return
    command = f'srun --ntasks=1 python {program_name()} ...'
    if nodes > 1:
        command = (f"srun --ntasks={nodes} --ntasks-per-node=1 sh -c 'exec python -m paddle.distributed.launch "
                   f'--nnodes {nodes} --rank $SLURM_NODEID --master $SLURM_LAUNCH_NODE_IPADDR:8090 '
                   f"--log_dir log/$SLURM_NODEID {program_name()} ...'")
    raise UserError(f'srun started {tasks} tasks, each of which would be a separate run; start one task per machine: '
                    f'{command} (for separate runs, give -nproc 1)')


class Rank:
    """A process of a group, and its stderr."""

    def __init__(self, command, environment):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  open until the end
        self.process = subprocess.Popen(command, stderr=self.errors, env=environment)
        self.held, self.read = [], 0

    def show(self, held=0.0):
        """Copy to our stderr whatever the process wrote more than `held` seconds ago."""
        now = time.monotonic()
        text = os.pread(self.errors.fileno(), 2 ** 20, self.read)
        self.read += len(text)
        self.held += [(now, text)] if text else []
        while self.held and now - self.held[0][0] >= held:
            with contextlib.suppress(OSError):  # stderr may have no reader
                sys.stderr.write(self.held[0][1].decode(errors='replace'))
                sys.stderr.flush()
            del self.held[0]


def run_processes(command, count):
    """Run a command in a group of `count` processes; end them all when one fails or we receive a stop signal.

    The stderr of each process is copied to ours after HELD seconds; when one fails, the last lines of the others, which
    report the lost connection, are dropped.
    Returns: the exit status of the process that failed, or of rank 0.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for port in sockets:
            port.bind(('127.0.0.1', 0))
        endpoints = [f'127.0.0.1:{port.getsockname()[1]}' for port in sockets]
    ranks = []
    for rank, endpoint in enumerate(endpoints):
        group = {'PADDLE_TRAINER_ID': rank, 'PADDLE_TRAINERS_NUM': count, 'PADDLE_LOCAL_SIZE': count,
                 'PADDLE_TRAINER_ENDPOINTS': ','.join(endpoints), 'PADDLE_CURRENT_ENDPOINT': endpoint,
                 'FLAGS_selected_gpus': rank, 'RUN_PROCESSES_PID': os.getpid()}
        ranks.append(Rank(command, {**os.environ, **{name: str(value) for name, value in group.items()}}))
    handle_stop_signals(signal.default_int_handler)  # raises KeyboardInterrupt
    shown, interrupted = ranks[0], False
    try:
        failed = wait_for(ranks)
        shown = ranks[failed or 0]
    except KeyboardInterrupt:
        interrupted = True
        handle_stop_signals(signal.SIG_IGN)  # the processes handle it, and a second Ctrl-C too
    finally:
        end(ranks, shown)
    if interrupted:
        statuses = [rank.process.returncode for rank in ranks]
        if STOPPED in statuses:
            return STOPPED
        # gloo aborts a process that waits for one that has ended
        failed = next((number for number, status in enumerate(statuses) if status != -signal.SIGABRT), 0)
        shown = ranks[failed]
    if failed is None:
        for rank in ranks:
            rank.show()
        return 0
    status = shown.process.returncode
    with contextlib.suppress(OSError):
        if status < 0:
            print(f'rank {failed} was killed by {signal.Signals(-status).name}', file=sys.stderr)
        elif status == STOPPED and failed:  # rank 0 reports its own stop
            print(f'rank {failed} received a stop request; resume with -resume auto', file=sys.stderr)
    return 128 - status if status < 0 else status


def wait_for(ranks):
    """Wait until all processes have ended or one has failed. Returns: the number of the one that failed, or None."""
    failed, statuses = [], [None]
    # a process that raises may take longer to exit than those that fail because of it
    deadline = math.inf
    while None in statuses and time.monotonic() < deadline:
        time.sleep(0.1)
        statuses = [rank.process.poll() for rank in ranks]
        failed += [number for number, status in enumerate(statuses) if status and number not in failed]
        if failed:
            deadline = min(deadline, time.monotonic() + 2)
        else:
            for rank in ranks:
                rank.show(HELD)
    # a user's mistake (status 2) is often found by all; SIGABRT is gloo's reaction to the end of another process
    mistakes = [number for number, status in enumerate(statuses) if status == 2]
    causes = [number for number in failed if statuses[number] != -signal.SIGABRT]
    # a process told to stop during an evaluation exits alone, and the others may then fail
    stopped = [number for number, status in enumerate(statuses) if status == STOPPED]
    return (mistakes or stopped or causes or failed or [None])[0]


def end(ranks, shown, patience=30):
    """Terminate processes, and kill those still running after `patience` seconds. shown: whose stderr to show."""
    deadline = time.monotonic() + patience
    for rank in ranks:
        rank.process.terminate()
    while any(rank.process.poll() is None for rank in ranks):
        shown.show()
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.process.kill()
        time.sleep(0.05)
    shown.show()
