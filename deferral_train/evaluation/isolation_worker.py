"""First code of an isolated process: gives up what it can, then runs a script. Needs nothing but Python.

Usage: python -I isolation_worker.py SETTINGS SCRIPT ARGUMENTS..., SETTINGS as isolation.start writes them. Where a
folder is given, the script finds the names of what the system allowed in its global ``ISOLATED``: of network,
processes and files.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
from contextlib import suppress
from typing import Any

# Of sched.h, mount.h and prctl.h.
NEW_USER, NEW_MOUNTS, NEW_IPC, NEW_PIDS, NEW_NETWORK = (
    0x10000000,
    0x00020000,
    0x08000000,
    0x20000000,
    0x40000000,
)
PRIVATE, RECURSIVE, BIND, NO_SETUID, NO_DEVICES = 1 << 18, 1 << 14, 1 << 12, 2, 4
PARENT_DEATH_SIGNAL, DUMPABLE, NO_NEW_PRIVILEGES = 1, 4, 38
MOUNT_SETATTR, HERE, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1
FOLDER_BYTES = 16 << 20


def main() -> None:
    settings = json.loads(sys.argv[1])
    isolated: list[str] = []
    if settings["folder"] is not None:
        isolated = _give_up(settings)
    _limit(settings)
    script = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_path(script, {"ISOLATED": isolated}, "__main__")


def _give_up(settings: dict[str, Any]) -> list[str]:
    """Leave root and the system's namespaces behind, and go on in a child: its parent is no process of the user's."""
    library, folder, nobody = _library(), settings["folder"], settings["nobody"]
    isolated: list[str] = []
    if nobody is not None:
        isolated = _namespaces(library, folder, nobody, of_user=False)
        if not isolated:
            _become(library, nobody)
    if not isolated:
        isolated = _namespaces(library, folder, os.geteuid(), of_user=True)
    _control(library, PARENT_DEATH_SIGNAL, signal.SIGKILL)
    _go_on_in_a_child(library, settings["cpu_seconds"])
    if nobody is not None and os.geteuid() == 0:
        _become(library, nobody)
        _control(library, PARENT_DEATH_SIGNAL, signal.SIGKILL)  # the change of user took it back
    _control(library, NO_NEW_PRIVILEGES, 1)
    return isolated


def _become(library: Any, user: int) -> None:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    _control(
        library, DUMPABLE, 1
    )  # else its own entries in /proc stay root's, and the maps cannot be written


def _library() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return None


def _control(library: Any, option: int, value: int) -> None:
    if hasattr(library, "prctl"):
        library.prctl(option, value, 0, 0, 0)


def _namespaces(library: Any, folder: str, user: int, *, of_user: bool) -> list[str]:
    """Enter namespaces where the system allows it; the names of what that takes out of reach.

    Args:
        folder: stays writable, for ``user``.
        of_user: through a namespace of users, as everybody may where it is on; else as root.
    """
    if not hasattr(library, "unshare"):
        return []
    wanted = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK | (NEW_USER if of_user else 0)
    group = os.getegid()
    if library.unshare(wanted) != 0:
        return []
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    try:
        for name, text in maps.items() if of_user else ():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        files = _close_files(library, folder, user)
    except OSError:
        files = False
    return ["network", "processes", *(["files"] if files else [])]


def _close_files(library: Any, folder: str, user: int) -> bool:
    """Make all but the folder read-only, and cover sockets, other processes, temporary files and the user's home.

    What Python needs of a covered place is put back.
    """
    os.umask(0o022)
    if library.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None) != 0:
        return False
    places = [place for place in ("/run", "/tmp", _home(user), _home(os.getuid())) if _may_cover(place)]
    for place in dict.fromkeys(places):
        if not _cover(library, str(place), [path for path in _needed() if path.startswith(f"{place}/")]):
            return False
    os.makedirs(folder, exist_ok=True)  # it may lie below a covered place
    own = f"size={FOLDER_BYTES},mode=0700,uid={user}".encode()
    if library.mount(b"tmpfs", folder.encode(), b"tmpfs", NO_SETUID | NO_DEVICES, own) != 0:
        return False
    closed = _cover(library, "/proc", []) and _read_only(library, "/", True, AT_RECURSIVE)
    if not closed or not _read_only(library, folder, False, 0):
        return False
    os.chdir(folder)  # into the new one: the working directory was that below it
    return True


def _cover(library: Any, place: str, kept: list[str]) -> bool:
    """Put an empty folder over a place, and what is ``kept`` below it back."""
    opened = {path: os.open(path, os.O_PATH) for path in kept}
    if library.mount(b"tmpfs", place.encode(), b"tmpfs", NO_SETUID | NO_DEVICES, b"size=1m,mode=0755") != 0:
        return False
    for path, descriptor in opened.items():
        os.makedirs(path)
        source = f"/proc/self/fd/{descriptor}".encode()
        if library.mount(source, path.encode(), None, BIND | RECURSIVE, None) != 0:
            return False
        os.close(descriptor)
    return True


def _needed() -> list[str]:
    """Folders that Python imports from, none below another."""
    paths = {sys.prefix, sys.base_prefix, os.path.dirname(sys.argv[2]), *sys.path}
    found: list[str] = []
    for path in sorted(filter(os.path.isdir, paths)):
        if not any(path.startswith(f"{above}/") for above in found):
            found.append(path)
    return found


def _home(user: int) -> str | None:
    import pwd

    try:
        return pwd.getpwuid(user).pw_dir
    except KeyError:
        return None


def _may_cover(place: str | None) -> bool:
    return (
        place is not None
        and place.count("/") >= 1
        and place != "/"
        and os.path.isdir(place)
        and not (os.path.islink(place) or place in _needed() or place.startswith(("/usr", "/bin", "/lib")))
    )


def _read_only(library: Any, place: str, on: bool, flags: int) -> bool:
    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "users")]

    change = Attributes(READ_ONLY if on else 0, 0 if on else READ_ONLY, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(change))
    done = library.syscall(MOUNT_SETATTR, HERE, place.encode(), flags, ctypes.byref(change), size)
    return int(done) == 0


def _go_on_in_a_child(library: Any, cpu_seconds: int | None) -> None:
    """Return in a child; this process waits for it and ends as it does. The child ends with this process.

    Out of computing time it is killed like any other; this process then ends as by the signal that says so.
    """
    child = os.fork()
    if child == 0:
        _control(library, PARENT_DEATH_SIGNAL, signal.SIGKILL)
        return
    for descriptor in (0, 1):
        os.close(descriptor)
    _, status, used = os.wait4(child, 0)
    # Its own count is coarser than the limit's.
    if (
        cpu_seconds is not None
        and used.ru_utime + used.ru_stime > 0.9 * cpu_seconds
        and os.WIFSIGNALED(status)
    ):
        os._exit(128 + signal.SIGXCPU)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def _limit(settings: dict[str, Any]) -> None:
    """Where the system can: an end to memory, files, computing, further processes and core dumps."""
    try:
        import resource
    except ImportError:  # Windows has none of them
        return
    limits = {"AS": settings["memory"], "FSIZE": settings["file_bytes"], "CORE": 0}
    if settings["cpu_seconds"] is not None:
        limits["CPU"] = settings["cpu_seconds"]
    if settings["alone"]:
        limits["NPROC"] = 0
    for name, most in limits.items():
        with suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


if __name__ == "__main__":
    main()
