"""A Hugging Face Hub in this process: as much of its HTTP interface as huggingface_hub needs to create repositories, to
upload (small files in the commit, large ones by the LFS batch API), and to download revisions."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


TOKEN = "hf_tokenoftests"


class LocalHub:
    """Use as a context manager; `environment` makes a process talk to it.

    Args:
        lfs_bytes: files of at least that many bytes are uploaded through LFS.
    """

    def __init__(self, lfs_bytes: int = 10_000) -> None:
        self.lfs_bytes = lfs_bytes
        self.commits = {}  # by repository: [(revision, {path: bytes})], the oldest first
        self.branches = {}  # by repository: {branch: revision}
        self.private, self.gated = set(), set()  # repositories
        self.objects = {}  # of LFS, by SHA-256
        self.requests = []  # method and path
        self.unknown = []  # that nobody handled
        self.fails_at = None  # a pattern of paths: requests to these are answered with 400
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """The newest files of a branch."""
        return dict(dict(self.commits[repository])[self.branches[repository][branch]])

    def history(self, repository: str) -> list[dict[str, bytes]]:
        """The files of each commit but the empty first one."""
        return [files for _, files in self.commits[repository][1:]]

    def _commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        revision = hashlib.sha1(f"{repository} {len(self.commits[repository])}".encode()).hexdigest()
        self.commits[repository].append((revision, files))
        self.branches[repository][branch] = revision
        return revision

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def answer(self, code: int, content=b"", **headers) -> None:
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                    headers.setdefault("Content-Type", "application/json")
                self.send_response(code)
                headers.setdefault("Content-Length", str(len(content)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def handle_one(self) -> None:
                path = unquote(urlparse(self.path).path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, path))
                if hub.fails_at and re.search(hub.fails_at, path):
                    return self.answer(400, {"error": "broken on purpose"})
                for pattern, method in ROUTES:
                    if match := re.fullmatch(pattern, path):
                        return method(self, body, *match.groups())
                hub.unknown.append((self.command, path))
                self.answer(404, {"error": "not handled"})

            do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_one

            def allowed(self, repository: str) -> bool:
                authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
                if repository not in hub.commits or (repository in hub.private and not authorized):
                    self.answer(
                        401 if not authorized else 404, {"error": "no such repository"}, X_Error_Code="RepoNotFound"
                    )
                    return False
                if repository in hub.gated:
                    self.answer(403, {"error": "ask for access"}, X_Error_Code="GatedRepo")
                    return False
                return True

            def snapshot(self, repository: str, revision: str):
                if not self.allowed(repository):
                    return None
                revision = hub.branches[repository].get(revision, revision)
                files = dict(hub.commits[repository]).get(revision)
                if files is None:
                    self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
                    return None
                return revision, files

            def whoami(self, body) -> None:
                token = {"role": "write", "displayName": "tests"}
                self.answer(200, {"type": "user", "name": "user", "auth": {"accessToken": token}, "orgs": []})

            def create(self, body) -> None:
                wanted = json.loads(body)
                repository = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
                url = f"{hub.url}/{repository}"
                if repository in hub.commits:
                    return self.answer(409, {"error": "exists", "url": url})
                hub.commits[repository], hub.branches[repository] = [], {}
                if wanted.get("private") or wanted.get("visibility") == "private":
                    hub.private.add(repository)
                hub._commit(repository, "main", {})
                self.answer(200, {"url": url, "name": repository})

            def branch(self, body, repository, branch) -> None:
                hub.branches[repository].setdefault(branch, hub.branches[repository]["main"])
                self.answer(200, {})

            def refs(self, body, repository) -> None:
                if self.allowed(repository):
                    branches = hub.branches[repository].items()
                    found = [{"name": x, "ref": f"refs/heads/{x}", "targetCommit": commit} for x, commit in branches]
                    self.answer(200, {"branches": found, "converts": [], "tags": []})

            def valid(self, body) -> None:
                self.answer(200, {"errors": [], "warnings": []})

            def preupload(self, body, repository, revision) -> None:
                def mode(file) -> str:
                    return "lfs" if file["size"] >= hub.lfs_bytes else "regular"

                files = json.loads(body)["files"]
                answer = [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in files]
                self.answer(200, {"files": answer})

            def batch(self, body, repository) -> None:
                objects = json.loads(body)["objects"]
                for wanted in objects:
                    wanted["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
                self.answer(200, {"transfer": "basic", "objects": objects})

            def put(self, body, oid) -> None:
                assert hashlib.sha256(body).hexdigest() == oid
                hub.objects[oid] = body
                self.answer(200)

            def commit(self, body, repository, branch) -> None:
                files = hub.files(repository, branch)
                for line in filter(None, body.splitlines()):
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                    elif entry["key"] == "deletedFile":
                        files.pop(value["path"], None)
                revision = hub._commit(repository, branch, files)
                url = f"{hub.url}/{repository}/commit/{revision}"
                self.answer(200, {"commitUrl": url, "commitOid": revision, "success": True})

            def tree(self, body, repository, revision) -> None:
                if found := self.snapshot(repository, revision):
                    listing = [
                        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in found[1].items()
                    ]
                    self.answer(200, listing)

            def info(self, body, repository, revision=None) -> None:
                if found := self.snapshot(repository, revision or "main"):
                    siblings = [{"rfilename": path} for path in found[1]]
                    facts = {"id": repository, "modelId": repository, "sha": found[0], "siblings": siblings, "tags": []}
                    self.answer(
                        200, facts | {"_id": "0", "private": repository in hub.private, "downloads": 0, "likes": 0}
                    )

            def resolve(self, body, repository, revision, path) -> None:
                if not (found := self.snapshot(repository, revision)):
                    return
                if path not in found[1]:
                    return self.answer(
                        404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0]
                    )
                content = found[1][path]
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                kind = "application/octet-stream"
                self.answer(200, content, X_Repo_Commit=found[0], ETag=tag, Content_Type=kind)

        model = r"/api/(?:models|datasets)/([^/]+/[^/]+)"
        ROUTES = [
            (r"/api/whoami-v2", Handler.whoami),
            (r"/api/repos/create", Handler.create),
            (r"/api/validate-yaml", Handler.valid),
            (rf"{model}/branch/(.+)", Handler.branch),
            (rf"{model}/refs", Handler.refs),
            (rf"{model}/preupload/(.+)", Handler.preupload),
            (rf"{model}/commit/(.+)", Handler.commit),
            (rf"{model}/tree/([^/]+).*", Handler.tree),
            (rf"{model}/revision/([^/]+)", Handler.info),
            (model, Handler.info),
            (r"(?:/datasets)?/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
            (r"/lfs/(\w+)", Handler.put),
            (r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
        ]
        return Handler
