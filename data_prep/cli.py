"""``medvlm prepare``: a command per converter, and the other commands that make data.

This module is imported for every ``medvlm prepare``; nothing heavy may be.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from data_prep.items import Converter
from medvlm.errors import UserError

CONVERTERS = (
    *("mimic_cxr", "chexpert", "iu_xray", "ct_rate", "generic", "rocov2", "pmc_oa", "pmc_vqa", "llava_med"),
    *("vqa_rad", "slake", "path_vqa", "vqa_med", "radfm", "covid_cxr"),
)
# Commands whose modules are heavy: name -> module, function, help.
COMMANDS = {
    "phantom": ("data_prep.phantom", "prepare", "Draw synthetic chest radiographs with reports, boxes and questions."),
    "tokenizer": ("data_prep.tokenizer", "prepare", "Train a SentencePiece or WordPiece tokenizer."),
    "screen-text": ("data_prep.burnt_in", "prepare", "List pictures in which OCR reads text, and blank it."),
    "deidentify": ("data_prep.deidentify", "prepare", "Write DICOM files without identifiers, and audit the result."),
}
PANEL = "Pipeline"


def _option(text: str, *names: str, **values: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL, **values)


def _pipeline_options(
    *,
    samples_per_shard: Annotated[int, _option("Samples in a shard.")] = 1000,
    short_side: Annotated[int | None, _option("Shrink pictures to this shorter side: twice the training side.")] = None,
    quality: Annotated[int, _option("JPEG quality, 1 to 95.")] = 95,
    keep_16_bit: Annotated[bool, _option("Keep more than 8 bits of grey, as PNG.", "--keep-16-bit")] = False,
    window: Annotated[list[str] | None, _option("CENTRE,WIDTH in HU; several give several channels.")] = None,
    workers: Annotated[int | None, _option("Processes; by default one per core; 0: none besides this one.")] = None,
    part: Annotated[str | None, _option("i/n from 0/n: make the shards i, i + n, ... only.")] = None,
    executor: Annotated[Literal["local", "submitit"], _option("Here, or as a Slurm job array.")] = "local",
    parts: Annotated[int, _option("Tasks of the job array.")] = 1,
    slurm: Annotated[str | None, _option("For the array, as in partition=cpu,time=60,cpus_per_task=8.")] = None,
    max_bad: Annotated[float, _option("Stop when a larger share of the samples is quarantined.")] = 0.01,
    mask: Annotated[
        Literal["off", "report", "mask"] | None,
        _option("What to do about text that looks like identifiers; by default as the archive needs it."),
    ] = None,
    allow_leak: Annotated[bool, _option("Keep patients that are in two splits.", "--allow-leak")] = False,
    work: Annotated[Path | None, _option("Folder for the plan; by default in OUT, or in ~/.cache for a URL.")] = None,
    check: Annotated[bool, _option("Compare the checksums of finished shards too.", "--check")] = False,
    retry_quarantined: Annotated[
        bool, _option("Make shards with quarantined samples again.", "--retry-quarantined")
    ] = False,
) -> Any:
    """A PipelineOptions of command line values."""
    from data_prep.pipeline import PipelineOptions
    from data_prep.pixels import PixelOptions

    windows = tuple(_window(text) for text in window or []) or None
    return PipelineOptions(
        samples_per_shard=samples_per_shard,
        pixels=PixelOptions(short_side=short_side, quality=quality, keep_16_bit=keep_16_bit, windows=windows),
        workers=workers,
        part=part,
        executor=executor,
        parts=parts,
        slurm=slurm,
        max_bad=max_bad,
        mask=mask,
        allow_leak=allow_leak,
        work=work,
        check=check,
        retry_quarantined=retry_quarantined,
    )


def _window(text: str) -> tuple[float, float]:
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        raise UserError(f"--window: {text!r} is not CENTRE,WIDTH, as in 40,400") from None
    return centre, width


def command(converter: Converter) -> Callable[..., None]:
    """The typer command of a converter: SOURCE, OUT, its own options, those of the pipeline, and ``--json``.

    Raises TypeError where an option of the converter has the name of one of the pipeline's.
    """
    own = _parameters(converter.items)[1:]
    shared = _parameters(_pipeline_options)
    fixed = [
        _parameter("source", Annotated[Path, typer.Argument(help="The archive, as its owners publish it.")]),
        _parameter("out", Annotated[str, typer.Argument(help="A new folder, or an fsspec URL such as s3://...")]),
    ]
    as_json = _parameter("as_json", Annotated[bool, typer.Option("--json", help="Print the report as JSON.")], False)
    names = [p.name for p in (*fixed, *own, *shared, as_json)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{converter.name}: options {sorted(twice)} are the pipeline's")

    def run(source: Path, out: str, as_json: bool, **values: Any) -> None:
        from data_prep.pipeline import run as run_pipeline

        values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
        options = _pipeline_options(**{p.name: values.pop(p.name) for p in shared})
        report = run_pipeline(converter, source, out, options, **values)
        print(json.dumps(report, indent=1, ensure_ascii=False)) if as_json else print_report(report, out)

    parameters = [*fixed, *own, *shared, as_json]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__name__, run.__doc__ = converter.name.replace("-", "_"), converter.help
    return run


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return [_parameter(p.name, hints[p.name], p.default) for p in inspect.signature(function).parameters.values()]


def print_report(report: dict[str, Any], out: str) -> None:
    """Tables of a report: what each split holds, what was dropped and why, what was found in texts."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report['name']} ({report['license']})")
    numbers = ("patients", "studies", "samples", "images", "texts", "shards")
    for column in ("split", *numbers, "dropped"):
        table.add_column(column, justify="left" if column == "split" else "right", no_wrap=column == "split")
    lines = []
    for split, row in report["splits"].items():
        table.add_row(split, *(str(row[name]) for name in numbers), str(sum(row["dropped"].values())))
        lines += [f"{split}: {n} dropped, {reason}" for reason, n in row["dropped"].items()]
    console.print(table)
    if report["groups_in_two_splits"]:
        lines.append(
            f"{report['groups_in_two_splits']} patients (or studies, or images) are in two splits, as allowed."
        )
    if report["masked"]:
        found = ", ".join(f"{n} {kind}" for kind, n in report["masked"].items())
        deed = "masked" if report["mask"] == "mask" else "found and left in place (--mask mask replaces it)"
        lines.append(f"Text that looks like identifiers, {deed}: {found}.")
    if report["turns_dropped"]:
        lines.append(f"{report['turns_dropped']} answers went because nothing was left of them without masks.")
    if report["complete"]:
        lines.append(f"Complete. What was dropped is listed in {out.rstrip('/')}/quarantine.jsonl")
    else:
        lines.append(
            f"{len(report['shards'])} of {report['shards_planned']} shards exist so far; other parts are missing."
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _lazy(load: Callable[[], Callable[..., None]]) -> type[TyperCommand]:
    """A command class that loads its function only when it is called, so that listing commands stays quick."""

    class Lazy(TyperCommand):
        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            app = typer.Typer(add_completion=False)
            app.command(self.name)(load())
            return typer.main.get_command(app).make_context(info_name, args, parent=parent, **extra)

    return Lazy


def register(app: typer.Typer) -> None:
    """Add every command to ``medvlm prepare``."""
    for name in CONVERTERS:
        converter: Converter = importlib.import_module(f"data_prep.{name}").CONVERTER
        app.command(converter.name, help=converter.help)(command(converter))
    for name, (module, function, text) in COMMANDS.items():

        def load(module: str = module, function: str = function) -> Callable[..., None]:
            return getattr(importlib.import_module(module), function)

        app.command(name, cls=_lazy(load), help=text)(_placeholder)


def _placeholder() -> None:
    """Stands for a command that is loaded when it is called."""
