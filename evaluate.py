"""Attacks and metrics; as a command, the robustness of anyone's L-infinity-trained classifiers.

    python evaluate.py --model-path runs/cifar10-ew-trades-beta5.5-seed1/best.pt
    python evaluate.py --model-path a.pt b.pt c.pt --attacks pgd20 ls autoattack --figures figures/
    torchrun --nproc-per-node=8 evaluate.py --model-path model_cifar_wrn.pt --dataset cifar10

Prints a Markdown table with a row for each model: the accuracy under each attack, in % of all
examples. Finished batches are kept in <model>.eval.json, so a command that was interrupted goes on
where it was when it is given again, and a finished one answers at once.

    fgsm         one step of epsilon from the image
    pgd10        10 steps of epsilon/4 (2/255 at 8/255)     } each from a uniform random start,
    pgd20        20 steps of epsilon/10                     } the best of --restarts
    pgd100       100 steps of epsilon/4                     }
    ls           pgd20 with the logits times --ls-scale inside the loss (logit scaling, Eq. 9)
    autoattack   the standard version: apgd-ce, apgd-t, fab-t and square, each on what withstood
                 those before it; each of the four can be asked for alone as well
"""
import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from datetime import timedelta
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import commands
import data
import models
from commands import pixels, real, whole


# ---------------------------------------------------------------- attacks

def pgd_attack(model, x, y, epsilon, step_size, num_steps, logit_scale=1.0, random_start=True):
    """Projected gradient descent on CE(logit_scale * f(x + delta), y), Eq. 4 and 9.

    x: images (B, C, H, W) in [0, 1], as are epsilon and step_size; y: labels (B,). Returns x_adv,
    within epsilon of x and in [0, 1]. logit_scale = 10 is the logit-scaling attack (LS); FGSM is
    num_steps=1, step_size=epsilon, random_start=False.
    The model is attacked in the mode it is in.
    """
    x_adv = x
    if random_start:
        x_adv = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 1)
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logit_scale * model(x_adv), y, reduction='sum')
        grad, = torch.autograd.grad(loss, x_adv)
        x_adv = (x_adv.detach() + step_size * grad.sign()).clamp(low, high)
    return x_adv.detach()


AUTOATTACK = ('apgd-ce', 'apgd-t', 'fab-t', 'square')  # the standard version, in its order
STEPS = {'fgsm': (1, 1), 'pgd10': (1 / 4, 10), 'pgd20': (1 / 10, 20), 'pgd100': (1 / 4, 100),
         'ls': (1 / 10, 20)}  # step size over epsilon, number of steps
ATTACKS = ('clean', *STEPS, 'autoattack', *AUTOATTACK)


def pgd_options(attack, epsilon, ls_scale=10.0):
    """What pgd_attack takes for the attack of that name in STEPS; empty for the others."""
    if attack not in STEPS:
        return {}
    return dict(step_size=STEPS[attack][0] * epsilon, num_steps=STEPS[attack][1],
                logit_scale=ls_scale if attack == 'ls' else 1.0, random_start=attack != 'fgsm')


def find_autoattack():
    """The class AutoAttack of pyautoattack or of GitHub's autoattack; ValueError without either."""
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        try:
            from autoattack import AutoAttack
        except ImportError:
            raise ValueError('AutoAttack is not installed: pip install pyautoattack') from None
    return AutoAttack


@torch.no_grad()
def auto_attack(attack, model, x, y, epsilon, seed):
    """x_adv by one of AUTOATTACK, as in the standard version; x itself where f is wrong already.

    The four are called directly: the method around them differs between the two packages, traces
    the program, and resumes wrongly. Raises ValueError where the model has too few classes.
    """
    if attack.endswith('-t') and (classes := model(x[:1]).shape[1]) < 10:
        raise ValueError(f'{attack} has 9 wrong classes as targets, and there are {classes} in all')
    logger = logging.getLogger('auto-attack')
    level, devices = logger.level, [x.device] if x.is_cuda else []
    try:
        logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices):
            adversary = find_autoattack()(model, norm='Linf', eps=epsilon, seed=seed,
                                          version='standard', device=x.device)
            adversary.fab.targeted = True
            parts = adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square
            return parts[AUTOATTACK.index(attack)].perturb(x.contiguous(), y)
    finally:
        logger.setLevel(level)


def run_attack(attack, model, x, y, epsilon, seed=1, first=0, restarts=1, ls_scale=10.0):
    """x_adv for images x (B, C, H, W) in [0, 1], labels y (B,), by one of ATTACKS but autoattack.

    Random draws come from seed and first, the place of the batch; torch is reseeded. A restart is
    for the examples that still stand. Raises RuntimeError where x_adv is not within epsilon of x
    and in [0, 1].
    """
    x_adv = x
    if attack in AUTOATTACK:
        x_adv = auto_attack(attack, model, x, y, epsilon, seed)
    elif attack in STEPS:
        options = pgd_options(attack, epsilon, ls_scale)
        standing = torch.arange(len(x), device=x.device)
        for restart in range(restarts if options['random_start'] else 1):
            if restart:
                with torch.no_grad():
                    standing = standing[model(x_adv[standing]).argmax(1) == y[standing]]
            commands.seed_everything(seed, first, restart)
            found = pgd_attack(model, x[standing], y[standing], epsilon, **options)
            x_adv = x_adv.index_copy(0, standing, found)
    outside = (x_adv - x).abs().max() - epsilon, -x_adv.min(), x_adv.max() - 1
    if not all(distance <= 1e-6 for distance in outside):  # float32 rounds; NaN is outside as well
        raise RuntimeError(f'{attack} left the ball of radius {epsilon} or [0, 1]')
    return x_adv


# ---------------------------------------------------------------- metrics

def entropy(logits):
    """Entropy of softmax(logits), (B, K) -> (B,), in nats, from 0 to log K: Eq. 1 with tau = 1."""
    log_p = F.log_softmax(logits, dim=1).clamp(min=-1e4)  # where p is 0: 0 log 0 = 0
    return -(log_p.exp() * log_p).sum(1)


def evaluate_epoch(model, images, labels, epsilon, batch_size, seed, threshold=1.5, average=None):
    """What training logs after an epoch, for uint8 images.

    Fractions `clean` and `pgd10` (accuracy under PGD with 10 steps of epsilon / 4), mean `entropy`
    in nats of the adversarial examples, `high_entropy`, the fraction above threshold; of a second,
    averaged network the same as `ema_clean` and so on. Processes share the batches; networks are
    put in eval mode and back.
    """
    (rank, world), training = commands.processes(), model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=images.device)
    with models.frozen(model):
        for i in range(rank * batch_size, len(images), world * batch_size):
            x, y = data.to_float(images[i:i + batch_size]), labels[i:i + batch_size]
            commands.seed_everything(seed, i)
            x_adv = pgd_attack(model, x, y, epsilon, epsilon / 4, 10)
            with torch.no_grad():
                logits, logits_adv = model(x), model(x_adv)
            h = entropy(logits_adv)
            sums += torch.stack([v.double().sum() for v in (
                logits.argmax(1) == y, logits_adv.argmax(1) == y, h, h > threshold)])
    model.train(training)
    if world > 1:
        torch.distributed.all_reduce(sums)
    row = dict(zip(('clean', 'pgd10', 'entropy', 'high_entropy'), (sums / len(images)).tolist()))
    if average is not None:
        of_average = evaluate_epoch(average, images, labels, epsilon, batch_size, seed, threshold)
        row |= {f'ema_{k}': v for k, v in of_average.items()}
    return row


@contextlib.contextmanager
def exact(model, device):
    """Inside, the model is in eval mode and float32 without TF32; its weights take no gradients.

    Afterwards its modes, its amp, torch's settings and its random states are what they were.
    """
    training = [(m, m.training) for m in model.modules()]
    amp, cudnn, onednn = getattr(model, 'amp', False), torch.backends.cudnn, torch.backends.mkldnn
    # by the newer of torch's two interfaces: the older does not undo TF32 that was set by this one
    units = torch.backends.cuda.matmul, cudnn.conv, onednn.matmul, onednn.conv
    precisions = [unit.fp32_precision for unit in units]
    algorithms = cudnn.deterministic, cudnn.benchmark
    try:
        model.eval()
        model.amp = False
        for unit in units:
            unit.fp32_precision = 'ieee'
        cudnn.deterministic, cudnn.benchmark = True, False
        with models.frozen(model), torch.random.fork_rng(
                [device] if device.type == 'cuda' else []):
            yield
    finally:
        for m, mode in training:
            m.training = mode
        model.amp = amp
        for unit, precision in zip(units, precisions):
            unit.fp32_precision = precision
        cudnn.deterministic, cudnn.benchmark = algorithms


def evaluate_attack(model, images, labels, attack, epsilon, examples=None, batch_size=250, seed=1,
                    records=None, save=None, desc=None, found=None, **options):
    """Who withstands an attack: correct (N,), bool, and entropies (N,), float32, in NumPy.

    images: uint8 (N, C, H, W); labels: (N,); examples: (N,) bool, those to attack, the others count
    as wrong (default: all); options: restarts, ls_scale. What counts is the network's prediction on
    x_adv, that of misclassified clean examples as well, in eval mode whatever mode it is in. The
    entropies are those of f(x_adv) in nats, NaN where it was not attacked. records: what an
    earlier call made of the batches, None where nothing; this one adds to it, and then calls
    save(). desc: of the progress bar, None for none. found: a float32 array (N, C, H, W) that takes
    the adversarial images. Under several processes the batches are shared out.
    """
    records = records if records is not None else []
    index = np.arange(len(images)) if examples is None else np.flatnonzero(examples)
    batches = [index[i:i + batch_size] for i in range(0, len(index), batch_size)]
    rank, world = commands.processes()
    bar = tqdm(range(rank, len(batches), world), desc=desc, unit='batch', leave=False,
               disable=None if desc and rank == 0 else True)
    stood = attacked = 0
    with exact(model, images.device):
        for number in bar:
            batch, record = batches[number], next(iter(records[number:]), None)
            if found is None and record is not None and not fits(record, len(batch)):
                commands.say('a kept batch is damaged: evaluating it anew', sys.stderr)
                record = None
            if record is None or found is not None:
                x, y = data.to_float(images[batch]), labels[batch]
                x_adv = run_attack(attack, model, x, y, epsilon, seed, number * batch_size,
                                   **options)
                with torch.no_grad():
                    logits = model(x_adv)
                record = {'correct': (logits.argmax(1) == y).tolist(),
                          'entropy': entropy(logits).tolist()}
                if found is not None:
                    found[batch] = x_adv.cpu().numpy()
                records += [None] * (number + 1 - len(records))
                records[number] = record
                if save:
                    save()
            stood, attacked = stood + sum(record['correct']), attacked + len(batch)
            bar.set_postfix_str(f'{stood / attacked * len(index) / len(images):.2%} robust')
    if world > 1:
        theirs = [None] * world
        torch.distributed.all_gather_object(theirs, records)
        records[:] = [theirs[number % world][number] for number in range(len(batches))]
    correct, entropies = np.zeros(len(images), bool), np.full(len(images), np.nan, np.float32)
    for batch, record in zip(batches, records):
        correct[batch], entropies[batch] = record['correct'], record['entropy']
    return correct, entropies


def fits(record, size):
    """Whether a kept record is what evaluate_attack makes of a batch of that size."""
    if not isinstance(record, dict) or record.keys() != {'correct', 'entropy'}:
        return False
    return all(isinstance(values, list) and len(values) == size
               and all(isinstance(v, kind) for v in values)
               for values, kind in ((record['correct'], bool), (record['entropy'], float)))


def entropy_report(entropies, correct, threshold):
    """Of adversarial examples: mean entropy, share above threshold, accuracy above and up to it.

    entropies: (N,) in nats; correct: (N,) bool. An accuracy is NaN where there is no such example.
    """
    high = entropies > threshold
    accuracy = [correct[part].mean().item() if part.any() else math.nan for part in (high, ~high)]
    return {'entropy': float(entropies.mean(dtype=np.float64)), 'high_entropy': float(high.mean()),
            'accuracy_high_entropy': accuracy[0], 'accuracy_low_entropy': accuracy[1]}


# ---------------------------------------------------------------- the table

class Results:
    """Finished batches, beside the model in <model>.eval.json: {what was measured: [record, ...]}.

    A save puts together what this process and the file know, and moves the new file into place
    whole: neither a kill nor a second evaluation of the same model spoils it.
    """

    def __init__(self, model_path):
        self.model_path, self.path = model_path, f'{model_path}.eval.json'
        self.writable, self.known = True, self.read()

    def read(self):
        try:
            with open(self.path, encoding='utf-8') as f:
                content = json.load(f)
            if all(isinstance(records, list) for records in content.values()):
                return content
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, RecursionError):
            pass
        commands.say(f'{self.path} cannot be read: evaluating anew', sys.stderr)
        return {}

    def save(self):
        if not self.writable:
            return
        try:
            with open(self.model_path, 'rb') as file:
                commands.lock(file)
                merged = self.read()
                for k, ours in self.known.items():
                    merged[k] = [a or b for a, b in zip_longest(ours, merged.get(k, []))]
                with models.replacing(self.path, 'w') as f:
                    json.dump(merged, f)
        except OSError as error:
            commands.say(f'{self.path} cannot be written ({error.strerror}): going on without it',
                         sys.stderr)
            self.writable = False


def weights_hash(model):
    """SHA-256 of what decides a network's logits: its class, its weights and its normalization, and
    of one's own network the source."""
    sha = hashlib.sha256((type(model).__name__ + getattr(model, 'own', '')).encode())
    extra = {}
    if getattr(model, 'input_normalization', None):
        extra = {'mean': model.input_mean, 'std': model.input_std}
    for name, tensor in sorted((model.state_dict() | extra).items()):
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        sha.update(tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def plan_columns(attacks, epsilon, aa_epsilon, worst_case=False):
    """The table's columns, {title: (attack, epsilon, after)}.

    after: the column whose survivors alone are attacked, None for all examples.
    """
    columns = {'clean': ('clean', 0.0, None)}
    for attack in attacks:
        after = 'clean'
        for part in AUTOATTACK if attack == 'autoattack' else [attack]:
            title = part
            if worst_case:
                title, after = f'+ {part}', list(columns)[-1]
            elif attack == 'autoattack':
                title = {'apgd-ce': 'aa: apgd-ce', 'square': attack}.get(part, f'aa: + {part}')
            if part != 'clean' and title not in columns:
                columns[title] = (part, aa_epsilon if part in AUTOATTACK else epsilon,
                                  after if worst_case or part in AUTOATTACK else None)
                after = title
    if worst_case and len(columns) > 1:
        columns['worst case'] = columns.pop(list(columns)[-1])
    return columns


def add_worst_case(outcome, columns):
    """Where two or more attacks ran on all examples, add to {title: correct (N,)}: `worst`, what
    withstood all of them, and `pgd20 - worst`, what only seems to if one looks at PGD-20."""
    attacks = [title for title in columns if title != 'clean' and not re.match(r'aa: |\+ ', title)]
    if len(attacks) > 1:
        outcome['worst'] = np.all([outcome[title] for title in ('clean', *attacks)], axis=0)
        if 'pgd20' in attacks:
            outcome['pgd20 - worst'] = outcome['pgd20'] & ~outcome['worst']


def evaluate_model(model, images, labels, columns, results=None, identity=None, name='model',
                   batch_size=250, seed=1, restarts=1, ls_scale=10.0, examples_of=None):
    """The columns of a model's row: {title: correct (N,)}; and the entropies (N,) under pgd20.

    columns: see plan_columns; without pgd20 on all examples, the entropies are None. results,
    identity: a Results, and the dict that says what its records are of. examples_of: an empty dict
    that takes {attack: adversarial images (N, C, H, W)}. Progress goes to stderr.
    """
    outcome, entropies = {}, None
    for title, (attack, epsilon, after) in columns.items():
        examples = outcome[after] if after else np.ones(len(labels), bool)
        options = dict(restarts=restarts, ls_scale=ls_scale) if attack in STEPS else {}
        key = {**(identity or {}), **pgd_options(attack, epsilon, ls_scale), 'attack': attack,
               'epsilon': epsilon, 'restarts': options.get('restarts'), 'seed': seed,
               'batch_size': batch_size, 'n': len(labels),
               'attacked': hashlib.sha256(np.packbits(examples)).hexdigest()}
        key = json.dumps(key, sort_keys=True)
        records, save = (results.known.setdefault(key, []), results.save) if results else ([], None)
        began, found = time.time(), None
        if examples_of is not None and attack != 'clean':  # AutoAttack's four share their images
            whole = 'autoattack' if title.startswith('aa: ') else title
            found = examples_of.setdefault(whole, images.cpu().numpy().astype(np.float32) / 255)
        outcome[title], h = evaluate_attack(model, images, labels, attack, epsilon, examples,
                                            batch_size, seed, records, save, f'{name} {title}',
                                            found, **options)
        if attack == 'pgd20' and after is None:
            entropies = h
        accuracy, seconds = outcome[title].mean(), time.time() - began
        commands.tell(f'{name}: {title} {accuracy:.2%} of {len(labels):,} ({seconds:.0f} s)',
                      sys.stderr)
        if attack == 'clean' and accuracy < 0.3 and 'args' not in getattr(model, 'about', ()):
            commands.tell(f'{name}: that is little for a trained network; perhaps it needs another '
                          '--dataset, --normalize, or --arch preactresnet18-raw', sys.stderr)
    add_worst_case(outcome, columns)
    return outcome, entropies


def epsilon_text(epsilon):
    """An epsilon as the field writes it: 8/255, 0.031."""
    whole = abs(epsilon * 255 - round(epsilon * 255)) < 1e-6
    return f'{epsilon * 255:.0f}/255' if whole else f'{epsilon:g}'


def markdown(header, rows):
    """A Markdown table: names left, numbers right."""
    lines = [header, [':--'] + ['--:'] * (len(header) - 1), *rows]
    cells = [[' '.join(str(cell).split()).replace('|', r'\|') for cell in line] for line in lines]
    return '\n'.join(f"| {' | '.join(line)} |" for line in cells)


def write_csv(path, header, rows):
    with models.replacing(path, 'w', newline='', errors='replace') as f:
        csv.writer(f).writerows([header, *rows])


def row_names(paths):
    """A name for each model: its run directory's or its file's, or the path to be unique."""
    def short(path):
        run, file = os.path.abspath(path).split(os.sep)[-2:]
        stem = os.path.splitext(file)[0]
        ours = re.fullmatch(r'best|last|epoch-\d+', stem)
        return run if stem == 'best' else f'{run}/{stem}' if ours else stem
    names = [short(p) for p in paths]
    return [n if names.count(n) == 1 else p for n, p in zip(names, paths)]


NO_SETTINGS = ('seed', 'model_dir', 'resume', 'data_dir', 'no_cuda', 'log_interval', 'save_freq',
               'save_every_minutes', 'test_batch_size', 'allow_chance')


def group_seeds(rows):
    """{name: rows of models that differ in their seed alone}, or of one; the name is without it."""
    alike, groups = {}, {}
    for row in rows:
        args = row['about'].get('args', {})
        rest = {k: v for k, v in args.items() if k not in NO_SETTINGS} if 'seed' in args else {}
        key = row['about'].get('algorithm'), os.path.basename(row['path']), rest or row['path']
        alike.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(row)
    for group in alike.values():
        seeds = {row['about'].get('args', {}).get('seed') for row in group}
        name = re.sub(r'[-_ ]?seed[-_ ]?\d+', '', group[0]['model'])
        if 1 < len(group) == len(seeds) and name not in groups:
            groups[name] = group
        else:
            groups |= {row['model']: [row] for row in group}
    return groups


def over_seeds(rows):
    """Mean and sample standard deviation of the numbers of rows that differ in their seed alone."""
    names = [*rows[0]['accuracy'], *rows[0]['report']]
    values = [[*row['accuracy'].values(), *row['report'].values()] for row in rows]
    return {'mean': dict(zip(names, np.mean(values, axis=0).tolist())),
            'sd': dict(zip(names, np.std(values, axis=0, ddof=1).tolist()))}


def standard_errors(row):
    """Binomial, of the accuracies of a row."""
    return {k: math.sqrt(v * (1 - v) / row['n']) for k, v in row['accuracy'].items()}


# ---------------------------------------------------------------- figures

# Okabe and Ito's, which colour-blind readers can tell apart; the yellow darker, to show on white
COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#B8A800']
MARKERS = 'os^DvPX*'
TSNE_EXAMPLES = 500  # of a class at most: t-SNE is slow, and a panel is small
WRITTEN = {'fgsm': 'FGSM', 'pgd10': 'PGD-10', 'pgd20': 'PGD-20', 'pgd100': 'PGD-100', 'ls': 'LS',
           'autoattack': 'AutoAttack', 'apgd-ce': 'APGD-CE', 'apgd-t': 'APGD-T', 'fab-t': 'FAB-T',
           'square': 'Square'}


def styles(groups):
    """{name: (number of its colour, 0, 1 or 2)}: a method has a colour; 0 is the method itself, 1
    with entropy weights, 2 its control, tau = inf. Where both are taken, another colour."""
    found, colours = {}, {}
    for name, rows in groups.items():
        about = rows[0]['about']
        args = about.get('args', {})
        variant = bool(args.get('entropy_weight')) + (args.get('tau') == math.inf)
        key = about.get('algorithm', name)
        while (colours.setdefault(key, len(colours)), variant) in found.values():
            key += "'"
        found[name] = colours[key], variant
    return found


@contextlib.contextmanager
def figure(path, header, table, height, rows=1, panels=(), legend='outside lower center',
           **options):
    """A figure and its axes (rows, columns); at the end it is path.png and path.pdf, and the
    numbers path.csv.

    It is 3.5 inches (a column of text) wide. panels: their names, two in a row if several; without
    them there is one column of `rows`. height: of half the width. The legend is that of the first
    panel. header, table: of the CSV; the table may be filled meanwhile.
    """
    import matplotlib
    matplotlib.use('Agg')  # needs no display
    import matplotlib.pyplot as plt
    plt.rcParams.update({'font.size': 7, 'axes.grid': True, 'grid.linewidth': 0.3,
                         'axes.axisbelow': True, 'legend.fontsize': 6, 'legend.frameon': False,
                         'lines.linewidth': 1.1, 'hatch.linewidth': 0.5, 'pdf.fonttype': 42})
    columns = min(2, len(panels)) or 1
    rows = math.ceil(len(panels) / columns) or rows
    drawn, axes = plt.subplots(rows, columns, layout='constrained', squeeze=False, **options)
    for ax, name in zip(axes.flat, panels):
        ax.set_title(shorten(name), fontsize=6, pad=3)
    for ax in axes.flat:
        ax.locator_params(nbins=6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4)
    if len(panels) < axes.size and panels:
        axes[-1, -1].set_axis_off()
        axes[-2, -1].tick_params(labelbottom=True)
    yield drawn, axes
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if labels:
        drawn.legend(handles, labels, loc=legend, ncols=2)
    drawn.set_size_inches(3.5, 0.4 + height * rows * 2 / columns + 0.13 * ((len(labels) + 1) // 2))
    for kind in ('png', 'pdf'):
        drawn.savefig(f'{path}.{kind}', dpi=200)
    plt.close(drawn)
    write_csv(f'{path}.csv', header, table)


def shorten(name):
    """At most 32 characters that matplotlib takes as they are: no markup, and no name to hide."""
    name = ''.join(c if c.isprintable() else '?' for c in name)
    name = name if len(name) <= 32 else f'…{name[-31:]}'
    return (' ' if name.startswith('_') else '') + name.replace('$', r'\$')


def plot_entropy_histogram(groups, num_classes, threshold, directory):
    """Figures 2 and 4b: the distribution of the adversarial examples' entropies, a panel for each
    {name: rows}; of several seeds the mean, and grey from the lowest to the highest."""
    edges, style = np.linspace(0, math.log(num_classes), 31), styles(groups)
    shares = {name: np.stack([np.histogram(row['entropies'].clip(0, edges[-1]), edges)[0]
                              * 100 / row['n'] for row in rows]) for name, rows in groups.items()}
    table = list(zip(edges[:-1], edges[1:], *(share.mean(0) for share in shares.values())))
    with figure(os.path.join(directory, 'entropy_histogram'),
                ['entropy_from', 'entropy_to', *shares], table, 0.9, panels=list(shares),
                sharex=True, sharey=True) as (drawn, axes):
        for ax, (name, share) in zip(axes.flat, shares.items()):
            colour, variant = style[name]
            ax.stairs(share.mean(0), edges, fill=True, facecolor=COLOURS[colour % 8],
                      edgecolor='white', linewidth=0, hatch=['', '/////', '.....'][variant])
            if len(share) > 1:
                ax.stairs(share.max(0), edges, baseline=share.min(0), fill=True, color='0.15',
                          alpha=0.4)
            ax.axvline(threshold, color='0.3', linewidth=0.6)
            ax.set_xlim(0, edges[-1])
        drawn.supxlabel('entropy of the prediction on PGD-20 examples (nats; '
                        f'line: {threshold:g})', fontsize=7)
        drawn.supylabel('share of examples (%)', fontsize=7)


def plot_entropy_vs_robustness(groups, attack, threshold, directory):
    """Figure 4a: the share of high-entropy examples and the accuracy under the attack, a point for
    each {name: rows}; of several seeds the mean and the standard deviation."""
    style, table = styles(groups), []
    with figure(os.path.join(directory, 'entropy_vs_robustness'), ['model', 'high_entropy', attack],
                table, 0.85) as (_, [[ax]]):
        for name, rows in groups.items():
            points = np.array([(row['report']['high_entropy'], row['accuracy'][attack])
                               for row in rows])
            table.append([name, *points.mean(0)])
            colour, variant = style[name]
            xerr, yerr = 100 * points.std(0, ddof=1) if len(rows) > 1 else (None, None)
            ax.errorbar(*100 * points.mean(0), yerr, xerr, elinewidth=0.6, label=shorten(name),
                        fmt=MARKERS[colour % 8], color=COLOURS[colour % 8],
                        fillstyle=['full', 'none', 'left'][variant], linestyle='none')
        ax.set(xlabel=f'PGD-20 examples with entropy above {threshold:g} nats (%)',
               ylabel=f'accuracy under {WRITTEN.get(attack, attack)} (%)')
        ax.margins(0.1)


def plot_pgd_vs_worst(groups, attacks, directory):
    """The paper's message: by how much PGD-20 overstates the robustness of each {name: rows}."""
    columns, style = ('pgd20', 'worst', 'clean'), styles(groups)
    means = {name: [np.mean([row['accuracy'][c] for row in rows]) for c in columns]
             for name, rows in groups.items()}
    with figure(os.path.join(directory, 'pgd_vs_worst'), ['model', *columns],
                [[name, *values] for name, values in means.items()],
                0.35 + 0.09 * len(groups), legend='outside upper center') as (drawn, [[ax]]):
        for y, (name, (pgd, worst, _)) in enumerate(means.items()):
            colour, variant = style[name]
            ax.plot([100 * worst, 100 * pgd], [y, y], color=COLOURS[colour % 8], linewidth=1.8,
                    linestyle=['-', '--', ':'][variant])
            for values, marker, fill in (('pgd20', 'o', 'none'), ('worst', 'D', 'full')):
                ax.plot([100 * row['accuracy'][values] for row in groups[name]],
                        [y] * len(groups[name]), marker, fillstyle=fill, markersize=3.5,
                        color=COLOURS[colour % 8])
            ax.annotate(f'{100 * (pgd - worst):.1f}', (50 * (pgd + worst), y), (0, 2.5),
                        textcoords='offset points', ha='center', fontsize=6)
        for marker, fill, text in (('o', 'none', 'PGD-20'), ('D', 'full', f'worst of {attacks}')):
            ax.plot([], [], marker, fillstyle=fill, color='0.2', markersize=3.5, label=text)
        ax.set_yticks(range(len(means)), [shorten(name) for name in means])
        ax.set_ylim(len(means) - 0.5, -0.7)
        drawn.supxlabel('robust accuracy (%); numbers: points by which PGD-20 overstates it',
                        fontsize=7)


def plot_tsne(features, classes, seed, directory):
    """Figure 3: a t-SNE panel for each {name: (features (M, D), labels (M,))} of two classes."""
    from sklearn.manifold import TSNE
    table = []
    with figure(os.path.join(directory, 'tsne'), ['model', 'x', 'y', 'class'], table, 1.5,
                panels=list(features), legend='outside upper center') as (drawn, axes):
        for ax, (name, (f, y)) in zip(axes.flat, features.items()):
            tsne = TSNE(perplexity=min(30, (len(f) - 1) / 3), init='pca', random_state=seed)
            points = tsne.fit_transform(f)
            for (label, text), marker, colour in zip(classes.items(), 'o^', COLOURS):
                ax.scatter(*points[y == label].T, s=5, marker=marker, color=colour, linewidths=0,
                           alpha=0.7, label=shorten(text))
            ax.set(xticks=[], yticks=[])
            table += [[name, *point, classes[label]] for point, label in zip(points, y)]
        drawn.supxlabel('t-SNE 1 (no unit)', fontsize=7)
        drawn.supylabel('t-SNE 2 (no unit)', fontsize=7)


def plot_training_curves(groups, directory):
    """Clean and PGD-10 accuracy and entropy under PGD-10 by epoch, a line for each {name: rows};
    of several seeds the mean, and a band of a standard deviation."""
    texts = {'clean': 'clean accuracy (%)', 'pgd10': 'PGD-10 accuracy (%)',
             'entropy': 'PGD-10 entropy (nats)'}
    style = styles(groups)
    rows = [row for group in groups.values() for row in group]
    table = [[row['model'], *line.values()] for row in rows for line in row['log']]
    with figure(os.path.join(directory, 'training_curves'), ['model', *CURVES], table, 0.63, rows=3,
                sharex=True) as (_, axes):
        for ax, (column, text) in zip(axes[:, 0], texts.items()):
            scale = 1 if column == 'entropy' else 100
            for name, (colour, variant) in style.items():
                logs = [row['log'] for row in groups[name] if row['log']]
                lines = list(zip(*logs))  # by epoch, as far as all seeds got
                epochs = [line[0]['epoch'] for line in lines]
                values = np.array([[scale * one[column] for one in line] for line in lines])
                if lines:
                    mean, sd = values.mean(1), values.std(1, ddof=len(logs) > 1)
                    ax.plot(epochs, mean, label=shorten(name), color=COLOURS[colour % 8],
                            linestyle=['-', '--', ':'][variant], marker='.' * (len(lines) == 1))
                    ax.fill_between(epochs, mean - sd, mean + sd, alpha=0.2, linewidth=0,
                                    color=COLOURS[colour % 8])
            ax.set_ylabel(text)
        axes[-1, 0].set_xlabel('epoch')
        axes[-1, 0].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


CURVES = ('epoch', 'clean', 'pgd10', 'entropy')


def read_log(model_path):
    """The rows of the log.csv beside a checkpoint, as numbers; [] where there is none."""
    rows = []
    with contextlib.suppress(OSError, UnicodeDecodeError, csv.Error):
        with open(os.path.join(os.path.dirname(model_path), 'log.csv'), encoding='utf-8') as f:
            for row in csv.DictReader(f):
                with contextlib.suppress(KeyError, TypeError, ValueError):  # a line cut off
                    rows.append({k: float(row[k]) for k in CURVES})
    return rows


def adversarial_features(model, images, labels, classes, epsilon, batch_size, seed):
    """Penultimate features (M, D) of PGD-20 examples, TSNE_EXAMPLES a class at most; labels."""
    features, index = [], torch.cat([(labels == k).nonzero()[:TSNE_EXAMPLES, 0] for k in classes])
    with exact(model, images.device), torch.no_grad():
        for begin in range(0, len(index), batch_size):
            batch = index[begin:begin + batch_size]
            x_adv = run_attack('pgd20', model, data.to_float(images[batch]), labels[batch], epsilon,
                               seed, begin)
            features.append(model.penultimate_features(x_adv).cpu())
    return torch.cat(features).numpy(), labels[index].cpu().numpy()


# ---------------------------------------------------------------- the command

def parse_args(argv=None):
    """The arguments, checked one by one; prepare completes them."""
    parser = commands.ArgumentParser(description=__doc__)
    add = parser.add_argument_group('models').add_argument
    add('--model-path', nargs='+', required=True, metavar='FILE',
        help="checkpoints, this project's or anyone's: a row of the table each")
    add('--arch', metavar='NAME', type=models.full_arch,
        help=f'{models.KNOWN_ARCHS} (default: read off the weights)')
    add('--names', nargs='+', metavar='NAME', help='of the models, in tables and figures (default: '
        'from the paths)')
    add('--normalize', default='none', metavar='N', help='normalization that the training had '
        'outside the network: none, cifar10, cifar100 or MEAN/STD such as '
        '0.5,0.5,0.5/0.25,0.25,0.25')
    add = parser.add_argument_group('data').add_argument
    add('--dataset', type=data.dataset_name, metavar='NAME',
        help=f"{', '.join(data.DATASETS)} or FILE.npz (default: what the checkpoint says)")
    add('--data-dir', default='./data', metavar='DIR', help='where it is, or is downloaded to')
    add('--split', choices=('test', 'train'), default='test')
    add('--n-examples', type=whole(1), help='only the first N images, from 1 (default: all)')
    add = parser.add_argument_group('attacks').add_argument
    add('--attacks', nargs='+', choices=ATTACKS, default=ATTACKS[:6], metavar='A',
        help=f"from {', '.join(ATTACKS)}; clean is always there")
    radii = ', '.join(f"{name} {epsilon_text(spec.protocol['epsilon'])}"
                      for name, spec in data.DATASETS.items())
    add('--epsilon', type=pixels, metavar='E', help='L-infinity radius, pixels in [0, 1]; '
        f'the steps scale with it (default: {radii})')
    add('--aa-epsilon', type=pixels, metavar='E', help='another radius for autoattack and '
        "its four; the paper's is 0.031 on CIFAR (default: --epsilon)")
    add('--restarts', type=whole(1), default=1, help='random starts of PGD and LS, from 1')
    add('--ls-scale', type=real('(0, inf)'), default=10.0,
        help='what ls multiplies the logits by in its loss, above 0')
    add('--worst-case', action='store_true', help='each attack only on what withstood those before '
        'it: sooner at the worst case, but then a column (+) is not of one attack alone')
    add = parser.add_argument_group('run').add_argument
    add('--batch-size', type=whole(1), default=250, metavar='N', help='images at once, from 1')
    add('--seed', type=whole(0, 2 ** 32 - 1), default=1, help='of the random starts, from 0')
    add('--no-cuda', action='store_true', help='evaluate on the CPU')
    add = parser.add_argument_group('reports').add_argument
    add('--entropy-threshold', type=real('[0, inf)'), default=1.5, metavar='T',
        help='an entropy above it counts as high, in nats, from 0')
    add('--figures', metavar='DIR',
        help='write the figures there, PNG and PDF, and the numbers behind each as CSV')
    add('--tsne-classes', nargs=2, metavar='CLASS', help='the two classes of tsne.png (default: '
        'the first two, e.g. airplane automobile, or 0 1)')
    add('--csv', metavar='FILE', help='write the numbers there too, as fractions, and the standard '
        'errors of the accuracies, binomial')
    add('--json', metavar='FILE', help='the same, with all settings and versions')
    add('--save-outcomes', metavar='FILE.npz', help='which example withstood which attack, for '
        'paired tests: `correct` (models, columns, N), `models`, `columns`, `labels`')
    add('--save-examples', metavar='FILE.npz', help='of one model the adversarial images, float32 '
        '(N, C, H, W), under the name of each attack, and `labels`')
    args = parser.parse_args(argv)
    attacks = set(args.attacks)
    reported = args.figures or 'pgd20' in attacks and not args.worst_case
    parser.refuse_idle(argv, {
        '--aa-epsilon': (attacks & {'autoattack', *AUTOATTACK}, 'without autoattack'),
        '--restarts': (args.figures or attacks & (STEPS.keys() - {'fgsm'}), 'without PGD or LS'),
        '--ls-scale': ('ls' in attacks, 'without ls'),
        '--entropy-threshold': (reported, 'without pgd20 on all examples'),
        '--tsne-classes': (args.figures, 'without --figures')})
    return args


def prepare(args):
    """Look for all that can be wrong before any work starts, and complete args.

    Returns the models {name: model}, images, labels, and the names of the classes.
    Raises ValueError, OSError or ImportError with a line for the user.
    """
    args.model_path = list(dict.fromkeys(args.model_path))
    names = args.names or row_names(args.model_path)
    if len(names) != len(args.model_path) or len(set(names)) < len(names):
        raise ValueError(f'--names: {len(set(names))} different ones for {len(args.model_path)} '
                         'models')
    if args.save_examples and (len(names) > 1 or commands.launched()[1] > 1):
        raise ValueError('--save-examples is for one model, in one process')
    num_classes = None
    if args.dataset and ':' in (args.arch or ''):  # the others tell it by their weights
        num_classes = data.find_dataset(args.dataset).num_classes
    loaded = {name: models.load_model(path, args.arch, num_classes, args.normalize)
              for name, path in zip(names, args.model_path)}
    found = {args.dataset or model.about.get('dataset', 'none') for model in loaded.values()}
    args.dataset = next(iter(found))
    if len(found) > 1 or not (args.dataset in data.DATASETS or args.dataset.endswith('.npz')):
        raise ValueError(f"data set named in the checkpoints: {' and '.join(sorted(found))}; give "
                         f"one --dataset for all, of {', '.join(data.DATASETS)} or FILE.npz")
    spec = data.find_dataset(args.dataset)
    for path, model in zip(args.model_path, loaded.values()):
        models.check_fit(model, spec.shape, spec.num_classes, f'{path}, on {args.dataset}')
    args.epsilon = args.epsilon or spec.protocol['epsilon']
    args.aa_epsilon = args.aa_epsilon or args.epsilon
    if {'autoattack', *AUTOATTACK} & set(args.attacks):
        find_autoattack()
    if {'autoattack', 'apgd-t', 'fab-t'} & set(args.attacks) and spec.num_classes < 10:
        raise ValueError(f'autoattack, apgd-t and fab-t have 9 wrong classes as targets, and '
                         f'{args.dataset} has {spec.num_classes} classes in all; apgd-ce and '
                         'square work')
    if args.figures:
        import matplotlib.pyplot, sklearn.manifold  # noqa: are they there?
        os.makedirs(args.figures, exist_ok=True)
    files = args.csv, args.json, args.save_outcomes, args.save_examples
    for path in filter(None, [*files, args.figures and os.path.join(args.figures, '')]):
        try:
            tempfile.TemporaryFile(dir=os.path.dirname(path) or '.').close()
            if path in files and os.path.isdir(path):
                raise IsADirectoryError(None, 'it is a directory')
        except OSError as error:
            raise ValueError(f'{path} cannot be written ({error.strerror})') from None
    images, labels = data.load_data(args.dataset, args.data_dir, args.split == 'train',
                                    args.n_examples, commands.pick_device(args.no_cuda))
    names = data.class_names(args.dataset, args.data_dir)
    chosen = args.tsne_classes or names[:2]
    if args.figures and len({*chosen} & {*names}) < 2:
        raise ValueError(f"--tsne-classes {' '.join(chosen)}: not two of {', '.join(names)}")
    return loaded, images, labels, names


def measure(args, loaded, images, labels):
    """The columns, {title: (attack, epsilon, after)}, and a dict of measurements for each model."""
    columns = plan_columns(args.attacks, args.epsilon, args.aa_epsilon, args.worst_case)
    if args.figures:
        columns.setdefault('pgd20', ('pgd20', args.epsilon, None))
    content = images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()
    identity = dict(dataset=os.path.basename(args.dataset), split=args.split,
                    data=hashlib.sha256(content).hexdigest())
    rows, examples_of = [], {} if args.save_examples else None
    for (name, model), path in zip(loaded.items(), args.model_path):
        model.to(images.device, memory_format=torch.channels_last)
        row = {'model': name, 'path': path, 'n': len(labels), 'weights': weights_hash(model),
               'about': model.about, 'log': read_log(path), 'report': {}}
        row['correct'], entropies = evaluate_model(
            model, images, labels, columns, Results(path), {**identity, 'weights': row['weights']},
            name, args.batch_size, args.seed, args.restarts, args.ls_scale, examples_of)
        row['accuracy'] = {k: correct.mean().item() for k, correct in row['correct'].items()}
        if entropies is not None:
            row['entropies'] = entropies
            row['report'] = entropy_report(entropies, row['correct']['pgd20'],
                                           args.entropy_threshold)
        rows.append(row)
        model.cpu()
    if args.save_examples:
        with models.replacing(args.save_examples) as f:
            np.savez(f, labels=labels.cpu().numpy(), **examples_of)
    return columns, rows


def tables(args, heads, rows):
    """The accuracies and, if pgd20 was run on all examples, the entropies; and the means of those
    that differ in their seed alone: Markdown."""
    def cells(values, spreads=None):
        texts = []
        for k, v in values.items():
            factor, digits = (1, 3) if k == 'entropy' else (100, 2)
            spread = f' ± {factor * spreads[k]:.{digits}f}' if spreads else ''
            texts.append('-' if math.isnan(v) else f'{factor * v:.{digits}f}{spread}')
        return texts
    which, n, t = 'the first' if args.n_examples else 'all', rows[0]['n'], args.entropy_threshold
    text = (f'Accuracy in % on {which} {n:,} {args.split} images of {args.dataset}, by '
            f'attack (epsilon); seed {args.seed}, batches of {args.batch_size}, random starts of '
            f'PGD and LS {args.restarts}, LS scale {args.ls_scale:g}\n\n')
    text += markdown(['model', 'n', *heads], [
        [row['model'], n, *cells(row['accuracy'])] for row in rows])
    entropy_heads = ['mean (nats)', f'above {t:g} (%)', f'accuracy above {t:g} (%)',
                     f'accuracy up to {t:g} (%)'] if rows[0]['report'] else []
    if entropy_heads:
        text += ('\n\nEntropy of the predictions on the examples of pgd20, and the accuracy on '
                 'them\n\n')
        text += markdown(['model', 'n', *entropy_heads], [
            [row['model'], n, *cells(row['report'])] for row in rows])
    means = [[name, len(group), *cells(*over_seeds(group).values())]
             for name, group in group_seeds(rows).items() if len(group) > 1]
    if means:
        text += '\n\nMean ± standard deviation over the models that differ in their seed alone'
        split = 2 + len(heads)
        text += '\n\n' + markdown(['models', 'seeds', *heads], [line[:split] for line in means])
        if entropy_heads:
            text += '\n\n' + markdown(['models', 'seeds', *entropy_heads], [
                line[:2] + line[split:] for line in means])
    return text


def write_numbers(args, columns, heads, rows, labels):
    """What --csv, --json and --save-outcomes ask for; of several seeds mean and sd as well."""
    seeds = {name: group for name, group in group_seeds(rows).items() if len(group) > 1}
    if args.csv:
        lines = [[row['model'], row['path'], row['n'], *row['accuracy'].values(),
                  *row['report'].values(), *standard_errors(row).values()] for row in rows]
        lines += [[f'{name} ({what} of {len(group)} seeds)', '', rows[0]['n'], *values.values()]
                  for name, group in seeds.items() for what, values in over_seeds(group).items()]
        write_csv(args.csv, ['model', 'path', 'n', *heads, *rows[0]['report'],
                             *(f'stderr of {head}' for head in heads)], lines)
    if args.json:
        def plain(numbers):  # JSON has no NaN
            return {k: None if math.isnan(v) else v for k, v in numbers.items()}
        content = [{**{k: row[k] for k in ('model', 'path', 'n', 'weights', 'accuracy')},
                    'stderr': standard_errors(row), 'report': plain(row['report'])}
                   for row in rows]
        means = [{'name': name, 'models': [row['model'] for row in group],
                  **{k: plain(v) for k, v in over_seeds(group).items()}}
                 for name, group in seeds.items()]
        with models.replacing(args.json, 'w') as f:
            json.dump({'args': vars(args), 'columns': columns,
                       'versions': commands.versions(labels.device), 'models': content,
                       'seeds': means}, f, indent=1)
    if args.save_outcomes:
        with models.replacing(args.save_outcomes) as f:
            np.savez_compressed(f, models=[row['model'] for row in rows], labels=labels.cpu(),
                                columns=list(rows[0]['correct']),
                                correct=np.array([list(row['correct'].values()) for row in rows]))


def write_figures(args, loaded, columns, rows, images, labels, names):
    """What --figures asks for."""
    groups, features = group_seeds(rows), {}
    plot_entropy_histogram(groups, len(names), args.entropy_threshold, args.figures)
    strongest = min(reversed(list(columns)[1:]),  # of equals the last
                    key=lambda title: sum(row['accuracy'][title] for row in rows))
    plot_entropy_vs_robustness(groups, strongest, args.entropy_threshold, args.figures)
    if 'pgd20 - worst' in rows[0]['accuracy']:
        attacks = [WRITTEN[title] for title in columns if title in WRITTEN]
        plot_pgd_vs_worst(groups, ', '.join(attacks), args.figures)
    classes = {names.index(name): name for name in args.tsne_classes or names[:2]}
    for name, group in groups.items():  # of several seeds the first
        model = loaded[group[0]['model']]
        if hasattr(model, 'features'):
            features[name] = adversarial_features(model.to(images.device), images, labels, classes,
                                                  args.epsilon, args.batch_size, args.seed)
        else:
            commands.say(f'{name}: no panel in tsne.png, the network has no `features`', sys.stderr)
    if min([len(y) for _, y in features.values()], default=0) < 5:
        commands.say('no tsne.png: fewer than 5 examples of its two classes', sys.stderr)
    else:
        plot_tsne(features, classes, args.seed, args.figures)
    if any(row['log'] for row in rows):
        plot_training_curves(groups, args.figures)
    else:
        commands.say('no training_curves.png: no log.csv beside any model', sys.stderr)


def main(argv=None):
    with commands.exit_status():
        args = parse_args(argv)
        with commands.mistakes():
            loaded, images, labels, names = prepare(args)
            rank, _ = commands.init_processes(images.device, timedelta(days=30))
        try:
            columns, rows = measure(args, loaded, images, labels)
            heads = [title if attack == 'clean' else f'{title} ({epsilon_text(epsilon)})'
                     for title, (attack, epsilon, _) in columns.items()]
            heads += list(rows[0]['accuracy'])[len(heads):]
            if rank == 0:
                with commands.mistakes():
                    write_numbers(args, columns, heads, rows, labels)
                    if args.figures:
                        write_figures(args, loaded, columns, rows, images, labels, names)
                commands.say(tables(args, heads, rows))
            commands.over_processes(0)  # none leaves while another still needs it
        except KeyboardInterrupt:
            raise commands.Stop('interrupted; the same command goes on where it was', 130) from None


if __name__ == '__main__':
    main()
