"""The address at which a server listens."""

import errno
import socket

from lt_train.runtime.errors import UserError


def listening(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: the address is in use, is none of this machine's, or needs more rights.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host: {host}: no address ({error}). Fix: name this machine's, such as 127.0.0.1") from error
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a former server may still be closing
        taken.bind(address)
        taken.listen(128)
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: {port}: in use at {host}. Fix: name another, or stop what listens there") from error
        setting = "--port" if error.errno == errno.EACCES else "--host"
        raise UserError(f"{setting}: {host}:{port}: {error.strerror}. Fix: name another") from error
    return taken


def url_of(taken: socket.socket) -> str:
    host, port = taken.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
