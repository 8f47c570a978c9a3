"""Tables and figures of the study in this folder, from the outcomes that evaluate.py has saved.

    python results/analysis.py                  # prints all tables and draws all figures
    python results/analysis.py --no-figures     # prints all tables

Every table is Markdown. Differences are in points of accuracy in the worst case of PGD-20 and LS.
The interval is a 95 % t-interval over seeds; the standard error is over test images, paired.
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
METHODS = 'AT', 'TRADES', 'MART', 'GAIRAT'
COLOURS = dict(zip(METHODS, ('#0072B2', '#D55E00', '#009E73', '#CC79A7')))
PAPER_GAIN = 0.4  # points, the paper's smallest gain on CIFAR-10: less counts as no difference
MEASURES = {  # column, measure, the examples among which it is judged: correct under that column
    'entropy of f(x)': ('clean', 'entropy', 'clean'), '1 - p_y(x)': ('clean', 'p_wrong', 'clean'),
    'margin of f(x)': ('clean', 'margin', 'clean'), 'kappa': ('pgd20', 'kappa', 'clean'),
    'entropy of f(x_adv)': ('pgd20', 'entropy', 'clean'),
    'entropy of f(x_adv), survivors': ('pgd20', 'entropy', 'pgd20'),
    'margin of f(x_adv), survivors': ('pgd20', 'margin', 'pgd20')}
plt.rcParams.update({'font.size': 7, 'legend.fontsize': 6, 'legend.frameon': False,
                     'axes.grid': True, 'grid.linewidth': 0.3, 'pdf.fonttype': 42})


def load():
    """{(experiment, model, seed): {'accuracy', 'dose', 'worst': (N,), (column, measure): (N,)}}.

    From outcomes*.json, written by evaluate.py --json, and the .npz of --save-outcomes beside it.
    """
    runs = {}
    for path in sorted(HERE.glob('*/outcomes*.json')):
        arrays = path.with_suffix('.npz')
        file = dict(np.load(arrays)) if arrays.exists() else {}
        doses = path.parent / 'doses.json'  # with each run's own tau
        doses = json.loads(doses.read_text()) if doses.exists() else {}
        for i, row in enumerate(json.loads(path.read_text())['models']):
            seed = re.search(r'seed(\d+)', row['model'] + path.stem)
            key = path.parent.name, row['model'].split('-seed')[0], int(seed[1] if seed else 1)
            run = runs.setdefault(key, {})
            run['accuracy'] = 100 * row['accuracy']['worst']
            run['dose'] = doses.get(row['model'], run.get('dose', np.nan))
            columns = list(file.get('columns', []))
            for measure in set(file) & {'correct', 'entropy', 'margin', 'p_wrong', 'kappa'}:
                run |= {(c, measure): file[measure][i, j].astype(float)
                        for j, c in enumerate(columns)}
            if file:
                run['worst'] = np.all([run[c, 'correct'] for c in ('clean', 'pgd20', 'ls')], axis=0)
    return runs


def interval(values):
    """Mean and half the width of the 95 % t-interval; NaN with fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    return values.mean(), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)


def table(header, rows):
    print('| ' + ' | '.join(header) + ' |\n| :-- |' + ' --: |' * (len(header) - 1))
    for row in rows:
        print('| ' + ' | '.join(row) + ' |')
    print()


def differences(runs):
    """EW minus control and EW minus plain for each experiment and method, over common seeds."""
    rows = []
    for experiment in dict.fromkeys(key[0] for key in runs):
        for method in METHODS:
            for other, name in ((f'{method}, tau inf', 'control'), (method, 'plain')):
                seeds = [s for e, m, s in runs if (e, m) == (experiment, f'EW-{method}')
                         and (experiment, other, s) in runs]
                if not seeds:
                    continue
                pairs = [(runs[experiment, f'EW-{method}', s], runs[experiment, other, s])
                         for s in seeds]
                d = [a['accuracy'] - b['accuracy'] for a, b in pairs]
                paired = [a['worst'].astype(float) - b['worst'] for a, b in pairs if 'worst' in a]
                se = 100 * stats.sem(np.mean(paired, axis=0)) if paired else np.nan
                dose = np.mean([a['dose'] for a, _ in pairs if a['dose'] == a['dose']] or [np.nan])
                rows.append((experiment, method, name, dose, *interval(d), se, len(seeds)))
    print('EW minus control and EW minus plain, points of accuracy in the worst case\n')
    table(['experiment', 'method', 'EW minus', 'dose', 'difference', '± 95 % over seeds',
           'standard error over images', 'seeds'],
          [(e, m, n, *(f'{x:{f}}'.replace('nan', '-') for x, f in (
              (dose, '.2f'), (mean, '+.2f'), (half, '.2f'), (se, '.2f'))), str(k))
           for e, m, n, dose, mean, half, se, k in rows])
    return rows


def dose_response(runs):
    """The slope of the worst case against the dose, for each complete seed of EW-AT on CIFAR-10."""
    points = {}
    for (experiment, method, seed), run in runs.items():
        tau = re.fullmatch(r'EW-AT, tau ([\d.]+)|(EW-AT)|AT, tau (inf)', method)
        if experiment == 'cifar10' and tau:
            dose = 0.0 if tau[3] else run['dose']
            points.setdefault(seed, {})[tau[1] or tau[3] or '1'] = dose, run['accuracy']
    points = {seed: p for seed, p in points.items() if len(p) == 5}
    if not points:
        return print('Dose and response: no complete seed yet\n')
    slopes = [np.polyfit(*zip(*p.values()), 1)[0] for p in points.values()]
    mean, half = interval(slopes)
    print(f'Dose and response, EW-AT on CIFAR-10: slope {mean:+.2f} points per unit of dose, 95 % '
          f'interval ± {half:.2f}; complete seeds: {len(points)}\n')
    taus = sorted(next(iter(points.values())), key=float)
    table(['seed', *(f'tau {t}: dose, worst case' for t in taus), 'slope'],
          [(str(s), *(f'{p[t][0]:.2f}, {p[t][1]:.2f}' for t in taus), f'{slope:+.2f}')
           for (s, p), slope in zip(points.items(), slopes)])
    fig, ax = plt.subplots(figsize=(3.5, 2.5), layout='constrained')
    for marker, (seed, p) in zip('os^Dv', points.items()):
        ax.plot(*zip(*sorted(p.values())), marker=marker, markersize=3.5, linewidth=0.8,
                color=COLOURS['AT'], fillstyle='none', label=f'seed {seed}')
    middle = np.mean([p['inf'][1] for p in points.values()])  # of the control
    ax.axhspan(middle - PAPER_GAIN, middle + PAPER_GAIN, color='0.9')
    ax.set(xlabel='dose: standard deviation of w', ylabel='accuracy in the worst case (%)',
           ylim=(middle - 1, middle + 1))
    ax.legend()
    save(fig, 'cifar10/dose_response')


def premise(runs):
    """AUC: how well a measure of an example predicts that it withstands the worst case.

    Judged among the examples that are classified correctly or, for survivors, among those that
    withstand PGD-20: among all, the margin on x_adv would be right by construction.
    """
    rows = []
    for (experiment, method, seed), run in runs.items():
        if method in METHODS and ('clean', 'entropy') in run and seed == 1:
            aucs = []
            for column, measure, among in MEASURES.values():
                chosen = run[among, 'correct'] == 1
                sign = 1 if measure in ('margin', 'kappa') else -1
                value = sign * run[column, measure][chosen]
                aucs.append(roc_auc_score(run['worst'][chosen], value))
            rows.append((experiment, method, *aucs))
    print('AUC: how well each measure predicts that an example withstands the worst case\n')
    table(['experiment', 'method', *MEASURES], [
        (e, m, *(f'{a:.2f}' for a in aucs)) for e, m, *aucs in rows])
    fig, ax = plt.subplots(figsize=(3.5, 2.2), layout='constrained')
    for e, method, *aucs in rows:
        if e == 'cifar10':
            ax.plot(aucs, range(len(aucs)), 'o', fillstyle='none', markersize=4, label=method,
                    color=COLOURS[method])
    ax.set_yticks(range(len(MEASURES)), MEASURES)
    ax.set(xlabel='AUC', xlim=(0.5, 1), ylim=(len(MEASURES) - 0.5, -0.5))
    fig.legend(loc='outside upper center', ncols=4)
    save(fig, 'cifar10/auc')


def forest(rows):
    """EW minus control and EW minus plain with their intervals, and the paper's smallest gain."""
    experiments = list(dict.fromkeys(row[0] for row in rows))
    counts = [sum(row[0] == e for row in rows) for e in experiments]
    fig, axes = plt.subplots(len(counts), figsize=(3.5, 0.8 + 0.17 * len(rows)), squeeze=False,
                             layout='constrained', height_ratios=counts)
    for ax, experiment in zip(axes.flat, experiments):
        shown = [row for row in rows if row[0] == experiment]
        ax.axvspan(-PAPER_GAIN, PAPER_GAIN, color='0.85')
        for y, (_, method, name, _, mean, half, _, _) in enumerate(shown):
            ax.errorbar(mean, y, xerr=None if np.isnan(half) else half, fmt='o', markersize=3.5,
                        color=COLOURS[method], fillstyle='full' if name == 'control' else 'none')
        ax.set_yticks(range(len(shown)), [f'EW-{m} minus {n} ({k})' for _, m, n, *_, k in shown])
        ax.set(title=experiment, ylim=(len(shown) - 0.5, -0.5))
    axes[-1, 0].set_xlabel('difference in points')
    save(fig, 'differences')


def save(fig, name):
    for kind in [] if '--no-figures' in sys.argv else ['png', 'pdf']:
        fig.savefig(HERE / f'{name}.{kind}', dpi=200)
    plt.close(fig)


def main():
    runs = load()
    forest(differences(runs))
    dose_response(runs)
    premise(runs)


if __name__ == '__main__':
    main()
