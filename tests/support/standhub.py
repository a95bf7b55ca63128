"""A stand-in of the Hugging Face Hub: the parts of its HTTP API that huggingface_hub talks to.

Run as ``python standhub.py``: it prints its address. Files of one repository, user/repo, are taken
from and written to memory; ``PUT /__add__/<path>`` puts a file there, ``PUT /__damage__/<path>``
makes its content differ from its announced hash.
"""

import base64
import functools
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "user/repo"
FILES: dict[str, bytes] = {}
SERVED: dict[str, bytes] = {}  # where it differs from what is announced
UPLOADS: dict[str, bytes] = {}
LOG: list[str] = []


def commit() -> str:
    content = sorted((name, etag(name)) for name in FILES)
    return hashlib.sha1(repr(content).encode()).hexdigest()  # noqa: S324


def etag(name: str) -> str:
    return hash_of(name, FILES[name])


@functools.cache
def hash_of(name: str, data: bytes) -> str:
    if name.endswith((".json", ".md")):  # not in LFS
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324
    return hashlib.sha256(data).hexdigest()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def reply(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        LOG.append(f"{self.command} {self.path} {token}")
        if self.path.startswith("/user/gated/"):
            return self.reply({}, 403, X_Error_Code="GatedRepo", X_Error_Message="ask")
        if self.path == "/__log__":
            return self.reply(LOG)
        if self.path.startswith(f"/api/models/{REPO}/tree/"):
            return self.reply(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": etag(name)}
                    for name, data in FILES.items()
                ]
            )
        if self.path.startswith(f"/api/models/{REPO}"):
            files = [{"rfilename": name} for name in FILES]
            return self.reply({"id": REPO, "sha": commit(), "siblings": files, "private": False})
        found = re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", self.path)
        if not found:
            return self.reply({}, 404, X_Error_Code="RepoNotFound", X_Error_Message="no repo")
        revision, name = found.groups()
        if revision not in ("main", commit()):
            return self.reply({}, 404, X_Error_Code="RevisionNotFound", X_Error_Message="no rev")
        if name not in FILES:
            return self.reply(
                {}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit(), X_Error_Message="no"
            )
        data = SERVED.get(name, FILES[name])
        return self.reply(
            data,
            Content_Type="application/octet-stream",
            ETag=f'"{etag(name)}"',
            X_Repo_Commit=commit(),
        )

    def do_PUT(self) -> None:
        LOG.append(f"PUT {self.path}")
        if self.path.startswith("/__add__/"):
            FILES[self.path.removeprefix("/__add__/")] = self.body()
        elif self.path.startswith("/__damage__/"):
            name = self.path.removeprefix("/__damage__/")
            SERVED[name] = bytes([FILES[name][0] ^ 1]) + FILES[name][1:]
        else:
            data = self.body()
            UPLOADS[hashlib.sha256(data).hexdigest()] = data
        self.reply({})

    def do_POST(self) -> None:
        LOG.append(f"POST {self.path}")
        host, body = f"http://{self.headers['Host']}", self.body()
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{host}/{REPO}", "name": REPO, "id": REPO})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in wanted
            ]
            return self.reply({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{host}/upload/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    FILES[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    FILES[value["path"]] = UPLOADS[value["oid"]]
            url = f"{host}/{REPO}/commit/{commit()}"
            return self.reply({"commitUrl": url, "commitOid": commit(), "success": True})
        return self.reply({}, 404)


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
