"""The documentation's commands parse or run, its recipes, files, settings and links exist."""

import atexit
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import typer.main
import yaml
from conftest import REPO
from pydantic import BaseModel
from typer.testing import CliRunner

import medvlm
from data_prep import cli as prepare_cli
from medvlm import cli
from medvlm.config.load import load_recipe, recipe_names
from medvlm.config.model import DualEncoder, Llava
from medvlm.config.schema import RunConfig
from medvlm.config.tiny import tiny_values
from medvlm.errors import UserError
from medvlm.study.schema import Study

PAGES = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    REPO / "ds_configs" / "README.md",
    *sorted((REPO / "docs").glob("*.md")),
]
BLOCK = re.compile(r"(?:^<!-- ([\w-]+) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
TRAINERS = {"local.sh", "torchrun.sh", "deepspeed_multinode.sh", "train.sbatch"}
EXAMPLES = Path(tempfile.mkdtemp(prefix="medvlm-docs-"))
atexit.register(shutil.rmtree, EXAMPLES, ignore_errors=True)
OTHER_COMMANDS = {
    "source",
    "pip",
    "scancel",
    "scontrol",
    "squeue",
    "sacct",
}  # known and not checked; anything else is an error


def blocks(page: Path, language: str) -> list[tuple[str | None, str]]:
    return [(mark, body) for mark, found, body in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """Command lines of ``bash`` blocks and of indented ``medvlm`` lines, as words."""
    lines = [line for _, body in blocks(page, "bash") for line in body.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^ {4}(medvlm .*)$", page.read_text(), re.M)
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


def check(words: list[str]) -> None:
    """Fails unless a command line could be typed."""
    while re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "medvlm":
        check_medvlm(rest)
    elif name == "bash" or name == "sbatch":
        at = next(i for i, word in enumerate(rest) if word.startswith("launchers/"))
        script = REPO / rest[at]
        assert script.is_file(), f"{rest[at]} does not exist"
        if script.name in TRAINERS:
            check_medvlm(["train", *rest[at + 1 :]])
        if script.name == "evaluate.sbatch":
            check_medvlm(["evaluate", *rest[at + 1 :]])
        for word in rest[at + 1 :] if script.name == "test.sh" else []:
            assert not word.startswith("tests/") or (REPO / word).exists(), f"{word} does not exist"
    elif name == "accelerate":
        assert rest[:2] == ["launch", "--config_file"] and (REPO / rest[2]).is_file()
        module = rest.index("-m")
        assert rest[module + 1] == "medvlm.cli"
        check_medvlm(rest[module + 2 :])
    else:
        assert name in OTHER_COMMANDS, f"{name}: not known to this test"


def check_medvlm(words: list[str]) -> None:
    parse(whole_command(), words)
    if words[0] == "train":
        check_training(words[1:])


def whole_command():
    """With the commands of ``medvlm prepare``, which `main` registers only when they are asked for."""
    if not cli.prepare_app.registered_commands:
        prepare_cli.register(cli.prepare_app)
    return typer.main.get_command(cli.app)


def parse(command, words: list[str]) -> None:
    """Walk down to the subcommand and parse its options, without running it. Raises as the command line would."""
    if hasattr(command, "with_default"):
        words = command.with_default(words)
    if hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no command {' '.join(words[:1])!r} in {command.name}"
        parse(command.commands[words[0]], words[1:])
    else:
        command.make_context(command.name, list(words))


def check_training(words: list[str]) -> None:
    recipe, *rest = [word for word in words if not word.startswith("-") and not word.isdigit()]  # a number of ranks
    if recipe.endswith(".yaml"):
        recipe = next(iter(example_recipes()))
    load_recipe(recipe, rest, tiny_values(recipe) if "--tiny" in words else None)


def example_recipes() -> list[str]:
    """Paths of the YAML blocks marked as recipes, written out."""
    out = []
    for page in PAGES:
        for mark, body in blocks(page, "yaml"):
            if mark == "recipe":
                path = EXAMPLES / f"{page.stem}-{len(out)}.yaml"
                path.write_text(body)
                out.append(str(path))
    assert out, "the documentation holds no example recipe"
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_command_lines_parse(page):
    for words in commands(page):
        try:
            check(words)
        except Exception as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error or type(error).__name__}")


@pytest.mark.parametrize(
    "line",
    [
        "medvlm shards verfy x",
        "medvlm evaluate model",  # --data is required
        "medvlm evaluate model --data x --batchsize 3",
        "medvlm prepare vqa-rad SRC OUT --split random",
        "medvlm prepare phantom OUT --images many",
        "medvlm train no-such-recipe",
        "bash launchers/local.sh vqa_rad-smollm2 training.epoch=2",
        "bash launchers/nowhere.sh",
        "NPROC=2 bash launchers/torchrun.sh",
        "accelerate launch --config_file launchers/nowhere.yaml -m medvlm.cli train vqa_rad-smollm2",
        "sbatch launchers/slurm/evaluate.sbatch MODEL",
        "kubectl apply",
    ],
)
def test_wrong_command_lines_are_found(line):
    with pytest.raises((Exception, SystemExit)) as caught:
        check(shlex.split(line))
    expected = (AssertionError, UserError, ValueError)
    assert isinstance(caught.value, expected) or "click" in type(caught.value).__module__


def test_documented_commands_that_print_run():
    prints = {
        tuple(words)
        for page in PAGES
        for words in commands(page)
        if words[0] == "medvlm" and (words[1:] == ["recipes"] or "--print-config" in words)
    }
    assert len(prints) >= 2
    for words in prints:
        arguments = [example_recipes()[0] if word.endswith(".yaml") else word for word in words[1:]]
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.output} {done.exception}"
        if "--print-config" in words:
            (Study if words[1] == "study" else RunConfig).model_validate(yaml.safe_load(done.output))


def test_blocks_marked_run_do_run(tmp_path, monkeypatch):
    """In order, in a folder of their own; only medvlm commands may be marked."""
    monkeypatch.chdir(tmp_path)
    whole_command()
    ran = 0
    for page in PAGES:
        for mark, body in blocks(page, "bash"):
            if mark != "run":
                continue
            for line in body.replace("\\\n", " ").splitlines():
                name, *arguments = shlex.split(line, comments=True)
                assert name == "medvlm"
                done = CliRunner().invoke(cli.app, arguments)
                assert done.exit_code == 0, f"{line}: {done.output} {done.exception!r}"
                ran += 1
    assert ran


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_between_pages_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_commands_named_in_the_text_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for command in re.findall(r"`medvlm ([a-z][a-z-]*(?: [a-z][a-z-]+)?)", text):
        group, *rest = command.split()
        known = whole_command().commands
        assert group in known, f"{page.name}: medvlm {command}"
        inner = getattr(known[group], "commands", None)
        assert not (inner and rest) or rest[0] in inner, f"{page.name}: medvlm {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_files_named_in_the_text_exist(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for name in re.findall(r"`((?:medvlm|data_prep|tests|launchers|ds_configs|docs)/[\w./-]+)`", text):
        assert (REPO / name).exists(), f"{page.name}: {name}"


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [REPO / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", page.read_text())]
        todo += [(page.parent / link).resolve() for link in links if not link.startswith("https://")]
    assert {page.resolve() for page in PAGES} <= seen


def test_readme_lists_the_recipes_that_exist():
    table = (REPO / "README.md").read_text().split("\n## Recipes\n")[1].split("\n```")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([^`]+)`", " ".join(cells))) == recipe_names()


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Every key of a run's configuration with its default (None also where there is none)."""
    out: dict[str, object] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        sections = [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []
        if name == "model":  # of either family; what both have, the first one's
            sections = [DualEncoder, Llava]
        if sections:
            for section in sections:
                out |= settings(section, f"{prefix}{name}.")
        else:
            out[prefix + name] = "required" if field.is_required() else field.default
    return out


def test_train_page_lists_every_setting_with_its_default():
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]*) \|", (REPO / "docs" / "train.md").read_text(), re.M)
    documented = {key: default.strip() for key, default in rows if not key.endswith((".yaml", ".json", ".jsonl"))}
    actual = settings(RunConfig)
    assert sorted(documented) == sorted(actual)
    for key, default in actual.items():
        shown = documented[key]
        if default in ([], ""):
            assert shown == "empty", key
        elif isinstance(default, tuple | list):
            assert shown == ", ".join(map(str, default)), key
        elif isinstance(default, bool) or default is None:
            assert shown == {True: "true", False: "false", None: "null"}[default], key
        else:
            assert shown == str(default), key


def test_deepspeed_readme_explains_every_file_and_key():
    text = (REPO / "ds_configs" / "README.md").read_text()
    for path in sorted((REPO / "ds_configs").glob("*.json")):
        section = text.split(f"| `{path.name}` |")[1].split("\n| `zero")[0]
        assert "auto" not in path.read_text()
        (top, values), *rest = json.loads(path.read_text()).items()
        assert top == "zero_optimization" and [name for name, _ in rest] in ([], ["aio"])
        for key, value in [*values.items(), *rest]:
            assert f"`{key}`" in section, f"{path.name}: {key} is not explained"
            for inner in value if isinstance(value, dict) else []:
                assert f"`{inner}`" in section, f"{path.name}: {key}.{inner} is not explained"


@pytest.mark.parametrize(
    "script", sorted((REPO / "launchers").rglob("*.sh")) + sorted((REPO / "launchers").rglob("*.sbatch"))
)
def test_launchers_are_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_citation_has_what_the_format_requires():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and all(author.get("name") for author in citation["authors"])
    assert str(citation["version"]) == medvlm.__version__
