"""Where tables are printed."""

from rich.console import Console


def console() -> Console:
    """The terminal as wide as it is; wide enough for paths where there is none."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=110)
