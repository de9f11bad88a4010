"""How much one API key may ask for: images per minute, and images at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tetriserve.core.errors import InvalidRequest, TetriServeError

_COME_BACK_S = 1.0
"""When to try again after too many at once: nobody knows which of the client's images ends first."""


class OverLimit(TetriServeError):
    """The key has used up what it may ask for now."""

    def __init__(self, message: str, code: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class TokenBucket:
    """Holds at most `per_minute` tokens, full at first, and gains that many per minute. Times are seconds."""

    def __init__(self, per_minute: int) -> None:
        self.capacity = per_minute
        self._per_second = per_minute / 60
        self._tokens = float(per_minute)
        self._filled_at: float | None = None

    def take(self, num_tokens: int, now: float) -> float:
        """Take `num_tokens` (at most `capacity`) and return 0, or none and return how long until they are there."""
        assert num_tokens <= self.capacity, "what never fits is refused by the caller"
        gained = 0.0 if self._filled_at is None else (now - self._filled_at) * self._per_second
        self._tokens, self._filled_at = min(self._tokens + gained, self.capacity), now
        if self._tokens < num_tokens:
            return (num_tokens - self._tokens) / self._per_second
        self._tokens -= num_tokens
        return 0.0


class Allowance:
    """What one key may use. None stands for no limit."""

    def __init__(self, rate_limit: int | None, max_concurrency: int | None) -> None:
        self._bucket = None if rate_limit is None else TokenBucket(rate_limit)
        self._max_concurrency = max_concurrency
        self._num_pending = 0

    @contextmanager
    def admitted(self, num_images: int, now: float) -> Iterator[None]:
        """Count `num_images` as pending while the context lasts; they use up the rate whatever becomes of them.

        Raises:
            OverLimit: not now; a retry may succeed.
            InvalidRequest: never, there are too many.
        """
        self._check_concurrency(num_images)
        self.use_rate(num_images, now)
        self._num_pending += num_images
        try:
            yield
        finally:
            self._num_pending -= num_images

    def _check_concurrency(self, num_images: int) -> None:
        limit = self._max_concurrency
        if limit is None:
            return
        if num_images > limit:
            raise InvalidRequest(f"n is {num_images}; your key may have {limit} images at once", "n")
        if self._num_pending + num_images > limit:
            raise OverLimit(
                f"{self._num_pending} of your images are unanswered, of at most {limit}; {num_images} more do not fit",
                "concurrency_limit_exceeded",
                _COME_BACK_S,
            )

    def use_rate(self, num_images: int, now: float) -> None:
        """Take `num_images` out of the rate.

        Raises: as `admitted`.
        """
        if self._bucket is None:
            return
        limit = self._bucket.capacity
        if num_images > limit:
            raise InvalidRequest(f"n is {num_images}; your key may ask for {limit} images per minute", "n")
        wait_s = self._bucket.take(num_images, now)
        if wait_s > 0:
            raise OverLimit(
                f"your key may ask for {limit} images per minute; the next {num_images} in {wait_s:.1f} s",
                "rate_limit_exceeded",
                wait_s,
            )
