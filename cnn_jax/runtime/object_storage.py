"""orbax on object storage.

Nothing can be renamed there, so a checkpoint on `gs://` is committed by a last object, `COMMITTED`.
It knows no `s3://`, though all that it stands on does: tensorstore has a driver, etils a backend.
So it is told that S3 is like Google's storage but for that driver.
"""

import functools
import os
from pathlib import Path
from typing import Any

from cnn_jax.errors import UserError
from cnn_jax.storage import is_remote

COMMITTED = "commit_success.txt"
"""The last object of a checkpoint on object storage: without it the others are nothing."""

_PREFIXES = ("gs://", "s3://")


def prepare_for(directory: Path) -> None:
    """Lets orbax read and write in the directory.

    Raises UserError where this version of orbax cannot be taught.
    """
    if is_remote(directory) and str(directory).startswith("s3://"):
        _teach_s3()


@functools.cache
def _teach_s3() -> None:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    store = functools.partial(_store, vars(gcs_utils).get("get_kvstore_for_gcs"))
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (gcs_utils, "_GCS_PATH_PREFIX", _PREFIXES),
        (gcs_utils, "get_kvstore_for_gcs", store),
        (tensorstore_utils, "_use_gcs_driver", lambda directory: directory.startswith(_PREFIXES)),
        (tensorstore_utils, "_normalize_path", _normalized),
    )
    for module, name, new in replaced:
        if name not in vars(module):
            raise UserError(
                f"s3:// needs {module.__name__}.{name}, which orbax-checkpoint 0.12.8 has and this "
                "version has not. Or mount the bucket, with mountpoint-s3"
            )
        setattr(module, name, new)


def _store(of_google: Any, url: str) -> dict[str, Any]:
    """Returns tensorstore's specification of a place."""
    if not url.startswith("s3://"):
        return of_google(url)
    bucket, _, path = url.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = region or (endpoint and "us-east-1")
    told: dict[str, Any] = {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # elsewhere it would complain of files that are missing
        told["aws_credentials"] = {"type": "environment"}
    return {
        "driver": "s3",
        "bucket": bucket,
        "path": path,
        **{name: value for name, value in told.items() if value},
    }


def _normalized(path: str) -> str:
    for prefix in _PREFIXES:
        if path.startswith(prefix):
            return prefix + os.path.normpath(path.removeprefix(prefix))
    return os.path.normpath(path)
