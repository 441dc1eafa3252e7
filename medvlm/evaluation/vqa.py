"""Visual question answering, and what a model scores that does not look: majority, blank image, wrong patient.

Every assistant turn is one question of its own, asked without the turns before it: a history would hold gold answers.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from medvlm.errors import UserError
from medvlm.evaluation import metrics
from medvlm.evaluation.questions import Question, Reader, blank, donors, load_questions, own, shuffled
from medvlm.evaluation.task import Row, Task

if TYPE_CHECKING:
    from medvlm.inference.generate import Request


class Answerer(Protocol):
    def answers(
        self, requests: "Sequence[Request]", max_new_tokens: int = ..., batch_size: int = ..., title: str = ...
    ) -> list[str]: ...


def evaluate(
    generator: Answerer,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    seed: int = 0,
    train_reader: Reader | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask every question with its own, with blank and with other patients' images.

    Returns the results (shares in [0, 1]; None where nothing of the kind was asked) and a dict per question. The
    controls leave out questions without images. Raises UserError without questions.
    """
    if not questions:
        raise UserError("there are no questions to evaluate")

    def ask(requests: "Iterable[Request]", title: str) -> list[str]:
        return generator.answers(list(requests), max_new_tokens=max_new_tokens, batch_size=batch_size, title=title)

    rows = [_row(q, a) for q, a in zip(questions, ask(map(own, questions), "questions"), strict=True)]
    seen = [i for i, q in enumerate(questions) if q.n_images]
    places = donors(questions, seed)
    if seen:
        answers = ask([blank(questions[i]) for i in seen], "blank images")
        _add_control(rows, questions, seen, answers, "blank")
    if places:
        answers = ask([shuffled(questions[i], questions, places) for i in seen], "shuffled images")
        _add_control(rows, questions, seen, answers, "shuffled")
        for i in seen:
            taken = [places[questions[i].sample_index, n][0] for n in range(questions[i].n_images)]
            rows[i]["shuffled_from"] = [questions[j].key for j in taken]
    return _results(questions, rows, seed, train_reader), rows


def _row(question: Question, answer: str) -> dict[str, Any]:
    scores = metrics.token_scores(answer, question.gold)
    return {
        "key": question.key,
        "turn": question.turn,
        "sample_index": question.sample_index,
        "group": question.group,
        "source": question.source,
        "images": question.n_images,
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "question": question.text,
        "gold": question.gold,
        "answer": answer,
        "correct": metrics.exact_match(answer, question.gold),
        "contains": metrics.contains(answer, question.gold),
        "token_recall": scores.recall,
        "token_f1": scores.f1,
    }


def _add_control(
    rows: list[dict[str, Any]], questions: Sequence[Question], seen: list[int], answers: list[str], name: str
) -> None:
    for i, answer in zip(seen, answers, strict=True):
        rows[i][f"{name}_answer"] = answer
        rows[i][f"{name}_correct"] = metrics.exact_match(answer, questions[i].gold)
        rows[i][f"{name}_token_recall"] = metrics.token_scores(answer, questions[i].gold).recall


class _Scores:
    """Collects means and their intervals, drawn by patient, under one name each."""

    def __init__(self, seed: int):
        self.seed, self.values, self.intervals = seed, dict[str, Any](), dict[str, list[float]]()

    def add(self, name: str, rows: list[dict[str, Any]], column: str) -> None:
        x = [float(row[column]) for row in rows]
        self.values[name] = float(np.mean(x)) if x else None
        if x:
            self.intervals[name] = list(metrics.bootstrap_interval(x, [row["group"] for row in rows], self.seed))


def _results(
    questions: Sequence[Question], rows: list[dict[str, Any]], seed: int, train_reader: Reader | None
) -> dict[str, Any]:
    closed = [row for row in rows if row["answer_type"] == "closed"]
    opened = [row for row in rows if row["answer_type"] == "open"]
    scores = _Scores(seed)
    scores.add("closed_accuracy", closed, "correct")
    # beside the controls, which leave out questions without images
    scores.add("closed_accuracy_with_image", [row for row in closed if row["images"]], "correct")
    scores.add("closed_contains", closed, "contains")
    scores.add("open_exact_match", opened, "correct")
    scores.add("open_token_recall", opened, "token_recall")
    scores.add("open_token_f1", opened, "token_f1")
    for control in ("blank", "shuffled"):
        asked = [row for row in rows if f"{control}_answer" in row]
        shut = [row for row in asked if row["answer_type"] == "closed"]
        free = [row for row in asked if row["answer_type"] == "open"]
        scores.add(f"{control}_image_accuracy", shut, f"{control}_correct")
        scores.add(f"{control}_image_open_recall", free, f"{control}_token_recall")
        # paired, on the same questions: the share of the score that comes from looking at this patient's image
        for row in shut:
            row[f"gain_over_{control}"] = row["correct"] - row[f"{control}_correct"]
        scores.add(f"gain_over_{control}", shut, f"gain_over_{control}")
    return {
        "n": len(rows),
        "n_closed": len(closed),
        "n_open": len(opened),
        "n_closed_with_image": sum(row["images"] > 0 for row in closed),
        "n_open_with_image": sum(row["images"] > 0 for row in opened),
        "n_groups": len({q.group for q in questions}),
        "sources": dict(Counter(q.source for q in questions)),
        "synthetic": all(q.synthetic for q in questions),
        **scores.values,
        **_majority(closed, questions, train_reader),
        **_yes_no(closed),
        "ci95": scores.intervals,
        "by_question_type": _by_type(rows),
    }


def _majority(
    closed: list[dict[str, Any]], questions: Sequence[Question], train_reader: Reader | None
) -> dict[str, Any]:
    """What always giving one answer scores on the closed questions.

    ``majority_accuracy`` takes the most frequent answer of the evaluated questions themselves, so it is an upper bound
    for one constant answer. ``majority_by_question_accuracy`` answers each question's wording as the training shards
    mostly do, and unseen wordings with their most frequent closed answer: what the text alone gives away.
    """
    gold = Counter(metrics.normalize_gold(row["gold"]) for row in closed)
    answer, count = gold.most_common(1)[0] if gold else (None, 0)
    out = {
        "majority_accuracy": count / len(closed) if closed else None,
        "majority_answer": answer,
        "closed_gold_counts": dict(gold.most_common(20)),
        "majority_by_question_accuracy": None,
    }
    if train_reader is None or not closed:
        return out
    training = [q for q in load_questions(train_reader) if q.closed]
    if not training:
        return out
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for q in training:
        by_text[metrics.normalize(q.text)][metrics.normalize_gold(q.gold)] += 1
    overall = Counter(metrics.normalize_gold(q.gold) for q in training)
    hits = 0
    for row in closed:
        counts = by_text.get(metrics.normalize(row["question"])) or overall
        hits += counts.most_common(1)[0][0] == metrics.normalize_gold(row["gold"])
    out["majority_by_question_accuracy"] = hits / len(closed)
    return out


def _yes_no(closed: list[dict[str, Any]]) -> dict[str, Any]:
    """Over closed questions whose gold answer is yes or no: balanced accuracy (0.5 is chance), answers that say yes,
    and answers that begin with neither word. Balanced accuracy needs both gold answers."""
    hits: dict[str, list[bool]] = {"yes": [], "no": []}
    said = []
    for row in closed:
        gold = metrics.normalize_gold(row["gold"])
        if gold in hits:
            hits[gold].append(row["correct"])
            said.append(metrics.polarity(row["answer"]))
    n = len(said)
    both = all(hits.values())
    return {
        "n_yes_no": n,
        "closed_balanced_accuracy": float(np.mean([np.mean(h) for h in hits.values()])) if both else None,
        "yes_rate": said.count("yes") / n if n else None,
        "gold_yes_rate": len(hits["yes"]) / n if n else None,
        "neither_yes_nor_no_rate": said.count(None) / n if n else None,
    }


def _by_type(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    out = {}
    for name in sorted({row["question_type"] or "unspecified" for row in rows}):
        part = [row for row in rows if (row["question_type"] or "unspecified") == name]
        closed = [row["correct"] for row in part if row["answer_type"] == "closed"]
        recall = [row["token_recall"] for row in part if row["answer_type"] == "open"]
        out[name] = {
            "n": len(part),
            "n_closed": len(closed),
            "n_open": len(recall),
            "closed_accuracy": float(np.mean(closed)) if closed else None,
            "open_token_recall": float(np.mean(recall)) if recall else None,
        }
    return out


def table(results: dict[str, Any]) -> list[Row]:
    """The results as lines, each control under the score it belongs to."""

    def row(label: str, name: str, n: str, control: bool = False) -> Row:
        return Row(label, results[name], results["ci95"].get(name), results[n], control)

    rows = []
    mixed = results["n_closed_with_image"] not in (0, results["n_closed"])
    if results["n_closed"]:
        rows += [
            row("closed: accuracy (exact)", "closed_accuracy", "n_closed"),
            row("  majority answer", "majority_accuracy", "n_closed", True),
            row("  majority answer per wording", "majority_by_question_accuracy", "n_closed", True),
            *([row("  questions with images", "closed_accuracy_with_image", "n_closed_with_image")] if mixed else []),
            row("  blank image", "blank_image_accuracy", "n_closed_with_image", True),
            row("  another patient's image", "shuffled_image_accuracy", "n_closed_with_image", True),
            row("  gain over blank image", "gain_over_blank", "n_closed_with_image"),
            row("  gain over another patient's image", "gain_over_shuffled", "n_closed_with_image"),
            row("closed: gold answer contained", "closed_contains", "n_closed"),
        ]
    if results["n_yes_no"]:
        rows += [
            row("yes/no: balanced accuracy", "closed_balanced_accuracy", "n_yes_no"),
            row("yes/no: answers that say yes", "yes_rate", "n_yes_no"),
            row("  gold answers that say yes", "gold_yes_rate", "n_yes_no", True),
        ]
    if results["n_open"]:
        rows += [
            row("open: exact match", "open_exact_match", "n_open"),
            row("open: token recall", "open_token_recall", "n_open"),
            row("  blank image", "blank_image_open_recall", "n_open_with_image", True),
            row("  another patient's image", "shuffled_image_open_recall", "n_open_with_image", True),
            row("open: token F1", "open_token_f1", "n_open"),
        ]
    return [r for r in rows if r.value is not None]


TASK = Task(load=load_questions, evaluate=evaluate, table=table)
