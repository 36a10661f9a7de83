"""A Google Cloud Storage bucket on this machine: as much of its JSON interface as gcsfs and TensorStore use.

Objects are in memory. Names, listings, preconditions on generations and uploads are as Cloud Storage documents them.
"""

import base64
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

NAME = "bucket"


class Bucket:
    """The bucket ``gs://bucket``, served while the `with` block lasts.

    Attributes:
        objects: {name: (generation, content)}.
        environment: what programs need to find it here and not in the cloud.
    """

    def __init__(self):
        self.objects, self.lock = {}, threading.RLock()
        self.generations, self.uploads = itertools.count(1), {}

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,  # gcsfs and Google's client
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks the cloud what kind of bucket it is
            "FSSPEC_GCS_TOKEN": "anon",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def names(self, prefix=""):
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def put(self, name, content):
        with self.lock:
            self.objects[name] = (next(self.generations), content)
            return self.about(name)

    def about(self, name):
        generation, content = self.objects[name]
        now = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "id": f"{NAME}/{name}/{generation}",
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": now,
            "updated": now,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 2**16
    bucket: Bucket

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # who asked does not read any more
            super().handle()

    def do_GET(self):
        self._answer(self._read())

    do_POST = do_PUT = do_DELETE = do_GET

    def _read(self):
        length = self.headers.get("Content-Length")
        if length is None and self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(length or 0))

    def _answer(self, body):
        url = urlsplit(self.path)
        with self.bucket.lock:
            status, content, headers = self._do(self.command, url.path, dict(parse_qsl(url.query)), body)
        if status in (204, 304):
            content = b""
        elif not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _do(self, method, path, query, body):
        """(status, content as bytes or for JSON, headers) of a request."""
        if path.startswith("/upload/"):
            return self._upload(path, query, body)
        found = re.fullmatch(rf"(/download)?/storage/v1/b/{NAME}(?:(/o)(?:/([^/]+))?)?(?:/(.+))?", path)
        if not found:
            return self._error(404, f"no such bucket: {path}")
        media, objects, name, rest = found.groups()
        if objects is None:
            return 200, {"kind": "storage#bucket", "name": NAME, "id": NAME}, {}
        if name is None:
            return 200, self._list(query), {}
        name = unquote(name)
        if refused := self._refused(name, query):
            return refused
        if name not in self.bucket.objects:
            return self._error(404, f"No such object: {NAME}/{name}")
        if rest:  # moveTo/o/NAME, rewriteTo/b/BUCKET/o/NAME
            about = self.bucket.put(unquote(rest.rpartition("/")[2]), self.bucket.objects[name][1])
            if rest.startswith("moveTo"):
                del self.bucket.objects[name]
                return 200, about, {}
            return 200, {"done": True, "resource": about, "objectSize": about["size"]}, {}
        if method == "DELETE":
            del self.bucket.objects[name]
            return 204, b"", {}
        if media or query.get("alt") == "media":
            return self._content(name)
        return 200, self.bucket.about(name), {}

    def _error(self, status, message):
        return status, {"error": {"code": status, "message": message}}, {}

    def _refused(self, name, query):
        generation = self.bucket.objects[name][0] if name in self.bucket.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return self._error(412, "conditionNotMet")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return self._error(304, "conditionNotMet")
        return None

    def _list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], []
        for name in self.bucket.names(prefix):
            inside = name[len(prefix) :]
            if delimiter and delimiter in inside:
                prefixes.append(prefix + inside.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.bucket.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(set(prefixes))}

    def _content(self, name):
        generation, content = self.bucket.objects[name]
        headers, status = {"X-Goog-Generation": str(generation), "Content-Type": "application/octet-stream"}, 200
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size = len(content)
            first = int(asked[1]) if asked[1] else size - int(asked[2])
            last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            if first >= size:
                return self._error(416, "Requested range not satisfiable")
            headers["Content-Range"], status = f"bytes {first}-{last}/{size}", 206
            content = content[first : last + 1]
        return status, content, headers

    def _upload(self, path, query, body):
        kind = query.get("uploadType")
        if not re.fullmatch(rf"/upload/storage/v1/b/{NAME}/o", path):
            return self._error(404, f"no such bucket: {path}")
        if kind == "media":
            return self._refused(query["name"], query) or (200, self.bucket.put(query["name"], body), {})
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].strip("'")
            _, about, content, _ = body.split(b"--" + boundary.encode(), 3)
            about = json.loads(about.partition(b"\r\n\r\n" if b"\r\n\r\n" in about else b"\n\n")[2])
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            content = content.removesuffix(b"\r\n") if content.endswith(b"\r\n") else content.removesuffix(b"\n")
            return self._refused(about["name"], query) or (200, self.bucket.put(about["name"], content), {})
        if "upload_id" not in query:  # a resumable one begins
            upload, name = os.urandom(8).hex(), query.get("name") or json.loads(body)["name"]
            self.bucket.uploads[upload] = (name, b"")
            where = f"{self.bucket.address}/upload/storage/v1/b/{NAME}/o?uploadType=resumable&upload_id={upload}"
            return 200, {}, {"Location": where}
        name, before = self.bucket.uploads[query["upload_id"]]
        content = before + body
        if self.headers.get("Content-Range", "").endswith("/*"):  # more comes
            self.bucket.uploads[query["upload_id"]] = (name, content)
            return 308, {}, {"Range": f"bytes=0-{len(content) - 1}"}
        return 200, self.bucket.put(name, content), {}
