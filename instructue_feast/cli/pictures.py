"""Pictures of the command line: checked by name before slow work, then written to a file or put into a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from instructue_feast.errors import ConfigError, MissingDependencyError, StorageError, listed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure_class() -> type[Figure]:
    """The `Figure` of matplotlib; one made directly is unknown to pyplot and needs no closing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("a picture needs matplotlib", "pip install 'instructue-feast[demo]'") from None
    return Figure


def check_picture(file: Path) -> None:
    """Refuses a file whose name is not that of a picture.

    Raises:
        ConfigError: The name ends in no format of matplotlib.
        MissingDependencyError: matplotlib is not installed.
    """
    formats = figure_class()().canvas.get_supported_filetypes()
    if file.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError(
            f"{file} is not the name of a picture", f"let it end in one of {listed(f'.{one}' for one in formats)}"
        )


def save_picture(figure: Figure, file: Path) -> None:
    """Writes a figure; the folder is made when missing.

    Raises:
        StorageError: The file cannot be written, or the figure not drawn. What matplotlib says is not repeated: it may
            quote the texts in the figure.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(
            f"cannot write {file}: {reason}", "free disk space, mend the rights or name another"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise StorageError(
            f"cannot draw {file}: {type(error).__name__} in matplotlib",
            "check the settings in your matplotlibrc, or do without the picture",
        ) from None


def inlined(figure: Figure) -> str:
    """A figure as PNG in base64, for a page; it is closed in any case."""
    from matplotlib import pyplot as plt

    stream = io.BytesIO()
    try:
        figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    finally:
        plt.close(figure)
    return base64.b64encode(stream.getvalue()).decode()
