"""tools.benchmark: what it prints, not how fast anything is."""
from conftest import NARROW, fails


def test_unknown_subcommands():
    assert fails('-m', 'tools.benchmark', 'speed').startswith(
        "tools.benchmark: error: argument command: invalid choice: 'speed'")
    assert 'the following arguments are required: command' in fails('-m', 'tools.benchmark')


def test_processes(fashion, call_main):
    from tools.benchmark import ddp

    args = ['-data_path', fashion, '-batch_size', '4', '-steps', '2', '-repeats', '1', '-opts', *NARROW,
            'MODEL.NUM_CLASSES', '10']
    rows = [line.split() for line in call_main(ddp, *args)[2:]]
    assert [row[0] for row in rows] == ['1', '2'] and all(float(row[1]) > 0 for row in rows)
    assert rows[0][5] == '100.0%'
    program = ['-m', 'tools.benchmark', 'ddp']
    assert 'tools.benchmark ddp: error: -nproc, -steps and -repeats must be at least 1' in fails(
        *program, *args, '-repeats', '0')
    # in processes of their own
    assert '-nproc 1: main_multi_gpu.py: error: ' in fails(*program, *args, 'TRAIN.ACCUM_ITER', '1000')
