import sys
from pathlib import Path

import pytest
from measured_process import run_measured

MEGABYTE = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_the_peak_is_the_commands_own_and_not_its_parents(tmp_path: Path):
    ballast = bytearray(400 * MEGABYTE)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "import time; held = bytearray({} << 20); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.5)"
    small = run_measured([sys.executable, "-c", script.format(1)], tmp_path / "small")
    large = run_measured([sys.executable, "-c", script.format(200)], tmp_path / "large")
    assert small.return_code == large.return_code == 0
    assert small.peak_memory_bytes < 100 * MEGABYTE
    assert 200 * MEGABYTE < large.peak_memory_bytes < 300 * MEGABYTE
    assert len(ballast) == 400 * MEGABYTE


def test_a_command_over_its_limit_is_ended(tmp_path: Path):
    measured = run_measured([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", limit_seconds=0.3)
    assert measured.return_code == -9
    assert measured.wall_seconds < 30
