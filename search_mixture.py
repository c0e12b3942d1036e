"""Stage 2b, the main job: rank every pooling configuration with a balanced mixture of SuperNets.

    python search_mixture.py                                       # embedded digits, minutes
    python search_mixture.py --dataset cifar10 --num-supernets 4   # the paper's protocol
    torchrun --nproc-per-node=4 search_mixture.py --dataset cifar10 --num-supernets 4

M supernets train side by side. An assignment P(m|c), learned from validation accuracies and kept
balanced so that no supernet starves, leads each configuration to a supernet whose weights suit it.
An epoch is one pass of every supernet over the training half: M supernets cost M times one. Under
torchrun each rank owns an equal part of the supernets; within an epoch they exchange only scores.

Writes runs/mixture-<dataset>/: config.json, log.jsonl (a line an epoch), checkpoint.pt,
supernets.pt (the weights), result.json (the ranking, the pick), ranking.png, assignment.png.
The same command, with any number of ranks, continues a stopped run.
Source: arXiv:2306.11982, section 3 (the mixture and its balance).
"""
from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import common
from common import (Batch, Config, Images, Learner, UserError, config_name, in_range, rank,
                    world)

# Rounds between two exchanges of scores. The draws of an interval use the scores that were known
# when the one before it began, so they are up to 16 rounds old (of 196 in an epoch of CIFAR-10),
# and a rank waits for another only where that is a whole interval behind.
INTERVAL = 8


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    common.add_search_flags(parser, draw="uniform")
    add = parser.add_argument_group("mixture").add_argument
    add("--num-supernets", type=in_range(int, 1), default=4, metavar="M",
        help="supernets in the mixture")
    add("--temperature", type=in_range(float, 0, 1e6), nargs=2, metavar=("FIRST", "LAST"),
        help="of the assignment, linear over the epochs")
    add("--decay", type=in_range(float, 0, 1), help="d of the moving average of accuracies")
    add("--tolerance", type=in_range(float, 0), default=1e-4,
        help="balance until KL(P(m) || uniform) is at most this")
    add("--balance", action=argparse.BooleanOptionalAction, default=True,
        help="without it, as an ablation, the plain softmax, drawn in the paper's order")
    return common.parse_arguments(parser, argv, search=True)


def balance(scores: torch.Tensor, temperature: float, tolerance: float, draw: torch.Tensor,
            max_iterations: int = 1000) -> torch.Tensor:
    """P(m|c), float64 (C,M): softmax_m(T W) with the marginal P(m) = sum_c pi(c) P(m|c) made
    uniform. scores: W, float64 (C,M); draw: pi, float64 (C,).

    Iterative proportional fitting (paper, section 3): divide every column by P(m), renormalise
    every row, until KL(P(m) || uniform) <= tolerance. The products are sums of logarithms, so that
    e^-300 stays a number. Fitting is slow where two supernets are nearly tied for all
    configurations. The cap then ends it: rows still sum to 1, and the draws, which normalise by
    column, still give every supernet its step.
    """
    supernets = scores.shape[1]
    draw = draw / draw.max()  # uniform: exactly 1
    log_draw = draw.log()[:, None]
    log_total = math.log(draw.sum())
    log_p = torch.log_softmax(temperature * scores, 1)
    for _ in range(max_iterations):
        log_marginal = torch.logsumexp(log_draw + log_p, 0) - log_total
        divergence = (log_marginal.exp() * (log_marginal + math.log(supernets))).sum()
        if divergence <= tolerance:
            break
        log_p = torch.log_softmax(log_p - log_marginal, 1)
    return log_p.exp()


def draw_rounds(assignment: torch.Tensor, draw: torch.Tensor, rounds: int, balanced: bool,
                generators: list[torch.Generator]) -> list[tuple[int, int]]:
    """M draws (c, m) a round from pi(c) P(m|c). draw: pi, float64 (C,); generators: one a supernet.

    Balanced: every supernet m is drawn once a round, with c ~ P(c|m), proportional to pi(c) P(m|c).
    Since P(m) is uniform, this is the paper's joint distribution, stratified over m. A supernet
    that a loose tolerance leaves without any P(m|c) draws all configurations alike. Not balanced:
    the paper's order, c ~ pi, then m ~ P(m|c).
    """
    supernets = assignment.shape[1]
    if balanced:
        joint = (assignment * (draw / draw.max())[:, None]).clamp(min=1e-300)
        drawn = [torch.multinomial(column, rounds, replacement=True, generator=generator)
                 for column, generator in zip(joint.T, generators)]
        configs = torch.stack(drawn, 1).flatten().tolist()  # round after round
        return [(c, i % supernets) for i, c in enumerate(configs)]
    drawn = torch.multinomial(draw, rounds * supernets, replacement=True, generator=generators[0])
    owners = torch.multinomial(assignment[drawn], 1, generator=generators[0]).flatten()
    return list(zip(drawn.tolist(), owners.tolist()))


def update_score(scores: torch.Tensor, c: int, m: int, value: torch.Tensor, decay: float) -> None:
    """W[c,m] <- d W[c,m] + (1-d) a, in place, on the device."""
    scores[c, m] = decay * scores[c, m] + (1 - decay) * value


def search_step(learner: Learner, training: Iterator[Batch], validation: Iterator[Batch],
                config: Config, lr: float) -> torch.Tensor:
    """A training step and the accuracy a on a validation batch (paper, section 3): float64 (3,),
    loss, training accuracy, a. Nothing in it waits for the device."""
    metrics = learner.step(*next(training), config, lr)
    return torch.cat([metrics, learner.validate(*next(validation), config)[None]])


def evaluate_owned(learners: dict[int, Learner], assignment: torch.Tensor, configs: list[Config],
                   validation: Images,
                   args: argparse.Namespace) -> tuple[torch.Tensor, list[int]]:
    """The validation accuracy of every configuration on its own supernet, argmax_m P(m|c), float64
    (C,), and that supernet. Each rank evaluates the configurations of its supernets."""
    owners = assignment.argmax(1)
    accuracies = torch.zeros(len(configs), dtype=torch.float64)
    for m, learner in learners.items():
        owned = (owners == m).nonzero().flatten().tolist()
        if owned:
            accuracies[owned] = common.evaluate_configs(
                learner.network, [configs[c] for c in owned],
                validation.evaluation_batches(args.batch_size), args.amp, args.metric)
    if world > 1:
        dist.all_reduce(accuracies)
    return accuracies, owners.tolist()


class Exchange:
    """Brings the columns of W that each rank owns to all ranks: float64 (C,M) on the CPU. It starts
    at once and waits neither for the device nor for another rank. `result` waits for both."""

    def __init__(self, own: torch.Tensor):
        self.own = own.to("cpu", non_blocking=True, copy=True)
        self.columns = [torch.empty_like(self.own) for _ in range(world)]
        self.copied = torch.cuda.current_stream(own.device).record_event() if own.is_cuda else None
        self.work = None if own.is_cuda else self.send()

    def send(self):
        return dist.all_gather(self.columns, self.own, async_op=True) if world > 1 else None

    def result(self) -> torch.Tensor:
        if self.copied:
            self.copied.synchronize()
            self.work = self.send()
        if self.work is None:
            return self.own
        self.work.wait()
        return torch.cat(self.columns, 1)


def collect(states: dict[int, dict]) -> dict[int, dict] | None:
    """The states of all ranks' supernets on rank 0; None on the others."""
    if world == 1:
        return states
    buffer = io.BytesIO()
    torch.save(states, buffer)
    gathered = [None] * world if rank == 0 else None
    dist.gather_object(buffer.getvalue(), gathered)
    if rank > 0:
        return None
    collected = {}
    for part in gathered:
        collected |= torch.load(io.BytesIO(part), map_location="cpu", weights_only=True)
    return collected


def plot_assignment(path: Path, log: list[dict], configs: list[Config]) -> None:
    """P(m|c) as heat maps at the epochs that kept it (paper, figure 5)."""
    from matplotlib.figure import Figure
    lines = [line for line in log if "assignment" in line]
    figure = Figure(figsize=(1.2 + 1.3 * len(lines), 7), layout="constrained")
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axes, line in zip(panels, lines):
        image = axes.imshow(line["assignment"], aspect="auto", vmin=0, vmax=1, cmap="magma")
        axes.set(title=f"epoch {line['epoch']}\nT = {line['temperature']:.0f}", xlabel="supernet m",
                 xticks=range(len(line["p_m"])))
        axes.set_yticks(range(len(configs)), map(config_name, configs), fontsize=7)
    figure.colorbar(image, label="P(m|c)")
    common.save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    common.prepare_torch(args)

    data = common.load_dataset(args)
    space = common.search_space(args, data[0])
    configs = space.configs
    count = args.num_supernets
    if count > len(configs):
        raise UserError(f"--num-supernets {count}: at most {len(configs)}, one a configuration")
    if count % world:
        raise UserError(f"{world} ranks cannot share --num-supernets {count} equally: start a "
                        "number of processes that divides it")
    train, validation = common.split_for_search(data[0], args)
    truth = common.read_ground_truth(args.ground_truth, configs)
    folder, record = common.open_run("mixture", args, data)
    if (folder / "result.json").exists():
        return common.report_search(folder, common.load(folder / "result.json"), space, truth)
    common.choose_kernel(args, folder, record, space, data[0])

    own = range(rank * count // world, (rank + 1) * count // world)  # this rank's supernets
    learners = {}
    for m in own:
        seed = common.derive_seed(args.seed, "weights", m)
        learners[m] = Learner(common.make_network(args, train, True, seed), args)
    state = {"scores": torch.ones(len(configs), count, dtype=torch.float64),  # W of all ranks
             "steps": torch.zeros(len(configs), count, dtype=torch.int64),  # of training, likewise
             "log": []}
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = common.load(checkpoint)
        for m in own:
            learners[m].load_state_dict(state["learners"][m])
    merged = state["scores"]
    steps = state["steps"]
    log = state["log"]
    scores = merged[:, own.start:own.stop].to(args.device, copy=True)  # this rank's columns of W

    draw = common.draw_probabilities(space, args.draw)  # pi(c)
    tolerance = args.tolerance if args.balance else math.inf  # inf: the softmax as it is
    rounds = train.num_batches(args.batch_size)
    snapshots = {round(1 + part * (args.epochs - 1) / 5) for part in range(6)}
    print(f"{count} supernets, epochs {len(log) + 1} to {args.epochs} of {rounds} rounds:",
          common.describe(args, train, validation, folder), flush=True)
    bar = common.progress(total=args.epochs * rounds * count, initial=len(log) * rounds * count,
                          unit="step")
    for epoch in range(len(log), args.epochs):
        start = time.perf_counter()
        first, last = args.temperature
        temperature = first + (last - first) * epoch / max(args.epochs - 1, 1)
        lr = common.cosine(*args.lr, epoch, args.epochs)
        # a random stream per purpose, supernet and epoch
        draws, order, crops, checks = (
            [common.generator(args.seed, name, m, epoch) for m in range(count)]
            for name in ("draws", "order", "crops", "checks"))
        train_batches = {m: train.passes(args.batch_size, order[m], crops[m]) for m in own}
        val_batches = {m: validation.passes(args.batch_size, checks[m]) for m in own}
        metrics = {m: [] for m in own}
        for begin in range(0, rounds, INTERVAL):
            assignment = balance(merged, temperature, tolerance, draw)
            exchange = Exchange(scores)
            drawn = draw_rounds(assignment, draw, min(INTERVAL, rounds - begin), args.balance,
                                draws)
            for c, m in drawn:
                steps[c, m] += 1
                bar.update()
                if m in own:
                    step = search_step(learners[m], train_batches[m], val_batches[m], configs[c],
                                       lr)
                    update_score(scores, c, m - own.start, step[2], args.decay)
                    metrics[m].append(step)
            merged = exchange.result()

        totals = torch.zeros(count, 3, dtype=torch.float64)
        for m in own:
            totals[m] = common.read_metrics(metrics[m], learners[m].network, epoch + 1).sum(0)
        if world > 1:
            dist.all_reduce(totals)
        loss, train_accuracy, val_accuracy = (totals.sum(0) / (rounds * count)).tolist()
        merged = Exchange(scores).result()
        assignment = balance(merged, temperature, tolerance, draw)
        seconds = time.perf_counter() - start
        line = {"epoch": epoch + 1, "train_loss": loss, "train_accuracy": train_accuracy,
                "val_accuracy": val_accuracy, "lr": lr, "temperature": temperature,
                "seconds": seconds, "images_per_second": count * len(train) / seconds,
                "p_m": (draw @ assignment).tolist(),  # P(m): uniform, if balanced
                "mean_max_p": assignment.max(1).values.mean().item()}  # 1: each has its supernet
        if epoch + 1 in snapshots:
            line["assignment"] = assignment.tolist()
        if args.rank_every and (epoch + 1) % args.rank_every == 0:
            accuracies, _ = evaluate_owned(learners, assignment, configs, validation, args)
            ranking = dict(zip(configs, accuracies.tolist()))
            line["ranking"] = {config_name(config): value for config, value in ranking.items()}
            if truth:
                line |= common.rank_metrics(ranking, truth)
        log.append(line)
        states = collect({m: learner.state_dict() for m, learner in learners.items()})
        if rank == 0:
            common.save(folder / "log.jsonl", log)  # first: a kill between the two loses no line
            common.save(checkpoint, {"learners": states, "scores": merged, "steps": steps,
                                     "log": log})
        common.show_epoch(bar, log, args.epochs)
    bar.close()

    assignment = balance(merged, log[-1]["temperature"], tolerance, draw)
    accuracies, owners = evaluate_owned(learners, assignment, configs, validation, args)
    states = collect({m: learner.network.state_dict() for m, learner in learners.items()})
    if rank == 0:
        common.save(folder / "supernets.pt", [states[m] for m in range(count)])
        plot_assignment(folder / "assignment.png", log, configs)
        result = common.search_result(record, space, accuracies, owners, steps, validation)
        common.report_search(folder, result, space, truth)


if __name__ == "__main__":
    common.run_script(main)
