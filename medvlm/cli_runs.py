"""``medvlm runs``: what is running, and how runs compare."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medvlm.errors import UserError


class ListByDefault(TyperGroup):
    """``medvlm runs [FOLDER]`` is ``medvlm runs list [FOLDER]``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.with_default(args))

    def with_default(self, args: list[str]) -> list[str]:
        return args if args and (args[0] in self.commands or args[0] == "--help") else ["list", *args]


app = typer.Typer(cls=ListByDefault, help="Runs in a folder (by default runs): state, progress, comparison.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or one run.")] = Path("runs"), as_json: Json = False
) -> None:
    """List runs: state, step, time left, last losses, checkpoints."""
    from medvlm.training import runs

    found = runs.find_runs(folder)
    if as_json:
        print(json.dumps(runs.as_json(found)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "state", "step", "left", "loss", "eval loss", "checkpoints", "last sign")
    table.columns[0].overflow = "fold"
    for info in found:
        newest = info.checkpoints[-1].removeprefix("step-").lstrip("0") if info.checkpoints else ""
        last = f"{len(info.checkpoints)}, to {newest}" if info.checkpoints else "none"
        step = f"{info.step}/{info.total}" if info.total else str(info.step)
        numbers = ("" if value is None else f"{value:.4f}" for value in (info.loss, info.eval_loss))
        sign = "" if info.updated is None else f"{duration(time.time() - info.updated)} ago"
        left = "" if info.eta_seconds is None else duration(info.eta_seconds)
        table.add_row(info.name, info.state, step, left, *numbers, last, sign)
    console = Console()
    console.print(table if found else f"{folder}: no runs")
    for info in found:
        if info.reason:
            console.print(f"{info.name}: {info.reason}", highlight=False, markup=False)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option(help="A picture of the curves, such as curves.png.")] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: last and best values, differing settings, and their curves side by side."""
    from medvlm.training import runs

    if len(folders) < 2:
        raise UserError("medvlm runs compare: give at least two runs")
    values = {str(folder): runs.summary(folder) for folder in folders}
    differing = runs.differences(folders)
    if out:
        from medvlm.training.runs_plot import plot

        plot(folders, out)
    if as_json:
        print(json.dumps({"runs": values, "differences": differing}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(folder.name for folder in folders))
    for name in dict.fromkeys(name for one in values.values() for name in one):
        table.add_row(name, *(shown(one.get(name)) for one in values.values()))
    table.add_section()
    for key, row in differing.items():
        table.add_row(key, *map(shown, row))
    Console().print(table)
    if out:
        print(f"curves: {out}")


def shown(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``2 h 05 min``, ``12 min`` or ``40 s``."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
