"""Prompt sets for zero-shot classification: YAML files beside this one, or of one's own."""

import random
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medvlm.errors import UserError

Texts = Annotated[list[str], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str = ""


class Sides(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    positive: Texts
    negative: Texts


class BinarySet(_Strict):
    """Each label against its absence: templates in which {} stands for the label's words, or sentences of its own."""

    kind: Literal["binary"]
    labels: Annotated[dict[str, str | Sides], Field(min_length=1)]  # label in the data -> its words, or its sentences
    positive: Texts | None = None
    negative: Texts | None = None

    @model_validator(mode="after")
    def _templates(self) -> "BinarySet":
        if any(isinstance(given, str) for given in self.labels.values()) and not (self.positive and self.negative):
            raise ValueError("labels given by their words need the templates `positive` and `negative`")
        return self

    def prompts(self, label: str) -> tuple[list[str], list[str]]:
        words = self.labels[label]
        if isinstance(words, Sides):
            return words.positive, words.negative
        assert self.positive and self.negative
        return [t.replace("{}", words) for t in self.positive], [t.replace("{}", words) for t in self.negative]


class MulticlassSet(_Strict):
    """Classes against each other. A class is a list of prompts, or lists of parts of which all combinations are made.

    ``draw`` prompts per class are drawn; ``images_per_class`` images are, of those with exactly one of the classes.
    ``exclusive``: all, as CheXpert 5x200 has it (no other label but No Finding is positive or uncertain), or classes.
    """

    kind: Literal["multiclass"]
    classes: Annotated[dict[str, Texts | dict[str, Texts]], Field(min_length=2)]
    draw: int | None = Field(default=None, gt=0)
    images_per_class: int | None = Field(default=None, gt=0)
    exclusive: Literal["all", "classes"] = "all"

    def prompts(self, label: str, seed: int = 0) -> list[str]:
        given = self.classes[label]
        texts = (
            [" ".join(p for p in parts if p) for parts in product(*given.values())]
            if isinstance(given, dict)
            else given
        )
        if self.draw is None or self.draw >= len(texts):
            return texts
        return random.Random(f"{seed}/{label}").sample(texts, self.draw)


PromptSet = BinarySet | MulticlassSet


def prompt_set_names() -> list[str]:
    names = [f.name for f in resources.files(__package__).iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_prompts(name: str) -> PromptSet:
    """A set by its name or by the path of a YAML file. Raises UserError naming what is wrong in it."""
    names = prompt_set_names()
    if name in names:
        text = (resources.files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise UserError(f"--prompts: no set {name!r}; there is {', '.join(names)}, or give the path of a .yaml file")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is not YAML ({str(error).splitlines()[0]})") from None
    kinds: dict[str, type[PromptSet]] = {"binary": BinarySet, "multiclass": MulticlassSet}
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{name}: kind must be binary or multiclass, not {kind!r}")
    try:
        return kinds[kind].model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
