"""A stand-in for timm's train.py, with the interface that the launcher and its hook rely on and nothing more."""

import argparse
import importlib
import os
from pathlib import Path

import timm
import torch
import yaml
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs, random_seed
from torch.nn.parallel import DistributedDataParallel

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument('-c', '--config', default='')

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--data-dir')
parser.add_argument('--device')
parser.add_argument('--device-modules', nargs='+')
parser.add_argument('--resume', default='')
parser.add_argument('--output')
parser.add_argument('--experiment')
parser.add_argument('--opt', default='sgd')
parser.add_argument('--opt-kwargs', nargs='*', default={}, action=ParseKwargs)
parser.add_argument('--lr', type=float, default=0.05)
parser.add_argument('--weight-decay', type=float, default=1e-4)
parser.add_argument('--hflip', type=float, default=0.5)
parser.add_argument('-b', '--batch-size', type=int, default=8)
parser.add_argument('-j', '--workers', type=int, default=0)
parser.add_argument('--epochs', type=int, default=3)
parser.add_argument('--sched', default='cosine')
parser.add_argument('--sched-on-updates', action='store_true')


def _parse_args():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        parser.set_defaults(**yaml.safe_load(Path(config.config).read_text()))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(vars(args))


def main():
    args, text = _parse_args()
    for module in args.device_modules or []:
        importlib.import_module(module)
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        torch.distributed.init_process_group('gloo')
    random_seed(42, rank)
    model = timm.create_model(args.model)
    device = torch.device(args.device)
    dataset = ImageDataset(args.data_dir, split='train')
    loader = create_loader(
        dataset,
        input_size=(3, 32, 32),
        batch_size=args.batch_size,
        is_training=True,
        hflip=args.hflip,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        distributed=world > 1,
        device=device,
    )
    optimizer = create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, **args.opt_kwargs)
    start = 0
    if args.resume:
        state = torch.load(args.resume, weights_only=False)
        model.load_state_dict(state['state_dict'])
        optimizer.load_state_dict(state['optimizer'])
        start = state['epoch'] + 1
    wrapped = DistributedDataParallel(model, device_ids=[device]) if world > 1 else model
    folder = Path(args.output, args.experiment)
    if rank == 0:
        folder.mkdir(parents=True)
        (folder / 'args.yaml').write_text(text)
    scheduler, epochs = create_scheduler_v2(optimizer, sched=args.sched, num_epochs=args.epochs)
    for epoch in range(start, epochs):
        scheduler.step(epoch)
        train_one_epoch(epoch, wrapped, loader, optimizer, args, task=None)
        if rank == 0:
            state = {'epoch': epoch, 'state_dict': model.state_dict(), 'optimizer': optimizer.state_dict()}
            torch.save(state, folder / f'checkpoint-{epoch}.pth.tar')


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    model.train()
    for x, target in loader:
        torch.nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == '__main__':
    main()
