"""Data sets, the protocol that each is trained with, and how an epoch is drawn.

A data set is one entry of DATASETS, how to load it and the protocol of its training, or one's own
FILE.npz.
"""
import argparse
import dataclasses
import math
import os
from functools import lru_cache, partial
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

import commands
from commands import real, whole


# ---------------------------------------------------------------- data sets

@dataclasses.dataclass
class Dataset:
    load: Callable  # (data_dir, train) -> uint8 images (N, C, H, W), int64 labels (N,), class names
    num_classes: int
    shape: tuple  # (C, H, W)
    protocol: dict  # values of the training scripts' flags


def load_torchvision(name, data_dir, train):
    """A torchvision data set from data_dir, or else downloaded to it.

    Raises FileNotFoundError where neither works, ValueError where a file is damaged.
    """
    from torchvision import datasets
    kind = getattr(datasets, name)
    if name == 'MNIST':
        check_mnist(os.path.join(data_dir, 'MNIST', 'raw'), 'train' if train else 't10k')
    try:
        data = kind(data_dir, train=train)
    except RuntimeError:  # torchvision's "not found or corrupted"
        try:
            os.makedirs(data_dir, exist_ok=True)
            with open(os.path.join(data_dir, '.lock'), 'w') as file:
                commands.lock(file)  # one downloads, the others then find it there
                data = kind(data_dir, train=train, download=True)
        except (OSError, RuntimeError) as error:
            where = os.path.join(data_dir, 'MNIST/raw' if name == 'MNIST' else kind.base_folder)
            raise FileNotFoundError(
                f'{name} is not in {where} and could not be downloaded there ({error}); '
                '--dataset digits needs no download') from None
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets).long()
    if images.dim() == 3:
        return images.unsqueeze(1), labels, [str(k) for k in range(10)]
    return images.permute(0, 3, 1, 2).contiguous(), labels, data.classes


def check_mnist(folder, split):
    """ValueError where a file is there, and damaged: torchvision sees only that it is there."""
    from torchvision.datasets import mnist
    counts = []
    for kind in ('images-idx3', 'labels-idx1'):
        path = os.path.join(folder, f'{split}-{kind}-ubyte')
        if os.path.exists(path):
            try:
                counts.append(len(mnist.read_sn3_pascalvincent_tensor(path)))
            except Exception:  # a parser of arbitrary bytes raises whatever it stumbles on
                counts += [0, 1]
            if len(set(counts)) > 1:
                raise ValueError(f'{path}: damaged; remove it, to have it downloaded again')


def load_digits(data_dir, train):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 made 28 x 28; every fifth is a test image."""
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=28, mode='bilinear', align_corners=False)
    chosen = (torch.arange(len(images)) % 5 != 0) == train
    labels = torch.tensor(labels, dtype=torch.int64)[chosen]
    return (images * 255).round().to(torch.uint8)[chosen], labels, [str(k) for k in range(10)]


@lru_cache(1)
def read_own(path, modified):
    """Of an .npz: (train_images, train_labels), (test_images, test_labels), as read_npz has them,
    and class_names, if need be 0 to K - 1. ValueError where a class has no training image."""
    train, test = [read_npz(path, f'{split}_images', f'{split}_labels')
                   for split in ('train', 'test')]
    classes = len(np.unique(train[1]))
    if classes < 2 or classes <= max(train[1].max(), test[1].max()):
        raise ValueError(f'{path}: the labels are not 0 to K - 1, K at least 2, each in training')
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f'{path}: training and test images differ in shape')
    with np.load(path, allow_pickle=False) as file:
        names = [str(k) for k in file.get('class_names', range(classes))]
    if len(set(names)) != classes:
        raise ValueError(f'{path}: not a name for each of its {classes} classes in class_names')
    return to_tensors(*train), to_tensors(*test), names


def read_npz(path, images_name, labels_name):
    """Images and labels of an .npz, uint8 (N, H, W, C) and whole numbers (N,) from 0, in NumPy.

    Pickles are never read. Raises FileNotFoundError, or ValueError with one line.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file[images_name], file[labels_name]
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file') from None
    except Exception as error:  # a parser of arbitrary bytes raises whatever it stumbles on
        raise ValueError(f'{path}: not an .npz with {images_name} and {labels_name} ({error})'
                         ) from None
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != (len(images),):
        raise ValueError(f'{path}: {images_name} is {images.dtype} {images.shape}, {labels_name} '
                         f'{labels.shape}; wanted uint8 (N, H, W, C) and (N,)')
    if labels.dtype.kind not in 'iu' or not len(labels) or labels.min() < 0:
        raise ValueError(f'{path}: {labels_name} are not whole numbers from 0')
    return images, labels.astype(np.int64)


def to_tensors(images, labels):
    """Of NumPy (N, H, W, C) and (N,): (N, C, H, W) and (N,)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


# Protocols: the paper's; for digits one with which all eight methods learn
CIFAR = dict(arch='preactresnet18', epochs=110, lr=0.1, lr_milestones=[100, 105], weight_decay=5e-4,
             batch_size=128, epsilon=8 / 255, step_size=2 / 255, num_steps=10, augment='crop-flip')
MNIST = dict(arch='smallcnn', epochs=100, lr=0.01, lr_milestones=[20, 40], weight_decay=1e-4,
             batch_size=128, epsilon=0.3, step_size=0.01, num_steps=40, augment='none')
DIGITS = dict(arch='smallcnn', epochs=20, lr=0.02, lr_milestones=[15, 18], weight_decay=1e-4,
              batch_size=32, epsilon=0.1, step_size=0.025, num_steps=7, augment='none')
DATASETS = {'cifar10': Dataset(partial(load_torchvision, 'CIFAR10'), 10, (3, 32, 32), CIFAR),
            'cifar100': Dataset(partial(load_torchvision, 'CIFAR100'), 100, (3, 32, 32), CIFAR),
            'mnist': Dataset(partial(load_torchvision, 'MNIST'), 10, (1, 28, 28), MNIST),
            'digits': Dataset(load_digits, 10, (1, 28, 28), DIGITS)}


def find_dataset(name):
    """The Dataset of that name, or that of a FILE.npz: CIFAR's protocol, but no flips."""
    if name.endswith('.npz'):
        train, test, names = read_own(name, os.path.getmtime(name))
        return Dataset(lambda data_dir, training: (*(train if training else test), names),
                       len(names), tuple(train[0].shape[1:]), CIFAR | dict(augment='crop'))
    return DATASETS[name]


def dataset_name(text):
    """The type of --dataset: a file's path from the root, to be found from anywhere."""
    if text not in DATASETS and not text.endswith('.npz'):
        raise argparse.ArgumentTypeError(f"'{text}' is not {', '.join(DATASETS)} or FILE.npz")
    return text if text in DATASETS else os.path.abspath(text)


def load_data(dataset, data_dir='./data', train=True, size=None, device='cpu'):
    """The first `size` (default: all) of a split: uint8 images (N, C, H, W), int64 labels (N,).

    cifar10, cifar100 and mnist are looked for in data_dir, and else downloaded to it; digits is
    scikit-learn's. Raises FileNotFoundError where neither works, ValueError where size is above N.
    """
    images, labels, _ = find_dataset(dataset).load(data_dir, train)
    if size is not None and size > len(images):
        split = 'training' if train else 'test'
        raise ValueError(f'{dataset} has {len(images)} {split} images, fewer than {size}')
    return images[:size].to(device), labels[:size].to(device)


def class_names(dataset, data_dir='./data'):
    """The names of a data set's classes in the order of its labels."""
    return find_dataset(dataset).load(data_dir, False)[2]


def to_float(images):
    """uint8 images -> float32 in [0, 1], channels last in memory, as convolutions like it.

    Raises ValueError for others: whether they are to be divided by 255 does not show.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f'images are {images.dtype}, wanted torch.uint8, from 0 to 255')
    x = images.float() / 255
    return x.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- a run's images

def add_data_args(parser):
    """The flags that TrainingData takes."""
    add = parser.add_argument_group('data').add_argument
    add('--dataset', type=dataset_name, default='cifar10', help=f'{", ".join(DATASETS)}, or your '
        'own FILE.npz: {train,test}_images uint8 (N, H, W, C), {train,test}_labels (N,)')
    add('--data-dir', default='./data', help='where it is, or is downloaded to')
    add('--train-size', type=whole(1), help='the first N training images only')
    add('--test-size', type=whole(1), help='the first N test images only')
    add('--val-size', type=whole(0), default=0, help='hold out the last N training images, '
        'class-balanced, and select best.pt on them; 0: on the test images, optimistic')
    add('--augment', choices=('none', 'crop', 'crop-flip'), help='random crop of the image padded '
        'by 4, and flip; by data set, of your own crop, and the rest as for CIFAR')
    add('--extra-data', metavar='FILE.npz', help='more images: `image` uint8 (N, H, W, C), `label`')
    add('--extra-fraction', type=real('(0, 1]'), default=0.7, help='of every batch')
    add('--steps-per-epoch', type=whole(1), help='(default: what the original images make)')


class TrainingData:
    """The images of a run, on the device, and how an epoch is drawn from them.

    args: those of the training scripts. The original training images, less the last --val-size,
    class-balanced; held_out: these or, without, the test images, (images, labels). From
    --extra-data come more, which make up --extra-fraction of each batch. An epoch is every
    original image once; with --extra-data or --steps-per-epoch it is that many full batches
    (by default what the originals alone make), each set drawn evenly.
    Raises FileNotFoundError and ValueError with one line.
    """

    def __init__(self, args, device):
        spec, size = find_dataset(args.dataset), args.batch_size
        source = args.dataset, args.data_dir
        self.num_classes, self.shape = spec.num_classes, spec.shape
        images, labels = load_data(*source, True, args.train_size, device)
        if args.val_size:
            held = class_balanced_tail(labels, args.val_size, self.num_classes)
            self.held_out = images[held], labels[held]
            images, labels = images[~held], labels[~held]
        else:
            self.held_out = load_data(*source, False, args.test_size, device)
        self.images, self.labels, self.device = images, labels, device
        self.augment = args.augment
        self.steps = args.steps_per_epoch or math.ceil(len(labels) / size)
        self.full = bool(args.extra_data or args.steps_per_epoch)  # no smaller batch at the end
        self.images_per_epoch = self.steps * size if self.full else len(labels)
        self.extra, self.sizes = None, (size, 0)
        if args.extra_data:
            self.extra = load_extra(args.extra_data, args.dataset, device)
            extra = round(args.extra_fraction * size)
            self.sizes = (size - extra, extra)
            if min(self.sizes) == 0:
                raise ValueError(f'--extra-fraction {args.extra_fraction} of a batch of {size} '
                                 'leaves one kind of image out')

    def draw_epoch(self):
        """An epoch's batches, from torch's generator: (indices, extra indices) for take()."""
        def draw(n, size):
            count = self.steps * size if self.full else n
            rounds = range(math.ceil(count / n))
            order = torch.cat([torch.randperm(n, device=self.device) for _ in rounds])
            return order[:count].split(size)
        own = draw(len(self.labels), self.sizes[0])
        if self.extra is None:
            return [(index, None) for index in own]
        return list(zip(own, draw(len(self.extra[1]), self.sizes[1])))

    def take(self, batch):
        """Images (B, C, H, W) in [0, 1], augmented, and labels (B,); the extra ones last."""
        index, extra_index = batch
        x, y = self.images[index], self.labels[index]
        if extra_index is not None:
            images, labels = self.extra
            more = images[extra_index.to(images.device)].to(self.device)
            x, y = torch.cat([x, more]), torch.cat([y, labels[extra_index]])
        return to_float(augment(x, self.augment == 'crop-flip') if self.augment != 'none' else x), y


def augment(images, flips=True):
    """Random crop of images (B, C, H, W) padded by 4, and random flip, each image its own."""
    (batch, _, height, width), device = images.shape, images.device
    offset = torch.randint(9, (2, batch, 1), device=device)
    rows = torch.arange(height, device=device) + offset[0]
    columns = torch.arange(width, device=device) + offset[1]
    if flips:
        flip = torch.rand(batch, 1, device=device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    images = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return images[torch.arange(batch, device=device)[:, None, None], rows[:, :, None],
                  columns[:, None, :]].permute(0, 3, 1, 2)


def class_balanced_tail(labels, size, num_classes):
    """A mask (N,) of the last size / num_classes examples of each class; ValueError if unequal."""
    each, rest = divmod(size, num_classes)
    held = torch.zeros_like(labels, dtype=torch.bool)
    for k in range(num_classes):
        of_class = (labels == k).nonzero().squeeze(1)
        if rest or len(of_class) <= each:
            raise ValueError(f'{size} validation images: not a multiple of the {num_classes} '
                             'classes, or all that there are of one')
        held[of_class[-each:]] = True
    return held


def load_extra(path, dataset, device):
    """`image` uint8 (N, H, W, C) and `label` (N,) of an .npz: images (N, C, H, W), int64 labels.

    The labels are on the device, and so are the images where they take at most half of its free
    memory, else in the computer's: a million 32 x 32 images are 3 GB.
    Raises FileNotFoundError, or ValueError with one line that names the file.
    """
    spec, (images, labels) = find_dataset(dataset), read_npz(path, 'image', 'label')
    wanted = *spec.shape[1:], spec.shape[0]
    if images.shape[1:] != wanted or labels.max() >= spec.num_classes:
        raise ValueError(f'{path}: images {images.shape[1:]}, labels up to {labels.max()}; wanted '
                         f'{wanted}, labels up to {spec.num_classes - 1}')
    images, labels = to_tensors(images, labels)
    if device.type == 'cuda' and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        images = images.to(device)
    return images, labels.to(device)


# ---------------------------------------------------------------- protocols

def protocol_help():
    """What "by data set" in the help of a flag stands for."""
    lines = [f'  {name}: ' + ', '.join(f'{k} {v}' for k, v in spec.protocol.items())
             for name, spec in DATASETS.items()]
    return ('"By data set" is the protocol of the paper (digits: ours):\n' + '\n'.join(lines)
            + '\nWith other --epochs, the milestones by data set keep their share of the run.')


def default_protocol(dataset, epochs=None):
    """A data set's protocol; the milestones keep their share of the run with other epochs."""
    protocol = dict(find_dataset(dataset).protocol)
    share = (epochs or protocol['epochs']) / protocol['epochs']
    protocol['lr_milestones'] = sorted({math.ceil(m * share) for m in protocol['lr_milestones']})
    return protocol


def fill_protocol(args):
    """Give arguments that are None the value of their data set; ValueError if they do not fit."""
    if args.lr_milestones and args.lr_milestones != sorted(set(args.lr_milestones)):
        raise ValueError(f'--lr-milestones {args.lr_milestones} do not rise')
    for name, value in default_protocol(args.dataset, args.epochs).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in list(vars(args).items()):
        if callable(value):  # a default that depends on other arguments
            setattr(args, name, value(args))
    if args.arch == 'smallcnn' and find_dataset(args.dataset).shape[1:] != (28, 28):
        raise ValueError(f'smallcnn takes 28 x 28 images, not those of {args.dataset}')
