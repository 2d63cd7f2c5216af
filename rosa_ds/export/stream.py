"""A merged model written as it is read: some rows of one tensor at a time, into files laid out like the base's.

No more of the model is in memory than one block of rows, the adapter of one layer, and the pages of one mapped file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rosa_ds import distributed
from rosa_ds.adapters.inject import adapted_layers
from rosa_ds.adapters.layer import AdaptedLinear
from rosa_ds.adapters.quantize import packed_hash, quantized_forms
from rosa_ds.adapters.state import check_changes, check_fit, trained_parameters
from rosa_ds.adapters.stored import StoredAdapter
from rosa_ds.config.schema import MergeBase
from rosa_ds.export.adapted import refuse_other_numbers, rounded
from rosa_ds.models.convert import NotStreamableError
from rosa_ds.models.quantized import PACKED, SCALES
from rosa_ds.models.stream import Base
from rosa_ds.models.weights import INDEX, SINGLE

BLOCK_BYTES = 2 * 2**20
"""Of float32 numbers that are merged at once: few enough to stay in a core's cache and in memory that malloc uses again."""
WRITTEN_BEHIND = 2
"""Blocks that may wait to be written while the next one is made."""
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_merged(rows: MergedRows, folder: Path, metadata: dict[str, str]) -> None:
    """The merged model as safetensors files, one for each of the base's, with their names and an index like theirs."""
    files = rows.entries()
    total = sum(entry.bytes for entries in files.values() for entry in entries)
    single = len(files) == 1
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None) as bar:
        for number, entries in enumerate(files.values(), start=1):
            # as safetensors sorts them, so that every number is aligned
            entries.sort(key=lambda entry: (-entry.dtype.itemsize, entry.key))
            target = SINGLE if single else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            with (folder / target).open("wb") as stream:
                _write_file(stream, entries, rows, metadata, bar)
    if not single:
        index = {
            entry.key: f"model-{number:05d}-of-{len(files):05d}.safetensors"
            for number, entries in enumerate(files.values(), start=1)
            for entry in entries
        }
        content = {"metadata": {**metadata, "total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
    rows.base.close()


def _write_file(stream: BinaryIO, entries: list[_Entry], rows: MergedRows, metadata: dict[str, str], bar: tqdm) -> None:
    """One safetensors file: a header that says where everything will be, then everything. Format: huggingface/safetensors."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    pending: deque[Future[int]] = deque()
    with ThreadPoolExecutor(max_workers=1) as writer:
        for entry in entries:
            written = 0
            for block in rows.blocks(entry):
                flat = block.contiguous().reshape(-1)
                content = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
                pending.append(writer.submit(stream.write, content))
                while len(pending) > WRITTEN_BEHIND:
                    bar.update(pending.popleft().result())
                written += len(content)
            assert written == entry.bytes, f"{entry.name}: another size than its header says"
        for waiting in pending:
            bar.update(waiting.result())


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor of a file: its ``key`` there, and its ``name`` in ``base``."""

    key: str
    name: str
    base: Base
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MergedRows:
    """Rows of every tensor of a checkpoint with a trained state folded in.

    Tensors that are converted when they are loaded, such as those of single experts, come as they are stored.

    Args:
        model: injected, without numbers; says which tensor belongs to which layer, and which are tied.
        base: the checkpoint.
        dtype: of floating-point tensors; ``None``: each as it is stored.
        merge_base: of quantised layers; their matrices are whole in memory, one at a time.

    Attributes:
        quantization_error: what quantising loses of each layer's weight, ‖W − Q‖ / ‖W‖, of those written so far.

    Raises:
        ValueError: the state does not fit the model.
        NotStreamableError: a parameter is trained that is made of several tensors, or of one in another form.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Base,
        source: StoredAdapter,
        dtype: torch.dtype | None,
        merge_base: MergeBase = "dequantized",
    ) -> None:
        self.base, self.source, self.dtype, self.merge_base = base, source, dtype, merge_base
        self.forms = {f"{name}.{PACKED}": form for name, form in quantized_forms(model).items()}
        self.quantization_error: dict[str, float] = {}
        self.layers = {layer.weight_name: layer for layer in adapted_layers(model).values()}
        named = dict(model.named_parameters(remove_duplicate=False))
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        self.trained_name = {name: first[id(parameter)] for name, parameter in named.items()}
        check_fit(source.folder, source.trained, list(source.trained), trained_parameters(model))
        check_changes(source.folder, source.base, model)
        self.prefix = f"{model.base_model_prefix}."
        self._part: tuple[str, dict[str, Tensor]] = ("", {})
        for name in base.conversions:
            if self.trained_name.get(name, name) in source.trained or name in self.layers or name in self.forms:
                raise NotStreamableError(f"{name} is trained, and has other tensors there")

    def entries(self) -> dict[str, list[_Entry]]:
        """What each file holds, by the base's name of the file."""
        stored = self.base.unconverted()
        # tensor -> its name in the base that it is read from, and what it is, or is part of, in the model
        places = {key: (name, self.base, name) for name, key in self.base.names.items()}
        for conversion in self.base.conversions.values():
            places |= {key: (key, stored, conversion.first) for key in conversion.keys}
        files: dict[str, list[_Entry]] = {}
        for key, path in self.base.files.items():
            if key not in places:
                continue
            name, base, belongs = places[key]
            if self.base.new and belongs.startswith(self.prefix) and not key.startswith(self.prefix):
                key = self.prefix + key  # as it is called beside a head
            files.setdefault(path.name, []).append(self._entry(key, name, base))
        files = dict(sorted(files.items()))
        files[max(files)] += [self._entry(name, name, self.base) for name in self.base.new]
        return files

    def _entry(self, key: str, name: str, base: Base) -> _Entry:
        shape = base.shape(name)
        stored = base.rows(name, slice(0, 1) if shape else slice(None)).dtype
        dtype = self.dtype if self.dtype is not None and stored.is_floating_point else stored
        return _Entry(key, name, base, dtype, tuple(shape))

    def blocks(self, entry: _Entry) -> Iterator[Tensor]:
        """A tensor, rows after rows, in its type; what training did not touch comes as it is stored."""
        name, shape, read = entry.name, entry.shape, self._rows if entry.base is self.base else entry.base.rows
        if not shape:
            yield rounded(name, read(name, slice(None)), entry.dtype)
            return
        height = max(1, BLOCK_BYTES // max(1, 4 * math.prod(shape[1:])))
        for start in range(0, shape[0], height):
            yield rounded(name, read(name, slice(start, min(start + height, shape[0]))), entry.dtype)

    def _rows(self, name: str, rows: slice) -> Tensor:
        whole = self.trained_name.get(name, name)
        if whole in self.source.trained:
            tensor = self._parts(whole, {"": whole})[""]
            return tensor[rows] if tensor.ndim else tensor
        layer = self.layers.get(name)
        if layer is not None:
            return self._merged(layer, rows)
        if name in self.forms:
            self._parts(name, {})
            return self._base_rows(name, rows)
        return self.base.rows(name, rows)

    def _merged(self, layer: AdaptedLinear, rows: slice) -> Tensor:
        """``W + scale · B A + S`` in float32."""
        parts = self._parts(layer.name, {part: f"{layer.name}.{part}" for part in ("A", "B", "values")})
        weight = self._base_rows(layer.weight_name, rows).to(torch.float32, copy=True).contiguous()
        if "A" in parts:
            A, B = (parts["A"][:, rows], parts["B"]) if layer.transposed else (parts["A"], parts["B"][rows])
            (weight.T if layer.transposed else weight).addmm_(B.float(), A.float(), alpha=layer.scale)
        if "values" in parts and layer.weight_name in self.source.positions:
            width = layer.weight_shape[1]
            positions = self._parts_of_positions(layer)
            ends = torch.tensor([rows.start * width, rows.stop * width], dtype=positions.dtype)
            first, last = torch.searchsorted(positions, ends).tolist()
            inside = (positions[first:last].long() - rows.start * width).clamp_min(0)
            weight.view(-1).index_add_(0, inside, parts["values"][first:last].float())
        return weight

    def _parts_of_positions(self, layer: AdaptedLinear) -> Tensor:
        parts = self._part[1]
        if "positions" not in parts:
            parts["positions"] = self.source.positions[layer.weight_name].long()
        return parts["positions"]

    def _parts(self, key: str, names: Mapping[str, str]) -> dict[str, Tensor]:
        """The adapter of one layer, kept until another one is asked for."""
        if self._part[0] != key:
            self._part = (key, {p: self.source.trained[n] for p, n in names.items() if n in self.source.trained})
        return self._part[1]

    def _base_rows(self, name: str, rows: slice) -> Tensor:
        """Of the layer whose parts are kept."""
        parts = self._part[1]
        if name in self.forms:
            if "base" not in parts:
                parts["base"] = self._quantized_base(name)
            return parts["base"][rows]
        if "base" not in parts:
            if (changed := self.source.changed(name)) is None:
                return self.base.rows(name, rows)
            parts["base"] = changed
        return parts["base"][rows]

    def _quantized_base(self, name: str) -> Tensor:
        """The base of a quantised layer in float32, with what draws have changed."""
        layer = name.removesuffix(f".{PACKED}")
        original = self.base.rows(name, slice(None)).float()
        on_device = self.forms[name].pack(original.to(distributed.device()))  # as the run did
        packed = {part: array.cpu() for part, array in on_device.items()}
        if self.merge_base == "dequantized":
            refuse_other_numbers(self.source.description.base, {layer: packed_hash(packed)})
        base = self.forms[name].unpack(packed[PACKED], packed[SCALES], torch.float32)
        self.quantization_error[layer] = float((base - original).norm() / original.norm().clamp_min(1e-30))
        if self.merge_base == "original":
            base = original
        change = self.source.changed(f"{layer}.change")
        return base if change is None else base + change.float()
