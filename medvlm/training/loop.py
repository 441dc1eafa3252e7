"""The training loop over the DeepSpeed engine. One function reads top to bottom: :func:`train`."""

import signal
import time

from medvlm.config.schema import RunConfig
from medvlm.training import checkpoint, distributed
from medvlm.training.gauges import Gauges
from medvlm.training.lifecycle import announced
from medvlm.training.meters import Meters, print_parts
from medvlm.training.setup import make_saver, start, write_run_files
from medvlm.training.step import Quarantine, batches_from, exchange_counts, record, update
from medvlm.training.trace import Trace
from medvlm.training.trackers import Trackers
from medvlm.training.validation import evaluation_loss

PREEMPTED = 85  # exit code: a checkpoint was written, start again to go on


@announced
def train(config: RunConfig) -> int:
    """Train a run to its end, or to the checkpoint that an interruption asks for. Returns the process's exit status."""
    signals = _catch_signals()
    session = start(config)
    gauges = Gauges(session)
    run, training, plan, step = session.run, config.training, session.plan, session.step
    meters = None
    if distributed.rank() == 0:
        print_parts(session.summaries)
        write_run_files(session)
        print(session.describe(), flush=True)
        if plan.packing:
            print(plan.advice(), flush=True)
        print(gauges.peak.line(), flush=True)
        meters = Meters(run, step, session.total, Trackers(config, step))

    last = min(session.total, training.stop_after or session.total)
    loader = batches_from(session, step, last)
    quarantine = Quarantine(session)
    saver = make_saver(session)
    trace = Trace(run / "trace.json", training.profile if distributed.rank() == 0 else None)
    for packs in plan.global_batches(step, last):
        numbers = [number for pack in packs for number, _ in pack]
        started = gauges.start()
        batches = [next(loader) for _ in range(session.accumulation)]
        data_seconds = time.perf_counter() - started
        counts = exchange_counts(batches, bool(signals), saver.ready, gauges.windows)
        if counts.written == distributed.world_size():
            saver.finish()
        quarantine.check(step, batches, counts, len(numbers))
        keys = session.data.reader.keys(numbers)
        values = update(session, step, batches, counts, keys, gauges.phases)
        step += 1
        measured = gauges.measure(step, counts, started, data_seconds)
        if meters:
            values |= record(session, counts, len(packs), keys)
            meters.write({"step": step, "epoch": plan.epoch(step - 1), **values, **measured})
        trace.step()
        if counts.interrupted or step == last or step % training.checkpoint_every == 0:
            saver.save(step)
        if counts.interrupted:
            trace.close()
            gauges.close()
            saver.wait()
            if meters:
                meters.close(finished=False)
                print(f"interrupted: checkpoint of step {step} written; start again to go on", flush=True)
            return PREEMPTED
        due = step == session.total or (training.evaluate_every and step % training.evaluate_every == 0)
        if config.data.validation and due:
            value = evaluation_loss(session)
            if meters:
                meters.write({"step": step, "eval_loss": value})
    trace.close()
    gauges.close()
    saver.wait()
    if meters:
        meters.close()
        print(f"{config.run.name}: finished at step {step}, {checkpoint.newest(run)}", flush=True)
    return 0


def _catch_signals() -> list[int]:
    """Numbers of the interruption signals received, filled as they come and polled at each step."""
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, _: received.append(signum))
    return received
