"""`checkpoint verify` says of checkpoints with whole files whether servers can be restored from them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from simulation import Case, Pace, simulate

from roundtable.common.config.settings import PolicyName, Settings
from roundtable.common.model.layout import CHUNK_BYTES, make_layout
from roundtable.common.storage import checkpoint
from roundtable.ps.server.restoring import hindrance


@pytest.mark.parametrize("policy", ["sync", "async"])
@pytest.mark.parametrize("servers", [1, 8])
def test_a_checkpoint_restores_if_its_manifest_names_all_files_that_were_written(
    tmp_path: Path, policy: PolicyName, servers: int
) -> None:
    settings = Settings(workers=2, servers=servers, policy=policy, global_batch=8, micro_batch=2)
    simulate(Case(settings, [Pace(0.1)] * 2, folder=tmp_path, chunk_bytes=CHUNK_BYTES))
    (folder,) = checkpoint.finished(tmp_path)[-1:]
    whole = checkpoint.read(folder)
    setup, files = whole.manifest.setup, whole.manifest.files
    owners = make_layout(setup.tensors, servers).owners()
    assert files.keys() == {checkpoint.file_of(server) for server in owners} and (len(owners) < servers) == (servers > 1)
    assert hindrance(whole) == ""
    for missing in files:
        rest = {name: entry for name, entry in files.items() if name != missing}
        checkpoint.write_manifest(folder, msgspec.structs.replace(whole.manifest, files=rest))
        found = checkpoint.read(folder)
        assert not found.damage() and str(folder) in hindrance(found)
