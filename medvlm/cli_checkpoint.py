"""``medvlm checkpoint``: look into, verify, consolidate and prune the checkpoints of a run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Look into, verify, consolidate and prune checkpoints.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Source = Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint), or a folder checkpoints/step-*.")]


@app.command("inspect")
def checkpoint_inspect(path: Source, as_json: Json = False) -> None:
    """Print what a checkpoint holds: parts, parameters, optimizer states, ranks, stage, step."""
    from medvlm.training.checkpoint import report

    found = report.inspect(path)
    print(json.dumps(found)) if as_json else report.print_inspect(found)


@app.command("verify")
def checkpoint_verify(path: Source, as_json: Json = False) -> None:
    """Read every byte of a run's checkpoints, or of one, and compare checksums; exits with 1 on a damaged one."""
    from medvlm.training.checkpoint import report

    found = report.verify(path)
    if as_json:
        print(json.dumps(found))
    else:
        for row in found:
            print(f"{row['path']}: {row['problem'] or 'intact'} ({row['bytes']:,} bytes)")
    raise typer.Exit(1 if any(row["problem"] for row in found) else 0)


@app.command("consolidate")
def checkpoint_consolidate(
    path: Source,
    out: Annotated[Path, typer.Option(help="A new folder for model-00001-of-0000N.safetensors and their index.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    shard_gib: Annotated[float, typer.Option(min=0.0001, help="Size of a file.")] = 4.0,
    as_json: Json = False,
) -> None:
    """Write whole weights under their names in training, adapters apart; tensor by tensor, in little memory."""
    from medvlm.training.checkpoint import report

    print_result(report.consolidate_to(path, out, dtype, shard_gib), as_json)


@app.command("prune")
def checkpoint_prune(
    run: Annotated[Path, typer.Argument(help="The folder of a run that is not training.")],
    keep: Annotated[int | None, typer.Option(min=1, help="Keep the newest so many complete ones.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="With --keep: and those at multiples of it.")] = None,
    after: Annotated[str | None, typer.Option(help="Remove all after this one, such as step-00000100.")] = None,
    as_json: Json = False,
) -> None:
    """Remove old checkpoints, or those after one to go back to."""
    from medvlm.training.checkpoint import report

    print_result(report.prune_run(run, keep, keep_every, after), as_json)


def print_result(values: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(values) if as_json else "\n".join(f"{key}: {value}" for key, value in values.items()))
