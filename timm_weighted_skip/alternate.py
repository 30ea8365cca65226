"""`python train.py --device-modules timm_weighted_skip.alternate ...`: alternating training without a launcher.

timm's train.py imports the named modules before it builds its model. This one registers the nets and hooks the running
script. train.py's parser knows no option of ours, so they are given in its `-c` file, by the names of our recipes;
without one, phases are of 3 epochs.
"""

import sys

import timm_weighted_skip  # noqa: F401  registers the models
from timm_weighted_skip.train.hook import install

_script = sys.modules['__main__']
if not hasattr(_script, 'train_one_epoch'):
    raise ImportError("timm_weighted_skip.alternate is for the --device-modules of timm's train.py alone")
try:
    install(_script, _script._parse_args()[0], default_period=3)
except ValueError as error:
    raise SystemExit(f'train.py: {error}') from None
