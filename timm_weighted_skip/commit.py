"""Which commit a measurement was made with."""

import subprocess
from pathlib import Path
from typing import Optional

__all__ = ['package_commit']


def package_commit() -> Optional[str]:
    """The commit of the checkout that the package runs from, '+' if it was changed since; None for an installed one."""
    where = Path(__file__).parent
    try:
        git = ['git', '-C', str(where), 'describe', '--always', '--abbrev=40', '--dirty=+', '--exclude=*']
        tracked = subprocess.run(
            ['git', '-C', str(where), 'ls-files', '--error-unmatch', '__init__.py'], capture_output=True
        )
        described = subprocess.run(git, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() if tracked.returncode == described.returncode == 0 else None
