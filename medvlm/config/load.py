"""Recipes: lookup by name or path, overrides from the command line, validation with the nearest right key."""

import difflib
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from medvlm.config.model import DualEncoder, Section
from medvlm.config.schema import RunConfig
from medvlm.errors import UserError


def recipe_names() -> list[str]:
    folder = resources.files("medvlm") / "recipes"
    return sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml"))


def deepspeed_config_path(name: str) -> Path:
    """The JSON file of a ZeRO mode, by its name in ``ds_configs/`` or by path."""
    path = Path(str(resources.files("ds_configs") / f"{name}.json"))
    if path.exists():
        return path
    if Path(name).is_file():
        return Path(name)
    known = sorted(p.stem for p in path.parent.glob("*.json"))
    raise UserError(f"training.zero: no DeepSpeed config {name!r}; known: {', '.join(known)}, or a path to a .json")


def load_recipe(recipe: str, overrides: list[str] | None = None, extra: dict[str, Any] | None = None) -> RunConfig:
    """Merge a recipe with ``section.key=value`` overrides and validate. Raises UserError naming the wrong field."""
    values = recipe_values(recipe)
    for key, value in (extra or {}).items():
        assign(values, key, value)
    for override in overrides or []:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        assign(values, key, parse(value, override))
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{recipe}: {_explain(e)}" for e in error.errors())) from None
    _refuse_idle(config, recipe, {*(extra or {}), *(override.partition("=")[0] for override in overrides or [])})
    return config


def _refuse_idle(config: RunConfig, recipe: str, overridden: set[str]) -> None:
    """Raise UserError for an option that would do nothing, such as ``hidden_dim`` of a head of one layer; unless it is
    the recipe's, and the kind was overridden.

    It is no rule of the schema, by which runs that were begun with one could not be read any more.
    """
    model, objective = config.model, config.objective
    if not isinstance(model, DualEncoder) or objective is None:
        return
    two_layers = ("hidden_dim", "activation", "norm")
    without_use = {"none": (*two_layers, "bias"), "linear": two_layers}
    cases: list[tuple[str, Section, tuple[str, ...], str]] = [
        (f"model.{part}", head, without_use.get(head.kind, ()), f"`kind: {head.kind}`")
        for part, head in (("vision_head", model.vision_head), ("text_head", model.text_head))
    ]
    for name, kind in (("image_weight", "info_nce"), ("label_similarity", "semantic_matching")):
        cases.append(("objective", objective, (name,) if objective.kind != kind else (), f"`kind: {objective.kind}`"))
    matching = objective.kind == "semantic_matching"
    cases.append(
        ("data.pairs", config.data.pairs, () if matching else ("labels",), f"`objective.kind: {objective.kind}`")
    )
    for place, section, names, why in cases:
        if f"{place}.kind" in overridden:
            names = tuple(name for name in names if f"{place}.{name}" in overridden)
        for name in names:
            if getattr(section, name) != type(section).model_fields[name].default:
                raise UserError(f"{recipe}: {place}.{name}: does nothing with {why}")


def recipe_values(recipe: str) -> dict[str, Any]:
    """The raw values of a recipe, before overrides and validation."""
    names = recipe_names()
    if recipe in names:
        text = (resources.files("medvlm") / "recipes" / f"{recipe}.yaml").read_text()
    elif Path(recipe).is_file():
        text = Path(recipe).read_text()
    else:
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"no recipe {recipe!r}: {hint}known recipes: {', '.join(names)}; or give a path to a .yaml file"
        )
    values = parse(text, recipe)
    if not isinstance(values, dict):
        raise UserError(f"{recipe}: a recipe must be a mapping of sections")
    return values


def parse(text: str, where: str) -> Any:
    """YAML, with 1e-4 a number. Raises UserError naming ``where``."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in nested values. Raises UserError where a section is something else."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override {key!r}: {section!r} is not a section")
    values[last] = value


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    field = ".".join(part for n, part in enumerate(location) if not (n == 1 and location[0] == "model"))
    if error["type"] != "extra_forbidden":
        given = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
        return f"{field}: {error['msg'].removeprefix('Value error, ')}{given}"
    known = list(_section(RunConfig, location[:-1]).model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    return f"{field}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}")


def _section(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    for part in location:
        if part in model.model_fields:
            found = _sections(model.model_fields[part].annotation)
            model = found[0]
        elif len(found) > 1:  # the name of a family, between `model` and its fields
            model = next(s for s in found if part in typing.get_args(s.model_fields["family"].annotation))
    return model


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Those that a field may hold, alone, in a list, or as one of several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for option in typing.get_args(annotation) for section in _sections(option)]
