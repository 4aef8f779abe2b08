"""Safetensors files are untrusted: what is well formed is read exactly, everything else is one kind of error."""

import contextlib
import json
import random
import resource
import struct
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from kvjax.checkpoint.folder import Tensors
from kvjax.checkpoint.reader import DTYPES, SafetensorsFile
from kvjax.errors import CheckpointError

MUTATIONS = 10_000


def read(path):
    """Every tensor of a file, copied."""
    with SafetensorsFile(path) as file:
        return {name: file.view(name).copy() for name in file}


def pack(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def sample():
    """About 2 KB: three tensors, one of them empty, and metadata."""
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((16, 16), dtype=np.float32),
        "b.weight": rng.standard_normal((4, 31)).astype(np.float16),
        "c": np.zeros((0, 5), np.int64),
        "d": np.arange(200, dtype=np.uint8).reshape(2, 100),
    }
    return save(tensors, metadata={"format": "pt"}), tensors


def test_every_dtype_of_the_format_that_numpy_knows_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    header, data = {}, b""
    for kind, dtype in DTYPES.items():
        raw = rng.integers(0, 2, 24, np.uint8).tobytes() if kind == "BOOL" else rng.bytes(24 * dtype.itemsize)
        header[kind] = entry((2, 3, 4), (len(data), len(data) + len(raw)), kind)
        data += raw
    (tmp_path / "x").write_bytes(pack(header, data))
    found = read(tmp_path / "x")
    for kind, dtype in DTYPES.items():
        start, stop = header[kind]["data_offsets"]
        assert found[kind].dtype == dtype and found[kind].shape == (2, 3, 4)
        assert found[kind].tobytes() == data[start:stop]


def test_a_file_of_the_reference_writer_reads_as_it_was_written(tmp_path):
    data, tensors = sample()
    (tmp_path / "x").write_bytes(data)
    found = read(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, strict=True)
    with SafetensorsFile(tmp_path / "x") as file:
        assert file.metadata == {"format": "pt"}
        assert not file.view("a").flags.writeable


def test_tensors_that_are_not_aligned_in_the_file_read_exactly(tmp_path):
    values = np.arange(7, dtype=np.float64)
    header = {"odd": entry((3,), (0, 3), "U8"), "x": entry((7,), (3, 59), "F64")}
    (tmp_path / "x").write_bytes(pack(header, b"\1\2\3" + values.tobytes()))
    np.testing.assert_array_equal(read(tmp_path / "x")["x"], values)


HUGE = 10**30
BAD = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the file": pack({"a": entry()}, b"\0" * 8, length=10_000),
    "header length of 2**64 - 1": b"\xff" * 8 + b"{}",
    "header not beginning with a brace": pack(b" {}"),
    "header of another type": pack(b"[]"),
    "not JSON": pack(b"{nonsense}"),
    "not UTF-8": pack(b'{"\xff\xfe": 1}'),
    "UTF-16": pack('{"a": 1}'.encode("utf-16")),
    "lone surrogate": pack(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8),
    "nested deep": pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "lists nested deep": pack(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "duplicate key": pack(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
    "duplicate field": pack(
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8
    ),
    "NaN": pack(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', b"\0" * 8),
    "number of 5,000 digits": pack(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % (b"9" * 5000)),
    "metadata that is no text": pack({"__metadata__": {"a": 1}}),
    "metadata that is a list": pack({"__metadata__": []}),
    "entry that is no object": pack({"a": 3}),
    "entry without shape": pack({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "unknown dtype": pack({"a": entry(dtype="F33")}, b"\0" * 8),
    "dtype that is a list": pack({"a": entry(dtype=["F32"])}, b"\0" * 8),
    "shape that is a number": pack({"a": {**entry(), "shape": 2}}, b"\0" * 8),
    "negative extent": pack({"a": entry((-2,))}, b"\0" * 8),
    "two negative extents": pack({"a": entry((-1, -2))}, b"\0" * 8),
    "fractional extent": pack({"a": entry((2.0,))}, b"\0" * 8),
    "extent true": pack({"a": entry((True, 2))}, b"\0" * 8),
    "huge extent": pack({"a": entry((HUGE,))}, b"\0" * 8),
    "product over 64 bits": pack({"a": entry((2**33, 2**33))}, b"\0" * 8),
    "product that wraps to the right size": pack({"a": entry((2**62, 2**3, 2))}, b"\0" * 8),
    "huge beside zero": pack({"a": entry((0, 2**62, 2**62), (0, 0))}),
    "hundred dimensions": pack({"a": entry((1,) * 99 + (2,))}, b"\0" * 8),
    "three offsets": pack({"a": entry(offsets=(0, 4, 8))}, b"\0" * 8),
    "offsets backwards": pack({"a": entry(offsets=(8, 0))}, b"\0" * 8),
    "negative offset": pack({"a": entry(offsets=(-8, 0))}, b"\0" * 8),
    "huge offset": pack({"a": entry(offsets=(HUGE, HUGE + 8))}, b"\0" * 8),
    "beyond the end": pack({"a": entry((4,), (0, 16))}, b"\0" * 8),
    "shorter than the shape": pack({"a": entry((2,), (0, 4))}, b"\0" * 4),
    "first byte unused": pack({"a": entry(offsets=(1, 9))}, b"\0" * 9),
    "last bytes unused": pack({"a": entry()}, b"\0" * 12),
    "overlap": pack({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "same bytes twice": pack({"a": entry(), "b": entry()}, b"\0" * 8),
    "gap": pack({"a": entry(), "b": entry(offsets=(12, 20))}, b"\0" * 20),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_file_is_a_checkpoint_error_that_names_the_file(tmp_path, name):
    (tmp_path / "bad.safetensors").write_bytes(BAD[name])
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        read(tmp_path / "bad.safetensors")
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


NUMBERS = [0, 1, -1, 7, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, HUGE, -HUGE, 1.5, True, None, "8", [], {}]
KEYS = [(b'"b.weight"', b'"a"'), (b'"shape"', b'"dtype"'), (b'"c"', b'"__metadata__"'), (b'"dtype"', b'"x"')]
TEXTS = [(b"16", b"NaN"), (b"16", b"1e999"), (b"16", b"9" * 4400), (b'"a"', b'"\xc3\x28"'), (b'"a"', b'"\\udc00"')]


def mutate(seed, rng):
    """One damaged variant of a valid file."""
    data = bytearray(seed)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    number = rng.choice(NUMBERS)

    def rebuilt():
        return bytearray(pack(header, bytes(data[8 + length :])))

    def field():
        return header[rng.choice([k for k in header if k != "__metadata__"])]

    match rng.randrange(14):
        case 0:  # bits of the whole file
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:  # bytes of the header
            for _ in range(rng.randrange(1, 5)):
                data[8 + rng.randrange(length)] = rng.choice(b'{}[]",:0123456789-eE.\\ntfN\x00\xff\x80')
        case 2:
            del data[rng.randrange(len(data)) :]
        case 3:
            at = rng.randrange(len(data))
            del data[at : at + rng.randrange(1, 64)]
        case 4:
            data += rng.randbytes(rng.randrange(1, 64))
        case 5:
            data[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, len(data), 2**27, 2**63, 2**64 - 1]))
        case 6:
            field()["shape"] = [number] * rng.randrange(1, 6)
            data = rebuilt()
        case 7:  # the extents multiply to the same, or wrap to it
            field()["shape"] = rng.choice(
                [[2**32, 2**32], [0, 2**62], [1] * rng.randrange(70), [2**63, 2], [-16, -16], [256]]
            )
            data = rebuilt()
        case 8:
            offsets = field()["data_offsets"]
            offsets[rng.randrange(2)] = number
            data = rebuilt()
        case 9:  # overlapping, shifted, swapped
            offsets, by = field()["data_offsets"], rng.randrange(-64, 65)
            offsets[:] = rng.choice(
                [[offsets[0] + by, offsets[1] + by], offsets[::-1], [0, offsets[1]], [offsets[0], 10**9]]
            )
            data = rebuilt()
        case 10:
            field()["dtype"] = rng.choice(["F64", "I8", "F4", "F8_E8M0", "BF16", "BOOL", "", "f32", number])
            data = rebuilt()
        case 11:  # keys: twice, gone, of another type
            text = json.dumps(header).encode()
            old, new = rng.choice(KEYS)
            data = bytearray(pack(text.replace(old, new), bytes(data[8 + length :])))
        case 12:
            depth = rng.randrange(1, 5000)
            text = json.dumps(header).encode()[:-1] + b',"z":' + b'{"y":[' * depth + b"]}" * depth + b"}"
            data = bytearray(pack(text, bytes(data[8 + length :])))
        case 13:  # not UTF-8, NaN, very long numbers
            text = json.dumps(header).encode()
            old, new = rng.choice(TEXTS)
            data = bytearray(pack(text.replace(old, new), bytes(data[8 + length :])))
    return bytes(data)


def resident(key):
    """VmRSS (now) or VmHWM (peak), bytes; of the whole run where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


def test_ten_thousand_mutations_let_nothing_escape_but_checkpoint_error(tmp_path):
    seed, _ = sample()
    assert 1500 < len(seed) < 2500
    rng, path, accepted = random.Random(0), tmp_path / "fuzzed", 0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = resident("VmRSS"), time.perf_counter()
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(seed, rng))
        try:
            read(path)
            accepted += 1
        except CheckpointError:
            pass
    took, grown = time.perf_counter() - began, resident("VmHWM") - before
    print(f"{MUTATIONS} mutations, {accepted} still valid, {took:.1f} s, peak memory +{grown / 1e6:.1f} MB")
    assert took < 60
    assert grown < 100e6
    assert 100 < accepted < MUTATIONS / 2  # the fuzzer damages, and not everything it does is damage


def test_accepts_what_the_reference_reader_accepts_and_no_more(tmp_path):
    seed, _ = sample()
    rng, path = random.Random(1), tmp_path / "x"
    for _ in range(1000):
        data = mutate(seed, rng)
        path.write_bytes(data)
        try:
            expected = {name: bytes(tensor["data"]) for name, tensor in safetensors.deserialize(data)}
        except Exception:
            expected = None
        try:
            found = {name: value.tobytes() for name, value in read(path).items()}
        except CheckpointError as error:
            # stricter on purpose: a key twice, dtypes and shapes that NumPy does not have
            known = ("stands twice", "has dtype", "more than can be addressed", "has shape [1, 1, 1, 1, 1, 1, 1, 1, …]")
            assert expected is None or any(reason in str(error) for reason in known), error
        else:
            assert found == expected


def shards(folder, index=None, **files):
    for name, tensors in files.items():
        (folder / f"{name}.safetensors").write_bytes(save(tensors))
    if index is not None:
        text = index if isinstance(index, str) else json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)


ONE, TWO = {"a": np.ones(3, np.float32)}, {"b": np.full((2, 2), 2, ml_dtypes.bfloat16)}


def test_many_files_with_an_index_read_as_one(tmp_path):
    shards(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y=TWO)
    with Tensors(tmp_path) as tensors:
        assert sorted(tensors) == ["a", "b"]
        assert tensors.view("a").tolist() == [1, 1, 1]
        assert tensors.info("b").dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "x.safetensors", "b": "z.safetensors"}, "'z.safetensors', which is not in the folder"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "'b' is not in 'x.safetensors'"),
        ({"a": "x.safetensors"}, "is not listed|not listed"),
        ({"a": "../x.safetensors"}, "no path inside the folder"),
        ({"a": "/etc/passwd"}, "no path inside the folder"),
        ({"a": "sub/../../x.safetensors"}, "no path inside the folder"),
        ({"a": "..\\x.safetensors"}, "no path inside the folder"),
        ({"a": ""}, "no path inside the folder"),
        ({"a": "x\0"}, "no path inside the folder"),
        ({"a": 3}, "weight_map"),
        ({}, "weight_map"),
        ('{"weight_map": ', "damaged JSON"),
        ("[]", "no JSON object"),
    ],
)
def test_an_index_that_disagrees_with_its_files_is_a_checkpoint_error(tmp_path, index, message):
    files = {"x": ONE | TWO} if index == {"a": "x.safetensors"} else {"x": ONE, "y": TWO}
    shards(tmp_path, index, **files)
    with pytest.raises(CheckpointError, match=message):
        Tensors(tmp_path)


def test_pickled_weights_are_refused_by_name_and_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never read"):
        Tensors(tmp_path)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Tensors(tmp_path)
