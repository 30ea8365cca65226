"""Short trainings that several tests start, in this process or in one of their own."""

import os

ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1'}


def train_args(folder, *more):
    options = '--model awm_resnet14_cifar --data digits --epochs 6 --alternate-freeze 1 --batch-size 64 --lr 0.05'
    return ['train', *options.split(), '--no-torchcompile', '--output', str(folder), '--experiment', 'run', *more]
