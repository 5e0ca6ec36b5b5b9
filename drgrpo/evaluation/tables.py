"""Tables on the terminal."""

from collections.abc import Collection, Sequence

from rich.markup import escape
from rich.table import Table

from drgrpo.run.log import number


def make_table(
    title: str,
    columns: Sequence[str],
    *groups: list[list[str]],
    caption: str = "",
    left: Collection[str] = (),
) -> Table:
    """A table with a line between the groups of rows. The first column and those in `left` are
    aligned to the left. Brackets are shown as they are: `[/INST]` of a prompt is no markup."""
    table = Table(
        title=escape(title),
        caption=escape(caption) or None,
        title_justify="left",
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        to_the_left = i == 0 or column in left
        table.add_column(column, justify="left" if to_the_left else "right", overflow="fold")
    for rows in groups:
        for row in rows:
            table.add_row(*map(escape, row))
        table.add_section()
    return table


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def span(interval: Sequence[float]) -> str:
    return " to ".join(map(percent, interval))
