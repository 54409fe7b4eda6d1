"""`python -m trl_sync.shim script.py ...`: runs a script written for TRL's PPO as it is."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import NoReturn

import trl_sync.shim  # noqa: F401  before the script imports TRL

HELP = """\
usage: python -m trl_sync.shim [-h] script.py [arguments of the script ...]

Runs a script written for TRL's PPO with the PPO of trl_sync where the installed TRL has none.
The script itself is not changed. On several processes:

    accelerate launch -m trl_sync.shim script.py ...
"""


def main(arguments: list[str]) -> None:
    """Runs the script as `__main__`, with the arguments that follow it.

    What the script raises goes on to the interpreter, so tracebacks and exit codes are its own.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    if not arguments or arguments[0].startswith("-"):
        _refuse(f"expected a script, got {arguments[0] if arguments else 'nothing'}; -h for help")
    script = arguments[0]
    try:
        with open(script, "rb") as file:
            source = file.read()
    except OSError as error:
        _refuse(f"cannot read {script!r}: {error.strerror}")
    sys.argv = arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    module = ModuleType("__main__")
    module.__file__ = script
    sys.modules["__main__"] = module  # where pickle and inspect look for what the script defines
    exec(compile(source, script, "exec", dont_inherit=True), module.__dict__)


def _refuse(problem: str) -> NoReturn:
    print(f"python -m trl_sync.shim: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
