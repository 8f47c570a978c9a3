"""Data sets: images in memory as uint8, and the protocol each is trained with.

    images, labels = load_data('cifar10', train=True)     # uint8 (N, C, H, W), int64 (N,)
    x = to_float(augment(images[:128], 'crop-flip'))      # float32 in [0, 1]

Your own data must be an .npz file. To make one from folders of images, one folder per class:

    import numpy as np, torchvision
    arrays = {}
    for split in ('train', 'test'):
        folder = torchvision.datasets.ImageFolder(split)
        order = np.random.default_rng(1).permutation(len(folder))  # it is sorted by class
        arrays[f'{split}_images'] = np.stack([folder[i][0].resize((32, 32)) for i in order])
        arrays[f'{split}_labels'] = np.array(folder.targets)[order]
    np.savez('my_data.npz', **arrays)
"""
import argparse
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import datasets

# Defaults of the training flags for each data set. CIFAR and MNIST: the paper's; digits: ours.
CIFAR = dict(arch='preactresnet18', epochs=110, lr=0.1, lr_milestones=[100, 105], weight_decay=5e-4,
             batch_size=128, epsilon=8 / 255, step_size=2 / 255, num_steps=10, augment='crop-flip')
MNIST = dict(arch='smallcnn', epochs=100, lr=0.01, lr_milestones=[20, 40], weight_decay=1e-4,
             batch_size=128, epsilon=0.3, step_size=0.01, num_steps=40, augment='none')
DIGITS = MNIST | dict(epochs=14, lr=0.03, lr_milestones=[11, 13], batch_size=32, epsilon=0.1,
                      step_size=0.04, num_steps=4, lr_schedule='onecycle')
PROTOCOLS = {'cifar10': CIFAR, 'cifar100': CIFAR, 'mnist': MNIST, 'digits': DIGITS}


def protocol(dataset, epochs=None):
    """Training defaults for a data set; your own FILE.npz gets CIFAR's, without flips. With another
    number of epochs, the milestones keep their share of the run."""
    if dataset not in PROTOCOLS and not dataset.endswith('.npz'):
        raise ValueError(f"unknown --dataset '{dataset}': {', '.join(PROTOCOLS)} or FILE.npz")
    found = {'lr_schedule': 'multistep'} | PROTOCOLS.get(dataset, CIFAR | {'augment': 'crop'})
    full = found['epochs']
    milestones = {-(-m * (epochs or full) // full) for m in found['lr_milestones']}  # rounded up
    return found | {'lr_milestones': sorted(milestones)}


def load_data(dataset, data_dir='./data', train=True, size=None):
    """The first `size` (default: all) images of a split: uint8 (N, C, H, W), int64 labels (N,).

    dataset: cifar10, cifar100 or mnist (downloaded to data_dir if missing), digits (part of
    scikit-learn), or your own FILE.npz with {train,test}_images uint8 (N, H, W, C) and
    {train,test}_labels (N,). Raises ValueError or OSError with one line that names the file.
    """
    split = 'train' if train else 'test'
    if dataset.endswith('.npz'):
        images, labels = load_npz(dataset, f'{split}_images', f'{split}_labels')
    elif dataset == 'digits':  # 1,797 images of 8 x 8, upsampled; every fifth is a test image
        from sklearn.datasets import load_digits
        images, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = F.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=28, mode='bilinear')
        chosen = (torch.arange(len(images)) % 5 != 0) == train
        images, labels = (images * 255).round().to(torch.uint8)[chosen], labels[chosen]
    else:
        protocol(dataset)  # refuses another name
        try:
            found = getattr(datasets, dataset.upper())(data_dir, train=train, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f'{dataset} is missing or damaged in {data_dir} and could not be '
                             f'downloaded ({error!r}); digits needs no download') from None
        images, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets)
        images = images[:, None] if dataset == 'mnist' else images.permute(0, 3, 1, 2)
    if train and len(labels.unique()) != labels.max() + 1:
        raise ValueError(f'{dataset}: labels must be 0 to K - 1, each with a training image')
    size = len(images) if size is None else size
    if not 1 <= size <= len(images):
        raise ValueError(f'the {split} split of {dataset} has {len(images)} images, not {size}')
    if size < len(images) and (labels.diff() >= 0).all():
        raise ValueError(f'{dataset} is sorted by class: shuffle it, or use all of its images')
    return images[:size].contiguous(), labels[:size].long()


def load_npz(path, images, labels):
    """Images (N, H, W, C) and labels (N,) of an .npz as tensors (N, C, H, W) and (N,)."""
    try:
        with np.load(path) as file:
            x, y = file[images], file[labels]
    except Exception as error:  # NumPy may raise anything for a damaged file
        raise ValueError(f'{path} is not an .npz with {images} and {labels}: {error}') from None
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or not (x > 1).any():
        raise ValueError(f'{path}: {images} must be uint8 (N, H, W, C) with 1 or 3 channels and '
                         f'pixels in 0 to 255, some above 1, not {x.dtype} {x.shape}')
    if y.dtype.kind not in 'iu' or y.shape != (len(x),) or y.min() < 0:
        raise ValueError(f'{path}: {labels} must be whole numbers from 0, as many as {images}, '
                         f'not {y.dtype} {y.shape}')
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long()


def pixels(text):
    """The type of flags such as --epsilon: 8/255 as well as 0.031."""
    value, _, unit = text.partition('/')
    if not 0 < float(value) <= float(unit or 1):
        raise argparse.ArgumentTypeError(f"'{text}' is not in (0, 1]: write 8/255")
    return float(value) / float(unit or 1)


def pixels_text(value):
    """8/255 as '8/255', 0.031 as '0.031'."""
    return f'{value * 255:g}/255' if round(value * 255) / 255 == value else f'{value:g}'


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of each flag that has one other than 0, and radii as 8/255."""

    def _get_help_string(self, action):
        value = pixels_text(action.default) if action.type is pixels else action.default
        shown = value and action.nargs != 0 and 'default' not in action.help
        return f'{action.help} (default: {value})' if shown else action.help


def run_name(args, parser, algorithm):
    """runs/DATASET-[ew-]ALGORITHM, the flags that change the result and are set, the seed."""
    left_out = ('resume', 'model_dir', 'dataset', 'data_dir', 'entropy_weight', 'seed', 'no_cuda',
                'save_every_minutes', 'save_freq')
    parts = [args.dataset, 'ew-' * args.entropy_weight + algorithm]
    for name, value in vars(args).items():
        if name not in left_out and value != parser.get_default(name):
            text = '' if value is True else f'-{value}' if isinstance(value, str) else f'{value}'
            parts.append(value if name == 'arch' else name.replace('_', '-') + text)
    return 'runs/' + re.sub(r'[^\w.]+', '-', '-'.join([*parts, f'seed{args.seed}'])).strip('-')


def seed(*numbers):
    """Seed from e.g. (seed, epoch, step), so that a resumed run needs no saved random state."""
    sequence = np.random.SeedSequence([len(numbers), *numbers])
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def load_run(args):
    """Training images and labels, of which the first N are the data set's and any others extra; N;
    the (images, labels) held out (test images or, with --val-size, training images); classes."""
    images, labels = load_data(args.dataset, args.data_dir)
    classes = labels.max().item() + 1
    if args.train_size is not None:
        images, labels = load_data(args.dataset, args.data_dir, True, args.train_size)
    held_out = load_data(args.dataset, args.data_dir, False, args.test_size)
    if args.val_size:  # the last val_size / K images of each of K classes
        size = args.val_size // classes
        if args.val_size % classes or not 0 < size < labels.bincount(minlength=classes).min():
            raise ValueError(f'--val-size {args.val_size} must be a multiple of {classes}, the '
                             'number of classes, and leave training images of each')
        held = torch.zeros_like(labels, dtype=torch.bool)
        for k in range(classes):
            held[(labels == k).nonzero()[-size:]] = True
        held_out, images, labels = (images[held], labels[held]), images[~held], labels[~held]
    extra = load_npz(args.extra_data, 'image', 'label') if args.extra_data else ()
    for path, (x, y) in ((args.dataset, held_out), (args.extra_data, extra or held_out)):
        if x.shape[1:] != images.shape[1:] or y.max() >= classes:
            raise ValueError(f'{path}: images differ in shape or classes from the training images')
    num_own = len(images)
    if extra:
        images, labels = torch.cat([images, extra[0]]), torch.cat([labels, extra[1]])
    return images, labels, num_own, held_out, classes


def draw(n, count, device=None):
    """`count` random indices below n; none is drawn again before all others have been."""
    return torch.cat([torch.randperm(n, device=device) for _ in range(-(-count // n))])[:count]


def draw_batches(num_own, num_images, args, device):
    """The indices of each batch of an epoch, which shows each of the first num_own images once; any
    further images take --extra-fraction of each batch and do not lengthen the epoch."""
    if num_images == num_own:
        return draw(num_own, num_own, device).split(args.batch_size)
    num_steps, share = -(-num_own // args.batch_size), round(args.extra_fraction * args.batch_size)
    own = draw(num_own, num_steps * (args.batch_size - share), device)
    extra = num_own + draw(num_images - num_own, num_steps * share, device)
    return torch.cat([own.view(num_steps, -1), extra.view(num_steps, -1)], dim=1)


def checksum(*tensors):
    """CRC-32 of all tensors; a resumed run uses it to detect that its images have changed."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def to_float(images, memory_format=torch.contiguous_format):
    """uint8 -> float32 in [0, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f'images must be uint8, not {images.dtype}')
    return images.to(torch.float32, memory_format=memory_format) / 255


def augment(images, how):
    """Pad by 4 and crop ('crop', 'crop-flip') and mirror ('crop-flip') each image independently, in
    one gather for the whole batch, on the device of the images; 'none' changes nothing."""
    if how == 'none':
        return images
    (n, _, height, width), device = images.shape, images.device
    rows = torch.arange(height, device=device) + torch.randint(9, (n, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(9, (n, 1), device=device)
    if how == 'crop-flip':
        columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    index = torch.arange(n, device=device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
