import sys

import timm_weighted_skip  # noqa: F401  registers the models
from timm_weighted_skip.train.launcher import main

if __name__ == '__main__':
    sys.exit(main())
