"""A stand-in for the Hub on 127.0.0.1: what the real client sends when it makes, fills and reads a model repository.

It keeps repositories in memory, checks tokens, and can be told to misbehave (`HubStandIn.fault`).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Optional

LFS_SUFFIX = '.safetensors'


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit({'.gitattributes': b'*.safetensors filter=lfs\n'})

    def commit(self, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f'{len(self.commits)} {sorted(files)}'.encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    @property
    def head(self) -> tuple[str, dict[str, bytes]]:
        return self.commits[-1]


@dataclass
class Fault:
    """Answers requests whose 'METHOD path' matches `pattern`, `times` times.

    `action`: a status, 'drop', 'truncate', or 'page', as of a proxy.
    """

    pattern: str
    action: Any
    times: int = 1_000


class HubStandIn:
    """Use as a context manager; `url` is its `HF_ENDPOINT`.

    Attributes:
        users: Token to user. A user may write under the own name and read what is public or the own.
        repos: 'owner/name' to repository.
        lfs: Large files by SHA-256; they are there before a commit names them.
        log: 'METHOD path' of every request.
    """

    def __init__(self) -> None:
        self.users = {'hf_token_of_user': 'user', 'hf_token_of_other': 'other'}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.fault: Optional[Fault] = None
        hub = self

        class Handler(Requests):
            state = hub

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'

    def __enter__(self) -> 'HubStandIn':
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commits(self, repo_id: str) -> int:
        """Number of commits after the one that made the repository."""
        return len(self.repos[repo_id].commits) - 1


class Requests(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    state: HubStandIn

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = self.path.split('?')[0]
        request = f'{self.command} {path}'
        self.state.log.append(request)
        fault = self.state.fault
        active = fault is not None and fault.times > 0 and re.search(fault.pattern, request) is not None
        self.truncate = False
        length = int(self.headers.get('Content-Length') or 0)
        if active:
            fault.times -= 1
            if fault.action == 'drop':
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.close()
                return
            self.truncate = fault.action == 'truncate'
        body = self.rfile.read(length)
        if active and fault.action == 'page':
            self.reply(200, b'<html>Log in to go on.</html>')
            return
        if active and not self.truncate:
            self.reply(fault.action, {'error': f'told to answer {fault.action} to {self.headers["Authorization"]}'})
            return
        token = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        self.user = self.state.users.get(token)
        if token and self.user is None:
            self.reply(401, {'error': 'Invalid credentials in Authorization header'})
            return
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, request):
                method(self, body, **match.groupdict())
                return
        self.reply(404, {'error': f'no such route: {request}'})

    def reply(self, status: int, content: Any = b'', headers: Optional[dict[str, str]] = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data[: len(data) // 2] if self.truncate else data)
        if self.truncate:
            self.close_connection = True

    def may_write(self, repo_id: str) -> bool:
        if self.user is None:
            self.reply(401, {'error': 'Invalid username or password.'})
        elif self.user != repo_id.split('/')[0]:
            self.reply(403, {'error': f"You don't have the rights to write under the namespace {repo_id}"})
        return self.user == repo_id.split('/')[0]

    def readable(self, repo_id: str) -> Optional[Repo]:
        repo = self.state.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split('/')[0]):
            self.reply(401 if self.user is None else 404, {'error': 'x'}, {'X-Error-Code': 'RepoNotFound'})
            return None
        return repo

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f'{asked.get("organization") or self.user}/{asked["name"]}'
        if self.may_write(repo_id):
            exists = repo_id in self.state.repos
            if not exists:
                private = asked.get('visibility') == 'private' or bool(asked.get('private'))
                self.state.repos[repo_id] = Repo(private)
            self.reply(409 if exists else 200, {'url': f'{self.state.url}/{repo_id}', 'error': 'exists'})

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)['content']
        valid = re.match(r'---\n(.*\n)*library_name: timm\n(.*\n)*---\n', content) is not None
        errors = [] if valid else [{'message': 'no front matter'}]
        self.reply(200 if valid else 400, {'errors': errors, 'warnings': []})

    def info(self, body: bytes, repo_id: str, revision: str = 'main') -> None:
        if repo := self.readable(repo_id):
            siblings = [{'rfilename': name} for name in repo.head[1]]
            self.reply(200, {'id': repo_id, 'sha': repo.head[0], 'private': repo.private, 'siblings': siblings})

    def preupload(self, body: bytes, repo_id: str) -> None:
        if self.may_write(repo_id) and (repo := self.readable(repo_id)):
            files = []
            for name in (file['path'] for file in json.loads(body)['files']):
                lfs = name.endswith(LFS_SUFFIX)
                there = repo.head[1].get(name)
                oid = None if there is None else hashlib.sha256(there).hexdigest() if lfs else git_oid(there)
                mode = 'lfs' if lfs else 'regular'
                files.append({'path': name, 'uploadMode': mode, 'shouldIgnore': False, 'oid': oid})
            self.reply(200, {'files': files})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        if self.may_write(repo_id):
            objects = []
            for item in json.loads(body)['objects']:
                actions = {
                    'upload': {'href': f'{self.state.url}/lfs/{item["oid"]}'},
                    'verify': {'href': f'{self.state.url}/lfs-verify'},
                }
                objects.append(item if item['oid'] in self.state.lfs else {**item, 'actions': actions})
            self.reply(200, {'transfer': 'basic', 'objects': objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        whole = hashlib.sha256(body).hexdigest() == oid
        if whole:
            self.state.lfs[oid] = body
        self.reply(200 if whole else 400)

    def lfs_verify(self, body: bytes) -> None:
        asked = json.loads(body)
        there = len(self.state.lfs.get(asked['oid'], b'')) == asked['size']
        self.reply(200 if there else 404, {})

    def commit(self, body: bytes, repo_id: str) -> None:
        if not (self.may_write(repo_id) and (repo := self.readable(repo_id))):
            return
        files = dict(repo.head[1])
        for line in map(json.loads, body.splitlines()):
            key, value = line['key'], line['value']
            if key == 'header' and value.get('parentCommit', repo.head[0]) != repo.head[0]:
                self.reply(412, {'error': 'The branch has moved'})
                return
            if key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                files[value['path']] = self.state.lfs[value['oid']]
        oid = repo.commit(files)
        self.reply(200, {'success': True, 'commitOid': oid, 'commitUrl': f'{self.state.url}/{repo_id}/commit/{oid}'})

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        if repo := self.readable(repo_id):
            commit, files = repo.head
            if name not in files:
                self.reply(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit})
                return
            self.reply(200, files[name], {'X-Repo-Commit': commit, 'ETag': f'"{git_oid(files[name])}"'})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        if repo := self.readable(repo_id):
            entries = [
                {'type': 'file', 'path': name, 'size': len(content), 'oid': git_oid(content)}
                for name, content in repo.head[1].items()
            ]
            self.reply(200, entries)


REPO = r'(?P<repo_id>[\w.-]+/[\w.-]+?)'
ROUTES = {
    r'POST /api/repos/create': Requests.create,
    r'POST /api/validate-yaml': Requests.validate_yaml,
    rf'GET /api/models/{REPO}': Requests.info,
    rf'GET /api/models/{REPO}/revision/(?P<revision>[^/]+)': Requests.info,
    rf'GET /api/models/{REPO}/tree/(?P<revision>[^/]+)': Requests.tree,
    rf'POST /api/models/{REPO}/preupload/main': Requests.preupload,
    rf'POST /api/models/{REPO}/commit/main': Requests.commit,
    rf'POST /{REPO}\.git/info/lfs/objects/batch': Requests.lfs_batch,
    r'PUT /lfs/(?P<oid>\w+)': Requests.lfs_put,
    r'POST /lfs-verify': Requests.lfs_verify,
    rf'(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)': Requests.resolve,
}
