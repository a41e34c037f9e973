"""Files of weights that are damaged or meant to harm: each is refused in one sentence, and none is believed or run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from jaxtrain.cli import main
from jaxtrain.errors import WeightsError
from jaxtrain.weights.file import open_weights
from jaxtrain.weights.pretrained import pretrained_config

RAN = Path("ran")  # in the current directory: made by code that a file brings with it


class Runs:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(RAN),)


def tensor(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def st(header: object, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file with this header: an object, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def npy(array: object, **more: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def npz(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def header_of(text: str, data: bytes = bytes(16)) -> bytes:
    """An array whose header is this text."""
    padded = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


WHOLE = npz({"a.npy": npy(np.ones((2, 2), np.float32))})
DATA = 4 << 20  # bytes of the larger files
BIG = st({"a": tensor(shape=(DATA // 4,), offsets=(0, DATA))}, bytes(DATA))

HOSTILE = {
    # a length that is no length
    "header of 2**63 bytes": st({"a": tensor()}, length=2**63),
    "header longer than the file": st({"a": tensor()}, length=10_000),
    "shorter than a length": b"\x01\x02\x03",
    "cut within the header": st({"a": tensor()})[:30],
    "cut within the data": BIG[:-1],
    "longer than the data": BIG + b"\0",
    "header that is most of the file": st(b"{" + b" " * (2 << 20) + b"}"),
    # JSON
    "no JSON": st(b"{hello}"),
    "nested without end": st(b'{"a":' + b"[" * 200_000),
    "nested objects": st(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "many brackets": st(b'{"a":[' + b"[]," * 300_000 + b"0]}"),
    "not UTF-8": st(b'{"\xff\xfe": 1}'),
    "a list": st([1, 2]),
    "NaN in the header": st(b'{"a": NaN}'),
    "a number of 10,000 digits": st(b'{"a": ' + b"9" * 10_000 + b"}"),
    "a name twice": st(b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}"),
    "a field twice": st(b'{"a":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,16]}}'),
    "no tensors": st({}, b""),
    "too many tensors": st({f"{i}": tensor(shape=(0,), offsets=(0, 0)) for i in range(10_001)}, b""),
    "metadata that is no text": st({"__metadata__": {"a": [1]}, "a": tensor()}),
    "another field": st({"a": tensor() | {"code": "x"}}),
    "no entry": st({"a": 3}),
    # shapes, types, places
    "a negative shape": st({"a": tensor(shape=(-2, -2))}),
    "a huge shape": st({"a": tensor(shape=(2**40, 2**40))}),
    "a shape of bools": st({"a": tensor(shape=(True, 4))}),
    "a shape of fractions": st({"a": tensor(shape=(2.0, 2.0))}),
    "a shape of 100 dims": st({"a": tensor(shape=(1,) * 100, offsets=(0, 4))}, bytes(4)),
    "an unknown type": st({"a": tensor("F31")}),
    "another type than the bytes": st({"a": tensor("F64")}),
    "offsets before the data": st({"a": tensor(offsets=(-16, 0))}),
    "offsets behind the file": st({"a": tensor(offsets=(1 << 40, (1 << 40) + 16))}),
    "offsets that run backwards": st({"a": tensor(offsets=(16, 0))}),
    "tensors that overlap": st({"a": tensor(), "b": tensor(offsets=(8, 24))}, bytes(24)),
    "a gap": st({"a": tensor(), "b": tensor(offsets=(20, 36))}, bytes(36)),
    # npz
    "pickled array": npz({"a.npy": npy(np.array([Runs()], object), allow_pickle=True)}),
    "no array": npz({"a.npy": pickle.dumps(Runs())}),
    "another member": npz({"a.npy": npy(np.ones(2)), "code.py": b"import os"}),
    "zip bomb": npz({"a.npy": npy(np.zeros(8 << 20))}, zipfile.ZIP_DEFLATED),
    "Fortran order": npz({"a.npy": npy(np.asfortranarray(np.ones((2, 3))))}),
    "big-endian": npz({"a.npy": npy(np.ones(2, ">f4"))}),
    "text": npz({"a.npy": npy(np.array(["x"]))}),
    "a record": npz({"a.npy": npy(np.zeros(2, [("a", "f4")]))}),
    "a huge array": npz({"a.npy": header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}")}),
    "a negative array": npz({"a.npy": header_of("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}")}),
    "a header that is code": npz({"a.npy": header_of(f"__import__('os').mkdir({str(RAN)!r})")}),
    "a header that nests": npz({"a.npy": header_of("(" * 4000)}),
    "an array twice": changed(npz({"a.npy": npy(np.ones(2)), "b.npy": npy(np.ones(2))}), b"b.npy", b"a.npy"),
    "a cut zip": WHOLE[:-10],
    "a zip with a comment": WHOLE[:-2] + b"\x05\x00hello",
    "an empty zip": npz({}),
    "a zip that names 65,535 members": WHOLE[:-14] + b"\xff\xff\xff\xff" + WHOLE[-10:],
    # other programs' files
    "PyTorch's zip": npz({"archive/data.pkl": pickle.dumps(Runs()), "archive/version": b"3"}),
    "pickle": pickle.dumps(Runs()),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a single array": npy(np.ones(4)),
}  # fmt: skip
PLAIN = 3 << 20  # bytes that parsing a header of at most 1 MiB may take


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_a_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, data = tmp_path / "weights.safetensors", HOSTILE[kind]
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError) as refusal, open_weights(path):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    text = str(refusal.value)
    assert refusal.value.exit_code == 66
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith((".", "'"))
    assert len(text) < 700
    assert not RAN.exists()
    assert peak <= max(1.1 * len(data), PLAIN), f"{peak:,} bytes for a file of {len(data):,}"


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "to_fifo").symlink_to(tmp_path / "fifo")
    for name in ("directory", "fifo", "empty", "loop", "gone", "to_fifo", "nothing", "x" * 300, "a\0b"):
        with pytest.raises(WeightsError), open_weights(tmp_path / name):
            pass


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".pkl"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(suffix, tmp_path, capsys):
    path = tmp_path / f"vgg19{suffix}"
    path.write_bytes(pickle.dumps(Runs()))
    assert main(["weights", "inspect", str(path)]) == 66
    said = capsys.readouterr().err
    assert "torch.load(" in said
    assert "weights_only=True" in said
    assert "vgg19.safetensors" in said


def test_both_formats_hold_what_was_written(tmp_path):
    """Also through a link, as the caches of other programs have them, and where data begin at an odd byte."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "whole.safetensors", {"format": "pt"})
    np.savez(tmp_path / "whole.npz", **arrays)
    odd = json.dumps({"a": tensor(shape=(2, 3), offsets=(0, 24)), "b": tensor("F16", (), (24, 26))}).encode()
    odd += b" " * (len(odd) % 2 == 0)
    data = arrays["a"].tobytes() + arrays["b"].tobytes()
    (tmp_path / "odd.safetensors").write_bytes(st(odd, data))
    (tmp_path / "link.safetensors").symlink_to("whole.safetensors")
    for name in ("whole.safetensors", "whole.npz", "odd.safetensors", "link.safetensors"):
        with open_weights(tmp_path / name) as file:
            assert file.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
            for key, array in arrays.items():
                np.testing.assert_array_equal(file.array(key), array)
                assert file.array(key).dtype == array.dtype


# ------------------------------------------------------------------------------------------------- the weights' own config

TIMM = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
}


def config_of(folder: Path, metadata: dict[str, str], **beside: object):
    safetensors.numpy.save_file({"a": np.ones(1)}, folder / "model.safetensors", metadata)
    for name, values in beside.items():
        (folder / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values))
    with open_weights(folder / "model.safetensors") as file:
        return pretrained_config(file)


def test_the_config_of_the_weights_is_read_where_others_keep_it(tmp_path):
    nothing = config_of(tmp_path, {"format": "pt"})
    assert not any(vars(nothing).values())
    own = config_of(tmp_path, {"pretrained_cfg": json.dumps(TIMM)})
    assert (own.mean, own.image_size, own.interpolation, own.crop_pct) == ((0.5,) * 3, 224, "bicubic", 0.9)
    timm = config_of(
        tmp_path, {}, config={"architecture": "resnet50", "pretrained_cfg": TIMM, "label_names": ["cat", "dog"]}
    )
    assert (timm.architecture, timm.std, timm.class_names) == ("resnet50", (0.2,) * 3, ("cat", "dog"))
    flat = {"architectures": ["ResNet"], "id2label": {"0": "cat", "1": "dog"}}
    images = {
        "image_mean": [0.4, 0.4, 0.4],
        "image_std": [0.2, 0.2, 0.2],
        "size": {"shortest_edge": 384},
        "resample": 3,
    }
    hf = config_of(tmp_path, {}, config=flat, preprocessor_config=images)
    assert (hf.image_size, hf.mean, hf.interpolation, hf.class_names) == (384, (0.4,) * 3, "bicubic", ("cat", "dog"))


@pytest.mark.parametrize(
    "values",
    ["[", "[]", "[" * 100_000, {"pretrained_cfg": 3}, {"pretrained_cfg": TIMM | {"mean": ["x"]}},
     {"pretrained_cfg": TIMM | {"std": [0.0] * 3}}, {"pretrained_cfg": TIMM | {"input_size": [3, 224, 112]}},
     {"pretrained_cfg": TIMM | {"crop_pct": "x"}}, {"id2label": {"0": 5}}, {"id2label": {"1": "x"}}],
)  # fmt: skip
def test_a_config_that_is_not_one_is_refused(values, tmp_path):
    with pytest.raises(WeightsError, match="not as timm or transformers write it") as refusal:
        config_of(tmp_path, {}, config=values)
    assert "\n" not in str(refusal.value)
