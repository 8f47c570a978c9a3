"""The mathematics: weights, losses and attacks against references written from the equations.

The references are plain float64 loops over single examples and share no code with the scripts,
which run on float64 networks and must agree to 1e-10.
"""
import ast
import copy
import importlib
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from train_gairat import entropy_weights, gairat_weights  # entropy_weights is the same in all

NAMES = ['at', 'trades', 'mart', 'gairat']
SCRIPTS = {name: importlib.import_module(f'train_{name}') for name in NAMES}
SOURCES = {name: (Path(__file__).parent / f'train_{name}.py').read_text() for name in NAMES}
DIVIDER = '# ======== below this line all train_*.py are identical'
OPTIONS = {'at': {}, 'trades': {'beta': 2.5}, 'mart': {'beta': 4.0}, 'gairat': {'psi': -0.7}}
WEIGHTINGS = {'plain': {}, 'ew': {'entropy_weight': True}}
WEIGHTINGS |= {f'tau{t}': {'entropy_weight': True, 'tau': t} for t in (0.5, 5.0, math.inf)}
STEP, EPSILON, STEPS = 0.04, 0.1, 5  # large enough to reach the surface of the ball, and 0 and 1
KAPPA = [i % (STEPS + 1) for i in range(40)]

every_script = pytest.mark.parametrize('name', NAMES)
every_weighting = pytest.mark.parametrize('weighting', WEIGHTINGS.values(), ids=WEIGHTINGS.keys())


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)  # the networks here are too small for more
    torch.manual_seed(0)


# ---------------------------------------------------------------- references
def probabilities(row):
    e = [math.exp(v - max(row)) for v in row]
    return [v / sum(e) for v in e]


def reference_weights(z, weighting):
    """Eq. 1-2 from logits z (B, K), an array; zeros for the parent methods."""
    if not weighting:
        return [0.0] * len(z)
    tau = weighting.get('tau', 1.0)
    entropies = [-sum(p * math.log(p) for p in probabilities(row / tau) if p > 0) for row in z]
    eta = sum(entropies) / len(entropies)
    return [e / eta for e in entropies]


def reference_gamma(kappa, num_steps, psi):
    gamma = [(1 + math.tanh(psi + 5 * (1 - 2 * k / num_steps))) / 2 for k in kappa]
    return [g * len(gamma) / sum(gamma) for g in gamma]


def reference_losses(name, z, z_adv, y, w, kappa=None, beta=None, psi=None):
    """Eq. 3, 6, 7, 8 and 11, from the clean and the adversarial logits."""
    losses = []
    gamma = reference_gamma(kappa, STEPS, psi) if name == 'gairat' else None
    for i, label in enumerate(y):
        p, q = probabilities(z[i]), probabilities(z_adv[i])
        ce, ce_adv = -math.log(p[label]), -math.log(q[label])
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        if name == 'at':
            losses.append((1 + w[i]) * ce_adv)
        elif name == 'trades':
            losses.append(ce + (beta + w[i]) * kl)
        elif name == 'mart':
            bce = ce_adv - math.log(1 - max(q[k] for k in range(len(q)) if k != label) + 1e-4)
            losses.append((1 + w[i]) * bce + (beta + w[i]) * kl * (1.0000001 - p[label]))
        else:
            losses.append((gamma[i] + w[i]) * ce_adv)
    return np.array(losses)


def reference_attack(name, model, x, start, y, steps=STEPS):
    """Eq. 4 and 6, one example at a time: x_adv, and kappa, the iterates correct before a step."""
    model = copy.deepcopy(model).eval()
    found, kappa = [], []
    for i in range(len(x)):
        clean, x_adv, correct = x[i:i + 1], start[i:i + 1], 0
        for _ in range(steps):
            x_adv = x_adv.detach().clone().requires_grad_(True)
            p, log_q = model(clean)[0].softmax(0).detach(), model(x_adv)[0].log_softmax(0)
            objective = (p * (p.log() - log_q)).sum() if name == 'trades' else -log_q[y[i]]
            objective.backward()
            correct += int(log_q.argmax() == y[i])
            moved = x_adv.detach() + STEP * x_adv.grad.sign()
            x_adv = (clean + (moved - clean).clamp(-EPSILON, EPSILON)).clamp(0, 1)
        found.append(x_adv.detach().clamp(0, 1))
        kappa.append(correct)
    return torch.cat(found), kappa


def logits_of(model, *images):
    with torch.no_grad():
        return [copy.deepcopy(model)(x).numpy() for x in images]


# ---------------------------------------------------------------- what the tests run on
def problem(size=8, dtype=torch.float64):
    """A smooth network (for finite differences) whose batch and running statistics differ, images
    with pixels at 0 and 1, and labels: three in four as predicted."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(),
                          nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(),
                          nn.Flatten(), nn.Linear(32, 10)).double()
    with torch.no_grad():
        model[-1].weight *= 6  # confident, so that entropies and kappa spread
        for _ in range(20):
            model(0.7 * torch.rand(64, 1, 8, 8).double())
        x = (1.6 * torch.rand(size, 1, 8, 8).double() - 0.3).clamp(0, 1).to(dtype)
        y = copy.deepcopy(model).to(dtype).eval()(x).argmax(1)
    y[3::4] = (y[3::4] + 1) % 10
    return model.to(dtype), x, y


def table(scale=3.0):
    """Clean logits, adversarial logits, labels and kappa; the network on them is the identity."""
    generator = torch.Generator().manual_seed(3)
    z, z_adv = scale * torch.randn(2, 12, 10, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 10, (12,), generator=generator)
    y[::2] = z_adv[::2].argmax(1)  # half are still classified correctly
    return z, z_adv, y, KAPPA[:12]


def loss_of(name, model, x, y, optimizer=None, **options):
    attack = dict(step_size=STEP, epsilon=EPSILON, perturb_steps=STEPS)
    return getattr(SCRIPTS[name], f'{name}_loss')(model, x, y, optimizer, **{**attack, **options})


def loss_on(name, model, x, x_adv, y, **options):
    """The loss on adversarial examples made beforehand, with KAPPA for GAIRAT."""
    if name == 'gairat':
        x_adv = x_adv, torch.tensor(KAPPA[:len(y)], dtype=x_adv.dtype)
    return loss_of(name, model, x, y, adv=x_adv, **options)


def drawn_start(name, x):
    """The random start, as the first thing drawn from the generator."""
    if name in ('trades', 'mart'):
        return x + 0.001 * torch.randn(x.shape, dtype=x.dtype)
    return (x + EPSILON * (2 * torch.rand(x.shape, dtype=x.dtype) - 1)).clamp(0, 1)


def close(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(v, dtype=torch.float64).detach().numpy() for v in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- entropy weights
def test_entropy_weights():
    z = table()[0]
    for options in ({}, {'tau': 0.5}, {'tau': 5.0}, {'tau': math.inf}):
        w = entropy_weights(z.requires_grad_(), **options)
        close(w, reference_weights(z.detach().numpy(), {'tau': 1.0} | options))
        close(w.mean(), 1.0)
        assert not w.requires_grad


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_entropy_weights_are_finite_where_probabilities_are_zero(dtype):
    z = torch.tensor([[0., -math.inf], [0., 0.], [6e4, -6e4], [-math.inf, 1.]], dtype=dtype)
    for tau in (1e-300, 1e-3, 1.0):
        close(entropy_weights(z, tau), [0, 4, 0, 0], 1e-6)
    close(entropy_weights(z, math.inf), torch.ones(4))
    assert (entropy_weights(z[::2]) == 1).all()  # every entropy is exactly zero


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_weights_of_a_large_half_precision_batch_do_not_overflow(dtype, tolerance, copies=7_000):
    ten, kappa = table(1.0)[0][:10].to(dtype), torch.arange(10, dtype=dtype)
    w = entropy_weights(ten.repeat(copies, 1))
    assert w.dtype == torch.float32
    close(w, np.tile(reference_weights(ten.double().numpy(), {'tau': 1.0}), copies), 1e-4)
    gamma = gairat_weights(kappa.repeat(2 * copies), 10, 0.0)
    close(gamma, np.tile(reference_gamma(range(10), 10, 0.0), 2 * copies), tolerance)


# ---------------------------------------------------------------- the losses
@every_script
@every_weighting
@pytest.mark.parametrize('size', [8, 3, 1])  # a smaller last batch counts by its own size
def test_losses_match_the_equations(name, weighting, size):
    model, x, y = problem(size)
    torch.manual_seed(5)
    x_adv, kappa = reference_attack(name, model, x, drawn_start(name, x), y)
    z, z_adv = logits_of(model, x, x_adv)
    w = reference_weights(z_adv, weighting)
    expected = reference_losses(name, z, z_adv, y, w, kappa, **OPTIONS[name])
    for reduction, value in (('mean', expected.mean()), ('sum', expected.sum())):
        torch.manual_seed(5)
        loss = loss_of(name, copy.deepcopy(model), x, y, reduction=reduction,
                       **OPTIONS[name], **weighting)
        assert loss.shape == ()
        close(loss, value)


@every_script
@every_weighting
def test_gradients_match_finite_differences_with_w_held(name, weighting):
    model, x, y = problem()
    x_adv = (x + EPSILON * torch.randn_like(x).sign()).clamp(0, 1)
    loss_on(name, model, x, x_adv, y, **OPTIONS[name], **weighting).backward()
    w = reference_weights(logits_of(model, x_adv)[0], weighting)
    def reference():
        z, z_adv = logits_of(model, x, x_adv)
        return reference_losses(name, z, z_adv, y, w, KAPPA[:len(y)], **OPTIONS[name]).mean()
    for parameter in model.parameters():
        direction, value = torch.randn_like(parameter), parameter.data.clone()
        parameter.data = value + 1e-5 * direction
        above = reference()
        parameter.data = value - 1e-5 * direction
        slope = (above - reference()) / 2e-5
        parameter.data = value
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_gairat_weights():
    kappa = torch.tensor([0, 1, 5, 7, 9, 10]).double()
    for psi in (-1.0, 0.0, 0.5):
        close(gairat_weights(kappa, 10, psi), reference_gamma(kappa.tolist(), 10, psi))
    for values, psi in ((kappa, math.inf), (0 * kappa + 10, -1.0), (kappa, -1000.0)):
        assert (gairat_weights(values.float(), 10, psi) == 1).all()  # the last: all gammas are 0


# ---------------------------------------------------------------- the official TRADES and MART
def official(name, model, x, y, step_size, epsilon, steps, beta):
    """What the published trades_loss and mart_loss compute, draw for draw."""
    kl_sum = nn.KLDivLoss(reduction='sum')
    model.eval()
    x_adv = x + 0.001 * torch.randn(x.shape, dtype=x.dtype)
    for _ in range(steps):
        x_adv.requires_grad_()
        if name == 'trades':
            goal = kl_sum(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1))
        else:
            goal = nn.CrossEntropyLoss()(model(x_adv), y)
        x_adv = x_adv.detach() + step_size * torch.sign(torch.autograd.grad(goal, [x_adv])[0])
        x_adv = torch.clamp(torch.max(torch.min(x_adv, x + epsilon), x - epsilon), 0, 1)
    model.train()
    x_adv = torch.clamp(x_adv.detach(), 0, 1)
    if name == 'trades':
        clean, log_q = nn.CrossEntropyLoss()(model(x), y), F.log_softmax(model(x_adv), 1)
        return clean + beta / len(x) * kl_sum(log_q, F.softmax(model(x), 1))
    logits, logits_adv = model(x), model(x_adv)
    p, p_adv = F.softmax(logits, 1), F.softmax(logits_adv, 1)
    ranking = p_adv.argsort(1, descending=True)
    strongest_wrong = torch.where(ranking[:, 0] == y, ranking[:, 1], ranking[:, 0])
    bce = nn.CrossEntropyLoss()(logits_adv, y)
    bce = bce + nn.NLLLoss()(torch.log(1.0001 - p_adv + 1e-12), strongest_wrong)
    kl = nn.KLDivLoss(reduction='none')(torch.log(p_adv + 1e-12), p).sum(1)
    p_y = torch.stack([p[i, y[i]] for i in range(len(y))])
    return bce + beta / len(x) * (kl * (1.0000001 - p_y)).sum()


@pytest.mark.parametrize('name, steps, dtype, tolerance', [
    ('mart', 0, torch.float32, 1e-5), ('mart', 10, torch.float32, 1e-5),
    ('trades', 0, torch.float32, 1e-5),
    # in float32 the first signs of the KL attack are rounding noise, another on each CPU
    ('trades', 10, torch.float64, 1e-9)])
def test_agrees_with_the_official_code(name, steps, dtype, tolerance):
    ours, x, y = problem(dtype=dtype)
    theirs = copy.deepcopy(ours)
    torch.manual_seed(6)
    expected = official(name, theirs, x, y, 0.02, 0.1, steps, 6.0)
    torch.manual_seed(6)
    loss = loss_of(name, ours, x, y, step_size=0.02, epsilon=0.1, perturb_steps=steps, beta=6.0)
    close(loss, expected, tolerance)
    loss.backward()
    expected.backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert b.grad.abs().max() > 0, key
        close(a.grad, b.grad, tolerance)


# ---------------------------------------------------------------- the attacks
@every_script
@pytest.mark.parametrize('steps', [0, 1, STEPS])
def test_attack_and_kappa_match_a_loop_over_examples(name, steps):
    model, x, y = problem(24)
    torch.manual_seed(5)
    start = drawn_start(name, x)
    torch.manual_seed(5)
    close(SCRIPTS[name].random_start(x, EPSILON), start)
    x_adv = SCRIPTS[name].attack(model, x, start, y, STEP, EPSILON, steps)
    expected, expected_kappa = reference_attack(name, model, x, start, y, steps=steps)
    if name == 'gairat':
        x_adv, kappa = x_adv
        assert kappa.tolist() == expected_kappa
        assert len(set(expected_kappa)) > steps / 2  # else the test would say little
    close(x_adv, expected)
    assert not x_adv.requires_grad


@every_script
def test_loss_changes_only_batch_norm_statistics(name):
    model, x, y = problem()
    model[0].bias.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, kept = copy.deepcopy(model.state_dict()), x.clone()
    loss_of(name, model, x, y, entropy_weight=True)
    for key, value in model.state_dict().items():
        if key.endswith('num_batches_tracked'):  # each forward pass of the loss, none of the attack
            assert value == before[key] + (2 if name in ('trades', 'mart') else 1)
        else:
            assert torch.equal(value, before[key]) != ('running' in key), key
    assert [p.requires_grad for p in model.parameters()] == [i != 1 for i in range(10)]
    assert all(module.training for module in model.modules()) and torch.equal(x, kept)
    assert all((p.grad == 1).all() for p in model.parameters())  # optimizer=None clears none
    loss_of(name, model, x, y, torch.optim.SGD(model.parameters(), 0.1))
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


# ---------------------------------------------------------------- hard cases
@every_script
@every_weighting
def test_loss_and_gradients_are_finite_at_extreme_logits(name, weighting):
    eye = torch.eye(10)
    z = 200 * torch.cat([eye, eye, -eye, eye / 2 - eye.roll(1, 0) / 2]).requires_grad_()
    z_adv = 200 * torch.cat([eye, eye.roll(1, 0), eye, eye.roll(2, 0)]).requires_grad_()
    y = torch.arange(10).repeat(4)
    loss = loss_on(name, nn.Identity(), z, z_adv, y, **weighting)
    assert loss.isfinite() and loss > 10
    for grad in torch.autograd.grad(loss, (z, z_adv), materialize_grads=True):
        assert grad.isfinite().all()
    assert grad.abs().max() > 0
    for dtype in (torch.float32, torch.bfloat16):  # the attack as well
        model, x, y = problem(dtype=dtype)
        model[-1].weight.data *= 300
        loss_of(name, model, x, y, **weighting).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@every_script
def test_every_weight_gets_a_gradient_under_autocast(name):
    model, x, y = problem(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        loss = loss_of(name, model, x, y, entropy_weight=True)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


@every_script
@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
def test_losses_match_the_equations_in_other_dtypes(name, dtype, tolerance):
    z, z_adv, y, kappa = table(scale=1.0)
    z, z_adv = z.to(dtype), z_adv.to(dtype)
    loss = loss_on(name, nn.Identity(), z, z_adv, y, entropy_weight=True, **OPTIONS[name])
    z, z_adv = z.double().numpy(), z_adv.double().numpy()
    w = reference_weights(z_adv, WEIGHTINGS['ew'])
    expected = reference_losses(name, z, z_adv, y, w, kappa, **OPTIONS[name])
    close(loss, expected.mean(), tolerance)
    assert loss.dtype == torch.float32


INVALID = [
    *[(NAMES, r'in \[0, 1\]', lambda x, y, v=v: {'x': x + v}) for v in (-0.01, 0.01, math.nan)],
    *[(NAMES, r'in \[0, 1\].*8/255', lambda x, y, k=k, v=v: {k: v})
      for k in ('epsilon', 'step_size') for v in (8, -0.01, math.nan, math.inf)],
    *[(NAMES, f'^tau must be above 0, not {tau}$', lambda x, y, tau=tau: {
        'entropy_weight': True, 'tau': tau}) for tau in (0, -1.0, -math.inf, math.nan)],
    (['trades', 'mart'], 'l_2', lambda x, y: {'distance': 'l_2'})]


@pytest.mark.parametrize('name, told, change', [
    (name, told, change) for names, told, change in INVALID for name in names])
def test_invalid_arguments_are_refused_in_one_line(name, told, change):
    model, x, y = problem()
    with pytest.raises(ValueError, match=told) as error:
        loss_of(name, **{'model': model, 'x': x, 'y': y} | change(x, y))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['mart', 'gairat'])
@pytest.mark.parametrize('size', [8, 10])  # 10: as many images as classes
def test_only_labels_are_accepted_by_mart_and_gairat(name, size):
    model, x, y = problem(size)
    one_hot = F.one_hot(y, 10)
    for wrong in (one_hot, one_hot.double(), y.double(), y[:, None]):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            loss_of(name, model, x, wrong)


@every_script
def test_labels_may_be_uint8_and_for_at_and_trades_probabilities(name):
    losses, (model, x, y) = [], problem()
    for labels in [y, y.byte()] + [F.one_hot(y, 10).double()] * (name in ('at', 'trades')):
        torch.manual_seed(0)
        losses.append(loss_of(name, copy.deepcopy(model), x, labels))
    close(torch.stack(losses[1:]), losses[0].expand(len(losses) - 1))


# ---------------------------------------------------------------- the scripts as text
@pytest.mark.parametrize('name, defaults', [
    ('at', f'step_size={2 / 255}, epsilon={8 / 255}, perturb_steps=10'),
    ('trades', "step_size=0.003, epsilon=0.031, perturb_steps=10, beta=1.0, distance='l_inf'"),
    ('mart', "step_size=0.007, epsilon=0.031, perturb_steps=10, beta=6.0, distance='l_inf'"),
    ('gairat', 'step_size=0.007, epsilon=0.031, perturb_steps=10, psi=-1.0')])
def test_signatures_match_the_official_functions(name, defaults):
    assert str(inspect.signature(getattr(SCRIPTS[name], f'{name}_loss'))) == (
        f"(model, x_natural, y, optimizer, {defaults}, entropy_weight=False, tau=1.0, adv=None, "
        "reduction='mean')")


@every_script
def test_a_pasted_loss_needs_only_torch_and_the_code_above_it(name):
    above = SOURCES[name].split(DIVIDER)[0]
    body, namespace = ast.parse(above).body, {}
    imports = [ast.unparse(node) for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports == ['import torch', 'import torch.nn.functional as F']
    last, = [i for i, node in enumerate(body) if getattr(node, 'name', '') == f'{name}_loss']
    exec(compile(ast.Module(body[:last + 1], []), name, 'exec'), namespace)
    model, x, y = problem()
    torch.manual_seed(8)
    expected = loss_of(name, copy.deepcopy(model), x, y, entropy_weight=True)
    torch.manual_seed(8)
    loss = namespace[f'{name}_loss'](model, x, y, None, STEP, EPSILON, STEPS, entropy_weight=True)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize('name', NAMES[1:])
@pytest.mark.parametrize('part', ['to_float32', 'over_batch_mean', 'entropy_weights',
                                  'the training program'])
def test_shared_code_is_identical_in_all_scripts(name, part):
    a, b = (SOURCES[n].split(DIVIDER)[1] if part == 'the training program' else
            inspect.getsource(getattr(SCRIPTS[n], part)) for n in ('at', name))
    assert a.splitlines() == b.splitlines(), (
        f'{part} differs between train_at.py and train_{name}.py: edit it in one script and copy '
        'it to the other three')
