"""Files are whole or absent, whatever happens while they are written."""

import ast
import os
import stat
from pathlib import Path

import pytest

from timm_weighted_skip.files import replacing, write_file

ROOT = Path(__file__).resolve().parent.parent


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'folder' / 'table.csv'
    write_file(path, 'old')
    with pytest.raises(TypeError):
        write_file(path, 7)

    def full(file):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match=r'table.csv could not be written \(No space left on device\)'):
        write_file(path, 'new')
    assert path.read_text() == 'old'
    assert [file.name for file in path.parent.iterdir()] == ['table.csv']


def test_a_folder_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, Path('.')):
        with pytest.raises(IsADirectoryError, match='is a folder; give the name of a file'):
            write_file(folder, 'x')


def test_a_link_stays_one_and_a_pipe_is_no_file(tmp_path):
    file, link, pipe = (tmp_path / name for name in ('table.csv', 'link.csv', 'pipe'))
    link.symlink_to(file)
    write_file(link, 'new')
    assert (link.is_symlink(), file.read_text()) == (True, 'new')
    os.mkfifo(pipe)
    with pytest.raises(OSError, match='pipe is a device or a pipe; give the name of a file'):
        write_file(pipe, 'x')
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_two_that_write_one_file_do_not_meet(tmp_path):
    path = tmp_path / 'table.csv'
    with replacing(path) as first, replacing(path) as second:
        first.write_text('first')
        second.write_text('second')
    assert path.read_text() == 'first'  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_the_umask_is_respected(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            write_file(tmp_path / 'table.csv', '')
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / 'table.csv').stat().st_mode) == mode


@pytest.mark.parametrize('folder', ['timm_weighted_skip', 'scripts'])
def test_text_is_read_as_it_was_written_whatever_the_locale(folder):
    calls = [
        (file.name, call)
        for file in (ROOT / folder).rglob('*.py')
        for call in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == 'read_text'
    ]
    assert len(calls) > 2
    assert [f'{name}:{call.lineno}' for name, call in calls if 'encoding' not in {k.arg for k in call.keywords}] == []
