"""The README: its snippets run, in order and in one session as a reader would run them, and its table is current."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from timm_weighted_skip.analysis.listing import model_table

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
RESULTS = sorted((ROOT / 'scripts' / 'results').glob('*.json'))


def test_snippets_run():
    session: dict = {}
    snippets = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert snippets
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f'README snippet {number}', 'exec'), session)


def test_model_table_is_the_printed_one(monkeypatch):
    table = re.search(r'<!-- models -->\n(.*?)\n<!-- /models -->', README, re.DOTALL)
    # The tags are those of the installed timm, so only the rest is compared.
    shown, printed = (
        re.sub(r'[^|]*\|$', '', text, flags=re.MULTILINE) for text in (table.group(1), model_table().markdown())
    )
    assert shown == printed


@pytest.mark.skipif(not RESULTS, reason='scripts/results has no measured runs')
def test_benchmark_table_is_the_printed_one():
    shown = re.search(r'<!-- benchmark -->\n(.*?)\n<!-- /benchmark -->', README, re.DOTALL).group(1)
    script = ROOT / 'scripts' / 'benchmark.py'
    run = subprocess.run([sys.executable, script, '--readme', *RESULTS], capture_output=True, text=True, check=True)
    assert shown == run.stdout.rstrip()


def test_every_script_that_is_named_exists():
    for script in set(re.findall(r'scripts/[\w.]+', README)):
        assert (ROOT / script).exists(), script
