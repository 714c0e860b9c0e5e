"""``MANIFEST.json``: every file with size and hash; written last, so it marks completeness."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lit_prune.errors import ArtifactError
from lit_prune.saving.files import inside, is_risky, read_json, sha256_of, write_json
from lit_prune.saving.models import MODEL_FILES
from lit_prune.versions import versions_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST = "MANIFEST.json"
# What a saved model depends on.
SAVED_WITH = ("lit-prune", "torch", "transformers", "safetensors")
MAX_MANIFEST_BYTES = 8 * 2**20
SCHEMA_VERSION = 1
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a directory of `save_pruned` holds.

    Attributes:
        files: Every file but the manifest itself, by name.
        architecture: Format, why this one, class, layers, dtype, ties, fingerprint of the shapes,
            what was done to the model.
        verified: Whether the directory was loaded and compared before it was put in place.
        verification: How, in words.
        versions: Of the packages that wrote it.
    """

    files: dict[str, FileEntry]
    architecture: dict[str, Any]
    verified: bool
    verification: str
    versions: dict[str, str]

    @classmethod
    def of(
        cls, directory: Path, *, architecture: dict[str, Any], verified: bool, verification: str
    ) -> Manifest:
        """Describe the files that are there.

        Raises:
            ArtifactError: If one of them could not be loaded back (a folder, an odd name, code).
        """
        files = {}
        for path in sorted(directory.iterdir()):
            if path.name == MANIFEST:
                continue
            inside(directory, path.name)
            ours = path.name in MODEL_FILES
            if not path.is_file() or (is_risky(path.name) and not ours):
                raise ArtifactError(
                    f"{path.name} cannot be part of a saved model: only plain files that hold no "
                    "code and no pickle can. If the tokenizer brought it, save without "
                    "tokenizer=… and keep it elsewhere."
                )
            files[path.name] = FileEntry(path.stat().st_size, sha256_of(path))
        return cls(
            files=files,
            architecture=architecture,
            verified=verified,
            verification=verification,
            versions=versions_of(*SAVED_WITH),
        )

    @property
    def weights(self) -> list[str]:
        """Names of the files with weights, in order."""
        return sorted(name for name in self.files if _WEIGHTS.fullmatch(name))

    def write(self, directory: Path) -> None:
        """Write ``MANIFEST.json``."""
        write_json(directory / MANIFEST, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check ``MANIFEST.json``; no other file is opened.

        Raises:
            ArtifactError: If it is missing, too large, or not what `write` writes.
        """
        if not directory.is_dir():
            raise ArtifactError(f"{directory} is not a directory; pass what save_pruned returned.")
        if not (directory / MANIFEST).exists():
            raise ArtifactError(
                f"{directory} has no {MANIFEST}: not written by save_pruned, or the saving did "
                f"not finish.{_risky_files(directory)} A dense model is read by "
                "AutoModelForCausalLM.from_pretrained."
            )
        raw = read_json(inside(directory, MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
        place = directory / MANIFEST
        if (
            not isinstance(raw.get("schema_version"), int)
            or raw["schema_version"] != SCHEMA_VERSION
        ):
            raise ArtifactError(
                f"{place} has schema_version {raw.get('schema_version')!r:.40}; this lit_prune "
                f"reads {SCHEMA_VERSION}."
            )
        kinds = {
            "files": dict,
            "architecture": dict,
            "verified": bool,
            "verification": str,
            "versions": dict,
        }
        for key, kind in kinds.items():
            if not isinstance(raw.get(key), kind):
                raise ArtifactError(
                    f"{place}: {key} must be of type {kind.__name__}, got {raw.get(key)!r:.80}."
                )
        if unknown := sorted(set(raw) - {*kinds, "schema_version"}):
            raise ArtifactError(f"{place} has the unknown key {unknown[0]!r:.80}.")
        files = {name: _entry(directory, name, entry) for name, entry in raw["files"].items()}
        return cls(files=files, **{key: raw[key] for key in kinds if key != "files"})

    def check(self, directory: Path) -> None:
        """Compare every file with its entry: first all sizes, then all hashes.

        Raises:
            ArtifactError: Names the first file that is missing, short, long, or altered.
        """
        for name, entry in self.files.items():
            path = inside(directory, name)
            if not path.is_file():
                raise ArtifactError(
                    f"{directory}: {name} is missing.{_risky_files(directory)} Copy the "
                    "directory again."
                )
            if (size := path.stat().st_size) != entry.size:
                word = "short" if size < entry.size else "too long"
                raise ArtifactError(
                    f"{directory}: {name} is {word}: {size} bytes, expected {entry.size}. Copy "
                    "the directory again."
                )
        for name, entry in self.files.items():
            if sha256_of(inside(directory, name)) != entry.sha256:
                raise ArtifactError(
                    f"{directory}: {name} was altered: its sha256 is not the one in {MANIFEST}."
                )


def _entry(directory: Path, name: str, entry: Mapping[str, Any]) -> FileEntry:
    inside(directory, name)
    if is_risky(name) and name not in MODEL_FILES:  # those are hashed, never run
        raise ArtifactError(
            f"{directory}: {MANIFEST} lists {name}, which is code or a pickle: reading it can run "
            "whatever its author wanted. lit_prune reads safetensors and JSON only."
        )
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        raise ArtifactError(
            f"{directory}: the entry of {name} must have size and sha256, got {entry!r:.80}."
        )
    size, digest = entry["size"], entry["sha256"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ArtifactError(
            f"{directory}: the size of {name} must be a number of bytes, got {size!r:.40}."
        )
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ArtifactError(
            f"{directory}: the sha256 of {name} must be 64 hexadecimal digits, got {digest!r:.80}."
        )
    return FileEntry(size, digest)


def _risky_files(directory: Path) -> str:
    risky = sorted(path.name for path in directory.iterdir() if is_risky(path.name))
    if not risky:
        return ""
    return (
        f" {', '.join(risky[:4])} stands in its place: reading code or a pickle can run whatever "
        "its author wanted; lit_prune never does."
    )
