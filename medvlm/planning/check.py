"""Whether a step will fit. `medvlm train` asks in a process of its own: JSON in, a verdict as JSON out."""

import json
import sys

from medvlm.config.schema import RunConfig
from medvlm.planning.plan import GIB, Machine, for_target, make_job
from medvlm.planning.rehearsal import OPTIMIZER, PARAMETERS, rehearse
from medvlm.planning.report import components
from medvlm.planning.step_time import Rates


def verdict(config: RunConfig, machine: Machine, tokens: int, images: int) -> dict[str, object]:
    """``{"message": None or a sentence, "impossible": whether parameters and optimizer alone are too large}``."""
    parts = components(config)
    config = for_target(config, machine.target)
    zero, micro = config.training.zero, config.training.micro_batch_size
    asked = make_job(config, parts, machine.target, zero, micro, machine.gpus, tokens, images)
    rehearsal = rehearse([asked])[0]
    if machine.fits(rehearsal.peak):
        return {"message": None, "impossible": False}
    least = machine.base + rehearsal.state[PARAMETERS] + rehearsal.state[OPTIMIZER]
    impossible = least > machine.memory
    need, what = (least, "parameters and optimizer alone") if impossible else (machine.base + rehearsal.peak, "a step")
    others = ("zero3", "zero3_offload") if machine.target == "cuda" else ("zero3",)  # a CPU has nowhere to offload to
    modes = [mode for mode in dict.fromkeys((zero, *others)) if (mode, micro) != (zero, 1)]
    jobs = [make_job(config, parts, machine.target, mode, 1, machine.gpus, tokens, images) for mode in modes]
    fitting = [mode for mode, tried in zip(modes, rehearse(jobs), strict=True) if machine.fits(tried.peak)]
    mend = (
        f"training.zero={fitting[0]} training.micro_batch_size=1 would fit"
        if fitting
        else f"neither a micro-batch of 1 nor {others[-1]} would fit; take more ranks or gradient_checkpointing"
    )
    message = (
        f"memory: {what} with training.zero={zero} training.micro_batch_size={micro} would take {need / GIB:.1f} GiB "
        f"of the {machine.memory / GIB:.1f} GiB that each of {machine.gpus} rank(s) has; {mend}"
    )
    return {"message": message, "impossible": impossible}


if __name__ == "__main__":
    question = json.load(sys.stdin)
    machine = Machine(question["ranks"], question["memory"], question["target"], Rates(), question["base"])
    config = RunConfig.model_validate(question["config"])
    print(json.dumps(verdict(config, machine, question["tokens"], question["images"])))
