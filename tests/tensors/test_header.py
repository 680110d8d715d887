"""Headers: every broken one is refused at the tensor at fault, every sound one is read as the reference reads it."""

import json
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from mergetool.errors import SourceError
from mergetool.tensors.dtypes import BY_NAME, of_torch
from mergetool.tensors.folder import open_model
from mergetool.tensors.header import MAX_HEADER_BYTES, TensorSpec, header_length, lay_out, parse_header
from mergetool.tensors.source import read_header
from tests.files import write_raw

SOUND = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes):
    return {"w": {**SOUND, **changes}}


def two(begin, end):
    return {"v": SOUND, "w": {**SOUND, "data_offsets": [begin, end]}}


def raw(fields):
    return '{"w":{' + fields + "}}"


BROKEN_ENTRIES = {  # header, bytes of data, what the message says
    "unknown dtype": (entry(dtype="F31"), 8, "unknown dtype 'F31'"),
    "dtype is not text": (entry(dtype=32), 8, "unknown dtype '32'"),
    "dtype is a list": (entry(dtype=["F32"]), 8, "unknown dtype"),
    "negative size": (entry(shape=[-2]), 8, "shape must be a list of sizes, not [-2]"),
    "size is a float": (entry(shape=[2.0]), 8, "shape must be a list of sizes, not [2.0]"),
    "size is text": (entry(shape=["2"]), 8, "shape must be a list of sizes"),
    "size is true": (entry(shape=[True, 2]), 8, "shape must be a list of sizes"),
    "shape is a number": (entry(shape=2), 8, "shape must be a list of sizes, not 2"),
    "shape is null": (entry(shape=None), 8, "shape must be a list of sizes, not None"),
    "negative offset": (entry(data_offsets=[-8, 0]), 8, "data_offsets must be a list of sizes"),
    "offset is a float": (entry(data_offsets=[0, 8.0]), 8, "data_offsets must be a list of sizes"),
    "offset of 30 digits": (entry(data_offsets=[0, 10**29]), 8, "data_offsets must be a list of sizes"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), 8, "are not [begin, end]"),
    "one offset": (entry(data_offsets=[8]), 8, "are not [begin, end]"),
    "offsets backwards": (entry(data_offsets=[8, 0]), 8, "are not [begin, end]"),
    "fewer bytes than the shape": (entry(data_offsets=[0, 4]), 4, "needs 8 bytes, data_offsets give 4"),
    "more bytes than the shape": (entry(data_offsets=[0, 12]), 12, "needs 8 bytes, data_offsets give 12"),
    "product that wraps 64 bits to 2": (entry(shape=[2, 1 << 32, 1 << 32]), 8, "does not make whole bytes"),
    "product that overflows": (entry(shape=[1 << 62, 1 << 62]), 8, "does not make whole bytes"),
    "odd number of 4-bit values": (entry(dtype="F4", shape=[3], data_offsets=[0, 2]), 2, "whole bytes of F4"),
    "6-bit values that end inside a byte": (
        entry(dtype="F6_E2M3", shape=[2], data_offsets=[0, 2]),
        2,
        "whole bytes of F6_E2M3",
    ),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, 8, "exactly dtype, shape and data_offsets"),
    "a key too many": (entry(strides=[1]), 8, "exactly dtype, shape and data_offsets"),
    "entry is a list": ({"w": ["F32", [2], [0, 8]]}, 8, "exactly dtype, shape and data_offsets"),
    "entry is null": ({"w": None}, 0, "exactly dtype, shape and data_offsets"),
    "first tensor not at 0": (entry(data_offsets=[8, 16]), 16, "begin at 8, expected 0 (hole)"),
    "hole": (two(16, 24), 24, "begin at 16, expected 8 (hole)"),
    "overlap": (two(4, 12), 12, "begin at 4, expected 8 (overlap)"),
    "same bytes twice": (two(0, 8), 8, "begin at 0, expected 8 (overlap)"),
}


@pytest.mark.parametrize("case", BROKEN_ENTRIES)
def test_a_broken_entry_is_refused_with_file_and_tensor(tmp_path, case):
    header, num_bytes, message = BROKEN_ENTRIES[case]
    path = write_raw(tmp_path / "broken.safetensors", header, bytes(num_bytes))
    with pytest.raises(SourceError) as caught:
        open_model(path)
    assert message in caught.value.what
    assert caught.value.where == f"{path}: w"
    assert caught.value.fix


DEEP = '{"w":' + "[" * 100_000 + "]" * 100_000 + "}"
BROKEN_HEADERS = {
    "not JSON": (b"{not json", b"", "not valid JSON"),
    "an array": (b"[]", b"", "must begin with '{'"),
    "text": (b'"w"', b"", "must begin with '{'"),
    "no header at all": (b"", b"", "must begin with '{'"),
    "bad UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "UTF-16": ('{"w":1}'.encode("utf-16"), b"", "must begin with '{'"),
    "half of a surrogate pair as a name": (rb'{"\ud800":' + json.dumps(SOUND).encode() + b"}", bytes(8), r"'\ud800'"),
    "NaN": (raw('"dtype":"F32","shape":[NaN],"data_offsets":[0,8]'), bytes(8), "NaN is not JSON"),
    "Infinity": (raw('"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]'), bytes(8), "Infinity is not JSON"),
    "integer of 5000 digits": (
        raw(f'"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,8]'),
        bytes(8),
        "not valid JSON",
    ),
    "a name twice": (
        f'{{"w":{json.dumps(SOUND)},"w":{json.dumps({**SOUND, "data_offsets": [8, 16]})}}}',
        bytes(16),
        "'w' occurs twice",
    ),
    "a field twice": (
        raw('"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]'),
        bytes(8),
        "'shape' occurs twice",
    ),
    "deep nesting": (DEEP, b"", "nested too deeply"),
    "text after the JSON": (json.dumps(entry()) + " x", bytes(8), "not valid JSON"),
    "NUL after the JSON": (json.dumps(entry()) + "\0", bytes(8), "not valid JSON"),
    "metadata is a list": ({"__metadata__": [], **entry()}, bytes(8), "__metadata__ must map text to text"),
    "metadata holds a number": ({"__metadata__": {"a": 1}, **entry()}, bytes(8), "__metadata__ must map text to text"),
    "metadata holds a mapping": ({"__metadata__": {"a": {}}}, b"", "__metadata__ must map text to text"),
    "metadata is not Unicode": (rb'{"__metadata__":{"a":"\udfff"}}', b"", "__metadata__ must map text to text"),
    "data one byte short": (entry(), bytes(7), "the file has"),
    "one byte after the data": (entry(), bytes(9), "the file has"),
    "data without tensors": ({}, bytes(1), "the file has"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_broken_header_is_refused_with_its_file(tmp_path, case):
    header, data, message = BROKEN_HEADERS[case]
    path = write_raw(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(SourceError) as caught:
        open_model(path)
    assert message in caught.value.what
    assert caught.value.where == str(path)
    str(caught.value).encode()  # can be printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (bytes(7), "7 bytes are too few"),
        (bytes(8), "must begin with '{'"),
        (b"\xff" * 8 + b"{}", "the header says it is 18446744073709551615 bytes long; the format allows 100000000"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), "the format allows 100000000"),
        ((3).to_bytes(8, "little") + b"{}", "3 bytes long, but only 2 bytes follow"),
        (b"PK\x03\x04" + bytes(40), "the header says it is"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the header says it is"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_model(path)
    assert message in caught.value.what
    assert caught.value.where == str(path)


@pytest.mark.parametrize("shape", [[2] * 400_000, [1 << 62] * 400_000])
def test_a_shape_with_very_many_axes_costs_no_time(shape):
    text = json.dumps(entry(shape=shape)).encode()
    began = time.process_time()  # whatever else the machine does
    with pytest.raises(SourceError) as caught:
        parse_header(text, len(text) + 16, "file")
    assert time.process_time() - began < 3  # multiplying all of them takes minutes
    assert len(str(caught.value)) < 500


def test_names_are_shown_in_part_when_they_are_huge():
    text = json.dumps({"x" * 1_000_000: {**SOUND, "dtype": "F31"}}).encode()
    with pytest.raises(SourceError) as caught:
        parse_header(text, len(text) + 16, "file")
    assert len(str(caught.value)) < 1000


def accepts(data):
    """Whether we accept a whole file given as bytes; anything but a SourceError is a failure of the test."""
    try:
        length = header_length(data[:8], len(data), "file")
        parse_header(data[8 : 8 + length], len(data), "file: fuzz")
    except SourceError as error:
        str(error).encode()
        return False
    return True


def reference_accepts(data):
    try:
        deserialize(data)
    except SafetensorError:
        return False
    return True


SAMPLE = save(
    {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(1.0, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4, dtype=torch.int64),
        "d": torch.tensor([1, 2, 3], dtype=torch.int8),
    },
    {"format": "pt"},
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_politely(data):
    assert not accepts(data) or reference_accepts(data)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    )
)
def test_flipped_bytes_never_make_us_accept_what_the_reference_refuses(flips):
    data = bytearray(SAMPLE)
    for place, value in flips:
        data[place] = value
    assert not accepts(bytes(data)) or reference_accepts(bytes(data))


sizes = st.integers(0, 5) | st.integers(-2, 2**70) | st.floats(allow_nan=False) | st.none() | st.booleans()
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BY_NAME, "F31", 1, None]),
        "shape": st.lists(sizes, max_size=3) | st.none(),
        "data_offsets": st.lists(sizes, min_size=1, max_size=3),
    }
)


@st.composite
def sound_documents(draw):
    """Headers that keep every rule, with their tensors in any order."""
    names = draw(
        st.lists(st.text(min_size=0, max_size=5), unique=True, max_size=4).filter(lambda n: "__metadata__" not in n)
    )
    document = {}
    end = 0
    for name in names:
        dtype = BY_NAME[draw(st.sampled_from(sorted(BY_NAME)))]
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if dtype.bits % 8:
            shape.append(8)
        spec = TensorSpec(name, dtype, tuple(shape))
        document[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [end, end := end + spec.num_bytes]}
    shuffled = draw(st.permutations(list(document)))
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    return {"__metadata__": metadata} | {name: document[name] for name in shuffled}, end


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sound_documents(), st.integers(0, 9))
def test_what_the_reference_accepts_is_accepted(made, padding):
    document, end = made
    text = json.dumps(document, ensure_ascii=False).encode() + b" " * padding
    data = len(text).to_bytes(8, "little") + text + bytes(end)
    assert reference_accepts(data)
    header = parse_header(text, len(data), "file")
    assert {slot.spec.name for slot in header.slots.values()} == set(document) - {"__metadata__"}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sound_documents(), fields)
def test_a_wrong_entry_among_sound_ones_is_refused_like_the_reference_does(made, wrong):
    document, end = made
    text = json.dumps({**document, "wrong": wrong}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(end)
    accepted = accepts(data)
    assert not accepted or reference_accepts(data)
    if not accepted and reference_accepts(data):  # the documented difference: longest axis of an empty tensor
        assert any(type(size) is int and size > 1 << 62 for size in wrong["shape"])


def storable(dtype):
    with warnings.catch_warnings(action="ignore"):  # half-precision complex numbers are experimental
        try:
            return save({"t": torch.zeros(2, dtype=dtype)}) is not None
        except Exception:
            return False


STORABLE = {d for d in vars(torch).values() if isinstance(d, torch.dtype) and storable(d)}


@pytest.mark.parametrize("dtype", sorted(STORABLE, key=str), ids=str)
def test_the_dtype_table_agrees_with_torch_and_the_reference(dtype):
    data = save({"t": torch.zeros(2, dtype=dtype)})
    length = int.from_bytes(data[:8], "little")
    stored = json.loads(data[8 : 8 + length])["t"]
    row = BY_NAME[stored["dtype"]]
    assert row.bits * stored["shape"][0] == 8 * dtype.itemsize * 2
    if row.bits >= 8:
        assert of_torch(dtype) is row
        assert row.is_float == (dtype.is_floating_point and row.name != "F8_E8M0")
    if row.is_float:
        assert row.largest == torch.finfo(dtype).max


def test_a_layout_has_the_same_bytes_as_the_reference_writer(tmp_path):
    state = {
        "model.layers.1.weight": torch.randn(3, 5),
        "model.layers.0.weight": torch.randn(7, 2).to(torch.bfloat16),
        "a scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "also.empty": torch.zeros(2, 0, 3, dtype=torch.int8),
        'ünïcode ☃ " \\ \n': torch.arange(3),
        "half": torch.randn(5).half(),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "complex": torch.randn(2, dtype=torch.complex64),
        "wide": torch.tensor([1, 2], dtype=torch.uint64),
        "e4m3": torch.randn(3).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(3).to(torch.float8_e5m2),
        "e4m3fnuz": torch.randn(3).to(torch.float8_e4m3fnuz),
        "e5m2fnuz": torch.randn(3).to(torch.float8_e5m2fnuz),
        "e8m0": torch.tensor([1, 2], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    expected = save(state, {"format": "pt"})
    specs = [TensorSpec(name, of_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.items()]
    prefix, header = lay_out(specs, {"format": "pt"})
    assert expected.startswith(prefix)
    assert header.file_size == len(expected)
    assert (len(prefix) - 8) % 8 == 0
    (tmp_path / "t.safetensors").write_bytes(expected)
    assert read_header(tmp_path / "t.safetensors") == header
    for name, tensor in state.items():
        begin = header.slots[name].begin
        stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert expected[begin : begin + header.slots[name].spec.num_bytes] == stored


def test_a_layout_without_tensors_is_a_valid_file():
    prefix, header = lay_out([], {})
    assert prefix == save({})
    assert header.file_size == len(prefix)
