"""Stage 2b, the main job: rank every pooling configuration with a balanced mixture of SuperNets.

    python search_mixture.py                                       # embedded digits, minutes
    python search_mixture.py --dataset cifar10 --num-supernets 4   # the paper's protocol

M supernets train side by side. An assignment P(m|c), learned from validation accuracies and kept
balanced so that no supernet starves, leads each configuration to a supernet whose weights suit it.
An epoch is one pass of every supernet over the training half: M supernets cost M times one.

Writes runs/mixture-<dataset>/: config.json, log.jsonl (a line an epoch), checkpoint.pt,
supernets.pt (the weights), result.json (the ranking and the pick), ranking.png, assignment.png.
The same command continues a stopped run.
Source: arXiv:2306.11982, section 3 (the mixture and its balance).
"""
import math

import torch
from tqdm import tqdm

from common import (Config, Gauge, Images, Parser, ResNet20, Run, UserError, accuracy, config_name,
                    cosine, count_macs, enumerate_configs, evaluate_configs, expected_time,
                    finish_search, load_dataset, make_network, number, rank_metrics,
                    read_ground_truth, report_search, run_script, save_figure, shuffled_batches,
                    split_for_search, stream, train_step)


def arguments():
    parser = Parser(__doc__, search=True)
    search = parser.add_argument_group("mixture")
    search.add_argument("--num-supernets", type=number(int, 1), default=4, metavar="M",
                        help="supernets in the mixture")
    search.add_argument("--temperature", type=number(float, 0), nargs=2, default=[1.0, 100.0],
                        metavar=("FIRST", "LAST"), help="of the assignment, linear over the epochs")
    search.add_argument("--decay", type=number(float, 0, 1), default=0.9,
                        help="d of the moving average of accuracies")
    search.add_argument("--tolerance", type=number(float, 0), default=1e-4,
                        help="balance until KL(P(m) || uniform) is at most this")
    search.add_argument("--no-balance", dest="balance", action="store_false",
                        help="ablation: the plain softmax, drawn in the paper's order")
    return parser.parse_args()


def balance(scores: torch.Tensor, temperature: float, tolerance: float,
            max_iterations: int = 1000) -> torch.Tensor:
    """P(m|c), float64 (C,M): softmax_m(T W) with the marginal P(m) made uniform.

    Iterative proportional fitting: divide every column by P(m), renormalise every row, until
    KL(P(m) || uniform) <= tolerance. In logarithms, so that e^-300 stays a number. Where two
    supernets are nearly tied for all configurations it is slow; the cap then ends it, rows still
    sum to 1, and the draws, which normalise by column, still give every supernet its step.
    """
    configs, supernets = scores.shape
    log_p = torch.log_softmax(temperature * scores, 1)
    for _ in range(max_iterations):
        log_marginal = torch.logsumexp(log_p, 0) - math.log(configs)
        divergence = (log_marginal.exp() * (log_marginal + math.log(supernets))).sum()
        if divergence <= tolerance:
            break
        log_p = torch.log_softmax(log_p - log_marginal, 1)
    return log_p.exp()


def assign(scores: torch.Tensor, temperature: float, args) -> torch.Tensor:
    """P(m|c), float64 (C,M), balanced or, with --no-balance, the softmax as it is."""
    if args.balance:
        return balance(scores, temperature, args.tolerance)
    return torch.softmax(temperature * scores, 1)


def draw_round(assignment: torch.Tensor, balanced: bool,
               rngs: list[torch.Generator]) -> list[tuple[int, int]]:
    """M draws (c, m) from P(c) P(m|c), with uniform P(c); rngs: a stream per supernet.

    Balanced: every supernet m once, on c ~ P(c|m) = P(m|c) / sum_c' P(m|c'). Since P(m) is
    uniform this is the paper's joint distribution, stratified over m. Otherwise the paper's order:
    c uniformly, then m ~ P(m|c).
    """
    configs, supernets = assignment.shape
    if balanced:
        return [(torch.multinomial(assignment[:, m], 1, generator=rngs[m]).item(), m)
                for m in range(supernets)]
    drawn = torch.randint(configs, (supernets,), generator=rngs[0]).tolist()
    return [(c, torch.multinomial(assignment[c], 1, generator=rngs[0]).item()) for c in drawn]


def update_score(scores: torch.Tensor, c: int, m: int, value: float, decay: float) -> None:
    """W[c,m] <- d W[c,m] + (1-d) a, in place."""
    scores[c, m] = decay * scores[c, m] + (1 - decay) * value


def endless_batches(images: Images, batch_size: int, rng: torch.Generator):
    while True:
        yield from shuffled_batches(len(images), batch_size, rng)


def rank(supernets, assignment: torch.Tensor, configs: list[Config], validation: Images,
         batch_size: int) -> tuple[torch.Tensor, list[int]]:
    """Accuracy of every configuration on its own supernet, argmax_m P(m|c), and that supernet."""
    owners = assignment.argmax(1)
    accuracies = torch.zeros(len(configs), dtype=torch.float64)
    for m, supernet in enumerate(supernets):
        owned = (owners == m).nonzero().flatten().tolist()
        if owned:
            accuracies[owned] = evaluate_configs(supernet, [configs[c] for c in owned],
                                                 validation.evaluation_batches(batch_size))
    return accuracies, owners.tolist()


def plot_assignment(run: Run, configs: list[Config]) -> None:
    """P(m|c) as heat maps at the epochs that log.jsonl kept it for (paper, figure 5)."""
    from matplotlib.figure import Figure
    kept = [line for line in run.read_log() if "assignment" in line]
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
    configs = enumerate_configs(ResNet20.num_layers, len(ResNet20.default_config))
    names, count = [config_name(config) for config in configs], args.num_supernets
    if count > len(configs):
        raise UserError(f"--num-supernets {count}: at most {len(configs)}, one a configuration")
    train, _ = load_dataset(args)
    classes, size = train.num_classes, train.images.shape[1]
    train, validation = split_for_search(train, args)
    truth = read_ground_truth(args.ground_truth, configs)
    run = Run("mixture", args)
    if run.load("result.json"):
        return report_search(run, args, truth)

    supernets = [make_network(args, classes, True, m) for m in range(count)]
    optimizers = [torch.optim.SGD(supernet.parameters(), lr=args.lr[0], momentum=args.momentum,
                                  weight_decay=args.weight_decay) for supernet in supernets]
    scores = torch.ones(len(configs), count, dtype=torch.float64)
    start, state = 0, run.load("checkpoint.pt")
    if state:
        start, scores = state["epoch"], state["scores"]
        for m in range(count):
            supernets[m].load_state_dict(state["supernets"][m])
            optimizers[m].load_state_dict(state["optimizers"][m])
    run.trim_log(lambda line: line["epoch"] <= start)

    macs = [count_macs(supernets[0], config, size) for config in configs]
    rounds = math.ceil(len(train) / args.batch_size)
    snapshots = {round(1 + part * (args.epochs - 1) / 5) for part in range(6)}
    mean_macs, passes = sum(macs) / len(macs), (args.epochs - start) * count * len(train)
    expected = expected_time(supernets[0], train, args.batch_size, mean_macs * passes,
                             mean_macs * (passes + len(configs) * len(validation)))
    print(f"mixture of {count} supernets on {args.dataset}: {len(train)} training and "
          f"{len(validation)} validation images {size}x{size}, {classes} classes; {len(configs)} "
          f"configurations; {sum(p.numel() for p in supernets[0].parameters()):,} parameters a "
          f"supernet; {args.device}, {args.threads} threads\nepochs {start + 1} to {args.epochs}, "
          f"{rounds} rounds of {count} steps each; expected time {expected}; "
          f"writing to {run.folder}", flush=True)

    gauge = Gauge(args.device)
    bar = tqdm(total=args.epochs * rounds * count, initial=start * rounds * count, disable=None,
               unit="step")
    for epoch in range(start, args.epochs):
        totals = torch.zeros(3, dtype=torch.float64)
        gauge.restart()
        first, last = args.temperature
        temperature = first + (last - first) * epoch / max(args.epochs - 1, 1)
        lr = cosine(*args.lr, epoch, args.epochs)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        # a random stream per purpose, supernet and epoch
        draws, crops, orders, checks = ([stream(args.seed, name, m, epoch) for m in range(count)]
                                        for name in ("draws", "crops", "orders", "checks"))
        batches = [endless_batches(train, args.batch_size, rng) for rng in orders]
        checks = [endless_batches(validation, args.batch_size, rng) for rng in checks]
        for step in range(rounds):
            assignment = assign(scores, temperature, args)
            for c, m in draw_round(assignment, args.balance, draws):
                images, labels = train.batch(next(batches[m]), crops[m])
                where = (f"epoch {epoch + 1}, round {step + 1}, configuration {names[c]}, "
                         f"supernet {m}")
                loss, hit = train_step(supernets[m], optimizers[m], images, labels, configs[c],
                                       where)
                gauge.macs += 3 * macs[c] * len(labels)
                images, labels = validation.batch(next(checks[m]))
                with torch.inference_mode():
                    checked = accuracy(supernets[m](images, configs[c]), labels)
                gauge.macs += macs[c] * len(labels)
                update_score(scores, c, m, checked, args.decay)
                totals += torch.tensor([loss, hit, checked], dtype=torch.float64)
                bar.set_postfix_str(f"epoch {epoch + 1}, validation accuracy {checked:.3f}, "
                                    f"utilisation {gauge.utilisation:.2f}", False)
                bar.update()

        line = dict(epoch=epoch + 1, **gauge.epoch(count * len(train)))
        loss, hit, checked = (totals / (rounds * count)).tolist()
        assignment = assign(scores, temperature, args)
        line |= dict(train_loss=loss, train_accuracy=hit, val_accuracy=checked, lr=lr,
                     temperature=temperature, p_m=assignment.mean(0).tolist(),
                     mean_max_p=assignment.max(1).values.mean().item())
        if epoch + 1 in snapshots:
            line["assignment"] = assignment.tolist()
        if args.rank_every and (epoch + 1) % args.rank_every == 0:
            found, _ = rank(supernets, assignment, configs, validation, args.batch_size)
            line["ranking"] = dict(zip(names, found.tolist()))
            if truth:
                line |= rank_metrics(line["ranking"], truth)
        run.log(**line)
        run.save("checkpoint.pt", {"epoch": epoch + 1, "scores": scores,
                                   "supernets": [net.state_dict() for net in supernets],
                                   "optimizers": [opt.state_dict() for opt in optimizers]})
    bar.close()

    assignment = assign(scores, args.temperature[1] if args.epochs > 1 else args.temperature[0],
                        args)
    accuracies, owners = rank(supernets, assignment, configs, validation, args.batch_size)
    run.save("supernets.pt", [supernet.state_dict() for supernet in supernets])
    plot_assignment(run, configs)
    finish_search(run, configs, accuracies, owners, macs)
    report_search(run, args, truth)


if __name__ == "__main__":
    run_script(main)
