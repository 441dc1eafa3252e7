"""``medvlm plan``."""

from typing import Annotated

import typer

from medvlm.errors import UserError


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Ranks, one per GPU.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0, help="GiB of each; with --cpu of RAM per rank.")] = 80,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of a row; by default the longest allowed.")] = None,
    images: Annotated[int | None, typer.Option(min=0, help="Of a row; by default 1, or the bound of a pack.")] = None,
    peak_tflops: Annotated[float, typer.Option(help="Dense bf16, of the GPU's data sheet.")] = 989,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="The share of it that is reached.")] = 0.4,
    within_node: Annotated[float, typer.Option(help="GB/s of a GPU inside its node, one way.")] = 450,
    between_nodes: Annotated[float, typer.Option(help="GB/s of a GPU to other nodes.")] = 50,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Share of compute that hides communication.")] = 0.5,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for ranks on CPUs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Memory and step time for each ZeRO stage and micro-batch, from a step rehearsed without memory. Needs no GPU."""
    from medvlm.config.load import load_recipe
    from medvlm.planning import report
    from medvlm.planning.plan import CONTEXT, GIB, Machine
    from medvlm.planning.step_time import Rates

    config = load_recipe(recipe, overrides)
    if gpu_memory <= 0:
        raise UserError("--gpu-memory: must be more than 0 GiB")
    rates = Rates(
        peak_flops=peak_tflops * 1e12,
        reached=mfu,
        within_node=within_node * 1e9,
        between_nodes=between_nodes * 1e9,
        gpus_per_node=gpus_per_node,
        hidden=overlap,
    )
    target, base = ("cpu", GIB) if cpu else ("cuda", CONTEXT)
    machine = Machine(gpus, int(gpu_memory * GIB), target, rates, base)
    report.plan(config, machine, tokens, images, as_json)
