"""Data sets, attacks and metrics."""
import argparse
import math
import os
import platform

import numpy as np
import torch
import torch.nn.functional as F

import models

# size: height and width in pixels; epsilon: the L-infinity radius of the paper's protocol (digits: ours)
DATASETS = {
    'cifar10': dict(num_classes=10, in_channels=3, size=32, epsilon=8 / 255),
    'cifar100': dict(num_classes=100, in_channels=3, size=32, epsilon=8 / 255),
    'mnist': dict(num_classes=10, in_channels=1, size=28, epsilon=0.3),
    'digits': dict(num_classes=10, in_channels=1, size=28, epsilon=0.1),
}


# ---------------------------------------------------------------- command lines

class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a user's mistake is one line on stderr (and exit status 2, as ever)."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {" ".join(str(message).split())}\n')


def number(text):
    """A float, also written as a fraction: '8/255', '0.031', 'inf'."""
    numerator, slash, denominator = text.partition('/')
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return value


def positive(text):
    """A number above zero; 'inf' is one."""
    if number(text) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not above zero")
    return number(text)


def positive_finite(text):
    if math.isinf(positive(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not finite")
    return number(text)


def unit(text):
    """A number above zero and up to 1: a length in pixels scaled to [0, 1]."""
    if positive(text) > 1:
        raise argparse.ArgumentTypeError(f"'{text}' is above 1; pixels are in [0, 1], so write 8/255")
    return number(text)


def non_negative(text):
    if not 0 <= number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not zero or above, and finite")
    return number(text)


def count(text):
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def count_or_zero(text):
    return 0 if text == '0' else count(text)


def check_fit(dataset, arch):
    """ValueError where images of the data set do not go into the network."""
    if arch == 'smallcnn' and DATASETS[dataset]['size'] != 28:
        raise ValueError(f"smallcnn takes 28 x 28 images, and those of {dataset} are 32 x 32")


def pick_device(no_cuda=False):
    """The CUDA device where there is one; where CUDA_VISIBLE_DEVICES leaves none, the CPU, and says so."""
    if not no_cuda and torch.cuda.is_available():
        return torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    if not no_cuda and os.environ.get('CUDA_VISIBLE_DEVICES') is not None:
        print(f"no CUDA device with CUDA_VISIBLE_DEVICES='{os.environ['CUDA_VISIBLE_DEVICES']}': running on the CPU")
    return torch.device('cpu')


def synchronize(device):
    """Wait for a CUDA device to finish, so that a clock can be read."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def versions(device):
    """What a number was measured with: device and software."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads'
    return {'device': name, 'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__}


def seed_everything(*numbers):
    """Seed torch's generators with a hash of whole numbers, e.g. (seed, epoch, step).

    Draws that depend on nothing else need no saved random state to go on from, and are the same in any process.
    """
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# ---------------------------------------------------------------- data

def load_data(dataset, data_dir='./data', train=True, size=None, device='cpu'):
    """The first `size` (default: all) images of a split: uint8 (N, C, H, W) and labels int64 (N,), on the device.

    cifar10, cifar100 and mnist are looked for in data_dir and downloaded where they are not there; digits is
    scikit-learn's. Raises FileNotFoundError where neither works, ValueError where size is above N.
    """
    if dataset == 'digits':
        images, labels = _load_digits(train)
    else:
        images, labels = _load_torchvision(dataset, data_dir, train)
    if size is not None and size > len(images):
        raise ValueError(f"{dataset} has {len(images)} {'training' if train else 'test'} images, fewer than {size}")
    return images[:size].to(device), labels[:size].to(device)


def _load_digits(train):
    """1,797 handwritten digits, 8 x 8, made 28 x 28: every fifth is a test image (360), the others train (1,437)."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=28, mode='bilinear', align_corners=False)
    chosen = (torch.arange(len(images)) % 5 != 0) == train
    return (images * 255).round().to(torch.uint8)[chosen], torch.tensor(labels, dtype=torch.int64)[chosen]


def _load_torchvision(dataset, data_dir, train):
    from torchvision import datasets
    kind = {'cifar10': datasets.CIFAR10, 'cifar100': datasets.CIFAR100, 'mnist': datasets.MNIST}[dataset]
    try:
        data = kind(data_dir, train=train)
    except RuntimeError:  # torchvision's "not found or corrupted"
        try:
            data = kind(data_dir, train=train, download=True)
        except (OSError, RuntimeError) as error:
            where = os.path.join(data_dir, 'MNIST/raw' if dataset == 'mnist' else kind.base_folder)
            raise FileNotFoundError(f'{dataset} is not in {where} and could not be downloaded there ({error}); '
                                    '--dataset digits needs no download') from None
    images = torch.as_tensor(data.data)
    images = images.unsqueeze(1) if dataset == 'mnist' else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(data.targets, dtype=torch.int64)


def to_float(images):
    """uint8 images -> float32 in [0, 1], channels last in memory where there are several (the layout of fast convolutions)."""
    x = images.float() / 255
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- attacks

def pgd_attack(model, x, y, epsilon, step_size, num_steps, logit_scale=1.0, random_start=True):
    """Projected gradient descent on CE(logit_scale * f(x + delta), y), Eq. 4 and 9 of the paper; step sizes in [0, 1].

    x: images (B, C, H, W) in [0, 1]; y: labels (B,). Returns x_adv, within epsilon of x and in [0, 1].
    logit_scale = 10 is the logit-scaling attack (LS). FGSM: num_steps=1, step_size=epsilon, random_start=False.
    The model is attacked in the mode it is in.
    """
    x_adv = x
    if random_start:
        x_adv = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logit_scale * model(x_adv), y, reduction='sum')
        grad, = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    return x_adv.detach()


def entropy(logits):
    """Entropy in nats of softmax(logits), (B, K) -> (B,), between 0 and log K: Eq. 1 with tau = 1."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


def evaluate_epoch(model, images, labels, epsilon, batch_size, seed, threshold=1.5):
    """What training logs after an epoch, for uint8 images: fractions `clean` and `pgd10` (accuracy under PGD with 10
    steps of epsilon / 4), mean `entropy` in nats of the adversarial examples, and `high_entropy`, the fraction above
    threshold. The model is put in eval mode and then back.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=images.device)
    for i in range(0, len(images), batch_size):
        x, y = to_float(images[i:i + batch_size]), labels[i:i + batch_size]
        seed_everything(seed, i)
        x_adv = pgd_attack(model, x, y, epsilon, epsilon / 4, 10)
        with torch.no_grad():
            logits, logits_adv = model(x), model(x_adv)
        h = entropy(logits_adv)
        sums += torch.stack([v.double().sum() for v in (logits.argmax(1) == y, logits_adv.argmax(1) == y,
                                                        h, h > threshold)])
    model.train(was_training)
    return dict(zip(('clean', 'pgd10', 'entropy', 'high_entropy'), (sums / len(images)).tolist()))
