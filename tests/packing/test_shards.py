"""Pieces on disk: read back as saved, and a damaged one is made again instead of being read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.packing.shards import ShardFolder
from cptquant.quantizers.grid import round_to_grid

FORMAT = QuantFormat.parse("int4-g32")
SITES = {"block-0000": "a", "block-0001": "b"}


def open_folder(path: Path) -> ShardFolder:
    return ShardFolder(path, dict.fromkeys(SITES.values(), FORMAT), dict.fromkeys(SITES.values(), (16, 64)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder, generator = open_folder(tmp_path), torch.Generator().manual_seed(0)
    for label, site in SITES.items():
        weight = torch.randn(16, 64, generator=generator)
        folder.save(label, {site: round_to_grid(weight, FORMAT, torch.float16, clip_search=False)}, [])
    return tmp_path


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_code(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x10
    path.write_bytes(bytes(content))


def _flip_the_sites(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'[\\"a\\"]', b'[\\"z\\"]'))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def test_whole_pieces_are_kept(saved: Path) -> None:
    folder = open_folder(saved)
    assert folder.labels == set(SITES) and folder.damaged == []


@pytest.mark.parametrize("damage", [_truncate, _flip_a_code, _flip_the_sites, _empty])
def test_a_damaged_piece_is_removed_and_named(saved: Path, damage: Callable[[Path], None]) -> None:
    path = saved / "block-0000.safetensors"
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    folder = open_folder(saved)
    assert folder.labels == {"block-0001"} and not path.exists()
    assert folder.damaged == [f"{path} was cut short or changed after it was written"]
    assert folder.quantized("a") is None and folder.quantized("b") is not None


def test_damage_while_in_use_says_what_to_do(saved: Path) -> None:
    folder = open_folder(saved)
    _truncate(saved / "block-0000.safetensors")
    with pytest.raises(ArtifactError, match=r"block-0000.safetensors was cut short or removed while it was in use"):
        folder.weight("a")
    (saved / "block-0000.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"run the same command again: finished blocks are kept, this one is made"):
        list(folder.tensors())
