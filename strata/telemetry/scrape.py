"""The server behind /metrics: bounded in connections and in their time, apart from the work.

A thread accepts connections and does nothing else with them; each is served by a thread of its own,
its TLS handshake too. So a silent client delays no other. At most `MAX_CONNECTIONS` are
open at a time, each for at most `CONNECTION_S`; a connection beyond is closed at once. So clients
cannot take the descriptors that the work needs.
"""

import base64
import hmac
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from strata.errors import ConfigError
from strata.logs import get_logger
from strata.telemetry.metrics import ExporterConfig

__all__ = ["CONNECTION_S", "LAST_SCRAPE_S", "MAX_CONNECTIONS", "ScrapeServer", "open_server"]

logger = get_logger(__name__)

MAX_CONNECTIONS = 16
"""Open at a time; a Prometheus has one."""
CONNECTION_S = 10.0
"""Seconds from a connection's beginning to its end, the handshake and the answer included."""
LAST_SCRAPE_S = 15.0
"""Longest wait for the scrape that sees a process's last values, in seconds."""
_WATCHED_S = 120.0
"""A process that was scraped within this time is expected to be scraped again, in seconds."""
_POLL_S = 0.2
_PAUSE_S = 0.1

Application = Callable[..., Any]


def open_server(
    registry: CollectorRegistry, config: ExporterConfig, port: int
) -> "ScrapeServer | None":
    """Answer `/metrics` in threads.

    Args:
        registry: What is rendered.
        config: Address, TLS and password.
        port: Port to bind; 0 takes a free one.

    Returns:
        The server; None if the port was taken, which is logged as a warning.

    Raises:
        ConfigError: The certificate and the key do not fit.
    """
    tls = _tls_context(config)
    try:
        return ScrapeServer(config.host, port, registry, tls, config.credentials())
    except OSError as error:
        logger.warning(
            "metrics are not served: %s:%d: %s. The work continues; choose another "
            "--monitor.port to see them",
            config.host,
            port,
            error,
        )
        return None


def _tls_context(config: ExporterConfig) -> ssl.SSLContext | None:
    """How connections are encrypted, and which clients may connect.

    Raises:
        ConfigError: The files do not fit together.
    """
    certificate, key, client_authority = config.certificate, config.key, config.client_authority
    if certificate is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
        if client_authority is not None:
            context.load_verify_locations(client_authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError(
            f"monitor.certificate {certificate}, monitor.key {key} and monitor.client_authority "
            f"{client_authority} do not fit: {error}"
        ) from error
    return context


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: scrapes are not logged."""


class ScrapeServer(ThreadingMixIn, WSGIServer):
    """Answers `/metrics` in threads of its own until `close`.

    Args:
        host: Address to bind.
        port: Port to bind; 0 takes a free one, see `server_port`.
        registry: What is rendered.
        tls: How to encrypt, or None.
        credentials: `user:password` that requests must bring, or None.

    Raises:
        OSError: The address cannot be bound.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        tls: ssl.SSLContext | None,
        credentials: str | None,
    ) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self._tls = tls
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}
        self._scraped = threading.Condition()
        self._last_begun = self._last_answered = -math.inf
        self.targets = b"[]\n"
        """What /targets answers, as JSON."""
        super().__init__((host, port), _SilentHandler)
        application = self._with_targets(make_wsgi_app(registry))
        self.set_app(
            application if credentials is None else _with_password(application, credentials)
        )
        # A client that leaves between poll and accept must not block the thread.
        self.socket.setblocking(False)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_POLL_S,), name="strata-scrapes", daemon=True
        )
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; the connection has a time limit from its first moment."""
        try:
            connection, address = super().get_request()
        except BlockingIOError:
            raise
        except OSError:
            # No descriptors are left; without a pause the loop would take a core.
            time.sleep(_PAUSE_S)
            raise
        connection.settimeout(CONNECTION_S)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, or close it where there are too many."""
        with self._lock:
            refused = len(self._open) >= MAX_CONNECTIONS
            if not refused:
                self._open[request] = time.monotonic() + CONNECTION_S
        if refused:
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # No thread can be started.
            self._forget(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The handshake and the answer; an error affects this client only."""
        connection, began = request, time.monotonic()
        self._last_begun = began
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(
                    request, server_side=True, do_handshake_on_connect=False
                )
                # The first object has given its descriptor away.
                with self._lock:
                    self._open[connection] = self._open.pop(request)
                connection.do_handshake()
            self.finish_request(connection, client_address)
            with self._scraped:
                self._last_answered = began
                self._scraped.notify_all()
        except (OSError, ValueError) as error:
            logger.debug("scrape from %s: %s", client_address, error)
        finally:
            self._forget(request)
            self._forget(connection)
            self.shutdown_request(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.pop(connection, None)

    def service_actions(self) -> None:
        """Called several times a second: end the connections whose time is over."""
        self._end(time.monotonic())

    def _end(self, until_s: float) -> None:
        with self._lock:
            late = [each for each, deadline in self._open.items() if deadline <= until_s]
            for connection in late:
                # Its thread wakes up with an error or an end, and closes it.
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error of rendering, which is a bug; the process continues."""
        logger.exception("a scrape from %s failed", client_address)

    def _with_targets(self, metrics: Application) -> Application:
        """Answer /targets with `targets` and all other paths with the metrics."""

        def chosen(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            if environ.get("PATH_INFO") != "/targets":
                return metrics(environ, start_response)
            start_response("200 OK", [("Content-Type", "application/json")])
            return [self.targets]

        return chosen

    def wait_for_scrape(self) -> None:
        """Wait until a request that begins after now was answered, if there were some lately."""
        now = time.monotonic()
        with self._scraped:
            if now - self._last_begun < _WATCHED_S:
                self._scraped.wait_for(lambda: self._last_answered >= now, LAST_SCRAPE_S)

    def close(self) -> None:
        """Stop listening and end every connection; waits for none of them."""
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._end(float("inf"))


def _with_password(application: Application, credentials: str) -> Application:
    """Refuse requests that do not bring `credentials`, `user:password`."""
    wanted = f"Basic {base64.b64encode(credentials.encode()).decode()}"

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        # Compared as bytes, since compare_digest refuses text that is not ASCII.
        given = environ.get("HTTP_AUTHORIZATION", "").encode()
        if hmac.compare_digest(given, wanted.encode()):
            return application(environ, start_response)
        start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="strata"')])
        return [b"user and password are required\n"]

    return guarded
