"""Linear probe: logistic regression on frozen image embeddings, with 1, 10 and 100 % of the labelled patients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medvlm.errors import UserError
from medvlm.evaluation import intervals
from medvlm.evaluation.pictures import Picture, described, has_labels, known_labels, lazy, load_pictures, truth
from medvlm.evaluation.retrieval import Joint
from medvlm.evaluation.task import Context, Options, Row, Task, library
from medvlm.evaluation.zero_shot import auroc

FRACTIONS = (0.01, 0.1, 1.0)
GRID = np.logspace(-4, 2, 7)  # inverse strengths of L2
SHARES = (0.6, 0.2)  # of patients for training and validation, the rest being the test


class ProbeOptions(Options):
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    unmentioned: Literal["ignore", "negative"] = "negative"
    seeds: int = Field(default=3, ge=3)


@dataclass
class Data:
    """``x`` [N, D] embeddings, ``y`` [N, L] of 1, 0 and -1 (left out), and the patient of each row."""

    x: np.ndarray
    y: np.ndarray
    groups: np.ndarray

    def of(self, patients: Sequence[str]) -> "Data":
        rows = np.isin(self.groups, list(patients))
        return Data(self.x[rows], self.y[rows], self.groups[rows])


def load(reader: Any, limit: int | None, seed: int, options: ProbeOptions) -> list[Picture]:
    return load_pictures(reader, limit, seed, views=options.view, wanted=has_labels, missing="no image has labels")


def probe(train: Data, validation: Data, test: Data, label: int) -> np.ndarray | None:
    """Scores of the test rows [M] for a label (its column); the strength of L2 is the one that validates best.

    Embeddings are standardised by the training rows. None if the training or validation rows are of one class.
    """
    parts = [(part.x[keep], part.y[keep, label]) for part in (train, validation) for keep in [part.y[:, label] >= 0]]
    if any(len(set(y.tolist())) < 2 for _, y in parts):
        return None
    (x, y), (validation_x, validation_y) = parts
    scaler = library("sklearn.preprocessing").StandardScaler().fit(x)
    x, validation_x, test_x = scaler.transform(x), scaler.transform(validation_x), scaler.transform(test.x)
    best, scores = -math.inf, None
    for strength in GRID:
        model = library("sklearn.linear_model").LogisticRegression(C=strength, max_iter=2000).fit(x, y)
        area = auroc(validation_y, model.decision_function(validation_x))
        if area is not None and area > best:
            best, scores = area, model.decision_function(test_x)
    return scores


def split(patients: Sequence[str], shares: Sequence[float], seed: int | list[int]) -> list[list[str]]:
    """Patients in parts of these shares and the rest, in an order drawn by the seed."""
    mixed = [sorted(set(patients))[i] for i in np.random.default_rng(seed).permutation(len(set(patients)))]
    ends = [round(len(mixed) * share) for share in np.cumsum(shares)]
    return [mixed[a:b] for a, b in zip([0, *ends], [*ends, len(mixed)], strict=True)]


def evaluate(
    embedder: Joint, pictures: Sequence[Picture], options: ProbeOptions, context: Context
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Test on ``pictures`` what is learnt from the training shards; without these the pictures' patients are split.

    The test patients are the same for all seeds; a seed draws which of the others train and which validate. Raises
    UserError if a patient is in both sets of shards, or if no label can be probed.
    """
    labels = known_labels(pictures)
    table = np.array([[_value(truth(p, n, options.uncertain, options.unmentioned)) for n in labels] for p in pictures])
    library("sklearn.linear_model")
    x = embedder.images(lazy(pictures), context.batch_size, normalized=False).numpy()
    test = Data(x, table, np.array([p.group for p in pictures]))
    tested = list(pictures)
    if context.train_reader is not None:
        more = load(context.train_reader, None, context.seed, options)
        shared = sorted({p.group for p in more} & set(test.groups.tolist()))
        if shared:
            raise UserError(
                f"--train-data: {len(shared)} patient(s) are in --data too, first {shared[0]}; split by patient"
            )
        values = [[_value(truth(p, n, options.uncertain, options.unmentioned)) for n in labels] for p in more]
        known = embedder.images(lazy(more), context.batch_size, normalized=False).numpy()
        pool = Data(known, np.array(values), np.array([p.group for p in more]))
    else:
        first, second, held = split(test.groups.tolist(), SHARES, context.seed)
        pool, test = test.of(first + second), test.of(held)
        tested = [p for p in pictures if p.group in set(held)]
    used, left_out = [], {}
    for i, name in enumerate(labels):
        if all({0, 1} <= set(part.y[:, i].tolist()) for part in (pool, test)):
            used.append(name)
        else:
            left_out[name] = "one class only in the test or the training patients"
    if not used:
        raise UserError(f"no label is both positive and negative in test and training patients ({', '.join(labels)})")
    found: dict[str, Any] = {}
    ci: dict[str, Any] = {}
    scores: dict[tuple[float, str], list[np.ndarray]] = {}
    sizes: dict[float, int] = {}
    share = SHARES[0] / sum(SHARES)
    for seed in range(options.seeds):
        learn, validate = split(pool.groups.tolist(), [share], [context.seed, seed])
        for fraction in FRACTIONS:
            sizes[fraction] = math.ceil(fraction * len(learn))
            few, validation = pool.of(learn[: sizes[fraction]]), pool.of(validate)
            for name in used:
                one = probe(few, validation, test, labels.index(name))
                if one is not None:
                    scores.setdefault((fraction, name), []).append(one)
    for fraction in FRACTIONS:
        found[f"{fraction:g}"], ci[f"{fraction:g}"] = _summary(
            {name: scores.get((fraction, name), []) for name in used}, test, labels, context.seed
        )
        found[f"{fraction:g}"]["n_train_patients"] = sizes[fraction]
    results = {
        **described(tested),
        "n_seeds": options.seeds,
        "n_pool_patients": len(set(pool.groups.tolist())),
        "chance_auroc": 0.5,
        "fractions": found,
        "left_out": left_out,
        "ci95": ci,
    }
    rows = [
        {
            **p.named,
            "truth": {n: int(test.y[i, labels.index(n)]) for n in used},
            "score": {f"{f:g}": {n: [float(s[i]) for s in scores.get((f, n), [])] for n in used} for f in FRACTIONS},
        }
        for i, p in enumerate(tested)
    ]
    return results, rows


def _value(value: int | None) -> int:
    return -1 if value is None else value


def _summary(
    scores: dict[str, list[np.ndarray]], test: Data, labels: list[str], seed: int
) -> tuple[dict[str, Any], Any]:
    """Of one fraction: AUROC per label, the mean over the seeds for which it is defined, and the mean of labels."""
    names = [name for name in scores if scores[name]]

    def per_seed(name: str, rows: np.ndarray) -> list[float | None]:
        y = test.y[rows, labels.index(name)]
        keep = y >= 0
        return [auroc(y[keep], s[rows][keep]) for s in scores[name]]

    def areas(rows: np.ndarray) -> list[float]:
        values = [float(np.mean([np.nan if a is None else a for a in per_seed(name, rows)])) for name in names]
        return [*values, float(np.mean(values))]

    everything = np.arange(len(test.groups))
    if not names:
        return {"mean_auroc": None, "labels": {}, "undefined": list(scores)}, None
    *per_label, mean = areas(everything)
    spans = intervals.resampled_columns(areas, test.groups.tolist(), seed)
    by_label = {
        name: {
            "auroc": area,
            "auroc_ci95": span,
            "sd_over_seeds": float(np.std([a for a in per_seed(name, everything) if a is not None])),
            "n_seeds": len(scores[name]),
            "n": int((test.y[:, labels.index(name)] >= 0).sum()),
            "n_positive": int((test.y[:, labels.index(name)] == 1).sum()),
        }
        for name, area, span in zip(names, per_label, spans, strict=False)
    }
    undefined = [name for name in scores if not scores[name]]
    return {"mean_auroc": mean, "labels": by_label, "undefined": undefined}, spans[-1]


def table(results: dict[str, Any]) -> list[Row]:
    rows = [Row("AUROC by chance", 0.5, None, results["n"], True)]
    for fraction, found in results["fractions"].items():
        title = f"{100 * float(fraction):g} % of patients ({found['n_train_patients']})"
        rows.append(
            Row(
                f"{title}: AUROC, mean of {len(found['labels'])} labels",
                found["mean_auroc"],
                results["ci95"][fraction],
                results["n"],
            )
        )
        rows += [Row(f"  {name}", v["auroc"], v["auroc_ci95"], v["n"]) for name, v in found["labels"].items()]
    return rows


TASK = Task(load=load, evaluate=evaluate, table=table, options=ProbeOptions)
