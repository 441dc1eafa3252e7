"""Zero-shot classification by prompts: each label against its absence (CheXzero), or classes against each other."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from medvlm.errors import UserError
from medvlm.evaluation import intervals
from medvlm.evaluation.pictures import (
    Picture,
    described,
    drawn,
    has_labels,
    known_labels,
    lazy,
    load_pictures,
    only_class,
    truth,
)
from medvlm.evaluation.prompts import BinarySet, MulticlassSet, load_prompts
from medvlm.evaluation.retrieval import Joint
from medvlm.evaluation.task import Context, Options, Row, Task, library

Aggregate = Literal["max", "mean"]


class ZeroShotOptions(Options):
    prompts: str = "chexzero"
    aggregate: Aggregate = "mean"
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    unmentioned: Literal["ignore", "negative"] = "negative"


def load(reader: Any, limit: int | None, seed: int, options: ZeroShotOptions) -> list[Picture]:
    load_prompts(options.prompts)  # a mistake in it is told before any work
    return load_pictures(reader, limit, seed, views=options.view, wanted=has_labels, missing="no image has labels")


def class_scores(images: Tensor, prompts: Tensor, aggregate: Aggregate) -> Tensor:
    """Images [N, D] and prompts [P, D] of one class, all of length 1 -> [N].

    ``mean``: the cosine with the mean of the prompts, made of length 1 again (CheXzero, BioViL); ``max``: with the
    nearest prompt (GLoRIA).
    """
    if aggregate == "max":
        return (images @ prompts.T).amax(1)
    return images @ normalize(prompts.mean(0), dim=-1)


def presence(positive: Tensor, negative: Tensor) -> Tensor:
    """exp(c+) / (exp(c+) + exp(c-)) of the cosines with both sides, without a temperature, as CheXzero has it."""
    return (positive - negative).sigmoid()


def auroc(truths: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve of truths 1 and 0 [N]; None where there is one class only.

    By the ranks of the positives (Mann & Whitney), ties counting half: scikit-learn's number, for intervals' thousands
    of draws in a tenth of its time.
    """
    positive = int(truths.sum())
    negative = len(truths) - positive
    if not positive or not negative:
        return None
    ranks = library("scipy.stats").rankdata(scores)[truths == 1].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def evaluate(
    embedder: Joint, pictures: Sequence[Picture], options: ZeroShotOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Raises UserError if the data lack the labels of the prompts, or hold one class only."""
    chosen = load_prompts(options.prompts)
    if isinstance(chosen, BinarySet):
        return _binary(embedder, pictures, chosen, options, context)
    return _multiclass(embedder, pictures, chosen, options, context)


def _binary(
    embedder: Joint, pictures: Sequence[Picture], chosen: BinarySet, options: ZeroShotOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    known = known_labels(pictures)
    labels = [name for name in chosen.labels if name in known]
    if not labels:
        raise UserError(
            f"--prompts {options.prompts}: none of its labels is in the data, which have {', '.join(known)}"
        )
    truths = {
        name: np.array(
            [-1 if (t := truth(p, name, options.uncertain, options.unmentioned)) is None else t for p in pictures]
        )
        for name in labels
    }
    left_out = {name: "not in the data" for name in chosen.labels if name not in known}
    for name in labels:
        if len(found := set(truths[name].tolist()) - {-1}) < 2:
            left_out[name] = "only positive" if found == {1} else "only negative" if found else "only uncertain"
    used = [name for name in labels if name not in left_out]
    if not used:
        raise UserError(f"--prompts {options.prompts}: no label is both positive and negative somewhere in the data")
    images = embedder.images(lazy(pictures), context.batch_size)
    scores = {}
    for name in used:
        sides = [class_scores(images, embedder.texts(side), options.aggregate) for side in chosen.prompts(name)]
        scores[name] = presence(*sides).double().numpy()

    def areas(rows: np.ndarray) -> list[float]:
        found = [auroc(truths[n][rows][(keep := truths[n][rows] >= 0)], scores[n][rows][keep]) for n in used]
        values = [np.nan if value is None else value for value in found]
        return [*values, float(np.mean(values))]

    *per_label, macro = areas(np.arange(len(pictures)))
    spans = intervals.resampled_columns(areas, [p.group for p in pictures], context.seed)
    by_label = {}
    for name, area, span in zip(used, per_label, spans, strict=False):
        keep = truths[name] >= 0
        y, s = truths[name][keep], scores[name][keep]
        by_label[name] = {
            "n": len(y),
            "n_positive": int(y.sum()),
            "prevalence": float(y.mean()),
            "auroc": area,
            "auroc_ci95": span,
            "average_precision": float(library("sklearn.metrics").average_precision_score(y, s)),
        }
    results = {
        **described(pictures),
        "mean_auroc": macro,
        "chance_auroc": 0.5,
        "labels": by_label,
        "left_out": left_out,
        "ci95": {"mean_auroc": spans[-1]},
    }
    rows = [
        {**p.named, "truth": {n: int(truths[n][i]) for n in used}, "score": {n: float(scores[n][i]) for n in used}}
        for i, p in enumerate(pictures)
    ]
    return results, rows


def _multiclass(
    embedder: Joint, pictures: Sequence[Picture], chosen: MulticlassSet, options: ZeroShotOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    classes = list(chosen.classes)
    known = known_labels(pictures)
    if not set(classes) & set(known):
        raise UserError(
            f"--prompts {options.prompts}: none of its classes is in the data, which have {', '.join(known)}"
        )
    own = {name: [p for p in pictures if only_class(p, classes, chosen.exclusive) == name] for name in classes}
    empty = [name for name in classes if not own[name]]
    if empty:
        alone = "the only positive label" if chosen.exclusive == "all" else "the only positive class"
        raise UserError(f"--prompts {options.prompts}: no image has {empty[0]} as {alone} (see exclusive in the set)")
    kept = [p for n in classes for p in drawn(own[n], chosen.images_per_class, f"{context.seed}/{n}")]
    y = np.array([classes.index(name) for name in (only_class(p, classes, chosen.exclusive) for p in kept) if name])
    images = embedder.images(lazy(kept), context.batch_size)
    prompts = {name: chosen.prompts(name, context.seed) for name in classes}
    columns = [class_scores(images, embedder.texts(prompts[n]), options.aggregate).double().numpy() for n in classes]
    scores = np.stack(columns, axis=1)  # [N, classes]
    said = scores.argmax(1)
    # GLoRIA standardises each class over the test images, which a single new image cannot be
    spread = np.where(scores.std(0) > 0, scores.std(0), 1)
    transductive = ((scores - scores.mean(0)) / spread).argmax(1)
    owners = [p.group for p in kept]
    counts = np.bincount(y, minlength=len(classes))
    f1 = library("sklearn.metrics").f1_score

    def measured(rows: np.ndarray) -> list[float]:
        macro = f1(y[rows], said[rows], average="macro", labels=range(len(classes)), zero_division=0)
        return [float((said == y)[rows].mean()), float((transductive == y)[rows].mean()), float(macro)]

    names = ("accuracy", "accuracy_standardised", "macro_f1")
    results = {
        **described(kept),
        **dict(zip(names, measured(np.arange(len(y))), strict=True)),
        "chance_accuracy": 1 / len(classes),
        "majority_accuracy": float(counts.max() / len(y)),
        "classes": {
            name: {
                "n": int(counts[i]),
                "recall": float((said == i)[y == i].mean()),
                "said": int((said == i).sum()),
                "prompts": prompts[name],
            }
            for i, name in enumerate(classes)
        },
        "ci95": dict(zip(names, intervals.resampled_columns(measured, owners, context.seed), strict=True)),
    }
    rows = [
        {**p.named, "truth": classes[t], "answer": classes[a], "score": dict(zip(classes, s, strict=True))}
        for p, t, a, s in zip(kept, y, said, scores.tolist(), strict=True)
    ]
    return results, rows


def table(results: dict[str, Any]) -> list[Row]:
    n, ci = results["n"], results["ci95"]
    if "classes" in results:
        counts = Counter({name: values["n"] for name, values in results["classes"].items()})
        return [
            Row("accuracy", results["accuracy"], ci["accuracy"], n),
            Row("  chance", results["chance_accuracy"], None, n, True),
            Row(f"  always {counts.most_common(1)[0][0]}", results["majority_accuracy"], None, n, True),
            Row(
                "accuracy, scores standardised over the images",
                results["accuracy_standardised"],
                ci["accuracy_standardised"],
                n,
            ),
            Row("macro F1", results["macro_f1"], ci["macro_f1"], n),
            *(Row(f"  recall of {name}", v["recall"], None, v["n"]) for name, v in results["classes"].items()),
        ]
    rows = [Row("AUROC, mean of labels", results["mean_auroc"], ci["mean_auroc"], n)]
    rows.append(Row("  chance", 0.5, None, n, True))
    for name, v in results["labels"].items():
        rows.append(Row(f"AUROC: {name}", v["auroc"], v["auroc_ci95"], v["n"]))
        rows.append(Row("  average precision", v["average_precision"], None, v["n"]))
        rows.append(Row("  its chance (prevalence)", v["prevalence"], None, v["n"], True))
    return rows


TASK = Task(load=load, evaluate=evaluate, table=table, options=ZeroShotOptions)
