"""Resuming of nets that torch.compile's default backend, Inductor, compiles or takes from its cache."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from timm_weighted_skip.train.checkpoint import read_checkpoint

# `train` that sends itself a signal after an update.
TRAIN = """
import os, sys
from timm_weighted_skip.cli import main
from timm_weighted_skip.train.trainer import Trainer

number, updates = map(int, sys.argv[1:3])
train_epoch = Trainer.train_epoch

def stopping(self, progress, stopped):
    def stop(images, loss):
        progress(images, loss)
        if self.position.updates == updates:
            os.kill(os.getpid(), number)
    return train_epoch(self, stop, stopped)

Trainer.train_epoch = stopping
sys.exit(main(['train', *sys.argv[3:]]))
"""
# A net of one unit, since compiling is what takes time here.
NEW = (
    '--model awm_densenet22_bc_cifar --model-kwargs block_config=(1,) --data digits --epochs 3 --alternate-freeze 1 '
    '--batch-size 64 --lr 0.05 --torchcompile'
)


def train(*arguments, stop=(0, 0)):
    """The exit status of `train`, stopped by a signal after a number of updates."""
    # One thread to compile with: starting a pool of processes takes longer than it saves.
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHINDUCTOR_COMPILE_THREADS': '1'}
    command = [sys.executable, '-c', TRAIN, *(f'{number:d}' for number in stop), *arguments]
    return subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode


@pytest.mark.timeout(900)  # two minutes or so by itself, of which most is compiling
@pytest.mark.skipif(
    not any(map(shutil.which, ('g++', 'c++', 'clang++'))), reason='Inductor needs a C++ compiler for a CPU'
)
def test_stopped_killed_and_resumed_it_ends_with_the_same_bits(tmp_path):
    new = [*NEW.split(), '--output', str(tmp_path), '--experiment']
    assert train(*new, 'whole') == 0

    folder = tmp_path / 'stopped'
    assert train(*new, 'stopped', stop=(signal.SIGTERM, 30)) == 130  # in the gate epoch, the second of 22 updates each
    state = read_checkpoint(folder, [''])[1]
    assert (state['epoch'], state['batch']) == (1, 8)
    assert train('--resume', str(folder), stop=(signal.SIGKILL, 50)) == -signal.SIGKILL
    assert read_checkpoint(folder, [''])[1]['updates'] == 44
    assert train('--resume', str(folder)) == 0

    whole, resumed = (load_file(tmp_path / name / 'last.safetensors') for name in ('whole', 'stopped'))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
