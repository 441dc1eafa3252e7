"""``medvlm study``: several models trained, evaluated and compared as one command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from medvlm.errors import UserError


def study(
    name: Annotated[str, typer.Argument(help="A study's name, or the path of a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for everything it makes; by default studies/NAME.")] = None,
    print_config: Annotated[bool, typer.Option(help="Print the merged, validated study and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Train, export, evaluate and compare the entries of a study; what is done already is not done again."""
    from rich.console import Console

    from medvlm.study.schema import load_study

    chosen = load_study(name, overrides)
    if print_config:
        import yaml

        print(yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False), end="")
        return
    from medvlm.study import picture
    from medvlm.study.run import run_study

    title = Path(name).stem
    folder = out or Path("studies") / title
    progress = Console(stderr=True)
    results = run_study(
        chosen, title, folder, tell=lambda line: progress.print(line, markup=False, highlight=False, soft_wrap=True)
    )
    picture.draw(results, folder / "comparison.png")
    if as_json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        _print(results, folder)
    if results["failed"]:
        raise UserError("; ".join(f"{entry}: {why}" for entry, why in results["failed"].items()))


def _print(results: dict, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from medvlm.study.compare import shown, shown_difference

    console = Console()
    entries = list(results["models"])
    for key, found in results["evaluations"].items():
        table = Table("measure", title=f"{results['study']}: {key} (95 % interval)")
        for entry in entries:
            table.add_column(entry, justify="right")
        for line in found["lines"]:
            style = "dim" if line["control"] else None
            table.add_row(line["label"], *(shown(line, entry) for entry in entries), style=style)
            if "difference" in line:
                cells = (shown_difference(line, entry) for entry in entries)
                table.add_row(f"  minus {found['baseline']}", *cells, style="cyan")
        console.print(table)
    console.print(f"written: {folder / 'results.json'}, {folder / 'comparison.png'}", markup=False, highlight=False)
