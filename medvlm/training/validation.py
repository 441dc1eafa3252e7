"""When a run evaluates its weights on validation shards, in the training processes; how is its family's matter."""

import json

from medvlm.training import distributed
from medvlm.training.setup import Session


def is_due(session: Session) -> bool:
    """Whether the weights of this step are to be evaluated."""
    every = session.config.training.evaluate_every
    due = session.step == session.total or bool(every and session.step % every == 0)
    return due and bool(session.config.data.validation)


def was_interrupted(session: Session) -> bool:
    """Whether the step that a run resumes at still lacks its evaluation. All ranks call this."""
    if not is_due(session) or session.step == 0:
        return False
    lacks = False
    if distributed.rank() == 0:
        path = session.run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
        lacks = not any(row["step"] == session.step and "eval_loss" in row for row in rows)
    return bool(distributed.sum_over_ranks([lacks])[0])
