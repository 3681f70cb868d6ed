"""Start programs in a hundredth of a second by forking a server that has imported Paddle but computed nothing.

A forked program behaves like `python ARGUMENT ...` except when it starts and exits. Paddle, NumPy and the project's
modules are already imported, so the environment they read then (OMP_NUM_THREADS, MKL_*, GLOG_*) and Python's hash seed
are the server's. `ps` shows the server's command line. The ranks that main_multi_gpu.py starts are forked from its
process in turn. Tests of how a program starts need a real process.
"""
import atexit
import contextlib
import ctypes
import functools
import gc
import io
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Program:
    """A forked program, with the part of subprocess.Popen's interface that the tests use.

    stdout, stderr: file descriptors; if None, `communicate` returns the output.
    """
    _started = []

    def __init__(self, args, cwd=ROOT, env=None, stdout=None, stderr=None, start_new_session=False):
        self.args = [str(arg) for arg in args]
        self.returncode = None
        self._outputs = [tempfile.TemporaryFile('w+') for _ in range(2)]  # noqa: SIM115  open until the end
        fds = [output.fileno() if fd is None else fd for fd, output in zip((stdout, stderr), self._outputs)]
        self._report, report = os.pipe()
        request = [self.args, str(cwd), dict(os.environ if env is None else env), start_new_session]
        try:
            socket.send_fds(_server(), [json.dumps(request).encode()], [*fds, report])
        finally:
            os.close(report)
        self.pid = self._receive()
        self._started.append((self, start_new_session))

    def _receive(self):
        """Return the next number from `_serve`: first the process ID, then the wait status."""
        return struct.unpack('i', os.read(self._report, 4))[0]

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = os.waitstatus_to_exitcode(self._receive())
            os.close(self._report)
        return self.returncode

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout=None):
        self.wait(timeout)
        for output in self._outputs:
            output.seek(0)
        return tuple(output.read() for output in self._outputs)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    @classmethod
    def kill_all(cls):
        """Kill the programs that are still running, and the rest of the sessions that they started."""
        for program, has_session in cls._started:
            program.kill()
            if has_session:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
        cls._started.clear()


def run(command, cwd=ROOT, env=None, timeout=None, capture_output=True, text=True):
    """Like subprocess.run, for a command that begins with sys.executable, but forked."""
    process = Program(command[1:], cwd, env)
    try:
        outputs = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, *outputs)


@functools.lru_cache(None)
def _server():
    """Start this process's server, which ends with it. Returns: a socket to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
                         stdin=subprocess.DEVNULL, start_new_session=True, env={
                             **os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})
    return ours


# the code below runs in the server and in the programs


class _Forked(BaseException):
    """Raised in a new fork to unwind the inherited stack to where `args` can run."""

    def __init__(self, args):
        super().__init__()
        self.argv = args

    def run(self):
        # new stream objects: the server's were configured for its own stdout and stderr
        sys.stdout = open(1, 'w', 1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, 'wb', 0, closefd=False), errors='backslashreplace', write_through=True)  # noqa: SIM115
        # run no C++ destructors after Python exits: one of Paddle's (2.6.2) waits forever for a lock that a thread of
        # the server may have held during the fork
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)
        np.random.seed()  # Python's generator and Paddle's reseed themselves
        if 'PADDLE_TRAINER_ID' in os.environ:
            _take_time_as_rank()
        first, *rest = self.argv
        path = [*filter(None, os.environ.get('PYTHONPATH', '').split(':')), *_PATH]
        if first == '-c':
            sys.path[:] = ['', *path]
            sys.argv = ['-c', *rest[1:]]
            exec(compile(rest[0], '<string>', 'exec'), {'__name__': '__main__'})
        elif first == '-m':
            sys.path[:] = [os.getcwd(), *path]
            sys.argv = rest
            runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
        else:
            sys.path[:] = [os.path.dirname(os.path.abspath(first)), *path]
            sys.argv = self.argv
            runpy.run_path(first, run_name='__main__')


def _take_time_as_rank():
    """Start and exit no faster than a real process, because the other ranks depend on the timing."""
    # Python takes this long to exit. A rank that ends at once aborts a reduction that the others are about to finish,
    # and a rank that ends because of another must be seen to end after it
    atexit.register(time.sleep, 0.2)
    if os.environ['PADDLE_TRAINER_ID'] != '0':
        # wait until rank 0 listens: a refused rank would retry only after three seconds
        port = int(os.environ['PADDLE_TRAINER_ENDPOINTS'].split(',')[0].rpartition(':')[2])
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and (
                f':{port:04X} 00000000:0000 0A' not in pathlib.Path('/proc/net/tcp').read_text()):
            time.sleep(0.01)


def _become(args, cwd, env, fds):
    """Run a program in this new fork. fds: its stdin, stdout and stderr; -1 keeps the parent's."""
    for number, fd in enumerate(fds):
        if fd >= 0:
            os.dup2(fd, number)
    if cwd:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    raise _Forked(args)


class _Popen(subprocess.Popen):
    """Forks the ranks of main_multi_gpu.py, which run after the inherited stack is unwound."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more):
        if 'RUN_PROCESSES_PID' not in (env or ()):
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                                          creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                                          *more)
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(args[1:], cwd, env, [p2cread, c2pwrite, errwrite])
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _serve(requests):
    """Fork a program for every request, until the requesting process ends."""
    while True:
        request, fds, *_ = socket.recv_fds(requests, 2 ** 20, 3)
        if not request:
            os.killpg(0, signal.SIGKILL)  # also the remaining programs
        if not os.fork():
            break
        for fd in fds:
            os.close(fd)
    requests.close()
    args, cwd, env, start_new_session = json.loads(request)
    stdout, stderr, report = fds
    # an intermediate process that waits for the program, as its parent
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid:
        os.close(stdout)
        os.close(stderr)
        os.write(report, struct.pack('i', pid))
        os.write(report, struct.pack('i', os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(report)
    if start_new_session:
        os.setsid()
    _become(args, cwd, env, [-1, stdout, stderr])


if __name__ == '__main__':
    _PATH = [place for place in sys.path[1:] if place != str(ROOT)]
    from runtime.program import prepare_runtime
    prepare_runtime()
    import conftest  # noqa: F401  imported by workers.py
    import numpy as np

    import run as _  # noqa: F401  everything that programs import

    subprocess.Popen = _Popen
    gc.freeze()  # a program's exit does not collect all imported objects: 0.1 s instead of 0.3
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    run = functools.partial(_serve, socket.socket(fileno=int(sys.argv[1])))
    while run:
        try:
            run()
            run = None
        except _Forked as forked:
            run = forked.with_traceback(None).run
