"""How the book draws, written by hand: one palette, one style, and alt text on every figure.

The colours are from Okabe and Ito (2008), which stay apart under the common kinds of colour blindness. The same
thing has the same colour all through the book. Needs matplotlib, which the package itself does not.
"""

import io

COLORS = {
    "gpt": "#0072B2",  # the old: GPT and its parts
    "llama": "#D55E00",  # the new: Llama and its parts
    "floor": "#333333",  # limits that nobody can beat: entropy, bandwidth
    "third": "#009E73",  # a third thing beside the two
    "fourth": "#CC79A7",
    "fifth": "#E69F00",
    "faint": "#BBBBBB",
}


def figure(rows: int = 1, columns: int = 1, *, width: float = 8.0, height: float = 3.6, **subplots):
    """A matplotlib figure and its axes in the book's style; size in inches, further arguments as `plt.subplots`."""
    import matplotlib.pyplot as plt

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
    plt.rcParams.update(style)
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **subplots)


def show(fig, alt: str, dpi: int = 110):
    """Display `fig` as a PNG that carries `alt`, the sentence a reader hears who can't see it, and close it."""
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    if not alt.strip():
        raise ValueError("show needs alt text: say in a sentence what the figure shows")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(fig)
    display(Image(buffer.getvalue(), format="png", alt=alt))
