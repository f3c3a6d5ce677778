"""Which servers answer, and how long one that failed is left alone."""

import random
from dataclasses import dataclass, field, replace

from lt_train.runtime.errors import UserError

LONGEST_REST = 60.0


class ServerFailure(Exception):
    """A server did not answer as it should; asking again may help.

    Attributes:
        retry_after: seconds that the server asked for. blames_request: the server took the request and broke on it, so that after
            some attempts the request itself is suspect; refused connections and rate limits say nothing about it.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, blames_request: bool = True) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.blames_request = blames_request


@dataclass(frozen=True)
class ServerSettings:
    """Where the servers are and how patient we are with them.

    Attributes:
        urls: base addresses, with or without the /v1 at their end. They must serve the same model.
        model: the name under which it is served; None: the only one that the server lists.
        concurrency: requests in flight at each server.
        timeout: seconds for one answer, waiting in the server's queue included.
        stall: seconds without a further token, once an answer has begun.
        attempts: how often one request is asked before it is given up.
        failures: how often in a row all servers may fail before we stop.
        backoff: seconds that a server rests after its first failure; doubled with each further one, up to a minute.
        api_key: sent as bearer token; None: none is sent.
    """

    urls: tuple[str, ...]
    model: str | None = None
    concurrency: int = 64
    timeout: float = 7200.0
    stall: float = 600.0
    attempts: int = 5
    failures: int = 12
    backoff: float = 1.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError("servers: no address; give at least one, such as http://localhost:8000")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"servers: {url!r} is no address of a server; write http://HOST:PORT")
        object.__setattr__(self, "urls", tuple(base_url(url) for url in self.urls))
        if len(set(self.urls)) != len(self.urls):
            raise UserError(f"servers: {', '.join(self.urls)} names one server twice; it would be asked twice as much as you say")

    def only(self, url: str) -> "ServerSettings":
        """The same for one of the servers."""
        return replace(self, urls=(url,))


def base_url(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


@dataclass
class Server:
    """What we know of a server's health.

    Attributes:
        strikes: failures since it last gave a sign of life; those of requests that were under way together count once.
        ready: whether it may be given requests; if not, it rests until `resting_until` and is then tried with one token.
    """

    url: str
    strikes: int = 0
    ready: bool = False
    resting_until: float = 0.0
    last_failure: str = "it was not asked yet"
    _struck_at: float = float("-inf")

    def gave_sign_of_life(self, asked_at: float) -> None:
        if asked_at >= self._struck_at:
            self.strikes = 0

    def strike(self, failure: ServerFailure, asked_at: float, now: float, backoff: float) -> None:
        """Let the server rest: exponential back-off with jitter (so that many clients do not come back together), or longer where
        it asked for that."""
        self.last_failure = str(failure)
        if asked_at >= self._struck_at:
            self.strikes += 1
            self._struck_at = now
        self.ready = False
        rest = min(LONGEST_REST, backoff * 2 ** min(self.strikes - 1, 30)) * random.uniform(0.5, 1.0)
        self.resting_until = max(self.resting_until, now + max(rest, failure.retry_after or 0.0))
