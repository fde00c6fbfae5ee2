"""The files of a form, out of a body that is there as a whole (RFC 7578)."""

from email.message import Message

from aiohttp import content_disposition_filename, parse_content_disposition

MAX_HEADER = 8192


class TooManyFilesError(ValueError):
    """There are more files than are allowed."""


def files_of(content_type: str, body: bytes, *, max_files: int) -> list[tuple[str, bytes]]:
    """Returns the name and the content of each file in a body of multipart/form-data.

    It takes time linear in the body, whatever is in it.

    Raises TooManyFilesError, and ValueError with what is wrong where it is no such body, is cut
    short, or has a part that is no file.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary("")
    if not 0 < len(boundary) <= 70 or not boundary.isascii():
        raise ValueError("its Content-Type must have a boundary of 1 to 70 characters")
    delimiter = b"\r\n--" + boundary.encode()
    whole = b"\r\n" + body
    count = whole.count(delimiter) - 1
    if count > max_files:
        raise TooManyFilesError(f"{count:,} files: at most {max_files:,} in one request")
    pieces = whole.split(delimiter)
    if len(pieces) < 2 or pieces[0] or not pieces[-1].startswith(b"--"):
        raise ValueError("it must begin and end with its boundary")
    if len(pieces) == 2:
        raise ValueError("it has no file")
    return [_file(part) for part in pieces[1:-1]]


def _file(part: bytes) -> tuple[str, bytes]:
    header, _, content = part.partition(b"\r\n\r\n")
    if len(header) > MAX_HEADER:
        raise ValueError(f"the header of a part must have at most {MAX_HEADER:,} bytes")
    for line in header.decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            filename = content_disposition_filename(parse_content_disposition(value.strip())[1])
            if filename is not None:
                return filename, content
    raise ValueError("each part must be a file, with a filename")
