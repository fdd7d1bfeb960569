"""A model's weights in files: out of checkpoints, and out of files that PyTorch wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch

from roundtable.common.model.row_pages import BLOCK, pages
from roundtable.common.model.sparse_rows import draw, local_of, owner_of, page_ids
from roundtable.common.model.tensor_bytes import dtype_of, stored_as
from roundtable.common.protocol.model_spec import Rule, TableSpec, TensorSpec
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage import tensor_file
from roundtable.common.storage.checkpoint import Checkpoint
from roundtable.common.storage.safetensors_header import BUFFERS
from roundtable.common.storage.tensor_file import Entry, TensorFiles


def write_model(checkpoint: Checkpoint, path: Path) -> None:
    """Write all parameters and buffers in a checkpoint to one safetensors file, in the model's own dtypes.

    Tables and sharded layers are written a page at a time. If that fails, raise OSError and leave no file.
    """
    setup, servers = checkpoint.manifest.setup, checkpoint.manifest.servers
    files, seed = TensorFiles(checkpoint.paths), int(checkpoint.manifest.settings["seed"])
    entries = [Entry(spec.name, stored_as(spec)[1], list(_pieces(files, spec))) for spec in setup.tensors if spec.numel]
    for spec in setup.tables:
        entries.append(Entry(spec.name, [spec.rows, spec.dim], _rows(files, spec, servers, seed), torch.float32))
    for layer in setup.sharded_layers:
        features = layer.dim - layer.bias
        weights = _columns(_rows(files, layer, servers, seed), slice(features))
        entries.append(Entry(layer.name, [layer.rows, features], weights, torch.float32))
        if layer.bias:
            name = layer.name.removesuffix("weight") + "bias"
            biases = _columns(_rows(files, layer, servers, seed), slice(features, None))
            entries.append(Entry(name, [layer.rows], biases, torch.float32))
    temporary = path.with_name(path.name + ".tmp")
    try:
        rules = json.dumps({spec.name: spec.rule for spec in setup.tensors if spec.is_buffer})
        tensor_file.write(temporary, entries, {"format": "pt", "round": str(checkpoint.manifest.round), BUFFERS: rules})
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(files: TensorFiles, spec: TensorSpec) -> Iterator[torch.Tensor]:
    """Yield the tensor's elements, flat, in pieces."""
    done = 0
    while done < spec.units:
        piece = files[f"weights/{spec.name}" if f"weights/{spec.name}" in files else f"weights/{spec.name}#{done}"].reshape(-1)
        piece = piece.view(torch.uint8) if spec.is_bytes else piece
        done += len(piece)
        yield piece.view(stored_as(spec)[0]) if spec.is_bytes else piece.to(dtype_of(spec.dtype))


def _rows(files: TensorFiles, spec: TableSpec, servers: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the table page by page. Rows that no worker has asked for are drawn here, as servers would."""
    for page in pages(spec):
        ids = page_ids(spec, page)
        out = torch.empty(len(ids), spec.dim)
        for server in range(servers):
            here = owner_of(ids, servers) == server
            if here.any():
                at = local_of(ids[here], servers)
                rows = files.rows(f"table-{server}-of-{servers}/values/{spec.name}", int(at[0]), int(at[-1]) + 1)
                out[here] = rows.index_select(0, at - at[0])
                _draw(files, spec, servers, server, seed, ids, out)
        yield out


def _columns(parts: Iterable[torch.Tensor], which: slice) -> Iterator[torch.Tensor]:
    """Yield some columns of all rows."""
    for part in parts:
        yield part[:, which].contiguous()


def _draw(
    files: TensorFiles, spec: TableSpec, servers: int, server: int, seed: int, ids: torch.Tensor, out: torch.Tensor
) -> None:
    """Draw the rows `out` of `ids`, which begin with a block, in blocks of `server` that it had not drawn."""
    if spec.std is None:
        return
    drawn = files[f"table-{server}-of-{servers}/drawn/{spec.name}"]
    for start in range(0, len(ids), BLOCK):
        block = int(ids[start]) // BLOCK
        if block % servers == server and not drawn[block // servers]:
            draw(spec, seed, block, out[start : start + BLOCK])


def read_rules(path: Path) -> dict[str, Rule]:
    """Return the rules that merge the buffers in a model's file, by name. They are empty if the file was made elsewhere."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    try:
        return msgspec.json.decode(TensorFiles([path]).metadata[0].get(BUFFERS, "{}"), type=dict[str, Rule])
    except msgspec.MsgspecError:
        return {}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a safetensors file, or in a state_dict that torch.save wrote, on the CPU.

    Raise UsageError for anything else. Nothing in the file is run.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path} with weights.")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        files = TensorFiles([path])
        return {name: files[name] for name in files}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a file from elsewhere, torch's readers may raise almost anything
        text = next(iter(str(error).strip().splitlines()), type(error).__name__)
        kinds = "a safetensors file nor a state_dict that torch.save wrote"
        raise UsageError(f"{path} holds no weights that can be read: it is neither {kinds} ({text.rstrip('.')}).") from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UsageError(f"{path} is no state_dict: it must map names to tensors.")
    return found
