"""`trivet` as processes of its own that need not import first: each is forked from one that has.

Importing torch, transformers and PEFT takes longer than most of what a process is asked for here. Exit codes, signals,
limits and what is said are a process's own all the same; some tests start `python -m trivet` as a person does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

#: What the process to fork from has imported: the commands' and the tiny models' code.
IMPORTED = (
    "trivet.run",
    "trivet.cli.app",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
)


def _be(words: list[str], cwd: Path, streams: list[str], file_size: int | None) -> None:
    """Become `trivet WORDS` in `cwd`; the streams are files for 0, 1 and 2."""
    from trivet.cli.app import main

    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the server's was closed
    os.chdir(cwd)
    sys.argv = ["trivet", *words]
    if file_size is not None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    main()


def trivet(
    cwd: Path, words: list[str], *, said: str = "", file_size: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `trivet WORDS` in `cwd` to its end, with `said` on its standard input.

    With `file_size` files that it writes end at so many bytes, as on a full disk (Linux: EFBIG).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as the command sets it before it imports
    forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("in", "out", "err")]
        for stream in streams:
            stream.write_text(said if stream.name == "in" else "", encoding="utf-8")
        process = context.Process(target=_be, args=(words, cwd, [str(stream) for stream in streams], file_size))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, 300)
        out, err = (stream.read_text(encoding="utf-8") for stream in streams[1:])
    return subprocess.CompletedProcess(["trivet", *words], process.exitcode, out, err)
