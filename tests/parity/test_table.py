"""docs/parity.md has a row for everything that is compared, whatever its numbers are."""

import parity_cases
import write_table

from cnn_jax import MODELS


def test_the_table_has_a_row_for_every_case():
    text = write_table.DOCUMENT.read_text()
    measured = text.split(write_table.BEGIN)[1].split(write_table.END)[0]
    rows = [line.split(" | ") for line in measured.splitlines() if line.startswith("| ")]
    names = [cells[0].removeprefix("| ") for cells in rows]
    assert names == ["model", *parity_cases.MODELS, "block", *parity_cases.BLOCKS]
    assert {len(cells) for cells in rows} == {3 + 2 * len(write_table.COLUMNS)}


def test_every_public_model_is_a_larger_one_of_a_case():
    larger = {
        "resnet34": "resnet18",
        "resnet50": "modern_cnn",
        "resnet101": "modern_cnn",
        "resnet152": "modern_cnn",
        "resnext_mini": "resnext50_32x4d",
        "seresnet_mini": "seresnet50",
        "ecaresnet_mini": "ecaresnet50",
        "cbam_resnet_mini": "cbam_resnet50",
    }
    assert {larger.get(name, name) for name in MODELS} <= parity_cases.MODELS.keys()
