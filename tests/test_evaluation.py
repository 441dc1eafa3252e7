"""Scores equal the reference implementation's; controls withhold the image; any stock folder can be evaluated."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from test_inference import make_stock_folder
from toy import sample

from medvlm import evaluation
from medvlm.data.schema import Sample
from medvlm.data.shards import ShardReader, write_shards
from medvlm.errors import UserError
from medvlm.evaluation import metrics, vqa
from medvlm.evaluation.questions import GREY, donors, load_questions
from medvlm.evaluation.report import write_report


class Reader:
    """Samples in memory, with the interface of ShardReader."""

    def __init__(self, items):
        self.items = [(s, [members[i.file] for i in s.images]) for s, members in items]

    def __len__(self):
        return len(self.items)

    def sample(self, i):
        return self.items[i][0]

    def images(self, i):
        return self.items[i][1]


class Oracle:
    """Knows the gold answer of every picture; sees only pixels. ``rule`` is asked when it does not know the picture."""

    def __init__(self, questions, blind="yes"):
        self.known = {(self.look(q.image(0)), q.text): q.gold for q in questions if q.n_images}
        self.blind, self.calls = blind, []

    @staticmethod
    def look(image):
        return np.asarray(image).tobytes()

    def answers(self, requests, max_new_tokens=32, batch_size=16, title=""):
        self.calls.append(requests)
        out = []
        for images, messages in requests:
            text = messages[0]["content"][-1]["text"]
            out.append(self.known.get((self.look(images[0]), text), self.blind) if len(images) else "no image")
        return out


def toy_items(count=12, patients=None, images=lambda i: 1):
    items = []
    for i in range(count):
        s, members = sample(i, images(i), [("yes", "no")[i % 2], "the left lung"], patient_id=f"p{(patients or count)}")
        fields = s.model_dump()
        fields["patient_id"] = f"p{i % (patients or count)}"
        fields["messages"][3]["answer_type"] = "open"
        fields["messages"][1]["question_type"] = "presence"
        items.append((Sample.model_validate(fields), members))
    return items


# ---- metrics


def test_scores_equal_llava_meds_own_on_every_row(test_data):
    reference = json.loads((test_data / "metric_vectors" / "vqa_rad_llavamed_scoring_reference.json").read_text())
    source = json.loads((test_data / "vqa_rad" / "VQA_RAD_Dataset_Public.json").read_text())
    gold = {str(entry["qid"]): str(entry["answer"]) for entry in source}
    totals = {name: [] for name in reference["aggregate"] if not name.startswith("n_")}
    for row in reference["rows"]:
        pred, answer = row["pred"], gold[str(row["qid"])]
        assert metrics.normalize(pred) == row["norm_pred"]
        assert metrics.normalize(answer) == row["norm_gt"]
        if row["answer_type"] == "CLOSED":
            mine = {"contains": metrics.contains(pred, answer), "yesno": metrics.contains_yes_no(pred, answer)}
            kind = "closed"
        else:
            mine = {**metrics.token_scores(pred, answer)._asdict(), "em": metrics.word_overlap(pred, answer)}
            mine["contains"] = metrics.contains(pred, answer)
            kind = "open"
        for name, value in mine.items():
            assert value == pytest.approx(row[name], abs=1e-4), row
            totals[f"{kind}_{name}"].append(value)
    assert len(reference["rows"]) == 451
    for name, values in totals.items():
        assert np.mean(values) == pytest.approx(reference["aggregate"][name], abs=1e-4), name


def test_normalisation_follows_vqav2():
    assert metrics.normalize("The X-ray, is it normal?") == "x ray is it normal"
    assert metrics.normalize("X-ray - supine") == "xray supine"  # a mark that stands beside a space once is deleted
    assert metrics.normalize("1,000 X-rays") == "1000 xrays"  # and all are, where a comma groups digits
    assert metrics.normalize("None of the two, dont.") == "0 of 2 don't"
    assert metrics.normalize("0.5 cm.") == "0.5 cm"
    assert metrics.normalize("couldntve couldn'tve Im") == "couldntve couldn't've i'm"


def test_strict_and_lenient_rules_differ_where_no_is_in_normal():
    assert metrics.contains("Normal", "no") and not metrics.exact_match("Normal", "no")
    assert metrics.polarity("No, it is not.") == "no" and metrics.polarity("Normal") is None


def test_token_scores_are_the_arithmetic_of_their_definition():
    scores = metrics.token_scores("left left lung", "left upper lobe")  # 2 hits, 1 false, 2 missed
    assert scores == pytest.approx((2 / 3, 2 / 4, 2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)))
    assert metrics.token_scores("", "left") == (0, 0, 0)


def test_the_interval_has_the_width_theory_gives_and_widens_with_dependent_answers():
    values = [1.0] * 200 + [0.0] * 200
    low, high = metrics.bootstrap_interval(values)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.01)  # 0.5 -/+ 1.96 * sqrt(0.25 / 400)
    patients = [f"p{i // 40}" for i in range(400)]  # ten patients, all answers of one alike
    low, high = metrics.bootstrap_interval(values, patients)
    assert high - low > 0.4
    assert metrics.bootstrap_interval(values, patients, seed=1) == metrics.bootstrap_interval(values, patients, seed=1)


# ---- questions and controls


def test_every_assistant_turn_is_a_question_of_its_own_with_all_images_first():
    reader = Reader(toy_items(3, images=lambda i: 2))
    questions = load_questions(reader)
    assert [(q.key, q.turn, q.answer_type) for q in questions[:2]] == [("s0000", 0, "closed"), ("s0000", 1, "open")]
    oracle = Oracle(questions)
    vqa.evaluate(oracle, questions)
    for images, messages in oracle.calls[0]:
        assert len(images) == 2 and len(messages) == 1
        assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]
    assert "<image>" not in questions[0].text


def test_a_question_without_a_type_is_closed_if_its_gold_is_yes_or_no():
    items = toy_items(2)
    for s, _ in items:
        for m in s.messages:
            object.__setattr__(m, "answer_type", None)
    assert [q.answer_type for q in load_questions(Reader(items))] == ["closed", "open"] * 2


@pytest.mark.parametrize(
    ("count", "patients", "images"), [(12, 12, 1), (12, 5, 1), (9, 2, 1), (10, 3, 3), (3, 2, 2)], ids=str
)
def test_no_question_keeps_an_image_of_its_own_patient(count, patients, images):
    questions = load_questions(Reader(toy_items(count, patients, lambda i: images)))
    for seed in range(5):
        places = donors(questions, seed)
        assert len(places) == count * images
        by_sample = {q.sample_index: q for q in questions}
        for (number, _), (i, _) in places.items():
            assert questions[i].group != by_sample[number].group
        assert places == donors(questions, seed)
        if 2 * max(-(-count // patients), 1) <= count:
            assert len(set(places.values())) == count * images, "a permutation shows every image once"


def test_one_dominant_patient_still_never_sees_its_own_image():
    items = toy_items(10, 10)
    for s, _ in items[:8]:
        object.__setattr__(s, "patient_id", "dominant")
    questions = load_questions(Reader(items))
    by_sample = {q.sample_index: q for q in questions}
    for (number, _), (i, _) in donors(questions, 0).items():
        assert questions[i].group != by_sample[number].group


def test_samples_of_two_folders_may_have_the_same_key():
    items = toy_items(6, 6, lambda i: 1 + i % 2)
    for s, _ in items:
        object.__setattr__(s, "key", "1")
    questions = load_questions(Reader(items))
    places = donors(questions, 0)
    assert len(places) == 9 and all(questions[i].group != items[s][0].group for (s, _), (i, _) in places.items())


def test_an_answer_that_is_an_article_stays_one():
    """As of PMC-VQA, whose answers are letters."""
    assert metrics.exact_match("A", "a") and not metrics.exact_match("", "A") and not metrics.exact_match("The", "A")
    assert metrics.token_scores("A", "A").recall == 1 and metrics.normalize_gold("a mass") == "mass"
    assert not metrics.contains("I cannot tell", "A") and not metrics.contains("", "A") and metrics.contains("(A)", "A")


def test_a_single_patient_has_no_shuffled_control():
    questions = load_questions(Reader(toy_items(4, 1)))
    results, rows = vqa.evaluate(Oracle(questions), questions)
    assert results["shuffled_image_accuracy"] is None and "shuffled_answer" not in rows[0]
    assert results["blank_image_accuracy"] == 0.5


def test_controls_show_what_the_image_is_worth():
    items = toy_items(12)
    questions = load_questions(Reader(items))
    sighted, rows = vqa.evaluate(Oracle(questions, blind="yes"), questions)
    assert sighted["closed_accuracy"] == 1 and sighted["open_token_recall"] == 1
    assert sighted["blank_image_accuracy"] == 0.5 == sighted["majority_accuracy"]
    assert sighted["gain_over_blank"] == 0.5 and sighted["ci95"]["gain_over_blank"][0] > 0
    assert sighted["closed_balanced_accuracy"] == 1 and sighted["yes_rate"] == 0.5
    for question, row in zip(questions, rows, strict=True):
        other = next(q for q in questions if q.key == row["shuffled_from"][0])
        assert other.group != question.group
        gold = next(q.gold for q in questions if q.key == other.key and q.turn == question.turn)
        assert row["shuffled_answer"] == gold  # the oracle answers for the picture that it was shown
    blind = Oracle(questions)
    blind.known = {}
    results, _ = vqa.evaluate(blind, questions)
    assert results["closed_accuracy"] == results["blank_image_accuracy"] == results["shuffled_image_accuracy"] == 0.5
    assert results["gain_over_shuffled"] == 0 and results["yes_rate"] == 1


def test_the_blank_image_is_grey_and_of_the_same_size():
    questions = load_questions(Reader(toy_items(2)))
    oracle = Oracle(questions)
    vqa.evaluate(oracle, questions)
    (image,), _ = oracle.calls[1][0]
    assert image.size == (40, 40) and image.getextrema() == (GREY, GREY)


def test_text_only_samples_are_asked_and_left_out_of_the_controls():
    questions = load_questions(Reader(toy_items(8, images=lambda i: i % 2)))
    results, rows = vqa.evaluate(Oracle(questions), questions)
    assert results["n_closed"] == 8 and results["n_closed_with_image"] == 4
    assert results["closed_accuracy"] == 0.5 and results["closed_accuracy_with_image"] == 1
    assert any("questions with images" in row.label for row in vqa.table(results))
    without = [row for row in rows if not row["images"]]
    assert len(without) == 8 and not any("blank_answer" in row or "shuffled_answer" in row for row in without)


def test_majority_by_wording_comes_from_the_training_shards():
    test, train = load_questions(Reader(toy_items(4))), toy_items(9)
    results, _ = vqa.evaluate(Oracle(test), test, train_reader=Reader(train))
    assert results["majority_by_question_accuracy"] == 0.5  # one wording; "yes" 5 of 9 in training, 2 of 4 here
    assert results["majority_answer"] in ("yes", "no") and results["closed_gold_counts"] == {"yes": 2, "no": 2}


def test_a_limit_draws_the_same_questions_for_the_same_seed():
    reader = Reader(toy_items(12))
    first, again, other = (load_questions(reader, 6, seed) for seed in (0, 0, 1))
    assert first == again != other and len(first) == 6


def test_nothing_to_ask_is_an_error():
    s = Sample(key="a", source="t", license="CC0-1.0", split="test", report={"findings": "clear"})
    with pytest.raises(UserError, match="no questions"):
        load_questions(Reader([(s, {})]))


def test_a_single_kind_of_question_leaves_the_other_kinds_scores_undefined():
    questions = [q for q in load_questions(Reader(toy_items(4))) if not q.closed]
    results, _ = vqa.evaluate(Oracle(questions), questions)
    assert results["closed_accuracy"] is None and results["majority_accuracy"] is None
    assert all(row.label.startswith(("open", "  ")) for row in vqa.table(results))


# ---- end to end


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A stock random folder, evaluated on shards: (folder, shards, out, results)."""
    root = tmp_path_factory.mktemp("evaluated")
    folder = make_stock_folder(root / "llava")
    write_shards(toy_items(6, images=lambda i: (1, 0, 2)[i % 3]), root / "shards", "toy", 4)
    results = evaluation.run(folder, "vqa", [root / "shards"], root / "out", max_new_tokens=3, as_json=True)
    return folder, root / "shards", root / "out", results


def test_a_stock_folder_is_evaluated_and_its_files_are_complete(evaluated):
    _, _, out, results = evaluated
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == results["n"] == 12 and results["n_closed_with_image"] == 4
    wanted = {"key", "question", "gold", "answer", "correct", "token_recall", "answer_type"}
    assert all(wanted <= set(row) for row in rows)
    assert all({"blank_answer", "shuffled_answer"} <= set(row) for row in rows if row["images"])
    assert np.mean([row["correct"] for row in rows if row["answer_type"] == "closed"]) == results["closed_accuracy"]


def test_the_command_line_evaluates_and_names_mistakes(evaluated, tmp_path, capsys, monkeypatch):
    from medvlm import cli

    folder, shards, _, results = evaluated
    arguments = ["medvlm", "evaluate", str(folder), "--data", str(shards), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*arguments, "--max-new-tokens", "3", "--batch-size", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().out
    assert not end.value.code and "accuracy" in shown and "another patient" in shown
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["closed_accuracy"] == results["closed_accuracy"]  # whatever the batch size
    monkeypatch.setattr("sys.argv", [*arguments, "--task", "poetry"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "poetry" in capsys.readouterr().err


class Checker(HTMLParser):
    """Counts tags, keeps text, and refuses tags that close what is not open."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_with_curves_scores_and_examples(evaluated, tmp_path):
    pytest.importorskip("matplotlib")
    _, shards, out, results = evaluated
    log = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "loss": 5 / i, "tokens_per_second": 100.0 + i} for i in range(1, 900)]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 899, "eval_loss": 0.125}]))
    page = write_report(
        tmp_path / "report.html",
        {"stage 1": log, "stage <2>": log},
        {**results, "synthetic": True},
        out / "predictions.jsonl",
        ShardReader(shards),
        examples=3,
        extra={"command": "a < b"},
    )
    html = page.read_text()
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    text = "".join(checker.text)
    assert "Synthetic data" in text and "a < b" in text and "0.125" in text and "stage <2>" in text
    assert "<svg" in html and len(checker.images) >= 3 and "is there an effusion 0" in text
    assert all(src.startswith("data:image/png;base64,") for src in checker.images)
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)[^\s"')>]+""", html)
    assert not links, links


def test_a_report_refuses_predictions_of_other_shards(evaluated, tmp_path):
    pytest.importorskip("jinja2")
    _, _, out, results = evaluated
    with pytest.raises(UserError, match="not of these shards"):
        other = Reader([sample(90 + i, 1, ["yes"]) for i in range(6)])
        write_report(tmp_path / "r.html", {}, results, out / "predictions.jsonl", other)
    with pytest.raises(UserError, match="absent"):
        write_report(tmp_path / "r.html", {"a": tmp_path / "absent"}, results, out / "predictions.jsonl", other)
