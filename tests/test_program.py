"""How programs start, handle stop signals, and end; errors before Paddle is imported."""
import contextlib
import glob
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, fails, options, records, run

from runtime import program
from utils import UserError


@pytest.mark.parametrize('installed, message', [
    ({'numpy': '2.1.0', 'paddlepaddle': '2.6.2'}, 'numpy 2.1.0 crashes paddlepaddle 2.6.2: pip install "numpy<2"'),
    ({'numpy': '2.1.0', 'paddlepaddle-gpu': '2.6.2'}, 'numpy 2.1.0 crashes paddlepaddle-gpu 2.6.2'),
    ({'numpy': '2.1.0'}, 'PaddlePaddle is not installed: pip install paddlepaddle'),
    ({'numpy': '1.26.4', 'paddlepaddle': '2.6.2'}, None),
    ({'numpy': '2.3.5', 'paddlepaddle': '3.3.1'}, None),
])
def test_versions_that_crash_are_refused(monkeypatch, installed, message):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, 'version', version)
    if message is None:
        program._check_versions()
    else:
        with pytest.raises(UserError, match=message):
            program._check_versions()


def test_threads_are_set_only_if_unset():
    code = 'import os; from runtime import program; program.prepare_runtime(); print(os.environ.get("OMP_NUM_THREADS"))'
    assert run('-c', code, env={'OMP_NUM_THREADS': '1'}, fork=False).stdout == '1\n'
    if not glob.glob('/dev/nvidia[0-9]*'):
        unset = 'import os; os.environ.pop("OMP_NUM_THREADS", None); ' + code
        process = run('-c', unset, fork=False)
        assert process.stdout == f'{len(os.sched_getaffinity(0))}\n' and process.stderr == ''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='a setting of glibc')
def test_freed_memory_is_kept_for_the_next_step():
    """A 64 MiB tensor has 16,384 pages: the first tensor faults in most of them, a later one almost none.

    Not every later one: another thread's allocation may leave too small a gap.
    """
    code = """import resource
from runtime.program import prepare_runtime
prepare_runtime()
import paddle
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    paddle.ones([2 ** 24])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    first, *later = map(int, run('-c', code, fork=False).stdout.split())
    assert first > 10000 and min(later) < 100


def test_some_modules_do_not_import_paddle():
    code = 'import sys, config, utils, runtime.program, tools.make_list; assert "paddle" not in sys.modules'
    run('-c', code, fork=False)


def test_a_stop_request_records_the_first_signal():
    """The handlers are restored afterward, even after an exception, so that a notebook can continue."""
    before = [signal.getsignal(number) for number in program.STOP_SIGNALS]
    with pytest.raises(SystemExit), program.StopRequest() as stop:
        assert [signal.getsignal(number) for number in program.STOP_SIGNALS] != before
        for number in (signal.SIGTERM, signal.SIGINT):
            assert stop.name in ('', 'SIGTERM')
            with pytest.raises(KeyboardInterrupt) if stop.name else contextlib.nullcontext():
                signal.raise_signal(number)
        sys.exit()
    assert [signal.getsignal(number) for number in program.STOP_SIGNALS] == before and stop.name == 'SIGTERM'


def test_a_stop_request_does_nothing_in_another_thread():
    names = []

    def work():
        with program.StopRequest() as stop:
            names.append(stop.name)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == ['']


def test_a_second_signal_does_not_change_the_exit_status():
    """A launcher may send another signal while Python exits."""
    code = """
import atexit, os, signal, sys
from runtime import program
program.prepare_runtime()
atexit.register(lambda: [os.kill(os.getpid(), number) for number in program.STOP_SIGNALS])
program.run_program(lambda: sys.exit(int(sys.argv[1])))"""
    for status in (program.STOPPED, 128 + signal.SIGTERM):
        assert run('-c', code, status, status=status).stderr == ''
    assert 'KeyboardInterrupt' in run('-c', code, 3, status=3).stderr  # as after any other end


@pytest.mark.parametrize('when', ['paddle.vision', 'later'])
@pytest.mark.parametrize('group', [False, True])
def test_a_signal_during_startup(when, group):
    """PaddlePaddle's stack trace is not shown, whether during its import or in a process of a group."""
    code = """
import os, signal, sys
from runtime import program

class Finder:
    def find_spec(name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder)
program.prepare_runtime()
Finder.find_spec('later')
print('not ended')"""
    # NumPy's threads may receive the signal too
    env = {'OMP_NUM_THREADS': '2', **({'PADDLE_TRAINER_ID': '0'} if group else {})}
    process = run('-c', code, when, status=128 + signal.SIGTERM, env=env, fork=False)
    assert process.stdout == process.stderr == ''


def shell(line, *args):
    """Run a line of sh, with `python *args` as "$@", in a real process. Returns: (status, stdout, stderr)."""
    process = subprocess.run(['sh', '-c', line, 'sh', sys.executable, *map(str, args)], cwd=ROOT, capture_output=True,
                             text=True, stdin=subprocess.DEVNULL, timeout=100)
    return process.returncode, process.stdout, process.stderr


HELP = ['main_single_gpu.py', '-h']


def test_closed_streams():
    closed = 'main_single_gpu.py: error: stdout is closed: redirect it to a file or to /dev/null\n'
    assert shell('"$@" >&-', *HELP) == (2, '', closed)
    # a file opened later must not get the descriptor of a closed stream
    code = 'from runtime.program import run_program; run_program(lambda: print(open("LICENSE").fileno()))'
    assert shell('"$@" 0<&- 2>&-', '-c', code) == (0, '3\n', '')


def test_stdout_that_cannot_be_written():
    for length in (1, 100_000):  # below and above the size of stdout's buffer
        code = f'from runtime.program import run_program; run_program(lambda: print("a" * {length}))'
        status, _, error = shell('"$@" >/dev/full', '-c', code)
        message = 'error: stdout or another file: No space left on device; free up disk space'
        assert status == 2 and message in error and error.count('\n') == 1


@pytest.mark.parametrize('encoding, shown', [('ascii', r'\u0141\xf3d\u017a'), ('utf-8', 'Łódź')])
def test_characters_that_the_console_cannot_show(encoding, shown):
    code = ('import sys; from runtime.program import run_program; from utils import UserError\n'
            'def main():\n    print("Łódź")\n    raise UserError("Łódź")\n'
            'run_program(main)')
    process = run('-c', code, status=2, env={'PYTHONIOENCODING': f'{encoding}:strict', 'PYTHONUTF8': '0'}, fork=False)
    assert process.stdout == f'{shown}\n' and process.stderr == f'-c: error: {shown}\n'


@pytest.mark.parametrize('name, value', [
    ('PADDLE_TRAINERS_NUM', 'two'), ('PADDLE_TRAINERS_NUM', '0'), ('PADDLE_TRAINERS_NUM', '9' * 5000),
    ('PADDLE_TRAINER_ID', ''), ('PADDLE_TRAINER_ID', '-1'), ('PADDLE_LOCAL_SIZE', '1.5'), ('PADDLE_LOCAL_SIZE', '0'),
    ('FLAGS_selected_gpus', '0,x'), ('SLURM_STEP_NUM_TASKS', 'all')])
def test_bad_numbers_in_the_environment(name, value):
    for program_name in ('main_single_gpu.py', 'main_multi_gpu.py'):
        error = run(program_name, status=2, env={name: value}, fork=False).stderr
        assert f'environment variable {name} is {value[:100]!r}, but must be an ' in error and error.count('\n') == 1


def ends(code):
    """Run a program that executes `code` and must fail as for a user's mistake. Returns: its line on stderr."""
    return fails('-c', f'import errno, os, resource, sys\nimport numpy as np\nfrom runtime import program\n'
                 f'def main():\n    {code}\nprogram.run_program(main)')


@pytest.mark.parametrize('code, message', [
    ('raise MemoryError', 'out of memory: use smaller batches, images or networks'),
    ('np.empty(10 ** 15)', 'out of memory (Unable to allocate 7.11 PiB for an array'),
    ('import paddle; paddle.zeros([10 ** 7, 10 ** 7])', 'out of memory (Fail to alloc memory of'),
    # PaddlePaddle's error on a GPU
    (r'raise RuntimeError("C++ Traceback\n\nResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot allocate '
     r'9GB.\n\nPlease check")', 'out of memory (Out of memory error on GPU 0. Cannot allocate 9GB.): use'),
    ('raise RuntimeError("while reading item 3: MemoryError")', 'out of memory: use'),
    ('bytearray(10 ** 30)', 'a number is too large to compute with (cannot fit'),
    ('raise RuntimeError("can\'t start new thread")', 'raise the limit with `ulimit -u`'),
    ('resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); files = [open(os.devnull) for _ in range(20)]',
     '/dev/null: Too many open files; the process may not open more files: raise the limit with `ulimit -n`'),
    ('open("a" * 300)', 'File name too long; names are limited to 255 bytes'),
    ('raise OSError(errno.EDQUOT, "Disk quota exceeded", "a.txt")', 'a.txt: Disk quota exceeded; your quota'),
    ('raise OSError(errno.EFBIG, "File too large")', 'stdout or another file: File too large; the file would exceed '
     'the size limit: raise it with `ulimit -f`'),
    ('raise OSError(errno.EROFS, "Read-only", "a")', 'a: Read-only; the file system is read-only'),
    ('raise OSError(errno.ENOMEM, "Cannot allocate memory")', 'out of memory'),
    ('open("/dev/null/x")', '/dev/null/x: Not a directory; check the path and its permissions'),
])
def test_system_limits_are_reported(code, message):
    assert message in ends(code)


def test_a_network_that_does_not_fit_into_memory(tmp_path, fashion):
    line = fails('main_single_gpu.py', '-output', tmp_path / 'run', *options(
        fashion, 'MODEL.CHANNELS', '[4,1000000,1000000,8,8]'))
    assert 'out of memory (' in line and line.endswith('or a machine with more memory')


STARTS = {
    'script': [*HELP],
    'debugger': ['-m', 'pdb', '-c', 'continue', *HELP],
    'profiler': ['-m', 'cProfile', *HELP],
    'runpy': ['-c', 'import runpy; runpy.run_path("main_single_gpu.py", None, "__main__")', '-h'],
    'module': ['-m', 'tools.fuse', '-h'],
    'profiler of a module': ['-m', 'cProfile', '-m', 'tools.fuse', '-h'],
    'debugger of a module': ['-m', 'pdb', '-c', 'continue', '-m', 'tools.fuse', '-h'],
}


@pytest.mark.parametrize('start', STARTS)
def test_programs_start_under_other_programs(start):
    status, out, error = shell('"$@"', *STARTS[start])
    name = 'tools.fuse' if 'module' in start else 'main_single_gpu.py'
    assert status == 0 and error == '' and 'Traceback (' not in out
    assert f'usage: {name} [-h]' in out or (start, sys.version_info < (3, 11)) == ('debugger of a module', True)


@pytest.mark.parametrize('cause, message, status', [
    ('KeyboardInterrupt()', 'interrupted', 130),
    ('None', 'PaddlePaddle cannot be imported (initialization failed); if libgomp.so.1 is missing, ', 2),
])
def test_imports_that_fail(cause, message, status, tmp_path):
    """With a stand-in for Paddle, whose C++ module reports Ctrl-C as an ImportError."""
    (tmp_path / 'paddle.py').write_text(f'raise ImportError("initialization failed") from {cause}')
    process = run('main_single_gpu.py', status=status, env={'PYTHONPATH': str(tmp_path)}, fork=False)
    assert process.stderr.startswith(f'main_single_gpu.py: error: {message}') and process.stderr.count('\n') == 1


@pytest.mark.parametrize('name, args', [('main_single_gpu', []), ('main_multi_gpu', ['-nproc', '2'])])
def test_programs_start_in_a_notebook(fashion, tmp_path, name, args):
    """In a notebook, __main__ has neither file nor spec, and sys.argv and sys.stdout are the notebook's."""
    code = f"""
import io, sys
import __main__
for attribute in ('__file__', '__spec__'):
    vars(__main__).pop(attribute, None)
sys.argv[0], sys.stdout = '/usr/lib/ipykernel_launcher.py', io.TextIOWrapper(io.BytesIO())
import {name}
try:
    {name}.main()
except SystemExit as error:
    assert error.code == 0"""
    run('-c', code, *args, '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '1'))
    assert [row['split'] for row in records(tmp_path / 'run')] == ['train', 'val', 'val']


WITHOUT_LINUX = """
import zlib, multiprocessing, os, signal, subprocess, sys
import numpy, onnx, onnxruntime, openvino, paddle, paddle.io, paddle.vision, tqdm, yaml, PIL.Image
open_file, sync, writable = os.open, os.fsync, []

def open_no_folder(path, flags, *more, **of_shutil):
    if of_shutil:  # shutil, which works differently on other systems
        return open_file(path, flags, *more, **of_shutil)
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', path)
    writable.append(flags & os.O_RDWR)
    return open_file(path, flags, *more)

def sync_what_is_writable(descriptor):
    assert writable.pop()
    sync(descriptor)

os.open, os.fsync = open_no_folder, sync_what_is_writable
for module, names in [
        (signal, 'pthread_sigmask sigwait SIGHUP SIGUSR1 SIGUSR2 SIGXCPU SIGXFSZ SIGALRM SIGKILL SIGCHLD SIGRTMIN'),
        (os, 'fork sched_getaffinity sysconf O_DIRECTORY getuid register_at_fork uname killpg setsid wait')]:
    for name in names.split():
        delattr(module, name)
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
sys.platform = 'win32'
"""


def test_without_linux(fashion, tmp_path):
    """A network is built, saved, loaded, fused, evaluated and trained without what other systems lack."""
    def start(code, *args, status=0):
        return run('-c', WITHOUT_LINUX + code, '-data_path', fashion, *options(fashion)[4:], 'TRAIN.NUM_EPOCHS', '1',
                   *args, status=status, fork=False)

    weights, fused = tmp_path / 'weights.pdparams', tmp_path / 'fused.pdparams'
    start(f"""
from config import get_config, get_parser, update_config
from mobileone import build_mobileone
from runtime import checkpoint
import load_pytorch_weights, tools.make_list
config = update_config(get_config(), get_parser('').parse_args())
checkpoint.save(build_mobileone(config).state_dict(), {str(weights)!r})""")
    fuse = 'from runtime.program import run_program; from tools import fuse; run_program(fuse.main)'
    out = start(fuse, '-pretrained', weights, '-save', fused).stdout
    assert '35 val images' in out and f'fused weights: {fused}' in out
    out = start(f'''
from runtime.program import run_program
from tools import export_model, predict
run_program(export_model.main)
sys.argv = ['predict', {str(next(fashion.glob('val/*/*.png')))!r}, '-model', {str(tmp_path / 'exported')!r}]
run_program(predict.main)''', '-pretrained', weights, '-output', tmp_path / 'exported').stdout
    assert 'model.onnx' in out and 'inference.pdmodel' in out and out.count('%') == 5
    main = 'from runtime.program import run_program; import main_single_gpu; run_program(main_single_gpu.main)'
    start(main, '-eval', '-pretrained', fused, '-output', tmp_path / 'run')
    assert records(tmp_path / 'run')[0]['n'] == 35
    out = start(main, '-pretrained', weights, '-output', tmp_path / 'more').stdout
    assert 'cannot be locked' in out and ' best top-1 ' in out
    several = 'from runtime.program import run_program; import main_multi_gpu; run_program(main_multi_gpu.main)'
    assert start(several, '-nproc', 2, status=2).stderr.endswith('error: 2 processes need Linux: use -nproc 1\n')


@pytest.fixture
def gpu_build(monkeypatch):
    """gpu_build(count) fakes a GPU build of PaddlePaddle that finds `count` GPUs; returns a list of the devices set."""
    import paddle
    chosen = []
    monkeypatch.setattr(paddle, 'is_compiled_with_cuda', lambda: True)
    monkeypatch.setattr(paddle.version, 'cuda', lambda: '12.6')
    monkeypatch.setattr(paddle, 'set_device', chosen.append)

    def find(count):
        monkeypatch.setattr(paddle.device.cuda, 'device_count', lambda: count)
        return chosen
    return find


@pytest.mark.parametrize('has_driver, visible, why', [
    (False, '0', 'no NVIDIA driver found (no /dev/nvidia0); install it, or start the container with --gpus '
                 'all'),
    (True, '', "CUDA_VISIBLE_DEVICES is ''; unset it, or name GPUs that `nvidia-smi -L` lists"),
    (True, '7', "CUDA_VISIBLE_DEVICES is '7'; unset it, or name GPUs that `nvidia-smi -L` lists"),
    (True, None, 'the NVIDIA driver may be too old for CUDA 12.6; compare the CUDA version that `nvidia-smi` shows'),
])
def test_a_gpu_build_without_a_gpu_explains_why(gpu_build, monkeypatch, capsys, has_driver, visible, why):
    chosen = gpu_build(0)
    monkeypatch.setattr(program, '_has_driver', lambda: has_driver)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    with pytest.raises(UserError) as error:
        program.use_device('gpu')
    assert str(error.value) == f'-device is gpu, but PaddlePaddle finds no GPU: {why}'
    assert capsys.readouterr().err == '' and chosen == []
    program.use_device()
    warning = f'computing on the CPU because PaddlePaddle finds no GPU: {why}; if you want the CPU, give -device cpu\n'
    assert capsys.readouterr().err.partition(': warning: ')[2] == warning and chosen == ['cpu']


def test_only_rank_0_warns(gpu_build, monkeypatch, capsys):
    gpu_build(0)
    for rank in ('0', '1', '2'):
        monkeypatch.setenv('PADDLE_TRAINER_ID', rank)
        program.use_device()
    assert capsys.readouterr().err.count('warning: ') == 1


@pytest.mark.parametrize('gpus, device, index, used', [
    (0, 'cpu', 0, 'cpu'), (8, 'cpu', 3, 'cpu'), (8, 'gpu', 3, 'gpu:3'), (8, None, 3, 'gpu:3'), (1, None, 0, 'gpu:0')])
def test_a_requested_or_found_device_is_used_silently(gpu_build, capsys, gpus, device, index, used):
    chosen = gpu_build(gpus)
    program.use_device(device, index)
    assert chosen == [used] and capsys.readouterr().err == ''
    assert program.count_gpus(device) == (0 if used == 'cpu' else gpus)


def test_a_cpu_build_uses_the_cpu_silently(capsys):
    assert program.use_device() == program.use_device('cpu') == 'cpu' and capsys.readouterr().err == ''
    with pytest.raises(UserError, match='it is a CPU build; README.md has the commands'):
        program.use_device('gpu')


@pytest.mark.parametrize('args', [
    ['main_single_gpu.py'], ['main_multi_gpu.py'], ['main_multi_gpu.py', '-nproc', '2'],
    ['-m', 'tools.fuse', '-pretrained', 'w']])
def test_programs_take_the_device_flag(args):
    assert '-device is gpu, but PaddlePaddle finds no GPU: it is a CPU build' in fails(*args, '-device', 'gpu')
    assert "argument -device: invalid choice: 'tpu'" in fails(*args, '-device=tpu')


GPU_BUILD = """
import sys, paddle
paddle.is_compiled_with_cuda = lambda: True
paddle.base.core.get_cuda_device_count = lambda: 0
sys.argv[0] = {name!r}
import {module}
from runtime.program import run_program
run_program({module}.main)"""


@pytest.mark.parametrize('main', ['main_single_gpu', 'main_multi_gpu'])
def test_a_gpu_build_without_a_gpu_trains_on_the_cpu(fashion, tmp_path, main):
    code = GPU_BUILD.format(name=f'{main}.py', module=main)
    for args, warnings in (([], 1), (['-device', 'cpu'], 0)):
        folder = tmp_path / f'run {warnings}'
        process = run('-c', code, *args, '-output', folder, *options(fashion, 'TRAIN.NUM_EPOCHS', '1'))
        assert process.stderr.count('\n') == process.stderr.count(f'{main}.py: warning: computing on') == warnings
        assert [row['split'] for row in records(folder)] == ['train', 'val', 'val']


def test_device_cpu_computes_on_all_cores(monkeypatch):
    """Even in a GPU build on a machine with a GPU."""
    monkeypatch.setattr(program, '_check_versions', lambda: 'paddlepaddle-gpu')
    monkeypatch.setattr(program, '_has_driver', lambda: True)
    monkeypatch.setattr(program, '_import_paddle', lambda: None)
    prepared, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(program, '_prepare_cpu', lambda: prepared.append('cpu'))
    try:
        for device in (None, 'gpu', 'cpu'):
            program.prepare_runtime(device)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert prepared == ['cpu']


def test_device_cpu_does_not_use_gpus(fashion, tmp_path):
    code = ('import sys, paddle; paddle.device.cuda.device_count = lambda: 2; import main_multi_gpu; '
            'main_multi_gpu.main()')
    process = run('-c', code, '-device', 'cpu', '-output', tmp_path / 'run', *options(fashion, 'TRAIN.NUM_EPOCHS', '1'))
    assert ' on cpu, processes: 1, ' in process.stdout and process.stderr == ''


@pytest.mark.parametrize('device, backend', [('gpu:1', None), ('cpu', 'gloo')])
def test_processes_use_gloo_on_the_cpu(monkeypatch, device, backend):
    """Even in a GPU build."""
    import paddle
    monkeypatch.setattr(paddle.device, 'get_device', lambda: device)
    monkeypatch.setattr(paddle.distributed, 'init_parallel_env', lambda: None)
    monkeypatch.setenv('PADDLE_TRAINERS_NUM', '2')
    monkeypatch.setenv('PADDLE_DISTRI_BACKEND', '')
    monkeypatch.delenv('PADDLE_DISTRI_BACKEND')  # unset again after the test
    program.join_process_group()
    assert os.environ.get('PADDLE_DISTRI_BACKEND') == backend
