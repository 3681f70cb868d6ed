"""Several processes on one machine that form a group: start them, wait for them, end them together."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from runtime.program import STOP_SIGNALS, STOPPED


def run_processes(command, count):
    """Run a command in `count` processes that form a group; as soon as one fails, or we are asked to, end them all.

    Returns: the exit status, that of the process that failed, or of the first one. What it wrote to stderr is written
    to ours; what the others wrote, that it is gone, is not.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for port in sockets:
            port.bind(('127.0.0.1', 0))
        endpoints = [f'127.0.0.1:{port.getsockname()[1]}' for port in sockets]
    errors, processes = [], []
    for rank, endpoint in enumerate(endpoints):
        group = {'PADDLE_TRAINER_ID': rank, 'PADDLE_TRAINERS_NUM': count, 'PADDLE_LOCAL_SIZE': count,
                 'PADDLE_TRAINER_ENDPOINTS': ','.join(endpoints), 'PADDLE_CURRENT_ENDPOINT': endpoint,
                 'FLAGS_selected_gpus': rank, 'RUN_PROCESSES_PID': os.getpid()}
        errors.append(tempfile.TemporaryFile())  # noqa: SIM115  open until the end
        processes.append(subprocess.Popen(command, stderr=errors[rank], env={
            **os.environ, **{name: str(value) for name, value in group.items()}}))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    try:
        failed = wait_for(processes)
    except KeyboardInterrupt:
        failed = 0
        for number in STOP_SIGNALS:  # the processes answer, those of a second Ctrl-C too
            signal.signal(number, signal.SIG_IGN)
    finally:
        end(processes)
    if failed is None:
        return 0
    errors[failed].seek(0)
    status = processes[failed].returncode
    with contextlib.suppress(OSError):  # nobody may read it
        sys.stderr.write(errors[failed].read().decode(errors='replace'))
        if status < 0:
            print(f'rank {failed} was ended by {signal.Signals(-status).name}', file=sys.stderr)
        elif status == STOPPED and failed:  # of rank 0 it is said already
            print(f'rank {failed} was asked to stop; -resume auto goes on', file=sys.stderr)
    return 128 - status if status < 0 else status


def wait_for(processes):
    """Wait until all processes have ended (returns None) or one has failed: returns its number."""
    failed, statuses = [], [None]
    while not failed and None in statuses:
        time.sleep(0.1)
        statuses = [process.poll() for process in processes]
        failed = [number for number, status in enumerate(statuses) if status]
    if not failed:
        return None
    # one that raises may take longer to end than what its end does to the others
    deadline = time.monotonic() + 2
    while None in statuses and time.monotonic() < deadline:
        time.sleep(0.1)
        statuses = [process.poll() for process in processes]
    failed += [number for number, status in enumerate(statuses) if status and number not in failed]
    # a user's mistake (status 2) is often found by all; gloo aborts the others when one has gone, which is no news
    mistakes = [number for number, status in enumerate(statuses) if status == 2]
    causes = [number for number in failed if statuses[number] != -signal.SIGABRT]
    # one that is asked to stop during an evaluation goes alone, which the others may take for a failure
    stopped = [number for number, status in enumerate(statuses) if status == STOPPED]
    return (mistakes or stopped or causes or failed)[0]


def end(processes, patience=30):
    """Terminate processes, and kill those that have not ended after `patience` seconds."""
    deadline = time.monotonic() + patience
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
