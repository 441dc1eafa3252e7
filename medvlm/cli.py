"""medvlm: shards -> DeepSpeed training -> Hugging Face folder -> evaluation."""

# Each command is a few lines that call into one package; heavy imports wait until they are needed.

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medvlm import cli_checkpoint, cli_plan, cli_runs, cli_shards, cli_study
from medvlm.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
prepare_app = typer.Typer(no_args_is_help=True, help="Turn data sets into shards.")
app.add_typer(cli_shards.app, name="shards")
app.add_typer(cli_checkpoint.app, name="checkpoint")
app.add_typer(cli_runs.app, name="runs")
app.add_typer(prepare_app, name="prepare")
app.command("plan")(cli_plan.plan)
app.command("study")(cli_study.study)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    print_config: Annotated[bool, typer.Option(help="Print the merged, validated configuration and stop.")] = False,
    profile: Annotated[bool, typer.Option(help="Write a Chrome trace of three steps into the run's folder.")] = False,
    allow_change: Annotated[
        bool, typer.Option(help="Continue a run although its rates, schedule or objective differ from before.")
    ] = False,
    tiny: Annotated[bool, typer.Option(help="Small random backbones and phantom data: a minute on a laptop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Rehearse a step without GPU, weights or data.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Of a dry run.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print a dry run as JSON.")] = False,
) -> None:
    """Train a recipe. Start it through launchers/ for several ranks; alone it is one rank."""
    from medvlm.training import preemption

    preemption.catch_signals()

    def work() -> int:
        from medvlm.config.load import load_recipe
        from medvlm.config.tiny import tiny_data, tiny_values

        changes = [*(overrides or []), *(["training.profile=3"] if profile else [])]
        config = load_recipe(recipe, changes, tiny_values(recipe) if tiny else None)
        if print_config:
            import yaml

            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        if dry_run:
            from medvlm.planning import dry_run as rehearsal

            rehearsal.dry_run(config, ranks, as_json)
            return 0
        from medvlm.training import loop

        before = (lambda: prepare_tiny_data(Path(tiny_data(recipe)), config.model.family)) if tiny else None
        return loop.run(config, before=before, allow_change=allow_change)

    try:
        if several_ranks():  # meet first, so that an error in the recipe is told once
            from medvlm.training import watch

            with watch.over_ranks():
                status = work()
        else:
            status = work()
    except preemption.Preempted:
        status = preemption.NO_STEP
    raise typer.Exit(status)


def prepare_tiny_data(folder: Path, family: str) -> None:
    """Phantom shards and a tokenizer for ``--tiny``, once."""
    if (folder / "tokenizer" / "tokenizer_config.json").exists():
        return
    from data_prep import phantom, tokenizer

    dual = family == "dual_encoder"
    phantom.generate(folder, images=96, size=64, preset="easy", with_prior=dual, workers=1)
    kind: tokenizer.Kind = "wordpiece" if dual else "sentencepiece"
    tokenizer.train_tokenizer_folder(folder / "tokenizer", shards=[folder / "train"], vocab_size=600, kind=kind)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from rich.console import Console
    from rich.table import Table

    from medvlm.config.load import recipe_names, recipe_values

    table = Table("recipe", "description")
    for name in recipe_names():
        table.add_row(name, recipe_values(name)["description"])
    Console().print(table)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[Path, typer.Option(help="The Hugging Face folder to write.")],
    checkpoint: Annotated[str | None, typer.Option(help="For example step-00000100; the newest by default.")] = None,
    ema: Annotated[bool, typer.Option(help="The moving average of the weights, see training.ema_decay.")] = False,
    adapter: Annotated[bool, typer.Option(help="Of a LoRA run: write the PEFT adapter instead of merging it.")] = False,
    base: Annotated[Path | None, typer.Option(help="The folder that the adapter sits on; OUT/base by default.")] = None,
    proof: Annotated[bool, typer.Option(help="Compare answers; needs memory for the model in fp32.")] = True,
    as_json: Json = False,
) -> None:
    """Write a Hugging Face folder and prove it: a fresh process's logits or embeddings against the training model's."""
    if adapter:
        from medvlm.export.adapter import export_adapter

        if not proof:
            raise UserError("--no-proof: an adapter is always proven; leave it out")
        result = export_adapter(run, out, base, checkpoint, ema)
    else:
        from medvlm.export import export_run

        if base:
            raise UserError("--base: is the folder that an adapter sits on; add --adapter")
        result = export_run(run, out, checkpoint, ema, proof)
    print(json.dumps(result) if as_json else "\n".join(f"{key}: {value}" for key, value in result.items()))


@app.command()
def evaluate(
    folder: Annotated[
        str, typer.Argument(help="A Hugging Face folder or hub name: a dual encoder, or for vqa an LLM.")
    ],
    data: Annotated[list[Path], typer.Option(help="Shard folders or tars; may be given several times.")],
    task: Annotated[str, typer.Option(help="vqa, or of a dual encoder one of those in docs/evaluate.md.")] = "vqa",
    out: Annotated[Path | None, typer.Option(help="Folder for results.json and predictions.jsonl.")] = None,
    train_data: Annotated[list[Path] | None, typer.Option(help="Training shards: for a control, or a probe.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many questions, pictures or phrases.")] = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    seed: int = 0,
    view: Annotated[list[str] | None, typer.Option(help="Only pictures of it; may be given several times.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="retrieval, precision_at_k; may be given several times.")] = None,
    section: Annotated[list[str] | None, typer.Option(help="Of a report; may be given several times.")] = None,
    other_patients: Annotated[bool | None, typer.Option("--other-patients", help="retrieval: rivals only.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A prompt set's name, or the path of a .yaml file.")] = None,
    aggregate: Annotated[str | None, typer.Option(help="zero_shot: mean or max over prompts.")] = None,
    uncertain: Annotated[str | None, typer.Option(help="Labels of -1: ignore, positive or negative.")] = None,
    unmentioned: Annotated[str | None, typer.Option(help="Labels of null: negative or ignore.")] = None,
    seeds: Annotated[int | None, typer.Option(help="linear_probe: how many, at least 3.")] = None,
    phrase: Annotated[str | None, typer.Option(help="grounding: label, or sentence of the report.")] = None,
    heat: Annotated[str | None, typer.Option(help="grounding: similarity of patches, or occlusion.")] = None,
    grid: Annotated[int | None, typer.Option(help="grounding: squares hidden in a row.")] = None,
    pictures: Annotated[int | None, typer.Option(help="grounding: heat maps to draw.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model, with intervals and what chance or a control scores beside each number."""
    from medvlm import evaluation

    given: dict[str, Any] = {
        "section": section or None,
        "other_patients": other_patients,
        "prompts": prompts,
        "aggregate": aggregate,
    }
    given |= {"k": k or None, "uncertain": uncertain, "unmentioned": unmentioned, "seeds": seeds}
    given |= {"phrase": phrase, "heat": heat, "grid": grid, "pictures": pictures, "view": view or None}
    evaluation.run(
        folder,
        task,
        data,
        out or Path("results") / Path(folder).name,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        as_json=as_json,
        train_data=train_data,
        options={name: value for name, value in given.items() if value is not None},
        trust_remote_code=trust_remote_code,
    )


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="A Hugging Face image-text-to-text folder or hub name.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="PNG, JPEG, DICOM, NIfTI, or the folder of a series.")
    ] = None,
    slices: Annotated[int, typer.Option(help="Of a volume; as data.volume_slices in training.")] = 8,
    window: Annotated[tuple[float, float] | None, typer.Option(help="Centre and width, for a volume.")] = None,
    max_new_tokens: int = 256,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the folder.")] = False,
) -> None:
    """Answer one question about images, with greedy decoding."""
    from medvlm.inference.generate import Generator
    from medvlm.inference.images import load_images

    images = [picture for path in image or [] for picture in load_images(path, slices, window)]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    request = (images, [{"role": "user", "content": content}])
    generator = Generator(folder, trust_remote_code=trust_remote_code)
    print(generator.answers([request], max_new_tokens=max_new_tokens, batch_size=1)[0])


def several_ranks() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def main() -> None:
    if "prepare" in sys.argv[1:2]:
        from data_prep.cli import register

        register(prepare_app)
    first = os.environ.get("RANK", "0") == "0"
    try:
        sys.exit(app(standalone_mode=first))  # on other ranks, what ends a command is raised or returned
    except UserError as error:
        where = f"rank {os.environ['RANK']}: " if several_ranks() and os.environ["RANK"] != "0" else ""
        print(f"medvlm: error: {where}{error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not first and hasattr(error, "exit_code"):  # a wrong command line: the first rank shows it
            sys.exit(error.exit_code)
        raise


if __name__ == "__main__":
    main()
