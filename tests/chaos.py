"""Run stages that are killed (SIGKILL) at given moments and started again, until they end.

    python chaos.py JSON     # a list of [folder, stage, moments, arguments], run one after another

A moment is "EVENT N", the Nth such event since a start. Events: "step", before a step of training;
"torn FILE", half of the file is written, to its temporary name; "replaced FILE", it is in place.
"""
import importlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402

for slow in ("matplotlib.figure", "scipy.stats", "sklearn.datasets", "torch._dynamo"):
    importlib.import_module(slow)  # once, before the starts


def die_at(moment):
    """Let this process be killed at the moment."""
    counts = Counter()

    def event(name, before_death=lambda: None):
        counts[name] += 1
        if moment == f"{name} {counts[name]}":
            before_death()
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, *args, real=common.Learner.step):
        event("step")
        return real(self, *args)

    def replace(temporary, path, real=os.replace):
        half = os.path.getsize(temporary) // 2
        event(f"torn {path.name}", lambda: os.truncate(temporary, half))
        real(temporary, path)
        event(f"replaced {path.name}")

    common.Learner.step = step
    os.replace = replace


def start(stage, arguments, moment):
    """The exit code of a stage started in a child process; -9: killed."""
    child = os.fork()
    if child == 0:
        die_at(moment)
        importlib.import_module(stage).main(arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for folder, stage, moments, arguments in json.loads(sys.argv[1]):
    os.chdir(folder)
    for moment in moments:
        assert start(stage, arguments, moment) == -signal.SIGKILL, (stage, moment)
    assert start(stage, arguments, None) == 0, stage
