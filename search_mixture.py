"""Stage 2b, the main job: rank every pooling configuration with a balanced mixture of SuperNets.

    python search_mixture.py                                       # embedded digits, minutes
    python search_mixture.py --dataset cifar10 --num-supernets 4   # the paper's protocol
    torchrun --nproc-per-node=4 search_mixture.py --dataset cifar10 --num-supernets 4
    python search_mixture.py --compare runs/* --ground-truth results.csv    # several searches

M supernets train side by side. An assignment P(m|c), learned from validation accuracies and kept
balanced so that no supernet starves, leads each configuration to a supernet whose weights suit it.
An epoch is one pass of every supernet over the training half: M supernets cost M times one. Under
torchrun each rank owns an equal part of the supernets and exchanges nothing but scores.

Writes runs/mixture-<dataset>/: config.json, log.jsonl (a line an epoch), checkpoint.pt and the one
before, supernets.pt (the weights), correct.pt (which validation images each configuration gets
right), result.json (the ranking, its uncertainty, the pick), ranking.png, assignment.png.
The same command, with any number of ranks, continues a stopped run.
Source: arXiv:2306.11982, section 3 (the mixture and its balance).
"""
import io
import itertools
import math
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist

from common import (Config, Gather, Gauge, Images, Learner, Parser, Run, UserError, barrier,
                    config_name, cosine, draw_configs, draw_probabilities, evaluate_configs,
                    expected_time, finish_search, load_dataset, make_network, number, progress,
                    rank, rank_metrics, read_ground_truth, read_log, read_search, read_steps,
                    report_search, run_script, save_figure, save_tensors, search_space,
                    split_for_search, spread, stream, stream_seed, world)

# Rounds between two exchanges of scores. The draws of an interval use the scores that were known
# when the one before it began, so they are 8 to 16 rounds old (of 196 in an epoch of CIFAR-10), and
# a rank waits for another only where that is a whole interval behind.
INTERVAL = 8


def arguments():
    parser = Parser(__doc__, search=True)
    search = parser.add_argument_group("mixture")
    search.add_argument("--num-supernets", type=number(int, 1), default=4, metavar="M",
                        help="supernets in the mixture")
    search.add_argument("--temperature", type=number(float, 0, 1e6), nargs=2,
                        metavar=("FIRST", "LAST"), help="of the assignment, linear over the "
                        "epochs; None: by network, 1 100, resnet18 1 150, resnet50 1 300")
    search.add_argument("--decay", type=number(float, 0, 1), help="d of the moving average of "
                        "accuracies; None: 0.9, food101 0.95")
    search.add_argument("--tolerance", type=number(float, 0), default=1e-4,
                        help="balance until KL(P(m) || uniform) is at most this")
    search.add_argument("--no-balance", dest="balance", action="store_false",
                        help="ablation: the plain softmax, drawn in the paper's order")
    search.add_argument("--compare", nargs="+", metavar="RUN", help="train nothing: print a table "
                        "of these finished searches, single ones too, against --ground-truth; of "
                        "those with --rank-every draw Kendall tau over the epochs, compare.png")
    return parser.parse_args()


def compare(args) -> None:
    """--compare: a Markdown table. Runs that differ in nothing but the seed share a row, mean +-
    standard deviation; its columns are the settings that differ, then what came out. The last row
    is what costs nothing: the ranking by multiply-adds, the dearest first."""
    if not args.ground_truth:
        raise UserError("--compare needs --ground-truth, results.csv of train_exhaustive.py")
    results = [read_search(Path(folder)) for folder in args.compare]
    known = [result["settings"] for result in results]
    columns = [key for key in dict.fromkeys(itertools.chain(*known))
               if key not in Run.not_compared | {"seed"}
               and len({str(settings[key]) for settings in known if key in settings}) > 1]
    formats = {"mean_accuracy": ".4f", "kendall_tau": ".3f", "spearman_rho": ".3f",
               "pick_rank": ".1f", "regret": ".4f"}
    rows, curves = {}, {}
    for folder, result in zip(args.compare, results):
        ranking = result["ranking"]
        row = (*(str(result["settings"].get(key, "")) for key in columns),
               f"{sum(sum(entry['steps']) for entry in ranking):,}")
        scores = {entry["config"]: entry["accuracy"] for entry in ranking}
        truth = read_ground_truth(args.ground_truth, list(scores))
        rows.setdefault(row, []).append(rank_metrics(scores, truth) | {
            "mean_accuracy": mean(scores.values()), "pick": result["pick"]})
        for line in read_log(Path(folder)):
            tau = rank_metrics(line["ranking"], truth)["kendall_tau"] if "ranking" in line else None
            if tau is not None:
                curves.setdefault(row, {}).setdefault(line["epoch"], []).append(tau)
    macs = {entry["config"]: entry["macs"] for entry in ranking}
    rows[("no search", *[""] * len(columns))] = [rank_metrics(macs, truth) | {
        "mean_accuracy": None, "pick": max(macs, key=macs.get)}]

    def cell(values: list[float | None], form: str) -> str:
        defined = [value for value in values if value is not None]
        between = f" +- {spread(defined):{form}}" if len(defined) > 1 else ""
        return f"{mean(defined):{form}}{between}" if defined else "-"

    lines = [[*columns, "steps", "runs", *formats, "picks"]]
    lines += [["---"] * len(lines[0])]
    lines += [[*row, str(len(found)), *(cell([run[key] for run in found], form)
                                        for key, form in formats.items()),
               "; ".join(run["pick"] for run in found)] for row, found in rows.items()]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if curves:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for row, points in curves.items():
            axes.errorbar(*zip(*((epoch, mean(taus), spread(taus))
                                 for epoch, taus in sorted(points.items()))),
                          marker="o", capsize=3, label=", ".join(
                              f"{key} {value}" for key, value in zip(columns, row) if value))
        axes.set(xlabel="epoch", ylabel="Kendall tau: mean, standard deviation over runs")
        axes.grid(alpha=0.3)
        axes.legend()
        folder = Path(args.out or "runs/compare")
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(figure, folder / "compare.png")
        print(f"\nKendall tau over the epochs: {folder}/compare.png")


def balance(scores: torch.Tensor, temperature: float, tolerance: float, draw: torch.Tensor,
            max_iterations: int = 1000) -> torch.Tensor:
    """P(m|c), float64 (C,M): softmax_m(T W) with the marginal P(m) = sum_c pi(c) P(m|c) made
    uniform. draw: pi, float64 (C,).

    Iterative proportional fitting: divide every column by P(m), renormalise every row, until
    KL(P(m) || uniform) <= tolerance. In logarithms, so that e^-300 stays a number. Where two
    supernets are nearly tied for all configurations it is slow; the cap then ends it, rows still
    sum to 1, and the draws, which normalise by column, still give every supernet its step.
    """
    supernets = scores.shape[1]
    draw = draw / draw.max()  # uniform: exactly 1
    log_draw, log_total = draw.log()[:, None], math.log(draw.sum())
    log_p = torch.log_softmax(temperature * scores, 1)
    for _ in range(max_iterations):
        log_marginal = torch.logsumexp(log_draw + log_p, 0) - log_total
        divergence = (log_marginal.exp() * (log_marginal + math.log(supernets))).sum()
        if divergence <= tolerance:
            break
        log_p = torch.log_softmax(log_p - log_marginal, 1)
    return log_p.exp()


def assign(scores: torch.Tensor, temperature: float, draw: torch.Tensor, args) -> torch.Tensor:
    """P(m|c), float64 (C,M), balanced or, with --no-balance, the softmax as it is."""
    if args.balance:
        return balance(scores, temperature, args.tolerance, draw)
    return torch.softmax(temperature * scores, 1)


def draw_rounds(assignment: torch.Tensor, draw: torch.Tensor, rounds: int, balanced: bool,
                rngs: list[torch.Generator]) -> list[tuple[int, int]]:
    """M draws (c, m) a round from pi(c) P(m|c); draw: pi, float64 (C,); rngs: a stream per supernet.

    Balanced: every supernet m once a round, on c ~ P(c|m), proportional to pi(c) P(m|c). Since P(m)
    is uniform this is the paper's joint distribution, stratified over m. Otherwise the paper's
    order: c ~ pi, then m ~ P(m|c).
    """
    supernets = assignment.shape[1]
    if balanced:
        joint = assignment * (draw / draw.max())[:, None]
        drawn = [torch.multinomial(column, rounds, replacement=True, generator=rng).tolist()
                 for column, rng in zip(joint.T, rngs)]
        return [(c, m) for draws in zip(*drawn) for m, c in enumerate(draws)]
    drawn = draw_configs(draw, rounds * supernets, rngs[0])
    owners = torch.multinomial(assignment[drawn], 1, generator=rngs[0]).flatten()
    return list(zip(drawn.tolist(), owners.tolist()))


def update_score(scores: torch.Tensor, c: int, m: int, value: torch.Tensor, decay: float) -> None:
    """W[c,m] <- d W[c,m] + (1-d) a, in place, on the device."""
    scores[c, m] = decay * scores[c, m] + (1 - decay) * value


def search_step(learner: Learner, training, checking, config: Config, lr: float) -> torch.Tensor:
    """A training step and the accuracy a on a validation batch (paper, section 3): float64 (3,),
    loss, training accuracy, a. Nothing in it waits for the device."""
    trained = learner.step(*next(training), config, lr)
    return torch.cat([trained, learner.check(*next(checking), config)[None]])


def collect(content) -> list | None:
    """The content (what torch.save takes) of every rank on rank 0, tensors on the CPU."""
    buffer, found = io.BytesIO(), [None] * world
    save_tensors(content, buffer)
    if world > 1:
        barrier()  # here a dead rank is noticed
        dist.gather_object(buffer.getvalue(), found if rank == 0 else None)
    else:
        found = [buffer.getvalue()]
    return None if rank else [torch.load(io.BytesIO(part), map_location="cpu", weights_only=True)
                              for part in found]


def merge(gathered: Gather) -> torch.Tensor:
    """The ranks' columns of W side by side: float64 (C,M) on the CPU."""
    return torch.cat(tuple(gathered.result()), 1)


def evaluate_owned(learners: dict[int, Learner], assignment: torch.Tensor, configs: list[Config],
                   validation: Images, batch_size: int) -> tuple[torch.Tensor, list[int]]:
    """Which validation images every configuration gets right on its own supernet, argmax_m P(m|c):
    bool (C,n); and that supernet."""
    owners = assignment.argmax(1)
    correct = torch.zeros(len(configs), len(validation), dtype=torch.uint8)
    for m, learner in learners.items():
        owned = (owners == m).nonzero().flatten().tolist()
        if owned:
            correct[owned] = evaluate_configs(learner.network, [configs[c] for c in owned],
                                              validation.evaluation_batches(batch_size)).byte()
    return Gather(correct).result().bool().any(0), owners.tolist()


def plot_assignment(run: Run, configs: list[Config]) -> None:
    """P(m|c) as heat maps at the epochs that log.jsonl kept it for (paper, figure 5)."""
    from matplotlib.figure import Figure
    kept = [line for line in read_log(run.folder) if "assignment" in line]
    figure = Figure(figsize=(1.2 + 1.3 * len(kept), 7), layout="constrained")
    for axes, line in zip(figure.subplots(1, len(kept), sharey=True, squeeze=False)[0], kept):
        image = axes.imshow(line["assignment"], aspect="auto", vmin=0, vmax=1, cmap="magma")
        axes.set(title=f"epoch {line['epoch']}\nT = {line['temperature']:.0f}", xlabel="supernet m",
                 xticks=range(len(line["p_m"])))
        axes.set_yticks(range(len(configs)), map(config_name, configs), fontsize=7)
    figure.colorbar(image, label="P(m|c)")
    save_figure(figure, run.folder / "assignment.png")


def main() -> None:
    args = arguments()
    if args.compare:
        return compare(args)
    data = load_dataset(args)
    space = search_space(args, data[0], supernet=True)
    configs, macs, count = space.configs, space.macs, args.num_supernets
    names = [config_name(config) for config in configs]
    if count > len(configs):
        raise UserError(f"--num-supernets {count}: at most {len(configs)}, one a configuration")
    train, validation = split_for_search(data[0], args)
    truth = read_ground_truth(args.ground_truth, names)
    if count % world:
        raise UserError(f"{world} ranks cannot share --num-supernets {count} equally: start a "
                        "number of processes that divides it")
    run = Run("mixture", args, data)
    if report_search(run, args, truth):
        return

    own = range(rank * count // world, (rank + 1) * count // world)  # this rank's supernets
    learners = {m: Learner(make_network(args, train, True, stream_seed(args.seed, "weights", m)),
                           args) for m in own}
    start, state = 0, run.load_checkpoint()
    merged = torch.ones(len(configs), count, dtype=torch.float64)  # W of all ranks
    steps = torch.zeros(len(configs), count, dtype=torch.int64)  # of training, of all ranks
    if state:
        start, merged, steps = state["epoch"], state["scores"], state["steps"]
        for m in own:
            learners[m].load_state_dict(state["learners"][m])
    del state
    scores = merged[:, own.start:own.stop].to(args.device, copy=True)  # this rank's columns of W
    if rank == 0:
        run.trim_log(lambda line: line["epoch"] <= start)

    rounds = train.num_batches(args.batch_size)
    draw = draw_probabilities(configs, args.draw, macs)  # pi(c)
    snapshots = {round(1 + part * (args.epochs - 1) / 5) for part in range(6)}
    all_macs = sum(macs[config] for config in configs)
    mean_macs = sum(p * macs[config] for p, config in zip(draw.tolist(), configs))
    steps_macs = mean_macs * (args.epochs - start) * count * len(train)
    expected = expected_time(
        learners[own.start], train, args.batch_size, space, steps_macs,
        steps_macs + min(all_macs, count * space.tree_macs) * len(validation))
    print(f"mixture of {count} supernets, {args.arch} on {args.dataset}: {len(train)} training and "
          f"{len(validation)} validation images {train.size}x{train.size}, {train.num_classes} "
          f"classes; {space}; {world} x {args.device}, {args.threads} threads\nepochs {start + 1} "
          f"to {args.epochs}, {rounds} rounds of {count} steps each; expected time {expected}; "
          f"writing to {run.folder}", flush=True)

    gauge = Gauge(args.device)
    bar = progress(total=args.epochs * rounds * count, initial=start * rounds * count, unit="step")
    for epoch in range(start, args.epochs):
        gauge.restart()
        first, last = args.temperature
        temperature = first + (last - first) * epoch / max(args.epochs - 1, 1)
        lr = cosine(*args.lr, epoch, args.epochs)
        # a random stream per purpose, supernet and epoch
        draws, order, crops, checks = ([stream(args.seed, name, m, epoch) for m in range(count)]
                                       for name in ("draws", "order", "crops", "checks"))
        training = {m: train.passes(args.batch_size, order[m], crops[m]) for m in own}
        checking = {m: validation.passes(args.batch_size, checks[m]) for m in own}
        record = {m: [] for m in own}
        for begin in range(0, rounds, INTERVAL):
            assignment, known = assign(merged, temperature, draw, args), Gather(scores)
            drawn = draw_rounds(assignment, draw, min(INTERVAL, rounds - begin), args.balance,
                                draws)
            for i, (c, m) in enumerate(drawn):
                steps[c, m] += 1
                gauge.macs += 4 * macs[configs[c]] * len(train) / rounds / world  # mean of ranks
                bar.update()
                if m not in own:
                    continue
                numbers = search_step(learners[m], training[m], checking[m], configs[c], lr)
                update_score(scores, c, m - own.start, numbers[2], args.decay)
                record[m].append((f"epoch {epoch + 1}, round {begin + i // count + 1}, "
                                  f"configuration {names[c]}, supernet {m}", numbers))
            merged = merge(known)
            bar.set_postfix_str(f"epoch {epoch + 1}, utilisation {gauge.utilisation:.2f}", False)

        totals = torch.stack([read_steps(record[m], learners[m].network).sum(0) for m in own])
        totals = Gather(totals).result().flatten(0, 1).sum(0) / (rounds * count)
        merged = merge(Gather(scores))
        assignment = assign(merged, temperature, draw, args)
        line = dict(epoch=epoch + 1, **gauge.epoch(count * len(train)))
        line |= dict(zip(("train_loss", "train_accuracy", "val_accuracy"), totals.tolist()))
        line |= dict(lr=lr, temperature=temperature, p_m=(draw @ assignment).tolist(),
                     mean_max_p=assignment.max(1).values.mean().item())
        if epoch + 1 in snapshots:
            line["assignment"] = assignment.tolist()
        if args.rank_every and (epoch + 1) % args.rank_every == 0:
            correct, _ = evaluate_owned(learners, assignment, configs, validation, args.batch_size)
            line["ranking"] = dict(zip(names, correct.double().mean(1).tolist()))
            if truth:
                line |= rank_metrics(line["ranking"], truth)
        states = collect({m: learner.state_dict() for m, learner in learners.items()})
        if rank == 0:
            states = {m: state for part in states for m, state in part.items()}
            run.log(**line)
            run.save_checkpoint(epoch=epoch + 1, scores=merged, steps=steps, learners=states)
    bar.close()

    assignment = assign(merged, args.temperature[1] if args.epochs > 1 else args.temperature[0],
                        draw, args)
    correct, owners = evaluate_owned(learners, assignment, configs, validation, args.batch_size)
    weights = collect([learner.network.state_dict() for learner in learners.values()])
    if rank == 0:
        run.save("supernets.pt", [state for part in weights for state in part])
        plot_assignment(run, configs)
    finish_search(run, space, correct, owners, steps)
    report_search(run, args, truth)


if __name__ == "__main__":
    run_script(main)
