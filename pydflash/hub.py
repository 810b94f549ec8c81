"""Models by name, from the Hugging Face hub or a mirror of it, in huggingface_hub's ordinary cache.

A name is one of KNOWN, a repository with what of it is meant, "owner/repo@revision:file" (the last two optional), or a
path on this machine. Of a target one GGUF file is fetched; of a drafter one too, or config.json and the weights as
z-lab lays them out. Refused before anything is fetched: a choice among several files, files in shards (the core reads
one), and what the disk has no room for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydflash._download import (
    Download,
    Meter,
    RemoteFile,
    Stopped,
    disk_sentence,
    fetch,
    http_error,
    hub_tools,
    n_missing,
)
from pydflash.errors import HubError, nearest

__all__ = ["KNOWN", "Download", "Pair", "Source", "pull"]

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
COMMIT = re.compile("[0-9a-f]{40}")
MARGIN = 64 << 20  # bytes that stay free


@dataclass(frozen=True)
class Pair:
    """What `pull` brings: the target's GGUF, and the drafter's GGUF or folder."""

    target: Path
    draft: Path | None


@dataclass(frozen=True)
class Source:
    """Files on the hub. file: None is whatever the repository has, if that is one thing."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision in (None, "main") else f"@{self.revision}"
        return f"{self.repo}{revision}{f':{self.file}' if self.file else ''}"


# Repositories, commits and files as projects that run these models pin them. They have been read about, not fetched:
# the hub cannot be reached where this was written. pull(name, revision="main") takes what is newest instead.
KNOWN: dict[str, tuple[Source, Source]] = {
    "qwen3.5-4b": (
        Source("unsloth/Qwen3.5-4B-GGUF", "e87f176479d0855a907a41277aca2f8ee7a09523", "Qwen3.5-4B-Q4_K_M.gguf"),
        Source("z-lab/Qwen3.5-4B-DFlash", "9a1996ccf887b79ab3af4fcbf8c1d1f4b5658bcf"),
    ),
    "qwen3.5-9b": (
        Source("unsloth/Qwen3.5-9B-GGUF", "99a1b2185534379e6e8b5ec869da25d3e7b3f73c", "Qwen3.5-9B-Q4_K_M.gguf"),
        Source("z-lab/Qwen3.5-9B-DFlash", "492f4b532a957a50561e1418e5a3f31690f127f4"),
    ),
    "qwen3.5-27b": (
        Source("unsloth/Qwen3.5-27B-GGUF", "207d467c0085ba5f42a8552fff6d821ff2856996", "Qwen3.5-27B-Q4_K_M.gguf"),
        Source("z-lab/Qwen3.5-27B-DFlash", "25ee0025ff950496a634e100b75c2db4515e9824"),
    ),
    "qwen3.6-27b": (
        Source("unsloth/Qwen3.6-27B-GGUF", "82d411acf4a06cfb8d9b073a5211bf410bfc29bf", "Qwen3.6-27B-Q4_K_M.gguf"),
        Source("z-lab/Qwen3.6-27B-DFlash", "0919688658996800f86b895034249700e9481106"),  # gated
    ),
}


def pull(
    name: str | os.PathLike[str],
    *,
    draft: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Callable[[Download], object] | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
) -> Pair:
    """The files of a target and its drafter, fetched where the cache lacks them.

    name: a known pair ("qwen3.5-27b", or with another file of its repository, "qwen3.5-27b:Q6_K"), a target's
        repository ("owner/repo@revision:file.gguf", where ":Q4_K_M" finds the file that ends so) or a path.
    draft: the drafter, likewise; a known pair has one, everything else none unless it is given here.
    revision: branch, tag or commit, where a name says none; a known pair's is a commit, others' is "main".
    local_files_only: nothing is asked of the hub, what the cache lacks is missing.
    progress: called with a `Download`, at most ten times a second; what it raises ends the download, which the next
        call goes on with.
    token: a hub token, False for none; default: the one that 'hf auth login' keeps.
    endpoint: a mirror's address; default: HF_ENDPOINT, or the hub's.

    Raises HubError; its `reason` says why in a word. Nothing else is to be expected but what `progress` raises.
    """
    target_source, draft_source = _named(os.fspath(name), revision)
    if draft is not None:
        draft_source = _one(os.fspath(draft), revision)
    hub = _Hub(endpoint, token, local_files_only)
    wanted = [
        hub.find(source, of_drafter) if isinstance(source, Source) else source
        for source, of_drafter in ((target_source, False), (draft_source, True))
    ]
    try:
        hub.download([found for found in wanted if isinstance(found, _Found)], progress)
    except Stopped as stopped:
        raise stopped.error from None
    target, drafter = (found.path() if isinstance(found, _Found) else found for found in wanted)
    assert target is not None
    return Pair(target, drafter)


# ---- names -------------------------------------------------------------------------------------------------------


def _named(name: str, revision: str | None) -> tuple[Source | Path, Source | Path | None]:
    """What a pair's name stands for."""
    short, _, file = name.partition(":")
    if short.lower() in KNOWN:
        target, draft = KNOWN[short.lower()]
        if file:
            target = replace(target, file=file)
        if revision is not None:
            target, draft = replace(target, revision=revision), replace(draft, revision=revision)
        return target, draft
    if "/" not in name and not os.path.exists(name):
        advice = nearest(short.lower(), KNOWN) or (
            f": known are {', '.join(KNOWN)}; any other is named by its repository, owner/repo, or by its path"
        )
        raise HubError(f"no pair is called {name!r}, and there is no such file{advice}", reason="name")
    return _one(name, revision), None


def _one(name: str, revision: str | None) -> Source | Path:
    """A repository, or a path that exists."""
    path = Path(name).expanduser()
    if os.path.exists(path):
        return path
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^:\s]+))?(?::([^\s]+))?", name)
    if name.startswith(("/", "./", "../", "~")):
        raise HubError(f"{name} does not exist", reason="missing", path=name)
    if not found:
        raise HubError(
            f"{name!r} is neither owner/repo, owner/repo@revision:file, nor a path that exists", reason="name"
        )
    return Source(found[1], found[2] or revision, found[3])


# ---- what a repository has -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What is to be had of a source. snapshot: its folder in the cache, whose parent's siblings are the blobs.

    files: what is to be fetched, empty where all of it is there. chosen: the GGUF file, None for a drafter's folder.
    """

    source: Source
    commit: str
    snapshot: Path
    files: tuple[RemoteFile, ...]
    chosen: str | None

    def path(self) -> Path:
        return self.snapshot / self.chosen if self.chosen else self.snapshot


class _Hub:
    def __init__(self, endpoint: str | None, token: str | bool | None, local_files_only: bool) -> None:
        from huggingface_hub import constants

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.token = token
        self.offline = local_files_only or constants.HF_HUB_OFFLINE
        self.cache = Path(constants.HF_HUB_CACHE).expanduser()

    def find(self, source: Source, of_drafter: bool) -> _Found:
        """Chooses the files; asks the hub unless the cache answers."""
        revision = source.revision or "main"
        folder = self.cache / f"models--{source.repo.replace('/', '--')}"
        if self.offline or COMMIT.fullmatch(revision):  # what a commit holds never changes
            cached = _cached(source, folder, revision, of_drafter)
            if cached:
                return cached
        if self.offline:
            raise HubError(
                f"{source} is not in the cache ({self.cache}), and nothing may be fetched: pull it while the hub can "
                "be reached",
                reason="offline",
            )
        try:
            commit, remote = self._listing(source, revision)
        except HubError as error:
            cached = _cached(source, folder, revision, of_drafter) if error.reason == "network" else None
            if cached:
                return cached
            raise
        chosen, names = _choose(source, {name: file.size for name, file in remote.items()}, of_drafter)
        return _Found(source, commit, folder / "snapshots" / commit, tuple(remote[name] for name in names), chosen)

    def _listing(self, source: Source, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """The commit that a revision is, and the files in it by their names."""
        from huggingface_hub import HfApi

        with _explained(source, self.endpoint):
            api = HfApi(endpoint=self.endpoint, token=self.token, library_name="pydflash")
            try:
                info = api.model_info(source.repo, revision=revision, files_metadata=True, timeout=30)
                return str(info.sha), {file.name: file for file in _remote_files(info)}
            except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
                raise HubError(
                    f"{self.endpoint} does not answer as a hub does: check the address and the network",
                    reason="network",
                ) from None

    def download(self, wanted: list[_Found], progress: Callable[[Download], object] | None) -> None:
        """Fetches all of it, after a look at how much room there is."""
        from huggingface_hub import hf_hub_download, hf_hub_url

        missing = sum(n_missing(_blobs(found), file) for found in wanted for file in found.files)
        if missing:
            self._check_space(missing)
        meter = Meter(progress, sum(file.size for found in wanted for file in found.files))
        for found in wanted:
            repo = found.source.repo
            for file in found.files:
                with _explained(replace(found.source, file=file.name), self.endpoint):
                    headers = hub_tools().build_hf_headers(token=self.token, library_name="pydflash")
                    url = hf_hub_url(repo, file.name, revision=found.commit, endpoint=self.endpoint)
                    fetch(url, headers, _blobs(found), file, meter)
                    # It finds the blob, and lays out the rest of the cache.
                    hf_hub_download(
                        repo,
                        file.name,
                        revision=found.source.revision,
                        token=self.token,
                        endpoint=self.endpoint,
                        cache_dir=self.cache,
                    )

    def _check_space(self, missing: int) -> None:
        folder = self.cache
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if missing + MARGIN > free:
            raise HubError(
                f"{missing / 1e9:,.1f} GB are to be fetched, but {self.cache} has {free / 1e9:,.1f} GB left: make "
                "room, or set HF_HOME to a folder on another disk",
                reason="space",
                path=self.cache,
            )


def _blobs(found: _Found) -> Path:
    return found.snapshot.parent.parent / "blobs"


def _remote_files(info: Any) -> Iterator[RemoteFile]:
    """Raises TypeError where a file is not described, or in a way that the cache must not be trusted with."""
    for file in info.siblings:
        digest, size = (file.lfs.sha256, file.lfs.size) if file.lfs else (file.blob_id, file.size)
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) or type(size) is not int or size < 0:
            raise TypeError
        if not any(part in ("", ".", "..") for part in file.rfilename.split("/")):
            yield RemoteFile(file.rfilename, size, digest)


def _cached(source: Source, folder: Path, revision: str, of_drafter: bool) -> _Found | None:
    """What the cache holds of the source, if that is all of it."""
    try:
        commit = revision if COMMIT.fullmatch(revision) else (folder / "refs" / revision).read_text().strip()
        snapshot = folder / "snapshots" / commit
        sizes = {
            path.relative_to(snapshot).as_posix(): path.stat().st_size
            for path in snapshot.rglob("*")
            if path.is_file()  # of a link: what it points to
        }
        chosen, names = _choose(source, sizes, of_drafter)
        index = snapshot / "model.safetensors.index.json"
        if chosen is None and index.name in names:
            needed = set(json.loads(index.read_text())["weight_map"].values())
            if not needed <= sizes.keys():
                return None
    except HubError as error:
        if error.reason == "missing":
            return None
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return _Found(source, commit, snapshot, (), chosen)


def _choose(source: Source, sizes: dict[str, int], of_drafter: bool) -> tuple[str | None, list[str]]:
    """The GGUF file that is meant, or None for a drafter's folder; and the files that it takes."""
    weights = sorted(name for name in sizes if re.fullmatch(r"[^/]+\.safetensors", name))
    if of_drafter and source.file is None and "config.json" in sizes and weights:
        others = ("config.json", "model.safetensors.index.json", "mask_embedding.pt")
        return None, [name for name in others if name in sizes] + weights
    models = sorted(name for name in sizes if name.endswith(".gguf") and "mmproj" not in name)
    if source.file is None:
        fitting = models
    elif source.file in sizes:
        fitting = [source.file]
    else:
        ending = re.compile(rf"(.*[-._/])?{re.escape(source.file)}(\.gguf)?", re.IGNORECASE)
        fitting = [name for name in models if ending.fullmatch(SHARD.sub(".gguf", name))]
    whole = [name for name in fitting if not SHARD.search(name)]
    if len(whole) == 1:
        return whole[0], whole
    if whole:
        raise HubError(
            f"{source} can be any of {_listed(whole, sizes)}: name one, as {source.repo}:{Path(whole[0]).name}",
            reason="ambiguous",
        )
    if fitting:
        n = int(SHARD.search(fitting[0])[2])  # type: ignore[index]
        raise HubError(
            f"{fitting[0]} of {source.repo} is one of {n:,} parts, and pydflash reads a model from one file: choose "
            "another, or join them with llama.cpp's llama-gguf-split --merge and give the path",
            reason="sharded",
        )
    if source.file is not None and models:
        raise HubError(f"{source.repo} has no file {source.file}: it has {_listed(models, sizes)}", reason="missing")
    advice = "; if it is a drafter, give it as draft" if weights and not of_drafter else ""
    raise HubError(
        f"{source} has no GGUF file{' and no config.json with safetensors' if of_drafter else ''}{advice}",
        reason="missing",
    )


def _listed(names: Iterable[str], sizes: dict[str, int]) -> str:
    shown = [f"{name} ({sizes[name] / 1e9:,.1f} GB)" for name in names]
    more = f" and {len(shown) - 30} more" if len(shown) > 30 else ""
    return ", ".join(shown[:30]) + more


# ---- sentences ---------------------------------------------------------------------------------------------------


@contextmanager
def _explained(source: Source, endpoint: str) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into HubErrors."""
    from huggingface_hub import errors

    repo, login = source.repo, "log in with 'hf auth login', or pass a token"
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(
            f"{repo} is gated: accept its conditions at {endpoint}/{repo}, then {login}", reason="gated"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo} is not on {endpoint}, or it is private: check the name, or {login}", reason="missing"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo} has no revision {source.revision}", reason="missing") from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # huggingface_hub's way of saying that nobody answers
            raise HubError(f"{source} cannot be fetched: {endpoint} does not answer", reason="network") from None
        raise HubError(f"{repo} has no file {source.file}", reason="missing") from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{source} is not in the cache, and HF_HUB_OFFLINE is set", reason="offline") from None
    except errors.HFValidationError:
        raise HubError(f"{repo!r} cannot be a repository's name", reason="name") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(f"{endpoint} refuses access to {repo} ({status}): {login}", reason="unauthorized") from None
        raise HubError(
            f"{endpoint} answers {status} when asked for {source}: try again later", reason="network"
        ) from None
    except http_error() as error:
        raise HubError(
            f"{endpoint} cannot be reached: {error}. Look to the network, or to HTTPS_PROXY; files that are here are "
            "named by their paths",
            reason="network",
        ) from None
    except OSError as error:
        from huggingface_hub import constants

        raise disk_sentence(error, Path(constants.HF_HUB_CACHE)) from None
