import re

from mergetool.arch.depth import block_depths, structural_depths


def test_the_first_integer_under_a_repeated_prefix_counts_the_layers():
    assert structural_depths(["h.0.experts.5.w", "h.1.experts.6.w", "h.10.w", "wte", "ln.3.w"]) == {
        "h.0.experts.5.w": (0, 3),
        "h.1.experts.6.w": (1, 3),
        "h.10.w": (2, 3),
        "wte": None,
        "ln.3.w": None,
    }


def test_towers_count_apart_and_gaps_do_not_matter():
    names = ["encoder.0.w", "encoder.3.w", "encoder.6.w", "decoder.0.w", "decoder.1.w"]
    assert list(structural_depths(names).values()) == [(0, 3), (1, 3), (2, 3), (0, 2), (1, 2)]


def test_stages_and_blocks_count_through():
    blocks = [re.compile(r"layer(\d+)\.(\d+)\.")]
    names = ["layer1.0.w", "layer1.1.w", "layer2.0.w", "layer10.0.w", "fc.w"]
    assert list(block_depths(names, blocks).values()) == [(0, 4), (1, 4), (2, 4), (3, 4), None]
