"""Tensors to and from safetensors files, piece by piece, and the comparison of what a file has with what a model needs.

The format is written here and not by its library, so that the bytes can be hashed on their way, a full disk shows as
the OSError it is, and no second copy of all weights stands in memory.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smalti.errors import CheckpointError, NumericError

Shapes = Mapping[str, tuple[int, ...]]

_PIECE = 1 << 24  # bytes per write: large enough for the disk, small enough to stay in the cache while it is hashed
_ROWS = 8  # of a table of differences

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `file_pieces` makes."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def file_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file.

    Raises:
        TypeError: a dtype that such a file cannot hold.

    Source: the format's description at huggingface.co/docs/safetensors.
    """
    yield _header(tensors)
    for name in _order(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names: the same however the tensors were stored.

    Raises:
        TypeError: a dtype that no file of ours can hold.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        for piece in file_pieces({name: tensors[name]}):
            digest.update(piece)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own.

    Raises:
        CheckpointError: the file is damaged or is something else.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # A copy: the library may hand out views of the file, which would follow what happens to it later.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise a NumericError that names the first tensor with a NaN or an infinity."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise NumericError(
            f"{what}: {bad[0]} has values that are not finite ({len(bad)} of {len(tensors)} tensors do); it is not "
            "stored, and what was stored before is kept. Go back to the newest checkpoint and lower the learning rate"
        )


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors into a model that must have exactly these, in name and shape; the model keeps its dtype and device.

    Raises:
        CheckpointError: something is missing, unexpected or of another shape; a short table says what.
    """
    own = model.state_dict()
    if table := differences(shapes_of(own), shapes_of(tensors)):
        raise CheckpointError(f"{where} holds another model than the {type(model).__name__} asked for: {table}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise CheckpointError(f"{where}: {name} is {tensor.dtype}, the model has {own[name].dtype}")
    model.load_state_dict(dict(tensors))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name to shape, the form in which two sets of weights are compared."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def differences(expected: Shapes, found: Shapes) -> str:
    """A short table of what is missing, unexpected or of another shape; empty if nothing is."""
    missing = [f"  missing     {name}  {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"  unexpected  {name}  {list(shape)}" for name, shape in found.items() if name not in expected]
    reshaped = [
        f"  shape       {name}  found {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    rows = [*missing[:_ROWS], *unexpected[:_ROWS], *reshaped[:_ROWS]]
    total = len(missing) + len(unexpected) + len(reshaped)
    if not total:
        return ""
    head = f"{len(missing)} tensors missing, {len(unexpected)} unexpected, {len(reshaped)} of another shape"
    rest = [f"  and {total - len(rows)} more"] if total > len(rows) else []
    return "\n".join([head, *rows, *rest])


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide dtypes first, as the format's own writer does, so that every tensor starts at a multiple of its width."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(f"tensor {name!r} is {tensor.dtype}, which a checkpoint cannot hold")
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
