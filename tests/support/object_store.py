"""A real S3 server on loopback (moto), which can be made to fail."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUCKET = "bucket"


class FaultyStore:
    """The WSGI application of moto's server, with faults in front of it.

    Each `every`-th request of a kind gets status 500, the next one of that kind a body that ends
    half way, for as long as `every` is not 0.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self.every = 0
        self.asked: Counter[tuple[str, str]] = Counter()
        """Requests by method and path."""
        self.failed: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self._lock:
            self.asked[method, path] += 1
            number = self.asked[method, ""] = self.asked[method, ""] + 1
        turn = number % self.every if self.every else -1
        if turn == 0:
            self.failed[f"{method} 500"] += 1
            start("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        answer = self._application(environ, start)
        if turn == 1 and method == "GET" and path.count("/") > 1:
            body = b"".join(answer)
            if len(body) > 1000:
                self.failed["GET cut"] += 1
                return self._cut(body)
            return [body]
        return answer

    def _cut(self, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise ConnectionAbortedError("cut on purpose")


@contextmanager
def s3_server() -> Iterator[FaultyStore]:
    """Start the server with an empty bucket; credentials and address are in the environment."""
    import boto3
    import s3fs
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = FaultyStore(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True)
    server.log = lambda *words: None  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    names += ("AWS_DEFAULT_REGION", "AWS_MAX_ATTEMPTS")  # botocore waits long between its own.
    before = {name: os.environ.get(name) for name in names}
    values = (f"http://127.0.0.1:{server.server_port}", "test", "test", "us-east-1", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    os.environ.update(zip(names, values, strict=True))
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def put_folder(folder: Path, prefix: str) -> None:
    """Upload all files below a folder."""
    import boto3

    client = boto3.client("s3")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")


def stored(prefix: str) -> dict[str, bytes]:
    """Content of all objects below a prefix, by relative name."""
    import boto3

    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/").get("Contents", [])
    return {
        each["Key"].removeprefix(f"{prefix}/"): client.get_object(Bucket=BUCKET, Key=each["Key"])[
            "Body"
        ].read()
        for each in listed
    }
