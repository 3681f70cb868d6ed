"""Draw mobileone.png: a MobileOne block during training and after fusion.

  python -m tools.draw_block -save mobileone.png

Needs matplotlib (pip install matplotlib).
"""
import os

from runtime.files import replace
from runtime.program import run_program
from runtime.settings import ArgumentParser
from tools import import_pyplot

CONV, NORM, FUSED, PLAIN = '#cfe2f3', '#fff2cc', '#d9ead3', '#eeeeee'
LINE, ACCENT = '#444444', '#a02020'
BATCH_NORM = ('batch norm', NORM)
# the layers of a block: name of a branch -> its operations
DEPTHWISE = [('skip', [BATCH_NORM]), ('scale', [('1×1 depthwise', CONV), BATCH_NORM]),
             ('branch 1', [('3×3 depthwise', CONV), BATCH_NORM]), ('branch k', [('3×3 depthwise', CONV), BATCH_NORM])]
POINTWISE = [('skip', [BATCH_NORM]), ('branch 1', [('1×1', CONV), BATCH_NORM]),
             ('branch k', [('1×1', CONV), BATCH_NORM])]
LAYER_HEIGHT, SPREAD = 4.0, 1.9


def box(axes, x, y, text, color, width=1.7):
    axes.text(x, y, text, ha='center', va='center', fontsize=9, zorder=3)
    axes.fill_between((x - width / 2, x + width / 2), y - 0.27, y + 0.27, facecolor=color, edgecolor=LINE, zorder=2)


def line(axes, *points, arrow=True):
    """Draw a line through points, by default with an arrow at its end."""
    axes.plot(*zip(*points), color=LINE, lw=1.1, zorder=1)
    if arrow:
        axes.annotate('', points[-1], points[-2], arrowprops={'arrowstyle': '-|>', 'color': LINE, 'shrinkA': 0,
                                                              'shrinkB': 0})


def training_layer(axes, x, top, branches):
    """Draw a layer below y = `top`: its branches, their sum and the activation, LAYER_HEIGHT in total."""
    total = top - 2.75
    for index, (name, operations) in enumerate(branches):
        bx = x + SPREAD * (index - (len(branches) - 1) / 2)
        heights = (top - 0.9, top - 1.65)[-len(operations):]
        line(axes, (x, top), (bx, top - 0.3), (bx, heights[0] + 0.27))
        line(axes, (bx, heights[0] - 0.27), (bx, top - 2.35), (x, total + 0.2), arrow=False)
        for (text, color), y in zip(operations, heights):
            box(axes, bx, y, text, color)
        axes.text(bx, top - 2.13, name, ha='center', va='center', fontsize=8, style='italic', color=ACCENT, zorder=3,
                  bbox={'fc': 'white', 'ec': 'none', 'pad': 0.5})
    axes.text(x, total, '+', ha='center', va='center', fontsize=13, bbox={'boxstyle': 'circle,pad=0.12', 'fc': 'white'})
    line(axes, (x, total - 0.2), (x, top - 3.2))
    box(axes, x, top - 3.47, 'SE (S4), ReLU', PLAIN)


def fused_layer(axes, x, top, text):
    """Draw the same layer after fusion."""
    line(axes, (x, top), (x, top - 1.38))
    box(axes, x, top - 1.65, text, FUSED, width=2.4)
    line(axes, (x, top - 1.92), (x, top - 3.2))
    box(axes, x, top - 3.47, 'SE (S4), ReLU', PLAIN)


def draw(path):
    """Write the figure to `path`, in the format of its extension."""
    figure, axes = import_pyplot().subplots(figsize=(10, 6.6), dpi=110)
    training_layer(axes, 0, 0, DEPTHWISE)
    training_layer(axes, 0, -LAYER_HEIGHT, POINTWISE)
    fused_x = 6.8
    fused_layer(axes, fused_x, 0, '3×3 depthwise, bias')
    fused_layer(axes, fused_x, -LAYER_HEIGHT, '1×1, bias')
    for x, title in ((0, 'training'), (fused_x, 'inference')):
        axes.text(x, 0.6, title, ha='center', fontsize=13, weight='bold')
        axes.text(x, 0.12, 'input', ha='center', fontsize=9)
        line(axes, (x, -3.74), (x, -LAYER_HEIGHT), arrow=False)
        line(axes, (x, -3.74 - LAYER_HEIGHT), (x, -0.2 - 2 * LAYER_HEIGHT))
        axes.text(x, -0.5 - 2 * LAYER_HEIGHT, 'output', ha='center', fontsize=9)
    axes.annotate('', (5.3, -4), (4.4, -4), arrowprops={'arrowstyle': '-|>', 'lw': 2, 'color': ACCENT})
    axes.text(4.85, -3.85, 'fuse', fontsize=12, ha='center', color=ACCENT)
    axes.set_axis_off()
    kind = os.path.splitext(path)[1][1:] or 'png'
    replace(path, lambda partial: figure.savefig(partial, bbox_inches='tight', format=kind))


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('-save', metavar='FILE', default='mobileone.png',
                        help='image file to write (default: mobileone.png)')
    draw(parser.parse_args().save)


if __name__ == '__main__':
    run_program(main)
