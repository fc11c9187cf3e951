"""Downloads models from the Hugging Face hub, only on request, and only the files that this library reads.

The hub's own `snapshot_download` restarts a file from zero if the program was closed or the connection was lost for
more than a few seconds, and FLUX.1-Fill is one file of 24 GB. Here an incomplete download is kept beside its target as
`NAME.HASH.part`, and the next download resumes it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from .checkpoints import weight_files

#: Called with (bytes present, bytes in all), at the start and whenever more have arrived; may raise to stop.
OnProgress = Callable[[int, int], None]

_READABLE = (".json", ".safetensors")
#: Downloaded only if named in full: a pickle, from which the loaders read only tensors (`torch.load` with
#: weights_only=True).
_PICKLED = ".pt"
_TIMEOUT = 30.0  # seconds, for the hub's answer to the first request


@dataclass(frozen=True, kw_only=True)
class KnownPart:
    """The files needed from one repository.

    Attributes:
        repository: its name on the hub.
        files: names or patterns of names, as `download` takes them.
        needed: where `files` are patterns, the names without which the part is incomplete, besides its weights. Without
            a connection, only these and the weights' index tell whether it is.
        below: the sub-folder of the model's folder that they go into; "" for the folder itself.
    """

    repository: str
    files: tuple[str, ...]
    needed: tuple[str, ...] = ()
    below: str = ""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A published model that this library works with.

    Attributes:
        parts: the files needed from the hub.
        folder: its place below ComfyUI's `models`.
        gigabytes: size of the download, in 10^9 bytes.
        licence: the weights' licence by name, or where to find it.
        gated: whether its page asks to accept the licence first.
    """

    parts: tuple[KnownPart, ...]
    folder: str
    gigabytes: float
    licence: str
    gated: bool

    @property
    def file(self) -> str | None:
        """Its only file; None if it is a folder of several."""
        files = [name for part in self.parts for name in part.files]
        return files[0] if len(files) == 1 else None


def _janus_pro(size: str, gigabytes: float) -> KnownModel:
    part = KnownPart(
        repository=f"deepseek-community/Janus-Pro-{size}",
        files=("*.json", "*.safetensors"),
        needed=("config.json", "tokenizer.json", "tokenizer_config.json"),
    )
    return KnownModel(
        parts=(part,),
        folder=f"janus/Janus-Pro-{size}",
        gigabytes=gigabytes,
        licence="MIT (code), DeepSeek Model License (weights)",
        gated=False,
    )


def _flux_fill(file: str, folder: str, gigabytes: float) -> KnownModel:
    return KnownModel(
        parts=(KnownPart(repository="black-forest-labs/FLUX.1-Fill-dev", files=(file,)),),
        folder=folder,
        gigabytes=gigabytes,
        licence="FLUX.1 [dev] Non-Commercial License",
        gated=True,
    )


#: The first of two files holds the encoder; the second (2 GB) holds only a part of the decoder, and is left out.
_FLAN_T5_XL = KnownPart(
    repository="google/flan-t5-xl",
    files=(
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ),
    below="flan-t5-xl",
)


def _llamagen(stage: int, pixels: int) -> KnownModel:
    """The transformer's 777,923,840 weights and the tokenizer's 72 M in float32, plus 9.45 GB of flan-t5-xl."""
    repository = "peizesun/llamagen_t2i"
    files = (f"t2i_XL_stage{stage}_{pixels}.pt", "vq_ds16_t2i.pt")
    return KnownModel(
        parts=(KnownPart(repository=repository, files=files), _FLAN_T5_XL),
        folder=f"janus/LlamaGen-XL-{pixels}",
        gigabytes=12.8,
        licence=(
            "MIT (code, FoundationVision/LlamaGen), Apache-2.0 (flan-t5-xl); that of LlamaGen's weights is not known "
            f"to us: see the page of {repository}"
        ),
        gated=False,
    )


KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "Janus-Pro-1B": _janus_pro("1B", 4.2),
        "Janus-Pro-7B": _janus_pro("7B", 14.8),
        "LlamaGen-XL, 256 px": _llamagen(1, 256),
        "LlamaGen-XL, 512 px": _llamagen(2, 512),
        "FLUX.1-Fill-dev": _flux_fill("flux1-fill-dev.safetensors", "diffusion_models", 23.8),
        "FLUX.1-Fill-dev's autoencoder": _flux_fill("ae.safetensors", "vae", 0.34),
    }
)


def download_model(
    model: KnownModel,
    folder: str | Path,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """`download` of all parts of a model; all of them are checked before anything is downloaded.

    Without a connection, it succeeds if all parts are complete (`KnownPart.needed`).

    Args:
        folder: the model's own folder.
        token, endpoint, on_progress: as `download`; progress counts all parts together.

    Returns:
        `folder`.

    Raises:
        ValueError: as `download`.
    """
    folder = Path(folder)
    wanted = [(part.repository, folder / part.below, part.files, part.needed) for part in model.parts]
    _bring(wanted, token, endpoint, on_progress)
    return folder


def download(
    repository: str,
    folder: str | Path,
    *,
    files: Sequence[str],
    token: str | None = None,
    endpoint: str | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Downloads files of a hub repository into a folder; each gets its name only when it is complete.

    A file that is present with the right size is left alone, and one of another size is never overwritten. Call it
    again after an interruption to resume. Files for which the hub has a SHA-256, as for all weights, are verified.
    Without a connection, it succeeds if all files are present and `files` names each in full.

    Args:
        repository: such as "black-forest-labs/FLUX.1-Fill-dev".
        folder: created if it does not exist; the repository's own folders are kept below it.
        files: names or patterns of names (`*.json`); only `.safetensors` and `.json` files are downloaded, and `.pt`
            files that are named in full, not by a pattern.
        token: the user's access token; None takes HF_TOKEN or what `hf auth login` stored.
        endpoint: the hub's address; None takes HF_ENDPOINT or huggingface.co.
        on_progress: may raise to stop the download; its exception is passed on, unless it is an OSError.

    Returns:
        `folder`.

    Raises:
        ValueError: if the repository does not exist, requires its licence to be accepted or another token, or has no
            such file; if the hub cannot be reached, the connection breaks, or the disk is full; if a file of the same
            name but another size is present. The message says what to do.
    """
    folder = Path(folder)
    _bring([(repository, folder, files, ())], token, endpoint, on_progress)
    return folder


def _bring(
    wanted: Sequence[tuple[str, Path, Sequence[str], Sequence[str]]],
    token: str | None,
    endpoint: str | None,
    on_progress: OnProgress | None,
) -> None:
    """Downloads each (repository, folder, names or patterns, needed names), if all of them are possible."""
    api = HfApi(endpoint=endpoint, token=token)
    found = []
    for repository, folder, files, needed in wanted:
        absent = _absent(folder, files, needed)
        with _explained(repository, folder, api.endpoint, absent):
            found.append(_ask(api, repository, folder, files, absent))
    missing = sum(one.size - one.came for one in found)
    for one in found:
        with _explained(one.repository, one.folder, api.endpoint):
            one.folder.mkdir(parents=True, exist_ok=True)
            if missing > (free := shutil.disk_usage(one.folder).free):
                raise ValueError(
                    f"{one.repository} needs {missing / 1e9:.1f} GB more in {one.folder}, where {free / 1e9:.1f} GB "
                    "are free: make room, or choose a folder on another disk"
                )
    # "identity", or else sizes and ranges mean nothing; a range, or else older versions of huggingface_hub leave the
    # download to hf_transfer where HF_HUB_ENABLE_HF_TRANSFER is set, and that writes past the file object.
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity", "Range": "bytes=0-"}
    total = sum(one.size for one in found)
    for one in found:
        with _explained(one.repository, one.folder, api.endpoint):
            for part in one.parts or (None,):
                others = sum(other.came for other in found) - (part.came if part else 0)

                def report(came: int, others: int = others) -> None:
                    if on_progress is not None:
                        on_progress(others + came, total)

                report(part.came if part else 0)
                if part and not part.is_whole:
                    url = hf_hub_url(one.repository, part.name, revision=one.commit, endpoint=endpoint)
                    part.fetch(url, headers, report)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Files of one repository.

    Attributes:
        folder: the folder they go into.
        commit: the same for all of them, even if the repository changes during the download.
        parts: the files; empty if the hub could not be reached and all of them are present.
        there: bytes present in that case.
    """

    repository: str
    folder: Path
    commit: str = ""
    parts: tuple[_Part, ...] = ()
    there: int = 0

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.there + sum(part.size for part in self.parts)

    @property
    def came(self) -> int:
        """Bytes present."""
        return self.there + sum(part.came for part in self.parts)


def _absent(folder: Path, files: Sequence[str], needed: Sequence[str]) -> list[str]:
    """What a folder lacks of these files, as far as it shows without the hub."""
    patterns = [name for name in files if any(mark in name for mark in "*?[")]
    names = [name for name in files if name not in patterns]
    absent = [name for name in (*names, *needed) if not (folder / name).is_file()]
    if not needed:
        return absent + [f"whatever else matches {pattern}" for pattern in patterns]
    try:
        weights = weight_files(folder, endings=(".safetensors",))
    except (ValueError, OSError):
        return [*absent, "its weights (.safetensors)"]
    absent += [file.name for file in weights.files if not file.is_file()]
    if weights.index is None and re.search(r"-\d+-of-\d+$", weights.files[0].stem):
        absent.append("the index of its weights (.safetensors.index.json)")
    return absent


def _ask(api: HfApi, repository: str, folder: Path, files: Sequence[str], absent: Sequence[str]) -> _Wanted:
    """Asks the hub about these files; if it cannot be reached and nothing is absent, those in the folder are taken."""
    try:
        info = api.model_info(repository, files_metadata=True, timeout=_TIMEOUT)
    except (OSError, HTTPError) as error:
        if isinstance(error, HfHubHTTPError) or absent:
            raise
        there = {path for name in files for path in folder.glob(name) if path.is_file()}
        return _Wanted(repository=repository, folder=folder, there=sum(path.stat().st_size for path in there))
    held = {file.rfilename: file for file in info.siblings or ()}
    parts = tuple(_Part(held[name], folder) for name in _choose(repository, list(held), files))
    if different := [part.found for part in parts if part.found]:
        raise ValueError(
            f"{folder} holds files of the same name but another size: {', '.join(different)}. They may be "
            "yours, or cut or changed ones: move, rename or delete them, and start again"
        )
    return _Wanted(repository=repository, folder=folder, commit=info.sha, parts=parts)


def _choose(repository: str, held: list[str], patterns: Sequence[str]) -> list[str]:
    """The names of readable files that match the patterns; raises ValueError for a pattern without any."""
    readable = [
        name
        for name in held
        if PurePosixPath(name).suffix in _READABLE or (name.endswith(_PICKLED) and name in patterns)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in readable):
            shown = ", ".join(sorted(held)[:8]) or "nothing"
            raise ValueError(
                f"{repository} has no {pattern} that can be read here ({' and '.join(_READABLE)} files can, and "
                f"{_PICKLED} files that are named in full); it holds {shown}{', ...' if len(held) > 8 else ''}"
            )
    return [name for name in readable if any(fnmatchcase(name, pattern) for pattern in patterns)]


class _Part:
    """One file's download: how much of it is present, and where."""

    def __init__(self, file, folder: Path):
        """
        Args:
            file: huggingface_hub's RepoSibling with its size.
        """
        self.name, self.size = file.rfilename, file.size
        self.sha256 = file.lfs.sha256 if file.lfs is not None else None
        self._target = folder / self.name
        # Checks the paths without resolving links: a user may have linked a model to another disk.
        if not Path(os.path.abspath(self._target)).is_relative_to(os.path.abspath(folder)):
            raise ValueError(f"the hub names a file outside of its repository, {self.name}: it cannot be trusted")
        # Named by hash, so that nothing is taken over from another version of the file.
        self._path = self._target.with_name(f"{self._target.name}.{(self.sha256 or file.blob_id)[:12]}.part")
        self.is_whole = self._target.is_file() and self._target.stat().st_size == self.size

    @property
    def found(self) -> str | None:
        """Describes a different file that is present under its name; None if there is none."""
        if self.is_whole or not self._target.exists():
            return None
        return f"{self.name} ({self._target.stat().st_size:,} bytes, the hub's {self.size:,})"

    @property
    def came(self) -> int:
        """Bytes present."""
        return self.size if self.is_whole else self._path.stat().st_size if self._path.is_file() else 0

    def fetch(self, url: str, headers: dict[str, str], report: Callable[[int], None]) -> None:
        """Downloads the missing bytes, verifies the file, and gives it its name."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self.came > self.size:
            self._path.unlink()
        try:
            while not self._go_on(url, headers, report):
                pass
        except BaseException:
            if self.came == 0:
                self._path.unlink(missing_ok=True)
            raise
        if self.sha256 is not None and _sha256(self._path, lambda: report(self.size)) != self.sha256:
            self._path.unlink()
            raise ValueError(f"{self.name} came damaged and was deleted: download it again")
        os.replace(self._path, self._target)
        self.is_whole = True

    def _go_on(self, url: str, headers: dict[str, str], report: Callable[[int], None]) -> bool:
        """Downloads the missing bytes; False if the connection broke midway, as not every huggingface_hub retries."""
        before = self.came
        try:
            with _ReportingFile(self._path, report) as file:
                http_get(url, file, resume_size=before, headers=headers, expected_size=self.size)
        except HfHubHTTPError:
            raise
        except (OSError, HTTPError) as error:
            if getattr(error, "errno", None) is not None or self.came <= before:
                raise
            return False
        return True


class _ReportingFile(io.BufferedWriter):
    """Appends to a file and reports its length after each write."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(io.FileIO(path, "ab"))
        self._report = report

    def write(self, chunk: bytes) -> int:
        written = super().write(chunk)
        self._report(self.tell())
        return written


def _sha256(path: Path, check: Callable[[], None]) -> str:
    """A file's hash; `check` is called every few megabytes, and what it raises ends the call."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            check()
            found.update(chunk)
    return found.hexdigest()


@contextmanager
def _explained(repository: str, folder: Path, endpoint: str, absent: Sequence[str] = ()) -> Iterator[None]:
    """Turns errors of huggingface_hub and the disk into ValueErrors that say what to do.

    Args:
        absent: what the folder lacks, which an error says if the hub cannot be reached.
    """
    lacks = f". Missing in {folder}: {', '.join(absent)}" if absent else ""
    tokens = f"create a token with read access at {endpoint}/settings/tokens"
    login = "set the environment variable HF_TOKEN to it, or run `hf auth login`"
    again = "what has come is kept, start the download again to go on"
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{endpoint} did not answer as a hub does: check HF_ENDPOINT, and whether your network asks to log in"
        ) from error
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is given only to those who accept its licence: open {endpoint}/{repository}, log in and "
            f"accept it; then {tokens}, {login}, and start again"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"{repository} cannot be downloaded while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it and "
            f"start again, or bring the files yourself{lacks}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{endpoint} has no {repository}, or hides it: check its name, and if it is private, {tokens} and {login}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError(
                f"{endpoint} does not give {repository} without a valid token: check the name, {tokens} and {login}"
            ) from error
        if status == 403:
            raise ValueError(
                f"this token may not read {repository}: give it access to gated repositories at "
                f"{endpoint}/settings/tokens, or {tokens} and {login}"
            ) from error
        raise ValueError(f"{endpoint} answered {status} for {repository}: try later; {again}") from error
    except (OSError, HTTPError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"the disk of {folder} is full: make room; {again}") from error
        if number == errno.EFBIG:
            raise ValueError(
                f"the disk of {folder} takes no file as large as this one: choose a folder on another disk (FAT32 ends "
                "at 4 GB)"
            ) from error
        # A failed write names no file, nor does a failed connection.
        if getattr(error, "filename", None) is not None or number in (
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.EIO,
        ):
            raise ValueError(f"{folder} cannot be written to ({error}): choose another folder") from error
        raise ValueError(f"the connection to {endpoint} broke or was not made ({error}): {again}{lacks}") from error
