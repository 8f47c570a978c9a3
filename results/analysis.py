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
            name, seed = row['model'], re.search(r'seed(\d+)', row['model'] + path.stem)[1]
            run = runs.setdefault((path.parent.name, name.split('-seed')[0], int(seed)), {})
            run['accuracy'] = 100 * row['accuracy']['worst']
            dose = 0.0 if 'tau inf' in name else row['report'].get('sd_of_w', np.nan)
            run['dose'] = doses.get(f'{name.split("-seed")[0]}-seed{seed}', dose)
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
    """EW minus control and EW minus plain for each experiment and method, over common seeds; if EW
    runs have collapsed to chance, once more without them."""
    rows = []
    for e, m in dict.fromkeys((e, m[3:]) for e, m, _ in runs if m[3:] in COLORS):
        for name, other in (('control', f'{m}, tau inf'), ('plain', m),
                            ('control, twice the learning rate', f'{m}, tau inf, lr 0.04')):
            pairs = [(run, runs[e, other, seed]) for (*key, seed), run in runs.items()
                     if key == [e, f'EW-{m}'] and (e, other, seed) in runs]
            learned = [pair for pair in pairs if pair[0]['accuracy'] > 15]  # 10 is chance
            for chosen, suffix in ((pairs, ''), (learned, ', without collapse')):
                if chosen and (chosen is pairs or len(learned) < len(pairs)):
                    change = interval([ew['accuracy'] - run['accuracy'] for ew, run in chosen])
                    paired = np.mean([1.0 * ew['worst'] - run['worst'] for ew, run in chosen], 0)
                    rows.append((e, m, name + suffix, np.mean([ew['dose'] for ew, _ in chosen]),
                                 *change, 100 * stats.sem(paired), len(chosen)))
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
    """The slope of the worst case against the dose, for five seeds of EW-AT on CIFAR-10, each on
    one type of CPU: for this, tau = 1 and inf of seeds 1 and 2 were trained again."""
    taus = {'0.1': '', '0.25': '', '0.5': '', '1': 'EW-AT', 'inf': 'AT, tau inf'}
    slopes, rows = [], []
    fig, ax = plt.subplots(figsize=(3.5, 2.5), layout='constrained')
    for marker, seed in zip('os^Dv', range(1, 6)):
        block = [runs.get(('cifar10', f'EW-AT, tau {tau}', seed)) or runs['cifar10', other, seed]
                 for tau, other in taus.items()]
        doses, accuracies = np.array([(run['dose'], run['accuracy']) for run in block]).T
        slopes.append(np.polyfit(doses, accuracies, 1)[0])
        rows.append((seed, *map('{:.2f}, {:.2f}'.format, doses, accuracies), f'{slopes[-1]:+.2f}'))
        ax.plot(doses, accuracies - accuracies[-1], marker=marker, markersize=3.5, linewidth=0.8,
                color=COLORS['AT'], fillstyle='none', label=f'seed {seed}')
    mean, half = interval(slopes)
    table(f'Dose and response, EW-AT on CIFAR-10: slope {mean:+.2f} ± {half:.2f} per unit of dose',
          ['seed', *(f'tau {tau}: dose, worst case' for tau in taus), 'slope'], rows)
    ax.axhspan(-PAPER_GAIN, PAPER_GAIN, color='0.9')
    ax.set(xlabel='dose: standard deviation of w', ylabel='points above the control', ylim=(-1, 1))
    ax.legend()
    return fig


def premise(runs):
    """AUC: how well each measure of an example predicts that it withstands the worst case, among
    the correctly classified examples and among those of them that withstand PGD-20 (survivors). On
    the former, the sign of the margin of f(x_adv) tells whether PGD-20 succeeds."""
    rows, groups = [], ('correctly classified', 'PGD-20 survivors')
    for (experiment, method, seed), run in runs.items():
        if method in COLORS and ('clean', 'entropy') in run and seed == 1:
            correct = run['clean', 'correct'] == 1
            for among, chosen in zip(groups, (correct, correct & (run['pgd20', 'correct'] == 1))):
                if len(set(run['worst'][chosen])) == 2:  # an AUC needs both kinds of examples
                    aucs = [roc_auc_score(run['worst'][chosen], sign * run[column, name][chosen])
                            for column, name, sign in MEASURES.values()]
                    aucs[-1] = np.nan if chosen is correct else aucs[-1]
                    rows.append((experiment, method, among, aucs))
    table('AUC: how well each measure predicts that an example withstands the worst case',
          ['experiment', 'method', 'among', *MEASURES],
          [(*names, *map('{:.2f}'.format, aucs)) for *names, aucs in rows])
    fig, axes = plt.subplots(1, 2, figsize=(5.5, 2), layout='constrained', sharey=True)
    for ax, among in zip(axes, groups):
        for _, method, _, aucs in [r for r in rows if (r[0], r[2]) == ('cifar10', among)]:
            ax.plot(aucs, [*MEASURES], 'o', fillstyle='none', markersize=4, label=method,
                    color=COLORS[method])
        ax.set(xlabel='AUC', title=f'among {among}', xlim=(0.45, 1), ylim=(5.5, -0.5))
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside upper center', ncols=4)
    return fig


if __name__ == '__main__':
    outcomes = load()
    for name, analyze in {'differences': differences, 'cifar10/dose_response': dose_response,
                          'cifar10/auc': premise}.items():
        fig = analyze(outcomes)
        for kind in [] if '--no-figures' in sys.argv else ['png', 'pdf']:
            fig.savefig(HERE / f'{name}.{kind}', dpi=200)
