"""What a study is: data, entries (recipes to train, or finished models) and evaluations."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from medvlm.config.load import assign, parse
from medvlm.errors import UserError

Name = Annotated[str, Field(pattern=r"^[\w\-]+$")]
Scalar = bool | int | float | str


def _dotted(overrides: dict[str, Any]) -> dict[str, Any]:
    if whole := [key for key in overrides if "." not in key]:
        raise ValueError(f"{whole[0]} would replace a whole section; give section.key: value")
    return overrides


Overrides = Annotated[dict[str, Any], AfterValidator(_dotted)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Prepare(Section):
    """``medvlm prepare COMMAND [SOURCE] OUT --option value ...``; the study chooses OUT."""

    command: str
    source: str | None = None
    options: dict[str, Scalar] = {}
    test: list[str] = ["test"]
    """Splits to evaluate on; those that are none of them and not ``train`` are for validation."""


class StudyTokenizer(Section):
    """Trained on the training data, for text towers and language models that have none of their own."""

    vocab_size: int = Field(default=600, gt=0)
    kind: str = "wordpiece"


class StudyData(Section):
    """Shards of all entries. What is not named are the splits of ``prepare``."""

    prepare: Prepare | None = None
    train: list[str] | None = None
    validation: list[str] | None = None
    test: list[str] | None = None
    tokenizer: StudyTokenizer | None = None

    @model_validator(mode="after")
    def _from_somewhere(self) -> "StudyData":
        if self.prepare is None and self.test is None:
            raise ValueError("give `test`, the shards to evaluate on, or `prepare`")
        return self


class Entry(Section):
    """A recipe to train, or ``folder``, a Hugging Face folder or hub name that is evaluated as it is."""

    recipe: str | None = None
    folder: str | None = None
    tiny: bool = False
    """With the small random towers of ``medvlm train --tiny``; data, batch and steps are the study's."""
    overrides: Overrides = {}
    """``section.key: value``, over the study's own."""
    trust_remote_code: bool = False
    """Of ``folder``; the code of what the study exports is medvlm's own."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Entry":
        if (self.recipe is None) == (self.folder is None):
            raise ValueError("give exactly one of `recipe` and `folder`")
        if self.folder and (self.tiny or self.overrides):
            raise ValueError("`tiny` and `overrides` are of a recipe")
        return self


class Evaluation(Section):
    """One task of ``medvlm evaluate`` on ``data.test``, or on shards of its own."""

    task: str
    data: list[str] | None = None
    train_data: list[str] | None = None
    limit: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, gt=0)
    options: dict[str, Any] = {}
    """Those of the task, by the names of the command line's options with ``_`` for ``-``."""
    measures: list[str] = ["*"]
    """Lines of the task's table to compare, by their labels, with wildcards."""


class Study(Section):
    description: str = ""
    ranks: int | None = Field(default=None, gt=0)
    """Of each training; by default all local GPUs, or two CPU ranks."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of trainings and evaluations."""
    data: StudyData
    overrides: Overrides = {}
    """``section.key: value`` of all recipes."""
    entries: dict[Name, Entry] = Field(min_length=1)
    baseline: str | None = None
    """The entry that the others are compared with, query by query."""
    evaluations: dict[Name, Evaluation] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> "Study":
        if self.baseline is not None and self.baseline not in self.entries:
            raise ValueError(f"baseline: {self.baseline!r} is none of the entries {', '.join(self.entries)}")
        trained = [name for name, entry in self.entries.items() if entry.recipe]
        if trained and self.data.prepare is None and self.data.train is None:
            raise ValueError(f"data.train: {trained[0]} is trained; give its shards, or `data.prepare`")
        return self


def study_names() -> list[str]:
    folder = resources.files("medvlm") / "studies"
    return sorted(f.name[: -len(".yaml")] for f in folder.iterdir() if f.name.endswith(".yaml"))


def _at(values: dict[str, Any], key: str) -> dict[str, Any]:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def load_study(study: str, overrides: list[str] | None = None) -> Study:
    """A study by name or path, with ``section.key=value`` overrides. Raises UserError naming the wrong field."""
    names = study_names()
    if study in names:
        text = (resources.files("medvlm") / "studies" / f"{study}.yaml").read_text(encoding="utf-8")
    elif Path(study).is_file():
        text = Path(study).read_text(encoding="utf-8")
    else:
        near = difflib.get_close_matches(study, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no study {study!r}: {hint}known studies: {', '.join(names)}; or give a path to a .yaml file")
    values = parse(text, study)
    if not isinstance(values, dict):
        raise UserError(f"{study}: a study must be a mapping of sections")
    for override in overrides or []:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        section, inner, setting = key.partition("overrides.")  # whose keys hold dots themselves
        if inner:
            assign(
                values, f"{section}overrides", {**_at(values, f"{section}overrides"), setting: parse(value, override)}
            )
        else:
            assign(values, key, parse(value, override))
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        said = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{study}: {field + ': ' if field else ''}{said}") from None
