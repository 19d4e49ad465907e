"""A setting of the encoder that another one leaves without effect is an error that names it."""

from __future__ import annotations

import pytest

from learn.cli import main
from learn.run_settings import EncoderSettings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "bfloat16", "device": "cuda:1"},
        {"precision": "int8"},
        {"precision": "int8", "int8_from": "bundle", "device": "cpu", "dtype": "float32"},
    ],
)
def test_settings_that_fit_together_are_accepted(settings):
    EncoderSettings(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"int8_from": "old"}, r"^encoder\.int8_from is 'old', but encoder\.precision is \"float\""),
        ({"precision": "int8", "dtype": "float16"}, r"^encoder\.dtype is 'float16', but encoder\.precision = \"int8\""),
        ({"precision": "int8", "int8_from": "old", "dtype": "bfloat16"}, r"^encoder\.dtype is 'bfloat16', but"),
        ({"precision": "int8", "int8_from": "old", "device": "cuda:1"}, r"^encoder\.device is 'cuda:1', but"),
    ],
)
def test_settings_without_effect_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        EncoderSettings(**settings).check()


def test_every_command_of_a_run_checks_them_once_its_options_have_replaced_the_file(tmp_path, capsys):
    (tmp_path / "a.toml").write_text("[encoder]\nint8_from = 'nowhere'\n")
    run = ["--run", str(tmp_path / "run"), "--config", str(tmp_path / "a.toml")]
    data = ["--data", str(tmp_path / "none")]
    for step in (["prepare", *data], ["encode"], ["train"], ["cvr"], ["evaluate"], ["export", "--out", str(tmp_path)]):
        assert main([*step, *run]) == 1
        assert capsys.readouterr().err.startswith("learn: encoder.int8_from is 'nowhere', but encoder.precision is")
    # With the option, the setting has an effect, and the command comes to the next error.
    assert main(["prepare", *data, *run, "--encoder-precision", "int8"]) == 1
    assert "int8_from" not in capsys.readouterr().err
    assert main(["prepare", *data, *run, "--encoder-precision", "int8", "--dtype", "float16"]) == 1
    assert capsys.readouterr().err.startswith("learn: encoder.dtype is 'float16', but encoder.precision")
