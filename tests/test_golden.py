"""What the trainers compute stays what it was: cached, uncached, resumed, on two processes."""

import json

import golden
import pytest

IN_THE_SUITE = [
    *("qwen", "qwen uncached", "qwen resumed", "qwen two processes", "qwen rich"),
    *("slider", "slider resumed", "slider two processes"),
    *("sd", "sd resumed", "sd two processes", "sd difference"),
]


@pytest.fixture(scope="module")
def places(checkpoints, tmp_path_factory):
    """{experiment: folder of its results}; each is a whole command or two."""
    folder = tmp_path_factory.mktemp("golden")
    return golden.run_all(golden.ROOT, checkpoints, folder, IN_THE_SUITE)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THE_SUITE)
def test_results_are_those_of_the_file(name, places):
    wanted, found = json.loads(golden.FILE.read_text())[name], golden.sums(places[name])
    assert wanted.keys() == found.keys()
    for file, figures in wanted.items():
        assert found[file] == pytest.approx(figures, rel=2e-3, abs=2e-2), file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"),
    [("qwen", "qwen uncached"), ("qwen", "qwen resumed"), ("slider", "slider resumed"),
     ("sd", "sd resumed")],
)  # fmt: skip
def test_another_way_gives_the_same_bits(one, other, places):
    first, second = golden.bits(places[one]), golden.bits(places[other])
    loras = [name for name in first if name.endswith(".safetensors")]
    assert loras and all(first[name] == second[name] for name in loras)
