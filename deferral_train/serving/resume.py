"""Prepare a trace folder that an engine left unfinished for being continued.

Unlike a collecting run's, its header grows with its shards. What is kept are the shards up to the first that is
missing, cut or altered; their prompts are done, all others are not.
"""

from __future__ import annotations

from dataclasses import replace

from deferral_train.errors import InputError
from deferral_train.traces import Manifest
from deferral_train.traces.folder import Folder
from deferral_train.traces.ledger import ChunkRecord, write_ledger
from deferral_train.traces.manifest import HEADER, differences, read_header, write_header
from deferral_train.traces.writer import sound_records


def finished_part(folder: Folder) -> tuple[Manifest, list[ChunkRecord]] | None:
    """The header cut to the shards that are whole, and their records; None for a folder without traces.

    Raises:
        InputError: a header that cannot be read.
    """
    if folder.size(HEADER) is None:
        return None
    manifest, sound = read_header(folder), sound_records(folder)
    records = []
    for chunk in manifest.chunks:
        if chunk.id not in sound:
            break
        records.append(sound[chunk.id])
    chunks = manifest.chunks[: len(records)]
    prompts = max((max(chunk.prompts) + 1 for chunk in chunks), default=0)
    return replace(manifest, chunks=chunks, prompt_ids=manifest.prompt_ids[:prompts]), records


def continued(folder: Folder, manifest: Manifest) -> tuple[Manifest, int]:
    """The header to go on with, and the bytes that are there; what is not whole is forgotten on disk too.

    Args:
        manifest: an empty one with today's settings.

    Raises:
        InputError: the folder was written with other settings.
    """
    before = finished_part(folder)
    if before is None:
        return manifest, 0
    kept, records = before
    changed = differences(replace(kept, prompt_ids=(), chunks=()), manifest)
    if changed:
        raise InputError(
            f"deferral.log.folder {folder} was written with other settings: {'; '.join(changed[:3])}; "
            "use the same ones to resume, or another folder"
        )
    write_ledger(
        folder, records
    )  # before the header: a line for a chunk that it does not know spoils the folder
    manifest = replace(manifest, prompt_ids=kept.prompt_ids, chunks=kept.chunks)
    write_header(folder, manifest)
    return manifest, sum(record.bytes for record in records)
