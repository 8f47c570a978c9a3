"""Tables and figures of this study, from the outcomes that evaluate.py has saved.

    python results/analysis.py [--no-figures]

Differences are in points of accuracy in the worst case of PGD-20 and LS. Intervals are 95 %
t-intervals over seeds; the standard error is over test images, paired.
"""
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

HERE = Path(__file__).parent
COLORS = {'AT': '#0072B2', 'TRADES': '#D55E00', 'MART': '#009E73', 'GAIRAT': '#CC79A7'}
PAPER_GAIN = 0.4  # the paper's smallest AutoAttack gain on CIFAR-10 without extra data, 0.44
MEASURES = {'entropy of f(x)': ('clean', 'entropy', -1), '1 - p_y(x)': ('clean', 'p_wrong', -1),
            'margin of f(x)': ('clean', 'margin', 1), 'kappa': ('pgd20', 'kappa', 1),
            'entropy of f(x_adv)': ('pgd20', 'entropy', -1),
            'margin of f(x_adv)': ('pgd20', 'margin', 1)}  # column, name, 1 if high means robust
plt.rcParams.update({'font.size': 7, 'legend.fontsize': 6, 'legend.frameon': False,
                     'axes.grid': True, 'grid.linewidth': 0.3, 'pdf.fonttype': 42})


def load():
    """{(experiment, model, seed): {'accuracy', 'dose', 'worst': (N,), (column, measure): (N,)}}."""
    runs = {}
    for path in sorted(HERE.glob('*/outcomes*.json')):
        file, doses = dict(np.load(path.with_suffix('.npz'))), path.parent / 'doses.json'
        doses = json.loads(doses.read_text()) if doses.exists() else {}  # with each run's own tau
        for i, row in enumerate(json.loads(path.read_text())['models']):
            seed = re.search(r'seed(\d+)', row['model'] + path.stem)
            key = path.parent.name, row['model'].split('-seed')[0], int(seed[1])
            run = runs.setdefault(key, {})
            run['accuracy'] = 100 * row['accuracy']['worst']
            report = {} if 'tau' in row['model'] else row['report']  # which is for tau = 1
            run['dose'] = doses.get('{1}-seed{2}'.format(*key), report.get('sd_of_w', np.nan))
            for measure in file.keys() & {'correct', 'entropy', 'margin', 'p_wrong', 'kappa'}:
                run |= {(column, measure): file[measure][i, j].astype(float)
                        for j, column in enumerate(file['columns'])}
            run['worst'] = np.all([run[c, 'correct'] for c in ('clean', 'pgd20', 'ls')], axis=0)
    return runs


def interval(values):
    """Mean and half the width of the 95 % t-interval; NaN with fewer than two values."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else np.nan
    return np.mean(values), half


def table(title, header, rows):
    print(f'{title}\n\n| {" | ".join(header)} |\n| :-- |{" --: |" * (len(header) - 1)}')
    print(*(f'| {" | ".join(map(str, row))} |\n'.replace('nan', '-') for row in rows), sep='')


def differences(runs):
    """EW minus control and EW minus plain for each experiment and method, over common seeds.

    If EW runs have collapsed to chance, once more without them. In the figure, the band marks gains
    smaller than the paper's smallest.
    """
    rows = []
    for e, m in dict.fromkeys((e, m[3:]) for e, m, _ in runs if m[3:] in COLORS):
        for name, other in (('control', f'{m}, tau inf'), ('plain', m),
                            ('control, twice the learning rate', f'{m}, tau inf, lr 0.04')):
            common = [s for s in range(1, 100) if {(e, f'EW-{m}', s), (e, other, s)} <= runs.keys()]
            learned = [s for s in common if runs[e, f'EW-{m}', s]['accuracy'] > 15]  # 10 is chance
            for seeds in [common] if learned == common else [common, learned]:
                if not seeds:
                    continue
                ours = [runs[e, f'EW-{m}', s] for s in seeds]
                theirs = [runs[e, other, s] for s in seeds]
                mean, half = interval([a['accuracy'] - b['accuracy'] for a, b in zip(ours, theirs)])
                paired = [1.0 * a['worst'] - b['worst'] for a, b in zip(ours, theirs)]
                se = 100 * stats.sem(np.mean(paired, axis=0))
                dose = np.mean([a['dose'] for a in ours])
                label = name + ', without collapse' * (seeds != common)
                rows.append((e, m, label, dose, mean, half, se, len(seeds)))
    table('EW minus control and EW minus plain, points of accuracy in the worst case',
          ['experiment', 'method', 'EW minus', 'dose', 'difference', '± 95 % over seeds',
           'standard error over images', 'seeds'],
          [(*names, f'{dose:.2f}', f'{mean:+.2f}', f'{half:.2f}', f'{se:.2f}', count)
           for *names, dose, mean, half, se, count in rows])
    panels = {e: [row for row in rows if row[0] == e] for e, *_ in rows}
    fig, axes = plt.subplots(len(panels), figsize=(3.5, 0.8 + 0.17 * len(rows)), squeeze=False,
                             layout='constrained', height_ratios=[*map(len, panels.values())])
    for ax, (experiment, shown) in zip(axes.flat, panels.items()):
        ax.axvspan(-PAPER_GAIN, PAPER_GAIN, color='0.85')
        for y, (_, method, name, _, mean, half, _, _) in enumerate(shown):
            ax.errorbar(mean, y, xerr=np.nan_to_num(half), fmt='o', markersize=3.5,
                        color=COLORS[method], fillstyle='none' if 'plain' in name else 'full')
        ax.set_yticks(range(len(shown)), [f'EW-{m} minus {n} ({k})' for _, m, n, *_, k in shown])
        ax.set(title=experiment, ylim=(len(shown) - 0.5, -0.5))
    axes[-1, 0].set_xlabel('difference in points')
    return fig


def dose_response(runs):
    """The slope of the worst case against the dose, for each complete seed of EW-AT on CIFAR-10.

    A seed's runs must be from one type of CPU; seeds 1 and 2 of the other tables are from others.
    """
    runs, names = dict(runs), [f'EW-AT, tau {tau}' for tau in ('0.1', '0.25', '0.5', '1', 'inf')]
    for seed in (3, 4, 5):
        runs['cifar10', names[3], seed] = runs['cifar10', 'EW-AT', seed]
        runs['cifar10', names[4], seed] = runs['cifar10', 'AT, tau inf', seed] | {'dose': 0.0}
    blocks = {seed: [runs.get(('cifar10', name, seed)) for name in names] for seed in range(1, 6)}
    points = {seed: [(run['dose'], run['accuracy']) for run in block]
              for seed, block in blocks.items() if all(block)}
    slopes = {seed: np.polyfit(*zip(*p), 1)[0] for seed, p in points.items()}
    mean, half = interval([*slopes.values()])
    table(f'Dose and response, EW-AT on CIFAR-10: slope {mean:+.2f} ± {half:.2f} per unit of dose',
          ['seed', *(f'{name[7:]}: dose, worst case' for name in names), 'slope'],
          [(seed, *(f'{dose:.2f}, {accuracy:.2f}' for dose, accuracy in p), f'{slopes[seed]:+.2f}')
           for seed, p in points.items()])
    fig, ax = plt.subplots(figsize=(3.5, 2.5), layout='constrained')
    for marker, (seed, p) in zip('os^Dv', points.items()):
        gains = [(dose, accuracy - p[-1][1]) for dose, accuracy in p]  # p[-1] is the control
        ax.plot(*zip(*gains), marker=marker, markersize=3.5, linewidth=0.8, color=COLORS['AT'],
                fillstyle='none', label=f'seed {seed}')
    ax.axhspan(-PAPER_GAIN, PAPER_GAIN, color='0.9')
    ax.set(xlabel='dose: standard deviation of w', ylabel='worst case minus control (points)',
           ylim=(-1, 1))
    ax.legend()
    return fig


def premise(runs):
    """AUC: how well each measure of an example predicts that it withstands the worst case.

    It is computed on the correctly classified examples and on those of them that withstand PGD-20
    (survivors). On the former, the sign of the margin of f(x_adv) tells whether PGD-20 succeeds.
    """
    rows = []
    for (experiment, method, seed), run in runs.items():
        if method in COLORS and ('clean', 'entropy') in run and seed == 1:
            correct = run['clean', 'correct'] == 1
            for among, chosen in (('correctly classified', correct),
                                  ('PGD-20 survivors', correct & (run['pgd20', 'correct'] == 1))):
                if len(set(run['worst'][chosen])) < 2:
                    continue  # an AUC needs both kinds of examples
                aucs = [roc_auc_score(run['worst'][chosen], sign * run[column, name][chosen])
                        for column, name, sign in MEASURES.values()]
                aucs[-1] = np.nan if chosen is correct else aucs[-1]
                rows.append((experiment, method, among, aucs))
    table('AUC: how well each measure predicts that an example withstands the worst case',
          ['experiment', 'method', 'among', *MEASURES],
          [(*names, *(f'{auc:.2f}' for auc in aucs)) for *names, aucs in rows])
    fig, axes = plt.subplots(1, 2, figsize=(5.5, 2), layout='constrained', sharey=True)
    for ax, among in zip(axes, ('correctly classified', 'PGD-20 survivors')):
        for _, method, _, aucs in [r for r in rows if (r[0], r[2]) == ('cifar10', among)]:
            ax.plot(aucs, range(len(aucs)), 'o', fillstyle='none', markersize=4, label=method,
                    color=COLORS[method])
        ax.set_yticks(range(len(MEASURES)), MEASURES)
        ax.set(xlabel='AUC', title=f'among {among}', xlim=(0.45, 1), ylim=(5.5, -0.5))
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4)
    return fig


if __name__ == '__main__':
    outcomes = load()
    for name, analyze in (('differences', differences), ('cifar10/dose_response', dose_response),
                          ('cifar10/auc', premise)):
        fig = analyze(outcomes)
        for kind in [] if '--no-figures' in sys.argv else ['png', 'pdf']:
            fig.savefig(HERE / f'{name}.{kind}', dpi=200)
