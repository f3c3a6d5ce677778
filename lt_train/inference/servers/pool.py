"""Which servers there are, and how long one that failed is left alone."""

import json
import random
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from lt_train.runtime.errors import UserError

LONGEST_REST = 60.0  # seconds


class ServerFailure(Exception):
    """A reply that is missing or unusable; another attempt may help.

    Attributes:
        blames_request: the server took the request and broke on it, so that after some attempts the request itself is suspect;
            refused connections and rate limits are no such reply.
    """

    def __init__(self, reason: str, *, blames_request: bool = True) -> None:
        super().__init__(reason)
        self.blames_request = blames_request


@dataclass(frozen=True)
class ServerSettings:
    """The addresses of the servers, and how long to wait for them.

    Attributes:
        urls: base addresses, with or without the /v1 at their end. They must serve the same model.
        model: the name under which it is served; None: the only one that the server lists.
        concurrency: requests in flight at each server.
        timeout: seconds for one answer, waiting in the server's queue and retries included.
        stall: seconds without a further token, once an answer has begun.
        attempts: how often one request is sent before it is given up.
        failures: consecutive failures of every server after which the evaluation stops.
        backoff: seconds that a server rests after its first failure; doubled with each further one, up to a minute.
        api_key: sent as bearer token; None: none of ours.
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
            raise UserError("eval.servers: empty: no server to query. Fix: add one, such as http://localhost:8000")
        for url in self.urls:
            if "@" in urlsplit(url).netloc:
                raise UserError("eval.servers: an address holds a password. Fix: leave it out, and set OPENAI_API_KEY to a key")
            if not url.startswith(("http://", "https://")):
                raise UserError(f"eval.servers: {url!r}: not the address of a server. Fix: write http://HOST:PORT")
        object.__setattr__(self, "urls", tuple(url.rstrip("/").removesuffix("/v1") for url in self.urls))
        if len(set(self.urls)) != len(self.urls):
            raise UserError(f"eval.servers: {', '.join(self.urls)}: a server is listed twice. Fix: list each once")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("OPENAI_API_KEY: it holds a character that HTTP headers cannot carry. Fix: set it to the key alone")

    @property
    def forms_of_key(self) -> set[str]:
        """The key in the forms in which servers echo it."""
        key = self.api_key
        return {key, json.dumps(key)[1:-1], key.replace("/", r"\/"), quote(key, safe="")} if key else set()


@dataclass
class Health:
    """The observed health of a server.

    Attributes:
        consecutive_failures: since the last reply that was usable; requests that were in flight together count once.
        ready: whether it may get requests; if not, it rests until `resting_until` and is then probed with one token.
    """

    consecutive_failures: int = 0
    ready: bool = False
    resting_until: float = 0.0
    last_failure: str = "not queried yet"
    _failed_at: float = float("-inf")

    def succeeded(self) -> None:
        self.consecutive_failures = 0

    def failed(self, failure: ServerFailure, sent_at: float, now: float, backoff: float) -> bool:
        """Let the server rest: exponential back-off with jitter, so that many clients do not come back together.

        Returns whether the failure is news; it is none where the request was in flight when the server failed last.
        """
        if sent_at < self._failed_at:
            return False
        self.consecutive_failures += 1
        self.ready, self.last_failure, self._failed_at = False, str(failure), now
        rest = min(LONGEST_REST, backoff * 2 ** min(self.consecutive_failures - 1, 30))
        self.resting_until = now + rest * random.uniform(0.5, 1.0)
        return True
