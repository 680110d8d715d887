"""A Hub on loopback: repositories, commits and files on the disk, behind the endpoints that huggingface_hub calls.

    ROOT/blobs/SHA256                    contents
    ROOT/repos/ORG/NAME/refs.json        branch -> commit
    ROOT/repos/ORG/NAME/COMMIT.json      {"title", "parent", "files": {path: {"sha256", "git", "size", "lfs"}}}

Large files are sent from a second port, as the Hub sends them from another host, where no token may arrive.
`trouble(method, pattern, answer)` makes requests fail as the Hub's do: with a status, late, or cut in the middle.
"""

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "secret" * 5
LFS_FROM = 4096
"""Files of this size and more are large files (the Hub's rule also looks at names and contents)."""


@dataclass
class Trouble:
    method: str
    pattern: str
    answer: object
    """A status, ("stall", seconds) or ("cut", bytes)."""
    times: int = 10**9
    headers: dict = field(default_factory=dict)


class Doors:
    """Two addresses at which one Hub after the other can be reached."""

    def __init__(self):
        self.hub = None
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, cdn)) for cdn in (False, True)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def close(self):
        for server in self._servers:
            server.shutdown()
            server.server_close()


class Hub:
    """The repositories of one folder, behind these doors."""

    def __init__(self, root, doors):
        self.root = Path(root)
        (self.root / "blobs").mkdir(parents=True)
        self.requests = []
        """(method, path, whether a token came with it) of every request, in order."""
        self.sent = 0
        """Bytes of files that were sent."""
        self.troubles = []
        self.renamed = {}
        self.gated = set()
        self.private = set()
        self.pulls = {}
        self.url, self.cdn = doors.url, doors.cdn
        doors.hub = self

    # ------------------------------------------------------------ repositories

    def folder(self, repo):
        return self.root / "repos" / repo

    def create(self, repo, *, private=False):
        self.folder(repo).mkdir(parents=True)
        if private:
            self.private.add(repo)
        self._write(repo, "refs", {})
        return self.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, repo, files, title="update", branch="main"):
        """A commit that adds these files ({path: bytes, or an entry}; None deletes)."""
        refs = self.refs(repo)
        parent = refs.get(branch)
        known = dict(self.files(repo, parent)) if parent else {}
        for path, content in files.items():
            known[path] = self.store(content) if isinstance(content, bytes) else content
        known = {path: entry for path, entry in known.items() if entry is not None}
        document = {"title": title, "parent": parent, "files": known}
        commit = hashlib.sha1(json.dumps(document, sort_keys=True).encode()).hexdigest()
        self._write(repo, commit, document)
        self._write(repo, "refs", refs | {branch: commit})
        return commit

    def upload(self, repo, folder, **options):
        """Every file of a folder as one commit; the repository is made if need be."""
        if not self.folder(repo).is_dir():
            self.create(repo)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        return self.commit(repo, files, **options)

    def store(self, content):
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / sha256).write_bytes(content)
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": sha256, "git": git, "size": len(content), "lfs": len(content) >= LFS_FROM}

    def refs(self, repo):
        return json.loads((self.folder(repo) / "refs.json").read_text())

    def log(self, repo, branch="main"):
        """Titles of the commits of a branch, the newest first."""
        commit, titles = self.refs(repo).get(branch), []
        while commit:
            document = json.loads((self.folder(repo) / f"{commit}.json").read_text())
            titles.append(document["title"])
            commit = document["parent"]
        return titles

    def files(self, repo, revision="main"):
        commit = self.resolve(repo, revision)
        return json.loads((self.folder(repo) / f"{commit}.json").read_text())["files"]

    def read(self, repo, path, revision="main"):
        return (self.root / "blobs" / self.files(repo, revision)[path]["sha256"]).read_bytes()

    def resolve(self, repo, revision):
        found = self.refs(repo).get(revision, revision)
        return found if (self.folder(repo) / f"{found}.json").is_file() else None

    def _write(self, repo, name, document):
        (self.folder(repo) / f"{name}.json").write_text(json.dumps(document))

    # ------------------------------------------------------------ trouble

    @contextmanager
    def trouble(self, method, pattern, answer, **options):
        trouble = Trouble(method, pattern, answer, **options)
        self.troubles.append(trouble)
        try:
            yield trouble
        finally:
            self.troubles.remove(trouble)

    def asked(self, pattern, method=None):
        """The requests whose path matches."""
        return [r for r in self.requests if re.search(pattern, r[1]) and method in (None, r[0])]


def _handler(doors, cdn):
    return type("Bound", (Handler,), {"doors": doors, "cdn": cdn})


class Handler(BaseHTTPRequestHandler):
    doors: Doors
    cdn: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    # -------------------------------------------------------- in

    def _answer(self):
        self.hub = self.doors.hub
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunked()
        self.path, _, self.query = unquote(urlsplit(self.path).path), "", parse_qs(urlsplit(self.path).query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, f"{'cdn' if self.cdn else ''}{self.path}", bool(self.token)))
        if self._trouble():
            return
        for method, pattern, act in CDN_ROUTES if self.cdn else ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in method.split():
                act(self, **match.groupdict())
                return
        self.say(404, {"error": f"no such endpoint: {self.command} {self.path}"})

    def _chunked(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _trouble(self):
        self.cut = None
        path = f"{'cdn' if self.cdn else ''}{self.path}"
        for trouble in self.hub.troubles:
            if trouble.times > 0 and self.command == trouble.method and re.search(trouble.pattern, path):
                trouble.times -= 1
                if isinstance(trouble.answer, int):
                    self.say(trouble.answer, {"error": "trouble"}, trouble.headers)
                    return True
                kind, amount = trouble.answer
                if kind == "stall":
                    time.sleep(amount)
                    self.close_connection = True
                    return True
                self.cut = amount
        return False

    # -------------------------------------------------------- out

    def say(self, status, document=None, headers=None, data=None):
        data = json.dumps(document).encode() if data is None else data
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            self.wfile.write(data[: self.cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data)

    def refuse(self, status, code, text):
        self.say(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def may(self, repo, *, write=False):
        """Whether whoever asks may read (or write) this repository; if not, it has been said."""
        known = self.hub.folder(repo).is_dir()
        if self.token and self.token != TOKEN:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif not known or (repo in self.hub.private and not self.token):
            self.refuse(404 if self.token else 401, "RepoNotFound" if self.token else "", "Repository not found")
        elif repo in self.hub.gated:
            self.refuse(403 if self.token else 401, "GatedRepo", "Access to this model is restricted")
        elif write and not self.token:
            self.refuse(401, "", "Unauthorized")
        else:
            return True
        return False

    def moved(self, repo, path):
        if repo not in self.hub.renamed:
            return False
        self.say(307, {}, {"Location": f"{self.hub.url}{path.replace(repo, self.hub.renamed[repo])}"})
        return True

    def at(self, repo, revision):
        commit = self.hub.resolve(repo, revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -------------------------------------------------------- reading

    def info(self, repo, revision="main"):
        if self.moved(repo, self.path) or not self.may(repo) or not (commit := self.at(repo, revision)):
            return
        siblings = [{"rfilename": path, **_sizes(entry)} for path, entry in self.hub.files(repo, commit).items()]
        facts = {"id": repo, "modelId": repo, "sha": commit, "private": repo in self.hub.private, "siblings": siblings}
        self.say(200, facts | {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo, revision):
        if self.may(repo) and (commit := self.at(repo, revision)):
            entries = self.hub.files(repo, commit).items()
            self.say(200, [{"type": "file", "path": path, "oid": e["git"], **_sizes(e)} for path, e in entries])

    def resolve(self, repo, revision, path):
        if self.moved(repo, self.path) or not self.may(repo) or not (commit := self.at(repo, revision)):
            return
        entry = self.hub.files(repo, commit).get(path)
        if entry is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        etag = entry["sha256"] if entry["lfs"] else entry["git"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            linked = {"X-Linked-Size": entry["size"], "X-Linked-Etag": f'"{etag}"'}
            place = f"{self.hub.cdn}/files/{entry['sha256']}?signature=SIGNED-{TOKEN[-6:]}"
            self.say(302, {}, headers | linked | {"Location": place})
        else:
            self.send_file(entry["sha256"], headers)

    def send_file(self, sha256, headers=None):
        if self.cdn and self.token:
            self.refuse(400, "", "no token may arrive here")
            return
        data = (self.hub.root / "blobs" / sha256).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"Content-Type": "application/octet-stream", **(headers or {})}
        if wanted is None:
            status, part = 200, data
        else:
            begin, end = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else len(data)
            status, part = 206, data[begin:end]
            headers["Content-Range"] = f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.sent += len(part)
        self.say(status, headers=headers, data=part)

    # -------------------------------------------------------- writing

    def make(self):
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.token != TOKEN:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif self.hub.folder(repo).is_dir():
            self.say(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
        else:
            self.hub.create(repo, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self.say(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def whoami(self):
        if self.token != TOKEN:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self.say(200, {"name": "me", "type": "user", "orgs": []})

    def check_card(self):
        self.say(200, {"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        if not self.may(repo, write=True) or not (commit := self.at(repo, revision)):
            return
        known = self.hub.files(repo, commit)
        answers = []
        for file in json.loads(self.body)["files"]:
            entry = known.get(file["path"])
            oid = (entry["sha256"] if entry["lfs"] else entry["git"]) if entry else None
            mode = "lfs" if file["size"] >= LFS_FROM else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.say(200, {"files": answers})

    def batch(self, repo):
        if not self.may(repo, write=True):
            return
        answers = []
        for entry in json.loads(self.body)["objects"]:
            there = (self.hub.root / "blobs" / entry["oid"]).is_file()
            place = f"{self.hub.cdn}/upload/{entry['oid']}"
            answers.append({**entry} if there else {**entry, "actions": {"upload": {"href": place}}})
        self.say(200, {"transfer": "basic", "objects": answers})

    def receive(self, sha256):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            self.refuse(400, "", "the content is not what was announced")
        else:
            (self.hub.root / "blobs" / sha256).write_bytes(self.body)
            self.say(200, {})

    def take_commit(self, repo, revision):
        if not self.may(repo, write=True) or not self.at(repo, revision):
            return
        lines = [json.loads(line) for line in self.body.decode().splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.store((self.hub.root / "blobs" / value["oid"]).read_bytes())
            else:
                files[value["path"]] = None
        title = lines[0]["value"]["summary"]
        answer = {"pullRequestUrl": None}
        branch = revision
        if self.query.get("create_pr") == ["1"]:
            number = len(self.hub.pulls.setdefault(repo, [])) + 1
            branch = f"refs/pr/{number}"
            self.hub.pulls[repo].append(title)
            self.hub._write(repo, "refs", self.hub.refs(repo) | {branch: self.hub.resolve(repo, revision)})
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        commit = self.hub.commit(repo, files, title, branch)
        answer |= {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}"}
        self.say(200, answer)

    def discussions(self, repo):
        if not self.may(repo):
            return
        found = [
            {"num": number, "title": title, "status": "open", "isPullRequest": True, "author": {"name": "me"}}
            | {"repo": {"name": repo, "type": "model"}, "createdAt": "2026-01-01T00:00:00.000Z"}
            for number, title in enumerate(self.hub.pulls.get(repo, []), start=1)
        ]
        self.say(200, {"discussions": found, "count": len(found), "start": 0})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    ("GET", rf"/api/models/{_REPO}", Handler.info),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>.+)", Handler.tree),
    ("GET", rf"/api/models/{_REPO}/discussions", Handler.discussions),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.make),
    ("POST", r"/api/validate-yaml", Handler.check_card),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", Handler.take_commit),
)
CDN_ROUTES = (
    ("GET HEAD", r"/files/(?P<sha256>[0-9a-f]+)", Handler.send_file),
    ("PUT", r"/upload/(?P<sha256>[0-9a-f]+)", Handler.receive),
)


def _sizes(entry):
    large = {"lfs": {"sha256": entry["sha256"], "oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}}
    return {"size": entry["size"], "blobId": entry["git"], **(large if entry["lfs"] else {})}
