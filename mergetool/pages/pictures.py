"""Plots as SVG text inside a page: they follow the reader's mode, need nothing else, and show names as they are."""

import re
import warnings
from io import BytesIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mergetool.pages.cells import short
from mergetool.pages.colours import LIGHT, SERIES, VARIABLES
from mergetool.pages.parts import Picture
from mergetool.pages.words import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"(font:.*?[\d.]+px)[^;]*")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_NEEDLESS = ("metadata", "style")
_FEW_TENS = 300
_POINT = 4 / 3
"""Pixels of a page in a point of a figure."""
_DPI = 72
"""Dots per inch of every SVG: points."""


def drawn(picture: Picture, place: int) -> str:
    """The picture as `<svg>`; `place` keeps its marks apart from those of the other pictures of the page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_settings() | {"svg.hashsalt": f"mergetool {place}"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing|.*does not support .* natively")
        figure = Figure(figsize=picture.size, layout="constrained")
        axes = figure.subplots()
        picture.draw(axes)
        _plain_numbers(figure)
        _arrange(figure)
        out = BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _for_a_page(out.getvalue().decode(), picture.caption)


def _settings() -> dict[str, Any]:
    """Text stays text (in the page's font), and a dollar in a name stays a dollar."""
    from cycler import cycler

    styles = [(colour, MARKERS[place]) for place, colour in enumerate(SERIES["light"])]
    ink, muted = LIGHT["ink"], LIGHT["muted"]
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "axes.prop_cycle": cycler(color=[colour for colour, _ in styles], marker=[mark for _, mark in styles]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["line"],
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.markersize": 4,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), muted),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "hatch.color"), LIGHT["paper"]),
    }


def _plain_numbers(figure: "Figure") -> None:
    """Powers of ten as 0.001, not in the mathematics that names must not be taken for."""
    from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
                axis.set_minor_formatter(NullFormatter())
                low, high = sorted(axis.get_view_interval())
                if high < _FEW_TENS * low:  # else hardly a power of ten is in sight
                    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _arrange(figure: "Figure") -> None:
    """Give all parts their places, as saving would: but that would draw everything once more for it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    FigureCanvasSVG(figure)
    figure.dpi = _DPI
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)
        figure.set_layout_engine(None)


def _for_a_page(svg: str, caption: str) -> str:
    """Without what files need and pages do not; colours become variables, a size becomes a shape."""
    root = ElementTree.fromstring(_FORBIDDEN.sub("\ufffd", svg[svg.index("<svg") :]))
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in _NEEDLESS:
                parent.remove(child)
    for element in root.iter():
        _adapt(element)
    width = float(root.attrib["viewBox"].split()[2]) * _POINT
    root.attrib = {"role": "img", "aria-label": visible(caption), "viewBox": root.attrib["viewBox"]}
    root.attrib |= {"width": f"{width:.0f}", "style": f"--width:{width:.0f}px"}
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(element: ElementTree.Element) -> None:
    """Names as HTML wants them, colours as variables, the font of the page, no marks on mere groups."""
    element.tag = _local(element.tag)
    style = {_local(name): _COLOUR.sub(_variable, value) for name, value in element.attrib.items()}
    if "style" in style:
        style["style"] = _FONT.sub(r"\1 inherit", style["style"])
    if element.tag == "g":
        style.pop("id", None)
    element.attrib = style


def _variable(found: re.Match[str]) -> str:
    return VARIABLES.get(found[0], found[0])


def _local(name: str) -> str:
    """Without the namespace."""
    return name.rpartition("}")[2]
