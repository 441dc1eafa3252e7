"""The training loop over the DeepSpeed engine. Read :func:`train`, then :func:`_advance`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvlm.config.schema import RunConfig
from medvlm.errors import UserError
from medvlm.training import checkpoint, collapse, distributed, preemption, validation, watch
from medvlm.training.boundary import Interrupted, Stop
from medvlm.training.gauges import Gauges
from medvlm.training.guard import Guard
from medvlm.training.lifecycle import announced
from medvlm.training.meters import Meters, print_parts
from medvlm.training.reading import read
from medvlm.training.setup import Session, make_saver, start, write_run_files
from medvlm.training.step import Quarantine, batches_from, exchange_counts, record, update
from medvlm.training.trace import Trace
from medvlm.training.trackers import Trackers


def run(config: RunConfig, *, before: Callable[[], None] | None = None, allow_change: bool = False) -> int:
    """Train on all ranks, watched over. ``before`` is for rank 0, as preparing data. Returns the exit status.

    Where a rank fails, the process ends here, with the status of the first failure.
    """
    with watch.over_ranks():
        watch.set_timeout(config.training.collective_timeout)
        if before and distributed.rank() == 0:
            before()
        distributed.barrier()
        return train(config, allow_change)


@dataclass
class Parts:
    """What accompanies a session through its steps; ``meters`` on rank 0."""

    guard: Guard
    quarantine: Quarantine
    saver: checkpoint.Saver
    gauges: Gauges
    trace: Trace
    meters: Meters | None

    def write(self, line: dict[str, Any]) -> None:
        if self.meters:
            self.meters.write(line)

    def close(self, finished: bool = True) -> None:
        self.trace.close()
        self.gauges.close()
        if self.meters:
            self.meters.close(finished)


@announced
def train(config: RunConfig, allow_change: bool = False) -> int:
    """Train a run to its end, or to the checkpoint that an interruption asks for. Returns the process's exit status."""
    session = start(config, allow_change)
    gauges, begun = Gauges(session), session.step
    preemption.wait_for_boundaries()
    if distributed.rank() == 0:
        print_parts(session.summaries)
        write_run_files(session)
        print(session.describe(), flush=True)
        if session.plan.packing:
            print(session.plan.advice(), flush=True)
        print(gauges.peak.line(), flush=True)
    trace = Trace(session.run / "trace.json", config.training.profile if distributed.rank() == 0 else None)
    guard = Guard(session.run, config.training, session.step)
    parts = Parts(guard, Quarantine(session), make_saver(session), gauges, trace, _meters(session))
    last = min(session.total, config.training.stop_after or session.total)
    try:
        if validation.was_interrupted(session):
            _evaluate(session, parts)
        while session.step < last:
            _advance(session, parts, last)
    except Stop as stop:
        saved = session.step > begun
        if saved:
            watch.enter("writing the last checkpoint", session.step)
            try:
                parts.saver.save(session.step)
                parts.saver.wait()
            except UserError as error:
                raise UserError(f"{stop}; and then {error}") from None
        if not isinstance(stop, Interrupted):
            raise UserError(f"{stop} (saved at step {session.step})" if saved else str(stop)) from None
        preemption.ignore_signals()
        parts.close(finished=False)
        if parts.meters:
            where = f"checkpoint of step {session.step} written" if saved else f"at step {session.step}, as it began"
            print(f"interrupted: {where}; start again to go on", flush=True)
        return preemption.STATUS if saved else preemption.NO_STEP
    watch.enter("waiting for the last checkpoint", session.step)
    parts.saver.wait()
    parts.close()
    if parts.meters:
        print(f"{config.run.name}: finished at step {session.step}, {checkpoint.newest(session.run)}", flush=True)
    return 0


def _advance(session: Session, parts: Parts, last: int) -> None:
    """Take the steps up to ``last``; returns before that after a rollback."""
    training, plan, first = session.config.training, session.plan, session.step
    left_out = parts.guard.left_out(first, last)
    loader = batches_from(session, (step for step in range(first, last) if step not in left_out))
    for step, packs in enumerate(plan.global_batches(first, last), first):
        numbers = [number for pack in packs for number, _ in pack]
        line: dict[str, Any] = {"step": step + 1, "epoch": plan.epoch(step)}
        if step in left_out:
            line["skipped"] = left_out[step]
        else:
            keys = session.data.reader.keys(numbers)
            started = parts.gauges.start()
            watch.enter("reading its batch", step + 1, tuple(keys))
            batches, trouble = read(loader, session.accumulation)
            data_seconds = time.perf_counter() - started
            watch.enter("exchange of counts", step + 1, tuple(keys))
            copies = session.config.training.sequence_parallel
            more = session.family.counted
            counts = exchange_counts(batches, trouble, parts.saver.ready, parts.gauges.windows, copies, more)
            if counts.written == distributed.world_size():
                parts.saver.finish()
            if parts.quarantine.check(step, batches, counts, len(numbers)):
                watch.enter("forward, backward and update", step + 1, tuple(key for b in batches for key in b.keys))
                values, verdict, suspects = update(session, step, batches, counts, parts.guard, parts.gauges.phases)
                if verdict:
                    if verdict.action == "rollback":
                        parts.saver.wait()
                    back = parts.guard.decide(step, verdict, suspects, keys)
                    if back:
                        return _roll_back(session, parts, back)
                line |= values
                line |= parts.gauges.measure(step + 1, counts, started, data_seconds)
                parts.trace.step()
            else:
                line["skipped"] = "all samples of the batch are left out"
            line |= record(session, counts, len(packs), keys)
        session.step = step + 1
        parts.write(line)
        if session.step == last or session.step % training.checkpoint_every == 0:
            watch.enter("copying its checkpoint", session.step)
            parts.saver.save(session.step)
        if validation.is_due(session):
            _evaluate(session, parts)


def _evaluate(session: Session, parts: Parts) -> None:
    found: dict[str, Any] = {"step": session.step, **session.family.validate(session)}
    if parts.meters and (told := collapse.warning(collapse.earlier(session.run / "metrics.jsonl"), found)):
        print(f"warning: {told}", flush=True)
        found["warning"] = told
    parts.write(found)


def _roll_back(session: Session, parts: Parts, back: Path) -> None:
    """Weights and moments of an earlier checkpoint; the guard knows which steps to leave out from there."""
    watch.enter("rollback", session.step)
    session.step = checkpoint.resume(session.engine, back, session.manifest)
    if distributed.rank() == 0:  # a newer one that was damaged would be in the way of those to come
        try:
            checkpoint.remove_after(session.run, session.step)
        except OSError as error:
            print(f"warning: a damaged checkpoint could not be removed: {error}", flush=True)
    distributed.barrier()
    parts.saver.saved = session.step
    parts.guard.begin(session.step)
    if parts.meters:
        parts.meters.close(finished=False)
        parts.meters = _meters(session)


def _meters(session: Session) -> Meters | None:
    """Rank 0's; lines of steps that are taken again are dropped."""
    if distributed.rank():
        return None
    return Meters(session.run, session.step, session.total, Trackers(session.config, session.step))
