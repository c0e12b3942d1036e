"""Run a stage that is killed (SIGKILL) at given moments and started again, until it ends by itself.

    python chaos.py STAGE KILLS ARGUMENT...     # in the folder to run in

KILLS: JSON, a list of moments, each a number (of events from the start) or "PHASE FILE", the first
such event. Events: every training step, and around every writing of a file: "torn" (half of it is
written), "written" (not yet in its place), "replaced". Prints, as JSON, what each start did: the
number of events of one that ended, or the event that killed it.
"""
import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.figure  # noqa: E402, F401  what takes time is imported before the starts
import scipy.stats  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import sklearn.model_selection  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401
import torch.utils.flop_counter  # noqa: E402, F401

import common  # noqa: E402

stage, kills, *argv = sys.argv[1:]
main = importlib.import_module(stage).main


def run(moment, results):
    """In a child process: the stage, killed at the moment."""
    count = 0

    def event(name, damage=lambda: None):
        nonlocal count
        count += 1
        if moment in (count, name):
            damage()
            os.write(results, json.dumps(name).encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, *args, real=common.Learner.step):
        event("step")
        return real(self, *args)

    def replace(source, target, real=os.replace):
        name = os.path.basename(target)
        if os.path.basename(source).startswith("tmp-"):  # it might be written only in part
            event(f"torn {name}", lambda: os.truncate(source, os.path.getsize(source) // 2))
        event(f"written {name}")
        real(source, target)
        event(f"replaced {name}")

    def log(self, real=common.Run.log, **line):
        event("torn log", lambda: open(self.folder / "log.jsonl", "a").write('{"epoch": 1, "se'))
        real(self, **line)
        event("written log")

    common.Learner.step, os.replace, common.Run.log = step, replace, log
    sys.argv = [f"{stage}.py", *argv]
    sys.stdout = open(os.devnull, "w")
    common.run_script(main)
    os.write(results, json.dumps(count).encode())


done = []
for moment in [*json.loads(kills), None]:
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with open(reading) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        done.append(json.loads(text) if text else f"exit status {status}")
    else:
        run(moment, writing)
        os._exit(0)
print(json.dumps(done))
