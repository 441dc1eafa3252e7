"""Prompt sets are data: those that come with the package, and mistakes in one's own."""

import pytest

from medvlm.data.labeler import LABELS
from medvlm.errors import UserError
from medvlm.evaluation.prompts import load_prompts, prompt_set_names


def test_the_sets_that_come_with_it():
    assert prompt_set_names() == ["biovil_pneumonia", "chexpert_5x200", "chexpert_8x200", "chexzero", "phantom"]
    chexzero = load_prompts("chexzero")
    assert len(chexzero.labels) == 14
    assert chexzero.prompts("Pleural Effusion") == (["pleural effusion"], ["no pleural effusion"])
    positive, negative = load_prompts("biovil_pneumonia").prompts("Pneumonia")
    assert len(positive) == len(negative) == 4 and "{}" not in "".join(positive + negative)


def test_a_label_may_have_sentences_of_its_own(tmp_path):
    path = tmp_path / "own.yaml"
    text = "labels: {A: heart, B: {positive: [big], negative: [x, y]}}"
    text = f"kind: binary\npositive: ['a {{}}']\nnegative: ['no {{}}']\n{text}"
    path.write_text(text)
    own = load_prompts(str(path))
    assert own.prompts("A") == (["a heart"], ["no heart"]) and own.prompts("B") == (["big"], ["x", "y"])
    path.write_text("kind: binary\nlabels: {A: heart}")
    with pytest.raises(UserError, match="need the templates"):
        load_prompts(str(path))


def test_five_classes_of_ten_prompts_drawn_by_a_seed():
    prompts = load_prompts("chexpert_5x200")
    assert sorted(prompts.classes) == ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    for name in prompts.classes:
        drawn = prompts.prompts(name, 0)
        assert len(set(drawn)) == 10 and drawn == prompts.prompts(name, 0) != prompts.prompts(name, 1)
        assert all(text == text.strip() and "  " not in text for text in drawn)


def test_eight_classes_of_five_sentences():
    prompts = load_prompts("chexpert_8x200")
    assert len(prompts.classes) == 8 and prompts.images_per_class == 200
    assert all(len(set(prompts.prompts(name))) == 5 for name in prompts.classes)
    assert prompts.classes.keys() < set(LABELS), "the labels that a labeler and CheXpert's table give"


def test_parts_are_combined(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("kind: multiclass\nclasses:\n  A: {size: ['', small], what: [nodule, mass]}\n  B: [clear lungs]\n")
    own = load_prompts(str(path))
    assert own.prompts("A") == ["nodule", "mass", "small nodule", "small mass"] and own.prompts("B") == ["clear lungs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is biovil_pneumonia"),
        ("kind: [", "is not YAML"),
        ("kind: ternary", "binary or multiclass, not 'ternary'"),
        ("kind: binary\nlabels: {A: a}\npositive: []\nnegative: [b]", "positive"),
        ("kind: multiclass\nclasses: {A: [a]}", "classes"),
        ("kind: binary\nlabels: {A: a}\npositive: [a]\nnegative: [b]\nextra: 1", "extra"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_prompts(str(path))
