"""Many processes by torchrun (gloo on this CPU)."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMANDS, FEW, ROOT, check_error, command_of, contents, heed_ctrl_c, run

import common

SHARED = [name for name in COMMANDS if name != "single"]  # which is of one process


def torchrun(ranks, script, *argv, cwd, restarts=0):
    return subprocess.Popen(
        [sys.executable, "-B", "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", ROOT / script, *argv],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """(exit code, stdout, our own lines of stderr)."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error")]


def kill_rank(process, rank):
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture(scope="module")
def shared(finished, tmp_path_factory):
    """The commands run by two ranks, each in a folder of its name, all with a single torchrun."""
    folder = tmp_path_factory.mktemp("shared")
    commands = {str(folder / name): command_of(name, finished) for name in SHARED}
    (folder / "all.py").write_text(
        f"import importlib, os, sys; sys.path.append({str(ROOT)!r})\n"
        f"for path, (stage, *argv) in {commands!r}.items():\n"
        "    os.makedirs(path, exist_ok=True)\n"
        "    os.chdir(path)\n"
        "    importlib.import_module(stage).main(argv)\n")
    code, out, errors = finish(torchrun(2, folder / "all.py", cwd=folder))
    assert (code, errors) == (0, []) and out.count("writing to runs/") == len(SHARED)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_ranks_leave_what_one_process_leaves(name, finished, shared):
    assert contents(shared / name) == contents(finished / name)


@pytest.mark.parametrize("name", ["mixture", "exhaustive"])
def test_a_killed_rank_restarts_or_ends_the_job_and_one_process_continues(name, finished, tmp_path):
    stage, *argv = command_of(name, finished)
    job = torchrun(2, f"{stage}.py", *argv, cwd=tmp_path, restarts=1)
    for rank in (1, 0):
        assert any("writing to runs/" in line for line in job.stdout)
        assert any("train_loss" in line for line in job.stdout)
        kill_rank(job, rank)
    code, out, errors = finish(job)
    assert code != 0 and errors == [] and "writing to runs/" not in out
    code, out, err = run(tmp_path, stage, *argv)
    assert (code, err) == (0, "")
    assert "\nepoch 1 " not in out and "\n8,1,1 seed 0  epoch 1 " not in out  # both are done
    assert contents(tmp_path) == contents(finished / name)


def test_a_rank_ends_well_that_others_have_yet_to_answer(tmp_path):
    (tmp_path / "ends.py").write_text(
        f"import sys, time, torch; sys.path.append({str(ROOT)!r})\n"
        "import common, search_mixture\n"
        "common.join_ranks()\n"
        "common.barrier()\n"
        "for _ in range(50):\n"
        "    search_mixture.Exchange(torch.zeros(1, 1))  # gloo's threads still hold some\n"
        "time.sleep(3 * (common.rank == 0))\n")
    assert finish(torchrun(2, tmp_path / "ends.py", cwd=tmp_path)) == (0, "", [])


def test_ranks_that_cannot_share_the_supernets_say_so(tmp_path):
    code, _, errors = finish(torchrun(3, "search_mixture.py", *FEW, cwd=tmp_path))
    assert code != 0 and len(set(errors)) == 1, errors
    assert errors[0].startswith("error: 3 ranks cannot share --num-supernets 4 equally")


@pytest.mark.parametrize("stage, message", [("search_mixture", "nothing else of torchrun's"),
                                            ("search_single", "start it without torchrun")])
def test_many_processes_where_there_can_be_none_are_refused(stage, message, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "world", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    check_error(run(tmp_path, stage, *FEW), 2, message)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_says_so_and_can_be_ended(end, tmp_path):
    """RANK and WORLD_SIZE are left over, of a cluster's job, say."""
    left_over = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with subprocess.Popen([sys.executable, "-B", ROOT / "search_mixture.py", *FEW], cwd=tmp_path,
                          env=os.environ | left_over, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heed_ctrl_c) as job:
        assert "rank 0 of 2 waits for the others at 127.0.0.1:0" in job.stderr.readline()
        job.send_signal(end)
        assert job.wait(timeout=20) == -end


def test_tasks_that_slurm_started_alone_are_told_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("SLURM_PROCID", "1")
    check_error(run(tmp_path, "search_single", *FEW), 2, "SLURM started 3 tasks", "torchrun")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a batch script that starts one process
    common.join_ranks()


def test_a_rank_alone_is_no_rank():
    code = "import common; print(common.rank, common.world)"
    for left_over in ({"RANK": ""}, {"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "1"}):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                              env=os.environ | left_over, capture_output=True)
        assert done.stdout == "0 1\n"


def test_ranks_share_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(common, "world", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch, "zeros", lambda size, **_: None)
    for local_rank, device in (("0", "cuda:0"), ("2", "cuda:2"), ("3", "cuda:0"), ("7", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert common.choose_device("cuda") == device
        assert common.choose_device("cuda:2") == "cuda:2"
