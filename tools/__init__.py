"""Command-line programs; `python -m tools.NAME -h` explains each one."""


def import_pyplot():
    """Return matplotlib.pyplot with a backend that needs no display. Raises: UserError if matplotlib is missing."""
    from deploy.report import import_figure
    import_figure()
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot
