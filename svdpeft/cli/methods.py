"""``svdpeft methods`` and ``svdpeft cite``."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from svdpeft.cli.app import Json, app, console, fail
from svdpeft.cli.completion import method_names


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, for its card.", autocompletion=method_names)] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(help="Only this one: split, core, data, low-rank, shared, transform or base; may be repeated."),
    ] = None,
    search: Annotated[str, typer.Option(help="Only methods whose name, description or source has these words.")] = "",
    as_json: Json = False,
) -> None:
    """List the methods by what trains, or print one method's card.

    Example: svdpeft methods --family core --search orthogonal
    """
    from svdpeft import zoo
    from svdpeft.zoo import SIDE, card

    if name is not None:
        try:
            c = card(name)
        except ValueError as error:
            fail(error)
        if as_json:
            print(json.dumps({**vars(c), "cls": c.cls.__name__}))
        else:
            _print_card(c)
        return
    try:
        cards = zoo.search(search, family or ())
    except ValueError as error:
        fail(error)
    if not cards:
        fail(ValueError(f"no method has {search!r}{' in ' + ' or '.join(family) if family else ''}"))
    if as_json:
        print(json.dumps([{**vars(c), "cls": c.cls.__name__} for c in cards]))
        return
    for each in dict.fromkeys(c.family for c in cards):
        console.print(f"\n[bold]{each}[/bold]  {zoo.FAMILIES[each]}", highlight=False)
        console.print(_table([c for c in cards if c.family == each]))
    console.print(
        f"\n{SIDE}x{SIDE}: values that train at one such layer with the defaults. start: whether the model starts "
        "as the base. LoRA: rank of the plain LoRA that holds the trained adapter, – where none does. `svdpeft methods "
        "NAME` says more, also why a method is not defined on a layer kind.",
        style="dim",
        highlight=False,
    )


@app.command()
def cite(
    names: Annotated[list[str], typer.Argument(help="Methods, such as sorsa pissa.", autocompletion=method_names)],
) -> None:
    """Print the BibTeX entries of methods."""
    import svdpeft

    try:
        entries = svdpeft.cite(*names)
    except ValueError as error:
        fail(error)
    if not entries:
        fail(ValueError(f"{', '.join(names)}: no paper to cite"))
    print(entries)  # not through rich: an entry is for a file


def _table(cards: Sequence[Any]) -> Table:
    """Some of the methods, a line each; the columns are as wide in every family."""
    from svdpeft.zoo import SIDE

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("method", no_wrap=True, min_width=18)
    table.add_column("trains", width=20)
    table.add_column(f"{SIDE}x{SIDE}", justify="right", no_wrap=True, min_width=10)
    table.add_column("start", no_wrap=True)
    table.add_column("LoRA", justify="right", no_wrap=True, min_width=4)
    table.add_column("works on", min_width=16)
    for c in cards:
        missing = sum(bool(why) for why in c.kinds.values())
        works = f"all but {missing} kinds" if missing else c.works
        values, start = f"{c.values:,}" if c.values else "", "exact" if c.exact_start else "off"
        table.add_row(c.name, c.trains, values, start, str(c.export_rank or "–"), works)
    return table


def _print_card(c: Any) -> None:
    """What a paper's reader wants to know of a method."""
    show = functools.partial(console.print, markup=False, highlight=False)
    show(c.title, style="bold")
    if c.formula:
        show(f"\n{c.formula}", soft_wrap=True)  # a formula that is broken in two is not read
    if c.summary:
        show(f"\n{c.summary}")
    for section in ("When to use", "Paper and code", "Args"):
        if section in c.sections:
            show(f"\n{section}", style="bold")
            show(c.sections[section].replace("\n", " " if section == "When to use" else "\n"))
    if c.works:
        show("\nAt a glance", style="bold")
        reason = next((f" ({why})" for why in c.kinds.values() if why), "")
        values = f" {c.values:,} at 4096x4096 with the defaults" if c.values else ""
        show(f"trains         {c.trains}\nvalues         {c.parameters}{values}")
        show(f"start          {'the base model, bit for bit' if c.exact_start else 'off the base model'}")
        show(f"as a LoRA      {f'of rank {c.export_rank} there' if c.export_rank else 'no'}")
        show(f"works on       {c.works}{reason}")
        show("\nCombinations", style="bold")
        for what, how in c.combines.items():
            show(f"{what}: {how}")
    if c.citation:
        show(f"\n{c.citation}")
