"""``medvlm shards``: index, verify, audit, label, plan, summarise and show WebDataset shards."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from medvlm.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Index, verify, audit, label, plan, summarise and show WebDataset shards.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Paths = Annotated[list[Path], typer.Argument(help="Shard folders or .tar files.")]


@app.command("index")
def shards_index(
    paths: Annotated[list[str], typer.Argument(help="Shard folders, .tar files, or URLs of them.")],
    out: Annotated[Path | None, typer.Option(help="Write one index here; leave the shards alone.")] = None,
    end_mark: Annotated[bool, typer.Option(help="Refuse a tar without the end-of-archive mark: it was cut.")] = True,
) -> None:
    """Write the index of each tar, ours or foreign, and one of each folder."""
    from medvlm.data.shard_set import index_shards

    for line in index_shards(paths, out, end_mark=end_mark):
        print(line)


@app.command("verify")
def shards_verify(
    paths: Paths,
    as_json: Json = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
) -> None:
    """Check every member's checksum, JSON, image and volume, and that no patient is in two splits."""
    from medvlm.data import inspect

    report = inspect.verify(paths, workers)
    inspect.print_verify(report, as_json)
    raise typer.Exit(1 if report["problems"] else 0)


@app.command("audit")
def shards_audit(
    paths: Annotated[list[str], typer.Argument(help="Shard folders or .tar files: all splits of a data set at once.")],
    against: Annotated[list[str] | None, typer.Option(help="Shards, such as a test set, not to overlap.")] = None,
    near: Annotated[bool, typer.Option(help="Also look for near-duplicate images and texts.")] = True,
    ignore: Annotated[list[str] | None, typer.Option(help="A kind of PHI pattern to leave out, such as url.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    as_json: Json = False,
) -> None:
    """Look for PHI patterns, leaks between splits, duplicates, label balance, licences; exits with 1 on a problem."""
    from medvlm.data import audit

    report = audit.audit(
        paths, against=against or [], near=near, ignore=ignore or [], workers=workers, progress=not as_json
    )
    audit.print_audit(report, as_json)
    raise typer.Exit(1 if report["problems"] else 0)


@app.command("stats")
def shards_stats(
    paths: Paths,
    as_json: Json = False,
    plots: Annotated[Path | None, typer.Option(help="Draw histograms here: .html or .png.")] = None,
    read: Annotated[int, typer.Option(min=0, help="Samples whose JSON is read; 0: all.")] = 20_000,
    recipe: Annotated[str | None, typer.Option(help="Count tokens as this recipe's tokenizer does.")] = None,
) -> None:
    """A table per source and split."""
    from medvlm.data import inspect

    tokens = None
    if plots:
        from medvlm.data.page import output_format

        output_format(plots)
    if recipe:
        import numpy as np
        from rich.progress import track

        from medvlm.config.load import load_recipe
        from medvlm.data.pairs import PairEncoder
        from medvlm.training import feed
        from medvlm.training.families import family_of

        config = load_recipe(recipe)
        parts = family_of(config.model).components(config)
        dataset = feed.make_dataset(config, parts, list(map(str, paths)), training=False)
        if isinstance(dataset.encoder, PairEncoder):
            numbers = track(range(len(dataset.reader)), "counting tokens", disable=as_json)
            tokens = np.array([dataset.encoder.length(dataset.reader.sample(n)) for n in numbers])
        else:
            tokens = feed.count_lengths(config, dataset, progress=not as_json).tokens
    found = inspect.collect(paths, read or None, tokens)
    inspect.print_stats(found.rows, as_json)
    if plots:
        from medvlm.data.page import write_figure
        from medvlm.data.plots import draw_stats

        write_figure(draw_stats(found), plots, f"medvlm shards stats {' '.join(map(str, paths))}")


@app.command("label")
def shards_label(
    paths: Paths,
    as_json: Json = False,
    read: Annotated[int, typer.Option(min=0, help="Samples to read; 0: all.")] = 20_000,
) -> None:
    """Count the CheXpert labels that rules read in the reports, beside the labels that the shards have."""
    from medvlm.data import label_agreement

    label_agreement.print_compare(label_agreement.compare(paths, read or None), as_json)


@app.command("show")
def shards_show(
    paths: Annotated[list[str], typer.Argument(help="Shard folders or .tar files, then section.key=value ...")],
    sample: Annotated[str, typer.Option(help="Print this one: a key, or a number from 0.")] = "0",
    images_to: Annotated[Path | None, typer.Option(help="Save the sample's images in this folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw a contact sheet here instead: .html or .png.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Draw samples as this recipe feeds them to its model.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 24,
    start: Annotated[str, typer.Option("--from", help="The sheet's first sample: a key, or a number from 0.")] = "0",
    epoch: Annotated[int, typer.Option(min=0, help="Whose augmentation and order of questions to show.")] = 0,
    packs: Annotated[int | None, typer.Option(min=0, help="Draw the packs of this step of the recipe instead.")] = None,
) -> None:
    """Print one sample, or draw a contact sheet of several, or the layout of packs."""
    from medvlm.data import inspect

    overrides = [p for p in paths if "=" in p and "://" not in p and not Path(p).exists()]
    paths = [p for p in paths if p not in overrides]
    if overrides and recipe is None:
        raise UserError(f"{overrides[0]}: overrides change a recipe; give --recipe too")
    if out is None:
        if recipe:
            raise UserError("--recipe: draws a contact sheet; give --out FILE.html or FILE.png too")
        inspect.show(paths, sample, images_to)
        return
    if packs is not None:
        if recipe is None:
            raise UserError("--packs: are those of a recipe; give --recipe too")
        from medvlm.config.load import load_recipe
        from medvlm.training import feed

        print(feed.draw_packs(load_recipe(recipe, [f"data.train=[{', '.join(paths)}]", *overrides]), packs, out))
        return
    from medvlm.data.contact_sheet import contact_sheet
    from medvlm.data.shards import ShardReader

    reader, encoder, legend = ShardReader(paths), None, "as stored"
    if recipe:
        from medvlm.config.load import load_recipe
        from medvlm.training import feed
        from medvlm.training.families import family_of

        config = load_recipe(recipe, overrides)
        encoder = feed.make_dataset(config, family_of(config.model).components(config), paths, training=True).encoder
        legend = f"as {' '.join([recipe, *overrides])} feeds them in epoch {epoch}"
    title = f"medvlm shards show {' '.join(paths)}"
    cards = contact_sheet(reader, out, title, start=start, count=count, encoder=encoder, epoch=epoch, legend=legend)
    told = Counter(card.fate for card in cards if card.reason is not None)
    left_out = f", {told['left out']} left out" if told["left out"] else ""
    print(f"{out}: {len(cards)} of {len(reader)} samples, {told['quarantined']} quarantined{left_out}")


@app.command("plan")
def shards_plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    from_step: Annotated[int, typer.Option(min=0, help="The first step; steps count from 0 here.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="How many steps.")] = 1,
    as_json: Json = False,
) -> None:
    """Print what each rank is fed in some steps, without training."""
    from medvlm.config.load import load_recipe
    from medvlm.training import feed

    feed.show_plan(load_recipe(recipe, overrides), world_size, from_step, steps, as_json)
