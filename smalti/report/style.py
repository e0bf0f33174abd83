"""What all pages look like."""

from pathlib import Path

# Told apart by most colour-blind readers, and dark enough on white.
COLOURS = ("#2563eb", "#d9480f", "#0f9d77", "#a21caf", "#64748b", "#b45309")
_SHEETS = ("page.css", "quality.css")


def style() -> str:
    """The style sheets, to be put into a page that must stand alone."""
    return "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _SHEETS)
