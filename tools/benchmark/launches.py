"""Count the operators that a training step launches: on a GPU, each one costs host time, however small it is."""
from paddle.profiler import Profiler, ProfilerTarget


def count_launches(step):
    """Return the number of operators that a call of step() launches, on all threads.

    Call step() once before, because the first call does additional work. Launches are the profiler's events of type
    DygraphKernelLaunch or, on PaddlePaddle 2.6.2, which has no such type, those named "<operator> compute".
    """
    # without a handler, the profiler would write files
    with Profiler(targets=[ProfilerTarget.CPU], on_trace_ready=lambda profiler: None) as profiler:
        step()
    return sum(map(_launches_below, profiler.profiler_result.get_data().values()))


def _launches_below(event):
    is_launch = event.type.name == 'DygraphKernelLaunch' or event.name.endswith(' compute')
    return is_launch + sum(map(_launches_below, event.children_node))
