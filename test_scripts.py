"""The commands, end to end; in this process, except where the process itself is what is tested."""
import argparse
import copy
import csv
import datetime
import fcntl
import fnmatch
import importlib
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter, defaultdict, deque
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import matplotlib.axes
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import bookkeeping
import commands
import data
import evaluate
import models
import train_at
import train_trades

torch.set_num_threads(1)  # small work: more threads only get in each other's way

ROOT = Path(__file__).parent
ALGORITHMS = 'at', 'trades', 'mart', 'gairat'
METHODS = {ew + algorithm: (f'train_{algorithm}', '--entropy-weight' if ew else '')
           for algorithm in ALGORITHMS for ew in ('', 'ew-')}
# Steps of 16, 16, 16 and 4 images in each of two epochs
TINY = ('--dataset digits --train-size 52 --test-size 16 --epochs 2 --num-steps 2 --batch-size 16 '
        '--no-cuda --model-dir run')
EPOCH_LINE = r'^epoch \d/2 .*clean .*pgd10 .*entropy .*images/s .*min left$'
every_algorithm = pytest.mark.parametrize('algorithm', ALGORITHMS)


def main_of(script, *args, status=0):
    """(stdout, stderr) of a script's main() in this process, which ends with that exit status."""
    out, err, got = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, 'argv', [f'{script}.py', *' '.join(map(str, args)).split()])
        patch.setattr(signal, 'signal', lambda *args: None)  # its handlers would outlive it
        try:
            importlib.import_module(script).main()
        except SystemExit as error:
            got = error.code
    assert got == status, err.getvalue()
    return out.getvalue(), err.getvalue()


def fails(script, *args, status=2):
    """The one line on stderr with which a script's main() ends."""
    out, told = main_of(script, *args, status=status)
    assert re.fullmatch(rf'{script}\.py: {"error: " * (status == 2)}.+\n', told), told
    assert out == '' or status != 2
    return told


def python(*args):
    """A command as a user types it: its exit status, stdout and stderr."""
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, *map(str, args)], env=env, text=True, timeout=300,
                          capture_output=True)


def spy(patch, owner, name, see):
    """Let see(result, *args, **options) follow each call of the function owner.name."""
    function = getattr(owner, name)
    def spied(*args, **options):
        result = function(*args, **options)
        see(result, *args, **options)
        return result
    patch.setattr(owner, name, spied)


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as f:
        return list(csv.DictReader(f))


def rows_of(directory='run'):
    return read_csv(f'{directory}/log.csv')


def last_of(directory='run', name='last'):
    return models.read_checkpoint(f'{directory}/{name}.pt')


def comparable(value):
    """Without the clock and what a resumed run may be given anew; tensors to the bit."""
    if isinstance(value, dict):
        left_out = 'images_per_s', 'seconds', 'args', 'versions'
        return {k: comparable(v) for k, v in value.items() if k not in left_out}
    if isinstance(value, list):
        return [comparable(v) for v in value]
    return value.numpy().tobytes() if torch.is_tensor(value) else value


def same_run(a, b):
    """Whether two runs left the same weights, averages, momenta, logs and choice of best.pt."""
    return comparable(rows_of(a)) == comparable(rows_of(b)) and all(
        comparable(last_of(a, name)) == comparable(last_of(b, name)) for name in ('last', 'best'))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The eight methods, trained on a few digits; {name: directory}."""
    found = {name: tmp_path_factory.mktemp('runs') / name for name in METHODS}
    for name, (script, flag) in METHODS.items():
        sums = []
        with pytest.MonkeyPatch.context() as patch:
            spy(patch, importlib.import_module(script), 'loss_function',
                lambda loss, **options: sums.append(loss.item()))
            out, _ = main_of(script, TINY, flag, '--model-dir', found[name])
        assert len(re.findall(EPOCH_LINE, out, re.M)) == 2
        losses = [row['loss'] for row in last_of(found[name])['log']]  # means over the images
        assert losses == pytest.approx([sum(sums[:4]) / 52, sum(sums[4:]) / 52])
    return found


def test_each_method_leaves_its_log_configuration_and_weights(runs):
    weights, columns = set(), 'epoch lr loss clean pgd10 entropy high_entropy images_per_s seconds'
    for name, directory in runs.items():
        assert sorted(os.listdir(directory)) == '.lock best.pt config.json last.pt log.csv'.split()
        rows = [{k: float(v) for k, v in row.items()} for row in rows_of(directory)]
        assert [(row['epoch'], row['lr']) for row in rows] == [(1, 0.02), (2, 0.02)]
        for row in rows:
            assert ' '.join(row) == columns and row['loss'] > 0 and row['images_per_s'] > 0
            assert 0 <= row['pgd10'] <= 1 and 0 < row['entropy'] < 2.31
        assert 0 < rows[0]['seconds'] < rows[1]['seconds']
        config = json.loads((directory / 'config.json').read_text())
        assert config['args']['epsilon'] == 0.1 and config['args']['lr'] == 0.02
        assert 'torch' in config['versions'] and config['processes'] == 1
        about = [last_of(directory, 'best')[k] for k in ('algorithm', 'dataset', 'arch')]
        assert about == [name.removeprefix('ew-'), 'digits', 'smallcnn']
        model = models.load_model(directory / 'last.pt', num_classes=10)  # which are finite
        weights.add(comparable(model.classifier.fc3.weight.detach()))
        assert not model.training
    assert len(weights) == len(runs) == 8  # another loss gives other weights


def test_the_log_is_what_the_weights_do_measured_without_gradients_of_them(runs):
    model, seen = models.load_model(runs['ew-trades'] / 'last.pt').train(), []
    model.classifier.fc1.weight.requires_grad_(False)
    needed = [p.requires_grad for p in model.parameters()]
    model.register_forward_hook(
        lambda *_: seen.append(any(p.requires_grad for p in model.parameters())))
    images, labels = data.load_data('digits', train=False, size=16)
    again = evaluate.evaluate_epoch(model, images, labels, 0.1, 512, seed=1)
    logged = {k: float(rows_of(runs['ew-trades'])[-1][k]) for k in again}
    assert logged == pytest.approx(again, abs=1e-6)
    assert len(seen) == 12 and not any(seen)
    assert [p.requires_grad for p in model.parameters()] == needed and model.training


def test_a_command_says_what_it_does_and_does_the_same_in_another_process(runs):
    done = python(ROOT / 'train_at.py', *TINY.split(), '--log-interval', 2)
    assert done.returncode == 0 and done.stderr == ''
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith('at: smallcnn, 2 epochs of 52 images of digits, 1 process(es) on ')
    assert ' CPU, ' in first and first.endswith('selected on the test images (optimistic)')
    assert [line.split('  ')[:2] for line in lines if 'step' in line] == [
        [f'epoch {e}/2', f'step {s}/4'] for e in (1, 2) for s in (2, 4)]
    assert len(re.findall(EPOCH_LINE, done.stdout, re.M)) == 2 and len(lines) == 6
    assert last.startswith('best epoch ') and last.endswith('--model-path run/best.pt')
    assert same_run('run', runs['at'])


def test_each_list_of_numbers_seeds_draws_of_its_own():
    lists = [(1,), (1, 0), (1, 0, 0), (1, 0, 0, 1), (0,), (0, 1), (1, 1), (1, 1, 0), (2,)]
    draws = [(commands.seed_everything(*each), torch.rand(()).item())[1] for each in lists * 2]
    assert draws[:len(lists)] == draws[len(lists):] and len(set(draws)) == len(lists)


def test_each_seed_epoch_and_step_draws_anew(runs, monkeypatch):
    drawn = []
    spy(monkeypatch, train_at, 'attack', lambda adv, model, x, x_start, y, *args: drawn.append(
        (tuple(y.tolist()), (x_start - x).sum().item(), torch.initial_seed())))
    for seed in (1, 2):
        main_of('train_at', TINY, f'--seed {seed} --model-dir {seed}')
    # No two of 2 * 8 steps have the images, the start or the dropout in common
    assert [len(set(column)) for column in zip(*drawn)] == [16] * 3
    assert same_run('1', runs['at']) and not same_run('2', runs['at'])


def evaluations(monkeypatch, *rows):
    """Let the epochs of a run measure these."""
    rows = iter([dict(clean=0.5, entropy=1, high_entropy=0, ema_clean=0.25, ema_entropy=2,
                      ema_high_entropy=0) | row for row in rows])
    monkeypatch.setattr(evaluate, 'evaluate_epoch', lambda *args, **options: next(rows))


@pytest.mark.parametrize('flag, chosen', [('', 'pgd10'), ('--ema 0.9', 'ema_pgd10')])
def test_best_is_the_first_epoch_of_highest_pgd10(flag, chosen, monkeypatch):
    """Of the average, where there is one; --save-freq keeps others."""
    rows = [{'clean': a, 'pgd10': b, chosen: c} for a, b, c in (
        (0.9, 0.4, 0.1), (0.7, 0.2, 0.3), (0.8, 0.1, 0.3), (0.6, 0.3, 0.2))]
    evaluations(monkeypatch, *rows)
    out, _ = main_of('train_at', TINY, flag, '--epochs 4 --save-freq 2')
    best = 'clean 25.00%, pgd10 30.00% (average)' if flag else 'clean 70.00%, pgd10 30.00%'
    assert f'\nbest epoch 2: {best}. Next: ' in out and f'{best}  entropy' in out
    assert [row[chosen] for row in last_of()['log']] == [0.1, 0.3, 0.3, 0.2]
    kept = {path.stem: last_of(name=path.stem)['epoch'] for path in Path('run').glob('*.pt')}
    assert kept == {'best': 2, 'last': 4, 'epoch-2': 2, 'epoch-4': 4}


# ---------------------------------------------------------------- arguments

BAD = [('--dataset svhn', 'svhn'), ('--arch vgg', 'vgg'), ('--unknown', '--unknown'),
       ('--arch wideresnet29-10', 'wideresnet29-10'), ('--entropy -w', '--entropy'),
       ('--dataset cifar10 --arch smallcnn', '28 x 28'), ('--lr-milestones 5 3', 'rise'),
       ('--lr-milestones 5 5', 'rise'), ('--lr-milestones -1', '-1'), ('--wd -1', '-1'),
       ('--train-size 1438', '1437'), ('--test-size 361', '360'), ('--epsilon 8', '8/255'),
       ('--epsilon 8/0', '8/0'), ('--lr inf', 'inf'), ('--seed -1', '-1'), ('--momentum x', 'x'),
       ('--val-size 15', 'multiple'), ('--train-size 100 --val-size 100', 'all that there are'),
       ('--extra-data none.npz', 'none.npz: no such file'), ('--model-dir /dev/null/run', '/dev/')]
BAD += [(f'{flag} {value}', flag) for value in ('0', '-1', 'nan', 'many')
        for flag in ('--epsilon', '--step-size', '--lr', '--tau', '--batch-size', '--epochs',
                     '--num-steps', '--log-interval', '--test-batch-size')]
BAD = [('at', *case) for case in BAD] + [(algorithm, args, args.split()[0]) for algorithm, args in (
    ('trades', '--beta -1'), ('mart', '--beta nan'), ('gairat', '--psi nan'),
    ('gairat', '--begin-epoch 21'), ('gairat', '--begin-epoch 0'))]


@pytest.mark.parametrize('algorithm, args, told', BAD)
def test_bad_input_is_one_line_and_nothing_written(algorithm, args, told):
    assert told in fails(f'train_{algorithm}', '--dataset digits', args)
    assert os.listdir() == []


def test_a_run_is_not_overwritten(runs):
    before = (runs['at'] / 'last.pt').read_bytes()
    assert f'{runs["at"]} already holds' in fails('train_at', TINY, '--model-dir', runs['at'])
    assert (runs['at'] / 'last.pt').read_bytes() == before
    shutil.copytree(runs['ew-at'], 'runs/digits-ew-at-seed2')  # by its default name
    told = fails('train_at', '--dataset digits --no-cuda --entropy-weight --seed 2')
    assert 'runs/digits-ew-at-seed2 already holds a run' in told


def test_a_data_set_that_is_nowhere(monkeypatch):
    download = Mock(side_effect=RuntimeError('Error downloading cifar-10-python.tar.gz'))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'download', download)
    Path('file').write_text('')
    for dataset, where in ('cifar10', 'there/cifar-10-batches-py'), ('mnist', 'file/MNIST/raw'):
        told = fails('train_at', '--dataset', dataset, '--data-dir', where.split('/')[0])
        assert f'{dataset.upper()} is not in {where} ' in told and '--dataset digits' in told


def test_no_visible_device_means_the_cpu_and_says_so(capsys, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert commands.pick_device() == commands.pick_device(no_cuda=True) == torch.device('cpu')
    told = capsys.readouterr().err
    assert "CUDA_VISIBLE_DEVICES=''" in told and 'CPU' in told and told.count('\n') == 1


@every_algorithm
def test_defaults_are_the_protocol_of_the_paper(algorithm):
    script = importlib.import_module(f'train_{algorithm}')
    def defaults(names, given=''):
        args = script.parse_args(given.split())
        return [getattr(args, name) for name in names.split()]
    names = 'arch epochs lr lr_milestones epsilon step_size num_steps weight_decay'
    cifar = ['preactresnet18', 110, 0.1, [100, 105], 8 / 255, 2 / 255, 10, 5e-4]
    mnist = ['smallcnn', 100, 0.01, [20, 40], 0.3, 0.01, 40, 1e-4]
    assert defaults(names) == defaults(names, '--dataset cifar10') == cifar
    assert defaults(names, '--dataset mnist') == mnist
    assert defaults('batch_size momentum tau') == [128, 0.9, 1]
    given = '--epochs 11 --epsilon 0.031 --entropy-weight --tau inf --wd 2e-4'
    names = 'lr_milestones epsilon tau weight_decay'
    assert defaults(names, given) == [[10, 11], 0.031, math.inf, 2e-4]
    options = {'at': [{}, {}], 'trades': [{'beta': 6}] * 2, 'mart': [{'beta': 6}] * 2,
               'gairat': [{'psi': math.inf}, {'psi': -1}]}  # weights from half of the epochs on
    args = script.parse_args(given.split())
    assert [script.loss_options(args, epoch) for epoch in (3, 4)] == options[algorithm]
    told, _ = main_of(f'train_{algorithm}', '--help')
    assert all(word in told for word in ('--entropy-weight', 'preactresnet18', 'lr_milestones'))


def test_learning_rates_at_the_first_middle_and_last_step():
    cosine = [2, 1 + math.cos(0.2 * math.pi), 1, 1 + math.cos(0.75 * math.pi), 0]
    for flags, rates in (('--lr-milestones 5 8', [2, 2, 0.2, 0.2, 0.02]),
                         ('--lr-milestones 9 --lr-warmup 4', [0, 1, 2, 2, 0.2]),
                         ('--lr-schedule cosine', cosine),
                         ('--lr-schedule onecycle', [0, 1, 2 * 5 / 6, 2 * 2.5 / 6, 0])):
        args = parsed('--epochs 10 --lr 2', flags)
        assert [train_at.learning_rate(args, t) for t in (0, 2, 5, 7.5, 10)] == pytest.approx(rates)


# ---------------------------------------------------------------- interrupted, resumed, bad days

EACH_STEP = '--save-every-minutes 1e-9'


@pytest.mark.parametrize('algorithm, step', [*zip(ALGORITHMS, (1, 2, 3, 2))])
def test_stopped_inside_an_epoch_and_resumed_is_exact(algorithm, step, runs, monkeypatch):
    steps, script = [], f'train_{algorithm}'
    def stop(_, run, loss):
        steps.append((run.epoch, run.step))
        if len(steps) == 4 + step:
            raise commands.Stop('stopped', 9)
    spy(monkeypatch, bookkeeping.Run, 'after_step', stop)
    main_of(script, TINY, '--entropy-weight', EACH_STEP, status=9)
    main_of(script, '--resume run')
    assert steps == [(epoch, step) for epoch in (0, 1) for step in (1, 2, 3, 4)]  # none twice
    assert same_run('run', runs[f'ew-{algorithm}'])
    main_of(script, '--resume run --epochs 3')  # goes on from the last
    assert [row['epoch'] for row in rows_of()] == ['1', '2', '3'] and len(steps) == 12


# Arguments: what the last process does before a step, which step, methods, flags
SCRIPT = """import importlib, os, signal, sys, time, torch, bookkeeping, commands
end, last, methods, *args = sys.argv[1:]
for number in signal.SIGINT, signal.SIGHUP:  # which nohup and shells let be ignored
    signal.signal(number, signal.SIG_DFL)
rank, share, steps, seeds = int(os.environ.get('RANK', 0)), bookkeeping.Run.share, [], set()
def ends(run, *tensors):
    steps.append(1)
    if rank == run.world - 1 and len(steps) == int(last):
        exec(end)
    return share(run, *tensors)
bookkeeping.Run.share = ends
if 'RANK' in os.environ:  # no dropout, which differs between the processes
    torch.nn.Dropout.forward = lambda self, x: (seeds.add(torch.initial_seed()), x)[1]
for name in methods.split(','):
    *ew, algorithm = name.split('-')
    sys.argv = [f'train_{algorithm}.py', *args, '--model-dir', name]
    sys.argv += ['--entropy-weight'] * len(ew)
    importlib.import_module(f'train_{algorithm}').main()
if 'RANK' in os.environ:
    of_both = [None, None]
    torch.distributed.all_gather_object(of_both, seeds)
    assert commands.over_processes(rank) == 1 and not of_both[0] & of_both[1]
"""
EXTRAS = '--ema 0.8 --awp-gamma 0.01 --awp-warmup 1 --lr-schedule cosine'


def interrupted(method, number, flags):
    """How a process ended that got a signal in the second step of epoch 2."""
    args = f'os.kill(os.getpid(),{int(number)}) 6 {method} {TINY} {flags}'
    done = python('-c', SCRIPT, *args.split())
    with open(f'{method}/log.csv', 'a') as log:
        log.write('2,0.02,1.2')  # a line cut off
    return done


@pytest.mark.parametrize('method, number, flags, status, step', [
    ('ew-gairat', signal.SIGKILL, EACH_STEP, -9, 1), ('at', signal.SIGINT, '', 130, 2),
    ('mart', signal.SIGTERM, '', 143, 2), ('ew-at', signal.SIGHUP, '', 129, 2)])
def test_a_signal_saves_and_says_how_to_go_on(method, number, flags, status, step, runs):
    done, script = interrupted(method, number, flags), METHODS[method][0]
    left = last_of(method)
    assert (done.returncode, left['epoch'], left['step']) == (status, 1, step)
    told = f'{script}.py: stopped; to go on: python {script}.py --resume {method}\n'
    assert done.stderr == told * (number != signal.SIGKILL)
    main_of(script, '--resume', method, '--log-interval 3')
    assert same_run(method, runs[method])


def test_a_signal_that_nohup_ignores_is_ignored():
    script = SCRIPT.replace('SIG_DFL', 'SIG_IGN')
    done = python('-c', script, 'os.kill(os.getpid(),signal.SIGHUP)', 2, 'at', *TINY.split())
    assert done.returncode == 0 and len(rows_of('at')) == 2


def test_averaged_weights_and_weight_perturbation_survive_as_well(monkeypatch):
    done = interrupted('trades', signal.SIGKILL, f'{EXTRAS} {EACH_STEP}')
    assert done.returncode == -signal.SIGKILL and last_of('trades')['step'] == 1
    main_of('train_trades', '--resume trades')
    calls, average, weight = [], {}, 'classifier.fc3.weight'
    def by_hand(_, run, loss):  # the weights before the first step do not count
        for k, v in run.model.state_dict().items():
            average[k] = 0.8 * average[k] + 0.2 * v.double() if k in average else v.double()
    spy(monkeypatch, bookkeeping.Run, 'after_step', by_hand)
    spy(monkeypatch, train_trades, 'loss_function', lambda loss, **options: calls.append(1))
    main_of('train_trades', TINY, EXTRAS)
    assert same_run('run', 'trades') and len(calls) == 4 + 2 * 4  # AWP from epoch 2 on
    last, model = last_of(), models.load_model('run/last.pt')
    for k, v in model.state_dict().items():  # the average is what counts
        assert torch.equal(v, last['ema_state_dict'][k])
        assert torch.allclose(v, average[k].float(), atol=1e-6), k
    assert not torch.equal(last['ema_state_dict'][weight], last['state_dict'][weight])
    images, labels = data.load_data('digits', train=False, size=16)
    again, rows = evaluate.evaluate_epoch(model, images, labels, 0.1, 512, seed=1), last['log']
    assert [rows[1]['ema_clean'], rows[1]['ema_pgd10']] == [again['clean'], again['pgd10']]
    lr = [0.01 * (1 + math.cos(math.pi * progress / 2)) for progress in (3.5 / 4, 1 + 3.5 / 4)]
    assert [row['lr'] for row in rows] == pytest.approx(lr)  # in the middle of the last step


def test_a_run_older_than_augment_goes_on_with_that_of_its_data_set(runs, monkeypatch):
    content = last_of(runs['at'])
    del content['args']['augment']
    content['args'] |= {'dataset': 'cifar10', 'lr_milestones': [2, 2]}
    models.save_checkpoint(content, 'last.pt')
    assert train_at.parse_args(['--resume', '.']).augment == 'crop-flip'


def test_what_cannot_be_resumed_is_refused_by_name(runs):
    for flag in ('--lr 0.5', '--epochs 1', '--entropy-weight', '--seed 2', '--dataset mnist'):
        assert flag in fails('train_at', '--resume', runs['at'], flag)
    assert 'train_mart.py' in fails('train_at', '--resume', runs['mart'])
    assert 'no such file' in fails('train_at', '--resume .')
    good = (runs['at'] / 'last.pt').read_bytes()
    malicious = type('Malicious', (), {'__reduce__': lambda self: (os.mkdir, ('ran',))})()
    files = [good[:-1000], good[:5000], b'', b'text', pickle.dumps(malicious)]
    for content in (malicious, {'state_dict': {}}, [1]):
        torch.save(content, file := io.BytesIO())
        files.append(file.getvalue())
    for content in files:
        Path('last.pt').write_bytes(content)
        assert 'last.pt' in fails('train_at', '--resume .')
    assert os.listdir() == ['last.pt']


@pytest.mark.parametrize('what, interval, calls', [
    ('loss', 1, 6), ('loss', 100, 8), ('weight', 100, 8)])
def test_what_is_not_finite_is_not_saved(what, interval, calls, monkeypatch):
    loss_function, steps = train_at.loss_function, []
    def spoiled(model, **options):
        steps.append(1)
        loss = loss_function(model, **options)
        if what == 'weight' and len(steps) == 8:
            model.classifier.fc3.bias.data.fill_(math.nan)
        return loss + (math.nan if what == 'loss' and len(steps) == 6 else 0)  # weights stay finite
    monkeypatch.setattr(train_at, 'loss_function', spoiled)
    err = fails('train_at', TINY, '--log-interval', interval, status=3)
    assert ('epoch 2, step 2,' if what == 'loss' else 'epoch 2,') in err and len(steps) == calls
    assert 'learning rate 0.02;' in err and last_of()['epoch'] == 1
    assert all(v.isfinite().all() for v in last_of()['state_dict'].values())


def test_a_run_that_stays_at_chance_for_five_epochs_is_stopped(monkeypatch):
    clean = [0.14, 0.14, 0.14, 0.15, *[0.14] * 20]
    evaluations(monkeypatch, *[dict(clean=v, pgd10=v) for v in clean])
    still = f'{TINY} --train-size 16 --epochs 12 --lr 1e-9'
    told = fails('train_at', still, status=3)
    assert 'chance' in told and 'best.pt is from epoch 4' in told and len(rows_of()) == 9
    main_of('train_at', '--resume run')  # goes on, since somebody asked for it
    assert len(rows_of()) == 12
    evaluations(monkeypatch, *[dict(clean=0.1, pgd10=0.1)] * 12)
    main_of('train_at', still, '--allow-chance --epochs 6 --model-dir asked')


def test_a_network_that_learns_slowly_is_not_stuck():
    log = [dict(clean=0.1, loss=2.3 - 0.01 * i) for i in range(9)]
    assert not bookkeeping.is_stuck(log, 10)
    assert bookkeeping.is_stuck([row | {'loss': 2.3} for row in log], 10)
    assert not bookkeeping.is_stuck([row | {'loss': 2.3} for row in log[:4]], 10)


@pytest.mark.parametrize('failing, status, lines, epoch', [
    (range(1), 0, 1, 2), (range(2, 99), 1, 2, 1)])
def test_a_full_disk_ends_no_run_and_spoils_no_file(failing, status, lines, epoch, monkeypatch):
    save, attempts = torch.save, []
    def full(content, file):
        attempts.append(1)
        if len(attempts) - 1 in failing:
            file.write(b'half')
            raise (RuntimeError if status else OSError)('No space left on device')
        save(content, file)
    monkeypatch.setattr(torch, 'save', full)
    _, told = main_of('train_at', TINY, status=status)
    assert told.count('\n') == told.count('could not save in run: ') == lines  # at the end too
    assert told.count('No space left') == lines and last_of()['epoch'] == epoch


def test_out_of_memory_names_the_batch_size(monkeypatch):
    monkeypatch.setattr(train_at, 'attack', Mock(side_effect=torch.OutOfMemoryError))
    assert '--batch-size' in fails('train_at', TINY, status=1)


def test_the_second_process_on_a_directory_is_refused(runs):
    shutil.copytree(runs['at'], 'old')
    for flags, new in (('--model-dir new', True), ('--resume old --model-dir old', False)):
        with bookkeeping.claim_directory(flags[-3:], new):
            assert 'another process' in fails('train_at', TINY, flags)
    bookkeeping.claim_directory('new', new=True).close()  # no file is what locks


# ---------------------------------------------------------------- several processes

# 70 images in batches of 23: shares of 12 and 11, and a last batch of one: one share is empty
SHARED = f'{TINY} --train-size 70 --batch-size 23 --epochs 1 --lr 0.05'
TERMINATED = 'os.kill(os.getppid(), signal.SIGTERM)\nwhile not run.signal: time.sleep(0.01)'


def torchrun(end, methods, flags):
    """Tried anew where Gloo aborted a process, as it does now and then."""
    Path('several.py').write_text(SCRIPT)
    for _ in range(4):
        for method in methods.split(',') * ('--resume' not in flags):
            shutil.rmtree(method, ignore_errors=True)
        done = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
                      'several.py', end, 2, methods, *flags.split())
        if 'SIGABRT' not in done.stderr:
            break
    return done


def test_two_processes_are_one_and_go_on_when_terminated(monkeypatch):
    done = torchrun('', ','.join(METHODS), SHARED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('best epoch') == 8  # one speaks
    monkeypatch.setattr(torch.nn.Dropout, 'forward', lambda self, x: x)
    for name, (script, flag) in METHODS.items():
        main_of(script, SHARED, flag, '--model-dir one')
        one, two = last_of('one'), last_of(name)
        shutil.rmtree('one')
        for k, v in one['state_dict'].items():
            assert (v - two['state_dict'][k]).abs().max() < 1e-5, (name, k)
        one, two = one['log'][0], two['log'][0]
        assert one['pgd10'] == two['pgd10'] and one['loss'] == pytest.approx(two['loss'], abs=1e-5)
    os.rename('at', 'whole')
    done = torchrun(TERMINATED, 'at', SHARED)
    assert done.returncode and done.stderr.count('--resume at') == 1 and last_of('at')['step'] == 2
    done = torchrun('', 'at', '--resume at')
    assert done.returncode == 0 and same_run('at', 'whole'), done


def test_a_process_that_dies_takes_the_run_down():
    done = torchrun('os._exit(9)', 'at', SHARED)
    assert done.returncode != 0 and 'exitcode' in done.stderr and ': 9' in done.stderr


@pytest.mark.parametrize('kind, backend', [('cuda', 'cpu:gloo,cuda:nccl'), ('cpu', 'gloo')])
def test_processes_talk_of_tensors_on_gpus_and_cpus(kind, backend, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, 'init_process_group',
                        lambda backend, timeout: asked.append(backend))
    monkeypatch.setattr(commands.atexit, 'register', lambda f: None)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    launched = {'WORLD_SIZE': '4', 'RANK': '3', 'MASTER_ADDR': 'here', 'MASTER_PORT': '29500'}
    monkeypatch.setattr(os, 'environ', os.environ | launched)
    assert commands.init_processes(torch.device(kind)) == (3, 4) and asked == [backend]


def test_one_process_downloads_at_a_time(monkeypatch):
    class Images:
        base_folder, data, targets, classes = 'x', np.zeros((1, 32, 32, 3), np.uint8), [0], ['a']
        def __init__(self, root, train, download=False):
            if not download:
                raise RuntimeError('Dataset not found')
            with open(os.path.join(root, '.lock')) as other, pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', Images)
    assert len(data.load_data('cifar10', 'new')[0]) == 1


# ---------------------------------------------------------------- data, moving weights, speed

def parsed(*flags):
    return train_at.parse_args(f'--dataset digits {" ".join(map(str, flags))}'.split())


def training_data(*flags):
    return data.TrainingData(parsed(*flags), torch.device('cpu'))


def test_an_epoch_is_each_image_once():
    source = training_data('--train-size 100')
    indices = [index for index, _ in source.draw_epoch()]
    assert list(map(len, indices)) == [32, 32, 32, 4] and source.images_per_epoch == 100
    drawn = torch.cat(indices).tolist()
    assert sorted(drawn) == list(range(100)) != drawn
    (x, y), images = source.take((indices[0], None)), source.images[indices[0]].float() / 255
    assert torch.equal(x, images) and torch.equal(y, source.labels[indices[0]])
    source.augment = 'crop'
    moved, y = source.take((indices[0], None))
    assert moved.shape == x.shape and moved.max() <= 1 and not torch.equal(moved, x)
    kinds = [spec.protocol['augment'] for spec in data.DATASETS.values()]
    assert kinds == ['crop-flip', 'crop-flip', 'none', 'none']


def test_validation_images_are_the_last_of_each_class_and_never_trained_on():
    (images, labels), source = data.load_data('digits'), training_data('--val-size 50')
    held_images, held_labels = source.held_out
    assert torch.bincount(held_labels).tolist() == [5] * 10 and len(source.labels) == 1437 - 50
    for k in range(10):
        assert torch.equal(held_images[held_labels == k], images[labels == k][-5:])
        assert torch.equal(source.images[source.labels == k], images[labels == k][:-5])
    assert max(index.max() for index, _ in source.draw_epoch()) < len(source.images)  # what is left


@pytest.fixture
def extra(tmp_path):
    """An .npz of 50 images, of which the first pixel is the index."""
    images = np.random.default_rng(0).integers(256, size=(50, 28, 28, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = range(50)
    np.savez(tmp_path / 'extra.npz', image=images, label=np.arange(50, dtype=np.int32) % 10)
    return tmp_path / 'extra.npz'


def test_extra_images_make_up_their_fraction_of_every_batch(extra):
    source, seen = training_data('--train-size 100 --batch-size 20 --extra-data', extra), []
    batches, images = source.draw_epoch(), np.load(extra)['image'].transpose(0, 3, 1, 2)
    assert len(batches) == 5 and source.images_per_epoch == 100  # what the originals alone make
    for index, extra_index in batches:
        x, y = source.take((index, extra_index))
        which = (x[6:, 0, 0, 0] * 255).round().int()
        assert torch.equal(x[:6], source.images[index].float() / 255) and len(x) == 20
        assert torch.equal(x[6:], torch.tensor(images[which]) / 255)
        assert torch.equal(y, torch.cat([source.labels[index], which.long() % 10]))
        seen += which.tolist()
    assert set(np.bincount(seen, minlength=50)) == {1, 2}  # 70 draws from 50, evenly
    source = training_data('--steps-per-epoch 7 --extra-data', extra)
    assert len(source.draw_epoch()) == 7 and source.images_per_epoch == 7 * 32


IMAGE, LABEL = np.zeros((4, 28, 28, 1), np.uint8), np.zeros(4, int)
BAD_EXTRA = {'floats': dict(image=IMAGE.astype(float)), 'size': dict(image=IMAGE[:, :8]),
             'lengths': dict(label=LABEL[:3]), 'high': dict(label=LABEL + 10),
             'low': dict(label=LABEL - 1), 'fractions': dict(label=LABEL + 0.5),
             'empty': dict(image=IMAGE[:0], label=LABEL[:0]), 'no label': dict(label=None),
             'pickles': dict(image=np.array([Path()] * 4, dtype=object)), 'no zip': None}


@pytest.mark.parametrize('case', BAD_EXTRA)
def test_bad_extra_data(case):
    np.savez('good.npz', image=IMAGE, label=LABEL)
    Path('bad.npz').write_text('no zip')
    if case != 'no zip':
        arrays = dict(image=IMAGE, label=LABEL) | BAD_EXTRA[case]
        np.savez('bad.npz', **{k: v for k, v in arrays.items() if v is not None})
    assert 'bad.npz' in fails('train_at', TINY, '--extra-data bad.npz')
    assert '0.999' in fails('train_at', TINY, '--extra-data good.npz --extra-fraction 0.999')
    assert sorted(os.listdir()) == ['bad.npz', 'good.npz']


def test_weight_perturbation_is_the_official_proxy_network_and_goes_back_exactly():
    torch.manual_seed(0)
    model = models.build_model('resnet18', 4).double()
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 4
    before, proxies = copy.deepcopy(model.state_dict()), []
    for lr in (0.01, 3.0):  # of the proxy, stepped with SGD, then normalised: cancels
        proxies.append(copy.deepcopy(model))
        (-torch.nn.functional.cross_entropy(proxies[-1](x), y)).backward()
        torch.optim.SGD(proxies[-1].parameters(), lr).step()
    with models.frozen_statistics(model):
        torch.nn.functional.cross_entropy(model(x), y).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kept = models.perturb_weights(model, 0.02)
    for name, p in model.named_parameters():
        old = before[name]
        for step in [proxy.get_parameter(name).detach() - old for proxy in proxies]:
            moved = old + 0.02 * old.norm() / step.norm() * step if old.dim() > 1 else old
            assert torch.allclose(p, moved, atol=1e-9), name
        assert torch.equal(p, old) == (old.dim() == 1), name
    models.restore_weights(kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(x)
    assert model.bn1.num_batches_tracked == 1


@every_algorithm
def test_weight_perturbation_takes_the_update_at_the_moved_weights(algorithm, monkeypatch):
    """Its second step, as in the first the last layer is zero; each pass takes a w of its own."""
    script, passes, weights = importlib.import_module(f'train_{algorithm}'), [], []
    loss_function = script.loss_function
    def keep(model, optimizer, **options):
        momenta = [state['momentum_buffer'].clone() for state in optimizer.state.values()]
        passes.append((copy.deepcopy(model), momenta, torch.get_rng_state(), options))
        return loss_function(model=model, optimizer=optimizer, **options)
    monkeypatch.setattr(script, 'loss_function', keep)
    spy(monkeypatch, script, 'entropy_weights', lambda w, *args: weights.append(w))
    main_of(f'train_{algorithm}', TINY, '--train-size 32 --epochs 1 --entropy-weight --awp-gamma '
            '0.1 --awp-warmup 0')
    (plain, momenta, _, _), (moved, _, rng, options) = passes[2:]
    for p, q in zip(plain.parameters(), moved.parameters()):
        change = 0 if p.dim() == 1 else 0.1 * p.norm().item()
        assert (q - p).norm().item() == pytest.approx(change, rel=1e-3)
    torch.set_rng_state(rng)  # for dropout
    moved.zero_grad()
    (loss_function(model=moved, optimizer=None, **options) / 16).backward()
    first, second, by_hand = weights[2:]
    assert torch.equal(second, by_hand) and not torch.equal(first, second)
    last = last_of()['state_dict']
    for (name, p), q, v in zip(plain.named_parameters(), moved.parameters(), momenta):
        stepped = p - 0.02 * (0.9 * v + q.grad + 1e-4 * p)
        assert torch.allclose(last[name], stepped, atol=1e-6), name


def test_a_step_keeps_what_it_should_and_a_network_compiles_once_for_each_use(monkeypatch):
    """Compiles not for a last batch, moved weights or another epoch."""
    formats, networks, graphs, after, compile_ = [], [], [], [], torch.compile
    def load(data_dir, train):
        return torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6), None
    def see(x_adv, model, x, *args):
        assert not any(p.requires_grad for p in model.parameters())  # the attack needs none
        networks.append(model)
        formats.append([t.is_contiguous(memory_format=torch.channels_last) for t in (x, x_adv)])
    spec = replace(data.DATASETS['digits'], load=load, shape=(3, 8, 8))
    monkeypatch.setitem(data.DATASETS, 'digits', spec)
    monkeypatch.setattr(torch, 'compile', lambda f, mode, dynamic: compile_(
        f, backend=lambda graph, inputs: (graphs.append(graph), graph.forward)[1], dynamic=dynamic,
        fullgraph=True))
    torch._dynamo.reset()
    spy(monkeypatch, train_trades, 'attack', see)
    spy(monkeypatch, bookkeeping.Run, 'after_epoch', lambda *args: after.append(len(graphs)))
    main_of('train_trades', '--dataset digits --epochs 2 --batch-size 4 --test-batch-size 6 --amp '
            '--num-steps 2 --arch preactresnet18 --entropy-weight --ema 0.9 --awp-gamma 0.01 '
            '--awp-warmup 0 --compile --no-cuda --model-dir run')
    # Attack with and without gradient, loss, the same with statistics frozen, evaluation
    assert len(after) == 2 and 1 < after[0] == after[1] <= 7  # and the trial's
    assert formats == [[True, True]] * 4 and networks[0].training
    assert all(p.requires_grad for p in networks[0].parameters())
    assert networks[0].layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    state, ema = (last_of()[k] for k in ('state_dict', 'ema_state_dict'))
    for k in state:  # statistics are the latest, weights averaged
        assert torch.equal(state[k], ema[k]) == ('running' in k or 'tracked' in k), k
    # In each of four steps, clean and adversarial, in the second pass alone
    assert state['layer1.0.bn1.num_batches_tracked'] == 8


@pytest.mark.parametrize('flags, world, sizes, wanted', [
    ('--test-batch-size 9', 1, [32, 9, 7, 32], [2, 32, 9, 32]),
    ('--batch-size 8 --amp', 3, [4, 3, 2], [2, 3, 2])])
def test_compiled_for_the_usual_batch_sizes_alone(flags, world, sizes, wanted, monkeypatch):
    compiled, args, model = [], parsed('--compile', flags), models.build_model('smallcnn').eval()
    monkeypatch.setattr(torch, 'compile',
                        lambda f, **options: lambda x: (compiled.append(len(x)), f(x))[1])
    names = list(model.state_dict())
    models.accelerate(model, args, world)
    assert all(model(torch.rand(size, 1, 28, 28)).shape == (size, 10) for size in sizes)
    assert compiled == wanted and list(model.state_dict()) == names
    average, x = models.copy_of(model), torch.rand(wanted[1], 1, 28, 28)  # of its own weights
    torch.nn.init.ones_(model.classifier.fc3.weight)
    assert average.amp == args.amp == ('--amp' in flags) and model(x).any() and not average(x).any()


def test_a_network_whose_outputs_are_overwritten_by_its_next_run_is_measured_right(monkeypatch):
    """So do CUDA graphs, --compile reduce-overhead."""
    memory, model = torch.empty(24, 10), models.build_model('smallcnn')
    torch.nn.init.normal_(model.classifier.fc3.weight)
    images, labels = data.load_data('digits', train=False, size=24)
    rows = [evaluate.evaluate_epoch(model, images, labels, 0.3, 24, seed=1)]
    monkeypatch.setattr(torch, 'compile', lambda f, **options: lambda x: (
        f(x) if torch.is_grad_enabled() else memory.copy_(f(x))))
    models.accelerate(model, parsed('--compile --test-batch-size 24'))
    rows += [evaluate.evaluate_epoch(model, images, labels, 0.3, 24, seed=1)]
    assert rows[0] == rows[1] and rows[0]['clean'] != rows[0]['pgd10']


@every_algorithm
def test_bfloat16_agrees_to_its_precision(algorithm):
    script, outcomes = importlib.import_module(f'train_{algorithm}'), []
    torch.manual_seed(0)
    model = models.build_model('preactresnet18', in_channels=1).eval()
    x, y, kappa = torch.rand(8, 1, 8, 8), torch.arange(8), torch.arange(8.0) % 3
    x_adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    adv = (x_adv, kappa) if algorithm == 'gairat' else x_adv
    for model.amp in (False, True):
        loss = script.loss_function(model, x, y, None, adv=adv, perturb_steps=2)
        outcomes += [loss, script.entropy_weights(model(x_adv))]
    loss, w, loss_amp, w_amp = outcomes
    assert loss_amp.dtype == w_amp.dtype == model(x).dtype == torch.float32
    assert torch.allclose(loss, loss_amp, rtol=0.05, atol=0.05) and loss != loss_amp
    assert torch.allclose(w, w_amp, atol=1e-2)
    with torch.no_grad():  # and sees weights that change
        before = model(x)
        model.linear.bias += 1
        assert torch.allclose(model(x), before + 1, atol=0.02)


class Waits(TorchDispatchMode):
    """Counts the operations for which, on a GPU, the host would wait."""
    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        aten = torch.ops.aten
        masks = args[1] if f is aten.index.Tensor else ()
        waiting = aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal
        self.count += any(i is not None and i.dtype == torch.bool for i in masks)
        self.count += f.overloadpacket in waiting
        return f(*args, **(kwargs or {}))


@every_algorithm
def test_no_step_waits_for_the_device(algorithm, extra):
    """Twice the steps, in the real loop with everything on, wait no more often."""
    flags = ('--dataset digits --train-size 60 --val-size 10 --no-cuda --batch-size 4 --epochs 2 '
             '--num-steps 2 --entropy-weight --ema 0.9 --awp-gamma 0.01 --awp-warmup 1 '
             '--lr-schedule onecycle --lr-warmup 0.5 --model-dir run --extra-data')
    waits = []
    for steps in (2, 4):
        with Waits() as mode:
            told, _ = main_of(f'train_{algorithm}', flags, extra, '--steps-per-epoch', steps)
        waits.append(mode.count)
        about = f'{algorithm} with entropy weights: smallcnn, 2 epochs of {4 * steps} images'
        assert told.startswith(about) and 'selected on the validation images\n' in told
        assert 0 <= float(rows_of()[1]['ema_pgd10']) <= 1
        shutil.rmtree('run')
    assert waits[0] == waits[1] > 0


# ---------------------------------------------------------------- CUDA, by shapes and devices alone

@pytest.fixture
def fake_cuda(monkeypatch):
    """A CUDA device whose tensors have no values: an operation that mixes devices raises.

    Autograd does not run on it: all gradients are zeros. What needs values is left out.
    """
    device, networks = torch.device('cuda', 0), []
    def checked(loss):
        assert (loss.dtype, loss.device, loss.dim()) == (torch.float32, device, 0)
    def grad(loss, x):
        checked(loss)
        return [torch.zeros_like(x)]
    def backward(loss):
        checked(loss)
        for p in networks[-1].parameters():
            p.grad = torch.zeros_like(p)
    def to(model, place, **options):  # torch's own changes parameters in place, which fails here
        for module in model.modules():
            for k, p in module._parameters.items():
                module._parameters[k] = p if p is None else nn.Parameter(p.detach().to(place))
            module._buffers = {k: b.to(place) for k, b in module._buffers.items()}
        return model
    monkeypatch.setattr(nn.Module, 'to', to)
    spy(monkeypatch, bookkeeping.Run, 'begin', lambda _, run, *args: networks.append(run.model))
    @torch.no_grad()
    def lerp(averages, weights, _):  # one by one: torch's for lists corrupts memory here
        for a, w in zip(averages, weights, strict=True):
            assert a.lerp_(w, 0.1).device == device
    def fused(params, grads, momenta, **options):  # has no computation of shapes
        assert {t.device for t in params + grads} == {device} and len(params) == len(grads) > 0
    monkeypatch.setattr(torch.autograd, 'grad', grad)
    monkeypatch.setattr(torch.Tensor, 'backward', backward)
    monkeypatch.setattr(torch, '_fused_sgd_', fused)
    monkeypatch.setattr(models, 'get_ema_multi_avg_fn', lambda decay: lerp)
    build = models.build_model  # a deep copy crashes
    monkeypatch.setattr(models, 'copy_of', lambda model: build('wideresnet10-1').to(device))
    monkeypatch.setattr(FakeTensor, 'tolist', lambda values: [0.5] * len(values))
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: [0])  # extra data stays out
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *emulated: True)
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(commands, 'pick_device', lambda no_cuda: device)
    monkeypatch.setattr(commands, 'versions', lambda device: {'device': 'none'})
    monkeypatch.setattr(bookkeeping, 'synchronize', lambda device: None)
    monkeypatch.setattr(bookkeeping.Run, 'check_finite', lambda run: setattr(run, 'loss', 1.0))
    monkeypatch.setattr(bookkeeping.Run, 'save', lambda run, *names: None)
    coloured = replace(
        data.DATASETS['digits'], shape=(3, 32, 32), protocol=data.DIGITS | {'augment': 'crop-flip'},
        load=lambda *_: (torch.zeros(9, 3, 32, 32, dtype=torch.uint8), torch.arange(9), None))
    monkeypatch.setitem(data.DATASETS, 'digits', coloured)
    np.savez('extra.npz', image=np.zeros((4, 32, 32, 3), np.uint8), label=np.arange(4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield device


@every_algorithm
@pytest.mark.parametrize('flags', [
    '--no-amp --arch preactresnet18',
    '--arch wideresnet10-1 --entropy-weight --awp-gamma 0.01 --awp-warmup 0 --ema 0.9',
    '--amp --arch resnet18 --extra-data extra.npz --entropy-weight --tau inf'])
def test_a_run_on_cuda_mixes_no_devices_and_its_losses_are_float32(algorithm, flags, fake_cuda):
    small = '--dataset digits --batch-size 4 --epochs 1 --num-steps 2 --model-dir run'
    out, _ = main_of(f'train_{algorithm}', small, flags)
    assert 'epoch 1/1' in out and 'best epoch 1' in out


@pytest.mark.parametrize('attack', evaluate.STEPS)
@pytest.mark.parametrize('amp', [False, True])
def test_an_attack_on_cuda_mixes_no_devices(attack, amp, fake_cuda, monkeypatch):
    model = models.build_model('wideresnet10-1').to(fake_cuda)
    model.amp = amp
    x, y = torch.rand(4, 3, 32, 32, device=fake_cuda), torch.zeros(4, device=fake_cuda).long()
    monkeypatch.setattr(torch.Tensor, '__bool__', lambda value: True)
    x_adv = evaluate.run_attack(attack, model, x, y, 8 / 255)
    assert (x_adv.device, x_adv.dtype) == (fake_cuda, torch.float32)
    assert evaluate.entropy(model(x_adv)).dtype == torch.float32


# ---------------------------------------------------------------- evaluate.py

class Affine(nn.Module):
    """Logits scale * (W x + b), for images of any shape."""

    def __init__(self, weight, bias, scale=1.0):
        super().__init__()
        self.weight, self.bias, self.scale = nn.Parameter(weight), nn.Parameter(bias), scale

    def forward(self, x):
        return self.scale * F.linear(x.flatten(1), self.weight, self.bias)


def digits(size):
    return data.load_data('digits', train=False, size=size)


def grey(size):
    """Images of one pixel, 0.498, all of class 0."""
    return torch.full((size, 1, 1, 1), 127, dtype=torch.uint8), torch.zeros(size).long()


def accuracies(out):
    """The first table in stdout: {model: {column: percent}}."""
    head, _, *lines = [re.split(r' *\| *', line)[1:-1] for line in re.search(
        r'(?:^\|.*\n?)+', out, re.M)[0].splitlines()]
    return {line[0]: dict(zip(head[2:], map(float, line[2:]))) for line in lines}


@pytest.fixture(scope='module')
def trained():
    """A SmallCNN trained on clean digits for a moment: accurate, and not robust."""
    torch.manual_seed(0)
    images, labels = data.load_data('digits')
    model = models.build_model('smallcnn')
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(50):
        index = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(data.to_float(images[index])), labels[index]).backward()
        optimizer.step()
    return model.eval().to(memory_format=torch.channels_last)  # as the command has it


def make_run(directory, model, scale=1.0):
    """A run's directory as training leaves it; the path of its best.pt."""
    os.makedirs(directory)
    state = {k: v * scale if 'fc3' in k else v for k, v in model.state_dict().items()}
    models.save_checkpoint({'state_dict': state, 'arch': 'smallcnn', 'dataset': 'digits',
                            'algorithm': 'at', 'args': {'epsilon': 0.1}, 'epoch': 2, 'log': []},
                           f'{directory}/best.pt')
    Path(directory, 'log.csv').write_text(
        'epoch,lr,loss,clean,pgd10,entropy,high_entropy,images_per_s,seconds\n'
        '1,0.1,2.0,0.5,0.3,2.0,0.9,10,1\n2,0.1,1.8,0.7,0.4,1.9,0.8,10,2\n3,0.1,1.')
    return f'{directory}/best.pt'


@pytest.fixture
def best(trained):
    return make_run('digits-at-seed1', trained)


# ---------------------------------------------------------------- attacks

@pytest.mark.parametrize('attack', evaluate.STEPS)
def test_linear_model_has_its_exact_robust_accuracy(attack):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    x, w = data.to_float(images).flatten(1), torch.randn(16)
    b = -(x @ w).median()
    model = Affine(torch.stack([-w / 2, w / 2]), torch.stack([-b / 2, b / 2]))
    labels = (x @ w + b > 0).long()
    labels[:5] = 1 - labels[:5]
    # the worst point of the box [x - 0.1, x + 0.1] and [0, 1] is a corner of it
    sign = (2 * labels - 1)[:, None]
    worst = (x - 0.1 * sign * w.sign()).clamp(0, 1)
    robust = ((worst @ w + b) * sign[:, 0] > 0).numpy()
    x_adv = evaluate.run_attack(attack, model, x.view(60, 1, 4, 4), labels, 0.1)
    torch.testing.assert_close(x_adv.flatten(1), worst, atol=1e-6, rtol=0)
    correct, _ = evaluate.evaluate_attack(model, images, labels, attack, 0.1, batch_size=25)
    assert (correct == robust).all() and 5 < robust.sum() < 40


@pytest.mark.parametrize('attack, share, steps', [
    ('fgsm', 1, 1), ('pgd10', 1 / 4, 10), ('pgd20', 1 / 10, 20), ('pgd100', 1 / 4, 100),
    ('ls', 1 / 10, 20)])
def test_steps_scale_with_epsilon(attack, share, steps):
    for epsilon in (8 / 255, 0.3):
        assert evaluate.pgd_options(attack, epsilon) == dict(
            step_size=pytest.approx(share * epsilon), num_steps=steps,
            logit_scale=10 if attack == 'ls' else 1, random_start=attack != 'fgsm')


def test_ls_at_scale_1_is_pgd_bit_for_bit(trained):
    images, labels = digits(24)
    pgd, ls_1, ls_10 = (evaluate.run_attack(
        attack, trained, data.to_float(images), labels, 0.05, ls_scale=scale)
        for attack, scale in (('pgd20', 10), ('ls', 1), ('ls', 10)))
    assert torch.equal(pgd, ls_1) and not torch.equal(pgd, ls_10)


@pytest.mark.parametrize('scale, ls_scale', [(1e-3, 10.0), (1e4, 1e-4)])
def test_ls_finds_what_masked_gradients_hide_from_pgd(scale, ls_scale):
    """Class 1 is reached by raising the pixel by 0.09. Eight far classes pull the other way.

    With tiny logits the softmax is flat and the eight outweigh class 1; with huge ones the gradient
    is exactly zero in float32. Either way PGD calls robust what is not.
    """
    model = Affine(torch.tensor([[0.0]] + [[1.0]] + [[-1.0]] * 8),
                   torch.tensor([0.0] + [-0.09 - 0.5] + [-1000.0] * 8), scale)
    pgd, _ = evaluate.evaluate_attack(model, *grey(100), 'pgd20', 0.1)
    ls, _ = evaluate.evaluate_attack(model, *grey(100), 'ls', 0.1, ls_scale=ls_scale)
    assert pgd.mean() > 0.85 and ls.mean() == 0


def test_restarts_only_ever_find_more():
    """Without a gradient a random start is all: each is misclassified with probability 1/4."""
    model = Affine(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, -0.05 - 127 / 255]), 1e6)
    one, several = (evaluate.evaluate_attack(model, *grey(200), 'pgd20', 0.1, restarts=r)[0]
                    for r in (1, 3))
    assert 0.65 < one.mean() < 0.85 and 0.3 < several.mean() < 0.55
    assert not (several & ~one).any()


def test_an_attack_that_leaves_the_ball_is_an_error(trained, monkeypatch):
    for wrong in (lambda x: x + 0.2, lambda x: x - 0.01, lambda x: x * math.nan):
        monkeypatch.setattr(evaluate, 'pgd_attack', lambda model, x, *_, **__: wrong(x))
        with pytest.raises(RuntimeError, match='left the ball'):
            evaluate.evaluate_attack(trained, *digits(4), 'pgd20', 0.1)


def test_standard_training_is_not_robust(trained):
    assert evaluate.evaluate_attack(trained, *digits(100), 'clean', 0)[0].mean() > 0.85
    assert evaluate.evaluate_attack(trained, *digits(100), 'pgd20', 0.2)[0].mean() < 0.05


def cifar10(size):
    """Test images, where CIFAR-10 is at hand; DATA_DIR says where."""
    data_dir = os.environ.get('DATA_DIR', str(ROOT / 'data'))
    if not os.path.isdir(os.path.join(data_dir, 'cifar-10-batches-py')):
        pytest.skip('CIFAR-10 is not there')
    return data.load_data('cifar10', data_dir, False, size)


def test_real_cifar10_model():
    """pyautoattack carries a standardly trained ResNet-18."""
    pyautoattack = pytest.importorskip('pyautoattack')
    path = os.path.join(os.path.dirname(pyautoattack.__file__), 'examples', 'model_test.pt')
    if not os.path.isfile(path):
        pytest.skip('its file is not there')
    images, labels = cifar10(500)
    model = models.load_model(path, num_classes=10)
    clean, _ = evaluate.evaluate_attack(model, images, labels, 'clean', 0)
    assert clean.mean() == pytest.approx(0.946, abs=0.003)
    pgd, _ = evaluate.evaluate_attack(model, images[:16], labels[:16], 'pgd10', 8 / 255)
    assert pgd.sum() == 0


CIFAR10 = ROOT / 'results' / 'cifar10'


def test_the_committed_networks_are_those_that_were_evaluated():
    rows = [row for name in ('all-10000', 'first-1000', 'all-10000-seed2')
            for row in json.loads((CIFAR10 / f'{name}.json').read_text())['models']]
    assert len({row['path'] for row in rows}) == len(list(CIFAR10.glob('*/last.pt'))) == 22
    for row in rows:
        model = models.load_model(ROOT / row['path'], 'wideresnet10-1', 10)
        assert evaluate.weights_hash(model) == row['weights'], row['path']


def test_a_committed_network_has_its_recorded_accuracy():
    """On 250 images; another CPU rounds differently, and an attack's signs then differ."""
    outcomes = np.load(CIFAR10 / 'all-10000.npz')
    row, images, labels = outcomes['models'].tolist().index('GAIRAT'), *cifar10(250)
    recorded = dict(zip(outcomes['columns'], outcomes['correct'][row, :, :250].sum(1)))
    model = models.load_model(CIFAR10 / 'gairat-seed1' / 'last.pt')
    for attack, tolerance in (('clean', 1), ('pgd20', 5)):
        stood, _ = evaluate.evaluate_attack(model, images, labels, attack, 8 / 255)
        assert abs(stood.sum() - recorded[attack]) <= tolerance


# ---------------------------------------------------------------- AutoAttack

@pytest.fixture(scope='module')
def linear10():
    """A linear model of ten classes on 5 x 5 images, with labels of which it gets all but two."""
    torch.manual_seed(3)
    images = torch.randint(0, 256, (9, 1, 5, 5), dtype=torch.uint8)
    model = Affine(torch.randn(10, 25), torch.randn(10))
    labels = model(data.to_float(images)).argmax(1).detach()
    labels[:2] = (labels[:2] + 1) % 10
    return model, images, labels


def test_autoattack_is_the_standard_one_and_below_each_of_its_attacks(linear10):
    pyautoattack = pytest.importorskip('pyautoattack')
    model, images, labels = linear10
    columns = evaluate.plan_columns(['pgd20', 'autoattack', *evaluate.AUTOATTACK], 0.06, 0.06)
    state = torch.get_rng_state()
    outcome, _ = evaluate.evaluate_model(model, images, labels, columns, batch_size=8, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    worst = outcome['autoattack']
    assert 0 < worst.sum() < 7 == outcome['clean'].sum()
    for name in evaluate.AUTOATTACK:
        assert not (worst & ~outcome[name]).any(), name
    chain = ['clean', 'aa: apgd-ce', 'aa: + apgd-t', 'aa: + fab-t', 'autoattack']
    for before, after in zip(chain, chain[1:]):
        assert not (outcome[after] & ~outcome[before]).any()
    official = pyautoattack.AutoAttack(model, norm='Linf', eps=0.06, seed=5, version='standard')
    x = data.to_float(images).contiguous()
    _, y_adv = official.run_standard_evaluation(x, labels, batch_size=8)
    assert ((y_adv == labels).numpy() == worst).all()


def test_the_github_package_serves_as_well(linear10, monkeypatch, capsys):
    model, images, labels = linear10
    seen = []

    class Part:
        targeted = False

        def perturb(self, x, y):
            print('noise')
            torch.manual_seed(0)
            seen.append((self.targeted, model.training, x.dtype, len(x)))
            return (x + 0.01).clamp(0, 1)

    class AutoAttack:  # the signature of GitHub's
        def __init__(self, model, norm='Linf', eps=.3, seed=None, verbose=True, attacks_to_run=[],
                     version='standard', is_tf_model=False, device='cuda', log_path=None):
            assert (norm, eps, version, str(device)) == ('Linf', 0.06, 'standard', 'cpu')
            print('setting parameters for standard version')
            self.apgd, self.apgd_targeted, self.fab, self.square = (Part() for _ in range(4))

    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    monkeypatch.setitem(sys.modules, 'autoattack', types.SimpleNamespace(AutoAttack=AutoAttack))
    model.train()
    evaluate.evaluate_attack(model, images, labels, 'fab-t', 0.06)
    assert seen == [(True, False, torch.float32, 9)] and model.training
    assert capsys.readouterr().out == ''
    state = torch.get_rng_state()
    evaluate.auto_attack('square', model, data.to_float(images), labels, 0.06, 1)
    assert torch.equal(state, torch.get_rng_state())


def test_targeted_attacks_need_ten_classes_and_the_command_says_so_beforehand(monkeypatch):
    pytest.importorskip('pyautoattack')
    with pytest.raises(ValueError, match='9 wrong classes'):
        evaluate.evaluate_attack(Affine(torch.randn(9, 1), torch.randn(9)), *grey(2), 'apgd-t', 0.1)
    monkeypatch.setitem(data.DATASETS, 'digits', replace(data.DATASETS['digits'], num_classes=7))
    torch.save(models.build_model('smallcnn', 7).state_dict(), 'a.pt')
    told = fails('evaluate', '--model-path a.pt --dataset digits --attacks autoattack')
    assert '7 classes' in told and 'apgd-ce and square work' in told


# ---------------------------------------------------------------- evaluation

def test_train_mode_is_evaluated_in_eval_mode_and_left_as_it_was():
    torch.manual_seed(0)
    images, labels = digits(32)
    model = nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5),
                          nn.Linear(256, 10))
    model(data.to_float(images))
    expected, _ = evaluate.evaluate_attack(model.eval(), images, labels, 'pgd10', 0.02)
    model.train()
    model[1].eval()  # frozen
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    correct, _ = evaluate.evaluate_attack(model, images, labels, 'pgd10', 0.02)
    assert (correct == expected).all()
    assert [m.training for m in model] == [True, False, True, True, True] and model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


PRECISIONS = """
import torch
import evaluate, models

units = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul,
         torch.backends.mkldnn.conv)

def state():
    cudnn = torch.backends.cudnn
    return [u.fp32_precision for u in units], cudnn.deterministic, cudnn.benchmark

for setting in ('', 'set_float32_matmul_precision("medium")', 'backends.cudnn.benchmark = True',
                'backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True',
                'backends.fp32_precision = "tf32"'):
    if setting:
        exec('torch.' + setting)
    before = state()
    with evaluate.exact(models.build_model('smallcnn'), torch.device('cpu')):
        assert state() == (['ieee'] * 4, True, False), (setting, state())
    assert state() == before, (setting, before, state())
"""


def test_evaluation_is_in_float32_whatever_training_was(trained, monkeypatch):
    _, expected = evaluate.evaluate_attack(trained, *digits(32), 'pgd20', 0.1)
    monkeypatch.setattr(trained, 'amp', True)
    _, entropies = evaluate.evaluate_attack(trained, *digits(32), 'pgd20', 0.1)
    assert (entropies == expected).all() and trained.amp
    # In another process: torch refuses to read its older settings once newer ones are set
    Path('set.py').write_text(PRECISIONS)
    done = python('set.py')
    assert done.returncode == 0, done.stderr


def test_pgd10_and_entropy_are_those_of_the_training_log(trained, monkeypatch):
    seed = commands.seed_everything  # the same starts for both, which differ in the restart's 0
    monkeypatch.setattr(commands, 'seed_everything', lambda *numbers: seed(*numbers[:2]))
    log = evaluate.evaluate_epoch(trained, *digits(50), 0.04, 20, seed=3, threshold=0.3)
    correct, entropies = evaluate.evaluate_attack(trained, *digits(50), 'pgd10', 0.04,
                                                  batch_size=20, seed=3)
    assert 0 < correct.mean() == log['pgd10'] < 1
    assert 0 < (entropies > 0.3).mean() == log['high_entropy'] < 1
    assert log['entropy'] == pytest.approx(entropies.mean(), abs=1e-6)


def test_entropy_report_against_numpy(trained):
    images, labels = digits(40)
    correct, entropies = evaluate.evaluate_attack(trained, images, labels, 'pgd20', 0.03,
                                                  batch_size=16)
    z = np.concatenate([trained(evaluate.run_attack(
        'pgd20', trained, data.to_float(images[i:i + 16]), labels[i:i + 16], 0.03, first=i)
        ).detach().double().numpy() for i in range(0, 40, 16)])
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    h = -(p * np.log(p)).sum(1)
    right = z.argmax(1) == labels.numpy()
    np.testing.assert_allclose(entropies, h, atol=1e-5)
    assert (correct == right).all() and 0 < right.mean() < 1
    t = float(np.median(h))
    report = evaluate.entropy_report(entropies, correct, t)
    assert report == pytest.approx({
        'entropy': h.mean(), 'high_entropy': (h > t).mean(),
        'accuracy_high_entropy': right[h > t].mean(),
        'accuracy_low_entropy': right[h <= t].mean()}, abs=1e-6)
    report = evaluate.entropy_report(entropies, correct, 9.0)
    assert report['high_entropy'] == 0 and math.isnan(report['accuracy_high_entropy'])
    assert report['accuracy_low_entropy'] == correct.mean()


def test_worst_case_attacks_only_what_still_stands(trained, monkeypatch):
    columns = evaluate.plan_columns(['clean', 'fgsm', 'pgd20', 'ls'], 0.04, 0.04, worst_case=True)
    assert list(columns) == ['clean', '+ fgsm', '+ pgd20', 'worst case']
    attacked = []
    spy(monkeypatch, evaluate, 'run_attack', lambda x_adv, *args, **_: attacked.append(len(x_adv)))
    outcome, entropies = evaluate.evaluate_model(trained, *digits(40), columns)
    standing = [int(correct.sum()) for correct in outcome.values()]
    assert attacked == [40] + standing[:-1] and standing == sorted(standing, reverse=True)
    assert standing[-1] < standing[0] and entropies is None
    assert list(evaluate.plan_columns(['autoattack', 'ls'], 0.1, 0.2)) == [
        'clean', 'aa: apgd-ce', 'aa: + apgd-t', 'aa: + fab-t', 'autoattack', 'ls']
    assert evaluate.plan_columns(['autoattack'], 0.1, 0.2)['autoattack'] == (
        'square', 0.2, 'aa: + fab-t')
    assert evaluate.plan_columns(['ls', 'square'], 0.1, 0.2)['square'] == ('square', 0.2, 'clean')


# ---------------------------------------------------------------- the command

FAST = '--attacks clean pgd20 ls --n-examples 12 --batch-size 5 --epsilon 0.04'


def test_command(best, trained):
    other = make_run('digits-ew-at-seed1', trained, 0.3)
    out, err = main_of('evaluate', '--model-path', best, other, FAST, '--csv a.csv --json a.json')
    table = accuracies(out)
    assert list(table) == ['digits-at-seed1', 'digits-ew-at-seed1']
    assert list(table['digits-at-seed1']) == ['clean', 'pgd20 (0.04)', 'ls (0.04)', 'worst',
                                              'pgd20 - worst']
    assert 'first 12 test images of digits' in out and '| digits-at-seed1 | 12 |' in out
    correct, entropies = evaluate.evaluate_attack(trained, *digits(12), 'pgd20', 0.04, batch_size=5)
    assert table['digits-at-seed1']['pgd20 (0.04)'] == round(100 * correct.mean(), 2)
    rows = read_csv('a.csv')
    assert float(rows[0]['pgd20 (0.04)']) == correct.mean() and rows[1]['n'] == '12'
    content = json.loads(Path('a.json').read_text())
    assert content['models'][0]['report']['entropy'] == pytest.approx(entropies.mean(), abs=1e-6)
    assert content['args']['seed'] == 1 and 'torch' in content['versions']
    assert 'ls' in err and '\r' not in err  # lines, no bar, where it is no terminal


def test_an_accuracy_of_no_example_is_a_dash_and_null(best):
    out, _ = main_of('evaluate', '--model-path', best, '--attacks pgd20 --n-examples 5 '
                     '--entropy-threshold 9 --json a.json')
    assert re.search(r'\| 0\.00 \| - \| \d+\.\d\d \|$', out, re.M)
    report = json.loads(Path('a.json').read_text())['models'][0]['report']
    assert report['accuracy_high_entropy'] is None and report['high_entropy'] == 0


def test_finished_batches_are_not_evaluated_again(best, monkeypatch):
    cache, run_attack, calls = Path(f'{best}.eval.json'), evaluate.run_attack, []
    expected, _ = main_of('evaluate', '--model-path', best, FAST)
    assert sorted(map(len, json.loads(cache.read_text()).values())) == [3, 3, 3]
    cache.unlink()

    def dies(*args, **options):
        calls.append(args[0])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run_attack(*args, **options)
    monkeypatch.setattr(evaluate, 'run_attack', dies)
    out, told = main_of('evaluate', '--model-path', best, FAST, status=130)
    assert out == '' and 'goes on' in told
    for _ in range(2):  # the second time it answers at once
        assert main_of('evaluate', '--model-path', best, FAST)[0] == expected
        assert len(calls) == 5 + 5
    # what alters a result asks for it anew, and nothing else does: batches by changed argument
    for other, batches in (('--seed 2', 9), ('--batch-size 6', 6), ('--epsilon 0.05', 6),
                           ('--n-examples 10', 6), ('--split train', 9), ('--restarts 2', 6),
                           ('--ls-scale 5', 3), ('--no-cuda', 0), ('--entropy-threshold 1', 0),
                           ('--attacks ls pgd20 apgd-ce --aa-epsilon 1', 3),
                           ('--attacks ls pgd20 apgd-ce --aa-epsilon 0.9', 3)):
        before = len(calls)
        main_of('evaluate', '--model-path', best, FAST, other)
        assert len(calls) - before == batches, other


def test_a_killed_evaluation_goes_on_and_gives_the_same_table(best, trained):
    other = make_run('other/digits-at-seed1', trained)
    args = ('--attacks pgd20 pgd100 --n-examples 20 --batch-size 4 --epsilon 0.04 --no-cuda '
            '--model-path')
    cache, deadline = Path(f'{best}.eval.json'), time.time() + 60
    killed = subprocess.Popen([sys.executable, str(ROOT / 'evaluate.py'), *args.split(), best],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env=os.environ | {'OMP_NUM_THREADS': '1'})
    while time.time() < deadline and not (cache.exists() and 'pgd100' in cache.read_text()):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.communicate()[0] == b'' and killed.returncode == -signal.SIGKILL
    assert 10 < sum(map(len, json.loads(cache.read_text()).values())) < 15
    assert main_of('evaluate', args, best)[0] == main_of('evaluate', args, other)[0]
    assert json.loads(cache.read_text()) == json.loads(Path(f'{other}.eval.json').read_text())


def test_a_result_of_other_weights_is_never_taken(best):
    def table(*more):
        return main_of('evaluate', '--model-path', best, FAST, *more)[0]
    first, content = table(), torch.load(best, weights_only=True)
    content['state_dict']['classifier.fc3.bias'][4] += 3
    models.save_checkpoint(content, best)
    second = table()
    os.remove(f'{best}.eval.json')
    assert first != second == table() != table('--normalize 0.1/0.5')


@pytest.mark.parametrize('damage', [
    lambda text: b'', lambda text: b'{', lambda text: b'[]', lambda text: b'{"a": 5}',
    lambda text: b'7', lambda text: b'\xff\xfe\x00', lambda text: b'[' * 100000,
    lambda text: text[:-200].encode(),
    lambda text: text.replace('true', '"zz"').encode(),
    lambda text: text.replace('"correct": [', '"correct": [true, ').encode(),
    lambda text: text.replace('"correct"', '"wrong"').encode(),
    lambda text: text.replace('"entropy": [', '"entropy": [[').replace(']}', ']]}').encode()])
def test_a_damaged_cache_is_said_and_made_anew(damage, best):
    args, cache = ('--attacks pgd20 --n-examples 12 --model-path', best), Path(f'{best}.eval.json')
    expected, _ = main_of('evaluate', *args)
    good = cache.read_text()
    cache.write_bytes(damage(good))
    out, told = main_of('evaluate', *args)
    assert out == expected and 'anew' in told
    assert json.loads(cache.read_text()) == json.loads(good)


def test_without_a_place_for_the_cache_it_goes_on_and_says_so_once(best):
    os.mkdir(f'{best}.eval.json')
    out, told = main_of('evaluate', '--model-path', best, FAST)
    assert accuracies(out) and told.count('cannot be written') == 1


def test_two_evaluations_at_once_keep_both_results(best):
    one, other = evaluate.Results(best), evaluate.Results(best)
    for i in range(3):
        one.known.setdefault('a', []).append({'correct': f'0{i}'})
        one.save()
        other.known.setdefault('b', []).append({'correct': f'1{i}'})
        other.save()
    assert {k: len(v) for k, v in evaluate.Results(best).known.items()} == {'a': 3, 'b': 3}


def test_figures(best, trained, monkeypatch):
    import matplotlib.pyplot
    from PIL import Image
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.setattr(evaluate, 'TSNE_EXAMPLES', 4)
    matplotlib.pyplot.switch_backend('svg')
    out, _ = main_of('evaluate', '--model-path', best, make_run('b', trained, 0.3),
                     make_run('c', trained, 2.0), '--attacks fgsm --n-examples 60 --figures f',
                     '--tsne-classes 3 8 --epsilon 0.04')
    assert list(accuracies(out)['b'])[:3] == ['clean', 'fgsm (0.04)', 'pgd20 (0.04)']
    assert matplotlib.get_backend().lower() == 'agg'  # which no display is needed for
    names = ['entropy_histogram', 'entropy_vs_robustness', 'pgd_vs_worst', 'training_curves',
             'tsne']
    assert sorted(os.listdir('f')) == sorted(
        f'{name}.{kind}' for name in names for kind in ('csv', 'pdf', 'png'))
    for name in names:
        image = Image.open(f'f/{name}.png').convert('RGB')
        assert image.size[0] == 700 and 350 < image.size[1] < 1000  # 3.5 inches at 200 dots
        assert len(image.getcolors(10 ** 6)) > 50  # drawn on, with smoothed edges
    histogram, points, _, curves, tsne = (read_csv(f'f/{name}.csv') for name in names)
    for column in ('digits-at-seed1', 'b', 'c'):
        assert sum(float(row[column]) for row in histogram) == pytest.approx(100)
    assert [row['model'] for row in points] == ['digits-at-seed1', 'b', 'c']
    assert {row['class'] for row in tsne} == {'3', '8'}
    assert len(tsne) == 3 * sum(min((digits(60)[1] == k).sum().item(), 4) for k in (3, 8))
    assert [row['epoch'] for row in curves] == ['1.0', '2.0'] * 3


def test_names_tell_the_models_apart_and_epsilons_are_written_as_the_field_does():
    assert evaluate.row_names(['runs/a/best.pt', 'runs/b/best.pt']) == ['a', 'b']
    assert evaluate.row_names(['runs/a/best.pt', 'runs/a/last.pt', 'x.pt']) == ['a', 'a/last', 'x']
    assert evaluate.row_names(['r/a/best.pt', 's/a/best.pt']) == ['r/a/best.pt', 's/a/best.pt']
    texts = [evaluate.epsilon_text(e) for e in (8 / 255, 0.031, 0.3, 1 / 255)]
    assert texts == ['8/255', '0.031', '0.3', '1/255']
    told, _ = main_of('evaluate', '--help')
    assert '--aa-epsilon' in told and 'cifar10 8/255' in told


class Evil:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('args, told', [
    ('', '--model-path'), ('nothing.pt', 'nothing.pt: no such file'), ('.', 'directory'),
    ('text.pt', 'text.pt: not a checkpoint'), ('cut.pt', 'cut.pt: cut off'), ('evil.pt', 'system'),
    ('good.pt --arch resnet18', 'missing conv1.weight'), ('bare.pt', 'give one --dataset'),
    ('good.pt --arch vgg', "unknown arch 'vgg'"), ('good.pt --dataset cifar100', '10 classes'),
    ('good.pt --dataset cifar10', '1-channel'), ('good.pt --attacks pgd7', "'pgd7'"),
    ('good.pt --n-examples 361', '360 test images'), ('good.pt --n-examples 0', "'0'"),
    ('good.pt --epsilon 8', '8/255'), ('good.pt --normalize half', "'half'"),
    ('good.pt --normalize cifar10', '1-channel'), ('good.pt --figures text.pt/x', 'text.pt'),
    ('good.pt --csv no/such/a.csv', 'cannot be written'),
    ('good.pt --json .', 'cannot be written'), ('good.pt --figures f --tsne-classes 0 cat', 'cat'),
    ('wide.pt --dataset cifar10 --data-dir text.pt', 'could not be downloaded')])
def test_an_evaluation_of_bad_input_is_one_line_and_exit_2(args, told, trained, monkeypatch):
    monkeypatch.setattr('urllib.request.urlopen', Mock(side_effect=OSError('no network')))
    state = trained.state_dict()
    torch.save({'state_dict': state, 'dataset': 'digits'}, 'good.pt')
    torch.save(state, 'bare.pt')
    torch.save({'state_dict': state, 'x': Evil()}, 'evil.pt')
    torch.save(models.build_model('wideresnet10-1').state_dict(), 'wide.pt')
    Path('text.pt').write_text('not a model\n')
    Path('cut.pt').write_bytes(Path('good.pt').read_bytes()[:-500])
    assert told in fails('evaluate', '--model-path' if args else '', args)
    assert not os.path.exists('ran')


def test_autoattack_not_installed_is_said_before_any_work(best, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    monkeypatch.setitem(sys.modules, 'autoattack', None)
    told = fails('evaluate', '--attacks autoattack --model-path', best)
    assert 'pip install pyautoattack' in told


# ---------------------------------------------------------------- anyone's checkpoint

@pytest.mark.parametrize('arch, classes, options', [
    ('preactresnet18', 7, {}), ('preactresnet18', 7, {'final_bn': False}), ('resnet18', 7, {}),
    ('wideresnet16-1', 7, {}), ('wideresnet10-2', 100, {'in_channels': 1}), ('smallcnn', 7, {})])
def test_the_network_is_read_off_the_shapes(arch, classes, options):
    torch.manual_seed(0)
    model = models.build_model(arch, classes, **options).eval()
    models.save_checkpoint({'state_dict': model.state_dict()}, 'a.pt')
    loaded = models.load_model('a.pt')
    x = torch.rand(2, next(model.parameters()).shape[1], 28, 28)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)) and loaded(x).shape == (2, classes)
    assert not loaded.training
    with pytest.raises(ValueError, match='a.pt: has'):
        models.load_model('a.pt', num_classes=11)


WRAPS = {
    'bare': lambda s: s,
    'state_dict': lambda s: {'state_dict': s, 'epoch': 3},
    'model_state_dict': lambda s: {'model_state_dict': s, 'loss': 0.1},
    'net': lambda s: {'net': s, 'acc': 93.1},
    'model': lambda s: {'model': s},
    'ema_state_dict': lambda s: {'ema_state_dict': {'n_averaged': torch.tensor(3)} | {
        f'module.{k}': v for k, v in s.items()}, 'state_dict': {k: v * 0 for k, v in s.items()}},
    'a name under model': lambda s: {'model': 'smallcnn', 'state_dict': s},
    'no averaged weights yet': lambda s: {'ema_state_dict': None, 'state_dict': s},
    'nested': lambda s: {'model': {'state_dict': s}},
    **{name: lambda s, name=name: {name: s, 'epoch': 3} for name in (
        'last', 'best', 'weights', 'model_ema', 'rmodel')},
    'Lightning': lambda s: {'state_dict': {f'net.{k}': v for k, v in s.items()}, 'hparams': {}},
    'any prefix': lambda s: {f'wrapper.of.it.{k}': v for k, v in s.items()},
    **{prefix: lambda s, prefix=prefix: {f'{prefix}{k}': v for k, v in s.items()} for prefix in (
        'module.', 'model.', '_orig_mod.', 'module.0.', 'module._orig_mod.',
        '_orig_mod.module.model.', 'model.module.0._orig_mod.')},
    'half precision': lambda s: {k: v.half() for k, v in s.items()},
    'Namespace': lambda s: {'state_dict': s, 'args': argparse.Namespace(epsilon=0.1, lrs=[1, 2])},
    'NumPy': lambda s: {'net': s, 'acc': np.float64(0.9), 'n': np.int64(3), 'f': np.float32(1),
                        'b': np.bool_(True), 'accs': np.arange(3.0)},
}


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('wrap', WRAPS)
def test_wrapped_weights(wrap, zipped, trained):
    torch.save(WRAPS[wrap](trained.state_dict()), 'a.pt', _use_new_zipfile_serialization=zipped)
    loaded = models.load_model('a.pt').state_dict()
    for k, v in trained.state_dict().items():
        assert torch.equal(loaded[k], v.half().float() if wrap == 'half precision' else v)


def test_the_dead_sub_block_of_trades_is_left_out():
    state = models.build_model('wideresnet10-1').state_dict()
    state |= {f'sub_{k}': v for k, v in state.items() if k.startswith('block1')}
    torch.save({f'module.{k}': v for k, v in state.items()}, 'a.pt')
    assert isinstance(models.load_model('a.pt'), models.WideResNet)


@torch.no_grad()
def test_normalization_is_inside_the_network(trained):
    wide = models.build_model('wideresnet10-1').eval()
    for model, text, (mean, std), shape in (
            (trained, '0.25/0.5', ([0.25], [0.5]), (3, 1, 28, 28)),
            (wide, 'cifar10', models.NORMALIZATIONS['cifar10'], (2, 3, 32, 32))):
        torch.save(model.state_dict(), 'a.pt')
        loaded, x = models.load_model('a.pt', normalize=text), torch.rand(shape)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        torch.testing.assert_close(loaded(x), model((x - mean) / std))
        assert list(loaded.state_dict()) == list(model.state_dict())
    for wrong in ('0.5', '0.5/0', '0.5/nan', 'inf/1', '1,2/1', 'imagenet'):
        with pytest.raises(ValueError, match='a.pt: .*normaliz|^normalize'):
            models.load_model('a.pt', normalize=wrong)


def test_a_mismatch_names_what_is_missing_and_unexpected(trained):
    state = trained.state_dict()
    without = {k: v for k, v in state.items() if k != 'classifier.fc2.bias'}
    for content, arch, told in (
            (without | {'classifier.extra': torch.zeros(1)}, None,
             'missing classifier.fc2.bias; unexpected classifier.extra'),
            (state | {'classifier.fc1.weight': torch.zeros(200, 7)}, None,
             'classifier.fc1.weight has shape .200, 7.'),
            (state | {'classifier.fc3.bias': torch.full((10,), math.nan)}, None,
             'fc3.bias is not finite'),
            ({'foo': torch.zeros(1)}, None, 'no known network'),
            ({'foo': torch.zeros(1)}, 'resnet18', 'missing conv1.weight.* unexpected foo')):
        torch.save(content, 'a.pt')
        with pytest.raises(ValueError, match=told):
            models.load_model('a.pt', arch)


def saved(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def flipped(content):
    middle = len(content) // 2
    wrong = bytes(255 - b for b in content[middle:middle + 50])
    return content[:middle] + wrong + content[middle + 50:]


WEIGHTS = {'w': torch.zeros(3000)}
UNREADABLE = {
    'empty': (b'', 'not a checkpoint'), 'text': (b'hello\nworld\n', 'not a checkpoint'),
    'a page': (b'<!DOCTYPE html><html></html>', 'not a checkpoint'),
    'a pointer': (b'version https://git-lfs.github.com/spec/v1\n', 'not a checkpoint'),
    **{f'zip cut at {at}': (saved(WEIGHTS)[:at], 'cut off') for at in (10, 500, 9000, -1)},
    **{f'old cut at {at}': (saved(WEIGHTS, False)[:at], 'cut off') for at in (20, 200, 9000, -1)},
    'damaged': (flipped(saved(WEIGHTS)), 'damaged'),
    'code': (saved({'w': WEIGHTS, 'x': Evil()}), 'refused.*system'),
    'code, old': (saved({'w': WEIGHTS, 'x': Evil()}, False), 'refused.*system'),
    'code, pickle 2': (pickle.dumps({'x': Evil()}, protocol=2), 'refused.*system'),
    'code, pickle 5': (pickle.dumps({'x': Evil()}, protocol=5), 'refused'),
    'a module': (saved(nn.Linear(2, 2)), 'a whole .*Linear; .*state_dict'),
    'a list of state_dicts': (saved({'state_dict': [WEIGHTS], 'epoch': 1}),
                              r'a dict of state_dict \(list\), epoch \(int\)'),
    'a list': (saved([1, 2]), 'no state_dict'), 'a tensor': (saved(torch.zeros(3)), 'no state_d'),
    'nothing': (saved({}), 'no state_dict'), 'no names': (saved({1: torch.zeros(3)}), 'no state_d'),
    'only a counter': (saved({'n_averaged': torch.tensor(1)}), 'no state_dict'),
}


@pytest.mark.parametrize('case', UNREADABLE)
def test_files_that_are_no_checkpoint(case, recwarn):
    content, reason = UNREADABLE[case]
    Path('a.pt').write_bytes(content)
    with pytest.raises(ValueError, match=f'^a.pt: .*{reason}') as caught:
        models.load_model('a.pt')
    assert '\n' not in str(caught.value) and not os.path.exists('ran') and not recwarn.list


def test_names_and_shapes_are_robustbenchs():
    """RobustBench's PreActResNet(PreActBlockV2, bn_before_fc=True) and WideResNet, name by name."""
    preact = [f'layer{i}' for i in (1, 2, 3, 4)]
    wide = [f'block{i}.layer' for i in (1, 2, 3)]
    for arch, norm, last, layers, num_blocks, shortcuts, shapes in (
            ('preactresnet18', 'bn', 'linear', preact, 2,
             [f'{layer}.0.shortcut.0' for layer in preact[1:]],
             {'conv1.weight': (64, 3, 3, 3), 'layer1.0.conv1.weight': (64, 64, 3, 3),
              'layer2.0.bn1.weight': (64,), 'layer2.0.conv1.weight': (128, 64, 3, 3),
              'layer3.0.shortcut.0.weight': (256, 128, 1, 1),
              'layer4.1.conv2.weight': (512, 512, 3, 3),
              'bn.running_var': (512,), 'linear.weight': (10, 512), 'linear.bias': (10,)}),
            ('wideresnet28-10', 'bn1', 'fc', wide, 4,
             [f'{layer}.0.convShortcut' for layer in wide],
             {'conv1.weight': (16, 3, 3, 3), 'block1.layer.0.conv1.weight': (160, 16, 3, 3),
              'block1.layer.0.convShortcut.weight': (160, 16, 1, 1),
              'block2.layer.0.bn1.weight': (160,),
              'block2.layer.3.conv2.weight': (320, 320, 3, 3),
              'block3.layer.0.convShortcut.weight': (640, 320, 1, 1),
              'bn1.running_mean': (640,), 'fc.weight': (10, 640), 'fc.bias': (10,)})):
        blocks = [f'{layer}.{i}' for layer in layers for i in range(num_blocks)]
        convolutions = ['conv1', *shortcuts, *(f'{b}.conv{i}' for b in blocks for i in (1, 2))]
        norms = [norm, *(f'{b}.bn{i}' for b in blocks for i in (1, 2))]
        names = [f'{name}.weight' for name in convolutions] + [f'{last}.weight', f'{last}.bias']
        names += [f'{name}.{k}' for name in norms for k in (
            'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')]
        state = models.build_model(arch).state_dict()
        assert sorted(state) == sorted(names)
        assert {k: tuple(state[k].shape) for k in shapes} == shapes


def noisy(arch):
    """A network whose batch normalization and biases are not those of a new one; its weights."""
    torch.manual_seed(1)
    model = models.build_model(arch).eval().double()
    for name, value in model.state_dict().items():
        if value.dim() == 1 and value.is_floating_point():
            value.uniform_(0.5, 1.5) if 'var' in name or 'weight' in name else value.normal_(0, 0.1)
    return model, model.state_dict()


def norm(x, s, name):
    return F.batch_norm(x, *(s[f'{name}.{k}'] for k in (
        'running_mean', 'running_var', 'weight', 'bias')))


@torch.no_grad()
def test_logits_are_robustbenchs_forward_pass():
    """Their forward passes, written out on this project's weights."""
    x = torch.rand(2, 3, 32, 32).double()
    for arch, layer, layers, short, last, linear in (
            ('preactresnet18', 'layer{}', 4, 'shortcut.0', 'bn', 'linear'),
            ('wideresnet16-2', 'block{}.layer', 3, 'convShortcut', 'bn1', 'fc')):
        model, s = noisy(arch)
        out = F.conv2d(x, s['conv1.weight'], padding=1)
        for at in [f'{layer.format(n + 1)}.{i}' for n in range(layers) for i in (0, 1)]:
            stride = 2 if at.endswith('0') and at != layer.format(1) + '.0' else 1
            act, shortcut = F.relu(norm(out, s, f'{at}.bn1')), s.get(f'{at}.{short}.weight')
            out = out if shortcut is None else F.conv2d(act, shortcut, stride=stride)
            act = F.conv2d(act, s[f'{at}.conv1.weight'], stride=stride, padding=1)
            act = F.relu(norm(act, s, f'{at}.bn2'))
            out = out + F.conv2d(act, s[f'{at}.conv2.weight'], padding=1)
        out = F.relu(norm(out, s, last)).mean((2, 3))
        expected = F.linear(out, s[f'{linear}.weight'], s[f'{linear}.bias'])
        torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------- nothing silent, nothing lost

class Killed(BaseException):
    pass


@pytest.mark.parametrize('moment', range(1, 8))
def test_best_is_that_of_a_whole_run_whenever_it_was_killed(moment, monkeypatch):
    """Between any two files that take their places; epochs 1, 2 and 4 are each the best so far."""
    rows = [dict(pgd10=v) for v in (0.1, 0.3, 0.2, 0.4)]
    evaluations(monkeypatch, *rows)
    replace_file, count = os.replace, []
    def killed(a, b):
        count.append(b) if str(b).endswith('.pt') else None
        if len(count) == moment:
            raise Killed
        replace_file(a, b)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, 'replace', killed)
        main_of('train_at', TINY, '--epochs 4')
    begun = last_of()['epoch'] if os.path.exists('run/last.pt') else 0
    assert begun == (0, 0, 1, 1, 2, 3, 3)[moment - 1]
    evaluations(monkeypatch, *rows[begun:])
    main_of('train_at', '--resume run' if begun else f'{TINY} --epochs 4 --model-dir new')
    directory = 'run' if begun else 'new'
    assert last_of(directory, 'best')['epoch'] == last_of(directory)['epoch'] == 4


def same_weights(a, b):
    return all(torch.equal(v, b['state_dict'][k]) for k, v in a['state_dict'].items())


def test_best_is_kept_where_the_disk_is_full_for_it_alone(monkeypatch):
    evaluations(monkeypatch, *[dict(pgd10=v) for v in (0.1, 0.4, 0.2, 0.3)])
    save, attempts = models.save_checkpoint, []
    def full(content, path):
        if path.endswith('best.pt') and content['epoch'] == 2:
            attempts.append(1)
            if len(attempts) < 3:
                raise OSError(28, 'No space left on device')
        save(content, path)
    monkeypatch.setattr(models, 'save_checkpoint', full)
    _, told = main_of('train_at', TINY, '--epochs 4')
    assert told.count('No space') == 2 and last_of()['epoch'] == 4
    best = last_of(name='best')
    assert best['epoch'] == 2 and len(best['log']) == 2
    assert not same_weights(best, last_of())  # those of epoch 2, not what they have become


def test_what_makes_another_run_is_in_its_name():
    def name(flags, script='train_trades'):
        return importlib.import_module(script).parse_args(flags.split()).model_dir
    assert name('') == name('--lr 0.1 --batch-size 128') == 'runs/cifar10-trades-seed1'
    assert name('--entropy-weight --beta 5.5') == 'runs/cifar10-ew-trades-beta5.5-seed1'
    flags = ['--arch wideresnet34-10', '--entropy-weight --tau inf', '--awp-gamma 0.005',
             '--ema 0.995', '--extra-data x/a.npz', '--extra-data x/b.npz', '--epsilon 4/255',
             '--num-steps 7', '--epochs 30', '--lr-schedule cosine', '--val-size 1000', '--amp',
             '--no-amp', '--init-from a/last.pt', '--init-from b/last.pt', '--seed 2',
             '--lr-milestones 3 4', '--lr-milestones 34', '--dataset mnist', '--beta 5',
             '--beta 5.5']
    assert len({name(f) for f in [*flags, '']}) == len(flags) + 1
    told = {'--log-interval 5', '--save-freq 3', '--data-dir x', '--no-cuda', '--allow-chance'}
    assert {name(f) for f in told} == {name('')}
    assert name('--begin-epoch 3', 'train_gairat') == 'runs/cifar10-gairat-begin-epoch3-seed1'


@pytest.mark.parametrize('script, flags', [
    ('train_at', '--tau 5'), ('train_at', '--tau=inf'), ('train_at', '--awp-warmup 3'),
    ('train_at', '--extra-fraction 0.5'), ('train_at', '--lr-schedule cosine --lr-milestones 3'),
    ('train_at', '--val-size 10 --test-size 5'), ('train_at', '--awp-gamma 0.1 --epochs 5'),
    ('train_gairat', '--begin-epoch 21'), ('evaluate', '--tsne-classes 1 2'),
    ('evaluate', '--ls-scale 5 --attacks pgd20'), ('evaluate', '--restarts 5 --attacks fgsm'),
    ('evaluate', '--aa-epsilon 0.031 --attacks pgd20'),
    ('evaluate', '--entropy-threshold 1 --attacks ls')])
def test_a_flag_without_effect_is_a_mistake(script, flags):
    needed = '--model-path none.pt' if script == 'evaluate' else '--dataset digits'
    told = fails(script, needed, flags)
    assert 'no effect' in told or 'past the last epoch' in told
    assert os.listdir() == []


def test_config_is_json_for_any_parser_and_keeps_the_first_command(monkeypatch):
    def refuse(constant):
        raise ValueError(constant)
    def config():
        return json.loads(Path('run/config.json').read_text(), parse_constant=refuse)
    main_of('train_gairat', TINY, '--entropy-weight --tau inf --psi inf --epochs 1')
    first = config()
    assert first['args']['tau'] == 'Infinity' and '--tau' in first['command']
    main_of('train_gairat', '--resume run/last.pt --epochs 2')  # of a file in it as well
    assert config()['command'] == first['command'] and config()['args']['epochs'] == 2
    assert [words[1] for words in config()['resumed']] == ['--resume']
    def full(path, *args, **options):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(models, 'replacing', full)
    _, told = main_of('train_gairat', TINY, '--model-dir full', status=1)
    assert 'config.json could not be written' in told


def test_a_run_goes_on_on_the_kind_of_device_it_began_on(runs, monkeypatch):
    shutil.copytree(runs['at'], 'run')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert train_at.parse_args(['--resume', 'run']).no_cuda
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    models.save_checkpoint(last_of() | {'device': 'cuda'}, 'run/last.pt')
    assert 'CUDA' in fails('train_at', '--resume run')


@pytest.mark.parametrize('flag, told', [
    ('--ema 2', "'2' is not a number in (0, 1)"), ('--seed -1', 'from 0 to 4294967295'),
    ('--seed 4294967296', 'from 0'), ('--epsilon 8', 'write 8/255'), ('--lr inf', '(0, inf)'),
    (f'--epochs {"9" * 5000}', 'whole number from 1')])
def test_a_wrong_number_is_told_what_is_right(flag, told):
    line = fails('train_at', f'--dataset digits {flag}')
    assert told in line and ('8/255' in line) == ('epsilon' in flag)


@pytest.mark.parametrize('capability, avx512, amx, there', [
    ('AVX2', False, False, False), ('AVX512', False, False, False),
    ('AVX512', True, False, True), ('AVX512', False, True, True), ('SVE256', False, False, True)])
def test_bfloat16_is_known_by_the_units(capability, avx512, amx, there, monkeypatch):
    for owner, name, value in ((torch.backends.cpu, 'get_cpu_capability', capability),
                               (torch.cpu, '_is_avx512_bf16_supported', avx512),
                               (torch.cpu, '_is_amx_tile_supported', amx)):
        monkeypatch.setattr(owner, name, lambda value=value: value)
    assert models.has_bfloat16(torch.device('cpu')) == there


def test_bfloat16_where_there_is_none_is_said(monkeypatch):
    monkeypatch.setattr(models, 'has_bfloat16', lambda device: False)
    run = '--train-size 8 --epochs 1 --batch-size 4'
    assert main_of('train_at', TINY, run, '--amp')[1].count('leave --amp out\n') == 1
    assert main_of('train_at', TINY, run, '--model-dir b')[1] == ''


def test_reports_that_cannot_be_written_end_no_run():
    for out, err in (('/dev/full', '/dev/null'), ('/dev/null', '/dev/full')):
        shutil.rmtree('run', ignore_errors=True)
        command = [sys.executable, str(ROOT / 'train_at.py'), *TINY.split(), '--epochs', '1']
        with open(out, 'w') as a, open(err, 'w') as b:
            assert subprocess.run(command, stdout=a, stderr=b).returncode == 0
        assert last_of()['epoch'] == 1
    command = [sys.executable, str(ROOT / 'evaluate.py'), '--model-path', 'run/last.pt', '--csv',
               'a.csv', '--attacks', 'fgsm', '--n-examples', '5']
    with open('/dev/full', 'w') as full:
        assert subprocess.run(command, stdout=full, stderr=full).returncode == 0
    assert os.path.exists('a.csv')


def test_a_file_system_without_locks_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(fcntl, 'flock', Mock(side_effect=OSError(38, 'Function not implemented')))
    monkeypatch.setattr(commands.lock, 'said', False)
    _, told = main_of('train_at', TINY, '--epochs 1')
    assert told.count('\n') == 1 and 'run/.lock' in told and 'Function not implemented' in told
    _, told = main_of('evaluate', '--model-path run/best.pt --attacks fgsm --n-examples 4')
    assert 'locks' not in told and os.path.exists('run/best.pt.eval.json')


@pytest.mark.parametrize('damaged', ['train-images-idx3-ubyte', 'train-labels-idx1-ubyte'])
@pytest.mark.parametrize('keep', [0, 7, 100])
def test_a_damaged_file_of_mnist_is_named(damaged, keep):
    os.makedirs('data/MNIST/raw')
    for split in ('train', 't10k'):
        for name, shape in (('images-idx3', (20, 28, 28)), ('labels-idx1', (20,))):
            head = bytes([0, 0, 8, len(shape)]) + b''.join(n.to_bytes(4, 'big') for n in shape)
            content = head + bytes(math.prod(shape))
            Path(f'data/MNIST/raw/{split}-{name}-ubyte').write_bytes(content)
    assert len(data.load_data('mnist', 'data')[0]) == 20
    path = Path('data/MNIST/raw', damaged)
    path.write_bytes(path.read_bytes()[:min(keep, 20)])
    assert f'{path}: damaged' in fails('train_at', '--dataset mnist --data-dir data')


def test_names_are_not_markup(trained):
    names = ['_old', 'a|b', '$x$', 'ü\udcff', 'tab\there', '%s{}']
    for i, name in enumerate(names):
        torch.save(trained.state_dict(), f'{name}.pt')
    with redirect_stdout(io.StringIO()) as out:
        evaluate.main(['--model-path', *[f'{n}.pt' for n in names], *(
            '--dataset digits --attacks pgd20 --n-examples 12 --figures f --csv a.csv --json a.json'
            ).split()])
    assert all(text in out.getvalue() for text in (r'| a\|b |', '| _old |', 'tab here'))
    assert [row['model'] for row in read_csv('a.csv')] == [
        n.replace('\udcff', '?') for n in names]
    assert [m['model'] for m in json.load(open('a.json', encoding='utf-8'))['models']] == names
    assert evaluate.shorten('_old') == ' _old' and evaluate.shorten('$x$') == r'\$x\$'
    latin = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    commands.say('ü…', latin)
    assert latin.buffer.getvalue() == b'??\n'


def test_weights_without_bookkeeping_and_what_stands_beside_them(trained):
    wide = models.build_model('wideresnet10-1')
    state = {k: v for k, v in wide.state_dict().items() if 'num_batches_tracked' not in k}
    beside = {'path': Path('a/b'), 'when': datetime.date(2020, 1, 1), 'meter': Counter('abc'),
              'args': argparse.Namespace(data=Path('c'), kind=types.SimpleNamespace(a=1)),
              'builtins': [{1}, frozenset('a'), slice(2), range(3), 1j, defaultdict(int)],
              'sgd': torch.optim.SGD(wide.parameters(), 0.1)}
    torch.save({'state_dict': state, **beside}, 'a.pt')
    assert torch.equal(models.load_model('a.pt').fc.weight, wide.fc.weight)
    torch.save({'state_dict': state, 'x': Evil()}, 'b.pt')
    with pytest.raises(ValueError, match='refused.*system.*weights alone'):
        models.load_model('b.pt')
    assert not os.path.exists('ran')
    torch.save({'state_dict': state, 'losses': deque([1.0])}, 'c.pt')  # which torch cannot stand in
    with pytest.raises(ValueError, match='refused.*deque.*weights alone'):
        models.load_model('c.pt')


@pytest.mark.parametrize('names', [
    'mu sigma ', 'normalize.mean normalize.std model.', 'mean std model.', '0.mean 0.std 1.',
    'module.mu module.sigma module.net.'])
def test_a_normalization_in_the_file_is_used(names, trained):
    mean, std, prefix = names.split(' ')
    state = {f'{prefix}{k}': v for k, v in trained.state_dict().items()}
    state |= {mean: torch.tensor([0.25]).view(1, 1, 1, 1), std: torch.tensor([0.5])}
    torch.save(state, 'a.pt')
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(models.load_model('a.pt')(x), trained((x - 0.25) / 0.5))
    with pytest.raises(ValueError, match='a normalization of its own'):
        models.load_model('a.pt', normalize='0.5/0.5')
    assert 'a normalization, which no run keeps' in fails('train_at', TINY, '--init-from a.pt')
    torch.save(state | {std: torch.tensor([0.0])}, 'a.pt')
    with pytest.raises(ValueError, match='normalization by .* std not above 0'):
        models.load_model('a.pt')


def test_networks_of_others_are_named_as_such():
    names = [f'layer{i}.{j}.conv1.weight' for i in (1, 2, 3) for j in (0, 1, 2)]
    resnet20 = {'conv1.weight': torch.zeros(16, 3, 3, 3), 'bn1.weight': torch.zeros(16),
                'linear.weight': torch.zeros(10, 64), **{n: torch.zeros(1) for n in names}}
    for state, told in ((resnet20, r'a ResNet of \[3, 3, 3, 0\] blocks'),
                        ({'0.weight': torch.zeros(2, 2)}, 'known are preactresnet18')):
        torch.save(state, 'a.pt')
        with pytest.raises(ValueError, match=told):
            models.load_model('a.pt')


def test_a_run_starts_from_weights_and_says_so(runs, monkeypatch):
    first, weights = [], runs['ew-trades'] / 'last.pt'
    spy(monkeypatch, train_at, 'loss_function', lambda loss, model, **options: first.append(
        comparable(model.classifier.fc3.weight.detach())))
    shutil.copy(weights, 'burn-in.pt')
    main_of('train_at', '--dataset digits --no-cuda --epochs 1 --train-size 52 --test-size 16',
            '--init-from burn-in.pt')
    assert first[0] == comparable(models.load_model(weights).classifier.fc3.weight.detach())
    run, = Path('runs').iterdir()
    assert 'init-from-burn-in' in run.name
    assert last_of(run)['args']['init_from'] == 'burn-in.pt'
    os.remove('burn-in.pt')  # its weights are in the run
    main_of('train_at', '--resume', run, '--epochs 2')
    for wrong, told in ((models.build_model('smallcnn', 7), 'has 7 classes, not 10'),
                        (models.build_model('smallcnn', 10, 3), 'takes 3-channel images, not 1'),
                        (models.build_model('resnet18', 10, 1), 'does not fit smallcnn')):
        torch.save(wrong.state_dict(), 'wrong.pt')
        line = fails('train_at', TINY, '--init-from wrong.pt')
        assert re.search(f'wrong.pt(, on digits)?: {told}', line)


def test_printed_commands_can_be_pasted(runs):
    shutil.copytree(runs['at'], "a run'")
    script = str(ROOT / 'train_at.py')
    done = python(script, '--resume', "a run'", '--epochs', 3)
    command = shlex.split(done.stdout.split('Next: ')[1])
    assert command == ['python', str(ROOT / 'evaluate.py'), '--model-path', "a run'/best.pt"]


def test_a_launchers_variables_without_a_launcher(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_RANK', '3')
    _, told = main_of('train_at', TINY, '--epochs 1')
    assert told.count('\n') == 1 and 'WORLD_SIZE=2' in told and 'one process' in told
    monkeypatch.setenv('WORLD_SIZE', 'two')
    assert 'WORLD_SIZE' in fails('train_at', TINY, '--model-dir b')


def test_compilation_that_cannot_be_is_one_line(monkeypatch):
    def no_compiler(f, **options):
        raise RuntimeError('no C++ compiler\nand 80 lines')
    monkeypatch.setattr(torch, 'compile', no_compiler)
    assert 'no C++ compiler' in fails('train_at', TINY, '--compile') and os.listdir() == []


def test_milestones_by_data_set_are_such_as_the_flag_takes():
    for epochs in range(1, 30):
        milestones = parsed('--epochs', epochs).lr_milestones
        given = ' '.join(map(str, milestones))
        assert parsed('--epochs', epochs, '--lr-milestones', given).lr_milestones == milestones


def test_an_interrupted_load_is_one_line(monkeypatch):
    monkeypatch.setattr(models, 'load_model', Mock(side_effect=KeyboardInterrupt))
    fails('evaluate', '--model-path a.pt', status=130)


# ---------------------------------------------------------------- one's own network, data, seeds

NET = """import torch.nn as nn
import helper
class Net(nn.Module):
    num_classes = 1
    def __init__(self, num_classes=10):
        super().__init__()
        self.in_channels = 7  # no matter to ours, nor is num_classes
        self.model = nn.Sequential(nn.Conv2d(1, helper.width, 5, 3), nn.BatchNorm2d(helper.width),
                                   nn.ReLU(), nn.Flatten(), nn.Linear(576, num_classes))
    def forward(self, x):
        return self.model(x) * self.num_classes
class Featured(Net):
    def features(self, x):
        return self.model[:4](x)
def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
def raises():
    raise RuntimeError('of the constructor')
def eleven():
    return nn.Linear(28, 11)
def coloured(num_classes):
    return nn.Conv2d(3, num_classes, 28)
def number():
    return 5
class Hides(Net):
    amp = 3
"""


@pytest.fixture
def own(monkeypatch):
    """A file of networks, elsewhere; and nothing that was named before."""
    monkeypatch.setattr(models, 'NAMED', os.path.abspath('named'))
    monkeypatch.setattr(sys, 'path', sys.path[:])
    monkeypatch.delitem(sys.modules, 'helper', raising=False)
    os.makedirs('elsewhere')
    Path('elsewhere/net.py').write_text(NET)
    Path('elsewhere/helper.py').write_text('width = 9')
    return 'elsewhere/net.py:Net'


@every_algorithm
def test_ones_own_network_trains_goes_on_and_is_evaluated(algorithm, own, monkeypatch):
    flags = f'{TINY} --arch {own} --entropy-weight {EXTRAS}'
    main_of(f'train_{algorithm}', flags, '--epochs 3')
    main_of(f'train_{algorithm}', flags, '--model-dir half')
    os.makedirs('there')
    monkeypatch.chdir('there')  # its file is found from anywhere, for it was named
    main_of(f'train_{algorithm}', '--resume ../half --epochs 3')
    state = last_of('../half')['state_dict']
    assert list(state)[0] == 'model.0.weight'
    assert state.keys() == last_of('../run')['state_dict'].keys()
    model = models.load_model('../run/last.pt')
    assert type(model).__name__ == 'Net' and not model.training
    out, err = main_of('evaluate', '--model-path ../run/last.pt --attacks pgd10 pgd20 --n-examples '
                       '40 --figures f')
    assert list(accuracies(out)) == ['run/last'] and 'no `features`' in err
    monkeypatch.setattr(models, 'NAMED', 'nothing')  # as on another machine: no file chooses code
    for script, args in (('evaluate', '--model-path ../run/last.pt'),
                         (f'train_{algorithm}', '--resume ../run')):
        told = fails(script, args)
        assert 'names code to run' in told and f"--arch {os.path.abspath('../' + own)}" in told
    main_of('evaluate', '--model-path ../run/last.pt --attacks pgd10 --n-examples 4 --arch',
            f'../{own}')


def test_ones_own_network_takes_any_weights_and_its_features_are_drawn(own):
    model = models.build_model('elsewhere/net.py:Featured', 10).eval()
    bare = {k.removeprefix('plain.'): v for k, v in model.state_dict().items()}
    x = torch.rand(2, 1, 28, 28)
    for prefix in ('', 'module.', 'net.module.', 'model.'):
        torch.save({'net': {prefix + k: v for k, v in bare.items()}}, 'w.pt')
        loaded = models.load_model('w.pt', 'elsewhere/net.py:Featured', 10)
        assert torch.equal(loaded(x), model(x))
        assert loaded.penultimate_features(x).shape == (2, 576)
    normalized = models.load_model('w.pt', 'elsewhere/net.py:Featured', 10, '0.25/0.5')
    assert torch.equal(normalized(x), model((x - 0.25) / 0.5))
    assert normalized.state_dict().keys() == bare.keys()
    out, _ = main_of('evaluate', '--model-path w.pt --arch elsewhere/net.py:Featured --dataset '
                     'digits --attacks pgd20 --n-examples 60 --figures f')
    assert accuracies(out) and os.path.exists('f/tsne.png')
    torch.save(models.build_model('elsewhere/net.py:plain').state_dict(), 'p.pt')
    assert models.load_model('p.pt', 'elsewhere/net.py:plain')(x).shape == (2, 10)
    models.build_model('torchvision.models:resnet18', 7)  # anybody's
    hashes = set()
    for more in ('', '# another forward'):  # of the same weights
        Path('elsewhere/net.py').write_text(NET + more)
        plain = models.load_model('p.pt', 'elsewhere/net.py:plain')
        hashes.add(evaluate.weights_hash(plain))
    assert len(hashes) == 2


@pytest.mark.parametrize('arch, told', [
    ('none.py:Net', 'No such file'), ('elsewhere/net.py:Nope', "no attribute 'Nope'"),
    ('elsewhere/net.py:raises', r'RuntimeError: of the constructor \(net.py:18\)'),
    ('elsewhere/net.py:eleven', r'gives \(2, 1, 28, 11\) of 2 images, not logits \(2, 10\)'),
    ('elsewhere/net.py:coloured', r'does not take images \(1, 28, 28\)'),
    ('elsewhere/net.py:number', 'gives a int'), ('elsewhere/net.py:Hides', 'amp .* be hidden'),
    ('no.such:Net', "No module named 'no'"), ('elsewhere/helper.py', 'FILE.py:NAME')])
def test_what_is_wrong_with_ones_own_network_is_one_line(arch, told, own):
    assert re.search(told, fails('train_at', TINY, '--arch', arch))
    torch.save({'w': torch.zeros(2)}, 'w.pt')
    fails('evaluate', '--model-path w.pt --dataset digits --arch', arch)
    assert not os.path.exists('run')


def own_data(**changed):
    """An own.npz of digits as 12 x 10 pixels of three channels, of the classes 0 to 4."""
    arrays = {}
    for split in ('train', 'test'):
        images, labels = data.load_data('digits', train=split == 'train')
        images = images[labels < 5][:80, :, 8:20, 8:18].expand(-1, 3, -1, -1)
        arrays |= {f'{split}_images': images.permute(0, 2, 3, 1).numpy(),
                   f'{split}_labels': labels[labels < 5][:80].numpy().astype(np.uint8)}
    np.savez('own.npz', **{k: v for k, v in (arrays | changed).items() if v is not None})


def test_ones_own_images_train_and_are_evaluated(monkeypatch):
    own_data(class_names=['nought', 'one', 'two', 'three', 'four'])
    args = train_at.parse_args(['--dataset', 'own.npz'])
    protocol = data.DATASETS['cifar10'].protocol | {'augment': 'crop'}  # no flips
    assert {k: getattr(args, k) for k in protocol} == protocol
    small = '--dataset own.npz --arch wideresnet10-1 --epochs 2 --num-steps 2 --batch-size 16'
    main_of('train_trades', small, '--entropy-weight --val-size 20')
    run, = Path('runs').iterdir()
    assert run.name.startswith('own-ew-trades-') and last_of(run)['num_classes'] == 5
    os.makedirs('there')
    monkeypatch.chdir('there')
    main_of('train_trades', f'--resume ../{run} --epochs 3')
    out, _ = main_of('evaluate', f'--model-path ../{run}/last.pt --attacks pgd20 --figures f '
                     '--tsne-classes two four')
    table, = accuracies(out).values()
    assert list(table) == ['clean', 'pgd20 (8/255)'] and '80 test images of /' in out
    assert {row['class'] for row in read_csv('f/tsne.csv')} == {'two', 'four'}
    spec = data.find_dataset('../own.npz')
    assert (spec.num_classes, spec.shape) == (5, (3, 12, 10))
    assert '28 x 28' in fails('train_at', '--dataset ../own.npz --arch smallcnn')
    assert 'has 5 classes in all' in fails('evaluate', '--attacks autoattack --model-path',
                                           f'../{run}/last.pt')
    monkeypatch.chdir('..')
    own_data(test_labels=LABELS)  # other images or labels in the same file are evaluated anew
    out, _ = main_of('evaluate', f'--model-path {run}/last.pt --attacks pgd20')
    assert list(accuracies(out).values()) != [table]


LABELS = np.arange(80) % 5


@pytest.mark.parametrize('changed, told', [
    ({'test_images': None}, 'not an .npz with test_images'), ({'train_labels': None}, 'labels'),
    ({'train_labels': LABELS + 1}, '0 to K - 1'), ({'train_labels': LABELS * 1.0}, 'whole numbers'),
    ({'train_labels': LABELS - 1}, 'whole numbers from 0'), ({'test_labels': LABELS + 4}, '0 to K'),
    ({'train_labels': LABELS[:9]}, r'\(9,\)'), ({'train_labels': LABELS * 0}, 'K at least 2'),
    ({'test_images': np.zeros((80, 9, 9, 3), np.uint8)}, 'differ in shape'),
    ({'train_images': np.zeros((80, 12, 10, 3))}, 'float64'), ({'class_names': ['a']}, '5 classes'),
    ({'test_images': np.array([None] * 80)}, 'allow_pickle')])
def test_what_is_wrong_with_ones_own_images_is_one_line(changed, told):
    own_data(**changed)
    assert re.search(told, fails('train_at', '--dataset own.npz --arch wideresnet10-1'))
    assert 'none.npz' in fails('train_at', '--dataset none.npz') and os.listdir() == ['own.npz']


def seeds_of(runs, *names):
    """Copies of runs of three seeds each, with other weights: paths of their last.pt."""
    for name in names:
        for seed in (1, 2, 3):
            content = last_of(runs[name])
            content['args'] |= {'seed': seed, 'model_dir': f'{seed}'}
            content['state_dict']['classifier.fc3.bias'][seed] += 3
            os.makedirs(f'{name}-seed{seed}')
            models.save_checkpoint(content, f'{name}-seed{seed}/last.pt')
            log = [row | {'clean': seed / 10} for row in rows_of(runs[name])]
            evaluate.write_csv(f'{name}-seed{seed}/log.csv', log[0], [row.values() for row in log])
    return [f'{name}-seed{seed}/last.pt' for name in names for seed in (1, 2, 3)]


def test_seeds_are_put_together(runs, monkeypatch):
    paths, bars, bands = seeds_of(runs, 'at', 'ew-at'), [], []
    spy(monkeypatch, matplotlib.axes.Axes, 'errorbar',
        lambda _, ax, x, y, yerr, xerr, **options: bars.append((yerr, xerr)))
    spy(monkeypatch, matplotlib.axes.Axes, 'fill_between',
        lambda _, ax, x, low, high, **options: bands.append((low, high)))
    out, _ = main_of('evaluate', '--model-path', *paths, runs['mart'] / 'last.pt', '--attacks',
                     'pgd20 ls --n-examples 50 --epsilon 0.05 --csv a.csv --json a.json',
                     '--figures f')
    first, entropies, rows, spreads = (
        [re.split(r' *\| *', line)[1:-1] for line in part.splitlines()]
        for part in re.findall(r'(?:^\|.*\n?)+', out, re.M))
    assert rows[0] == ['models', 'seeds', 'clean', 'pgd20 (0.05)', 'ls (0.05)', 'worst',
                       'pgd20 - worst']
    assert spreads[0] == ['models', 'seeds', *entropies[0][2:]]
    for part in (rows, spreads):
        assert [row[:2] for row in part[2:]] == [['at/last', '3'], ['ew-at/last', '3']]
    assert len(first) == 2 + 7 == len(entropies)
    content = json.loads(Path('a.json').read_text())
    for i, group in enumerate(content['seeds']):
        members = content['models'][3 * i:3 * i + 3]
        assert [member['model'] for member in members] == group['models']
        columns = 'clean', 'pgd20', 'ls', 'worst', 'pgd20 - worst'
        for column, text in zip(columns, rows[2 + i][2:]):
            values = [member['accuracy'][column] for member in members]
            assert group['mean'][column] == pytest.approx(np.mean(values))
            assert group['sd'][column] == pytest.approx(np.std(values, ddof=1))
            assert column.startswith('pgd20 -') or group['sd'][column] > 0
            assert text == f'{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}'
        for j, (column, scale, digits) in enumerate((('entropy', 1, 3), ('high_entropy', 100, 2))):
            values = [scale * member['report'][column] for member in members]
            assert spreads[2 + i][2 + j] == (f'{np.mean(values):.{digits}f} ± '
                                             f'{np.std(values, ddof=1):.{digits}f}')
    share = content['models'][0]['accuracy']['clean']
    error = math.sqrt(share * (1 - share) / 50)
    assert content['models'][0]['stderr']['clean'] == pytest.approx(error)
    lines = read_csv('a.csv')
    assert [line['model'] for line in lines[7:]] == [
        f'{name}/last ({what} of 3 seeds)' for name in ('at', 'ew-at') for what in ('mean', 'sd')]
    assert float(lines[7]['worst']) == pytest.approx(content['seeds'][0]['mean']['worst'])
    assert float(lines[0]['stderr of clean']) == pytest.approx(error)
    drawn = {row['model']: row for row in read_csv('f/pgd_vs_worst.csv')}
    assert list(drawn) == ['at/last', 'ew-at/last', 'mart/last']
    spread = content['seeds'][0]['sd']
    assert bars[0] == pytest.approx((100 * spread['worst'], 100 * spread['high_entropy']))
    assert bars[2] == (None, None)
    assert np.array(bands[0]) == pytest.approx(np.array([[10, 10], [30, 30]]))
    assert float(drawn['at/last']['worst']) == pytest.approx(content['seeds'][0]['mean']['worst'])
    out, _ = main_of('evaluate', '--model-path', *paths[:2], paths[0].replace('at-', 'ew-at-'),
                     '--n-examples 20 --attacks clean --names one two three')
    assert re.findall(r'^\| (\w+) \| (\d+) \| \d', out, re.M) == [
        ('one', '20'), ('two', '20'), ('three', '20'), ('one', '2')]
    shutil.copytree('at-seed1', 'again')  # of the same seed: no second one
    out, _ = main_of('evaluate', '--model-path', paths[0], 'again/last.pt --attacks fgsm')
    assert len(accuracies(out)) == 2 and 'standard deviation' not in out
    for wrong in ('one', 'one one'):
        assert '--names' in fails('evaluate', '--model-path', *paths[:2], '--names', wrong)


def test_methods_have_a_colour_and_their_weighted_forms_another_line():
    def row(algorithm, ew=False, tau=1.0):
        return [{'about': {'algorithm': algorithm, 'args': {'entropy_weight': ew, 'tau': tau}}}]
    groups = {'a': row('at'), 'b': row('at', True), 'c': row('at', True, math.inf),
              'd': row('mart'), 'e': row('at'), 'f': [{'about': {}}]}
    assert evaluate.styles(groups) == {'a': (0, 0), 'b': (0, 1), 'c': (0, 2), 'd': (1, 0),
                                       'e': (2, 0), 'f': (3, 0)}


def test_the_worst_case_is_what_withstands_all(trained):
    for attacks, added in ((['pgd20', 'ls', 'fgsm'], ['worst', 'pgd20 - worst']), (['pgd20'], []),
                           (['fgsm', 'apgd-ce'], ['worst']), (['autoattack'], []),
                           (['pgd20', 'autoattack'], ['worst', 'pgd20 - worst'])):
        columns = evaluate.plan_columns(attacks, 0.1, 0.2)
        outcome, _ = evaluate.evaluate_model(trained, *digits(20), columns)
        assert list(outcome) == [*columns, *added]
        if added:
            of_all = [outcome[k] for k in columns if not k.startswith('aa: ')]
            assert (outcome['worst'] == np.logical_and.reduce(of_all)).all()
        if len(added) == 2:
            over = outcome['pgd20'].mean() - outcome['worst'].mean()
            assert outcome['pgd20 - worst'].mean() == pytest.approx(over) and over >= 0
    columns = evaluate.plan_columns(['pgd20', 'ls'], 0.05, 0.05, worst_case=True)
    assert 'worst' not in evaluate.evaluate_model(trained, *digits(20), columns)[0]


def test_outcomes_and_adversarial_images_are_saved(best, trained):
    main_of('evaluate', '--model-path', best, '--attacks pgd20 autoattack --n-examples 20 '
            '--batch-size 8 --epsilon 0.2 --save-outcomes o.npz --save-examples e.npz '
            '--json a.json')
    outcomes, examples, (images, labels) = np.load('o.npz'), np.load('e.npz'), digits(20)
    row, = json.loads(Path('a.json').read_text())['models']
    means = dict(zip(outcomes['columns'].tolist(), outcomes['correct'].mean(2)[0]))
    assert means == pytest.approx(row['accuracy']) and outcomes['models'] == [row['model']]
    assert (outcomes['labels'] == labels.numpy()).all()
    assert sorted(examples) == ['autoattack', 'labels', 'pgd20']
    for attack in ('pgd20', 'autoattack'):
        x_adv = torch.from_numpy(examples[attack])
        assert (x_adv - data.to_float(images)).abs().max() <= 0.2 + 1e-6
        with torch.no_grad():
            stood = (trained(x_adv).argmax(1) == labels).numpy()
        assert (stood == outcomes['correct'][0][list(means).index(attack)]).all()
    assert 'one model' in fails('evaluate', '--model-path', best, 'o.npz --save-examples e.npz')


def test_processes_share_an_evaluation_out(best):
    cache = Path(f'{best}.eval.json')
    args = (f'--model-path {best} --attacks pgd20 autoattack --n-examples 12 --batch-size 2 '
            '--epsilon 0.2 --no-cuda').split()
    one = python(ROOT / 'evaluate.py', *args)
    known = json.loads(cache.read_text())
    half = {k: [v if i % 3 else None for i, v in enumerate(of_k)] for k, of_k in known.items()}
    for kept in ({}, half):
        cache.write_text(json.dumps(kept))
        two = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
                     ROOT / 'evaluate.py', *args)
        assert two.returncode == 0 and two.stdout == one.stdout, two.stderr
        assert two.stderr.count('autoattack') == 1  # one speaks
        assert json.loads(cache.read_text()) == known


# ---------------------------------------------------------------- more of anyone's checkpoints

@pytest.mark.parametrize('arch, parameters', [
    ('resnet34', 21_282_122), ('resnet50', 23_520_842), ('preactresnet18-raw', 11_172_170),
    ('preactresnet18-swish', 12_548_426), ('wideresnet28-10-swish', 36_479_194)])
def test_their_networks_have_their_sizes_and_are_read_off_the_shapes(arch, parameters):
    model = models.build_model(arch).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    torch.save(model.state_dict(), 'a.pt')
    assert models.infer_arch(model.state_dict())[0] == arch.removesuffix('-raw')
    x = torch.rand(2, 3, 32, 32)
    loaded = models.load_model('a.pt', arch if arch.endswith('raw') else None)
    assert loaded.penultimate_features(x).shape == (2, 2048 if arch == 'resnet50' else 512 if
                                                    'wide' not in arch else 640)
    torch.testing.assert_close(loaded(x), model(x))


@torch.no_grad()
def test_swish_networks_are_deepminds_forward_pass():
    """With the padding of TensorFlow: before a stride of 2 right and below alone."""
    def swish(x):
        return x / (1 + (-x).exp())
    def conv(x, weight, stride):
        if weight.shape[-1] == 3:
            x = F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        return F.conv2d(x, weight, stride=stride)
    x = torch.rand(2, 3, 32, 32).double()
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (
        (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))
    for arch, first, layers in (
            ('wideresnet16-2-swish', 'init_conv', [f'layer.{i}.block' for i in range(3)]),
            ('preactresnet18-swish', 'conv_2d', [f'layer_{i}' for i in range(4)])):
        model, s = noisy(arch)
        blocks = [f'{layer}.{j}' for layer in layers for j in (0, 1)]
        out = conv((x - mean) / std, s[f'{first}.weight'], 1)
        one, two = ('conv_0', 'conv_1') if 'wide' in arch else ('conv_2d_1', 'conv_2d_2')
        for at in blocks:
            stride = 2 if at.endswith('0') and at != blocks[0] else 1
            act = swish(norm(out, s, f'{at}.batchnorm_0'))
            short = out
            if f'{at}.shortcut.weight' in s:
                short = conv(act if 'wide' in arch else out, s[f'{at}.shortcut.weight'], stride)
            out = conv(act, s[f'{at}.{one}.weight'], stride)
            out = conv(swish(norm(out, s, f'{at}.batchnorm_1')), s[f'{at}.{two}.weight'], 1) + short
        out = swish(norm(out, s, 'batchnorm')).mean((2, 3))
        expected = F.linear(out, s['logits.weight'], s['logits.bias'])
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)
    hundred = models.build_model('wideresnet10-1-swish', 100).input_normalization
    assert hundred == ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])
    assert models.build_model('wideresnet10-1-swish', in_channels=1).input_normalization is None


@torch.no_grad()
def test_bottlenecks_and_raw_shortcuts_are_robustbenchs_forward_pass():
    model, s = noisy('resnet50')
    x, at = torch.rand(2, 64, 8, 8).double(), 'layer1.0'
    out = F.relu(norm(F.conv2d(x, s[f'{at}.conv1.weight']), s, f'{at}.bn1'))
    out = F.relu(norm(F.conv2d(out, s[f'{at}.conv2.weight'], padding=1), s, f'{at}.bn2'))
    short = norm(F.conv2d(x, s[f'{at}.shortcut.0.weight']), s, f'{at}.shortcut.1')
    expected = F.relu(norm(F.conv2d(out, s[f'{at}.conv3.weight']), s, f'{at}.bn3') + short)
    torch.testing.assert_close(model.layer1[0](x), expected)
    model, s = noisy('preactresnet18-raw')
    at = 'layer2.0'
    out = F.conv2d(F.relu(norm(x, s, f'{at}.bn1')), s[f'{at}.conv1.weight'], None, 2, 1)
    out = F.conv2d(F.relu(norm(out, s, f'{at}.bn2')), s[f'{at}.conv2.weight'], padding=1)
    expected = out + F.conv2d(x, s[f'{at}.shortcut.0.weight'], stride=2)
    torch.testing.assert_close(model.layer2[0](x), expected)
    activated = noisy('preactresnet18')[0]
    assert evaluate.weights_hash(model) != evaluate.weights_hash(activated)  # of the same weights


def test_swish_networks_train_from_weights_and_keep_their_normalization():
    np.random.seed(0)
    arrays = {f'{split}_{kind}': of() for split in ('train', 'test') for kind, of in (
        ('images', lambda: np.random.randint(256, size=(20, 32, 32, 3), dtype=np.uint8)),
        ('labels', lambda: np.arange(20) % 10))}
    np.savez('own.npz', **arrays)
    small = '--dataset own.npz --arch wideresnet10-1-swish --epochs 1 --num-steps 1 --model-dir'
    main_of('train_at', small, 'a')
    main_of('train_at', small, 'b --init-from a/last.pt')
    x, saved = torch.rand(2, 3, 32, 32), models.load_model('a/last.pt')
    own = models.load_model('a/last.pt', normalize='0.5/0.5')
    torch.testing.assert_close(own(x), own.plain_forward((x - 0.5) / 0.5))
    assert not torch.allclose(own(x), saved(x)) and saved.input_normalization[0][0] == 0.4914
    torch.save(last_of('a')['state_dict'] | {'mean': torch.zeros(3), 'std': torch.ones(3)}, 'n.pt')
    assert models.load_model('n.pt').input_normalization == ([0.0] * 3, [1.0] * 3)
    assert 'which no run keeps' in fails('train_at', small, 'c --init-from n.pt')


def test_implausibly_little_is_said_of_others_files(trained, runs):
    wrong = models.build_model('smallcnn')
    nn.init.normal_(wrong.classifier.fc3.weight)
    torch.save(wrong.state_dict(), 'wrong.pt')
    torch.save(trained.state_dict(), 'right.pt')
    args = '--dataset digits --attacks clean --n-examples 50 --model-path'
    assert '--arch preactresnet18-raw' in main_of('evaluate', args, 'wrong.pt')[1]
    for path in ('right.pt', runs['mart'] / 'last.pt'):  # ours are what they say
        assert '--normalize' not in main_of('evaluate', args, path)[1]


# ---------------------------------------------------------------- the README

README, RESULTS = ((ROOT / name).read_text() for name in ('README.md', 'results/README.md'))
COMMANDS = re.findall(r'(?:^|&& |`)((?:python|torchrun) [^`\n]*\.py[^`\n]*)',
                      README + RESULTS, re.M)


def test_the_readme_has_the_commands_that_matter():
    assert len(COMMANDS) > 60
    tests = 'pip install -r requirements.txt && python -m pytest -q'
    assert tests in README
    assert ('pip install -r requirements.txt && python train_trades.py --dataset digits '
            '--entropy-weight --beta 5.5') in README
    assert tests.replace('install', 'install -q') in (ROOT / '.ci' / 'run').read_text()


def test_what_the_readme_links_to_is_there():
    cifar10 = (CIFAR10 / 'README.md').read_text()
    for folder, text in ((ROOT, README), (ROOT / 'results', RESULTS), (CIFAR10, cifar10)):
        for link, anchor in re.findall(r'(?:\]\(|src=")((?!http)[^)"#]+)(#[^)]*)?[)"]', text):
            assert (folder / link).exists(), link
            headings = re.findall('^#+ (.*)', (folder / link).read_text(), re.M) if anchor else []
            names = ['#' + re.sub(r'[^\w -]', '', h.lower()).replace(' ', '-') for h in headings]
            assert not anchor or anchor in names


def test_all_recipes_run_in_one_folder():
    """Each in a directory of its own, and evaluated by the next command that names it."""
    recipes, = re.findall(r'^## Recipes.*?```bash\n(.*?)```', README, re.M | re.S)
    made, named = [], set()
    for line in recipes.splitlines():
        _, script, *args = line.split()
        if script.startswith('train_'):
            made.append(importlib.import_module(script[:-3]).parse_args(args).model_dir)
        elif script == 'evaluate.py':
            for pattern in evaluate.parse_args(args).model_path:
                found = fnmatch.filter(made, os.path.dirname(pattern))
                assert found, line
                named |= set(found)
    assert len(set(made)) == len(made) > 25 and made[:-1] == [m for m in made if m in named]


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_in_the_readme_parses(command, monkeypatch):
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith('.py'))
    args = words[words.index(script) + 1:]
    parse = importlib.import_module(script[:-3]).parse_args
    assert (ROOT / script).exists()
    assert set(words[1:words.index(script)]) <= {'--nproc-per-node=8', '--nproc-per-node=2'}
    monkeypatch.setattr(bookkeeping, 'read_run', lambda *_: {'args': vars(parse([]))})
    if args == ['--help']:
        with pytest.raises(SystemExit, match='0'):
            parse(args)
    elif script == 'evaluate.py':
        parse(args)
    else:
        args = parse(args)
        assert args.epsilon == data.DATASETS[args.dataset].protocol['epsilon']


def test_the_readmes_lines_of_python_evaluate_any_network():
    lines, = re.findall(r'```python\n(import data, evaluate.*?)```', README, re.S)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    lines = lines.replace("'cifar10'", "'digits'").replace('size=1000', 'size=4').replace(
        "device='cuda'", "device='cpu'").replace('.cuda()', '').replace('8 / 255', '0.5')
    with redirect_stdout(io.StringIO()) as out:
        exec(lines, {'model': model})
    for column in ('clean', 'ls', 'autoattack', 'worst'):
        assert f"'{column}': " in out.getvalue()


def test_the_readme_reads_a_pickle_of_arrays_and_nothing_else():
    snippet, = re.findall(r'```python\n(import pickle.*?)```', RESULTS, re.S)
    images = np.random.randint(256, size=(20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20) % 10
    for protocol in range(2, 6):
        with open('ti_500K_pseudo_labeled.pickle', 'wb') as f:
            pickle.dump({'data': images, 'extrapolated_targets': labels}, f, protocol)
        exec(snippet, {})
        found, found_labels = data.load_extra('ti_500k.npz', 'cifar10', torch.device('cpu'))
        assert (found.permute(0, 2, 3, 1).numpy() == images).all()
        assert (found_labels.numpy() == labels).all()
    with open('ti_500K_pseudo_labeled.pickle', 'wb') as f:
        pickle.dump({'data': Evil()}, f)
    with pytest.raises(pickle.UnpicklingError, match='system'):
        exec(snippet, {})
    assert not os.path.exists('ran')
