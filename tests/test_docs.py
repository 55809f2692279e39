"""What the documents say is run."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import lowbit
from lowbit.data import DataSpec
from lowbit.recipe import read_recipe

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("scheme", ["w3a16-g32-asym", "w2a16-g32", "w8a16-channel", "w5a16-channel-asym"])
def test_reader_of_the_format_page(scheme: str, tmp_path: Path) -> None:
    """The reader printed in docs/format.md gives the weights that lowbit.load gives."""
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/format.md", "exec"), names)
    tiny.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    data = DataSpec(source="random", rows=2, length=16)
    lowbit.quantize(str(tmp_path / "model"), tmp_path / "out", scheme=scheme, data=data, format="lowbit")
    loaded = lowbit.load(str(tmp_path / "out")).state_dict()
    original = lowbit.load(str(tmp_path / "model")).state_dict()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.2.self_attn.o_proj"):
        weight = names["read_linear"](tmp_path / "out", name)
        assert torch.equal(weight, loaded[f"{name}.weight"])
        assert not torch.equal(weight, original[f"{name}.weight"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    """Every recipe in recipes/ reads, and opens with a comment that says what it is for."""
    read_recipe(path)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_there_are_recipes() -> None:
    """The folder is not empty, so that the test above runs."""
    assert len(list((ROOT / "recipes").glob("*.toml"))) >= 6
