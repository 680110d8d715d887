"""Bundles that were damaged, or made to do harm: each is refused, with what is wrong and where, before it is used."""

import json

import pytest

import mergetool
from mergetool.bundle.manifest import MANIFEST_NAME, read_manifest
from mergetool.engine.growing import change_bundle
from mergetool.errors import SourceError
from tests.bundle.tiny import make_text_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_text_bundle(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def told(bundle):
    """The manifest, to be written with changes; then it is as it was."""
    path = bundle / MANIFEST_NAME
    before = path.read_bytes()

    def write(change):
        document = json.loads(before)
        change(document)
        path.write_text(json.dumps(document))

    yield write
    path.write_bytes(before)


def put(*places_and_value):
    *places, last, value = places_and_value

    def change(document):
        for place in places:
            document = document[place]
        document[last] = value

    return change


OUTSIDE = ("../../secret.safetensors", "/etc/passwd", "factors/../../x", "C:\\x", "..\\x")


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "where", [("tasks", 0, "factors"), ("tasks", 0, "head", "file"), ("base", "path"), ("files",), ("base", "files")]
)
def test_no_path_leaves_the_bundle(bundle, told, where, path):
    *places, last = where
    told(put(*places, last, {path: "0" * 64} if last == "files" else path))
    with pytest.raises(SourceError, match="no place inside the bundle"):
        mergetool.load_bundle(bundle, verify=False)
    with pytest.raises(SourceError, match="no place inside the bundle"):
        change_bundle(bundle, {}, ["a"])


def parameter_of(bundle):
    return next(name for name, each in read_manifest(bundle).parameters.items() if each.policy == "svd")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("ranks", [1]), "1 ranks of"),
        (("shape", [1 << 40, 1 << 40]), "in the base it is"),
        (("shape", [3]), "in the base it is"),
    ],
)
def test_tensors_are_what_the_manifest_says(bundle, told, change, said):
    told(put("parameters", parameter_of(bundle), *change))
    with pytest.raises(SourceError, match=said):
        mergetool.load_bundle(bundle, verify=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("tasks", 1, "name", "a"), "two tasks have one name"),
        (put("tasks", 0, "head", "layout", 7), "a layout that is not there"),
        (put("tasks", 0, "head", "layout", -1), "a layout that is not there"),
        (put("router", "matrices", ["x"]), "the router reads x"),
    ],
)
def test_the_parts_of_a_manifest_agree(bundle, told, change, said):
    told(change)
    with pytest.raises(SourceError, match=said):
        mergetool.load_bundle(bundle, verify=False)


@pytest.mark.parametrize("kind", ["factors", "heads"])
def test_what_was_cut_off_is_named_also_where_nothing_is_compared(bundle, kind):
    path = next((bundle / kind).rglob("*.safetensors"))
    before = path.read_bytes()
    for left in (len(before) // 2, 20, 0):
        path.write_bytes(before[:left])
        with pytest.raises(SourceError, match=r"cannot be read|SHA-256") as error:
            mergetool.load_bundle(bundle, verify=False)
        assert path.name in str(error.value)
        with pytest.raises(SourceError, match="SHA-256"):
            mergetool.load_bundle(bundle)
    path.write_bytes(before)
