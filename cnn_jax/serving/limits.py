"""What a server takes on, and no more."""

import dataclasses

MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
      max_batch: images that are computed together.
      max_delay: seconds that an image waits for others.
      max_waiting: images that may be under way at the same time.
      max_body: bytes of a request.
      max_pixels: of an image, checked before it is decoded.
      max_connections: that may be open at the same time.
      timeout: seconds that a client may take to send a request, or be silent between two.
    """

    max_batch: int = 32
    max_delay: float = 0.005
    max_waiting: int = 256
    max_body: int = 10 * MEBIBYTE
    max_pixels: int = 50_000_000
    max_connections: int = 512
    timeout: float = 30.0
