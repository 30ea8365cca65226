"""Checkpoint directories for tests."""

import os
import subprocess
import sys
from pathlib import Path

import timm
import torch
from conftest import randomise

from timm_weighted_skip.hub import Results, save_checkpoint

NAME = 'awm_resnet14_cifar.test'


def results() -> Results:
    """Made-up results of two trainings."""
    return Results(
        dataset='CIFAR-10',
        dataset_id='uoft-cs/cifar10',
        split='test',
        recipe='train --model awm_resnet14_cifar',
        epochs=4,
        seeds=[0, 1],
        top1=[90.0, 91.0],
        seed=1,
        commit='0123abc',
        description='Not a trained net.',
        comparison={'resnet14_cifar': [89.0, 89.5]},
    )


def trained_net(**kwargs) -> torch.nn.Module:
    """A small AWM net whose gates are not at identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomise(timm.create_model(NAME.split('.')[0], **kwargs)).eval()
    for name, parameter in model.named_parameters():
        if 'gate' in name:
            torch.nn.init.normal_(parameter, generator=generator)
    return model


def make_checkpoint(root: Path, name: str = NAME) -> Path:
    return save_checkpoint(trained_net(), root / name, results())


def new_process(code: str, *args: object, path: Path = Path(__file__).parents[1], **env: str) -> str:
    """Run `code` in a fresh interpreter that knows only the package in `path`; returns what it printed."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING'))}
    env = {**keep, 'PYTHONPATH': str(path), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', **env}
    command = [sys.executable, '-c', code, *map(str, args)]
    # The interpreter also looks where it is started.
    done = subprocess.run(command, env=env, cwd=path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
