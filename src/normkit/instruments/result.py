"""The base of the results of all instruments."""

import math
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Result:
    """A measurement: a frozen dataclass of plain numbers that plots itself and becomes JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-ready data; non-finite numbers, which JSON lacks, become None."""
        return plain(self)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the measurement.

        Args:
            ax: Matplotlib axes, default a new figure's.

        Returns:
            The axes.
        """
        raise NotImplementedError


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as JSON-ready data, without ``repr=False`` fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def axes(ax: "Axes | None") -> "Axes":
    """Return the given axes, or those of a new figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot() needs matplotlib: pip install 'normkit[study]'") from error
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def label(ax: "Axes", title: str, x: str, y: str) -> "Axes":
    """Label the axes, and show a legend for two or more lines."""
    ax.set(title=title, xlabel=x, ylabel=y)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()
    return ax
