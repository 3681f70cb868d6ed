"""Programs for users: `python -m tools.NAME -h` explains each."""
from utils import UserError


def import_pyplot():
    """matplotlib.pyplot, which draws without a screen. Raises: UserError without matplotlib, an optional extra."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('drawing needs matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot
