"""Processes of `test_ledger.py`: append a number of entries, or be killed in the middle of one.

python appending.py FOLDER NAME COUNT [BYTES]: with BYTES the last append is killed after that many bytes of its line,
with -1 after the whole line and before head.json.
"""

import os
import signal
import sys

from hf_unlearn.deletion import ledger as ledgers
from hf_unlearn.deletion.ledger import Ledger

KEY = b"a key for tests, of 32 bytes and more"


def kill_after(count: int) -> None:
    """Die by SIGKILL after `count` bytes of the next line."""
    plain = os.write

    def write(descriptor: int, data: bytes) -> int:
        plain(descriptor, data[:count])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    ledgers.os.write = write


def kill_before_head() -> None:
    def write_json(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    ledgers.write_json = write_json


def main(folder: str, name: str, count: str, bytes_written: str = "") -> None:
    ledger = Ledger(folder, KEY)
    for index in range(int(count)):
        if bytes_written and index == int(count) - 1:
            kill_before_head() if bytes_written == "-1" else kill_after(int(bytes_written))
        ledger.append("push", {"by": name, "number": index})
        print(index, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
