"""A small study."""

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = {
    "recipe": {"epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0, "img_size": 32},
    "models": {"A": {"model": "lit_ti"}, "B+": {"model": "pvt_small"}},
    "seeds": [1, 2],
    "pairs": [["A", "B+"]],
}


@pytest.fixture
def small_study(tmp_path):
    """A function that saves a study of two models and two seeds, with changes of its entries, None for none."""

    def save(**changes: Any) -> Path:
        path = tmp_path / "study.yaml"
        entries = {key: value for key, value in (SMALL | changes).items() if value is not None}
        path.write_text(json.dumps(entries, indent=2))  # which is YAML
        return path

    return save
