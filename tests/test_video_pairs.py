"""tools/video_pairs.py: pairs of frames in folders."""

import struct
import sys
import wave

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

from utils import UserError, load_tool

TOOL = ROOT / "tools/video_pairs.py"
UPRIGHT = (2**16, 0, 0, 0, 2**16, 0)  # the matrix of an mp4 track, 16.16 fixed point
TURNED = (0, 2**16, 0, -(2**16), 0, 0)  # by 90 degrees, clockwise


def write_video(path, frames):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 4_000_000
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def cut(monkeypatch):
    """cut(clip, folder, gap) runs the tool in this process."""

    def call(clip, folder, gap=24):
        argv = [str(TOOL), str(clip), "--output_dir", str(folder), "--frame_gap", str(gap)]
        monkeypatch.setattr(sys, "argv", argv)
        load_tool("video_pairs").main()

    return call


def test_frames_are_pairs_but_not_over_a_cut_or_when_nothing_moves(cut, tmp_path, capsys):
    """12 frames that grow brighter from left to right, a cut, 12 that stand still."""
    ramp = np.linspace(0, 60, 64)[None, :, None].repeat(64, 0).repeat(3, 2)
    frames = [(ramp + 8 * n).astype(np.uint8) for n in range(12)]
    frames += [np.full((64, 64, 3), 250, np.uint8)] * 12
    clip = write_video(tmp_path / "clip.mp4", frames)
    cut(clip, tmp_path / "out", 4)
    said = capsys.readouterr().out
    names = {f"{n:05d}-{n + 4:05d}.png" for n in (0, 2, 4, 6)}
    for side in ("before", "after"):
        assert {file.name for file in (tmp_path / "out" / side).iterdir()} == names
    assert said.count("a cut") == 2 and said.count("nothing changes") == 4
    low, high = (
        np.asarray(Image.open(tmp_path / "out" / side / "00000-00004.png"), float).mean()
        for side in ("before", "after")
    )
    assert high - low == pytest.approx(32, abs=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"before", "after"}
    with pytest.raises(UserError, match="out"):
        cut(clip, tmp_path / "out")


def test_a_turned_video_comes_upright(cut, tmp_path):
    """A telephone stores lying frames and says in the file by how much to turn them."""
    frames = []
    for number in range(3):
        frame = np.zeros((64, 64, 3), np.uint8)
        frame[:, :32] = 90 * number + 60  # left half
        frames.append(frame)
    clip = write_video(tmp_path / "clip.mp4", frames)
    data = clip.read_bytes()
    upright, turned = (struct.pack(">9i", *m, 0, 0, 2**30) for m in (UPRIGHT, TURNED))
    track = data.index(b"tkhd")
    clip.write_bytes(data[:track] + data[track:].replace(upright, turned, 1))
    cut(clip, tmp_path / "out", 2)
    shown = Image.open(tmp_path / "out/after/00000-00002.png").convert("L")
    shown = np.asarray(shown).astype(int)
    assert shown[:28].mean() > shown[36:].mean() + 100  # turned clockwise, left is above


def test_what_is_no_video_is_named(cut, tmp_path):
    pytest.importorskip("av")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("sound.wav", "nowhere.mp4"):
        with pytest.raises(UserError, match=name):
            cut(tmp_path / name, tmp_path / "out")
    done = run(TOOL, tmp_path / "text.mp4", "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 2 and "text.mp4" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())
