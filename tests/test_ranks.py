"""Many processes by torchrun (gloo on this CPU), mixed precision, steps that never wait."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, arguments, contents, shell
from torch.utils._python_dispatch import TorchDispatchMode

import common
import search_mixture

MIXTURE = ("search_mixture.py", *SMALL, "--epochs", "6", "--num-supernets", "4", "--threads", "1",
           "--rank-every", "4")
EXHAUSTIVE = ("train_exhaustive.py", *SMALL, "--epochs", "4", "--threads", "1", "--configs",
              "4,3,3", "1,1,8", "8,1,1", "--seeds", "2")


def torchrun(ranks, script, *argv, cwd, restarts=0):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         f"--max-restarts={restarts}", str(ROOT / script), *argv], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def finish(process):
    """(exit code, stdout, our own lines of stderr)."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("error")]


def kill_rank(process, rank, cwd, lines):
    """kill -9 a rank as soon as the log has so many lines."""
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    while process.poll() is None:
        logs = list(cwd.glob("runs/*/log.jsonl"))
        if logs and logs[0].read_text().count("\n") >= lines:
            for pid in open(children).read().split():
                if f"\0RANK={rank}\0" in open(f"/proc/{pid}/environ").read():
                    return os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module", params=[MIXTURE, (*MIXTURE, "--no-balance"), EXHAUSTIVE],
                ids=["mixture", "no-balance", "exhaustive"])
def alone(request, tmp_path_factory):
    """(command, what one process with one thread leaves)."""
    folder = tmp_path_factory.mktemp("alone")
    done = shell(*request.param, cwd=folder)
    assert done.returncode == 0, done.stderr
    return request.param, contents(folder)


def test_ranks_do_what_one_process_does(alone, tmp_path):
    command, expected = alone
    code, out, errors = finish(torchrun(2, *command, cwd=tmp_path))
    assert (code, errors) == (0, []) and out.count("next: python") == 1
    assert contents(tmp_path) == expected


def test_a_killed_rank_is_named_and_any_number_of_ranks_continues(alone, tmp_path):
    command, expected = alone
    if "--no-balance" in command:
        pytest.skip("as with balance")
    process = torchrun(2, *command, cwd=tmp_path)
    kill_rank(process, 1, tmp_path, 2)
    code, _, errors = finish(process)
    assert code != 0 and len(errors) == 1, errors
    assert errors[0].startswith("error: rank 1 (process ") and "checkpoint" in errors[0]
    assert "epoch " in errors[0] and "the same command continues" in errors[0]
    if "search_mixture.py" in command:
        done = shell(*command, cwd=tmp_path)
        assert done.returncode == 0 and "epochs 1 to" not in done.stdout, done.stderr
    else:
        code, out, errors = finish(torchrun(3, *command, cwd=tmp_path))
        assert (code, errors) == (0, [])
    assert contents(tmp_path) == expected


def test_torchrun_restarts_what_died(alone, tmp_path):
    command, expected = alone
    if "--no-balance" in command:
        pytest.skip("as with balance")
    # --overwrite is for the first start only, else nothing would ever be finished
    process = torchrun(2, *command, "--overwrite", cwd=tmp_path, restarts=3)
    kill_rank(process, 0, tmp_path, 3)
    code, out, errors = finish(process)
    assert code == 0 and [line[:13] for line in errors] == ["error: rank 0"]
    if command == MIXTURE:
        assert out.count("epochs 1 to 6") == 1 and out.count(" to 6, ") == 2
    assert contents(tmp_path) == expected


def test_a_rank_ends_well_that_others_have_yet_to_answer(tmp_path):
    (tmp_path / "ends.py").write_text(
        f"import sys, time, torch; sys.path.append({str(ROOT)!r}); import common\n"
        "def main():\n"
        "    common.barrier()\n"
        "    unread = common.Gather(torch.zeros(1))  # gloo's thread still holds it at the exit\n"
        "    time.sleep(3 * (common.rank == 0))\n"
        "common.run_script(main)\n")
    assert finish(torchrun(2, tmp_path / "ends.py", cwd=tmp_path)) == (0, "", [])


def test_retrain_with_ranks(tmp_path):
    argv = ("--config", "5,3,2", "--seeds", "1", "--epochs", "2", *SMALL)
    code, out, errors = finish(torchrun(2, "retrain.py", *argv, cwd=tmp_path))
    assert (code, errors) == (0, []) and out.count("against the default") == 1
    result = json.loads((tmp_path / "runs/retrain-digits/result.json").read_text())
    assert set(result["configs"]) == {"5,3,2", "4,3,3"}


@pytest.mark.parametrize("ranks, script, message", [
    (3, "search_mixture.py", "error: 3 ranks cannot share --num-supernets 4 equally"),
    (2, "search_single.py", "error: there is one supernet to train")])
def test_mistakes_are_told_once(ranks, script, message, tmp_path):
    code, _, errors = finish(torchrun(ranks, script, *SMALL, "--epochs", "1", cwd=tmp_path))
    assert code != 0 and len(errors) == 1 and errors[0].startswith(message), errors
    assert not list(tmp_path.iterdir())


def test_items_are_dealt_in_order_to_who_asks(monkeypatch):
    assert list(common.deal([5, 6, 7])) == [5, 6, 7]
    monkeypatch.setattr(common, "store", torch.distributed.HashStore())
    one, two = common.deal([5, 6, 7]), common.deal([5, 6, 7])
    assert [next(one), next(one), next(two)] == [5, 6, 7]
    assert list(one) == list(two) == []


def test_ranks_share_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(common, "world", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for local, device in ((0, 0), (2, 2), (3, 0), (7, 1)):
        monkeypatch.setattr(common, "local_rank", local)
        seen = []
        monkeypatch.setattr(torch, "zeros",
                            lambda *size, device: seen.append(device) or torch.empty(1))
        assert arguments("--device", "cuda").device == f"cuda:{device}" == seen[0]


# -------------------------------------------------------------------------- mixed precision

def learner(images, amp, monkeypatch, supernet=True):
    args = arguments("--amp", amp, "--width", "0.25")
    monkeypatch.setattr(common, "precision", None)
    common.use_device(args)
    return common.Learner(common.make_network(args, images, supernet, 0), args)


@pytest.mark.parametrize("amp, tolerance", [("bf16", 2e-2), ("fp16", 3e-3)])
def test_amp_computes_in_half_and_keeps_the_rest_full(amp, tolerance, small_images, monkeypatch):
    batch = small_images.batch(torch.arange(0, 400, 5))
    plain = learner(small_images, "off", monkeypatch, supernet=False)
    numbers = plain.step(*batch, (4, 3, 3), 0.1)
    half = learner(small_images, amp, monkeypatch, supernet=False)
    seen = []
    half.network.layers[5].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    found = half.step(*batch, (4, 3, 3), 0.1)
    common.evaluate_configs(half.network, [(4, 3, 3)], [batch])
    assert seen == [torch.bfloat16 if amp == "bf16" else torch.float16] * 2
    assert found.dtype == torch.float64
    assert found[0].item() == pytest.approx(numbers[0].item(), rel=tolerance)
    assert all(value.dtype in (torch.float32, torch.int64)
               for value in half.network.state_dict().values())
    one, two = (torch.cat([p.detach().flatten() for p in subject.network.parameters()])
                for subject in (plain, half))
    assert 0 < (one - two).norm() < tolerance * one.norm()


def test_fp16_scaler_skips_infinite_gradients_and_is_kept(small_images, monkeypatch, tmp_path):
    one, two = (learner(small_images, "fp16", monkeypatch) for _ in range(2))
    batch, config = small_images.batch(torch.arange(0, 400, 5)), (4, 3, 3)
    before = [p.clone() for p in one.network.parameters()]
    one.step(*batch, config, 0.0)  # makes the scale
    one.scaler.update(2.0 ** 60)
    one.step(*batch, config, 0.1)
    assert all(map(torch.equal, before, one.network.parameters()))
    assert one.scaler.get_scale() == 2.0 ** 59
    one.scaler.update(2.0 ** 10)
    one.step(*batch, config, 0.1)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert two.scaler.state_dict() == one.scaler.state_dict()
    assert torch.equal(one.step(*batch, config, 0.1), two.step(*batch, config, 0.1))
    assert all(map(torch.equal, one.network.parameters(), two.network.parameters()))


# ------------------------------------------------------------------------- no host waiting

class NoWaiting(TorchDispatchMode):
    """Fails on whatever reads a value of the device or copies between it and the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        assert not any(part in name for part in ("local_scalar", "nonzero", "item", "masked_sel",
                                                 "unique", "equal")), name
        result = function(*args, **(kwargs or {}))
        if "copy" in name and isinstance(result, torch.Tensor):
            sources = {a.device for a in args if isinstance(a, torch.Tensor) and a.dim()}
            assert sources <= {result.device}, name
        return result


@pytest.mark.parametrize("device, amp", [("meta", "off"), ("cpu", "bf16"), ("cpu", "fp16")])
def test_no_step_waits_for_the_device(device, amp, small_images, monkeypatch):
    """On the meta device reading a value or copying to the host is impossible; on the CPU half
    types and the gradient scaler are watched as well. A pass's first batch may copy indices."""
    subject = learner(small_images, amp, monkeypatch)
    if device == "meta":
        monkeypatch.setattr(common, "autocast", lambda device: contextlib.nullcontext())
        subject.network.to("meta")
    images = common.replace(small_images, **{key: getattr(small_images, key).to(device)
                                             for key in ("images", "labels", "mean", "std")})
    training, checking = (images.passes(50, common.stream(i), crops)
                          for i, crops in enumerate((common.stream(2), None)))
    scores = torch.ones(36, 2, dtype=torch.float64, device=device)
    for step in range(6):
        with NoWaiting() if step else contextlib.nullcontext():
            numbers = search_mixture.search_step(subject, training, checking, (5, 3, 2), 0.1)
            search_mixture.update_score(scores, 7, 1, numbers[2], 0.9)
    assert numbers.device.type == device
    with pytest.raises((AssertionError, RuntimeError)), NoWaiting():
        numbers[0].item()
