"""Models that several test modules of the encoder write."""

import pytest

from tests.encoding import Model


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Rows of 256 and 512: every type fits."""
    model = Model(tmp_path_factory.mktemp("even"), hidden=256, layers=2, heads=4, ffn=512, tie=False, dtype="BF16")
    model.write(model.choose("F32"), name="f32")
    return model


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Rows of 96 and 200: no block of 256 fits, and in `ffn_down` none of 32."""
    model = Model(tmp_path_factory.mktemp("odd"), hidden=96, layers=1, heads=4, ffn=200, tie=True, dtype="F16")
    model.write(model.choose("F32"), name="f32")
    return model
