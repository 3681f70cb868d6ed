"""Count the operators that a training step starts: on a GPU each costs the host time, however small its work is."""
from paddle.profiler import Profiler, ProfilerTarget


def count_launches(step):
    """Operator launches of a call of step(), on all threads. Call step() once before: a first call does more.

    They are the profiler's events of the type DygraphKernelLaunch. PaddlePaddle 2.6.2 has no such type; there they are
    the events called "<operator> compute".
    """
    # without a handler of its own the profiler writes files
    with Profiler(targets=[ProfilerTarget.CPU], on_trace_ready=lambda profiler: None) as profiler:
        step()
    return sum(map(_launches_below, profiler.profiler_result.get_data().values()))


def _launches_below(event):
    is_launch = event.type.name == 'DygraphKernelLaunch' or event.name.endswith(' compute')
    return is_launch + sum(map(_launches_below, event.children_node))
