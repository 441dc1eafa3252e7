"""Runs a study: prepares its data, trains, exports and evaluates its entries, compares them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import medvlm
from medvlm.config.load import load_recipe
from medvlm.config.model import DualEncoder
from medvlm.config.tiny import tiny_values
from medvlm.errors import UserError
from medvlm.evaluation import TASKS, task_options
from medvlm.study import compare
from medvlm.study.pieces import PieceFailed, Run, digest, gpus, identity, once, require_shards, run_command
from medvlm.study.schema import Entry, Evaluation, Study

Tell = Callable[[str], None]


def run_study(study: Study, name: str, out: Path, *, run: Run = run_command, tell: Tell = print) -> dict[str, Any]:
    """Do what of the study is not done yet, in ``out``; writes ``results.json`` and ``comparison.png`` there.

    Every piece has a folder named after a hash of its inputs, so that none is taken for another. An entry that fails
    does not stop the others: ``failed`` in the results says why in one sentence. Raises UserError where nothing can be
    compared.
    """
    for evaluation in study.evaluations.values():
        if evaluation.task not in TASKS:
            raise UserError(f"unknown task {evaluation.task!r}; there is {', '.join(sorted(TASKS))}")
        task_options(evaluation.task, evaluation.options)
    ranks = study.ranks or gpus() or 2
    for label, entry in study.entries.items():  # a mistake in one is told before any work
        if entry.recipe:
            recipe_of(study, label, entry, {"train": ["shards"], "validation": None}, ranks)
    out.mkdir(parents=True, exist_ok=True)
    try:
        data = prepare(study, out, run, tell)
    except PieceFailed as error:
        raise UserError(f"data: {error}") from None
    found: dict[str, dict[str, Path]] = {key: {} for key in study.evaluations}
    failed, folders = {}, {}
    for label, entry in study.entries.items():

        def said(line: str, label: str = label) -> None:
            tell(f"{label}: {line}")

        try:
            folder, model = train(study, label, entry, data, out, ranks, run, said)
            folders[label] = str(model)
            for key, evaluation in study.evaluations.items():
                place = evaluate(study, key, evaluation, entry, folder, model, data, run, said)
                found[key][label] = place
        except PieceFailed as error:
            failed[label] = str(error)
            said(f"failed: {error}")
    if not any(found.values()):
        raise UserError(f"{name}: nothing to compare; " + "; ".join(f"{k}: {why}" for k, why in failed.items()))
    results = {
        "study": name,
        "description": study.description,
        "medvlm": medvlm.__version__,
        "ranks": ranks,
        "data": data,
        "models": folders,
        "failed": failed,
        "evaluations": {
            key: compare.compare(evaluation.task, evaluation.measures, found[key], study.baseline, study.seed)
            for key, evaluation in study.evaluations.items()
            if found[key]
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def prepare(study: Study, out: Path, run: Run, tell: Tell) -> dict[str, Any]:
    """Paths of ``train``, ``validation`` and ``test``, and of the ``tokenizer``; the former are made if not given."""
    data = study.data
    paths: dict[str, Any] = {split: getattr(data, split) for split in ("train", "validation", "test")}
    given = data.prepare
    trained = any(entry.recipe for entry in study.entries.values())
    if given and (paths["test"] is None or (trained and paths["train"] is None)):
        if given.source is not None and not Path(given.source).exists():
            raise UserError(f"data.prepare.source: {given.source} does not exist")
        source = [given.source] if given.source is not None else []
        key = digest(given.model_dump(), [identity(path) for path in source], medvlm.__version__)
        folder = out / f"data-{key}"
        arguments = ["prepare", given.command, *source, str(folder / "shards"), *_flags(given.options)]
        once(folder, "prepare", arguments, run, tell)
        splits = {"train": ["train"], "validation": ["validation"], "test": given.test}
        if "validation" in given.test:
            splits["validation"] = []
        for split, names in splits.items():
            if paths[split] is None:
                places = [folder / "shards" / name for name in names]
                paths[split] = [str(place) for place in places if place.is_dir()]
    for split, found in paths.items():
        require_shards(found or [], f"data.{split}")
    if data.tokenizer and paths["train"]:
        key = digest(data.tokenizer.model_dump(), [identity(path) for path in paths["train"]])
        folder = out / f"tokenizer-{key}"
        arguments = ["prepare", "tokenizer", str(folder / "tokenizer")]
        arguments += [word for path in paths["train"] for word in ("--shards", path)]
        arguments += _flags({"vocab_size": data.tokenizer.vocab_size, "kind": data.tokenizer.kind})
        once(folder, "tokenizer", arguments, run, tell)
        paths["tokenizer"] = str(folder / "tokenizer")
    return paths


def train(
    study: Study, label: str, entry: Entry, data: dict[str, Any], out: Path, ranks: int, run: Run, tell: Tell
) -> tuple[Path, str]:
    """The folder of an entry, and its model: trained and exported, or the one that is given."""
    if entry.folder is not None:
        return out / f"{label}-{digest(identity(entry.folder))}", entry.folder
    values = recipe_of(study, label, entry, data, ranks)
    sources = [*values["data"]["train"], *values["data"]["validation"]]
    shards = [identity(source if isinstance(source, str) else source["path"]) for source in sources]
    key = digest(values, shards, ranks, medvlm.__version__)
    folder = out / f"{label}-{key}"
    values["run"] |= {"root": str(folder), "name": "run"}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    once(folder, "train", ["train", str(recipe)], run, tell, ranks=ranks)
    model = folder / "model"
    if not (folder / "export.done.json").exists():  # of a study that was killed right after its export
        shutil.rmtree(model, ignore_errors=True)
    once(folder, "export", ["export", str(folder / "run"), "--out", str(model)], run, tell)
    return folder, str(model)


def recipe_of(study: Study, label: str, entry: Entry, data: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The whole recipe of an entry, validated. Raises UserError naming the entry and the wrong field."""
    assert entry.recipe is not None
    values = tiny_values(entry.recipe) if entry.tiny else {}
    values |= {"data.train": data["train"], "data.validation": data["validation"] or []}
    values |= {"run.seed": study.seed, "run.name": label}
    values |= study.overrides | entry.overrides
    try:
        config = load_recipe(entry.recipe, extra=values)
        part = "text_tower" if isinstance(config.model, DualEncoder) else "language_model"
        fresh = getattr(config.model, part).config is not None
        if "tokenizer" in data and fresh and f"model.{part}.tokenizer" not in entry.overrides:
            config = load_recipe(entry.recipe, extra={**values, f"model.{part}.tokenizer": data["tokenizer"]})
    except UserError as error:
        raise UserError(f"entries.{label}: {error}") from None
    training = config.training
    training.micro_batch_size = min(training.micro_batch_size, max(1, training.global_batch_size // ranks))
    return config.model_dump(mode="json")


def evaluate(
    study: Study,
    key: str,
    evaluation: Evaluation,
    entry: Entry,
    folder: Path,
    model: str,
    data: dict[str, Any],
    run: Run,
    tell: Tell,
) -> Path:
    """The folder of an evaluation's ``results.json`` and ``predictions.jsonl``."""
    shards = evaluation.data or data["test"]
    if not shards:
        raise UserError(f"evaluations.{key}.data: there is no data.test; give shards")
    require_shards([*shards, *(evaluation.train_data or [])], f"evaluations.{key}")
    given = evaluation.model_dump(exclude={"measures"})
    files = [value for value in evaluation.options.values() if isinstance(value, str) and Path(value).is_file()]
    inputs = [identity(path) for path in [*shards, *(evaluation.train_data or []), *files]]  # a file holds prompts
    place = folder / f"{key}-{digest(given, shards, inputs, study.seed, medvlm.__version__)}"
    arguments = ["evaluate", model, "--task", evaluation.task, "--out", str(place / "scores")]
    arguments += [word for path in shards for word in ("--data", path)]
    arguments += [word for path in evaluation.train_data or [] for word in ("--train-data", path)]
    arguments += _flags({"seed": study.seed, "batch_size": evaluation.batch_size, "limit": evaluation.limit})
    arguments += _flags(evaluation.options)
    if entry.trust_remote_code or entry.recipe:  # what the study exports runs medvlm's own code
        arguments.append("--trust-remote-code")
    once(place, key, arguments, run, tell)
    return place / "scores"


def _flags(options: dict[str, Any]) -> list[str]:
    """``{"batch_size": 4, "k": [1, 5], "masks": True}`` -> command line; None and false are left out."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [flag, str(one)]
    return words
