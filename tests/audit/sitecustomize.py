"""Python runs this file at the start of every process that has its directory on PYTHONPATH.

It writes what may run a stranger's code (each class that an unpickling looks up, each execution of
code from a file outside of Python, its packages and the repository) to the file JAXLM_AUDIT.
"""

import os
import sys
import sysconfig

HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PLACES = (HERE, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib", "scripts")))
TRUSTED = tuple(os.path.realpath(place) + os.sep for place in PLACES)


def write(line: str) -> None:
    """Add a line; processes may write at the same time."""
    file = os.open(os.environ["JAXLM_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def hook(event: str, arguments: tuple) -> None:
    """Called by Python; https://docs.python.org/3/library/audit_events.html."""
    if event == "pickle.find_class":
        write(f"unpickled {arguments[0]}.{arguments[1]}")
    elif event == "exec":
        name = arguments[0].co_filename
        by = sys._getframe().f_back
        text = not name or name.startswith("<") and not name.startswith("<frozen ")
        if by is not None and text:
            name = by.f_code.co_filename  # of a text, the file that runs it; none: python -c
        if not name.startswith("<") and not os.path.realpath(name).startswith(TRUSTED):
            write(f"ran {name}")


write(f"started {os.getppid()}")
sys.addaudithook(hook)
