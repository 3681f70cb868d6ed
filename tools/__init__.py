"""Programs for users: `python -m tools.NAME -h` explains each."""


def import_pyplot():
    """matplotlib.pyplot, which draws without a screen. Raises: UserError without matplotlib, an optional extra."""
    from deploy.report import import_figure
    import_figure()
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    return pyplot
