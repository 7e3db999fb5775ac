"""Flat minima and few bits: what is compared with what, without a network."""

import pytest

from benchmarks.quantization import BITS, FLOAT, REFERENCE, TRAINED, TUNED, summarise


def accuracies(seed, gain):
    """Each row has its own gain, but at 2 bits none."""
    found = {}
    for place, row in enumerate(REFERENCE):
        widths = [str(bits) for bits in BITS] if row in TRAINED else ["float", *map(str, BITS)]
        found[row] = {width: 70.0 + seed + (place * gain if width != "2" else 0.0) for width in widths}
    return found


def test_differences_are_paired_by_seed_and_corrected_for_all():
    runs = {str(seed): accuracies(seed, 1.0 + 0.01 * seed) for seed in range(5)}
    runs["5"] = {"base": runs["0"]["base"]}  # which has not come to its end
    found = summarise(runs)
    assert (found["seeds"], list(found["rows"])) == (5, [*FLOAT, *TUNED, *TRAINED])
    sam = found["rows"]["sam"]
    assert sam["3"]["difference"]["mean"] == pytest.approx(1.02)
    assert (sam["3"]["to"], found["rows"]["squat"]["3"]["to"]) == ("base", "tuned")
    assert found["rows"]["squat"]["3"]["difference"]["mean"] == pytest.approx(4 * 1.02)
    assert (sam["2"]["difference"]["mean"], sam["2"]["p_value_holm"]) == (0, 1)
    tests = [cell["p_value_holm"] for cells in found["rows"].values() for cell in cells.values() if "p_value" in cell]
    assert len(tests) == 3 * 4 + 1 * 4 + 3 * 3
    assert "difference" not in found["rows"]["base"]["3"]
    assert sam["3"]["p_value_holm"] > sam["3"]["p_value"]


def test_without_a_whole_seed_there_is_nothing():
    assert summarise({"0": {}}) == {}
