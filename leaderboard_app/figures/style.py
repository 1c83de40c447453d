"""What all figures share: a palette that stays the same for a stack of techniques, and text that stays text."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

# Okabe and Ito's, which people with any colour vision can tell apart; black is left to the lines.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#B8A800")


def colours(stacks: Iterable[str]) -> dict[str, str]:
    """A colour for each stack of techniques. Give all stacks there are, so that a filter never changes a colour."""
    return {stack: PALETTE[index % len(PALETTE)] for index, stack in enumerate(sorted(set(stacks)))}


def label(*parts: str) -> str:
    """Plotly reads a few HTML tags in its texts; a record's text is text."""
    return escape(" · ".join(part if len(part) <= 40 else f"{part[:39]}…" for part in parts if part))
