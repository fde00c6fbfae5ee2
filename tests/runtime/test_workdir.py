"""The directory of a run: claimed by one process, for one configuration."""

import pytest

from cnn_jax.errors import UserError
from cnn_jax.runtime.workdir import claim, read_config, write_config

CONFIG = {"seed": 0, "model": {"width": 4}}


def test_it_is_made_with_all_above_it(tmp_path):
    with claim(tmp_path / "deep" / "run"):
        assert (tmp_path / "deep" / "run").is_dir()


def test_a_second_claim_is_refused_until_the_first_ends(tmp_path):
    with (
        claim(tmp_path),
        pytest.raises(UserError, match=f"{tmp_path} is in use by another process"),
        claim(tmp_path),
    ):
        pass
    with claim(tmp_path):
        pass


def test_it_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path):
        raise ZeroDivisionError
    with claim(tmp_path):
        pass


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_its_place_is_one_message(tmp_path, name):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=f"cannot write to {tmp_path}/{name}: .+ another --workdir"),
        claim(tmp_path / name),
    ):
        pass


def test_the_configuration_comes_back(tmp_path):
    assert read_config(tmp_path) is None
    write_config(tmp_path, CONFIG)
    assert read_config(tmp_path) == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x00"])
def test_a_damaged_configuration_is_one_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)
