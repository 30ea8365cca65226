"""Publishing a checkpoint directory to the Hub as one commit."""

import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Optional

from timm_weighted_skip.hub.checkpoint import validate_checkpoint
from timm_weighted_skip.hub.config import FILES, one_line
from timm_weighted_skip.models.pretrained import HUB_OWNER

__all__ = ['publish', 'publish_all', 'read_token']

STATUS = {
    401: 'the token is not valid; make one at https://huggingface.co/settings/tokens',
    402: 'the account has to pay for this kind of repository',
    403: 'the token has no right to write there; it needs the write permission, and the owner must be you or your team',
    404: 'there is no such repository, or the token may not see it',
    409: 'something else changed the repository meanwhile; run the command again',
    412: 'something else changed the repository meanwhile; run the command again',
    413: 'a file is too large',
    429: 'too many requests; wait some minutes and run the command again',
}


def read_token(file: Optional[Path] = None) -> str:
    """The token in `file`, or that of the environment or of `hf auth login`. It never appears in an error.

    Raises:
        ValueError: There is none, or `file` holds something else.
    """
    from huggingface_hub import get_token

    token = file.read_text(encoding='utf-8', errors='replace').strip() if file else get_token()
    if not token:
        where = f'{file} is empty' if file else 'no Hub token was found'
        raise ValueError(f'{where}; run `hf auth login`, set HF_TOKEN or give --token-file')
    if not re.fullmatch(r'[!-~]+', token):
        raise ValueError(f'{file or "the Hub token"} is not a token: it has blanks, line breaks or other characters')
    return token


def _reason(error: BaseException) -> str:
    """One line on what failed; the server's own words where it gave some."""
    if isinstance(error, JSONDecodeError):
        return 'the answer is no answer of the Hub; is there a proxy, or another server at HF_ENDPOINT?'
    cause: Optional[BaseException] = error
    while cause is not None:
        response = getattr(cause, 'response', None)
        if response is not None:
            status = response.status_code
            known = STATUS.get(status, 'the Hub has a problem of its own; run the command again later')
            said = getattr(cause, 'server_message', None)
            return f'{known} (HTTP {status}{f": {said}" if said else ""})'
        error, cause = cause, cause.__cause__
    return f'the Hub could not be reached: {one_line(error) or type(error).__name__}'


def _readdressed(card: str, repo_id: str) -> str:
    """A model card that names `repo_id` where it names the repository that its snippets load."""
    named = re.search(r"'hf[-_]hub:([^']+)'", card)  # with an underscore in cards of earlier versions
    if named is None:
        return card
    card = card.replace(named[1], repo_id)
    own, new = named[1].split('/')[1], repo_id.split('/')[1]
    return re.sub(rf'^(# Model card for|- name:) {re.escape(own)}$', rf'\1 {new}', card, flags=re.MULTILINE)


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'{repo_id!r} is not a name of the Hub: {error}') from None
    if '/' not in repo_id:
        raise ValueError(f'{repo_id!r} has no owner; give --repo-id OWNER/NAME')


def publish(
    folder: Path,
    repo_id: Optional[str] = None,
    private: bool = False,
    dry_run: bool = False,
    token: Optional[str] = None,
) -> str:
    """Publish a checkpoint directory; the repository is made if there is none.

    The directory is validated first. The files become visible together, by one commit, or not at all. Running it again
    sends only what the Hub lacks, and makes no commit if nothing has changed. In the model card, the repository that it
    was written for is replaced by `repo_id`.

    Args:
        folder: Checkpoint directory.
        repo_id: 'OWNER/NAME'; by default the directory's name under `HUB_OWNER`.
        private: Make the repository private.
        dry_run: Validate, and say what would be sent.
        token: Hub token; see `read_token`.

    Returns:
        What was done, a line or several.

    Raises:
        ValueError: The directory is not valid, or `repo_id` is no such name, or a public repository was to be private.
        OSError: The Hub refused or could not be reached, and why.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(folder)
    repo_id = repo_id or f'{HUB_OWNER}/{folder.resolve().name}'
    _check_repo_id(repo_id)
    validate_checkpoint(folder)
    contents = {name: (folder / name).read_bytes() for name in FILES}
    contents['README.md'] = _readdressed(contents['README.md'].decode(), repo_id).encode()
    if dry_run:
        files = '\n'.join(f'  {name}  {len(content):,} bytes' for name, content in contents.items())
        return f'would publish to the {"private" if private else "public"} repository {repo_id}:\n{files}'

    token = token or read_token()
    api = HfApi(token=token, library_name='timm-weighted-skip')
    # httpx's errors derive from its own base class, those of requests from OSError.
    http_errors: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # type: ignore[assignment]
    wire_errors: tuple[type[Exception], ...] = (OSError, RuntimeError, JSONDecodeError, *http_errors)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        before = api.repo_info(repo_id)
        if private and before.private is False:
            raise ValueError(f'{repo_id} exists and is public; make it private on the Hub or leave --private out')
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=f'Publish {folder.resolve().name}',
            parent_commit=before.sha,
        )
    except wire_errors as error:
        raise OSError(f'{repo_id} was not published: {_reason(error)}'.replace(token, '***')) from None
    if commit.oid == before.sha:
        return f'{repo_id} is up to date, no commit was made'
    return f'published {repo_id}: {commit.commit_url}'


def publish_all(
    root: Path,
    owner: Optional[str] = None,
    private: bool = False,
    dry_run: bool = False,
    token: Optional[str] = None,
) -> Iterator[str]:
    """Publish every checkpoint directory in `root` under `owner` (by default `HUB_OWNER`); yields as `publish` returns.

    All of them are validated before the first is sent. A hidden folder is what a killed `save` has left.

    Raises:
        ValueError, OSError: There is none, or as `publish`.
    """
    folders = sorted(file.parent for file in Path(root).glob('[!.]*/config.json'))
    if not folders:
        raise FileNotFoundError(f'{root} holds no checkpoint directories')
    repositories = {folder: f'{owner or HUB_OWNER}/{folder.name}' for folder in folders}
    for folder, repo_id in repositories.items():
        _check_repo_id(repo_id)
        validate_checkpoint(folder)
    for folder, repo_id in repositories.items():
        yield publish(folder, repo_id, private, dry_run, token)
