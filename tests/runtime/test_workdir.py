"""The directory of a run: claimed by one process, for one configuration."""

import json

import pytest

from cnn_jax.config import differences
from cnn_jax.errors import UserError
from cnn_jax.runtime.workdir import claim

CONFIG = {"seed": 0, "model": {"width": 4}}
OTHER = {"seed": 0, "model": {"width": 8}}


def claimed(directory, config=CONFIG, *, accept_changes=False):
    return claim(directory, config, differences, accept_changes)


def written(directory):
    return json.loads((directory / "config.json").read_text())


def test_it_is_made_with_the_configuration(tmp_path):
    with claimed(tmp_path / "deep" / "run"):
        assert written(tmp_path / "deep" / "run") == CONFIG


def test_a_second_claim_is_refused_until_the_first_ends(tmp_path):
    with claimed(tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path} is in use by another process"):
            claimed(tmp_path).__enter__()
    with claimed(tmp_path):
        pass


def test_it_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path):
        raise ZeroDivisionError
    with claimed(tmp_path):
        pass


def test_another_configuration_is_refused_and_changes_nothing(tmp_path):
    with claimed(tmp_path):
        pass
    with pytest.raises(UserError, match=r"model\.width: 4 in the run, 8 now"), claimed(
        tmp_path, OTHER
    ):
        pass
    assert written(tmp_path) == CONFIG
    with claimed(tmp_path):
        pass


def test_another_configuration_is_taken_if_changes_are_accepted(tmp_path):
    with claimed(tmp_path):
        pass
    with claimed(tmp_path, OTHER, accept_changes=True):
        pass
    assert written(tmp_path) == OTHER


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x00"])
def test_a_torn_configuration_is_one_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"), claimed(tmp_path):
        pass


def test_a_file_in_its_place_is_one_message(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/run: "), claimed(
        tmp_path / "run"
    ):
        pass
