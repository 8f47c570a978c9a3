"""L-infinity robustness of classifiers: attacks, entropy of the predictions, figures.

    python evaluate.py --model-path runs/cifar10-ew-trades-beta5.5-seed1
    python evaluate.py --model-path a.pt b.pt --dataset cifar10 --attacks pgd20 ls autoattack
    torchrun --nproc-per-node=8 evaluate.py --model-path runs/cifar10-* --figures figures

Prints Markdown tables with one row per model: the accuracy under each attack in % of all examples,
and the entropy of the predictions on the PGD-20 examples. Results of finished batches are kept
beside each model in <model>.eval, so that the same command continues an interrupted evaluation.

    fgsm         one step of epsilon from the image
    pgd10, pgd20, pgd100   steps of epsilon/4, epsilon/10 and epsilon/4 from a random start
    ls           pgd20 with the logits multiplied by 10 in the loss (logit scaling, Eq. 9)
    autoattack   the standard version: apgd-ce, apgd-t, fab-t and square, each on the examples that
                 withstand those before it; each of the four is available on its own as well

The attacks search at torch's default precision, which may be TF32 on a GPU. Accuracies
are computed from float32 predictions on the adversarial examples.
"""
import argparse
import atexit
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import sys
import textwrap
import time
from datetime import timedelta
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pyautoattack
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pyautoattack import checks
from tqdm import tqdm

import data
import models

VERSION = 1  # of the attacks: raise it if their results change, so that old ones are not reused
# Step size divided by epsilon, number of steps, factor of the logits, random start
PGD = {'fgsm': (1, 1, 1.0, False), 'pgd10': (1 / 4, 10, 1.0, True),
       'pgd20': (1 / 10, 20, 1.0, True), 'pgd100': (1 / 4, 100, 1.0, True),
       'ls': (1 / 10, 20, 10.0, True)}
AUTOATTACK = {'apgd-ce': 'apgd', 'apgd-t': 'apgd_targeted', 'fab-t': 'fab', 'square': 'square'}
# The columns of AutoAttack's standard version: each attacks what withstood the column named last
STANDARD = {'aa: apgd-ce': ('apgd-ce', 'clean'), 'aa: + apgd-t': ('apgd-t', 'aa: apgd-ce'),
            'aa: + fab-t': ('fab-t', 'aa: + apgd-t'), 'autoattack': ('square', 'aa: + fab-t')}
MEASURES = 'correct', 'entropy', 'margin', 'p_wrong', 'kappa'
LOW_CLEAN = {'mnist': 0.9, 'digits': 0.9, 'cifar10': 0.6, 'cifar100': 0.3}

# Okabe and Ito's colors, which color-blind readers can distinguish
COLORS = '#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #B8A800'.split()
LINES, MARKERS = ('-', '--', ':', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))), 'os^DvP'
WRITTEN = {'pgd20': 'PGD-20', 'worst': 'worst case', 'autoattack': 'AutoAttack'}
STYLE = {'font.size': 7, 'legend.fontsize': 6, 'axes.titlesize': 6, 'lines.linewidth': 1.1,
         'lines.markersize': 4.5, 'axes.grid': True, 'axes.axisbelow': True, 'grid.linewidth': 0.3,
         'legend.frameon': False, 'pdf.fonttype': 42, 'text.parse_math': False}


# ---------------------------------------------------------------- attacks
def check_input(x, *lengths):
    """Raise ValueError unless the images and the lengths lie in [0, 1]."""
    if not all(0 <= v <= 1 for v in (x.min(), x.max(), *lengths)):  # NaN is refused as well
        raise ValueError('images, epsilon and step_size must lie in [0, 1]: normalize the images '
                         'inside the network, and write 8/255, not 8')


def pgd_attack(model, x, y, epsilon, step_size, num_steps, logit_scale=1.0, random_start=True,
               kappa=None):
    """Projected gradient descent on CE(logit_scale * f(x + delta), y), Eq. 4 and 9.

    x: images (B, C, H, W) in [0, 1]; y: labels (B,). Returns x_adv, within epsilon of x and in
    [0, 1]. logit_scale=10 is the logit scaling attack (LS); num_steps=1, step_size=epsilon and
    random_start=False is FGSM. kappa: a tensor (B,) that counts the iterates that are
    still classified correctly (including the start but not x_adv). The model keeps its mode.
    Raises ValueError if the images, epsilon or step_size are outside [0, 1].
    """
    check_input(x, epsilon, step_size)
    x_adv, low, high = x, (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    if random_start:
        x_adv = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(x_adv).float()
            loss = F.cross_entropy(logit_scale * logits, y, reduction='sum')
        grad, = torch.autograd.grad(loss, x_adv)
        x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
        if kappa is not None:
            kappa += logits.argmax(1) == y
    return x_adv.detach()


@torch.no_grad()
def run_attack(attack, model, x, y, epsilon, seed=1, first=0, kappa=None):
    """x_adv for images x (B, C, H, W) in [0, 1] and labels y (B,).

    attack: clean, or a name in PGD or AUTOATTACK. first: the position of the first example, which
    together with seed decides the random start; torch is reseeded. kappa: see pgd_attack. Raises
    RuntimeError if x_adv is not within epsilon of x and in [0, 1].
    """
    check_input(x, epsilon)
    x_adv = x
    if attack in AUTOATTACK:  # the package's own loop over its attacks cannot continue after a kill
        adversary = pyautoattack.AutoAttack(model, eps=epsilon, seed=seed, device=x.device)
        part, num_classes = getattr(adversary, AUTOATTACK[attack]), model(x[:1]).shape[1]
        part.targeted, part.n_target_classes = attack == 'fab-t', min(9, num_classes - 1)
        x_adv = part.perturb(x.contiguous(), y)
    elif attack != 'clean':
        data.seed(seed, first, 0)
        share, *options = PGD[attack]
        x_adv = pgd_attack(model, x, y, epsilon, share * epsilon, *options, kappa)
    outside = (x_adv - x).abs().max() - epsilon, -x_adv.min(), x_adv.max() - 1
    if not all(distance <= 1e-6 for distance in outside):  # rounding; NaN is outside as well
        raise RuntimeError(f'{attack} left the ball of radius {epsilon:g} or [0, 1]')
    return x_adv


# ---------------------------------------------------------------- metrics
@torch.no_grad()
def predict(model, x):
    """Logits in float32, without TF32 and autocast: the prediction that counts."""
    b, name, value = torch.backends, 'fp32_precision', 'ieee'
    if hasattr(b.cuda.matmul, name):
        units = b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv
    else:  # before torch 2.9
        units, name, value = (b.cuda.matmul, b.cudnn), 'allow_tf32', False
    before = [getattr(unit, name) for unit in units]
    try:
        for unit in units:
            setattr(unit, name, value)
        with torch.autocast(x.device.type, enabled=False):
            return model(x).float()  # which may enter autocast itself
    finally:
        for unit, precision in zip(units, before):
            setattr(unit, name, precision)


def entropy(logits):
    """Entropy of softmax(logits), (B, K) -> (B,), in nats, from 0 to log K: Eq. 1 with tau = 1."""
    log_p = F.log_softmax(logits, dim=1).clamp(min=-1e4)  # where p is 0: 0 log 0 = 0
    return -(log_p.exp() * log_p).sum(1)


def margin(logits, y):
    """Probability of the label minus the largest other probability, (B,), in [-1, 1]."""
    p = F.softmax(logits, dim=1)
    p_y = p.gather(1, y[:, None])[:, 0]
    return p_y - p.scatter(1, y[:, None], -1).amax(1)


def to_input(model, images):
    """uint8 images as float32 in [0, 1], on the model's device and in its memory format."""
    memory_format = getattr(model, 'memory_format', torch.contiguous_format)  # for x.view
    return data.to_float(images.to(next(model.parameters(), images).device), memory_format)


@contextlib.contextmanager
def frozen(model, device):
    """Within it, the model is in eval mode with frozen weights; the random state is restored."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        with torch.random.fork_rng([device] if device.type == 'cuda' else []):
            yield model.eval().requires_grad_(False)
    finally:
        for module, training in modes:
            module.training = training
        for p in trainable:
            p.requires_grad_()


def gather(value):
    """The values of all processes."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def evaluate_attack(model, images, labels, attack, epsilon, examples=None, batch_size=250, seed=1,
                    file=None, desc=None):
    """Attack images and measure the predictions on the results: {name: NumPy array (N,)}.

    correct (bool); entropy, margin: see above; p_wrong: 1 - p_y; kappa: see pgd_attack. images:
    uint8 (N, C, H, W); labels: (N,); examples: (N,) bool, the ones to attack (default: all); the
    others count as wrong, and their other measures are NaN. file: where the results of finished
    batches are kept; batches found in it are not attacked again. The processes of
    torch.distributed share the batches. The model is evaluated in eval mode; its modes and torch's
    random state are left as they were.
    """
    measures = np.full((len(MEASURES), len(labels)), np.nan, np.float32)
    if file and os.path.exists(file):
        measures = np.load(file)
    measures = gather(measures)[0]  # of the first process: another may look for another file
    index = np.arange(len(labels)) if examples is None else np.flatnonzero(examples)
    batches = [(i, index[i:i + batch_size]) for i in range(0, len(index), batch_size)]
    todo = [(first, batch) for first, batch in batches if np.isnan(measures[0, batch]).any()]
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = next(model.parameters(), images).device
    with frozen(model, device), tqdm(total=len(todo), desc=desc, unit='batch', leave=False,
                                     disable=rank > 0 or None) as bar:
        for i in range(0, len(todo), world_size):
            mine = None  # in the last round, some processes have no batch
            if i + rank < len(todo):
                first, batch = todo[i + rank]
                x, y = to_input(model, images[batch]), labels[batch].to(device)
                kappa = torch.full(y.shape, 0.0 if attack in PGD else math.nan, device=device)
                x_adv = run_attack(attack, model, x, y, epsilon, seed, first, kappa)
                logits = predict(model, x_adv)
                p_wrong = -torch.expm1(-F.cross_entropy(logits, y, reduction='none'))
                mine = batch, torch.stack([(logits.argmax(1) == y).float(), entropy(logits),
                                           margin(logits, y), p_wrong, kappa]).cpu().numpy()
            for batch, values in filter(None, gather(mine)):
                measures[:, batch] = values
                bar.update()
            if file and rank == 0:
                try:
                    os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
                    with models.atomic_write(file, 'wb') as f:
                        np.save(f, measures)
                except OSError as error:
                    print(f'Warning: cannot write {file}: {error.strerror}', file=sys.stderr)
                    file = None  # one warning is enough
    return dict(zip(MEASURES, [measures[0] == 1, *measures[1:]]))


def evaluate_model(model, images, labels, attacks=('pgd20', 'ls'), epsilon=8 / 255, aa_epsilon=None,
                   batch_size=250, seed=1, name=None, folder=None, identity=None):
    """{column of the table: result of evaluate_attack}, beginning with 'clean'.

    attacks: 'autoattack' and the names in PGD and AUTOATTACK; aa_epsilon: for AutoAttack (default:
    epsilon); name: for the progress on stderr; folder: where results are kept, to be reused by a
    call with the same settings and identity, which stands for the model and the images.
    """
    columns, outcomes = {'clean': ('clean', None)}, {}
    for attack in attacks:
        before = 'clean' if attack in AUTOATTACK else None
        columns |= STANDARD if attack == 'autoattack' else {attack: (attack, before)}
    for title, (attack, before) in columns.items():
        radius, examples, file = epsilon, np.ones(len(labels), bool), None
        if before:
            radius, examples = aa_epsilon or epsilon, outcomes[before]['correct']
        if folder:
            chosen = hashlib.sha256(examples).hexdigest()
            settings = json.dumps([PGD.get(attack), radius, batch_size, seed, chosen, identity])
            key = hashlib.sha256(settings.encode()).hexdigest()[:16]
            file = f'{folder}/{attack}-{key}.npy'
        outcomes[title] = evaluate_attack(model, images, labels, attack, radius, examples,
                                          batch_size, seed, file, name and f'{name} {title}')
        if name:
            print(f'{name}: {title} {outcomes[title]["correct"].mean():.2%}', file=sys.stderr)
    return outcomes


def entropy_report(entropies, correct, threshold):
    """The entropy table's numbers, from the entropies and correct (N,) under PGD-20.

    sd_of_w: standard deviation of w with tau = 1 (Eq. 2). The accuracy over no examples is NaN.
    """
    high, mean = entropies > threshold, entropies.mean(dtype=np.float64)
    return {'entropy': float(mean), 'sd_of_w': float(entropies.std(dtype=np.float64) / mean),
            'high_entropy': float(high.mean()),
            'accuracy_high_entropy': float(correct[high].mean()) if high.any() else math.nan,
            'accuracy_low_entropy': math.nan if high.all() else float(correct[~high].mean())}


# ---------------------------------------------------------------- a row of the table
def inspect_model(model, x, y, num_classes):
    """(clean accuracy, warnings of AutoAttack's own checks, fingerprint) of a network on a batch.

    The fingerprint, rounded logits and gradients of 16 images, changes with the network's code.
    """
    texts = []
    logger = SimpleNamespace(warning=lambda text: texts.append(text.split(' See flags')[0]))
    with frozen(model, x.device):
        logits = model(x.requires_grad_())
        for out, n in ((logits, len(x)), (model(x[:1]), 1)):
            if out.shape != (n, num_classes) or not out.isfinite().all():
                raise ValueError(f'its output must be {n, num_classes} and finite, not '
                                 f'{tuple(out.shape)}')
        grad, = torch.autograd.grad(F.cross_entropy(logits, y, reduction='sum'), x)
        checks.check_zero_gradients(grad.nan_to_num().flatten(1), logger=logger)
        checks.check_randomized(model, x, y, logger=logger)
        checks.check_range_output(model, x, logger=logger)  # the fourth check disables debuggers
    numbers = torch.cat([logits[:16].flatten(), grad[:16].abs().sum((1, 2, 3))]).tolist()
    fingerprint = ' '.join(f'{number:.3g}' for number in numbers)
    return (logits.argmax(1) == y).float().mean().item(), texts, fingerprint


def evaluate_row(args, row, images, labels, rank):
    """Complete a model's row: the outcomes of evaluate_model and the numbers that follow."""
    for text in [] if rank else row['warnings']:
        print(f'Warning: {row["model"]}: {text}', file=sys.stderr)
    logging.getLogger('auto-attack').setLevel('ERROR')  # inspect_model reports zero gradients once
    row['outcomes'] = evaluate_model(
        row['network'], images, labels, args.attacks, args.epsilon, args.aa_epsilon,
        args.batch_size, args.seed, None if rank else row['model'], f'{row["path"]}.eval',
        row['identity'])
    correct = {title: outcome['correct'] for title, outcome in row['outcomes'].items()}
    complete = [v for title, v in correct.items() if not title.startswith('aa: ')]
    if len(complete) > 2:  # clean and at least two attacks
        correct['worst'] = np.all(complete, axis=0)
        if 'pgd20' in correct:
            correct['pgd20 - worst'] = correct['pgd20'] & ~correct['worst']
    row['accuracy'] = {title: float(v.mean()) for title, v in correct.items()}
    row['stderr'] = {k: math.sqrt(v * (1 - v) / row['n']) for k, v in row['accuracy'].items()}
    row['report'] = entropy_report(row['outcomes']['pgd20']['entropy'], correct['pgd20'],
                                   args.entropy_threshold) if 'pgd20' in correct else {}


# ---------------------------------------------------------------- tables and files
def group_seeds(rows):
    """Group the models whose names differ only in seedN: each group's label, rows and style.

    The variants of a method share its color; lines and markers follow the order of the models.
    """
    names, found, methods = {}, [], ['at', 'trades', 'mart', 'gairat']  # in the order of COLORS
    for row in rows:
        names.setdefault(re.sub(r'[-_ ]?seed[-_ ]?\d+', '*', row['model']), []).append(row)
    for name, group in names.items():
        label = f'{name.replace("*", "") or "all"} ({len(group)} seeds)'
        label = label if group[1:] else group[0]['model']
        method = group[0]['about'].get('algorithm', label)
        methods += [method] if method not in methods else []
        color = COLORS[methods.index(method) % len(COLORS)]
        variant = [other.color for other in found].count(color)
        found.append(SimpleNamespace(label=label, rows=group, method=method, color=color,
                                     title=textwrap.fill(label, 40), line=LINES[variant % 6],
                                     marker=MARKERS[variant % 6]))
    return found


def seed_means(groups):
    """Mean and sample standard deviation of each group of several seeds, as in --json."""
    found = []
    for group in [group for group in groups if len(group.rows) > 1]:
        found.append(dict(name=group.label, models=[row['model'] for row in group.rows]))
        for part in ('accuracy', 'report'):
            values = {k: [row[part][k] for row in group.rows] for k in group.rows[0][part]}
            found[-1][part] = {'mean': {k: np.mean(v).item() for k, v in values.items()},
                               'sd': {k: np.std(v, ddof=1).item() for k, v in values.items()}}
    return found


def print_tables(args, rows, groups):
    """Print the tables as Markdown; models that differ only in their seed have a row of means."""
    radii = data.pixels_text(args.epsilon)
    if args.aa_epsilon != args.epsilon:
        radii += f', for AutoAttack {data.pixels_text(args.aa_epsilon)}'
    captions = {
        'accuracy': f'Accuracy in % on {args.dataset}, {args.split} split, n = {rows[0]["n"]:,}; '
        f'epsilon {radii}; seed {args.seed}, batch size {args.batch_size}.',
        'report': 'Predictions on the PGD-20 examples: mean entropy in nats, standard deviation of '
        f'w with tau = 1, entropies above {args.entropy_threshold:g} and accuracies in %.'}
    for part in [part for part in captions if rows[0][part]]:
        columns = [k.replace('_', ' ') for k in rows[0][part]]
        print(f'{captions[part]}\n\n| model | {" | ".join(columns)} |')
        print('| :-- |' + ' --: |' * len(columns))
        lines = [(row['model'], row[part], {}) for row in rows]
        lines += [(f'{s["name"]}: mean ± sd', *s[part].values()) for s in seed_means(groups)]
        for name, means, sds in lines:
            name = name.replace('|', '/')
            for k, v in means.items():
                factor, digits = (1, 3) if k in ('entropy', 'sd_of_w') else (100, 2)
                name += ' | -' if math.isnan(v) else f' | {factor * v:.{digits}f}'
                name += f' ± {factor * sds[k]:.{digits}f}' if sds and not math.isnan(v) else ''
            print(f'| {name} |')
        print(flush=True)


def write_json(args, rows, groups):
    keys = 'model', 'path', 'n', 'weights', 'accuracy', 'stderr', 'report', 'warnings'
    content = dict(versions=args.versions, args=vars(args), seeds=seed_means(groups),
                   models=[{k: row[k] for k in keys} for row in rows])
    with models.atomic_write(args.json) as f:  # JSON has no NaN: null
        json.dump(json.loads(json.dumps(content), parse_constant=lambda _: None), f, indent=1)


def write_outcomes(args, rows, labels):
    arrays = {name: np.array([[outcome[name] for outcome in row['outcomes'].values()]
                              for row in rows], bool if name == 'correct' else np.float16)
              for name in MEASURES}
    with models.atomic_write(args.save_outcomes, 'wb') as f:
        np.savez_compressed(f, models=args.names, columns=list(rows[0]['outcomes']),
                            labels=labels.cpu(), **arrays)


# ---------------------------------------------------------------- figures
@contextlib.contextmanager
def figure(args, name, panels=1, height=2.5, **options):
    """The axes of a figure, one for each panel; saved as PNG and PDF at the end."""
    rows, columns = math.ceil(panels / 2), min(panels, 2)
    with matplotlib.rc_context(STYLE):
        fig = matplotlib.figure.Figure((3.5 * columns, height * rows), layout='constrained')
        axes = fig.subplots(rows, columns, squeeze=False, **options).flat
        yield axes[:panels]
        if not axes[0].get_legend():
            fig.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=2)
        for ax in axes[panels:]:
            ax.set_axis_off()
        for kind in ('png', 'pdf'):
            fig.savefig(f'{args.figures}/{name}.{kind}', dpi=200, bbox_inches='tight')


def plot_entropy_histogram(args, groups):
    """Figures 2 and 4b: entropies of the PGD-20 examples; a panel for each method."""
    edges = np.linspace(0, math.log(args.num_classes), 31)
    methods = list(dict.fromkeys(group.method for group in groups))
    with figure(args, 'entropy_histogram', len(methods), sharey=True) as axes:
        for group in groups:
            ax = axes[methods.index(group.method)]
            h = np.clip([row['outcomes']['pgd20']['entropy'] for row in group.rows], 0, edges[-1])
            ax.stairs(100 * np.histogram(h, edges)[0] / h.size, edges, label=group.title,
                      color=group.color, linestyle=group.line)
            ax.axvline(args.entropy_threshold, color='0.5', linewidth=0.6)
            ax.set(xlabel='entropy on PGD-20 examples (nats)', ylabel='share of examples (%)')
            ax.legend()


def plot_entropy_vs_robustness(args, groups):
    """Figure 4a: the share of high-entropy examples and the accuracy in the worst case."""
    attack = 'worst' if 'worst' in groups[0].rows[0]['accuracy'] else 'pgd20'
    with figure(args, 'entropy_vs_robustness') as (ax,):
        for group in groups:
            points = 100 * np.array([(row['report']['high_entropy'], row['accuracy'][attack])
                                     for row in group.rows])
            xerr, yerr = points.std(0, ddof=1) if len(points) > 1 else (None, None)
            ax.errorbar(*points.mean(0), yerr, xerr, group.marker, color=group.color,
                        fillstyle='full' if group.marker == 'o' else 'none', elinewidth=0.6,
                        label=group.title)
        ax.set(xlabel=f'PGD-20 examples with entropy above {args.entropy_threshold:g} nats (%)',
               ylabel=f'accuracy (%), {WRITTEN[attack]}')


def plot_pgd_vs_worst(args, groups):
    """By how many points PGD-20 overestimates robustness; small marks: seeds, large: their mean."""
    marks = {'pgd20': 'o', 'worst': 'D', 'autoattack': 'x'}
    marks = {k: mark for k, mark in marks.items() if k in groups[0].rows[0]['accuracy']}
    with figure(args, 'pgd_vs_worst', height=1 + 0.36 * len(groups)) as (ax,):
        for i, group in enumerate(groups):
            values = {k: [100 * row['accuracy'][k] for row in group.rows] for k in marks}
            for attack, seeds in values.items():
                style = dict(color=group.color, fillstyle='none' if attack == 'pgd20' else 'full')
                if seeds[1:]:
                    ax.plot(seeds, [i] * len(seeds), marks[attack], markersize=2, **style)
                ax.plot(np.mean(seeds), i, marks[attack], **style)
            ends = np.mean(values['worst']), np.mean(values['pgd20'])
            ax.plot(ends, [i, i], color=group.color, linestyle=group.line)
            ax.annotate(f'{ends[1] - ends[0]:.1f}', (ends[0], i), (4, 3), fontsize=6,
                        textcoords='offset points')
        for attack, mark in marks.items():
            ax.plot([], [], mark, color='0.2', label=WRITTEN[attack],
                    fillstyle='none' if attack == 'pgd20' else 'full')
        ax.set_yticks(range(len(groups)), [group.title for group in groups])
        ax.set(xlabel='robust accuracy (%)', ylim=(len(groups) - 0.5, -0.7))


def plot_tsne(args, groups, images, labels):
    """Figure 3: t-SNE of the last layer's input on PGD-20 examples of two classes; first seeds."""
    from sklearn.manifold import TSNE  # slow to import
    index = torch.cat([(labels == k).nonzero()[:500, 0] for k in (0, 1)])  # t-SNE is slow
    y = labels[index].cpu().numpy()
    with figure(args, 'tsne', len(groups)) as axes:
        for ax, group in zip(axes, groups):
            model, inputs = group.rows[0]['network'], []
            linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
            if not linear:
                raise ValueError('the t-SNE figure needs a network with a linear layer')
            for batch in index.split(args.batch_size):
                x_adv = run_attack('pgd20', model, to_input(model, images[batch]), labels[batch],
                                   args.epsilon, args.seed)
                with linear[-1].register_forward_pre_hook(
                        lambda _, given: inputs.append(given[0].flatten(1).cpu().numpy())):
                    predict(model, x_adv)
            tsne = TSNE(perplexity=min(30, (len(y) - 1) / 3), init='pca', random_state=args.seed)
            points = tsne.fit_transform(np.concatenate(inputs))
            for k, marker, color in zip((0, 1), 'o^', COLORS):
                ax.scatter(*points[y == k].T, s=5, c=color, marker=marker, label=f'class {k}')
            ax.set(title=group.title, xticks=[], yticks=[])


# ---------------------------------------------------------------- the command
def parse_args(argv=None):
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False,
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--model-path', nargs='+', required=True, metavar='PATH',
        help='checkpoints, or run directories, whose best.pt is used')
    add('--names', nargs='+', help='model names (default: from the paths); the results of '
        'models that differ only in seedN are also averaged')
    add('--arch', help='see models.py; your own FILE.py:NAME (default: read off the weights)')
    add('--normalize', type=models.mean_and_std, metavar='N', help='how training images '
        'were normalized outside the network: none, cifar10, cifar100 or MEAN/STD, e.g. 0.5/0.2')
    add('--dataset', help=f"{', '.join(data.PROTOCOLS)} or FILE.npz (default: the checkpoint's)")
    add('--data-dir', default='./data', help='folder of the data sets (default: %(default)s)')
    add('--split', choices=['test', 'train'], default='test', help='images (default: test)')
    add('--n-examples', type=int, metavar='N', help='only the first N images (default: all)')
    add('--attacks', nargs='+', choices=['clean', *PGD, 'autoattack', *AUTOATTACK], metavar='A',
        default=list(PGD), help=f'from the list above (default: {" ".join(PGD)})')
    add('--epsilon', type=data.pixels, help='L-infinity radius (default: ' + ', '.join(
        f"{name} {data.pixels_text(p['epsilon'])}" for name, p in data.PROTOCOLS.items()) + ')')
    add('--aa-epsilon', type=data.pixels, help='radius of AutoAttack (default: --epsilon)')
    add('--batch-size', type=int, default=250, help='images per batch (default: 250)')
    add('--seed', type=int, default=1, help='seed of the attacks (default: 1)')
    add('--no-cuda', action='store_true', help='evaluate on the CPU')
    add('--entropy-threshold', type=float, default=1.5, metavar='T',
        help='entropies above it count as high, in nats (default: 1.5)')
    add('--figures', metavar='DIR', help='write figures to DIR, as PNG and PDF')
    add('--json', metavar='FILE', help='write numbers, standard errors, settings, versions to FILE')
    add('--save-outcomes', metavar='FILE.npz', help='write the outcome of each example: '
        'models (M,), columns (C,), labels (N,), and (M, C, N): correct, and as float16 entropy, '
        'margin, p_wrong = 1 - p_y and kappa, the number of PGD iterates that are still classified '
        'correctly; NaN where an example was not attacked; where AutoAttack fails, its x_adv is x')
    args = parser.parse_args(argv)
    args.model_path = list(dict.fromkeys(
        os.path.join(p, 'best.pt') if os.path.isdir(p) else p
        for p in args.model_path if not p.rstrip('/').endswith('.eval')))  # results of a model
    if not args.names:  # run for run/best.pt, run/file for others
        args.names = ['/'.join(os.path.abspath(p).removesuffix('.pt').split(os.sep)[-2:])
                      .removesuffix('/best') for p in args.model_path]
    if not 0 < len(set(args.names)) == len(args.names) == len(args.model_path):
        parser.error(f'give {len(args.model_path)} different --names, one for each model')
    if args.batch_size < 1 or args.seed < 0:
        parser.error('--batch-size must be at least 1 and --seed at least 0')
    args.attacks += ['pgd20'] if args.figures and 'pgd20' not in args.attacks else []
    return parser, args


def prepare(args, device):
    """The models' rows, without the numbers that attacks give; images; labels. Completes args.

    Raises ValueError or OSError with one line for whatever the user may have to correct.
    """
    about = [{k: content.get(k) for k in ('algorithm', 'dataset') if 'algorithm' in content}
             for content in map(models.load, args.model_path)]  # empty for files of other projects
    found = {args.dataset or saved.get('dataset') for saved in about}
    args.dataset = found.pop()
    if found or not args.dataset:
        raise ValueError(f'give one --dataset for all: {", ".join(data.PROTOCOLS)} or FILE.npz')
    args.epsilon = args.epsilon or data.protocol(args.dataset)['epsilon']
    args.aa_epsilon = args.aa_epsilon or args.epsilon
    args.num_classes = num_classes = 1 + data.load_data(args.dataset, args.data_dir)[1].max().item()
    if {'autoattack', 'apgd-t'} & {*args.attacks} and num_classes < 4:
        raise ValueError('apgd-t, which is a part of autoattack, needs at least 4 classes')
    for path in filter(None, (args.json, args.save_outcomes, args.figures and f'{args.figures}/')):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    images, labels = data.load_data(args.dataset, args.data_dir, args.split == 'train',
                                    args.n_examples)
    if labels.max() >= num_classes:
        raise ValueError(f'{args.dataset}: a test label is above {num_classes - 1}, the highest '
                         'training label')
    checksum, images, labels = data.checksum(images, labels), images.to(device), labels.to(device)
    rows = []
    for name, path, saved in zip(args.names, args.model_path, about):
        model = models.load_model(path, args.arch, num_classes, args.normalize)
        weights = data.checksum(*model.state_dict().values())
        model.to(device, memory_format=getattr(model, 'memory_format', torch.contiguous_format))
        x, y = to_input(model, images[:args.batch_size]), labels[:args.batch_size]
        try:
            clean, texts, fingerprint = inspect_model(model, x, y, num_classes)
        except Exception as error:  # a user's own network may raise anything
            raise ValueError(f'{path}: the network does not take images {tuple(images.shape[1:])} '
                             f'of {args.dataset}: {error}') from None
        if clean < LOW_CLEAN.get(args.dataset, 0.3) and not saved:
            texts.append(f'gets only {clean:.1%} of the first {len(y)} images right: perhaps it '
                         'needs --normalize, --arch preactresnet18-raw or another --dataset')
        rows.append(dict(model=name, path=path, about=saved, network=model, n=len(labels),
                         weights=weights, warnings=texts,
                         identity=[args.versions, weights, fingerprint, checksum]))
    return rows, images, labels


def main(argv=None):
    parser, args = parse_args(argv)
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    cuda = torch.cuda.is_available() and not args.no_cuda
    device = torch.device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if cuda else 'cpu')
    try:
        if cuda:
            torch.cuda.set_device(device)
        args.versions = dict(torch=str(torch.__version__), pyautoattack=pyautoattack.__version__,
                             device=torch.cuda.get_device_name(device) if cuda else 'CPU',
                             attacks=VERSION)
        if world_size > 1:  # one batch may take long on a CPU
            dist.init_process_group('gloo', timeout=timedelta(days=30))
            atexit.register(dist.destroy_process_group)
            atexit.register(time.sleep, 1)  # runs first: torch 2.4 hangs if gloo is still busy
        if rank > 0:
            dist.barrier()  # the first process downloads what is missing
        rows, images, labels = prepare(args, device)
        if rank == 0 and world_size > 1:
            dist.barrier()
        for row in rows:
            evaluate_row(args, row, images, labels, rank)
        if rank > 0:
            return
        groups = group_seeds(rows)
        print_tables(args, rows, groups)
        if args.json:
            write_json(args, rows, groups)
        if args.save_outcomes:
            write_outcomes(args, rows, labels)
        if args.figures:
            plot_entropy_histogram(args, groups)
            plot_entropy_vs_robustness(args, groups)
            if 'worst' in rows[0]['accuracy']:
                plot_pgd_vs_worst(args, groups)
            plot_tsne(args, groups, images, labels)
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(' '.join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit('Interrupted; the same command continues the evaluation.')


if __name__ == '__main__':
    main()
